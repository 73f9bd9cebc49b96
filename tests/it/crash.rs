//! Writers are killed with SIGKILL at random moments, again and again; nothing that was acknowledged may be missing,
//! doubled or damaged afterwards. `DREAMFEED_TEST_SEED` repeats the random choices of a run (not its timing).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, SystemTime};

use crate::support::{ARCH, CHANNELS, CLASSES, Daemon, LONG, images, within};
use bytes::Bytes;
use dreamfeed::client::{Client, Start};
use dreamfeed::delivery::{Delivery, End, Flight, Policy, Shard, Subscription};
use dreamfeed::log::{self, Entry, Located, Log, LogOptions, Maker, ReadError, Retention};
use dreamfeed::model::checkpoint::Checkpoint;
use dreamfeed::model::source::{Geometry, Normalization};
use dreamfeed::storage::Storage;
use dreamfeed::students::{Accepted, PushHeader, Requirements, StudentLimits, StudentStore};
use dreamfeed::synthesis::batch::DreamBatch;
use futures_util::StreamExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

const GEOMETRY: Geometry = Geometry { channels: 1, height: 2, width: 4 };
const LOGITS: usize = 3;
/// Students kept.
const KEPT: u64 = 3;
/// The largest batch.
const MOST: u64 = 6;
/// What turns this test's binary into a writer.
const JOB: &str = "CRASH_TEST_JOB";

/// What a writer does, over and over.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Job {
    folder: PathBuf,
    writer: u64,
    max_images: u64,
    seed_images: u64,
    /// Chunks with a flipped bit: the writer reads them, which puts them into quarantine while it is being killed.
    damaged: Vec<u64>,
}

/// One batch: who made it, which of its batches it is. Everything in it follows from that.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Made {
    writer: u64,
    turn: u64,
}

impl Made {
    fn count(self) -> u64 {
        (self.writer.wrapping_mul(31) ^ self.turn.wrapping_mul(0x9E37_79B9)).rotate_left(7) % MOST + 1
    }

    /// The pixels of an image, which spell who made it.
    fn pixels(self, row: u64) -> u64 {
        self.writer << 40 | self.turn << 8 | row
    }

    fn of(pixels: u64) -> (Self, u64) {
        (Self { writer: pixels >> 40, turn: pixels >> 8 & 0xFFFF_FFFF }, pixels & 0xFF)
    }

    fn batch(self) -> DreamBatch {
        let pixels: Vec<u64> = (0..self.count()).map(|row| self.pixels(row)).collect();
        DreamBatch {
            images: pixels.iter().flat_map(|pixels| pixels.to_le_bytes()).collect(),
            labels: pixels.iter().map(|pixels| (pixels % LOGITS as u64) as i64).collect(),
            teacher_logits: pixels.iter().flat_map(|pixels| [*pixels as f32, 0.5, -1.0]).collect(),
            student_version: vec![self.turn as i64; pixels.len()],
            competition: vec![0.25; pixels.len()],
            geometry: GEOMETRY,
            num_classes: LOGITS,
            synthesizer: "noise",
            settings: "{}".into(),
            created_at: SystemTime::now(),
        }
    }

    /// A student that is told from every other by its metadata.
    fn student(self, tensors: &crate::support::Tensors) -> Bytes {
        crate::support::file(tensors, &[("made", &format!("{}/{}", self.writer, self.turn))])
    }
}

fn pixels(images: &[u8]) -> Vec<u64> {
    images.as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect()
}

async fn open_log(storage: &Storage, max_images: u64, seed_images: u64) -> Arc<Log> {
    let retention = Retention { max_images: Some(max_images), seed_images, ..Retention::default() };
    let maker = Maker { teacher_sha256: "ab".repeat(32), geometry: GEOMETRY, num_classes: LOGITS };
    Log::open(storage.clone(), LogOptions { retention, cache_bytes: 1 << 20 }, maker).await.unwrap()
}

