#![allow(clippy::unwrap_used)]

use std::time::{Duration, SystemTime};

use proptest::prelude::*;
use sha2::{Digest, Sha256};

use super::*;
use crate::model::checkpoint::{Checkpoint, hex};
use crate::model::source::Geometry;

mod damage;

const GEOMETRY: Geometry = Geometry { channels: 1, height: 2, width: 4 };

fn identity() -> LogIdentity {
    LogIdentity {
        log_id: Uuid::from_u128(7),
        replica: "test".into(),
        teacher_sha256: "ab".repeat(32),
        geometry: GEOMETRY,
        num_classes: 3,
    }
}

fn maker() -> Maker {
    let LogIdentity { teacher_sha256, geometry, num_classes, .. } = identity();
    Maker { teacher_sha256, geometry, num_classes }
}

/// Every image of the log differs from every other: its pixels spell its sequence.
pub(crate) fn batch(first: u64, count: usize) -> DreamBatch {
    let sequences = first..first + count as u64;
    DreamBatch {
        images: sequences.clone().flat_map(u64::to_le_bytes).collect(),
        labels: sequences.clone().map(|s| s as i64 % 3).collect(),
        teacher_logits: sequences.clone().flat_map(|s| [s as f32, -(s as f32), 0.5]).collect(),
        student_version: sequences.clone().map(|s| s as i64 / 3).collect(),
        competition: sequences.map(|s| (s % 64) as f32 / 100.0).collect(),
        geometry: GEOMETRY,
        num_classes: 3,
        synthesizer: "noise",
        settings: r#"{"batch_size":4}"#.into(),
        created_at: SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123),
    }
}

