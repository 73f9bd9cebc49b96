//! One chunk: a batch as safetensors, encoded once. The layout is documented at `StreamResponse.payload` in the contract.
//!
//! The header is written by hand because the safetensors crate writes metadata in the order of a hash map: the same
//! chunk must be the same bytes.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::time::SystemTime;

use bytes::Bytes;
use safetensors::Dtype;
use safetensors::tensor::Metadata;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::{LogIdentity, Origin};
use crate::model::checkpoint::{Checkpoint, CheckpointError, TensorToWrite, encode, hex};
use crate::model::source::Geometry;
use crate::store::SEQUENCES;
use crate::synthesis::batch::DreamBatch;
use crate::synthesis::settings::SynthesizerKind;

/// The `format` in every chunk's metadata.
pub const FORMAT: &str = "dreamfeed.chunk.v1";

/// Order of the data section: widest elements first, so that every tensor lies aligned in a mapped file; and what
/// decides about an image before what is sent of it, so that one short read from the start of the object gets all that
/// the index wants to know.
const ORDER: [&str; 5] = ["labels", "student_version", "competition", "teacher_logits", "images"];

/// A divergence is at most ln 2; so much more may come from rounding.
const MOST_COMPETITION: f32 = std::f32::consts::LN_2 + 1e-3;

/// Why a batch cannot become a chunk, or bytes are none.
#[derive(Debug, thiserror::Error)]
pub enum ChunkError {
    /// The engine's arrays contradict each other.
    #[error("the batch contradicts itself: {0}")]
    Inconsistent(String),
    /// Not safetensors.
    #[error("it does not parse: {0}")]
    Parse(CheckpointError),
    /// safetensors, but not what a chunk must hold.
    #[error("it is damaged: {0}")]
    Damaged(String),
    /// It was cut, or something was added to it.
    #[error("it is damaged: its header describes {described} bytes, the object has {found}")]
    Length {
        /// What it should have.
        described: u64,
        /// What it has.
        found: u64,
        /// The images that its header tells of.
        count: Option<u64>,
    },
    /// Its bytes are those that were written, and one of its images is impossible.
    #[error("it is damaged: {problem}")]
    Impossible {
        /// Which image, and what of it.
        problem: String,
        /// The images in it.
        count: u32,
    },
    /// It is intact, and belongs elsewhere.
    #[error("{0}")]
    Foreign(String),
    /// Written by software that knows more than this.
    #[error(
        "its format is {found:?}, which this version of dreamfeed does not read; it reads {FORMAT}, so use the version \
         that wrote it"
    )]
    UnknownFormat {
        /// What the metadata says.
        found: String,
    },
    /// A position outside the chunk.
    #[error("sequence {0} lies outside the chunk")]
    Outside(u64),
}

impl From<CheckpointError> for ChunkError {
    fn from(error: CheckpointError) -> Self {
        Self::Parse(error)
    }
}

/// What the index keeps of a chunk, all of it from the chunk's first kilobytes.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// The sequence of its first image.
    pub first_sequence: u64,
    /// The number of images, at least 1.
    pub count: u32,
    /// When its images were finished.
    pub created_at: SystemTime,
    /// The sum of its images' competition, in nats.
    pub competition: f64,
    /// The oldest and the newest student version among its images; images made without one count as 0.
    pub student_versions: (i64, i64),
    /// The classes in it: class, images, sum of their competition.
    pub classes: Box<[(u32, u32, f32)]>,
    /// Which daemon made it, and the checksum of its data: what makes a chunk one's own.
    pub replica: String,
    /// SHA-256 of the data section, lower-case hexadecimal.
    pub data_sha256: String,
    /// The teacher whose logits it holds.
    pub teacher_sha256: String,
    /// The log that it was made for.
    pub log_id: Uuid,
}

/// One immutable chunk, its layout checked. Cloning shares the bytes.
#[derive(Clone, Debug)]
pub struct Chunk {
    /// What the index keeps of it.
    pub summary: Summary,
    /// The size of one image.
    pub geometry: Geometry,
    /// K.
    pub num_classes: usize,
    /// What made it; None where that is unknown to this version.
    pub synthesizer: Option<SynthesizerKind>,
    columns: Columns,
    file: Checkpoint,
}

/// Where each tensor lies in the file: found once, read for every message.
#[derive(Clone, Debug)]
struct Columns {
    labels: Range<usize>,
    student_version: Range<usize>,
    competition: Range<usize>,
    teacher_logits: Range<usize>,
    images: Range<usize>,
}

struct Part {
    dtype: Dtype,
    shape: Vec<usize>,
    data: Vec<u8>,
}

