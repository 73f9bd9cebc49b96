#![allow(clippy::unwrap_used)]

use std::time::{Duration, SystemTime};

use proptest::prelude::*;
use sha2::{Digest, Sha256};

use super::*;
use crate::model::checkpoint::{Checkpoint, hex};
use crate::model::source::Geometry;

fn identity() -> LogIdentity {
    LogIdentity {
        log_id: Uuid::from_u128(7),
        replica: "test".into(),
        teacher_sha256: "ab".repeat(32),
        settings_json: r#"{"batch_size":4}"#.into(),
    }
}

/// Every image of the log differs from every other: its first pixels spell its sequence.
fn batch(first: u64, count: usize) -> DreamBatch {
    let geometry = Geometry { channels: 1, height: 2, width: 4 };
    let sequences = first..first + count as u64;
    DreamBatch {
        images: sequences.clone().flat_map(u64::to_le_bytes).collect(),
        labels: sequences.clone().map(|s| s as i64).collect(),
        teacher_logits: sequences.clone().flat_map(|s| [s as f32, -(s as f32), 0.5]).collect(),
        student_version: sequences.clone().map(|s| s as i64 / 3).collect(),
        competition: sequences.map(|s| s as f32 / 100.0).collect(),
        geometry,
        num_classes: 3,
        synthesizer: "noise",
        created_at: SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123),
    }
}

fn images(chunk: &Chunk) -> Vec<u64> {
    let file = Checkpoint::parse(chunk.payload.clone()).unwrap();
    let data = file.get("images").unwrap().data.to_vec();
    data.chunks_exact(8).map(|b| u64::from_le_bytes(b.try_into().unwrap())).collect()
}

#[test]
fn a_chunk_is_the_documented_file_and_always_the_same_bytes() {
    let chunk = Chunk::encode(&batch(40, 5), 40, &identity()).unwrap();
    assert_eq!(chunk.payload, Chunk::encode(&batch(40, 5), 40, &identity()).unwrap().payload);
    let file = Checkpoint::parse(chunk.payload.clone()).unwrap();
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
    let header = u64::from_le_bytes(chunk.payload[..8].try_into().unwrap()) as usize;
    assert_eq!(header % 8, 0);
    assert_eq!(meta["data_sha256"], hex(&Sha256::digest(&chunk.payload[8 + header..])));
}

#[test]
fn a_contradictory_batch_is_refused() {
    let mut short = batch(0, 4);
    short.images.pop();
    assert!(matches!(Chunk::encode(&short, 0, &identity()), Err(ChunkError::Inconsistent(_))));
    assert!(matches!(Chunk::encode(&batch(0, 0), 0, &identity()), Err(ChunkError::Inconsistent(_))));
}

#[test]
fn an_evicted_position_names_the_first_that_is_left_and_the_newest_always_stays() {
    let log = Log::new(identity(), 1);
    log.append(&batch(0, 4)).unwrap();
    log.append(&batch(4, 4)).unwrap();
    assert!(matches!(log.read(3), Read::Overtaken { first_sequence: 4 }));
    assert!(matches!(log.read(8), Read::Wait));
    assert!(matches!(log.read(9), Read::Ahead { next_sequence: 8 }));
    assert_eq!(log.extent().evicted_chunks, 1);
}

proptest! {
    /// From any position still held, a reader sees every image from there on exactly once and in order.
    #[test]
    fn a_reader_sees_every_image_once(
        counts in prop::collection::vec(1usize..7, 1..12),
        kept in 1u64..8,
        start in 0u64..80,
    ) {
        let size = Chunk::encode(&batch(0, 6), 0, &identity()).unwrap().payload.len() as u64;
        let log = Log::new(identity(), kept * size);
        let mut next = 0;
        for count in counts {
            prop_assert_eq!(log.append(&batch(next, count)).unwrap(), next);
            next += count as u64;
        }
        let extent = log.extent();
        prop_assert_eq!(extent.next_sequence, next);
        prop_assert!(extent.bytes <= kept * size);
        let mut seen = Vec::new();
        let mut position = start;
        loop {
            match log.read(position) {
                Read::Chunk(chunk) => {
                    prop_assert_eq!(chunk.first_sequence, position);
                    seen.extend(images(&chunk));
                    position = chunk.end();
                }
                Read::Wait => {
                    prop_assert_eq!(&seen, &(start..next).collect::<Vec<_>>());
                    break;
                }
                Read::Overtaken { first_sequence } => {
                    prop_assert_eq!(first_sequence, extent.first_sequence);
                    prop_assert!(start < first_sequence);
                    break;
                }
                Read::Ahead { next_sequence } => {
                    prop_assert!(start > next_sequence);
                    break;
                }
            }
        }
    }

    #[test]
    fn a_rest_equals_the_rows_of_its_chunk(count in 1usize..9, skip in 0usize..9) {
        let chunk = Chunk::encode(&batch(10, count), 10, &identity()).unwrap();
        let rest = chunk.tail_from(10 + skip as u64);
        if skip >= count {
            prop_assert!(rest.is_err());
        } else {
            let mut expected = batch(10 + skip as u64, count - skip);
            expected.created_at = chunk.created_at;
            let expected = Chunk::encode(&expected, 10 + skip as u64, &identity()).unwrap();
            prop_assert_eq!(rest.unwrap().payload, expected.payload);
        }
    }

    #[test]
    fn a_cursor_names_its_sequence_in_its_log_only(log in any::<u128>(), other in any::<u128>(), sequence in any::<u64>()) {
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