async fn open_students(storage: &Storage) -> Arc<StudentStore> {
    let limits = StudentLimits {
        max_bytes: 1 << 24,
        max_classes: 100,
        max_pushes: 4,
        kept_versions: KEPT as usize,
        idle_timeout: LONG,
        push_timeout: LONG,
    };
    let requirements = Requirements { num_classes: CLASSES, in_channels: CHANNELS };
    StudentStore::open(storage.clone(), requirements, limits).await.unwrap()
}

async fn push(students: &Arc<StudentStore>, file: &Bytes, step: u64) -> Accepted {
    let header = PushHeader {
        arch: ARCH.into(),
        byte_length: file.len() as u64,
        sha256: Sha256::digest(file).into(),
        trainer_step: step,
        replaces_version: None,
    };
    let mut push = students.slot().unwrap().begin(header).unwrap();
    push.write(file).unwrap();
    push.finish().await.unwrap()
}

fn tensors() -> crate::support::Tensors {
    crate::support::network(ARCH, CHANNELS, CLASSES, 5)
}

/// The process that the tests kill.
#[test]
#[ignore = "it is no test of its own: the other tests start it, and kill it"]
fn writer() {
    let Ok(job) = std::env::var(JOB) else { return };
    let job: Job = serde_json::from_str(&job).unwrap();
    let tensors = tensors();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    // One line on stdin starts it; its end means that the test is gone.
    let stdin = std::io::stdin();
    if stdin.lock().read_line(&mut String::new()).unwrap_or(0) == 0 {
        return;
    }
    std::thread::spawn(move || {
        let _ = stdin.lock().read_line(&mut String::new());
        std::process::exit(0);
    });
    // Whole lines in one write each: what is killed in the middle of one has not acknowledged.
    let acknowledge = |line: String| std::io::stderr().write_all(format!("{line}\n").as_bytes()).unwrap();
    runtime.block_on(async {
        let storage = Storage::open(job.folder.to_str().unwrap()).unwrap();
        let log = open_log(&storage, job.max_images, job.seed_images).await;
        let students = open_students(&storage).await;
        let (writer, reading) = (job.writer, log.clone());
        let read = async move {
            for first in job.damaged {
                let _ = reading.load(first).await;
            }
            std::future::pending::<()>().await;
        };
        let append = async {
            for turn in 0.. {
                let first = log.append(&Arc::new(Made { writer, turn }.batch())).await.unwrap();
                acknowledge(format!("chunk {first} {turn}"));
                log.retain().await.unwrap();
            }
        };
        let push = async {
            for turn in 0.. {
                let accepted = push(&students, &Made { writer, turn }.student(&tensors), turn).await;
                assert!(!accepted.already_current);
                acknowledge(format!("student {} {turn}", accepted.student.version));
            }
        };
        tokio::join!(read, append, push);
    });
}

/// A writer under way, and the lines that it says.
struct Writer {
    child: Child,
    job: Job,
    lines: mpsc::Receiver<String>,
    /// What it acknowledged so far.
    chunks: Vec<u64>,
    students: Vec<u64>,
}

