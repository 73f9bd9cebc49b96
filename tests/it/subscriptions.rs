//! What a subscriber can ask for, over real sockets: shards, replay, staleness, sizes, pixels, classes; and what synthesis
//! does for whom.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use crate::support::{ARCH, Daemon, images, student, wait_for, within};
use dreamfeed::client::{Batch, BatchStream, Client, Start};
use dreamfeed::proto::dreamfeed_service_client::DreamfeedServiceClient;
use dreamfeed::proto::{Replay, Shard, StalenessBound, StreamRequest};
use futures_util::StreamExt;
use tonic::Code;
use tonic::transport::Endpoint;

/// 160 images in 20 chunks, and no more.
const BOUNDED: [&str; 4] = ["--batch-size", "8", "--max-images", "160"];

async fn next(stream: &mut BatchStream) -> Batch {
    within(stream.next()).await.expect("the stream goes on").unwrap()
}

async fn open(client: &Client, request: StreamRequest) -> BatchStream {
    client.stream_with(request).await.unwrap()
}

fn earliest() -> StreamRequest {
    StreamRequest { start: Some(Start::Earliest.into()), ..Default::default() }
}

/// Every image of the log by sequence, as plain chunks give them.
async fn everything(client: &Client, total: usize) -> BTreeMap<u64, Vec<u8>> {
    let mut all = BTreeMap::new();
    let mut stream = open(client, earliest()).await;
    while all.len() < total {
        let batch = next(&mut stream).await;
        all.extend(batch.sequences().unwrap().into_iter().zip(images(&batch.payload)));
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn ranks_share_the_fresh_images_and_resume_across_a_restart() {
    let mut daemon = Daemon::start(&BOUNDED);
    daemon.wait_metric("dreamfeed_log_next_sequence", 160.0);
    let all = everything(&daemon.client().await, 160).await;
    let mut seen: Vec<BTreeMap<u64, Vec<u8>>> = vec![BTreeMap::new(); 3];
    let mut cursors = Vec::new();
    let request = |index: usize, start: Start| StreamRequest {
        start: Some(start.into()),
        shard: Some(Shard { index: index as u32, count: 3 }),
        batch_size: 5,
        ..Default::default()
    };
    for (index, seen) in seen.iter_mut().enumerate() {
        // Each rank stops at another place; the daemon is restarted; each goes on from its own cursor.
        let client = daemon.client().await;
        let mut stream = open(&client, request(index, Start::Earliest)).await;
        let mut cursor = None;
        for _ in 0..=index * 2 {
            let batch = next(&mut stream).await;
            assert_eq!((batch.count, batch.fresh_count), (5, 5));
            seen.extend(batch.sequences().unwrap().into_iter().zip(images(&batch.payload)));
            cursor = Some(batch.cursor);
        }
        cursors.push(cursor.unwrap());
    }
    daemon.restart(&["--batch-size", "8", "--max-images", "80"]);
    let client = daemon.client().await;
    for (index, seen) in seen.iter_mut().enumerate() {
        let before = seen.len();
        let mut stream = open(&client, request(index, Start::Cursor(cursors[index].clone()))).await;
        // 240 images are there now, 80 of this rank: 16 batches.
        for _ in before / 5..16 {
            let batch = next(&mut stream).await;
            for (sequence, image) in batch.sequences().unwrap().into_iter().zip(images(&batch.payload)) {
                assert!(seen.insert(sequence, image).is_none(), "image {sequence} came twice");
            }
        }
        assert!(seen.keys().all(|sequence| *sequence % 3 == index as u64));
    }
    let together: BTreeMap<u64, Vec<u8>> = seen.into_iter().flatten().collect();
    assert_eq!(together.keys().copied().collect::<Vec<_>>(), (0..240).collect::<Vec<_>>());
    assert!(all.iter().all(|(sequence, image)| together[sequence] == *image));
}

#[tokio::test(flavor = "multi_thread")]
async fn replay_feeds_a_trainer_that_is_faster_than_synthesis() {
    let daemon = Daemon::start(&BOUNDED);
    daemon.wait_metric("dreamfeed_log_next_sequence", 160.0);
    let client = daemon.client().await;
    let all = everything(&client, 160).await;
    for sampling in [1, 2, 3] {
        let replay = Some(Replay { share: 0.5, sampling });
        let mut stream = open(&client, StreamRequest { replay, batch_size: 32, ..earliest() }).await;
        let (mut fresh, mut sent) = (Vec::new(), 0);
        for _ in 0..30 {
            let batch = next(&mut stream).await;
            assert_eq!(batch.count, 32);
            sent += batch.count;
            let sequences = batch.sequences().unwrap();
            for (sequence, image) in sequences.iter().zip(images(&batch.payload)) {
                assert_eq!(image, all[sequence]);
            }
            fresh.extend(sequences.into_iter().take(batch.fresh_count));
            let ratio = 1.0 - fresh.len() as f32 / sent as f32;
            assert!((batch.realized_replay_ratio - ratio).abs() < 1e-5);
            assert_eq!(batch.lag, 160 - fresh.len() as u64);
        }
        assert_eq!(fresh, (0..160).collect::<Vec<_>>());
    }
    assert!(daemon.metric("dreamfeed_images_sent_total{kind=\"replayed\"}").unwrap() >= 3.0 * 800.0);
    let ratio = daemon.metric("dreamfeed_replay_ratio").unwrap();
    // Of what was sent, which is ahead of what was read.
    assert!((0.7..1.0).contains(&ratio), "{ratio}");
    // As large as a synthesis run where no size is asked for.
    let replay = Some(Replay { share: 1.0, sampling: 0 });
    let batch = next(&mut open(&client, StreamRequest { replay, ..Default::default() }).await).await;
    assert_eq!((batch.count, batch.fresh_count, batch.realized_replay_ratio), (8, 0, 1.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn classes_pixels_and_sizes_are_as_asked() {
    let daemon = Daemon::start(&BOUNDED);
    daemon.wait_metric("dreamfeed_log_next_sequence", 160.0);
    let client = daemon.client().await;
    let all = everything(&client, 160).await;
    let mut labels = BTreeMap::new();
    let mut stream = open(&client, earliest()).await;
    for _ in 0..20 {
        let batch = next(&mut stream).await;
        labels.extend(batch.sequences().unwrap().into_iter().zip(batch.labels().unwrap()));
    }
    let present: BTreeSet<i64> = labels.values().copied().collect();
    let class = *present.first().unwrap();
    let expected: Vec<u64> = labels.iter().filter(|(_, label)| **label == class).map(|(s, _)| *s).collect();
    let request = StreamRequest { classes: vec![class as u32], pixel_format: 2, ..earliest() };
    let mut stream = open(&client, request).await;
    let mut seen = Vec::new();
    while seen.len() < expected.len() {
        let batch = next(&mut stream).await;
        assert!(batch.labels().unwrap().iter().all(|label| *label == class));
        assert_eq!(batch.payload.metadata()["pixels"], "f32_normalized");
        let tensor = batch.payload.get("images").unwrap();
        let values = tensor.data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap()));
        let pixels: Vec<u8> = values.map(|v| ((v * 0.25 + 0.5) * 255.0).round() as u8).collect();
        for (sequence, image) in batch.sequences().unwrap().iter().zip(pixels.chunks_exact(64)) {
            assert_eq!(image, all[sequence]);
        }
        seen.extend(batch.sequences().unwrap());
    }
    assert_eq!(seen, expected);
    // A size that no chunk has: 22 batches of 7, and 6 images that wait.
    let mut stream = open(&client, StreamRequest { batch_size: 7, ..earliest() }).await;
    let mut seen = Vec::new();
    for _ in 0..22 {
        seen.extend(next(&mut stream).await.sequences().unwrap());
    }
    assert_eq!(seen, (0..154).collect::<Vec<_>>());
    assert!(tokio::time::timeout(Duration::from_millis(200), stream.next()).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn images_staler_than_the_bound_are_passed_over() {
    let adi = ["--synthesizer", "adi", "--iterations", "1", "--batch-size", "4", "--demand", "subscribers"];
    let daemon = Daemon::start(&adi);
    let client = daemon.client().await;
    client.push_student(ARCH, student(2), 1, None).await.unwrap();
    let mut stream = open(&client, earliest()).await;
    let mut first = next(&mut stream).await;
    while first.student_version().unwrap().contains(&0) {
        first = next(&mut stream).await;
    }
    let seen_first = first.sequences().unwrap()[0];
    for seed in 3..6 {
        client.push_student(ARCH, student(seed), 1, None).await.unwrap();
    }
    let bound = StalenessBound { max_student_versions: Some(1), max_age: None };
    let start = Some(Start::Sequence(seen_first).into());
    let mut bounded =
        open(&client, StreamRequest { start, staleness_bound: Some(bound), ..Default::default() }).await;
    let batch = next(&mut bounded).await;
    assert!(batch.student_version().unwrap().iter().all(|version| *version == 0 || *version >= 3));
    assert!(batch.stale_images >= 4, "{}", batch.stale_images);
    assert!(batch.sequences().unwrap()[0] > seen_first);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_retention_overtakes_is_told_where_to_go_on() {
    let daemon = Daemon::start(&["--batch-size", "8", "--log-max-images", "64", "--demand", "subscribers"]);
    let client = daemon.client().await;
    let mut fast = open(&client, earliest()).await;
    let cursor = next(&mut fast).await.cursor;
    while next(&mut fast).await.first_sequence < 200 {}
    let request = StreamRequest { start: Some(Start::Cursor(cursor).into()), ..Default::default() };
    let error = match client.stream_with(request).await {
        Err(error) => error,
        Ok(mut stream) => within(stream.next()).await.unwrap().unwrap_err(),
    };
    assert_eq!(error.code(), Some(Code::OutOfRange), "{error}");
    let going_on = error.next_sequence().unwrap();
    assert!(going_on >= 100, "{going_on}");
    assert!(error.to_string().contains(&format!("still there is {going_on}")), "{error}");
    let log = client.describe().await.unwrap().log.unwrap();
    assert!(log.images <= 64 + 8, "{log:?}");
    let held = std::fs::read_dir(daemon.folder.path().join("store/log/chunks")).unwrap().count();
    assert!(held <= 10, "{held} chunks lie on the disk");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_subscribers_nothing_is_made_where_demand_decides() {
    let daemon = Daemon::start(&["--batch-size", "8", "--demand", "subscribers", "--demand-max-lag", "32"]);
    let made = || daemon.metric("dreamfeed_log_next_sequence").unwrap();
    daemon.wait_metric("dreamfeed_demand{reason=\"no_subscriber\"}", 1.0);
    daemon.wait_metric("dreamfeed_engine_state{state=\"resting\"}", 1.0);
    assert_eq!(made(), 0.0);
    // A reader that waits for more than the mark allows is still served: it has nothing ahead of it. Its windows are small,
    // so that soon nothing more is sent ahead.
    let channel = Endpoint::from_shared(format!("http://{}", daemon.grpc))
        .unwrap()
        .initial_stream_window_size(65_535)
        .initial_connection_window_size(65_535);
    let mut service = DreamfeedServiceClient::new(channel.connect().await.unwrap());
    let request = StreamRequest { batch_size: 100, ..earliest() };
    let mut stream = service.stream(request).await.unwrap().into_inner();
    assert_eq!(within(stream.message()).await.unwrap().unwrap().count, 100);
    // A reader that does not read has its fill at some time.
    daemon.wait_metric("dreamfeed_demand{reason=\"lag\"}", 1.0);
    daemon.wait_metric("dreamfeed_engine_state{state=\"resting\"}", 1.0);
    assert!(daemon.metric("dreamfeed_lag_images{bound=\"min\"}").unwrap() >= 32.0);
    drop(stream);
    daemon.wait_metric("dreamfeed_demand{reason=\"no_subscriber\"}", 1.0);
    // A batch that was begun before may still be on its way into the log.
    daemon.wait_metric("dreamfeed_engine_state{state=\"resting\"}", 1.0);
    let synthesized = || daemon.metric("dreamfeed_images_synthesized_total{synthesizer=\"noise\"}").unwrap();
    wait_for("what was made to lie in the log", || made() == synthesized());
    // Replay alone asks for nothing new.
    let before = made();
    let client = daemon.client().await;
    let replay = Some(Replay { share: 1.0, sampling: 0 });
    let mut stream = open(&client, StreamRequest { replay, ..Default::default() }).await;
    for _ in 0..20 {
        next(&mut stream).await;
    }
    assert_eq!((made(), synthesized()), (before, before));
    assert_eq!(daemon.metric("dreamfeed_subscribers"), Some(1.0));
}
