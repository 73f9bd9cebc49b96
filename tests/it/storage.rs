//! One suite on a folder and on a server of the S3 protocol: what the log and the students are built on, and two daemons
//! that share a store.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::support::s3::S3;
use crate::support::{ARCH, CHANNELS, CLASSES, Daemon, LONG, assert_consecutive, images, student, take, within};
use bytes::Bytes;
use dreamfeed::client::{Batch, Client, ClientError, Pushed, Start};
use dreamfeed::delivery::{Delivery, End, Flight, Policy};
use dreamfeed::log::{Located, Log, LogOptions, Maker, ReadError, Retention};
use dreamfeed::model::checkpoint::Checkpoint;
use dreamfeed::model::source::{Geometry, Normalization};
use dreamfeed::storage::{Created, Storage};
use dreamfeed::students::{Accepted, PushHeader, Requirements, StudentLimits, StudentStore};
use dreamfeed::synthesis::batch::DreamBatch;
use futures_util::StreamExt;
use futures_util::future::join_all;
use sha2::{Digest, Sha256};
use tonic::Code;

/// Where the suite's part for libraries runs, in a process whose environment has the server's address.
const LOCATION: &str = "STORAGE_TEST_LOCATION";
const GEOMETRY: Geometry = Geometry { channels: 1, height: 2, width: 4 };

/// A place for a store, and what a process needs in its environment to use it.
struct Place {
    location: String,
    environment: Vec<(&'static str, String)>,
    _folder: Option<tempfile::TempDir>,
}

impl Place {
    fn folder() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let location = folder.path().join("store").to_str().unwrap().to_owned();
        Self { location, environment: Vec::new(), _folder: Some(folder) }
    }

    fn bucket() -> Self {
        let server = S3::shared();
        let location = format!("s3://{}/deep/prefix", server.bucket());
        Self { location, environment: S3::environment(&server.address).into(), _folder: None }
    }

    fn daemon(&self, arguments: &[&str]) -> Daemon {
        let arguments = [&["--store", self.location.as_str()], arguments].concat();
        let daemon = Daemon::launch_with(tempfile::tempdir().unwrap(), &arguments, |command| {
            command.envs(self.environment.iter().cloned());
        });
        daemon.wait_ready();
        daemon
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_keeps_what_it_promises() {
    let place = Place::folder();
    library_suite(&place.location).await;
}

#[test]
fn a_bucket_keeps_what_it_promises() {
    // Credentials come from the environment, which a running process cannot safely change: another one has them.
    let place = Place::bucket();
    let status = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "storage::library_suite_here", "--ignored", "--nocapture"])
        .envs(place.environment.iter().cloned())
        .env(LOCATION, &place.location)
        .status()
        .unwrap();
    assert!(status.success());
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "it is no test of its own: a_bucket_keeps_what_it_promises starts it"]
async fn library_suite_here() {
    if let Ok(location) = std::env::var(LOCATION) {
        library_suite(&location).await;
    }
}

async fn library_suite(location: &str) {
    let at = |name: &str| Storage::open(&format!("{location}/{name}")).unwrap();
    objects(&at("objects")).await;
    one_name_one_winner(&at("race"), &at("race")).await;
    a_log(&at("log")).await;
    two_logs(&at("logs"), &at("logs")).await;
    evicted_elsewhere(&at("evicted"), &at("evicted")).await;
    damage(&at("damage"), &at("damage")).await;
    versions(&at("students")).await;
}