impl Chunk {
    /// The sequence of its first image.
    pub fn first_sequence(&self) -> u64 {
        self.summary.first_sequence
    }

    /// The sequence after its last image.
    pub fn end(&self) -> u64 {
        self.summary.end()
    }

    /// The number of images.
    pub fn count(&self) -> u32 {
        self.summary.count
    }

    /// The safetensors file.
    pub fn payload(&self) -> &Bytes {
        self.file.bytes()
    }

    /// The file's metadata.
    pub fn metadata(&self) -> &HashMap<String, String> {
        self.file.metadata()
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
            Part { dtype: Dtype::F32, shape: vec![n], data: f32s(&batch.competition) },
            Part { dtype: Dtype::F32, shape: vec![n, batch.num_classes], data: f32s(&batch.teacher_logits) },
            Part { dtype: Dtype::U8, shape: image_shape, data: batch.images.clone() },
        ];
        let metadata = BTreeMap::from([
            ("format".to_owned(), FORMAT.to_owned()),
            ("log_id".to_owned(), log.log_id.to_string()),
            ("replica".to_owned(), log.replica.clone()),
            ("teacher_sha256".to_owned(), log.teacher_sha256.clone()),
            ("synthesizer".to_owned(), batch.synthesizer.to_owned()),
            ("settings".to_owned(), batch.settings.to_string()),
            ("created_at".to_owned(), humantime::format_rfc3339_millis(batch.created_at).to_string()),
        ]);
        // What no reader would take is not written either.
        let checked = Self::checked(write(&parts, metadata, first_sequence, count));
        checked.and_then(|chunk| chunk.check(first_sequence, &log.origin()).map(|()| chunk)).map_err(|error| {
            match error {
                ChunkError::Impossible { problem, .. } => ChunkError::Inconsistent(problem),
                other => other,
            }
        })
    }

    /// Reads a chunk and checks everything in it, its checksum too. Hashes: call it where blocking is allowed.
    pub fn parse(payload: Bytes) -> Result<Self, ChunkError> {
        let this = Self::checked(payload)?;
        let data = this.payload().get(data_start(this.payload())?..).unwrap_or_default();
        let found = hex(&Sha256::digest(data));
        if found != this.summary.data_sha256 {
            let expected = &this.summary.data_sha256;
            return Err(ChunkError::Damaged(format!(
                "its data has the SHA-256 {found}, its metadata says {expected}"
            )));
        }
        Ok(this)
    }

    /// Whether it is the chunk at this place of this log, and every image in it is possible.
    pub(super) fn check(&self, first_sequence: u64, origin: &Origin<'_>) -> Result<(), ChunkError> {
        if (self.geometry, self.num_classes) != (origin.geometry, origin.num_classes) {
            return Err(ChunkError::Foreign(format!(
                "it holds images of {} with {} logits, and the log {} with {}",
                self.geometry, self.num_classes, origin.geometry, origin.num_classes
            )));
        }
        self.summary.check(first_sequence, origin)
    }

    /// As [`Self::parse`], without the checksum.
    fn checked(payload: Bytes) -> Result<Self, ChunkError> {
        let file = Checkpoint::parse(payload)?;
        let summary = Summary::of(file.metadata(), |name| {
            let tensor = file.get(name).ok_or_else(|| missing(name))?;
            Ok((tensor.dtype, tensor.shape.to_vec(), tensor.data))
        })?;
        let n = summary.count as usize;
        let images = file.get("images").ok_or_else(|| missing("images"))?;
        let logits = file.get("teacher_logits").ok_or_else(|| missing("teacher_logits"))?;
        let (geometry, num_classes) = match (images.dtype, images.shape, logits.dtype, logits.shape) {
            (Dtype::U8, [i, channels, height, width], Dtype::F32, [l, k]) if *i == n && *l == n => {
                (Geometry { channels: *channels, height: *height, width: *width }, *k)
            }
            _ => {
                return Err(ChunkError::Damaged(format!(
                    "images is {:?} {:?} and teacher_logits {:?} {:?}, where its metadata says {n} images",
                    images.dtype, images.shape, logits.dtype, logits.shape
                )));
            }
        };
        let range = |name: &str| file.range(name).ok_or_else(|| missing(name));
        let columns = Columns {
            labels: range("labels")?,
            student_version: range("student_version")?,
            competition: range("competition")?,
            teacher_logits: range("teacher_logits")?,
            images: range("images")?,
        };
        let synthesizer = file.metadata().get("synthesizer").and_then(|name| SynthesizerKind::named(name));
        Ok(Self { summary, geometry, num_classes, synthesizer, columns, file })
    }

    /// The class of each image, `[N]` little-endian.
    pub fn labels(&self) -> &[[u8; 8]] {
        self.column(&self.columns.labels).as_chunks().0
    }

    /// The newest student of each image, `[N]` little-endian.
    pub fn student_versions(&self) -> &[[u8; 8]] {
        self.column(&self.columns.student_version).as_chunks().0
    }

    /// The competition of each image, `[N]` little-endian.
    pub fn competition(&self) -> &[[u8; 4]] {
        self.column(&self.columns.competition).as_chunks().0
    }

    /// The logits, `[N, K]` little-endian.
    pub fn teacher_logits(&self) -> &[u8] {
        self.column(&self.columns.teacher_logits)
    }

    /// The pixels, `[N, C, H, W]`.
    pub fn images(&self) -> &[u8] {
        self.column(&self.columns.images)
    }

    fn column(&self, range: &Range<usize>) -> &[u8] {
        // Every tensor's presence and size were checked when the chunk was made.
        self.payload().get(range.clone()).unwrap_or_default()
    }

    /// The part of the chunk from the image at `sequence` on, as a chunk of its own.
    pub fn tail_from(&self, sequence: u64) -> Result<Self, ChunkError> {
        let skip = sequence.checked_sub(self.first_sequence()).ok_or(ChunkError::Outside(sequence))?;
        let skip = u32::try_from(skip).ok().filter(|s| *s < self.count()).ok_or(ChunkError::Outside(sequence))?;
        let count = self.count() - skip;
        let mut parts = Vec::with_capacity(ORDER.len());
        for name in ORDER {
            let tensor = self.file.get(name).ok_or_else(|| missing(name))?;
            let row = tensor.data.len() / self.count() as usize;
            let mut shape = tensor.shape.to_vec();
            *shape.first_mut().ok_or_else(|| missing(name))? = count as usize;
            let data = tensor.data.get(row * skip as usize..).ok_or_else(|| missing(name))?.to_vec();
            parts.push(Part { dtype: tensor.dtype, shape, data });
        }
        let metadata = self.metadata().clone().into_iter().collect();
        Self::checked(write(&parts, metadata, sequence, count))
    }
}