impl Writer {
    /// Starts the process, which takes a while (libtorch is linked to it) and writes nothing yet.
    fn prepare(job: Job) -> Self {
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "crash::writer", "--ignored", "--nocapture", "--test-threads", "1"]);
        command.env(JOB, serde_json::to_string(&job).unwrap());
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let (sender, lines) = mpsc::channel();
        std::thread::spawn(move || {
            let mut line = String::new();
            // A line that a kill cut short is none.
            while stderr.read_line(&mut line).is_ok() && line.ends_with('\n') {
                let _ = sender.send(std::mem::take(&mut line));
            }
        });
        Self { child, job, lines, chunks: Vec::new(), students: Vec::new() }
    }

    fn go(&mut self, damaged: &[u64]) {
        assert!(damaged.is_empty() || self.job.damaged == damaged);
        self.child.stdin.as_mut().unwrap().write_all(b"go\n").unwrap();
    }

    /// Waits for so many acknowledgements and a little longer, then kills it.
    fn kill_after(&mut self, acknowledgements: usize, pause: Duration) {
        while self.chunks.len() + self.students.len() < acknowledgements {
            let line = self.lines.recv_timeout(LONG).expect("the writer says nothing more");
            self.hear(&line);
        }
        std::thread::sleep(pause);
        self.child.kill().unwrap();
        let status = self.child.wait().unwrap();
        assert!(!status.success());
        while let Ok(line) = self.lines.recv_timeout(LONG) {
            self.hear(&line);
        }
    }

    fn hear(&mut self, line: &str) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [kind @ ("chunk" | "student"), number, turn] = words.as_slice() else {
            panic!("the writer says: {line}");
        };
        let list = if *kind == "chunk" { &mut self.chunks } else { &mut self.students };
        assert_eq!(turn.parse::<usize>().unwrap(), list.len(), "no turn is left out");
        list.push(number.parse().unwrap());
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A data-parallel rank that keeps its cursor and dies as often as the writers do.
struct Rank {
    policy: Policy,
    cursor: Option<Bytes>,
    /// The next image of its shard that it has not got.
    next: u64,
    got: u64,
    skipped: u64,
}

/// What must be there.
struct Model {
    folder: PathBuf,
    max_images: u64,
    seed_images: u64,
    /// Every chunk that was acknowledged or seen.
    chunks: BTreeMap<u64, Made>,
    by_batch: HashMap<Made, u64>,
    acknowledged: u64,
    damaged: BTreeSet<u64>,
    students: BTreeMap<u64, Made>,
    student_by_push: HashMap<Made, u64>,
    /// Batches under way when their writers were killed that were not seen afterwards.
    unseen: BTreeSet<Made>,
    verified: BTreeSet<u64>,
    ranks: Vec<Rank>,
    evicted: u64,
    log_id: Option<uuid::Uuid>,
    tensors: crate::support::Tensors,
}

impl Model {
    fn new(folder: &Path, max_images: u64, seed_images: u64) -> Self {
        let rank = |(index, batch_size)| Rank {
            policy: Policy { shard: Shard { index, count: 3 }, batch_size, ..Policy::default() },
            cursor: None,
            next: 0,
            got: 0,
            skipped: 0,
        };
        Self {
            folder: folder.to_owned(),
            max_images,
            seed_images,
            chunks: BTreeMap::new(),
            by_batch: HashMap::new(),
            acknowledged: 0,
            damaged: BTreeSet::new(),
            students: BTreeMap::new(),
            student_by_push: HashMap::new(),
            unseen: BTreeSet::new(),
            verified: BTreeSet::new(),
            ranks: [(0, None), (1, Some(4)), (2, Some(7))].map(rank).into(),
            evicted: 0,
            log_id: None,
            tensors: tensors(),
        }
    }

    fn end(&self, first: u64) -> u64 {
        first + self.chunks[&first].count()
    }

    /// A chunk is known now. A sequence belongs to one image for ever, and a batch is written once.
    fn learn(&mut self, first: u64, made: Made) {
        if let Some(known) = self.chunks.get(&first) {
            assert_eq!(*known, made, "sequence {first} was given twice");
            return;
        }
        let end = first + made.count();
        if let Some((before, _)) = self.chunks.range(..first).next_back() {
            assert!(self.end(*before) <= first, "{made:?} at {first} overlaps the chunk at {before}");
        }
        if let Some((after, _)) = self.chunks.range(first..).next() {
            assert!(end <= *after, "{made:?} at {first} overlaps the chunk at {after}");
        }
        self.chunks.insert(first, made);
        let before = self.by_batch.insert(made, first);
        assert_eq!(before, None, "{made:?} is in the log twice, also at {first}");
    }