async fn objects(storage: &Storage) {
    let object = |text: &'static str| Bytes::from_static(text.as_bytes());
    assert_eq!(storage.get("a/none").await.unwrap(), None);
    assert!(storage.list("a/", None).await.unwrap().is_empty());
    assert_eq!(storage.create("a/1", object("first")).await.unwrap(), Created::Yes);
    assert_eq!(storage.create("a/1", object("second")).await.unwrap(), Created::Taken);
    assert_eq!(storage.get("a/1").await.unwrap().unwrap(), "first");
    for name in ["a/3", "a/2", "b/1", "a/10"] {
        assert_eq!(storage.create(name, object("0123456789")).await.unwrap(), Created::Yes);
    }
    let names = |found: Vec<dreamfeed::storage::Found>| {
        found.into_iter().map(|found| (found.name, found.bytes)).collect::<Vec<_>>()
    };
    let expected = [("a/1", 5), ("a/10", 10), ("a/2", 10), ("a/3", 10)].map(|(name, n)| (name.to_owned(), n));
    assert_eq!(names(storage.list("a/", None).await.unwrap()), expected);
    assert_eq!(names(storage.list("a/", Some("a/10")).await.unwrap()), expected[2..]);
    assert_eq!(names(storage.list("a/", Some("a/15")).await.unwrap()), expected[2..]);
    assert!(names(storage.list("a/", Some("a/3")).await.unwrap()).is_empty());
    assert_eq!(storage.get_range("a/2", 2..5).await.unwrap().unwrap(), "234");
    assert_eq!(storage.get_range("a/2", 7..99).await.unwrap().unwrap(), "789");
    assert_eq!(storage.get_range("a/none", 0..5).await.unwrap(), None);
    storage.rename("a/1", "c/1").await.unwrap();
    storage.rename("a/2", "c/1").await.unwrap();
    assert_eq!(storage.get("a/1").await.unwrap(), None);
    assert_eq!(storage.get("c/1").await.unwrap().unwrap(), "0123456789");
    storage.delete("c/1").await.unwrap();
    storage.delete("c/1").await.unwrap();
    assert_eq!(storage.get("c/1").await.unwrap(), None);
    // A name that is free again can be taken again.
    assert_eq!(storage.create("c/1", object("again")).await.unwrap(), Created::Yes);
}

async fn one_name_one_winner(one: &Storage, other: &Storage) {
    for round in 0..10 {
        let name = format!("name/{round}");
        let puts = (0..8u8).map(|who| {
            let (storage, name) = (if who % 2 == 0 { one } else { other }, name.clone());
            async move { (who, storage.create(&name, Bytes::from(vec![who; 3000])).await.unwrap()) }
        });
        let won: Vec<u8> =
            join_all(puts).await.into_iter().filter(|(_, put)| *put == Created::Yes).map(|(who, _)| who).collect();
        assert_eq!(won.len(), 1, "{won:?}");
        assert_eq!(one.get(&name).await.unwrap().unwrap(), vec![won[0]; 3000]);
    }
}

/// Every image's pixels spell a number, from `first` on.
fn batch(first: u64, count: u64) -> Arc<DreamBatch> {
    let numbers = first..first + count;
    Arc::new(DreamBatch {
        images: numbers.clone().flat_map(u64::to_le_bytes).collect(),
        labels: numbers.clone().map(|n| n as i64 % 3).collect(),
        teacher_logits: numbers.clone().flat_map(|n| [n as f32, 0.5, -1.0]).collect(),
        student_version: numbers.clone().map(|_| 0).collect(),
        competition: numbers.map(|_| 0.0).collect(),
        geometry: GEOMETRY,
        num_classes: 3,
        synthesizer: "noise",
        settings: "{}".into(),
        created_at: SystemTime::now(),
    })
}

async fn open_log(storage: &Storage, retention: Retention) -> Arc<Log> {
    let maker = Maker { teacher_sha256: "ab".repeat(32), geometry: GEOMETRY, num_classes: 3 };
    Log::open(storage.clone(), LogOptions { retention, cache_bytes: 1 << 20 }, maker).await.unwrap()
}

fn numbers(images: &[u8]) -> Vec<u64> {
    images.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect()
}

async fn numbers_at(log: &Log, first: u64) -> Vec<u64> {
    numbers(log.load(first).await.unwrap().images())
}

async fn fill(log: &Log, counts: &[u64]) {
    for count in counts {
        let next = log.extent().next_sequence;
        assert_eq!(log.append(&batch(next, *count)).await.unwrap(), next);
    }
}

