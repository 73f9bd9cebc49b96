//! A store that is deleted, replaced or unfit under a daemon, or that holds what is nobody's: the daemon says so, and
//! touches nothing that is not its own.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::Ordering;

use crate::support::s3::{Mode, Proxy, S3};
use crate::support::{ARCH, Daemon, assert_consecutive, student, take, wait_for, within};
use dreamfeed::client::{Client, Start};
use dreamfeed::storage::{Created, Storage};
use dreamfeed::store::Object;
use tonic::Code;
use uuid::Uuid;

const IMAGES: [&str; 4] = ["--batch-size", "8", "--max-images", "64"];

/// Every name in a folder, files with their bytes.
fn lying(folder: &Path) -> BTreeMap<PathBuf, Option<Vec<u8>>> {
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten() {
        let (path, kind) = entry.map(|entry| (entry.path(), entry.file_type().unwrap())).unwrap();
        if kind.is_dir() {
            all.extend(lying(&path));
        }
        let bytes = kind.is_file().then(|| std::fs::read(&path).unwrap());
        all.insert(path, bytes);
    }
    all
}

fn verify(store: &Path) -> (Output, String) {
    let output =
        Command::new(env!("CARGO_BIN_EXE_dreamfeed")).args(["log", "verify", "--store"]).arg(store).output().unwrap();
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    (output, text)
}

/// Waits until /readyz tells of a store that is not the daemon's, and says what.
fn wait_for_fault(daemon: &Daemon, words: &[&str]) {
    wait_for(&format!("{words:?} in /readyz: {:?}", daemon.get("/readyz")), || {
        let (status, text) = daemon.get("/readyz");
        status == 503 && words.iter().all(|word| text.contains(word))
    });
    assert_eq!(daemon.metric("dreamfeed_storage_fault"), Some(1.0));
    assert_eq!(daemon.get("/livez").0, 200);
}

