//! The tiers of synthesis: each makes images, a running daemon switches between them, and the generator lives through a
//! restart.

use crate::support::{Daemon, assert_consecutive, images, student, take, within};
use dreamfeed::client::{Batch, BatchStream, ClientError, Start};
use dreamfeed::proto;
use futures_util::StreamExt;
use tonic::Code;

/// Every tier in a step or two.
const QUICK: [&str; 18] = [
    "--batch-size",
    "8",
    "--preset",
    "digits",
    "--iterations",
    "2",
    "--warm-iterations",
    "2",
    "--hybrid-iterations",
    "2",
    "--fast-steps",
    "2",
    "--fast-width",
    "4",
    "--fast-warmup",
    "3",
    "--queue-chunks",
    "1",
];

fn start(synthesizer: &str) -> Daemon {
    Daemon::start(&[&QUICK[..], &["--synthesizer", synthesizer]].concat())
}

fn maker(batch: &Batch) -> String {
    batch.payload.metadata()["synthesizer"].clone()
}

/// Batches until one is made by this tier.
async fn until(stream: &mut BatchStream, synthesizer: &str) -> Vec<Batch> {
    let mut batches = Vec::new();
    loop {
        let batch = within(stream.next()).await.unwrap().unwrap();
        let found = maker(&batch) == synthesizer;
        batches.push(batch);
        if found {
            return batches;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_running_daemon_switches_between_all_tiers_and_no_stream_ends() {
    let daemon = start("noise");
    let client = daemon.client().await;
    client.push_student("resnet8", student(2), 1, None).await.unwrap();
    let mut stream = client.stream(Start::Earliest).await.unwrap();
    let mut batches = until(&mut stream, "noise").await;
    for name in ["adi", "warm-adi", "fast", "hybrid", "noise"] {
        let answer = client.set_synthesizer(name).await.unwrap();
        assert_eq!(answer.name, name);
        let settings: serde_json::Value = serde_json::from_str(&answer.settings_json).unwrap();
        assert_eq!(settings["synthesizer"], name);
        assert_eq!(client.describe().await.unwrap().synthesizer.unwrap().name, name);
        batches.extend(until(&mut stream, name).await);
        let batch = batches.last().unwrap();
        let settings: serde_json::Value = serde_json::from_str(&batch.payload.metadata()["settings"]).unwrap();
        assert_eq!(settings["synthesizer"], name);
        let against = if name == "noise" { 0 } else { 1 };
        assert_eq!(batch.student_version().unwrap(), vec![against; 8], "{name}");
        daemon.get("/metrics").1.lines().find(|line| line.contains(&format!("synthesizer=\"{name}\""))).unwrap();
    }
    assert_consecutive(&batches, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_tier_is_refused_and_nothing_changes() {
    let daemon = start("fast");
    let client = daemon.client().await;
    let refused = client.set_synthesizer("quick").await.unwrap_err();
    let ClientError::Status { status, .. } = refused else { panic!("{refused}") };
    assert_eq!(status.code(), Code::InvalidArgument);
    for part in ["\"quick\"", "adi, warm-adi, fast, hybrid, noise"] {
        assert!(status.message().contains(part), "{}", status.message());
    }
    assert_eq!(client.describe().await.unwrap().synthesizer.unwrap().name, "fast");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_command_line_switches_too() {
    let daemon = start("noise");
    let run = |name: &str| {
        let connect = format!("http://{}", daemon.grpc);
        let arguments = ["synthesizer", name, "--connect", &connect];
        std::process::Command::new(env!("CARGO_BIN_EXE_dreamfeed")).args(arguments).output().unwrap()
    };
    let output = run("hybrid");
    assert!(output.status.success(), "{output:?}");
    assert_eq!(String::from_utf8_lossy(&output.stdout), "hybrid from the next batch on\n");
    daemon.wait_metric("dreamfeed_synthesizer{synthesizer=\"hybrid\"}", 1.0);
    daemon.wait_metric("dreamfeed_synthesizer{synthesizer=\"noise\"}", 0.0);
    let client = daemon.client().await;
    until(&mut client.stream(Start::Latest).await.unwrap(), "hybrid").await;
    assert_eq!(run("quick").status.code(), Some(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn each_image_of_a_mixed_batch_says_which_tier_made_it() {
    let daemon = start("noise");
    let client = daemon.client().await;
    let mut stream = client.stream(Start::Earliest).await.unwrap();
    until(&mut stream, "noise").await;
    client.set_synthesizer("fast").await.unwrap();
    until(&mut stream, "fast").await;
    let replay = proto::Replay { share: 1.0, ..Default::default() };
    let request = proto::StreamRequest { batch_size: 256, replay: Some(replay), ..Default::default() };
    let mut mixed = client.stream_with(request).await.unwrap();
    let batch = take(&mut mixed, 256).await.remove(0);
    let names: Vec<&str> = batch.payload.metadata()["synthesizers"].split(',').collect();
    assert_eq!(names, ["adi", "warm-adi", "fast", "hybrid", "noise"]);
    let codes = batch.payload.get("synthesizer").unwrap();
    let codes: Vec<i64> = codes.data.as_chunks::<8>().0.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect();
    let mut makers = std::collections::BTreeMap::new();
    let mut chunks = client.stream(Start::Earliest).await.unwrap();
    while makers.len() <= *batch.sequences().unwrap().iter().max().unwrap() as usize {
        let chunk = within(chunks.next()).await.unwrap().unwrap();
        makers.extend(chunk.sequences().unwrap().into_iter().map(|sequence| (sequence, maker(&chunk))));
    }
    for (sequence, code) in batch.sequences().unwrap().iter().zip(codes) {
        assert_eq!(makers[sequence], names[code as usize], "image {sequence}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn views_are_the_same_images_seen_otherwise() {
    let arguments =
        [&QUICK[..], &["--synthesizer", "adi", "--views", "2", "--view-augmentation", "shift:2"]].concat();
    let daemon = Daemon::start(&arguments);
    let batches = take(&mut daemon.client().await.stream(Start::Earliest).await.unwrap(), 48).await;
    let labels: Vec<Vec<i64>> = batches.iter().map(|batch| batch.labels().unwrap()).collect();
    for first in [0, 3] {
        let whole = images(&batches[first].payload);
        for view in [first + 1, first + 2] {
            assert_eq!(labels[view], labels[first]);
            for (image, seen) in whole.iter().zip(images(&batches[view].payload)) {
                assert!(shifts(image, 2).any(|shifted| shifted == seen), "batch {view}");
            }
            assert_ne!(batches[view].teacher_logits().unwrap(), batches[first].teacher_logits().unwrap());
        }
    }
    assert_ne!(images(&batches[3].payload), images(&batches[0].payload));
}

/// An 8x8 image moved by up to `reach` pixels in each direction, black where nothing is.
fn shifts(image: &[u8], reach: i32) -> impl Iterator<Item = Vec<u8>> {
    let moves = (-reach..=reach).flat_map(move |down| (-reach..=reach).map(move |right| (down, right)));
    moves.map(|(down, right)| {
        let at = |row: i32, column: i32| (0..8).contains(&row) && (0..8).contains(&column);
        let places = (0..8).flat_map(|row| (0..8).map(move |column| (row - down, column - right)));
        places.map(|(row, column)| if at(row, column) { image[(8 * row + column) as usize] } else { 0 }).collect()
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn the_generator_lives_through_a_restart() {
    let arguments = [&QUICK[..], &["--synthesizer", "fast", "--max-images", "40"]].concat();
    let mut daemon = Daemon::start(&arguments);
    let client = daemon.client().await;
    take(&mut client.stream(Start::Earliest).await.unwrap(), 40).await;
    drop(client);
    daemon.restart(&arguments);
    // Three for itself and five for the log.
    assert!(daemon.log().contains("going on with the stored generator batches=8"), "{}", daemon.log());

    // Of another shape it would be useless, and the daemon says so and begins anew.
    let mut other = arguments.clone();
    other.extend(["--fast-latent", "32"]);
    daemon.restart(&other);
    assert!(daemon.log().contains("the stored generator cannot be gone on with"), "{}", daemon.log());
    let client = daemon.client().await;
    take(&mut client.stream(Start::Latest).await.unwrap(), 8).await;
}
