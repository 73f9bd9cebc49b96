//! One typed configuration: TOML file < environment < flags, validated in full before a port is bound, every problem
//! reported together.
//!
//! [`ServeOptions`] is the only schema: its fields are the flags, its paths (`synthesis.batch_size`) the keys of the
//! file, and `DREAMFEED_` with the path in capitals (`DREAMFEED_SYNTHESIS_BATCH_SIZE`) the variables of the environment.
//! Each source becomes a TOML table of the same shape, later ones overlay earlier ones, and [`Config`] is what remains.

mod layers;
mod limits;

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize};
use tracing_subscriber::EnvFilter;

use crate::delivery::DemandMode;
use crate::device::Precision;
use crate::engine::{DeviceOption, EngineOptions};
use crate::log::{self, Retention};
use crate::model::source::{NetworkSource, SourceOptions};
use crate::students::StudentLimits;
use crate::synthesis::settings::SynthesisOptions;
use crate::telemetry::LogFormat;

pub use limits::{LimitOptions, Limits};

/// The outputs of a student where nothing else is set.
const DEFAULT_MAX_CLASSES: usize = 1 << 16;

/// Variables with our prefix that other programs of the project read.
const OTHER_VARIABLES: [&str; 3] = ["DREAMFEED_CONFIG", "DREAMFEED_BIN", "DREAMFEED_URL"];

/// Everything that can be set, and whether it was. Flags, file and environment share this shape.
#[derive(Clone, Debug, Default, Serialize, Deserialize, clap::Args)]
#[serde(default, deny_unknown_fields)]
#[command(next_help_heading = "Daemon")]
pub struct ServeOptions {
    /// The pretrained network to dream from, a safetensors file. Required.
    #[arg(long, value_name = "FILE")]
    pub teacher: Option<PathBuf>,
    /// Where the log and the students are kept: a folder, s3://BUCKET/PREFIX, gs://, az://, or memory: (gone with the
    /// process). One store belongs to one teacher; several daemons may share it
    /// [default: dreamfeed-store/ and the first 12 digits of the teacher's SHA-256].
    #[arg(long, value_name = "LOCATION")]
    pub store: Option<String>,
    /// The address of the gRPC service; port 0 takes any free one [default: 127.0.0.1:7461].
    #[arg(long, value_name = "ADDR")]
    pub listen: Option<SocketAddr>,
    /// The address of /metrics, /livez and /readyz (HTTP); port 0 takes any free one [default: 127.0.0.1:7462].
    #[arg(long, value_name = "ADDR")]
    pub admin_listen: Option<SocketAddr>,
    /// Allow addresses beyond loopback although there is neither encryption nor authentication: anyone who reaches the
    /// port can read the dreams and replace the student.
    #[arg(long, num_args = 0..=1, default_missing_value = "true", require_equals = true, value_name = "BOOL")]
    pub insecure_listen: Option<bool>,
    /// Write {"grpc":"HOST:PORT","admin":"HOST:PORT","pid":N} to this file once both ports are bound, atomically; it is
    /// removed at exit.
    #[arg(long, value_name = "PATH")]
    pub ready_file: Option<PathBuf>,
    /// The device: auto, cpu, cuda or cuda:N [default: auto].
    #[arg(long, value_name = "DEVICE")]
    pub device: Option<DeviceOption>,
    /// The element type in which the networks compute: f32, or bf16, which is faster where the processor has it
    /// [default: f32].
    #[arg(long, value_enum, value_name = "PRECISION")]
    pub precision: Option<Precision>,
    /// Threads of libtorch on the CPU [default: libtorch's choice].
    #[arg(long, value_name = "N")]
    pub threads: Option<usize>,
    /// The seed of every random number of the synthesis [default: 0].
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// Stop synthesizing after this many images and keep serving them [default: never].
    #[arg(long, value_name = "N")]
    pub max_images: Option<u64>,
    /// Chunks that may wait between the engine and the log [default: 2].
    #[arg(long, value_name = "N")]
    pub queue_chunks: Option<usize>,
    /// Streams open at one time [default: 256].
    #[arg(long, value_name = "N")]
    pub max_streams: Option<usize>,
    /// How long a drain may take after SIGTERM, at most 9s [default: 8s].
    #[arg(long, value_name = "DURATION")]
    pub drain_timeout: Option<Span>,
    /// /livez fails when the engine showed no sign of life for this long [default: 120s].
    #[arg(long, value_name = "DURATION")]
    pub liveness_timeout: Option<Span>,
    /// How the daemon's own log lines look: text or json [default: text].
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub log_format: Option<LogFormat>,
    /// Which of them to write: error, warn, info, debug, trace, or a filter such as info,dreamfeed=debug
    /// [default: info].
    #[arg(long, value_name = "FILTER")]
    pub log_level: Option<String>,
    /// The log of images.
    #[command(flatten, next_help_heading = "Log of images")]
    pub log: LogOptions,
    /// When to synthesize.
    #[command(flatten)]
    pub demand: DemandOptions,
    /// Pushed students.
    #[command(flatten, next_help_heading = "Students")]
    pub students: StudentOptions,
    /// What clients may cost.
    #[command(flatten, next_help_heading = "Limits")]
    pub limits: LimitOptions,
    /// How to read the teacher's file.
    #[command(flatten, next_help_heading = "Teacher, where its file does not tell")]
    pub source: SourceOptions,
    /// What to synthesize.
    #[command(flatten, next_help_heading = "Synthesis")]
    pub synthesis: SynthesisOptions,
}

