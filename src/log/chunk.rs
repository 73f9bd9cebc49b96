//! One chunk: a batch as safetensors, encoded once. The layout is documented at `StreamResponse.payload` in the contract.
//!
//! The header is written by hand because the safetensors crate writes metadata in the order of a hash map: the same
//! chunk must be the same bytes.

use std::collections::BTreeMap;
use std::time::SystemTime;

use bytes::Bytes;
use safetensors::Dtype;
use sha2::{Digest, Sha256};

use super::LogIdentity;
use crate::model::checkpoint::{Checkpoint, CheckpointError, TensorToWrite, encode, hex};
use crate::synthesis::batch::DreamBatch;

/// The `format` in every chunk's metadata.
pub const FORMAT: &str = "dreamfeed.chunk.v1";

/// Order of the data section: widest elements first, so that every tensor lies aligned in a mapped file.
const ORDER: [&str; 5] = ["labels", "student_version", "teacher_logits", "competition", "images"];

/// Why a batch cannot become a chunk, or a chunk be cut.
#[derive(Debug, thiserror::Error)]
pub enum ChunkError {
    /// The engine's arrays contradict each other.
    #[error("the batch contradicts itself: {0}")]
    Inconsistent(String),
    /// Our own encoding does not parse.
    #[error("the chunk does not parse: {0}")]
    Parse(#[from] CheckpointError),
    /// A position outside the chunk.
    #[error("sequence {0} lies outside the chunk")]
    Outside(u64),
}

/// One immutable chunk.
#[derive(Clone, Debug)]
pub struct Chunk {
    /// The sequence of its first image.
    pub first_sequence: u64,
    /// The number of images, at least 1.
    pub count: u32,
    /// The safetensors file.
    pub payload: Bytes,
    /// When its images were finished.
    pub created_at: SystemTime,
}

struct Part {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

impl Chunk {
    /// The sequence after its last image.
    pub fn end(&self) -> u64 {
        self.first_sequence.saturating_add(u64::from(self.count))
    }

    pub(super) fn encode(batch: &DreamBatch, first_sequence: u64, log: &LogIdentity) -> Result<Self, ChunkError> {
        let n = batch.count();
        let count = u32::try_from(n)
            .ok()
            .filter(|count| *count > 0)
            .ok_or_else(|| ChunkError::Inconsistent(format!("it has {n} images")))?;
        let geometry = batch.geometry;
        for (name, found, expected) in [
            ("images", batch.images.len(), n * geometry.pixels()),
            ("teacher_logits", batch.teacher_logits.len(), n * batch.num_classes),
            ("student_version", batch.student_version.len(), n),
            ("competition", batch.competition.len(), n),
        ] {
            if found != expected {
                return Err(ChunkError::Inconsistent(format!("{name} has {found} elements, expected {expected}")));
            }
        }
        let i64s = |values: &[i64]| values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let f32s = |values: &[f32]| values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let image_shape = vec![n, geometry.channels, geometry.height, geometry.width];
        let parts = [
            Part { dtype: Dtype::I64, shape: vec![n], data: i64s(&batch.labels) },
            Part { dtype: Dtype::I64, shape: vec![n], data: i64s(&batch.student_version) },
            Part { dtype: Dtype::F32, shape: vec![n, batch.num_classes], data: f32s(&batch.teacher_logits) },
            Part { dtype: Dtype::F32, shape: vec![n], data: f32s(&batch.competition) },
            Part { dtype: Dtype::U8, shape: image_shape, data: batch.images.clone() },
        ];
        let metadata = BTreeMap::from([
            ("format".to_owned(), FORMAT.to_owned()),
            ("log_id".to_owned(), log.log_id.to_string()),
            ("replica".to_owned(), log.replica.clone()),
            ("teacher_sha256".to_owned(), log.teacher_sha256.clone()),
            ("synthesizer".to_owned(), batch.synthesizer.to_owned()),
            ("settings".to_owned(), log.settings_json.clone()),
            ("created_at".to_owned(), humantime::format_rfc3339_millis(batch.created_at).to_string()),
        ]);
        let payload = write(&parts, metadata, first_sequence, count);
        Ok(Self { first_sequence, count, payload, created_at: batch.created_at })
    }

    /// The part of the chunk from the image at `sequence` on, as a chunk of its own.
    pub fn tail_from(&self, sequence: u64) -> Result<Self, ChunkError> {
        let skip = sequence.checked_sub(self.first_sequence).ok_or(ChunkError::Outside(sequence))?;
        let skip = u32::try_from(skip).ok().filter(|s| *s < self.count).ok_or(ChunkError::Outside(sequence))?;
        let file = Checkpoint::parse(self.payload.clone())?;
        let count = self.count - skip;
        let mut parts = Vec::with_capacity(ORDER.len());
        for name in ORDER {
            let missing = || ChunkError::Inconsistent(format!("it has no tensor {name}"));
            let tensor = file.get(name).ok_or_else(missing)?;
            let row = tensor.data.len() / self.count as usize;
            let mut shape = tensor.shape.to_vec();
            *shape.first_mut().ok_or_else(missing)? = count as usize;
            let data = tensor.data.get(row * skip as usize..).ok_or_else(missing)?.to_vec();
            parts.push(Part { dtype: tensor.dtype, shape, data });
        }
        let metadata = file.metadata().clone().into_iter().collect();
        Ok(Self {
            first_sequence: sequence,
            count,
            payload: write(&parts, metadata, sequence, count),
            created_at: self.created_at,
        })
    }
}

/// The file: header length, header, data. Parts come in [`ORDER`].
fn write(parts: &[Part], mut metadata: BTreeMap<String, String>, first_sequence: u64, count: u32) -> Bytes {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update(&part.data);
    }
    metadata.insert("first_sequence".into(), first_sequence.to_string());
    metadata.insert("count".into(), count.to_string());
    metadata.insert("data_sha256".into(), hex(&hash.finalize()));

    let tensors: Vec<TensorToWrite<'_>> = ORDER
        .iter()
        .zip(parts)
        .map(|(name, part)| (*name, part.dtype, part.shape.as_slice(), part.data.as_slice()))
        .collect();
    encode(&tensors, &metadata).into()
}