fn images(chunk: &Chunk) -> Vec<u64> {
    chunk.images().as_chunks::<8>().0.iter().map(|bytes| u64::from_le_bytes(*bytes)).collect()
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

pub(crate) async fn open_in(storage: &Storage, retention: Retention) -> Arc<Log> {
    let options = LogOptions { retention, cache_bytes: 1 << 20 };
    Log::open(storage.clone(), options, maker()).await.unwrap()
}

/// A log in memory with chunks of these sizes.
pub(crate) async fn filled(counts: &[usize], retention: Retention) -> Arc<Log> {
    let log = open_in(&Storage::open("memory:").unwrap(), retention).await;
    fill(&log, counts).await;
    log
}

async fn fill(log: &Log, counts: &[usize]) {
    for count in counts {
        let next = log.extent().next_sequence;
        assert_eq!(log.append(&Arc::new(batch(next, *count))).await.unwrap(), next);
        log.retain().await.unwrap();
    }
}

#[test]
fn a_chunk_is_the_documented_file_and_always_the_same_bytes() {
    let chunk = Chunk::encode(&batch(40, 5), 40, &identity()).unwrap();
    assert_eq!(chunk.payload(), Chunk::encode(&batch(40, 5), 40, &identity()).unwrap().payload());
    let file = Checkpoint::parse(chunk.payload().clone()).unwrap();
    let shape = |name: &str| file.get(name).unwrap().shape.to_vec();
    assert_eq!(shape("images"), [5, 1, 2, 4]);
    assert_eq!(shape("labels"), [5]);
    assert_eq!(shape("teacher_logits"), [5, 3]);
    assert_eq!(shape("student_version"), [5]);
    assert_eq!(shape("competition"), [5]);
    let meta = file.metadata();
    assert_eq!(meta["format"], FORMAT);
    assert_eq!(meta["log_id"], identity().log_id.to_string());
    assert_eq!((meta["first_sequence"].as_str(), meta["count"].as_str()), ("40", "5"));
    assert_eq!(meta["created_at"], "2023-11-14T22:13:20.123Z");
    let header = u64::from_le_bytes(chunk.payload()[..8].try_into().unwrap()) as usize;
    assert_eq!(header % 8, 0);
    assert_eq!(meta["data_sha256"], hex(&Sha256::digest(&chunk.payload()[8 + header..])));
}

#[test]
fn a_contradictory_batch_is_refused() {
    let mut short = batch(0, 4);
    short.images.pop();
    assert!(matches!(Chunk::encode(&short, 0, &identity()), Err(ChunkError::Inconsistent(_))));
    assert!(matches!(Chunk::encode(&batch(0, 0), 0, &identity()), Err(ChunkError::Inconsistent(_))));
    let spoils: [fn(&mut DreamBatch); 5] = [
        |batch| batch.labels[1] = 3,
        |batch| batch.labels[1] = -1,
        |batch| batch.competition[1] = f32::NAN,
        |batch| batch.competition[1] = 0.7,
        |batch| batch.student_version[1] = -1,
    ];
    for spoil in spoils {
        let mut impossible = batch(0, 4);
        spoil(&mut impossible);
        assert!(matches!(Chunk::encode(&impossible, 0, &identity()), Err(ChunkError::Inconsistent(_))));
    }
}

#[test]
fn an_unknown_format_is_refused_with_a_sentence() {
    let chunk = Chunk::encode(&batch(0, 2), 0, &identity()).unwrap();
    let mut bytes = chunk.payload().to_vec();
    let at = bytes.windows(FORMAT.len()).position(|window| window == FORMAT.as_bytes()).unwrap();
    bytes[at + 17] = b'9';
    let error = Chunk::parse(bytes.into()).unwrap_err().to_string();
    assert!(error.contains("dreamfeed.chunk.v9") && error.contains("use the version that wrote it"), "{error}");
}

#[test]
fn a_log_outlives_its_process_and_belongs_to_one_teacher() {
    run(async {
        let storage = Storage::open("memory:").unwrap();
        let log = open_in(&storage, Retention::default()).await;
        fill(&log, &[4, 3, 5]).await;
        let (id, extent, cursor) = (log.identity().log_id, log.extent(), log.cursor(7));
        drop(log);
        let log = open_in(&storage, Retention::default()).await;
        assert_eq!((log.identity().log_id, log.extent()), (id, extent));
        assert_eq!(log.position(&cursor), Ok(7));
        assert_eq!(images(&log.load(4).await.unwrap()), [4, 5, 6]);
        fill(&log, &[2]).await;
        assert_eq!(log.extent().next_sequence, 14);

        let options = *log.options();
        let other = Maker { teacher_sha256: "cd".repeat(32), ..maker() };
        let error = Log::open(storage.clone(), options, other).await.unwrap_err().to_string();
        assert!(error.contains("abababababab") && error.contains("--store"), "{error}");
        let other = Maker { num_classes: 4, ..maker() };
        let error = Log::open(storage.clone(), options, other).await.unwrap_err().to_string();
        assert!(error.contains("1x2x4 with 3 logits"), "{error}");
    });
}

#[test]
fn two_daemons_on_one_storage_share_one_sequence() {
    run(async {
        let storage = Storage::open("memory:").unwrap();
        let logs = [open_in(&storage, Retention::default()).await, open_in(&storage, Retention::default()).await];
        let write = |log: Arc<Log>, id: u64| async move {
            let mut firsts = Vec::new();
            for turn in 0..20 {
                // Spelled sequences would differ: name the writer and its turn instead.
                let made = Arc::new(batch(1000 * id + 10 * turn, 3));
                firsts.push((log.append(&made).await.unwrap(), 1000 * id + 10 * turn));
            }
            firsts
        };
        let (a, b) = tokio::join!(write(logs[0].clone(), 1), write(logs[1].clone(), 2));
        let mut all: Vec<(u64, u64)> = a.into_iter().chain(b).collect();
        all.sort_unstable();
        assert_eq!(
            all.iter().map(|(first, _)| *first).collect::<Vec<_>>(),
            (0..40).map(|i| 3 * i).collect::<Vec<_>>()
        );
        for log in logs {
            log.refresh().await.unwrap();
            assert_eq!(log.extent().next_sequence, 120);
            for (first, made) in &all {
                assert_eq!(images(&log.load(*first).await.unwrap()), [*made, made + 1, made + 2]);
            }
        }
    });
}

#[test]
fn an_append_whose_answer_was_lost_is_not_written_twice() {
    run(async {
        let storage = Storage::open("memory:").unwrap();
        let log = open_in(&storage, Retention::default()).await;
        fill(&log, &[4]).await;
        // What the retry finds: its own chunk, durable, though nobody heard of it.
        let made = Arc::new(batch(4, 2));
        let chunk = Chunk::encode(&made, 4, log.identity()).unwrap();
        assert_eq!(storage.create(&open::chunk_name(4), chunk.payload().clone()).await.unwrap(), Created::Yes);
        assert_eq!(log.append(&made).await.unwrap(), 4);
        assert_eq!((log.extent().next_sequence, log.extent().chunks), (6, 2));
        // Also where it was found by a look through the storage before the retry.
        let made = Arc::new(batch(6, 3));
        let chunk = Chunk::encode(&made, 6, log.identity()).unwrap();
        log.writer.lock().await.push(6);
        storage.create(&open::chunk_name(6), chunk.payload().clone()).await.unwrap();
        log.refresh().await.unwrap();
        assert_eq!(log.append(&made).await.unwrap(), 6);
        assert_eq!((log.extent().next_sequence, log.extent().chunks), (9, 3));
    });
}

#[test]
fn no_sequence_is_beyond_what_an_i64_holds() {
    run(async {
        let storage = Storage::open("memory:").unwrap();
        let log = open_in(&storage, Retention::default()).await;
        fill(&log, &[4]).await;
        let identity = log.identity().clone();
        let end = i64::MAX as u64;
        let at = |first: u64| Chunk::encode(&batch(0, 4), first, &identity);
        assert!(at(end - 3).is_err() && at(u64::MAX).is_err());
        // One that only its name and metadata put there.
        let last = at(end - 4).unwrap().payload().clone();
        let (from, to) = ((end - 4).to_string(), (end - 2).to_string());
        let mut beyond = last.to_vec();
        let digits = beyond.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
        beyond[digits..digits + to.len()].copy_from_slice(to.as_bytes());
        for (first, object) in [(end - 2, Bytes::from(beyond)), (end - 1, last.clone()), (u64::MAX - 1, last.clone())]
        {
            storage.create(&open::chunk_name(first), object).await.unwrap();
        }
        let next = log.append(&Arc::new(batch(4, 2))).await.unwrap();
        log.refresh().await.unwrap();
        let again = open_in(&storage, Retention::default()).await;
        for log in [&log, &again] {
            assert_eq!((next, log.extent().next_sequence, log.extent().lost_images), (4, 6, 0));
            assert_eq!(log.locate(u64::MAX), Located::Ahead { next_sequence: 6 });
        }
        let mut strange = inspect::inspect(&storage).await.unwrap().unwrap().strange;
        strange.sort();
        assert_eq!(strange, [end - 2, end - 1].map(open::chunk_name));
        // A number that no chunk can have.
        assert_eq!(verify::strays(&storage).await.unwrap(), [open::chunk_name(u64::MAX - 1)]);
        // The very last images that there can be, and nothing after them.
        storage.create(&open::chunk_name(end - 4), last).await.unwrap();
        // It does not follow the newest, so only a list shows it.
        log.relist().await.unwrap();
        assert_eq!((log.extent().next_sequence, log.locate(end)), (end, Located::Wait));
        let error = log.append(&Arc::new(batch(6, 1))).await.unwrap_err();
        assert!(error.to_string().contains("its sequences are used up, give another --store"), "{error}");
        let beyond = cursor::encode(identity.log_id, end + 1);
        assert!(matches!(log.position(&beyond), Err(CursorError::Malformed(_))));
        assert_eq!(log.position(&log.cursor(end)), Ok(end));
    });
}

#[test]
fn retention_keeps_the_seed_set_and_the_newest() {
    run(async {
        let retention = Retention { max_images: Some(12), seed_images: 5, ..Retention::default() };
        let storage = Storage::open("memory:").unwrap();
        let log = open_in(&storage, retention).await;
        fill(&log, &[4, 4, 4, 4, 4, 4]).await;
        // Images 0..8 are the seed set in whole chunks; of the rest one chunk fits.
        let check = |log: &Log| {
            assert!(matches!(log.locate(7), Located::Chunk(_)));
            assert_eq!(log.locate(8), Located::Overtaken { first_sequence: 20 });
            assert_eq!((log.extent().images, log.extent().first_sequence, log.extent().next_sequence), (12, 20, 24));
        };
        check(&log);
        assert_eq!(storage.list("log/chunks/", None).await.unwrap().len(), 3);
        check(&*open_in(&storage, retention).await);
        let one = Retention { max_bytes: Some(1), ..Retention::default() };
        let log = open_in(&storage, one).await;
        log.retain().await.unwrap();
        assert_eq!((log.extent().chunks, log.extent().first_sequence, log.extent().next_sequence), (1, 20, 24));
    });
}

#[test]
fn retention_by_age_lets_go_of_what_is_old() {
    run(async {
        let age = Retention { max_age: Some(Duration::from_secs(1)), ..Retention::default() };
        let log = filled(&[4, 4], Retention::default()).await;
        let victims = |now| log.index().victims(&age, now);
        let made = SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123);
        assert_eq!(victims(made), Vec::<u64>::new());
        assert_eq!(victims(made + Duration::from_secs(2)), [0]);
    });
}

