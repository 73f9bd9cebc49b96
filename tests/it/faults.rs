//! A storage that is full, closed, broken or slow under a running daemon: synthesis waits, nothing is lost, and everything
//! goes on by itself.

use std::fs::Permissions;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::support::s3::{Mode, Proxy, S3};
use crate::support::{ARCH, Daemon, images, student, wait_for, within};
use dreamfeed::client::{Client, ClientError, Pushed, Start};
use dreamfeed::proto;
use futures_util::StreamExt;
use tempfile::TempDir;
use tonic::Code;

/// Images are made as a reader takes them, so that retention never overtakes it.
const ON_DEMAND: [&str; 8] =
    ["--batch-size", "16", "--demand", "subscribers", "--demand-max-lag", "64", "--log-max-bytes", "1MiB"];

/// A reader that must see every image once and in order, whatever happens to the storage.
struct Reader {
    next: Arc<AtomicU64>,
    task: tokio::task::JoinHandle<()>,
}

impl Reader {
    async fn from(daemon: &Daemon, sequence: u64) -> Self {
        let next = Arc::new(AtomicU64::new(sequence));
        let mut stream = daemon.client().await.stream(Start::Sequence(sequence)).await.unwrap();
        let seen = next.clone();
        let task = tokio::spawn(async move {
            while let Some(batch) = stream.next().await {
                let batch = match batch {
                    Ok(batch) => batch,
                    // The daemon's end ends it, nothing else.
                    Err(error) if error.code() == Some(Code::Unavailable) => return,
                    Err(error) if error.is_transient() => return,
                    Err(error) => panic!("{error}"),
                };
                assert_eq!(batch.first_sequence, seen.load(Ordering::SeqCst));
                seen.fetch_add(batch.count as u64, Ordering::SeqCst);
            }
        });
        Self { next, task }
    }

    fn seen(&self) -> u64 {
        assert!(!self.task.is_finished(), "the stream ended");
        self.next.load(Ordering::SeqCst)
    }

    /// Waits until it has got more.
    async fn goes_on(&self) {
        let mark = self.seen() + 100;
        wait_until("images", || self.seen() >= mark).await;
    }
}

async fn wait_until(what: &str, condition: impl FnMut() -> bool) {
    // Away from the runtime's threads: the reader's task needs them.
    tokio::task::block_in_place(|| wait_for(what, condition));
}

/// Everything that a daemon says while its storage takes nothing.
async fn assert_waits(daemon: &Daemon) {
    wait_until("the fault in /readyz", || {
        let (status, text) = daemon.get("/readyz");
        status == 503 && text.starts_with("storage: ")
    })
    .await;
    let metric = |series: &str| daemon.metric(series).unwrap_or_default();
    assert_eq!(metric("dreamfeed_storage_fault"), 1.0);
    assert_eq!(metric("dreamfeed_demand{reason=\"storage\"}"), 1.0);
    assert_eq!(metric("dreamfeed_demand{reason=\"wanted\"}"), 0.0);
    assert!(metric("dreamfeed_storage_errors_total{operation=\"append\"}") >= 1.0);
    // It lives, and answers.
    assert_eq!(daemon.get("/livez").0, 200);
    within(daemon.client().await.describe()).await.unwrap();
    // The engine rests or waits, with no more in hand than the queue holds.
    wait_until("the engine's rest", || {
        let state = |name: &str| metric(&format!("dreamfeed_engine_state{{state=\"{name}\"}}"));
        state("resting") + state("blocked") == 1.0
    })
    .await;
    let (made, next) = (metric("dreamfeed_images_synthesized_total{synthesizer=\"noise\"}"), next(daemon));
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(metric("dreamfeed_images_synthesized_total{synthesizer=\"noise\"}"), made);
    assert_eq!(metric("dreamfeed_log_next_sequence") as u64, next);
}

fn next(daemon: &Daemon) -> u64 {
    daemon.metric("dreamfeed_log_next_sequence").unwrap() as u64
}

