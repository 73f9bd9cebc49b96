#![allow(clippy::unwrap_used)]

use std::ffi::OsString;

use super::*;
use crate::model::source::NumberList;
use crate::synthesis::settings::Targets;

fn env(pairs: &[(&str, &str)]) -> Vec<(OsString, OsString)> {
    pairs.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect()
}

fn merge(flags: &ServeOptions, file: Option<&str>, pairs: &[(&str, &str)]) -> (ServeOptions, Vec<String>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dreamfeed.toml");
    std::fs::write(&path, file.unwrap_or_default()).unwrap();
    let mut problems = Vec::new();
    let options = layers::merge(flags, file.map(|_| path.as_path()), env(pairs), &mut problems);
    (options, problems)
}

#[test]
fn flags_win_over_environment_and_environment_over_file() {
    let file = "queue_chunks = 3\nmax_streams = 3\nseed = 3\n[synthesis]\nbatch_size = 3\niterations = 3";
    let pairs = [
        ("DREAMFEED_MAX_STREAMS", "4"),
        ("DREAMFEED_SEED", "4"),
        ("DREAMFEED_SYNTHESIS_BATCH_SIZE", "4"),
        ("HOME", "/"),
    ];
    let flags = ServeOptions { seed: Some(5), ..ServeOptions::default() };
    let (options, problems) = merge(&flags, Some(file), &pairs);
    assert_eq!(problems, Vec::<String>::new());
    assert_eq!((options.queue_chunks, options.max_streams, options.seed), (Some(3), Some(4), Some(5)));
    assert_eq!((options.synthesis.batch_size, options.synthesis.iterations), (Some(4), Some(3)));
}

#[test]
fn every_kind_of_value_can_come_from_the_environment() {
    let (options, problems) = merge(
        &ServeOptions::default(),
        None,
        &[
            ("DREAMFEED_LISTEN", "127.0.0.1:9"),
            ("DREAMFEED_INSECURE_LISTEN", "true"),
            ("DREAMFEED_DEVICE", "cuda:1"),
            ("DREAMFEED_LOG_CACHE_BYTES", "1MiB"),
            ("DREAMFEED_STUDENTS_MAX_BYTES", "4096"),
            ("DREAMFEED_STUDENTS_IDLE_TIMEOUT", "250ms"),
            ("DREAMFEED_SOURCE_MEAN", "0.485,0.456,0.406"),
            ("DREAMFEED_SOURCE_STD", "[1, 0.5]"),
            ("DREAMFEED_LOG_MAX_AGE", "7days"),
            ("DREAMFEED_DEMAND_MODE", "subscribers"),
            ("DREAMFEED_SYNTHESIS_TARGETS", "3,5"),
            ("DREAMFEED_SYNTHESIS_SCHEDULE", "warmup-cosine"),
            ("DREAMFEED_SYNTHESIS_LEARNING_RATE", "1"),
            ("DREAMFEED_SERVICE_HOST", "10.0.0.1"),
            ("DREAMFEED_PORT_7461_TCP_ADDR", "10.0.0.1"),
            ("DREAMFEED_CONFIG", "elsewhere.toml"),
        ],
    );
    assert_eq!(problems, Vec::<String>::new());
    assert_eq!(options.device, Some(DeviceOption::Cuda(1)));
    assert_eq!(options.log.cache_bytes, Some(ByteCount(1 << 20)));
    assert_eq!(options.log.max_age, Some(Span(Duration::from_secs(7 * 86_400))));
    assert_eq!(options.demand.mode, Some(DemandMode::Subscribers));
    assert_eq!(options.students.max_bytes, Some(ByteCount(4096)));
    assert_eq!(options.students.idle_timeout, Some(Span(Duration::from_millis(250))));
    assert_eq!(options.source.mean, Some(NumberList(vec![0.485, 0.456, 0.406])));
    assert_eq!(options.source.std, Some(NumberList(vec![1.0, 0.5])));
    assert_eq!(options.synthesis.targets, Some(Targets::List(vec![3, 5])));
    assert_eq!(options.synthesis.learning_rate, Some(1.0));
}