    fn learn_student(&mut self, version: u64, made: Made) {
        if let Some(known) = self.students.get(&version) {
            assert_eq!(*known, made, "student version {version} was given twice");
            return;
        }
        self.students.insert(version, made);
        assert_eq!(self.student_by_push.insert(made, version), None, "{made:?} has two versions");
    }

    /// The image with this sequence.
    fn image(&self, sequence: u64) -> Option<u64> {
        let (first, made) = self.chunks.range(..=sequence).next_back()?;
        (sequence < first + made.count()).then(|| made.pixels(sequence - first))
    }

    fn is_damaged(&self, sequence: u64) -> bool {
        self.damaged.range(..=sequence).next_back().is_some_and(|first| sequence < self.end(*first))
    }

    /// Flips one bit of a chunk's pixels on the disk.
    fn damage(&mut self, random: &mut StdRng) -> Vec<u64> {
        let there: Vec<u64> = self.chunks.keys().copied().filter(|first| self.path(*first).exists()).collect();
        let Some(first) = there.choose(random).copied().filter(|first| !self.damaged.contains(first)) else {
            return Vec::new();
        };
        let file = OpenOptions::new().read(true).write(true).open(self.path(first)).unwrap();
        let (at, mut byte) = (file.metadata().unwrap().len() - 1 - random.random_range(0..8), [0]);
        file.read_exact_at(&mut byte, at).unwrap();
        byte[0] ^= 1 << random.random_range(0..8);
        file.write_all_at(&byte, at).unwrap();
        self.damaged.insert(first);
        self.verified.remove(&first);
        vec![first]
    }

    fn path(&self, first: u64) -> PathBuf {
        self.folder.join(format!("log/chunks/{first:020}.safetensors"))
    }

    /// Compares the folder with what must be in it, after these writers were killed.
    async fn check(&mut self, killed: &[&Writer], random: &mut StdRng, everything: bool) {
        for writer in killed {
            for (turn, first) in (0..).zip(&writer.chunks) {
                self.learn(*first, Made { writer: writer.job.writer, turn });
                self.acknowledged += 1;
            }
            for (turn, version) in (0..).zip(&writer.students) {
                self.learn_student(*version, Made { writer: writer.job.writer, turn });
            }
        }
        let storage = Storage::open(self.folder.to_str().unwrap()).unwrap();
        let log = open_log(&storage, self.max_images, self.seed_images).await;
        let id = log.identity().log_id;
        assert_eq!(*self.log_id.get_or_insert(id), id);
        self.check_chunks(&log, killed, random, everything).await;
        let students = open_students(&storage).await;
        self.check_students(&students, killed).await;
        let normalization = Normalization { mean: vec![0.5], std: vec![0.5] };
        let delivery = Delivery::new(log.clone(), &normalization, students.watch(), Flight::new(1 << 30, 1));
        for rank in 0..self.ranks.len() {
            self.read_on(rank, &log, &delivery, random).await;
        }
    }