/// The clocks of replicas differ, so an old chunk may lie behind a young one.
#[test]
fn retention_by_age_looks_at_every_chunk() {
    run(async {
        let storage = Storage::open("memory:").unwrap();
        let log = open_in(&storage, Retention { seed_images: 2, ..Retention::default() }).await;
        let now = SystemTime::now();
        let old = now - Duration::from_secs(3600);
        // The first is the seed set's; the last is the newest, which tells the next sequence.
        for made in [old, now, old, old, now, old] {
            let next = log.extent().next_sequence;
            log.append(&Arc::new(DreamBatch { created_at: made, ..batch(next, 4) })).await.unwrap();
        }
        let age = Retention { max_age: Some(Duration::from_secs(60)), seed_images: 2, ..Retention::default() };
        assert_eq!(log.index().victims(&age, now), [8, 12]);
        // What goes for its age is no reason to let go of more for the sake of size.
        let both = Retention { max_images: Some(16), ..age };
        assert_eq!(log.index().victims(&both, now), [8, 12]);
        assert_eq!(log.index().victims(&Retention { max_images: Some(15), ..age }, now), [4, 8, 12]);
        drop(log);
        let log = open_in(&storage, age).await;
        log.retain().await.unwrap();
        let firsts = inspect::first_sequences(&storage).await.unwrap();
        assert_eq!(firsts, [0, 4, 16, 20]);
        assert_eq!(evicted::records(&storage).await.unwrap(), [(8, 16)]);
        // A reader of the young one before is told where it can go on.
        assert!(matches!(log.locate(4), Located::Chunk(_)));
        assert_eq!(log.locate(8), Located::Overtaken { first_sequence: 16 });
        let again = open_in(&storage, age).await;
        assert_eq!((again.extent(), again.locate(8)), (log.extent(), Located::Overtaken { first_sequence: 16 }));
        let inspection = inspect::inspect(&storage).await.unwrap().unwrap();
        let problems: Vec<_> = verify::layout(&inspection).into_iter().filter(|f| f.kind.is_problem()).collect();
        assert_eq!(problems, []);
    });
}