fn missing(name: &str) -> ChunkError {
    ChunkError::Damaged(format!("it has no tensor {name}"))
}

/// Where the data section begins.
fn data_start(file: &[u8]) -> Result<usize, ChunkError> {
    let length = file.first_chunk().map(|bytes| u64::from_le_bytes(*bytes)).and_then(|n| usize::try_from(n).ok());
    let start = length.and_then(|n| n.checked_add(8));
    start.ok_or_else(|| ChunkError::Damaged("its header has no length".into()))
}

/// What the first bytes of a chunk came to.
#[derive(Debug)]
pub enum Head {
    /// Everything that the index wants.
    Summary(Summary),
    /// The index wants this many bytes from the start.
    Longer(u64),
}

impl Summary {
    /// The sequence after the last image.
    pub fn end(&self) -> u64 {
        self.first_sequence.saturating_add(u64::from(self.count))
    }

    /// Reads the summary off the beginning of an object of `size` bytes. The checksum of the rest stays unchecked.
    pub fn from_head(head: &[u8], size: u64) -> Result<Head, ChunkError> {
        let start = data_start(head)?;
        if start as u64 > size {
            return Err(ChunkError::Damaged(format!("its header ends at byte {start}, the object at {size}")));
        }
        if head.len() < start {
            return Ok(Head::Longer(start as u64 + 4096));
        }
        let json = head.get(8..start).unwrap_or_default();
        let header: Metadata = serde_json::from_slice(json).map_err(|e| CheckpointError::Format(e.to_string()))?;
        let end = start as u64 + header.data_len() as u64;
        if end != size {
            let count = header.metadata().as_ref().and_then(|metadata| metadata.get("count")?.parse().ok());
            return Err(ChunkError::Length { described: end, found: size, count });
        }
        let metadata = header.metadata().clone().unwrap_or_default();
        let range = |name: &str| -> Result<Range<usize>, ChunkError> {
            let info = header.info(name).ok_or_else(|| missing(name))?;
            Ok(start + info.data_offsets.0..start + info.data_offsets.1)
        };
        let wanted = ["labels", "student_version", "competition"];
        let mut needed = 0;
        for name in wanted {
            needed = needed.max(range(name)?.end);
        }
        if needed > head.len() {
            return Ok(Head::Longer(needed as u64));
        }
        let summary = Self::of(&metadata, |name| {
            let info = header.info(name).ok_or_else(|| missing(name))?;
            let data = head.get(range(name)?).ok_or_else(|| missing(name))?;
            Ok((info.dtype, info.shape.clone(), data))
        })?;
        Ok(Head::Summary(summary))
    }