async fn assert_goes_on(daemon: &Daemon, reader: &Reader) {
    wait_until("readiness", || daemon.get("/readyz").0 == 200).await;
    assert_eq!(daemon.metric("dreamfeed_storage_fault"), Some(0.0));
    assert_eq!(daemon.metric("dreamfeed_demand{reason=\"storage\"}"), Some(0.0));
    reader.goes_on().await;
    assert_eq!(daemon.metric("dreamfeed_batches_refused_total").unwrap_or(0.0), 0.0);
}

/// What is in the log is served from its beginning to its end.
async fn assert_serves_what_is_there(daemon: &Daemon) {
    let log = daemon.client().await.describe().await.unwrap().log.unwrap();
    let mut stream = daemon.client().await.stream(Start::Earliest).await.unwrap();
    let mut position = log.first_sequence;
    while position < log.next_sequence {
        let batch = within(stream.next()).await.unwrap().unwrap();
        assert_eq!(batch.first_sequence, position);
        position += batch.count as u64;
    }
}

async fn push(client: &Client, seed: u64) -> Result<Pushed, ClientError> {
    within(client.push_student(ARCH, student(seed), seed, None)).await
}

async fn assert_push_waits(daemon: &Daemon, seed: u64) {
    let error = push(&daemon.client().await, seed).await.unwrap_err();
    assert_eq!(error.code(), Some(Code::Unavailable), "{error}");
    assert!(error.to_string().contains("push it again"), "{error}");
}

/// The push that failed is accepted now, and once.
async fn assert_pushed_once(daemon: &Daemon, seed: u64, version: u64) {
    let client = daemon.client().await;
    assert_eq!(push(&client, seed).await.unwrap(), Pushed { version, already_current: false });
    assert_eq!(push(&client, seed).await.unwrap(), Pushed { version, already_current: true });
    assert_eq!(client.fetch_student(0).await.unwrap().unwrap().checkpoint.bytes(), &student(seed));
}

fn start(folder: TempDir, arguments: &[&str], adjust: impl FnOnce(&mut Command)) -> Daemon {
    let daemon = Daemon::launch_with(folder, arguments, adjust);
    daemon.wait_ready();
    daemon
}

/// A small file system of its own, gone when dropped.
struct Disk(PathBuf);