    async fn check_chunks(&mut self, log: &Arc<Log>, killed: &[&Writer], random: &mut StdRng, everything: bool) {
        // Every chunk that is there holds what it must; one that nobody knew was under way at a kill.
        let entries = log.news(0, usize::MAX).entries;
        for entry in &entries {
            let first = entry.summary.first_sequence;
            let again = everything || random.random_ratio(1, 50);
            if self.verified.contains(&first) && !again {
                continue;
            }
            let loaded = log.load(first).await;
            if self.damaged.contains(&first) {
                assert!(matches!(loaded, Err(ReadError::Damaged)), "{first}: {loaded:?}");
                continue;
            }
            let chunk = loaded.unwrap();
            let found = pixels(chunk.images());
            let (made, _) = Made::of(found[0]);
            assert_eq!(found, (0..made.count()).map(|row| made.pixels(row)).collect::<Vec<_>>());
            if !self.chunks.contains_key(&first) {
                let under_way =
                    |writer: &&&Writer| (writer.job.writer, writer.chunks.len() as u64) == (made.writer, made.turn);
                assert!(killed.iter().any(|writer| under_way(&writer)), "{made:?} at {first} came from nowhere");
            }
            self.learn(first, made);
            self.verified.insert(first);
        }
        for writer in killed {
            let next = Made { writer: writer.job.writer, turn: writer.chunks.len() as u64 };
            if !self.by_batch.contains_key(&next) {
                self.unseen.insert(next);
            }
        }
        // No gap: each chunk begins where the one before it ends. What neither an acknowledgement nor this test saw can
        // only be a batch under way at a kill, which a second writer evicted.
        let mut next = 0;
        for (first, made) in &self.chunks {
            if *first > next {
                let hole = self.unseen.iter().copied().find(|unseen| unseen.count() == first - next);
                assert!(
                    first - next <= MOST && *first <= log.extent().first_sequence,
                    "a gap from {next} to {first}"
                );
                let hole = hole.unwrap_or_else(|| panic!("a gap from {next} to {first}"));
                self.unseen.remove(&hole);
            }
            next = first + made.count();
        }
        let extent = log.extent();
        assert_eq!(extent.next_sequence, next);
        // Every acknowledged chunk is there, or retention took it, which takes no more than it must.
        let here: BTreeSet<u64> = entries.iter().map(|entry: &Arc<Entry>| entry.summary.first_sequence).collect();
        for first in self.chunks.keys().filter(|first| !here.contains(first) && !self.damaged.contains(first)) {
            let (end, floor) = (self.end(*first), extent.first_sequence);
            assert!(
                end <= floor && *first >= self.seed_images,
                "the chunk at {first} is missing; the log has {floor}.."
            );
        }
        self.evicted = extent.first_sequence;
        if extent.first_sequence > 0 {
            let lost = self.damaged.len() as u64;
            assert!(extent.images + MOST * (1 + lost) >= self.max_images, "{extent:?}");
        }
        // What a reader meets from the beginning of the log to its end.
        let mut position = extent.first_sequence;
        loop {
            match log.locate(position) {
                Located::Chunk(entry) => position = entry.summary.end(),
                Located::Lost { next_sequence } => {
                    assert!(
                        (position..next_sequence).all(|sequence| self.is_damaged(sequence)),
                        "{position} is lost"
                    );
                    position = next_sequence;
                }
                Located::Wait => break,
                other => panic!("at {position}: {other:?}"),
            }
        }
        let quarantine = self.folder.join("log/quarantine");
        let names: Vec<String> = std::fs::read_dir(&quarantine)
            .map(|entries| entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect())
            .unwrap_or_default();
        for name in names.iter().filter(|name| !name.contains('#')) {
            let first: u64 = name.split('-').next().unwrap().parse().unwrap();
            assert!(self.damaged.contains(&first), "{name} is in quarantine, and was not damaged");
        }
    }

    async fn check_students(&mut self, students: &Arc<StudentStore>, killed: &[&Writer]) {
        let newest = students.current_version();
        let acknowledged = self.students.keys().next_back().copied().unwrap_or(0);
        assert!(newest >= acknowledged, "{newest} is adopted, {acknowledged} was acknowledged");
        for version in newest.saturating_sub(KEPT - 1).max(1)..=newest {
            let student = students.get(version).await.unwrap().unwrap_or_else(|| panic!("{version} is missing"));
            let made = &student.checkpoint.metadata()["made"];
            let (writer, turn) = made.split_once('/').unwrap();
            let made = Made { writer: writer.parse().unwrap(), turn: turn.parse().unwrap() };
            if !self.students.contains_key(&version) {
                let under_way =
                    |writer: &&&Writer| (writer.job.writer, writer.students.len() as u64) == (made.writer, made.turn);
                assert!(killed.iter().any(|writer| under_way(&writer)), "{made:?} as {version} came from nowhere");
            }
            self.learn_student(version, made);
            let pushed = made.student(&self.tensors);
            assert_eq!(student.checkpoint.bytes(), &pushed, "version {version} is not what was pushed");
            assert_eq!((student.sha256, student.trainer_step), (Sha256::digest(&pushed).into(), made.turn));
        }
    }