fn chunk_name(first: u64) -> String {
    format!("log/chunks/{first:020}.safetensors")
}

async fn a_log(storage: &Storage) {
    let log = open_log(storage, Retention::default()).await;
    fill(&log, &[4, 3, 5]).await;
    let (id, extent, cursor) = (log.identity().log_id, log.extent(), log.cursor(7));
    assert_eq!((extent.first_sequence, extent.next_sequence, extent.chunks), (0, 12, 3));
    drop(log);
    let retention = Retention { max_images: Some(12), seed_images: 3, ..Retention::default() };
    let log = open_log(storage, retention).await;
    assert_eq!((log.identity().log_id, log.extent()), (id, extent));
    assert_eq!(log.position(&cursor), Ok(7));
    // Not from a cache: this one has read nothing yet.
    assert_eq!(numbers_at(&log, 4).await, [4, 5, 6]);
    fill(&log, &[2, 2]).await;
    log.retain().await.unwrap();
    assert_eq!(log.locate(5), Located::Overtaken { first_sequence: 12 });
    // The seed set stays, and what retention took is really gone.
    assert_eq!(numbers_at(&log, 0).await, [0, 1, 2, 3]);
    let names: Vec<String> =
        storage.list("log/chunks/", None).await.unwrap().into_iter().map(|found| found.name).collect();
    assert_eq!(names, [0, 12, 14].map(chunk_name));
    let again = open_log(storage, retention).await.extent();
    assert_eq!((again.first_sequence, again.next_sequence, again.images), (12, 16, 8));
}

async fn two_logs(one: &Storage, other: &Storage) {
    let logs = [open_log(one, Retention::default()).await, open_log(other, Retention::default()).await];
    let write = |log: Arc<Log>, id: u64| async move {
        let mut made = Vec::new();
        for turn in 0..20 {
            let first = 1000 * id + 10 * turn;
            made.push((log.append(&batch(first, 3)).await.unwrap(), first));
        }
        made
    };
    let (a, b) = tokio::join!(write(logs[0].clone(), 1), write(logs[1].clone(), 2));
    let mut all: Vec<(u64, u64)> = a.into_iter().chain(b).collect();
    all.sort_unstable();
    assert_eq!(all.iter().map(|(first, _)| *first).collect::<Vec<_>>(), (0..40).map(|i| 3 * i).collect::<Vec<_>>());
    for log in logs {
        log.refresh().await.unwrap();
        assert_eq!((log.extent().first_sequence, log.extent().next_sequence), (0, 120));
        for (first, made) in &all {
            assert_eq!(numbers_at(&log, *first).await, [*made, made + 1, made + 2]);
        }
    }
}

/// A reader of one replica meets what another one evicted.
async fn evicted_elsewhere(one: &Storage, other: &Storage) {
    fill(&*open_log(one, Retention::default()).await, &[4; 10]).await;
    let reading = open_log(one, Retention::default()).await;
    let tight = open_log(other, Retention { max_images: Some(8), ..Retention::default() }).await;
    tight.retain().await.unwrap();
    // It does not know yet.
    assert!(matches!(reading.locate(0), Located::Chunk(_)));
    let (_, students) = tokio::sync::watch::channel(None);
    let normalization = Normalization { mean: vec![0.5], std: vec![0.5] };
    let delivery = Delivery::new(reading.clone(), &normalization, students, Flight::new(1 << 30, 1));
    let mut subscription = delivery.subscribe(3, Policy::default());
    // One look, and it knows everything: nobody is sent from one evicted chunk to the next.
    let end = within(subscription.next()).await.unwrap_err();
    assert_eq!(end, End::Overtaken { position: 3, first_sequence: 32 });
    let extent = reading.extent();
    assert_eq!((extent.first_sequence, extent.next_sequence, extent.images), (32, 40, 8));
    let mut subscription = delivery.subscribe(32, Policy::default());
    let message = within(subscription.next()).await.unwrap();
    assert_eq!((message.first_sequence, message.count), (32, 4));
}