/// The log of images.
#[derive(Clone, Debug, Default, Serialize, Deserialize, clap::Args)]
#[serde(default, deny_unknown_fields)]
pub struct LogOptions {
    /// Memory for recent chunks, one cache for all readers [default: 256MiB].
    #[arg(id = "log_cache_bytes", long = "log-cache-bytes", value_name = "BYTES")]
    pub cache_bytes: Option<ByteCount>,
    /// Retention: let the oldest chunks go beyond this many bytes [default: 10GiB].
    #[arg(id = "log_max_bytes", long = "log-max-bytes", value_name = "BYTES")]
    pub max_bytes: Option<ByteCount>,
    /// Retention: let the oldest chunks go beyond this many images [default: no bound].
    #[arg(id = "log_max_images", long = "log-max-images", value_name = "N")]
    pub max_images: Option<u64>,
    /// Retention: let chunks go that are older than this, for example 7days; ages are looked at every 30 s
    /// [default: no bound].
    #[arg(id = "log_max_age", long = "log-max-age", value_name = "DURATION")]
    pub max_age: Option<Span>,
    /// Never evict this many images at the start of the log, rounded up to whole chunks: a seed set for replay. Give
    /// every daemon of one store the same number, at every start: one that runs without it evicts the set
    /// [default: 0].
    #[arg(id = "log_seed_images", long = "log-seed-images", value_name = "N")]
    pub seed_images: Option<u64>,
}

/// When to synthesize.
#[derive(Clone, Debug, Default, Serialize, Deserialize, clap::Args)]
#[serde(default, deny_unknown_fields)]
pub struct DemandOptions {
    /// Synthesize always, or only while somebody subscribes to fresh images and has few ahead of it [default: always].
    #[arg(id = "demand_mode", long = "demand", value_enum, value_name = "MODE")]
    pub mode: Option<DemandMode>,
    /// With --demand subscribers: rest once the foremost subscriber has this many images ahead of it [default: 4 batches].
    #[arg(id = "demand_max_lag", long = "demand-max-lag", value_name = "N")]
    pub max_lag: Option<u64>,
}

/// Pushed students.
#[derive(Clone, Debug, Default, Serialize, Deserialize, clap::Args)]
#[serde(default, deny_unknown_fields)]
pub struct StudentOptions {
    /// The largest student file that a push may bring [default: 256MiB].
    #[arg(id = "students_max_student_bytes", long = "max-student-bytes", value_name = "BYTES")]
    pub max_bytes: Option<ByteCount>,
    /// The most outputs of a pushed student; at least the teacher's [default: 65536, or the teacher's where it has more].
    #[arg(id = "students_max_classes", long = "max-student-classes", value_name = "N")]
    pub max_classes: Option<usize>,
    /// Pushes under way at one time; each may hold a whole file in memory [default: 4].
    #[arg(id = "students_max_pushes", long = "max-pushes", value_name = "N")]
    pub max_pushes: Option<usize>,
    /// Fetches of students under way at one time; all of one version share its memory [default: 64].
    #[arg(id = "students_max_fetches", long = "max-fetches", value_name = "N")]
    pub max_fetches: Option<usize>,
    /// Newest versions that can still be fetched [default: 3].
    #[arg(id = "students_kept_students", long = "kept-students", value_name = "N")]
    pub kept_versions: Option<usize>,
    /// Abandon a push when no message arrived for this long [default: 30s].
    #[arg(id = "students_push_idle_timeout", long = "push-idle-timeout", value_name = "DURATION")]
    pub idle_timeout: Option<Span>,
    /// Abandon a push that is not complete after this long [default: 10min].
    #[arg(id = "students_push_timeout", long = "push-timeout", value_name = "DURATION")]
    pub push_timeout: Option<Span>,
}