    /// A rank resumes from its cursor, takes some or all of what is there, and dies, sometimes before it kept its cursor.
    async fn read_on(&mut self, rank: usize, log: &Arc<Log>, delivery: &Arc<Delivery>, random: &mut StdRng) {
        let policy = self.ranks[rank].policy.clone();
        let position = self.ranks[rank].cursor.as_ref().map_or(0, |cursor| log.position(cursor).unwrap());
        let mut subscription = delivery.subscribe(position, policy.clone());
        let size = policy.batch_size.unwrap_or(1);
        let mut messages = if random.random_ratio(1, 3) { random.random_range(0..8) } else { usize::MAX };
        let end = log.extent().next_sequence;
        while messages > 0 {
            let next = self.ranks[rank].next;
            let mine = |sequence: &u64| policy.shard.has(*sequence);
            if (next..end).filter(mine).filter(|sequence| !self.is_damaged(*sequence)).count() < size {
                break;
            }
            match within(subscription.next()).await {
                Ok(message) => {
                    let payload = Checkpoint::parse(message.payload).unwrap();
                    let found: Vec<u64> = images(&payload)
                        .iter()
                        .map(|image| u64::from_le_bytes(image[..].try_into().unwrap()))
                        .collect();
                    let wanted: Vec<u64> = (next..end).filter(mine).take(found.len()).collect();
                    let expected: Vec<u64> = wanted.iter().map(|sequence| self.image(*sequence).unwrap()).collect();
                    assert_eq!(found, expected, "from {next}");
                    assert!(wanted.iter().all(|sequence| !self.is_damaged(*sequence)));
                    if random.random_ratio(1, 10) {
                        // It dies between the message and its checkpoint, and gets the same message again.
                        return;
                    }
                    let rank = &mut self.ranks[rank];
                    rank.next = wanted.last().unwrap() + 1;
                    rank.got += found.len() as u64;
                    rank.cursor = Some(log.cursor(message.position));
                    messages -= 1;
                }
                Err(end) => subscription = self.go_on(rank, end, log, delivery),
            }
        }
    }

    /// What a rank does when the next image is not there any more: it goes on where it is told to.
    fn go_on(&mut self, rank: usize, end: End, log: &Arc<Log>, delivery: &Arc<Delivery>) -> Subscription {
        let (shard, next) = (self.ranks[rank].policy.shard, self.ranks[rank].next);
        let to = match end {
            End::Overtaken { first_sequence, .. } => {
                assert_eq!(first_sequence, log.extent().first_sequence);
                first_sequence
            }
            End::Lost { next_sequence, .. } => {
                // Everything before the damage was sent.
                for sequence in (next..next_sequence).filter(|sequence| shard.has(*sequence)) {
                    assert!(self.is_damaged(sequence), "{sequence} was passed over on the way to {next_sequence}");
                }
                next_sequence
            }
            other => panic!("{other:?}"),
        };
        let rank = &mut self.ranks[rank];
        rank.skipped += (next..to).filter(|sequence| shard.has(*sequence)).count() as u64;
        rank.next = rank.next.max(to);
        rank.cursor = Some(log.cursor(to));
        delivery.subscribe(to, rank.policy.clone())
    }
}

fn seed() -> u64 {
    let given = std::env::var("DREAMFEED_TEST_SEED").ok().map(|seed| seed.parse().unwrap());
    let seed = given.unwrap_or_else(rand::random);
    eprintln!("DREAMFEED_TEST_SEED={seed}");
    seed
}