async fn spoil(storage: &Storage, name: &str, spoil: impl FnOnce(Vec<u8>) -> Vec<u8>) {
    let object = storage.get(name).await.unwrap().unwrap().to_vec();
    storage.delete(name).await.unwrap();
    assert_eq!(storage.create(name, spoil(object).into()).await.unwrap(), Created::Yes);
}

async fn damage(storage: &Storage, other: &Storage) {
    let replica = open_log(other, Retention::default()).await;
    fill(&*open_log(storage, Retention::default()).await, &[4, 3, 5, 2]).await;
    replica.refresh().await.unwrap();
    let log = open_log(storage, Retention::default()).await;
    let flip = |mut object: Vec<u8>| {
        *object.last_mut().unwrap() ^= 1;
        object
    };
    spoil(storage, &chunk_name(4), flip).await;
    assert!(matches!(log.load(4).await, Err(ReadError::Damaged)));
    assert_eq!(log.locate(5), Located::Lost { next_sequence: 7 });
    // The other replica finds it gone, and in quarantine: lost, not overtaken.
    assert!(matches!(replica.load(4).await, Err(ReadError::Gone)));
    assert_eq!(replica.locate(5), Located::Lost { next_sequence: 7 });
    assert_eq!((replica.extent().first_sequence, replica.extent().lost_images), (0, 3));
    // A batched reader gets everything before the damage, in a message that is short.
    let (_, students) = tokio::sync::watch::channel(None);
    let normalization = Normalization { mean: vec![0.5], std: vec![0.5] };
    let delivery = Delivery::new(log.clone(), &normalization, students, Flight::new(1 << 30, 1));
    let mut subscription = delivery.subscribe(0, Policy { batch_size: Some(3), ..Policy::default() });
    let mut seen = Vec::new();
    let end = loop {
        match within(subscription.next()).await {
            Ok(message) => {
                let payload = Checkpoint::parse(message.payload).unwrap();
                seen.extend(images(&payload).into_iter().flat_map(|image| numbers(&image)));
            }
            Err(end) => break end,
        }
    };
    assert_eq!((seen, end), (vec![0, 1, 2, 3], End::Lost { position: 4, next_sequence: 7 }));
    // Whatever the newest chunk turned into, its sequences are not given again.
    for (at, broken) in [Vec::new(), b"short".to_vec()].into_iter().enumerate() {
        let extent = open_log(storage, Retention::default()).await.extent();
        let newest = storage.list("log/chunks/", None).await.unwrap().pop().unwrap().name;
        spoil(storage, &newest, |_| broken).await;
        let log = open_log(storage, Retention::default()).await;
        assert!(log.extent().next_sequence > extent.next_sequence - 5, "{at}: {:?}", log.extent());
        let first = log.extent().next_sequence;
        fill(&log, &[2]).await;
        assert_eq!(numbers_at(&log, first).await, [first, first + 1]);
        assert_eq!(numbers_at(&log, 0).await, [0, 1, 2, 3]);
    }
    // A chunk of another replica that cannot be read hides nothing that comes after it.
    let next = open_log(storage, Retention::default()).await.extent().next_sequence;
    let reader = open_log(other, Retention::default()).await;
    assert_eq!(storage.create(&chunk_name(next), Bytes::from_static(b"broken")).await.unwrap(), Created::Yes);
    reader.refresh().await.unwrap();
    assert!(matches!(reader.locate(next), Located::Lost { .. }), "{:?}", reader.locate(next));
    fill(&*open_log(storage, Retention::default()).await, &[3]).await;
    reader.refresh().await.unwrap();
    let newest = reader.extent().next_sequence - 3;
    assert_eq!(numbers_at(&reader, newest).await, [newest, newest + 1, newest + 2]);
}