/// A length of time, as people write it: 500ms, 8s, 10min.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Span(pub Duration);

impl FromStr for Span {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        humantime::parse_duration(text)
            .map(Self)
            .map_err(|e| format!("{text:?} is not a duration: {e}; give for example 500ms, 8s or 10min"))
    }
}

impl TryFrom<String> for Span {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Span> for String {
    fn from(span: Span) -> Self {
        span.to_string()
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(self.0).fmt(f)
    }
}

/// A number of bytes: 1048576, 1MiB, 256MB.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct ByteCount(pub u64);

impl FromStr for ByteCount {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse::<bytesize::ByteSize>()
            .map(|size| Self(size.as_u64()))
            .map_err(|_| format!("{text:?} is not a number of bytes; give for example 1048576 or 1MiB"))
    }
}

impl<'de> Deserialize<'de> for ByteCount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match toml::Value::deserialize(deserializer)? {
            toml::Value::Integer(bytes) => u64::try_from(bytes).map(Self).map_err(|_| {
                serde::de::Error::custom(format!("{bytes} is not a number of bytes; give a number from 0"))
            }),
            toml::Value::String(text) => text.parse().map_err(serde::de::Error::custom),
            other => Err(serde::de::Error::custom(format!(
                "{other} is not a number of bytes; give for example 1048576 or \"1MiB\""
            ))),
        }
    }
}

/// Everything that is wrong with a configuration, a sentence each.
#[derive(Debug)]
pub struct Problems(pub Vec<String>);

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.as_slice() {
            [one] => f.write_str(one),
            all => {
                write!(f, "the configuration has {} problems:", all.len())?;
                all.iter().try_for_each(|problem| write!(f, "\n  - {problem}"))
            }
        }
    }
}

impl std::error::Error for Problems {}

/// A configuration with nothing left to check, and the teacher that it names.
pub struct Config {
    /// The teacher, on the host.
    pub teacher: Arc<NetworkSource>,
    /// How the engine runs.
    pub engine: EngineOptions,
    /// The address of the gRPC service.
    pub listen: SocketAddr,
    /// The address of the admin pages.
    pub admin_listen: SocketAddr,
    /// Where to tell that the ports are bound.
    pub ready_file: Option<PathBuf>,
    /// Chunks between the engine and the log.
    pub queue_chunks: usize,
    /// The bound on open streams.
    pub max_streams: usize,
    /// The bound on a drain.
    pub drain_timeout: Duration,
    /// The bound on the age of the engine's heartbeat.
    pub liveness_timeout: Duration,
    /// Where the log and the students are kept.
    pub store: String,
    /// How the log is kept.
    pub log: log::LogOptions,
    /// When to synthesize.
    pub demand_mode: DemandMode,
    /// The images that the foremost subscriber may have ahead of it before synthesis rests.
    pub demand_max_lag: u64,
    /// What pushes may cost.
    pub students: StudentLimits,
    /// Fetches of students under way at one time.
    pub max_fetches: usize,
    /// What clients may cost.
    pub limits: Limits,
    /// How the daemon's own log lines look.
    pub log_format: LogFormat,
    /// Which of them to write.
    pub log_filter: String,
}

impl Config {
    /// Merges the three sources, reads the teacher, and checks everything; otherwise every problem at once, after those
    /// that the flags' parser already found.
    pub fn load(
        flags: &ServeOptions,
        mut problems: Vec<String>,
        file: Option<&std::path::Path>,
        environment: impl IntoIterator<Item = (std::ffi::OsString, std::ffi::OsString)>,
    ) -> Result<Self, Problems> {
        let options = layers::merge(flags, file, environment, &mut problems);
        let config = Self::resolve(&options, &mut problems);
        match config {
            Some(config) if problems.is_empty() => Ok(config),
            _ => Err(Problems(problems)),
        }
    }