#[test]
fn flags_survive_the_way_through_a_table() {
    let flags = ServeOptions {
        log: LogOptions { cache_bytes: Some(ByteCount(123_456_789)), ..LogOptions::default() },
        students: StudentOptions {
            push_timeout: Some(Span(Duration::from_millis(1500))),
            ..StudentOptions::default()
        },
        source: SourceOptions { mean: Some(NumberList(vec![0.1, 0.2])), ..SourceOptions::default() },
        device: Some(DeviceOption::Cuda(3)),
        ..ServeOptions::default()
    };
    let (options, problems) = merge(&flags, None, &[]);
    assert_eq!(problems, Vec::<String>::new());
    assert_eq!(options.log.cache_bytes, flags.log.cache_bytes);
    assert_eq!(options.students.push_timeout, flags.students.push_timeout);
    assert_eq!(options.source.mean, flags.source.mean);
    assert_eq!(options.device, flags.device);
}

#[test]
fn all_problems_come_together_each_with_its_place() {
    let file =
        "queue_chunk = 1\nseed = \"x\"\n[synthesis]\nbatch_sizes = 3\niterations = -1\n[log]\ncache_bytes = \"many\"";
    let (_, problems) =
        merge(&ServeOptions::default(), Some(file), &[("DREAMFEED_MAX_STREAM", "4"), ("DREAMFEED_THREADS", "two")]);
    for place in [
        "queue_chunk: unknown key",
        "seed: ",
        "synthesis.batch_sizes: unknown key",
        "synthesis.iterations: ",
        "log.cache_bytes: ",
        "DREAMFEED_MAX_STREAM: unknown",
        "DREAMFEED_THREADS=\"two\": ",
    ] {
        assert!(problems.iter().any(|problem| problem.contains(place)), "{place} is not in {problems:#?}");
    }
    assert_eq!(problems.len(), 7, "{problems:#?}");
}

#[test]
fn validation_names_every_value() {
    let options = ServeOptions {
        listen: Some(([0, 0, 0, 0], 7461).into()),
        queue_chunks: Some(0),
        drain_timeout: Some(Span(Duration::from_secs(60))),
        log_level: Some("nonsense=loud".into()),
        log: LogOptions { max_images: Some(4), seed_images: Some(5), ..LogOptions::default() },
        synthesis: SynthesisOptions { batch_size: Some(0), ..SynthesisOptions::default() },
        ..ServeOptions::default()
    };
    let mut problems = Vec::new();
    assert!(Config::resolve(&options, &mut problems).is_none());
    for part in [
        "--insecure-listen",
        "queue_chunks",
        "drain_timeout",
        "log_level",
        "log.seed_images",
        "batch_size",
        "--teacher",
    ] {
        assert!(problems.iter().any(|problem| problem.contains(part)), "{part} is not in {problems:#?}");
    }
}

#[test]
fn a_seed_set_counts_in_whole_chunks() {
    let teacher = Some(std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/teacher.safetensors"));
    let seed_problems = |max_images, seed_images| {
        let options = ServeOptions {
            teacher: teacher.clone(),
            log: LogOptions { max_images: Some(max_images), seed_images: Some(seed_images), ..LogOptions::default() },
            synthesis: SynthesisOptions { batch_size: Some(48), ..SynthesisOptions::default() },
            ..ServeOptions::default()
        };
        let mut problems = Vec::new();
        let config = Config::resolve(&options, &mut problems);
        assert!(config.is_some(), "{problems:?}");
        problems.retain(|problem| problem.contains("log.seed_images"));
        problems
    };
    assert_eq!(seed_problems(96, 50), Vec::<String>::new());
    let problems = seed_problems(72, 50);
    assert!(problems.len() == 1 && problems[0].contains("that are 96"), "{problems:?}");
    assert_eq!(seed_problems(72, 100).len(), 1);
}