async fn open_students(storage: &Storage, kept_versions: usize) -> Arc<StudentStore> {
    let limits = StudentLimits {
        max_bytes: 1 << 24,
        max_classes: 100,
        max_pushes: 4,
        kept_versions,
        idle_timeout: LONG,
        push_timeout: LONG,
    };
    let requirements = Requirements { num_classes: CLASSES, in_channels: CHANNELS };
    StudentStore::open(storage.clone(), requirements, limits).await.unwrap()
}

async fn push(students: &Arc<StudentStore>, file: &Bytes) -> Accepted {
    let header = PushHeader {
        arch: ARCH.into(),
        byte_length: file.len() as u64,
        sha256: Sha256::digest(file).into(),
        trainer_step: 7,
        replaces_version: None,
    };
    let mut push = students.slot().unwrap().begin(header).unwrap();
    push.write(file).unwrap();
    push.finish().await.unwrap()
}

async fn versions(storage: &Storage) {
    let files: Vec<Bytes> = (1..=6).map(student).collect();
    let students = open_students(storage, 3).await;
    for (version, file) in (1..).zip(&files[..5]) {
        assert_eq!(push(&students, file).await.student.version, version);
    }
    assert!(push(&students, &files[4]).await.already_current);
    for (version, kept) in [(1, false), (2, false), (3, true), (4, true), (5, true)] {
        assert_eq!(students.get(version).await.unwrap().is_some(), kept, "{version}");
    }
    let name = |version: u64| format!("students/{version:020}.safetensors");
    let names: Vec<String> =
        storage.list("students/", None).await.unwrap().into_iter().map(|found| found.name).collect();
    assert_eq!(names, [3, 4, 5].map(name));
    let again = open_students(storage, 3).await;
    assert_eq!(again.current_version(), 5);
    assert_eq!(again.current().unwrap().checkpoint.bytes(), &files[4]);
    // The newest is damaged, or empty: the one before it is adopted, and the number is not given again.
    for (broken, expected) in [(5, 4), (4, 3)] {
        spoil(storage, &name(broken), |mut object| {
            let at = object.len() - 7;
            object[at] ^= 1;
            if broken == 4 { Vec::new() } else { object }
        })
        .await;
        let students = open_students(storage, 3).await;
        assert_eq!(students.current_version(), expected);
        assert_eq!(students.current().unwrap().checkpoint.bytes(), &files[expected as usize - 1]);
        assert!(students.get(broken).await.unwrap().is_none());
    }
    let students = open_students(storage, 3).await;
    assert_eq!(push(&students, &files[5]).await.student.version, 6);
}

/// A listing that holds an object holds every earlier one, also while objects are being made.
#[tokio::test(flavor = "multi_thread")]
async fn a_listing_of_a_folder_has_no_holes() {
    const OBJECTS: usize = 1500;
    let place = Place::folder();
    let (writing, reading) = (Storage::open(&place.location).unwrap(), Storage::open(&place.location).unwrap());
    let writer = tokio::spawn(async move {
        for number in 0..OBJECTS {
            let name = format!("log/chunks/{number:020}.safetensors");
            assert_eq!(writing.create(&name, Bytes::from_static(b"object")).await.unwrap(), Created::Yes);
        }
    });
    let mut seen = 0;
    while seen < OBJECTS {
        let found = reading.list("log/chunks/", None).await.unwrap();
        for (number, found) in found.iter().enumerate() {
            assert_eq!(found.name, format!("log/chunks/{number:020}.safetensors"));
        }
        assert!(found.len() >= seen);
        seen = found.len();
    }
    writer.await.unwrap();
}

