//! PushStudent and FetchStudent over real sockets: what is accepted, and every way to be refused.

use crate::support::{ARCH, CHANNELS, CLASSES, Daemon, Tensors, file, network, student, within};
use bytes::Bytes;
use dreamfeed::client::{Client, ClientError, Pushed, Start};
use dreamfeed::proto;
use dreamfeed::proto::push_student_request::Part;
use futures_util::{StreamExt, stream};
use safetensors::Dtype;
use sha2::{Digest, Sha256};
use tonic::Code;

fn header(file: &Bytes) -> proto::PushStudentHeader {
    proto::PushStudentHeader {
        arch: ARCH.into(),
        byte_length: file.len() as u64,
        sha256: Sha256::digest(file).to_vec().into(),
        trainer_step: 7,
        replaces_version: None,
    }
}

fn message(part: Part) -> proto::PushStudentRequest {
    proto::PushStudentRequest { part: Some(part) }
}

async fn push(client: &Client, file: &Bytes) -> Result<Pushed, ClientError> {
    within(client.push_student(ARCH, file.clone(), 7, None)).await
}

fn refusal(result: Result<Pushed, ClientError>) -> (Code, String) {
    match result {
        Err(ClientError::Status { status, .. }) => (status.code(), status.message().to_owned()),
        other => panic!("not refused: {other:?}"),
    }
}