    fn of<'a>(
        metadata: &HashMap<String, String>,
        tensor: impl Fn(&str) -> Result<(Dtype, Vec<usize>, &'a [u8]), ChunkError>,
    ) -> Result<Self, ChunkError> {
        let get = |key: &str| {
            metadata.get(key).cloned().ok_or_else(|| ChunkError::Damaged(format!("its metadata has no {key}")))
        };
        let format = get("format")?;
        if format != FORMAT {
            return Err(ChunkError::UnknownFormat { found: format.chars().take(80).collect() });
        }
        let number = |key: &str| {
            let text = get(key)?;
            let wrong = |_| ChunkError::Damaged(format!("its metadata has {key} {text:?}"));
            text.parse::<u64>().map_err(wrong)
        };
        let first_sequence = number("first_sequence")?;
        let count = u32::try_from(number("count")?).ok().filter(|count| *count > 0);
        let count = count.ok_or_else(|| ChunkError::Damaged("its metadata has no usable count".into()))?;
        if first_sequence.checked_add(u64::from(count)).is_none_or(|end| end > SEQUENCES) {
            return Err(ChunkError::Damaged(format!("its metadata has first_sequence {first_sequence}")));
        }
        let id = get("log_id")?;
        let log_id = id.parse().map_err(|_| ChunkError::Damaged(format!("its metadata has log_id {id:?}")))?;
        let created = get("created_at")?;
        let created_at = humantime::parse_rfc3339(&created)
            .map_err(|_| ChunkError::Damaged(format!("its metadata has created_at {created:?}")))?;
        let column = |name: &str, expected: Dtype| {
            let (dtype, shape, data) = tensor(name)?;
            if dtype == expected && shape == [count as usize] {
                return Ok(data);
            }
            Err(ChunkError::Damaged(format!("{name} is {dtype:?} {shape:?}, expected {expected:?} [{count}]")))
        };
        let (labels, _) = column("labels", Dtype::I64)?.as_chunks::<8>();
        let (versions, _) = column("student_version", Dtype::I64)?.as_chunks::<8>();
        let (competition, _) = column("competition", Dtype::F32)?.as_chunks::<4>();
        let mut classes = BTreeMap::<u32, (u32, f32)>::new();
        let (mut total, mut oldest, mut newest) = (0.0, i64::MAX, 0);
        for (sequence, ((label, version), competition)) in
            (first_sequence..).zip(labels.iter().zip(versions).zip(competition))
        {
            let impossible =
                |what: String| ChunkError::Impossible { problem: format!("image {sequence} has {what}"), count };
            let label = i64::from_le_bytes(*label);
            let class = u32::try_from(label).map_err(|_| impossible(format!("class {label}")))?;
            let version = i64::from_le_bytes(*version);
            if version < 0 {
                return Err(impossible(format!("student version {version}")));
            }
            let competition = f32::from_le_bytes(*competition);
            if !(0.0..=MOST_COMPETITION).contains(&competition) {
                return Err(impossible(format!("competition {competition}, which is no divergence in nats")));
            }
            (oldest, newest) = (version.min(oldest), version.max(newest));
            total += f64::from(competition);
            let entry = classes.entry(class).or_default();
            entry.0 += 1;
            entry.1 += competition;
        }
        Ok(Self {
            first_sequence,
            count,
            created_at,
            competition: total,
            student_versions: (oldest, newest),
            classes: classes.into_iter().map(|(class, (count, sum))| (class, count, sum)).collect(),
            replica: get("replica")?,
            data_sha256: get("data_sha256")?,
            teacher_sha256: get("teacher_sha256")?,
            log_id,
        })
    }

    /// Whether it is of the chunk at this place of this log.
    pub(super) fn check(&self, first_sequence: u64, origin: &Origin<'_>) -> Result<(), ChunkError> {
        if (self.log_id, self.teacher_sha256.as_str()) != (origin.log_id, origin.teacher_sha256) {
            return Err(ChunkError::Foreign(format!(
                "it is of the log {} and the teacher {}, not of the log {} and the teacher {}",
                self.log_id, self.teacher_sha256, origin.log_id, origin.teacher_sha256
            )));
        }
        if self.first_sequence != first_sequence {
            return Err(ChunkError::Damaged(format!("it says that its first sequence is {}", self.first_sequence)));
        }
        match self.classes.last() {
            Some((class, ..)) if *class as usize >= origin.num_classes => Err(ChunkError::Impossible {
                problem: format!("an image has class {class}, and the teacher only {}", origin.num_classes),
                count: self.count,
            }),
            _ => Ok(()),
        }
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
