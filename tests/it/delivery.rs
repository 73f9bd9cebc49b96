//! Describe and Stream over real sockets.

use std::time::Duration;

use crate::support::{Daemon, assert_consecutive, images, take, wait_for, within};
use bytes::Bytes;
use dreamfeed::client::{ClientError, Start};
use dreamfeed::log::FORMAT;
use dreamfeed::model::checkpoint::hex;
use dreamfeed::proto;
use futures_util::StreamExt;
use sha2::{Digest, Sha256};
use tonic::Code;

/// 160 images in 20 chunks, and no more.
const BOUNDED: [&str; 4] = ["--batch-size", "8", "--max-images", "160"];

fn status(result: Result<impl Sized, ClientError>) -> (Code, String) {
    match result {
        Err(ClientError::Status { status, .. }) => (status.code(), status.message().to_owned()),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("the call succeeded"),
    }
}

async fn refused(daemon: &Daemon, request: proto::StreamRequest) -> (Code, String) {
    let client = daemon.client().await;
    match client.stream_with(request).await {
        Err(error) => status(Err::<(), _>(error)),
        Ok(mut stream) => status(within(stream.next()).await.unwrap()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn describe_says_what_the_daemon_dreams_from() {
    let daemon = Daemon::start(&["--batch-size", "8"]);
    let answer = daemon.client().await.describe().await.unwrap();
    let teacher = answer.teacher.unwrap();
    assert_eq!((teacher.arch.as_str(), teacher.num_classes), ("resnet8", 10));
    assert_eq!(teacher.sha256.len(), 64);
    assert_eq!(teacher.geometry.unwrap(), proto::Geometry { channels: 1, height: 8, width: 8 });
    assert_eq!(teacher.normalization.unwrap(), proto::Normalization { mean: vec![0.5], std: vec![0.25] });
    assert!(teacher.num_parameters > 10_000);
    assert!(answer.student.is_none());
    assert!(!answer.log.unwrap().log_id.is_empty());
    let synthesizer = answer.synthesizer.unwrap();
    assert_eq!((synthesizer.name.as_str(), synthesizer.batch_size), ("noise", 8));
    assert!(serde_json::from_str::<serde_json::Value>(&synthesizer.settings_json).unwrap().is_object());
    assert_eq!(answer.daemon_version, env!("CARGO_PKG_VERSION"));
    assert!(answer.max_student_bytes > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_batch_is_the_file_that_the_contract_documents() {
    let daemon = Daemon::start(&BOUNDED);
    let client = daemon.client().await;
    let bound = client.describe().await.unwrap().max_message_bytes;
    let mut stream = client.stream(Start::Earliest).await.unwrap();
    let batches = take(&mut stream, 160).await;
    assert_consecutive(&batches, 0);
    for batch in &batches {
        assert_eq!(batch.images().unwrap().1, [1, 8, 8]);
        assert!(batch.labels().unwrap().iter().all(|label| (0..10).contains(label)));
        assert_eq!(batch.teacher_logits().unwrap().1, 10);
        assert_eq!(batch.student_version().unwrap(), vec![0; batch.count]);
        assert_eq!(batch.competition().unwrap().len(), batch.count);
        let meta = batch.payload.metadata();
        assert_eq!(meta["format"], FORMAT);
        assert_eq!(meta["first_sequence"], batch.first_sequence.to_string());
        assert_eq!(meta["count"], batch.count.to_string());
        assert_eq!(meta["synthesizer"], "noise");
        let bytes = batch.payload.bytes();
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        assert_eq!(meta["data_sha256"], hex(&Sha256::digest(&bytes[8 + header..])));
        assert!(bytes.len() as u64 + 128 <= bound);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_subscribers_see_the_same_images_in_the_same_order() {
    let daemon = Daemon::start(&BOUNDED);
    let mut readers = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let client = daemon.client().await;
        readers.spawn(async move {
            let mut stream = client.stream(Start::Earliest).await.unwrap();
            let batches = take(&mut stream, 160).await;
            assert_consecutive(&batches, 0);
            batches.iter().map(|batch| batch.payload.bytes().clone()).collect::<Vec<Bytes>>()
        });
    }
    let all = within(readers.join_all()).await;
    assert!(all.iter().all(|seen| *seen == all[0]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cursor_continues_with_the_very_next_image() {
    let daemon = Daemon::start(&BOUNDED);
    let client = daemon.client().await;
    let whole = take(&mut client.stream(Start::Earliest).await.unwrap(), 160).await;
    // Resume after every message, each time on a new connection and from the cursor alone.
    let mut start = Start::Earliest;
    for expected in &whole {
        let mut stream = daemon.client().await.stream(start).await.unwrap();
        let batch = take(&mut stream, 1).await.remove(0);
        assert_eq!(batch.payload.bytes(), expected.payload.bytes());
        start = Start::Cursor(batch.cursor);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_inside_a_chunk_neither_repeats_nor_skips() {
    let daemon = Daemon::start(&BOUNDED);
    let client = daemon.client().await;
    let whole = take(&mut client.stream(Start::Earliest).await.unwrap(), 160).await;
    let expected: Vec<Vec<u8>> = whole.iter().flat_map(|batch| images(&batch.payload)).collect();
    for first in [1u64, 7, 8, 13, 159] {
        let mut stream = client.stream(Start::Sequence(first)).await.unwrap();
        let rest = take(&mut stream, 160 - first as usize).await;
        assert_consecutive(&rest, first);
        let found: Vec<Vec<u8>> = rest.iter().flat_map(|batch| images(&batch.payload)).collect();
        assert_eq!(found, expected[first as usize..]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn latest_waits_for_the_next_image_and_lag_counts_what_is_behind() {
    let daemon = Daemon::start(&BOUNDED);
    let client = daemon.client().await;
    take(&mut client.stream(Start::Earliest).await.unwrap(), 160).await;
    let first = take(&mut client.stream(Start::Earliest).await.unwrap(), 1).await.remove(0);
    assert_eq!(first.lag, 160 - first.count as u64);
    // What was just made is in the cache, all of it.
    assert_eq!(daemon.metric("dreamfeed_log_cache_bytes"), daemon.metric("dreamfeed_log_bytes"));
    // All images are made: what starts at the end gets nothing, and stays open.
    for start in [Start::Latest, Start::Sequence(160)] {
        let mut stream = client.stream(start).await.unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(200), stream.next()).await.is_err());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_outside_the_log_says_what_is_there() {
    // Room for a few chunks only.
    let daemon = Daemon::start(&["--batch-size", "8", "--max-images", "160", "--log-max-bytes", "8KiB"]);
    daemon.wait_metric("dreamfeed_log_next_sequence", 160.0);
    wait_for("retention after the last chunk", || daemon.metric("dreamfeed_log_bytes").unwrap() <= 8192.0);
    let client = daemon.client().await;
    let first = client.describe().await.unwrap().log.unwrap().first_sequence;
    assert!(first > 0);
    let at = |sequence| proto::StreamRequest { start: Some(Start::Sequence(sequence).into()), ..Default::default() };
    let (code, message) = refused(&daemon, at(0)).await;
    assert_eq!(code, Code::OutOfRange);
    assert!(message.ends_with(&format!("still there is {first}")), "{message}");
    for ahead in [161, i64::MAX as u64, u64::MAX] {
        let (code, message) = refused(&daemon, at(ahead)).await;
        assert_eq!(code, Code::OutOfRange, "{message}");
    }
    let rest = take(&mut client.stream(Start::Earliest).await.unwrap(), 160 - first as usize).await;
    assert_consecutive(&rest, first);
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_and_foreign_cursors_are_told_apart() {
    let daemon = Daemon::start(&BOUNDED);
    let other = Daemon::start(&BOUNDED);
    let at = |cursor: Bytes| proto::StreamRequest { start: Some(Start::Cursor(cursor).into()), ..Default::default() };
    let own = take(&mut daemon.client().await.stream(Start::Earliest).await.unwrap(), 1).await.remove(0).cursor;
    let foreign = take(&mut other.client().await.stream(Start::Earliest).await.unwrap(), 1).await.remove(0).cursor;
    let mut damaged = own.to_vec();
    damaged[20] ^= 1;
    for cursor in [Bytes::new(), Bytes::from_static(b"nonsense"), own.slice(..28), damaged.into()] {
        let (code, message) = refused(&daemon, at(cursor)).await;
        assert_eq!(code, Code::InvalidArgument, "{message}");
        assert!(message.contains("cursor"), "{message}");
    }
    let (code, message) = refused(&daemon, at(foreign)).await;
    assert_eq!(code, Code::OutOfRange, "{message}");
    assert!(message.contains("belongs to log") && message.ends_with("holds is 0"), "{message}");
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_options_are_refused_by_name() {
    let daemon = Daemon::start(&BOUNDED);
    let request = proto::StreamRequest::default;
    let replay = |share, sampling| Some(proto::Replay { share, sampling });
    let malformed = [
        ("shard.index", proto::StreamRequest { shard: Some(proto::Shard { index: 2, count: 2 }), ..request() }),
        ("shard.index", proto::StreamRequest { shard: Some(proto::Shard { index: 1, count: 0 }), ..request() }),
        ("replay.share", proto::StreamRequest { replay: replay(1.5, 0), ..request() }),
        ("replay.share", proto::StreamRequest { replay: replay(f32::NAN, 0), ..request() }),
        ("replay.sampling", proto::StreamRequest { replay: replay(0.5, 99), ..request() }),
        (
            "staleness_bound.max_age",
            proto::StreamRequest {
                staleness_bound: Some(proto::StalenessBound {
                    max_student_versions: None,
                    max_age: Some(prost_types::Duration { seconds: -1, nanos: 0 }),
                }),
                ..request()
            },
        ),
        ("pixel_format", proto::StreamRequest { pixel_format: 99, ..request() }),
        ("batch_size", proto::StreamRequest { batch_size: u32::MAX, ..request() }),
        ("classes", proto::StreamRequest { classes: vec![3, 10], ..request() }),
    ];
    for (field, request) in malformed {
        let (code, message) = refused(&daemon, request).await;
        assert_eq!(code, Code::InvalidArgument, "{message}");
        assert!(message.contains(field), "{field}: {message}");
    }
    // What names the default explicitly is the default.
    let spelled_out = proto::StreamRequest {
        start: Some(Start::Earliest.into()),
        shard: Some(proto::Shard { index: 0, count: 1 }),
        replay: replay(0.0, 3),
        staleness_bound: Some(proto::StalenessBound::default()),
        pixel_format: 1,
        ..request()
    };
    take(&mut daemon.client().await.stream_with(spelled_out).await.unwrap(), 160).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn open_streams_are_bounded_and_a_vanished_reader_frees_its_place() {
    let mut arguments = BOUNDED.to_vec();
    arguments.extend(["--max-streams", "2"]);
    let daemon = Daemon::start(&arguments);
    let client = daemon.client().await;
    let mut first = client.stream(Start::Earliest).await.unwrap();
    let second = daemon.client().await.stream(Start::Latest).await.unwrap();
    take(&mut first, 8).await;
    daemon.wait_metric("dreamfeed_subscribers", 2.0);
    let (code, message) = refused(&daemon, proto::StreamRequest::default()).await;
    assert_eq!(code, Code::ResourceExhausted, "{message}");
    // One in the middle of reading, one that waits for images that never come.
    drop(first);
    drop(second);
    daemon.wait_metric("dreamfeed_subscribers", 0.0);
    daemon.wait_metric("dreamfeed_stream_ends_total{reason=\"client\"}", 2.0);
    take(&mut client.stream(Start::Earliest).await.unwrap(), 160).await;
    assert!(daemon.metric("dreamfeed_images_sent_total{kind=\"fresh\"}").unwrap() >= 168.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_does_not_read_stalls_nobody() {
    let daemon = Daemon::start(&BOUNDED);
    let _idle = daemon.client().await.stream(Start::Earliest).await.unwrap();
    let mut stream = daemon.client().await.stream(Start::Earliest).await.unwrap();
    take(&mut stream, 160).await;
}