    fn resolve(options: &ServeOptions, problems: &mut Vec<String>) -> Option<Self> {
        let mut check = |ok: bool, problem: String| {
            if !ok {
                problems.push(problem);
            }
        };
        let loopback = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let listen = options.listen.unwrap_or(loopback(7461));
        let admin_listen = options.admin_listen.unwrap_or(loopback(7462));
        let insecure = options.insecure_listen.unwrap_or(false);
        for (key, address) in [("listen", listen), ("admin_listen", admin_listen)] {
            check(
                insecure || address.ip().is_loopback(),
                format!(
                    "{key} is {address}, beyond loopback, where there is neither encryption nor authentication yet; \
                     listen on 127.0.0.1, or accept that with --insecure-listen"
                ),
            );
        }
        check(
            listen != admin_listen || listen.port() == 0,
            format!("listen and admin_listen are both {listen}; give them different ports"),
        );

        let count = |key: &str, value: Option<usize>, default: usize, max: usize| {
            let value = value.unwrap_or(default);
            let problem = format!("{key} is {value}; give 1 to {max}");
            (value, (1..=max).contains(&value), problem)
        };
        let (queue_chunks, ok, problem) = count("queue_chunks", options.queue_chunks, 2, 1024);
        check(ok, problem);
        let (max_streams, ok, problem) = count("max_streams", options.max_streams, 256, 100_000);
        check(ok, problem);
        let (max_pushes, ok, problem) = count("students.max_pushes", options.students.max_pushes, 4, 1024);
        check(ok, problem);
        let (max_fetches, ok, problem) = count("students.max_fetches", options.students.max_fetches, 64, 100_000);
        check(ok, problem);
        let (kept_versions, ok, problem) = count("students.kept_versions", options.students.kept_versions, 3, 1024);
        check(ok, problem);
        if options.threads.is_some() {
            let (_, ok, problem) = count("threads", options.threads, 1, 1024);
            check(ok, problem);
        }
        let cache_bytes = options.log.cache_bytes.map_or(256 << 20, |bytes| bytes.0);
        check(cache_bytes > 0, "log.cache_bytes is 0; give for example 256MiB".into());
        let keep_bytes = options.log.max_bytes.map_or(10 << 30, |bytes| bytes.0);
        check(keep_bytes > 0, "log.max_bytes is 0; give for example 10GiB".into());
        let keep_images = options.log.max_images;
        check(keep_images != Some(0), "log.max_images is 0; give at least 1, or leave it out".into());
        let seed_images = options.log.seed_images.unwrap_or(0);
        let seed_fits = keep_images.is_none_or(|most| seed_images <= most);
        check(
            seed_fits,
            format!(
                "log.seed_images is {seed_images}, more than log.max_images lets the whole log have; give fewer, or raise it"
            ),
        );
        check(options.demand.max_lag != Some(0), "demand.max_lag is 0; give at least 1".into());
        let store = options.store.clone();
        check(store.as_ref().is_none_or(|store| !store.is_empty()), "store is empty; give a folder or a URL".into());
        let max_bytes = options.students.max_bytes.map_or(256 << 20, |bytes| bytes.0);
        check(max_bytes > 0, "students.max_bytes is 0; give for example 256MiB".into());

        let mut span = |key: &str, value: Option<Span>, default: u64, max: u64| {
            let (value, max) = (value.map_or(Duration::from_secs(default), |span| span.0), Duration::from_secs(max));
            let ok = value > Duration::ZERO && value <= max;
            check(ok, format!("{key} is {}; give more than 0s and at most {}", Span(value), Span(max)));
            value
        };
        // Whoever stops a daemon waits ten seconds; the last of them is for ending the process.
        let max_age = options.log.max_age.map(|age| span("log.max_age", Some(age), 0, 100 * 365 * 86_400));
        let drain_timeout = span("drain_timeout", options.drain_timeout, 8, 9);
        let liveness_timeout = span("liveness_timeout", options.liveness_timeout, 120, 86_400);
        let idle_timeout = span("students.idle_timeout", options.students.idle_timeout, 30, 3600);
        let push_timeout = span("students.push_timeout", options.students.push_timeout, 600, 86_400);

        let limits = options.limits.resolve(max_pushes, problems);
        let log_filter = options.log_level.clone().unwrap_or_else(|| "info".into());
        let wrong = EnvFilter::try_new(&log_filter).err();
        if wrong.is_some() {
            problems.push(format!("log_level {log_filter:?}: give error, warn, info, debug or trace"));
        }

        let teacher = match &options.teacher {
            None => Err("teacher is missing; give a safetensors file with --teacher FILE".to_owned()),
            Some(path) => NetworkSource::open(path, &options.source).map_err(|e| format!("teacher: {e}")),
        };
        // Without a teacher its classes cannot be judged, but everything else can.
        let classes = teacher.as_ref().map_or(usize::MAX, |teacher| teacher.spec.num_classes);
        let settings = options.synthesis.resolve(classes);
        if let Err(all) = &settings {
            problems.extend(all.iter().map(|problem| format!("synthesis: {problem}")));
        }
        let most_classes = options.students.max_classes;
        if let (Some(most), Ok(teacher)) = (most_classes, &teacher)
            && most < teacher.spec.num_classes
        {
            problems.push(format!(
                "students.max_classes is {most}, fewer than the teacher's {classes}, which every student must have; give more, or \
                 leave it out"
            ));
        }
        let max_classes =
            most_classes.unwrap_or(DEFAULT_MAX_CLASSES.max(if classes == usize::MAX { 0 } else { classes }));
        let teacher = teacher.map_err(|problem| problems.push(problem)).ok()?;
        let settings = settings.ok()?;
        let chunk = settings.batch_size.saturating_mul(teacher.geometry.pixels() + 4 * classes + 20);
        // One chunk goes out as one message, and is held in memory whole.
        let most = usize::try_from(log::MAX_CHUNK_BYTES).unwrap_or(usize::MAX);
        if chunk > most {
            problems.push(format!(
                "synthesis.batch_size is {}, which makes chunks of {chunk} bytes of such images; give at most {}",
                settings.batch_size,
                settings.batch_size / chunk.div_ceil(most)
            ));
        }
        let identity: String = teacher.identity.chars().take(12).collect();
        // Whole chunks are kept, as many as the set reaches into.
        let seed_chunks = seed_images.div_ceil(settings.batch_size.max(1) as u64);
        let seed_rounded = seed_chunks.saturating_mul(settings.batch_size as u64);
        if let Some(most) = keep_images.filter(|most| seed_fits && seed_rounded > *most) {
            problems.push(format!(
                "log.seed_images is {seed_images}, in whole chunks of synthesis.batch_size {} that are {seed_rounded}, more \
                 than the {most} that log.max_images lets the whole log have; give fewer, or raise it",
                settings.batch_size
            ));
        }
        let seed_bytes = seed_chunks.saturating_mul(chunk as u64);
        if seed_bytes > keep_bytes {
            problems.push(format!(
                "log.seed_images is {seed_images}, about {seed_bytes} bytes that are never evicted, but log.max_bytes gives \
                 the whole log {keep_bytes}; give fewer, or raise it"
            ));
        }

        Some(Self {
            store: store.unwrap_or_else(|| format!("dreamfeed-store/{identity}")),
            log: log::LogOptions {
                retention: Retention { max_bytes: Some(keep_bytes), max_images: keep_images, max_age, seed_images },
                cache_bytes,
            },
            demand_mode: options.demand.mode.unwrap_or_default(),
            demand_max_lag: options.demand.max_lag.unwrap_or(4 * settings.batch_size as u64),
            teacher: Arc::new(teacher),
            engine: EngineOptions {
                device: options.device.unwrap_or_default(),
                precision: options.precision.unwrap_or_default(),
                threads: options.threads,
                settings,
                seed: options.seed.unwrap_or(0),
                max_images: options.max_images,
            },
            listen,
            admin_listen,
            ready_file: options.ready_file.clone(),
            queue_chunks,
            max_streams,
            drain_timeout,
            liveness_timeout,
            students: StudentLimits { max_bytes, max_classes, max_pushes, kept_versions, idle_timeout, push_timeout },
            max_fetches,
            limits,
            log_format: options.log_format.unwrap_or_default(),
            log_filter,
        })
    }
}

#[cfg(test)]
mod tests;