/// What cannot be deleted now keeps nothing else from being deleted, and goes as soon as it can.
#[tokio::test]
async fn a_delete_that_fails_is_tried_again() {
    let place = Place::folder();
    let storage = Storage::open(&place.location).unwrap();
    let log = open_log(&storage, Retention { max_images: Some(8), ..Retention::default() }).await;
    fill(&log, &[4; 6]).await;
    let file = |first: u64| std::path::Path::new(&place.location).join(chunk_name(first));
    // A folder of that name cannot be deleted as a file can, not even by root.
    std::fs::rename(file(4), file(99)).unwrap();
    std::fs::create_dir(file(4)).unwrap();
    log.retain().await.unwrap_err();
    assert_eq!([0, 4, 8, 12, 16].map(|first| file(first).exists()), [false, true, false, false, true]);
    std::fs::remove_dir(file(4)).unwrap();
    std::fs::rename(file(99), file(4)).unwrap();
    log.retain().await.unwrap();
    assert!(!file(4).exists());
    assert_eq!(log.extent().first_sequence, 16);
}

fn payloads(batches: &[Batch]) -> Vec<Bytes> {
    batches.iter().map(|batch| batch.payload.bytes().clone()).collect()
}

async fn a_restart_keeps_everything(place: &Place) {
    let arguments = ["--batch-size", "8", "--max-images", "40"];
    let mut daemon = place.daemon(&arguments);
    let client = daemon.client().await;
    let before = take(&mut client.stream(Start::Earliest).await.unwrap(), 40).await;
    assert_consecutive(&before, 0);
    let pushed = within(client.push_student(ARCH, student(2), 7, None)).await.unwrap();
    assert_eq!(pushed, Pushed { version: 1, already_current: false });
    let id = client.describe().await.unwrap().log.unwrap().log_id;
    daemon.signal("TERM");
    assert!(daemon.wait_exit().success());
    let daemon = place.daemon(&arguments);
    let client = daemon.client().await;
    let description = client.describe().await.unwrap();
    assert_eq!((description.log.unwrap().log_id, description.student.unwrap().version), (id, 1));
    assert_eq!(within(client.fetch_student(1)).await.unwrap().unwrap().checkpoint.bytes(), &student(2));
    let after = take(&mut client.stream(Start::Earliest).await.unwrap(), 80).await;
    assert_consecutive(&after, 0);
    assert_eq!(payloads(&after)[..before.len()], payloads(&before)[..]);
    let resumed = take(&mut client.stream(Start::Cursor(before[2].cursor.clone())).await.unwrap(), 56).await;
    assert_consecutive(&resumed, 24);
    // The same student again is no new version, also for a daemon that never saw the push.
    let pushed = within(client.push_student(ARCH, student(2), 7, None)).await.unwrap();
    assert_eq!(pushed, Pushed { version: 1, already_current: true });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_keeps_everything_in_a_folder() {
    a_restart_keeps_everything(&Place::folder()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_keeps_everything_in_a_bucket() {
    a_restart_keeps_everything(&Place::bucket()).await;
}

async fn push_five(client: Client, from: u64) -> Vec<(u64, Bytes)> {
    let mut pushed = Vec::new();
    for seed in from..from + 5 {
        let answer = within(client.push_student(ARCH, student(seed), seed, None)).await.unwrap();
        pushed.push((answer.version, student(seed)));
    }
    pushed
}

async fn two_replicas_share_one_store(place: &Place) {
    // Each makes 160 images, and begins at once.
    let arguments = ["--batch-size", "8", "--max-images", "160", "--kept-students", "100"];
    let replica = |seed: &'static str| place.daemon(&[&arguments[..], &["--seed", seed]].concat());
    let (a, b) = std::thread::scope(|scope| {
        let (a, b) = (scope.spawn(|| replica("1")), scope.spawn(|| replica("2")));
        (a.join().unwrap(), b.join().unwrap())
    });
    let clients = [a.client().await, b.client().await];
    let [from_a, from_b, pushed_a, pushed_b] = {
        let read = |client: Client| async move {
            // From the cursor of one message, the other replica goes on, however fresh it is.
            let batches = take(&mut client.stream(Start::Sequence(0)).await.unwrap(), 320).await;
            assert_consecutive(&batches, 0);
            payloads(&batches)
        };
        let (read_a, read_b) = (tokio::spawn(read(clients[0].clone())), tokio::spawn(read(clients[1].clone())));
        let push_a = tokio::spawn(push_five(clients[0].clone(), 100));
        let push_b = tokio::spawn(push_five(clients[1].clone(), 200));
        let (push_a, push_b) = (push_a.await.unwrap(), push_b.await.unwrap());
        let bytes = |read: Vec<Bytes>| read.into_iter().map(|bytes| (0, bytes)).collect::<Vec<_>>();
        [bytes(read_a.await.unwrap()), bytes(read_b.await.unwrap()), push_a, push_b]
    };
    // One row, the same for both, made by both.
    assert!(from_a == from_b);
    let makers: BTreeSet<String> = from_a
        .iter()
        .map(|(_, payload)| Checkpoint::parse(payload.clone()).unwrap().metadata()["replica"].clone())
        .collect();
    assert_eq!(makers.len(), 2);
    let distinct: BTreeSet<Vec<u8>> =
        from_a.iter().flat_map(|(_, payload)| images(&Checkpoint::parse(payload.clone()).unwrap())).collect();
    assert_eq!(distinct.len(), 320, "no image is there twice");
    // Each version is one push's, and both replicas say so.
    let versions: BTreeMap<u64, Bytes> = pushed_a.into_iter().chain(pushed_b).collect();
    assert_eq!(versions.keys().copied().collect::<Vec<_>>(), (1..=10).collect::<Vec<_>>());
    for client in &clients {
        for (version, file) in &versions {
            // The other's newest may not have been seen yet; every older one is read from the store.
            let fetched = within(async {
                loop {
                    match client.fetch_student(*version).await.unwrap() {
                        Some(fetched) => break fetched,
                        None => tokio::time::sleep(Duration::from_millis(50)).await,
                    }
                }
            })
            .await;
            assert_eq!(fetched.checkpoint.bytes(), file);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_replicas_share_a_folder() {
    two_replicas_share_one_store(&Place::folder()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_replicas_share_a_bucket() {
    two_replicas_share_one_store(&Place::bucket()).await;
}

/// A cursor of one replica is good at the other at once, although that one looks for news only now and then.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_changes_replicas_in_the_middle() {
    let place = Place::folder();
    let arguments = ["--batch-size", "4", "--demand", "subscribers"];
    let replicas = [place.daemon(&arguments), place.daemon(&arguments)];
    let clients = [replicas[0].client().await, replicas[1].client().await];
    let (mut start, mut next) = (Start::Earliest, 0);
    for turn in 0..20 {
        let mut stream = clients[turn % 2].stream(start).await.unwrap();
        // The newest there is, and then one more.
        let mut batch = take(&mut stream, 1).await.remove(0);
        loop {
            assert_eq!(batch.first_sequence, next);
            next += batch.count as u64;
            if batch.lag == 0 {
                break;
            }
            batch = take(&mut stream, 1).await.remove(0);
        }
        start = Start::Cursor(batch.cursor);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_behind_retention_is_told_where_to_go_on() {
    let place = Place::folder();
    let daemon = place.daemon(&["--batch-size", "8", "--max-images", "160", "--log-max-images", "40"]);
    daemon.wait_metric("dreamfeed_log_next_sequence", 160.0);
    daemon.wait_metric("dreamfeed_log_evicted_chunks_total", 15.0);
    let client = daemon.client().await;
    let first = client.describe().await.unwrap().log.unwrap().first_sequence;
    assert_eq!(first, 120);
    let refused: ClientError = match client.stream(Start::Sequence(3)).await {
        Err(error) => error,
        Ok(mut stream) => within(stream.next()).await.unwrap().unwrap_err(),
    };
    assert_eq!((refused.code(), refused.next_sequence()), (Some(Code::OutOfRange), Some(first)));
    let rest = take(&mut client.stream(Start::Sequence(first)).await.unwrap(), 40).await;
    assert_consecutive(&rest, first);
    // Freed space is really freed.
    let files = std::fs::read_dir(format!("{}/log/chunks", place.location)).unwrap().count();
    assert_eq!(files, 5);
}