#[test]
fn what_is_gone_from_the_storage_is_noticed_by_nobody_reading() {
    // Time passes only once nothing else can happen.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let storage = Storage::open("memory:").unwrap();
        fill(&*open_in(&storage, Retention::default()).await, &[4; 6]).await;
        let log = open_in(&storage, Retention::default()).await;
        for first in [0, 4, 8, 12] {
            log.load(first).await.unwrap();
        }
        let tight = Retention { max_images: Some(16), ..Retention::default() };
        open_in(&storage, tight).await.retain().await.unwrap();
        // By a hand, and on no record.
        storage.delete(&open::chunk_name(12)).await.unwrap();
        assert_eq!(log.extent().images, 24);
        let _ = tokio::time::timeout(2 * upkeep::UPKEEP, log.clone().upkeep()).await;
        let Extent { images: held, chunks, first_sequence, lost_images, .. } = log.extent();
        assert_eq!((held, chunks, first_sequence, lost_images), (12, 3, 8, 4));
        assert_eq!(log.locate(5), Located::Overtaken { first_sequence: 8 });
        assert_eq!(log.locate(13), Located::Lost { next_sequence: 16 });
        assert!(matches!(log.load(0).await, Err(ReadError::Gone)));
        let held = log.load(8).await.unwrap();
        assert_eq!(images(&held), [8, 9, 10, 11]);
        assert_eq!(log.cached_bytes().await, held.payload().len() as u64);
        // All at once: no retention does that, so nothing is evicted.
        for first in [8, 16, 20] {
            storage.delete(&open::chunk_name(first)).await.unwrap();
        }
        let error = log.tend(true).await.unwrap_err().to_string();
        assert!(error.contains("no chunk of the log is there any more"), "{error}");
        assert_eq!(log.extent().images, 12);
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// From any position still held, a reader sees every image from there on exactly once and in order, also after a
    /// restart.
    #[test]
    fn a_reader_sees_every_image_once(
        counts in prop::collection::vec(1usize..7, 1..12),
        kept in 1u64..30,
        start in 0u64..80,
    ) {
        run(async {
            let storage = Storage::open("memory:").unwrap();
            let retention = Retention { max_images: Some(kept), ..Retention::default() };
            fill(&*open_in(&storage, retention).await, &counts).await;
            let log = open_in(&storage, retention).await;
            let extent = log.extent();
            let next = counts.iter().sum::<usize>() as u64;
            prop_assert_eq!(extent.next_sequence, next);
            prop_assert!(extent.images <= kept || extent.chunks == 1);
            let mut seen = Vec::new();
            let mut position = start;
            loop {
                match log.locate(position) {
                    Located::Chunk(entry) => {
                        let chunk = log.load(entry.summary.first_sequence).await.unwrap();
                        prop_assert!(chunk.first_sequence() <= position);
                        seen.extend(images(&chunk).into_iter().filter(|sequence| *sequence >= position));
                        position = chunk.end();
                    }
                    Located::Wait => {
                        prop_assert_eq!(&seen, &(start..next).collect::<Vec<_>>());
                        break;
                    }
                    Located::Overtaken { first_sequence } => {
                        prop_assert_eq!(first_sequence, extent.first_sequence);
                        prop_assert!(start < first_sequence);
                        break;
                    }
                    Located::Ahead { next_sequence } => {
                        prop_assert!(start > next_sequence);
                        break;
                    }
                    Located::Lost { .. } => prop_assert!(false, "nothing is damaged"),
                }
            }
            Ok(())
        })?;
    }

    #[test]
    fn a_rest_equals_the_rows_of_its_chunk(count in 1usize..9, skip in 0usize..9) {
        let chunk = Chunk::encode(&batch(10, count), 10, &identity()).unwrap();
        let rest = chunk.tail_from(10 + skip as u64);
        if skip >= count {
            prop_assert!(rest.is_err());
        } else {
            let mut expected = batch(10 + skip as u64, count - skip);
            expected.created_at = chunk.summary.created_at;
            let expected = Chunk::encode(&expected, 10 + skip as u64, &identity()).unwrap();
            let rest = rest.unwrap();
            prop_assert_eq!(rest.payload(), expected.payload());
        }
    }

    #[test]
    fn a_head_says_what_the_whole_says(count in 1usize..40, cut in 0usize..4000) {
        let chunk = Chunk::encode(&batch(10, count), 10, &identity()).unwrap();
        let whole = chunk.payload();
        let head = &whole[..cut.min(whole.len())];
        match chunk::Summary::from_head(head, whole.len() as u64) {
            Ok(chunk::Head::Summary(summary)) => prop_assert_eq!(summary, chunk.summary),
            Ok(chunk::Head::Longer(more)) => prop_assert!(more > head.len() as u64),
            Err(error) => prop_assert!(head.len() < 8, "{}", error),
        }
    }

    #[test]
    fn no_damage_makes_a_chunk_parse_or_panic(at in 0usize..2000, bit in 0u8..8, cut in 0usize..2000) {
        let whole = Chunk::encode(&batch(10, 4), 10, &identity()).unwrap().payload().to_vec();
        let mut bytes = whole.clone();
        let at = at % bytes.len();
        bytes[at] ^= 1 << bit;
        // A flip in the header may leave the same meaning (a space); whatever parses must be the same data.
        if let Ok(chunk) = Chunk::parse(bytes.clone().into()) {
            prop_assert_eq!(images(&chunk), [10, 11, 12, 13]);
        }
        let _ = chunk::Summary::from_head(&bytes, bytes.len() as u64);
        let cut = cut % whole.len();
        prop_assert!(Chunk::parse(whole[..cut].to_vec().into()).is_err());
    }

    #[test]
    fn a_cursor_names_its_sequence_in_its_log_only(log in any::<u128>(), other in any::<u128>(), sequence in 0..1u64 << 63) {
        let (log, other) = (Uuid::from_u128(log), Uuid::from_u128(other));
        let bytes = cursor::encode(log, sequence);
        prop_assert_eq!(cursor::decode(log, &bytes), Ok(sequence));
        if log != other {
            prop_assert_eq!(cursor::decode(other, &bytes), Err(CursorError::OtherLog(log)));
        }
    }

    #[test]
    fn a_damaged_cursor_is_malformed(sequence in any::<u64>(), at in 0usize..29, bit in 0u8..8, cut in 0usize..29) {
        let id = Uuid::from_u128(7);
        let mut bytes = cursor::encode(id, sequence).to_vec();
        prop_assert!(matches!(cursor::decode(id, &bytes[..cut]), Err(CursorError::Malformed(_))));
        bytes[at] ^= 1 << bit;
        prop_assert!(matches!(cursor::decode(id, &bytes), Err(CursorError::Malformed(_))));
        prop_assert!(matches!(cursor::decode(id, &[]), Err(CursorError::Malformed(_))));
    }

    #[test]
    fn no_bytes_make_decoding_panic(bytes in prop::collection::vec(any::<u8>(), 0..64)) {
        let _ = cursor::decode(Uuid::nil(), &bytes);
    }
}