async fn refuses_a_push(client: &Client) {
    let refused = within(client.push_student(ARCH, student(2), 1, None)).await.unwrap_err();
    assert_eq!(refused.code(), Some(Code::Unavailable), "{refused}");
    assert!(refused.to_string().contains("log/log.json"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_whose_store_is_deleted_waits_and_goes_on_when_it_is_back() {
    for wanted in ["always", "subscribers"] {
        let mut daemon = Daemon::start(&["--batch-size", "8", "--demand", wanted, "--log-cache-bytes", "1KiB"]);
        let store = daemon.folder.path().join("store");
        let away = daemon.folder.path().join("away");
        let client = daemon.client().await;
        within(client.push_student(ARCH, student(1), 1, None)).await.unwrap();
        let mut stream = client.stream(Start::Earliest).await.unwrap();
        assert_consecutive(&take(&mut stream, 80).await, 0);
        drop(stream);
        std::fs::rename(&store, &away).unwrap();
        wait_for_fault(&daemon, &["log/log.json is gone", "bring it back"]);
        assert_eq!(daemon.metric("dreamfeed_demand{reason=\"storage\"}"), Some(1.0));
        refuses_a_push(&client).await;
        // What is read of it now is a fault of the storage, and no loss.
        let mut stream = client.stream(Start::Earliest).await.unwrap();
        let error = within(futures_util::StreamExt::next(&mut stream)).await.unwrap().unwrap_err();
        assert_eq!(error.code(), Some(Code::Unavailable), "{error}");
        // What was on its way when the store went is taken back.
        wait_for("nothing where the store was", || !store.exists());
        assert_eq!(daemon.metric("dreamfeed_log_lost_images"), Some(0.0));
        let (before, next) = (lying(&away), daemon.metric("dreamfeed_log_next_sequence").unwrap() as u64);
        std::fs::rename(&away, &store).unwrap();
        daemon.wait_ready();
        for (path, bytes) in before {
            let path = store.join(path.strip_prefix(&away).unwrap());
            assert!(bytes.is_none() || std::fs::read(&path).ok() == bytes, "{path:?}");
        }
        // Nothing is missing, and more comes.
        let read = take(&mut client.stream(Start::Earliest).await.unwrap(), next as usize + 40).await;
        assert_consecutive(&read, 0);
        assert_eq!(within(client.push_student(ARCH, student(2), 2, None)).await.unwrap().version, 2);
        daemon.signal("TERM");
        assert!(daemon.wait_exit().success());
        let (output, text) = verify(&store);
        assert!(output.status.success(), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_touches_nothing_of_the_store_that_replaced_its_own() {
    let old = Daemon::start(&["--batch-size", "8", "--max-images", "160", "--log-cache-bytes", "1KiB"]);
    let store = old.folder.path().join("store");
    let client = old.client().await;
    within(client.push_student(ARCH, student(1), 1, None)).await.unwrap();
    drop(take(&mut client.stream(Start::Earliest).await.unwrap(), 160).await);
    std::fs::remove_dir_all(&store).unwrap();
    // Behind the new one's end, at it and before it: whatever the old one looks at is the new one's.
    let new = Daemon::start(&[&IMAGES[..], &["--store", store.to_str().unwrap()]].concat());
    new.wait_metric("dreamfeed_log_next_sequence", 64.0);
    within(new.client().await.push_student(ARCH, student(3), 1, None)).await.unwrap();
    wait_for_fault(&old, &["log/log.json is another store's", "restart the daemon"]);
    let before = lying(&store);
    refuses_a_push(&client).await;
    for start in [Start::Earliest, Start::Sequence(56), Start::Sequence(100)] {
        let mut stream = client.stream(start).await.unwrap();
        let error = within(futures_util::StreamExt::next(&mut stream)).await.unwrap().unwrap_err();
        assert_eq!(error.code(), Some(Code::Unavailable), "{error}");
    }
    // The version of the old store is held in memory; the new store's one is not taken for it.
    assert_eq!(within(client.fetch_student(1)).await.unwrap().unwrap().checkpoint.bytes(), &student(1));
    assert_eq!(client.describe().await.unwrap().student.unwrap().version, 1);
    assert_eq!(lying(&store), before);
    assert_eq!(old.metric("dreamfeed_log_quarantined_chunks_total"), Some(0.0));
    assert_eq!(old.metric("dreamfeed_log_lost_images"), Some(0.0));
    let read = take(&mut new.client().await.stream(Start::Earliest).await.unwrap(), 64).await;
    assert_consecutive(&read, 0);
    let (output, text) = verify(&store);
    assert!(output.status.success(), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_overwrites_what_it_should_not_is_refused_at_the_start() {
    let server = S3::shared();
    let proxy = Proxy::before(&server.address);
    proxy.set(Mode::Unconditional);
    let location = format!("s3://{}/store", server.bucket());
    let mut daemon = Daemon::launch_with(
        tempfile::tempdir().unwrap(),
        &[&IMAGES[..], &["--store", &location]].concat(),
        |command| {
            command.envs(S3::environment(&proxy.address));
        },
    );
    assert_eq!(daemon.wait_exit().code(), Some(1));
    let log = daemon.log();
    let last = log.lines().last().unwrap();
    assert!(last.starts_with("error: ") && last.contains("If-None-Match") && last.contains(&location), "{log}");
}

#[test]
fn a_probe_does_not_stay_and_one_that_did_is_known() {
    let mut daemon = Daemon::start(&IMAGES);
    daemon.wait_metric("dreamfeed_log_next_sequence", 64.0);
    let store = daemon.folder.path().join("store");
    daemon.signal("TERM");
    assert!(daemon.wait_exit().success());
    let probes = || lying(&store).keys().filter(|path| path.to_str().unwrap().contains("probe")).count();
    assert_eq!(probes(), 0);
    std::fs::write(store.join(Object::Probe(Uuid::from_u128(7)).name()), "first").unwrap();
    let (output, text) = verify(&store);
    assert!(output.status.success() && text.contains("remains") && text.contains("log/probe-"), "{text}");
}

#[test]
fn what_is_nobodys_is_named_and_left_alone_in_every_folder() {
    let mut daemon = Daemon::start(&[&IMAGES[..], &["--synthesizer", "noise"]].concat());
    daemon.wait_metric("dreamfeed_log_next_sequence", 64.0);
    let store = daemon.folder.path().join("store");
    let mut expected = Vec::new();
    for folder in ["", "log/", "log/chunks/", "log/quarantine/", "log/evicted/", "students/", "generators/"] {
        let at = store.join(folder);
        std::fs::create_dir_all(at.join("stray/below")).unwrap();
        std::fs::write(at.join("stray/below/file"), "x").unwrap();
        std::fs::write(at.join("notes.txt"), "x").unwrap();
        std::fs::write(at.join(OsStr::from_bytes(b"\xffname")), "x").unwrap();
        symlink("circle", at.join("circle")).unwrap();
        symlink("..", at.join("up")).unwrap();
        expected
            .extend(["stray/", "notes.txt", "\u{fffd}name", "circle", "up/"].map(|name| format!("{folder}{name}")));
    }
    let before = lying(&store);
    // Under a daemon at work, and at the next start.
    for _ in 0..2 {
        daemon.restart(&IMAGES);
        let runtime = tokio::runtime::Runtime::new().unwrap();
        runtime.block_on(async {
            let client = daemon.client().await;
            assert_consecutive(&take(&mut client.stream(Start::Earliest).await.unwrap(), 64).await, 0);
            within(client.push_student(ARCH, student(1), 1, None)).await.unwrap();
        });
        let log = daemon.log();
        assert!(log.contains("no object of a store") || log.contains("nothing in a store has this name"), "{log}");
    }
    let after = lying(&store);
    assert!(before.iter().all(|(path, bytes)| after.get(path) == Some(bytes)));
    let (output, text) = verify(&store);
    assert_eq!(output.status.code(), Some(1));
    for name in &expected {
        assert!(text.lines().any(|line| line.starts_with(&format!("strange      {name}: "))), "{name} in {text}");
    }
    assert!(text.contains(&format!("{} problems", expected.len())), "{text}");
}

/// What an append asks of the storage does not grow with the log.
#[tokio::test(flavor = "multi_thread")]
async fn an_append_lists_nothing() {
    let server = S3::shared();
    let proxy = Proxy::before(&server.address);
    let location = format!("s3://{}/store", server.bucket());
    // Retention evicts a chunk for each that comes.
    let arguments = ["--batch-size", "8", "--log-max-images", "40", "--store", &location];
    let daemon = Daemon::launch_with(tempfile::tempdir().unwrap(), &arguments, |command| {
        command.envs(S3::environment(&proxy.address));
    });
    daemon.wait_ready();
    let evicted = || daemon.metric("dreamfeed_log_evicted_chunks_total").unwrap();
    wait_for("retention", || evicted() >= 5.0);
    let (began, before) = (proxy.listings.load(Ordering::SeqCst), evicted());
    wait_for("appends", || evicted() >= before + 60.0);
    // Other daemons' students are looked for now and then, and on a machine that stood still the log is listed once.
    let listings = proxy.listings.load(Ordering::SeqCst) - began;
    assert!(listings <= 3, "{listings} listings of the log while 60 chunks came and 60 went");
}

/// A put whose answer was lost is the caller's own or another's, never both and never neither.
#[tokio::test(flavor = "multi_thread")]
async fn two_writers_of_one_object_are_told_apart_by_what_lies_there() {
    let folder = tempfile::tempdir().unwrap();
    let storage = Storage::open(folder.path().to_str().unwrap()).unwrap();
    let (ours, theirs) = (bytes::Bytes::from_static(b"ours"), bytes::Bytes::from_static(b"theirs"));
    assert_eq!(storage.create("a/1", ours.clone()).await.unwrap(), Created::Yes);
    // As after an answer that was lost.
    assert_eq!(storage.create("a/1", ours).await.unwrap(), Created::Yes);
    assert_eq!(storage.create("a/1", theirs).await.unwrap(), Created::Taken);
    assert_eq!(storage.get("a/1").await.unwrap().unwrap(), "ours");
}

/// What lies under the name of the next chunk or student and is no object: a fault that is told, not a loop.
#[tokio::test(flavor = "multi_thread")]
async fn a_stray_with_the_next_name_is_a_fault_until_it_is_moved() {
    for is_folder in [true, false] {
        let mut daemon = Daemon::start(&IMAGES);
        daemon.wait_metric("dreamfeed_log_next_sequence", 64.0);
        let store = daemon.folder.path().join("store");
        let strays = [Object::Chunk(64), Object::Student(1)].map(|object| store.join(object.name()));
        for stray in &strays {
            std::fs::create_dir_all(stray.parent().unwrap()).unwrap();
            if is_folder { std::fs::create_dir(stray) } else { symlink("/nowhere/at/all", stray) }.unwrap();
        }
        daemon.restart_unready(&IMAGES);
        wait_for_fault(&daemon, &["00000000000000000064", "is no object"]);
        let client = daemon.client().await;
        let refused = within(client.push_student(ARCH, student(1), 1, None)).await.unwrap_err();
        assert_eq!(refused.code(), Some(Code::Unavailable), "{refused}");
        assert!(refused.to_string().contains("is no object"), "{refused}");
        for stray in &strays {
            if is_folder { std::fs::remove_dir(stray) } else { std::fs::remove_file(stray) }.unwrap();
        }
        daemon.wait_ready();
        within(client.push_student(ARCH, student(1), 1, None)).await.unwrap();
        let read = take(&mut client.stream(Start::Earliest).await.unwrap(), 128).await;
        assert_consecutive(&read, 0);
    }
}

/// The link that a store was given by is read once: pointed elsewhere, it names another store.
#[tokio::test(flavor = "multi_thread")]
async fn a_store_behind_a_link_stays_that_store() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second, link) = (folder.path().join("a"), folder.path().join("b"), folder.path().join("link"));
    let other = Daemon::start(&[&IMAGES[..], &["--store", second.to_str().unwrap()]].concat());
    for seed in 1..5 {
        within(other.client().await.push_student(ARCH, student(seed), 1, None)).await.unwrap();
    }
    std::fs::create_dir(&first).unwrap();
    symlink(&first, &link).unwrap();
    let daemon = Daemon::start(&[&IMAGES[..], &["--store", link.to_str().unwrap()]].concat());
    daemon.wait_metric("dreamfeed_log_next_sequence", 64.0);
    other.wait_metric("dreamfeed_log_next_sequence", 64.0);
    let client = daemon.client().await;
    within(client.push_student(ARCH, student(8), 1, None)).await.unwrap();
    std::fs::remove_file(&link).unwrap();
    symlink(&second, &link).unwrap();
    let before = lying(&second);
    assert_eq!(within(client.push_student(ARCH, student(9), 1, None)).await.unwrap().version, 2);
    assert!(first.join(Object::Student(2).name()).exists());
    assert_eq!(lying(&second), before);
}

/// A store of the default tier holds generators, and is as sound as any.
#[test]
fn a_generator_is_part_of_a_store_and_a_damaged_one_is_named() {
    let quick = ["--preset", "digits", "--fast-steps", "1", "--fast-width", "4", "--fast-warmup", "1"];
    let arguments = [&IMAGES[..], &["--synthesizer", "fast"], &quick].concat();
    let mut daemon = Daemon::start(&arguments);
    daemon.wait_metric("dreamfeed_log_next_sequence", 64.0);
    let store = daemon.folder.path().join("store");
    daemon.signal("TERM");
    assert!(daemon.wait_exit().success());
    let generator = store.join(Object::Generator(1).name());
    let mut bytes = std::fs::read(&generator).unwrap();
    let (output, text) = verify(&store);
    assert!(output.status.success() && text.contains("nothing is wrong"), "{text}");
    bytes.truncate(bytes.len() / 2);
    std::fs::write(&generator, bytes).unwrap();
    let (output, text) = verify(&store);
    assert_eq!(output.status.code(), Some(1));
    assert!(text.contains("generator    generators/00000000000000000001.safetensors: "), "{text}");
}