/// Kills so many writers on one folder, one or two at a time, and checks after each time.
fn kill_writers(kills: u64, max_images: u64, seed_images: u64) -> Model {
    let folder = tempfile::tempdir().unwrap();
    let mut random = StdRng::seed_from_u64(seed());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let mut model = Model::new(folder.path(), max_images, seed_images);
    let mut writer = 0;
    let mut prepare = |damaged: Vec<u64>| {
        writer += 1;
        Writer::prepare(Job { folder: folder.path().to_owned(), writer, max_images, seed_images, damaged })
    };
    let mut next = prepare(Vec::new());
    let mut done = 0;
    while done < kills {
        let mut first = std::mem::replace(&mut next, prepare(Vec::new()));
        first.go(&[]);
        let mut killed = vec![first];
        let damaged = if random.random_ratio(1, 8) { model.damage(&mut random) } else { Vec::new() };
        if !damaged.is_empty() || random.random_ratio(1, 6) {
            let mut second = prepare(damaged.clone());
            second.go(&damaged);
            killed.push(second);
        }
        // The moments are random: so many acknowledgements, and a piece of the next.
        for writer in &mut killed {
            let pause = Duration::from_micros(random.random_range(0..8_000));
            writer.kill_after(random.random_range(0..30), pause);
        }
        done += killed.len() as u64;
        let killed: Vec<&Writer> = killed.iter().collect();
        runtime.block_on(model.check(&killed, &mut random, done >= kills));
    }
    eprintln!(
        "{done} kills: {} chunks acknowledged, {} known, evicted up to {}, {} damaged, {} students, ranks {:?}",
        model.acknowledged,
        model.chunks.len(),
        model.evicted,
        model.damaged.len(),
        model.students.len(),
        model.ranks.iter().map(|rank| (rank.got, rank.skipped)).collect::<Vec<_>>(),
    );
    assert!(model.acknowledged > kills && model.students.len() > kills as usize / 4);
    model
}

#[test]
fn nothing_acknowledged_is_lost_when_writers_are_killed() {
    let model = kill_writers(110, 1_000_000, 0);
    assert_eq!(model.evicted, 0);
    for rank in &model.ranks {
        assert!(rank.got > 0 && rank.skipped <= MOST * model.damaged.len() as u64);
    }
}

#[test]
fn retention_is_killed_in_its_tracks_and_takes_only_what_it_may() {
    let model = kill_writers(110, 600, 20);
    assert!(model.evicted > 600);
    assert!(model.ranks.iter().all(|rank| rank.got > 0));
}