/// The tensors of a good student, spoilt.
fn spoilt(spoil: impl FnOnce(&mut Tensors)) -> Bytes {
    let mut tensors = network(ARCH, CHANNELS, CLASSES, 9);
    spoil(&mut tensors);
    file(&tensors, &[])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_push_is_refused_by_name_and_the_current_student_stays() {
    let daemon = Daemon::start(&["--batch-size", "8", "--max-images", "8", "--max-student-bytes", "1MiB"]);
    let client = daemon.client().await;
    let good = student(2);
    assert_eq!(push(&client, &good).await.unwrap(), Pushed { version: 1, already_current: false });

    let nan = spoilt(|t| {
        t.get_mut("layer2.0.conv1.weight").unwrap().2[8..12].copy_from_slice(&f32::NAN.to_le_bytes());
    });
    let misshapen = spoilt(|t| {
        let bias = t.get_mut("layer1.0.bn1.bias").unwrap();
        bias.1 = vec![15];
        bias.2.truncate(60);
    });
    let dtype = spoilt(|t| {
        let bias = t.get_mut("bn1.bias").unwrap();
        bias.0 = Dtype::I32;
    });
    let missing = spoilt(|t| {
        t.remove("layer3.0.bn2.running_var");
    });
    let extra = spoilt(|t| {
        t.insert("layer9.weight".into(), (Dtype::F32, vec![1], vec![0; 4]));
    });
    let fewer = file(&network(ARCH, CHANNELS, CLASSES - 1, 3), &[]);
    let colour = file(&network(ARCH, 3, CLASSES, 3), &[]);
    let pickle = Bytes::from_static(b"\x80\x02}q\x00this is a pickle, not safetensors");
    let by_file: [(&str, &Bytes, &[&str]); 8] = [
        ("not_finite", &nan, &["layer2.0.conv1.weight", "element 2 is NaN"]),
        ("misshapen", &misshapen, &["layer1.0.bn1.bias", "[15]", "[16]"]),
        ("dtype", &dtype, &["bn1.bias", "I32"]),
        ("missing", &missing, &["layer3.0.bn2.running_var"]),
        ("extra", &extra, &["layer9.weight"]),
        ("classes", &fewer, &["linear.weight", "9 outputs", "10 classes"]),
        ("channels", &colour, &["conv1.weight", "3 input channels"]),
        ("format", &pickle, &["safetensors"]),
    ];
    for (outcome, bytes, parts) in by_file {
        let (code, text) = refusal(push(&client, bytes).await);
        assert_eq!(code, Code::InvalidArgument, "{outcome}: {text}");
        assert!(parts.iter().all(|part| text.contains(part)), "{outcome}: {text}");
        daemon.wait_metric(&format!("dreamfeed_pushes_total{{outcome=\"{outcome}\"}}"), 1.0);
    }

    let mut flipped = good.to_vec();
    flipped[good.len() / 2] ^= 4;
    let large = proto::PushStudentHeader { byte_length: 1 << 40, ..header(&good) };
    let unknown = proto::PushStudentHeader { arch: "vgg16".into(), ..header(&good) };
    let long_name = proto::PushStudentHeader { arch: "r".repeat(1 << 20), ..header(&good) };
    let short_digest = proto::PushStudentHeader { sha256: Bytes::from_static(&[1; 31]), ..header(&good) };
    let replaces = |version| proto::PushStudentHeader { replaces_version: Some(version), ..header(&student(3)) };
    let by_header: [(&str, Code, proto::PushStudentHeader, Bytes, &str); 9] = [
        ("length", Code::InvalidArgument, header(&good), good.slice(..good.len() - 1), "ended after"),
        ("length", Code::InvalidArgument, header(&good), [good.as_ref(), &[0]].concat().into(), "more than"),
        ("digest", Code::InvalidArgument, header(&good), flipped.into(), "SHA-256"),
        ("too_large", Code::ResourceExhausted, large, good.clone(), "at most 1048576"),
        ("arch", Code::InvalidArgument, unknown, good.clone(), "vgg16"),
        ("arch", Code::InvalidArgument, long_name, good.clone(), "arch has 1048576 bytes"),
        ("header", Code::InvalidArgument, short_digest, good.clone(), "31 bytes"),
        ("conflict", Code::FailedPrecondition, replaces(0), student(3), "current version is 1"),
        ("conflict", Code::FailedPrecondition, replaces(2), student(3), "current version is 1"),
    ];
    for (outcome, expected, header, bytes, part) in by_header {
        let (code, text) = refusal(within(client.push_raw(header, bytes)).await);
        assert_eq!(code, expected, "{outcome}: {text}");
        assert!(text.contains(part), "{outcome}: {text}");
        assert!(daemon.metric(&format!("dreamfeed_pushes_total{{outcome=\"{outcome}\"}}")).unwrap() >= 1.0);
    }

    // Neither a header nor anything else first.
    for messages in [
        vec![],
        vec![message(Part::Data(good.clone()))],
        vec![message(Part::Header(header(&good))), message(Part::Header(header(&good)))],
    ] {
        let status = within(client.service().push_student(stream::iter(messages))).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    }

    let current = client.describe().await.unwrap().student.unwrap();
    assert_eq!((current.version, current.sha256.as_ref()), (1, Sha256::digest(&good).as_slice()));
    daemon.wait_metric("dreamfeed_pushes_under_way", 0.0);
    assert_eq!(push(&client, &student(4)).await.unwrap().version, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_student_that_would_break_the_engine_is_refused() {
    let daemon = Daemon::start(&["--max-images", "8"]);
    let client = daemon.client().await;
    let empty = spoilt(|tensors| {
        for (name, tensor) in tensors.iter_mut() {
            if name.starts_with("layer2.0.conv1") || name.starts_with("layer2.0.bn1") {
                tensor.1[0] = 0;
                tensor.2.clear();
            }
        }
        let second = tensors.get_mut("layer2.0.conv2.weight").unwrap();
        second.1[1] = 0;
        second.2.clear();
    });
    let (code, sentence) = refusal(push(&client, &empty).await);
    assert_eq!(code, Code::InvalidArgument);
    assert!(sentence.contains("without a single element: layer2.0.conv1.weight"), "{sentence}");

    let negative = spoilt(|tensors| {
        tensors.get_mut("bn1.running_var").unwrap().2[..4].copy_from_slice(&(-1f32).to_le_bytes());
    });
    let (code, sentence) = refusal(push(&client, &negative).await);
    assert_eq!(code, Code::InvalidArgument);
    assert!(sentence.contains("bn1.running_var") && sentence.contains("never negative"), "{sentence}");

    let huge = spoilt(|tensors| {
        let values = [1e300f64; 10].iter().flat_map(|value| value.to_le_bytes()).collect();
        tensors.insert("linear.bias".into(), (Dtype::F64, vec![10], values));
    });
    let (code, sentence) = refusal(push(&client, &huge).await);
    assert_eq!(code, Code::InvalidArgument);
    assert!(sentence.contains("linear.bias") && sentence.contains("not finite as f32"), "{sentence}");
    assert!(client.describe().await.unwrap().student.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn every_name_is_told_within_what_a_header_can_carry() {
    let daemon = Daemon::start(&["--batch-size", "8", "--max-images", "8"]);
    let client = daemon.client().await;
    let mut nothing = Tensors::new();
    nothing.insert("ä".repeat(250), (Dtype::F32, vec![1], vec![0; 4]));
    let empty = file(&nothing, &[]);
    let (code, text) = refusal(within(client.push_student("resnet1202", empty, 0, None)).await);
    assert_eq!(code, Code::InvalidArgument, "{text}");
    assert!(text.contains("missing: conv1.weight") && text.contains("more"), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_same_bytes_twice_are_one_version() {
    let daemon = Daemon::start(&["--batch-size", "8", "--max-images", "8"]);
    let client = daemon.client().await;
    let (a, b) = (student(2), student(3));
    assert_eq!(push(&client, &a).await.unwrap(), Pushed { version: 1, already_current: false });
    assert_eq!(push(&client, &a).await.unwrap(), Pushed { version: 1, already_current: true });
    assert_eq!(within(client.push_student(ARCH, b.clone(), 8, Some(1))).await.unwrap().version, 2);
    // A trainer that lost the answer repeats its push, and is not told of a conflict with itself.
    let again = within(client.push_student(ARCH, b, 8, Some(1))).await.unwrap();
    assert_eq!(again, Pushed { version: 2, already_current: true });
    assert_eq!(push(&client, &a).await.unwrap(), Pushed { version: 3, already_current: false });
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_that_replace_the_same_version_one_wins() {
    let daemon = Daemon::start(&["--batch-size", "8", "--max-images", "8"]);
    let mut pushes = tokio::task::JoinSet::new();
    for seed in 2..6 {
        let client = daemon.client().await;
        pushes.spawn(async move { within(client.push_student(ARCH, student(seed), 0, Some(0))).await });
    }
    let results = pushes.join_all().await;
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1, "{results:?}");
    for refused in results.into_iter().filter(Result::is_err) {
        assert_eq!(refusal(refused).0, Code::FailedPrecondition);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_student_comes_back_as_it_went() {
    let daemon = Daemon::start(&["--batch-size", "8", "--max-images", "8", "--kept-students", "2"]);
    let client = daemon.client().await;
    assert!(client.fetch_student(0).await.unwrap().is_none());
    // Wider than one piece of 1 MiB, and more classes than the teacher: continual learning.
    let wide = file(&network("resnet18", CHANNELS, CLASSES + 2, 5), &[("note", "kept")]);
    assert!(wide.len() > 40 << 20);
    let pushed = within(client.push_student("resnet18", wide.clone(), 41, Some(0))).await.unwrap();
    assert_eq!(pushed.version, 1);
    let fetched = within(client.fetch_student(0)).await.unwrap().unwrap();
    assert_eq!(fetched.checkpoint.bytes(), &wide);
    assert_eq!((fetched.header.version, fetched.header.trainer_step), (1, 41));
    assert_eq!((fetched.header.arch.as_str(), fetched.header.num_classes), ("resnet18", 12));

    push(&client, &student(2)).await.unwrap();
    assert_eq!(within(client.fetch_student(1)).await.unwrap().unwrap().checkpoint.bytes(), &wide);
    push(&client, &student(3)).await.unwrap();
    assert!(within(client.fetch_student(1)).await.unwrap().is_none());
    assert!(within(client.fetch_student(4)).await.unwrap().is_none());
    assert_eq!(within(client.fetch_student(0)).await.unwrap().unwrap().header.version, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn readers_of_an_old_student_share_one_copy_and_are_bounded_in_number() {
    const READERS: usize = 12;
    let most = READERS.to_string();
    let daemon = Daemon::start(&["--batch-size", "8", "--max-images", "8", "--max-fetches", &most]);
    let client = daemon.client().await;
    let wide = file(&network("resnet18", CHANNELS, CLASSES, 5), &[]);
    let size = wide.len() as u64;
    assert!(size > 40 << 20);
    within(client.push_student("resnet18", wide, 0, None)).await.unwrap();
    push(&client, &student(2)).await.unwrap();
    let before = daemon.resident_bytes();

    let mut readers = Vec::new();
    for _ in 0..READERS {
        // A connection each, so that the transport holds nobody back; nobody reads beyond what it holds by itself.
        let service = daemon.client().await.service();
        let request = proto::FetchStudentRequest { version: 1 };
        readers.push(within(async { service.clone().fetch_student(request).await }).await.unwrap().into_inner());
    }
    daemon.wait_metric("dreamfeed_fetches_under_way", READERS as f64);
    assert_eq!(daemon.metric("dreamfeed_fetches_capacity"), Some(READERS as f64));
    let more = daemon.resident_bytes().saturating_sub(before);
    assert!(more < 4 * size, "{READERS} readers of a student of {size} bytes took {more}");

    let refused =
        within(client.service().fetch_student(proto::FetchStudentRequest { version: 0 })).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
    assert!(refused.message().contains("12 students") && refused.message().contains("max_fetches"), "{refused}");
    assert_eq!(daemon.metric("dreamfeed_fetches_refused_total"), Some(1.0));

    // Whoever read on gets it whole, and a place that is given back is free.
    let mut received = 0;
    while let Some(response) = within(readers[0].message()).await.unwrap() {
        if let Some(proto::fetch_student_response::Part::Data(piece)) = response.part {
            received += piece.len() as u64;
        }
    }
    assert_eq!(received, size);
    drop(readers);
    daemon.wait_metric("dreamfeed_fetches_under_way", 0.0);
    assert_eq!(within(client.fetch_student(0)).await.unwrap().unwrap().header.version, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn images_keep_coming_while_students_are_pushed_and_come_to_know_them() {
    // Noise is not made against any student, so this takes the real optimizer.
    let daemon = Daemon::start(&["--synthesizer", "adi", "--batch-size", "4", "--iterations", "2"]);
    let client = daemon.client().await;
    let mut batches = client.stream(Start::Latest).await.unwrap();
    let mut next = None;
    for version in 1..=3u64 {
        assert_eq!(push(&client, &student(version)).await.unwrap().version, version);
        // Until an image says that it was made against this version.
        loop {
            let batch = within(batches.next()).await.unwrap().unwrap();
            assert!(next.is_none_or(|next| next == batch.first_sequence), "an image was skipped or repeated");
            next = Some(batch.first_sequence + batch.count as u64);
            assert!(batch.current_student_version <= version);
            let versions = batch.student_version().unwrap();
            assert!(versions.iter().all(|seen| (0..=version as i64).contains(seen)));
            if versions.iter().all(|seen| *seen == version as i64) {
                assert_eq!(batch.current_student_version, version);
                break;
            }
        }
    }
}

/// The beginning of a push, and then nothing.
fn begun(file: &Bytes) -> Vec<proto::PushStudentRequest> {
    vec![message(Part::Header(header(file))), message(Part::Data(file.slice(..1000)))]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_whose_client_vanished_frees_its_place() {
    let daemon = Daemon::start(&["--batch-size", "8", "--max-images", "8", "--max-pushes", "1"]);
    let client = daemon.client().await;
    let good = student(2);
    let endless = stream::iter(begun(&good)).chain(stream::pending());
    let other = daemon.client().await;
    let vanishing = tokio::spawn(async move { other.service().push_student(endless).await });
    daemon.wait_metric("dreamfeed_pushes_under_way", 1.0);
    let (code, text) = refusal(push(&client, &good).await);
    assert_eq!(code, Code::ResourceExhausted, "{text}");
    vanishing.abort();
    daemon.wait_metric("dreamfeed_pushes_under_way", 0.0);
    // hyper reads a reset stream as one that ended: which of the two the daemon sees is for the scheduler to say.
    let ended =
        |outcome| daemon.metric(&format!("dreamfeed_pushes_total{{outcome=\"{outcome}\"}}")).unwrap_or_default();
    crate::support::wait_for("the outcome", || ended("cancelled") + ended("length") == 1.0);
    assert_eq!(push(&client, &good).await.unwrap().version, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_push_is_abandoned() {
    let daemon = Daemon::start(&["--batch-size", "8", "--max-images", "8", "--push-idle-timeout", "300ms"]);
    let client = daemon.client().await;
    let good = student(2);
    let silent = stream::iter(begun(&good)).chain(stream::pending());
    let hollow = stream::iter(begun(&good)).chain(stream::repeat_with(|| message(Part::Data(Bytes::new()))).then(
        |message| async {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            message
        },
    ));
    let without_header = stream::pending();
    for messages in [silent.boxed(), hollow.boxed(), without_header.boxed()] {
        let status = within(client.service().push_student(messages)).await.unwrap_err();
        assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    }
    daemon.wait_metric("dreamfeed_pushes_total{outcome=\"idle\"}", 3.0);
    daemon.wait_metric("dreamfeed_pushes_under_way", 0.0);
    assert!(client.describe().await.unwrap().student.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_too_large_for_the_daemon_says_how_to_cut_it() {
    let daemon = Daemon::start(&["--batch-size", "8", "--max-images", "8"]);
    let huge = Bytes::from(vec![0; 17 << 20]);
    let messages = vec![message(Part::Header(header(&huge))), message(Part::Data(huge))];
    let client = daemon.client().await;
    let status = within(client.service().push_student(stream::iter(messages))).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    assert!(status.message().contains("pieces of at most 4 MiB"), "{status}");
}