impl Disk {
    fn mount(at: &Path, size: &str) -> Option<Self> {
        std::fs::create_dir_all(at).unwrap();
        let options = format!("size={size},mode=0755");
        let mount = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(at).output();
        match mount {
            Ok(done) if done.status.success() => Some(Self(at.to_owned())),
            _ => {
                eprintln!("skipped: a file system cannot be mounted here");
                None
            }
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_pauses_the_daemon_and_loses_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let disk = folder.path().join("disk");
    let Some(_disk) = Disk::mount(&disk, "16m") else { return };
    let store = disk.join("store");
    let daemon = start(folder, &[&ON_DEMAND[..], &["--store", store.to_str().unwrap()]].concat(), |_| {});
    let reader = Reader::from(&daemon, 0).await;
    reader.goes_on().await;
    for seed in [2, 3] {
        // Retention frees space while this takes it, until nothing is left.
        let (path, client) = (disk.join("filler"), daemon.client().await);
        let mut filler = std::fs::File::create(&path).unwrap();
        wait_until("a full disk", || {
            for piece in [vec![0; 1 << 16], vec![0; 1 << 12]] {
                while filler.write_all(&piece).is_ok() {}
            }
            daemon.metric("dreamfeed_storage_fault") == Some(1.0)
        })
        .await;
        assert_waits(&daemon).await;
        assert!(daemon.get("/readyz").1.contains("No space left"), "{}", daemon.get("/readyz").1);
        assert_serves_what_is_there(&daemon).await;
        assert_push_waits(&daemon, seed).await;
        assert!(client.fetch_student(seed - 1).await.unwrap().is_none());
        std::fs::remove_file(&path).unwrap();
        drop(filler);
        assert_goes_on(&daemon, &reader).await;
        assert_pushed_once(&daemon, seed, seed - 1).await;
    }
    // What failed left nothing behind.
    let remains = |folder: &str| {
        let entries = std::fs::read_dir(store.join(folder)).unwrap();
        entries.filter(|entry| entry.as_ref().unwrap().file_name().to_string_lossy().contains('#')).count()
    };
    drop(reader);
    wait_until("no staged file", || remains("log/chunks") + remains("students") == 0).await;
}

/// A user whom permissions bind: somebody else where this is root. None where that is not possible here.
fn other_user(folder: &Path) -> Option<Option<u32>> {
    if std::fs::metadata(folder).unwrap().uid() != 0 {
        return Some(None);
    }
    const NOBODY: u32 = 65_534;
    std::fs::set_permissions(folder, Permissions::from_mode(0o755)).unwrap();
    std::os::unix::fs::chown(folder, Some(NOBODY), None).unwrap();
    let runs = Command::new(env!("CARGO_BIN_EXE_dreamfeed")).arg("--version").uid(NOBODY).output();
    if runs.is_ok_and(|done| done.status.success()) {
        return Some(Some(NOBODY));
    }
    eprintln!("skipped: root cannot run the daemon as another user here");
    None
}

fn allow(folder: &Path, mode: u32) {
    std::fs::set_permissions(folder, Permissions::from_mode(mode)).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_that_is_closed_pauses_the_daemon_until_it_is_open_again() {
    let folder = tempfile::tempdir().unwrap();
    let Some(user) = other_user(folder.path()) else { return };
    let as_user = |command: &mut Command| {
        if let Some(user) = user {
            command.uid(user);
        }
    };
    let store = folder.path().join("store");
    let teacher = crate::support::write_teacher(folder.path());
    let arguments =
        [&ON_DEMAND[..], &["--store", store.to_str().unwrap(), "--teacher", teacher.to_str().unwrap()]].concat();
    let mut daemon = start(folder, &arguments, as_user);
    let reader = Reader::from(&daemon, 0).await;
    reader.goes_on().await;
    assert_eq!(push(&daemon.client().await, 1).await.unwrap().version, 1);
    let places = [store.join("log/chunks"), store.join("students")];
    // Read-only; then not even that.
    for (seed, mode) in [(2, 0o555), (3, 0o000)] {
        places.iter().for_each(|place| allow(place, mode));
        assert_waits(&daemon).await;
        assert!(daemon.get("/readyz").1.contains("Permission denied"), "{}", daemon.get("/readyz").1);
        // From the cache, where the folder cannot even be read.
        assert_serves_what_is_there(&daemon).await;
        assert_push_waits(&daemon, seed).await;
        places.iter().for_each(|place| allow(place, 0o755));
        assert_goes_on(&daemon, &reader).await;
        assert_pushed_once(&daemon, seed, seed).await;
    }
    // A daemon that starts on a read-only folder serves what is there, and waits too.
    daemon.signal("TERM");
    assert!(daemon.wait_exit().success());
    places.iter().for_each(|place| allow(place, 0o555));
    let folder = std::mem::replace(&mut daemon.folder, tempfile::tempdir().unwrap());
    let daemon = Daemon::launch_with(folder, &arguments, as_user);
    wait_until("the engine", || daemon.get("/readyz").0 == 200).await;
    let stored = next(&daemon);
    assert!(stored >= reader.next.load(Ordering::SeqCst));
    assert_serves_what_is_there(&daemon).await;
    let reader = Reader::from(&daemon, stored).await;
    assert_waits(&daemon).await;
    assert_push_waits(&daemon, 4).await;
    places.iter().for_each(|place| allow(place, 0o755));
    assert_goes_on(&daemon, &reader).await;
    assert_pushed_once(&daemon, 4, 4).await;
}

fn behind(proxy: &Proxy, arguments: &[&str]) -> (Daemon, String) {
    let store = format!("s3://{}/dreams", S3::shared().bucket());
    let arguments = [arguments, &["--store", &store]].concat();
    let daemon = start(tempfile::tempdir().unwrap(), &arguments, |command| {
        command.envs(S3::environment(&proxy.address));
    });
    (daemon, store)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_that_answers_errors_pauses_the_daemon() {
    let proxy = Proxy::before(&S3::shared().address);
    let (daemon, _) = behind(&proxy, &ON_DEMAND);
    let reader = Reader::from(&daemon, 0).await;
    reader.goes_on().await;
    for (seed, mode) in [(2, Mode::Refuse), (3, Mode::Drop)] {
        proxy.set(mode);
        assert_waits(&daemon).await;
        assert_serves_what_is_there(&daemon).await;
        assert_push_waits(&daemon, seed).await;
        proxy.set(Mode::Pass);
        assert_goes_on(&daemon, &reader).await;
        assert_pushed_once(&daemon, seed, seed - 1).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_that_is_slow_stalls_nobody_else() {
    let proxy = Proxy::before(&S3::shared().address);
    let (daemon, _) = behind(&proxy, &ON_DEMAND);
    let reader = Reader::from(&daemon, 0).await;
    reader.goes_on().await;
    proxy.set(Mode::Slow(Duration::from_millis(500)));
    let client = daemon.client().await;
    let mark = reader.seen() + 32;
    let pushing = tokio::spawn({
        let client = client.clone();
        async move { push(&client, 2).await }
    });
    // While every call to the storage takes its time, what needs none of them is answered.
    let mut answers = 0;
    while !pushing.is_finished() {
        within(client.describe()).await.unwrap();
        answers += 1;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(answers > 1);
    assert_eq!(pushing.await.unwrap().unwrap(), Pushed { version: 1, already_current: false });
    assert_serves_what_is_there(&daemon).await;
    wait_until("images", || reader.seen() >= mark).await;
    // Slow is no fault.
    assert_eq!(daemon.metric("dreamfeed_storage_fault"), Some(0.0));
    assert_eq!(daemon.get("/readyz").0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_are_lost_double_nothing() {
    let proxy = Proxy::before(&S3::shared().address);
    let (daemon, _) = behind(&proxy, &["--batch-size", "16", "--max-images", "320"]);
    proxy.set(Mode::Forget);
    let client = daemon.client().await;
    let mut version = 0;
    for seed in 2..6 {
        // A trainer pushes again until it is told.
        let pushed = loop {
            match push(&client, seed).await {
                Ok(pushed) => break pushed,
                Err(error) => assert_eq!(error.code(), Some(Code::Unavailable), "{error}"),
            }
        };
        version += 1;
        assert_eq!(pushed.version, version);
    }
    let request = proto::StreamRequest { start: Some(Start::Earliest.into()), ..Default::default() };
    let mut stream = client.stream_with(request).await.unwrap();
    let mut all = std::collections::BTreeSet::new();
    let mut position = 0;
    while position < 320 {
        let batch = within(stream.next()).await.unwrap().unwrap();
        assert_eq!(batch.first_sequence, position);
        position += batch.count as u64;
        all.extend(images(&batch.payload));
    }
    assert!(proxy.forgotten.load(Ordering::SeqCst) > 0);
    assert_eq!((all.len(), next(&daemon)), (320, 320));
    wait_until("readiness", || daemon.get("/readyz").0 == 200).await;
}

/// A storage that takes requests and never answers holds up neither the drain nor anybody else.
#[tokio::test(flavor = "multi_thread")]
async fn a_drain_does_not_wait_for_a_storage_that_hangs() {
    let proxy = Proxy::before(&S3::shared().address);
    let (mut daemon, _) = behind(&proxy, &[&ON_DEMAND[..], &["--drain-timeout", "1s"]].concat());
    let reader = Reader::from(&daemon, 0).await;
    reader.goes_on().await;
    proxy.set(Mode::Hang);
    let client = daemon.client().await;
    let pushing = tokio::spawn(async move { push(&client, 2).await });
    let mark = next(&daemon);
    wait_until("the queue", || {
        daemon.metric("dreamfeed_engine_state{state=\"blocked\"}") == Some(1.0)
            || daemon.metric("dreamfeed_engine_state{state=\"resting\"}") == Some(1.0)
    })
    .await;
    assert!(next(&daemon) <= mark + 32);
    within(daemon.client().await.describe()).await.unwrap();
    daemon.signal("TERM");
    // Far sooner than the storage's own time-outs would end it.
    let status = tokio::task::block_in_place(|| daemon.wait_exit());
    assert!(status.success());
    assert!(pushing.await.unwrap().unwrap_err().is_transient());
    assert!(daemon.log().contains("drained"), "{}", daemon.log());
    within(reader.task).await.unwrap();
}