/// The whole daemon: readers and trainers over sockets, killed and started again on the same store.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_daemon_goes_on_where_it_was() {
    let mut random = StdRng::seed_from_u64(seed());
    let folder = tempfile::tempdir().unwrap();
    let teacher = crate::support::write_teacher(folder.path());
    let store = folder.path().join("store");
    let arguments = ["--store", store.to_str().unwrap(), "--teacher", teacher.to_str().unwrap(), "--batch-size", "5"];
    let tensors = Arc::new(tensors());
    let (mut cursor, mut next) = (None, 0u64);
    let mut seen: Vec<Vec<u8>> = Vec::new();
    let versions = Arc::new(AtomicU64::new(0));
    let mut turn = 0;
    for _ in 0..10 {
        let mut daemon = Daemon::start(&arguments);
        let client = daemon.client().await;
        // What was acknowledged before the kill is there after it.
        let adopted = client.describe().await.unwrap().student.map_or(0, |student| student.version);
        assert!(adopted >= versions.load(Ordering::SeqCst), "{adopted}");
        turn += 1_000;
        let pushing = tokio::spawn(push_on(daemon.client().await, tensors.clone(), turn, versions.clone()));
        let start = cursor.clone().map_or(Start::Earliest, Start::Cursor);
        let mut stream = client.stream(start).await.unwrap();
        let mut left = random.random_range(1..60);
        let mut killed = false;
        // After the kill it reads on: what still lies in the socket was sent, and is durable.
        while let Some(Ok(batch)) = within(stream.next()).await {
            assert_eq!(batch.first_sequence, next, "no gap and no repeat");
            next += batch.count as u64;
            seen.extend(images(&batch.payload));
            cursor = Some(batch.cursor);
            left -= 1;
            if left <= 0 && !killed {
                tokio::time::sleep(Duration::from_micros(random.random_range(0..20_000))).await;
                daemon.child.kill().unwrap();
                killed = true;
            }
        }
        assert!(killed, "the stream ended by itself");
        daemon.wait_exit();
        within(pushing).await.unwrap();
    }
    assert!(versions.load(Ordering::SeqCst) > 0);
    // Everything that any process sent is what the store holds now.
    let storage = Storage::open(store.to_str().unwrap()).unwrap();
    let log = log::inspect::inspect(&storage).await.unwrap().unwrap();
    assert!(log.damaged.is_empty() && log.strange.is_empty() && log.quarantined.is_empty());
    let mut stored: Vec<Vec<u8>> = Vec::new();
    for entry in &log.entries {
        assert_eq!(entry.summary.first_sequence, stored.len() as u64);
        let chunk = log::inspect::load(&storage, &log.identity, entry.summary.first_sequence).await.unwrap();
        stored.extend(chunk.images().chunks_exact(64).map(<[u8]>::to_vec));
    }
    assert!(seen.len() > 10 && stored[..seen.len()] == seen[..]);
}

/// Pushes students until the daemon is gone; keeps the newest version that was acknowledged.
async fn push_on(client: Client, tensors: Arc<crate::support::Tensors>, from: u64, newest: Arc<AtomicU64>) {
    for turn in from.. {
        let file = Made { writer: 0, turn }.student(&tensors);
        match within(client.push_student(ARCH, file, turn, None)).await {
            Ok(pushed) => {
                let before = newest.swap(pushed.version, Ordering::SeqCst);
                assert!(pushed.version > before && !pushed.already_current);
            }
            Err(error) => {
                assert!(error.is_transient(), "{error}");
                return;
            }
        }
    }
}

/// What killed writers leave of puts that they were in the middle of takes no space for ever.
#[tokio::test]
async fn what_broken_off_puts_leave_is_freed() {
    let folder = tempfile::tempdir().unwrap();
    let storage = Storage::open(folder.path().to_str().unwrap()).unwrap();
    let log = open_log(&storage, 1_000, 0).await;
    log.append(&Arc::new(Made { writer: 1, turn: 0 }.batch())).await.unwrap();
    drop(log);
    let chunks = folder.path().join("log/chunks");
    let remains = [chunks.join(format!("{:020}.safetensors#1", 0)), chunks.join(format!("{:020}.safetensors#2", 9))];
    for path in &remains {
        std::fs::write(path, b"half a chunk").unwrap();
    }
    let log = open_log(&storage, 1_000, 0).await;
    assert_eq!(log.extent().chunks, 1);
    // They may be of a writer that is alive.
    assert!(remains.iter().all(|path| path.exists()));
    let old = SystemTime::now() - Duration::from_secs(3600);
    std::fs::File::options().write(true).open(&remains[0]).unwrap().set_modified(old).unwrap();
    let log = open_log(&storage, 1_000, 0).await;
    assert_eq!(log.extent().chunks, 1);
    assert_eq!(remains.iter().map(|path| path.exists()).collect::<Vec<_>>(), [false, true]);
    assert!(std::fs::File::open(chunks).unwrap().metadata().unwrap().is_dir());
    let mut text = String::new();
    std::fs::File::open(&remains[1]).unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "half a chunk");
}
