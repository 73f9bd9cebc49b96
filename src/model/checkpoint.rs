//! safetensors files, read without a single tensor on a device: names, dtypes, shapes and bytes.
//!
//! Everything here is safe to call on bytes from the network. safetensors is the only format that is ever read; no
//! pickle is loaded anywhere in the project.

mod header;

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::Path;

use bytes::Bytes;
use safetensors::{Dtype, SafeTensors};
use serde_json::json;
use sha2::{Digest, Sha256};

use super::graph::RESERVED;
use crate::files;

/// What a header may cost before anything is made of it.
#[derive(Clone, Copy, Debug)]
pub struct HeaderLimits {
    /// Bytes of the header.
    pub bytes: usize,
    /// Tensors, and entries of its `__metadata__`.
    pub entries: usize,
}

impl HeaderLimits {
    /// For files that come from elsewhere: some hundred times what the largest public classifiers have.
    pub const FILE: Self = Self { bytes: 4 << 20, entries: 20_000 };
    /// For objects of ours that hold a whole header of such a file in their metadata, escaped once more, beside their own.
    pub const OBJECT: Self = Self { bytes: 16 << 20, entries: Self::FILE.entries + 100 };
}

/// The longest name of a tensor or key of the metadata, in bytes.
const MAX_NAME_BYTES: usize = 512;
/// The most dimensions of a tensor.
const MAX_RANK: usize = 8;

/// Why a file is not a usable safetensors file.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The file could not be read.
    #[error("cannot be read: {0}")]
    Read(std::io::Error),
    /// The bytes are not safetensors.
    #[error("not a safetensors file: {0}")]
    Format(String),
    /// Its header is larger than it may be.
    #[error("too large to read: {0}")]
    TooLarge(String),
    /// A variance is negative.
    #[error("tensor {name} is a variance, but element {index} is {value}; a running_var is never negative")]
    NegativeVariance {
        /// The tensor.
        name: String,
        /// The flat index of the first such element.
        index: usize,
        /// The element.
        value: f64,
    },
    /// A floating-point tensor holds NaN, an infinity, or a number too large for f32.
    #[error("tensor {name} is not finite as f32: element {index} is {value}")]
    NotFinite {
        /// The first such tensor in order of name.
        name: String,
        /// The flat index of the first such element.
        index: usize,
        /// The element.
        value: f64,
    },
    /// A batch norm's statistics are larger than any trained network's.
    #[error(
        "tensor {name} cannot be a trained batch norm's: element {index} is {value}, and at most {limit} is plausible; \
         take the weights from their source again"
    )]
    AbsurdStatistic {
        /// The tensor.
        name: String,
        /// The flat index of the first such element.
        index: usize,
        /// The element.
        value: f64,
        /// What its absolute value is at most.
        limit: f64,
    },
}

/// The largest `running_var` of a teacher: activations of a million, a thousand times those of networks that take 0..255.
const MAX_RUNNING_VAR: f64 = 1e12;
/// The largest absolute `running_mean` of a teacher.
const MAX_RUNNING_MEAN: f64 = 1e6;

/// One tensor of a [`Checkpoint`]: a view into its bytes.
#[derive(Clone, Copy, Debug)]
pub struct RawTensor<'a> {
    /// The element type.
    pub dtype: Dtype,
    /// The shape, outermost dimension first.
    pub shape: &'a [usize],
    /// Little-endian elements in row-major order.
    pub data: &'a [u8],
}

#[derive(Clone, Debug)]
struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    range: Range<usize>,
}

/// A parsed safetensors file whose every offset has been checked. Cloning shares the bytes.
#[derive(Clone, Debug)]
pub struct Checkpoint {
    bytes: Bytes,
    entries: BTreeMap<String, Entry>,
    metadata: HashMap<String, String>,
}

impl Checkpoint {
    /// Reads and parses a file.
    pub fn open(path: &Path) -> Result<Self, CheckpointError> {
        let bytes = files::read(path).map_err(CheckpointError::Read)?;
        Self::parse(bytes.into()).map_err(|error| match error {
            CheckpointError::Format(problem) => CheckpointError::Format(format!(
                "{problem} (convert PyTorch checkpoints with safetensors.torch.save_file)"
            )),
            other => other,
        })
    }

    /// Parses a file that is already in memory, within [`HeaderLimits::FILE`]; copies no tensor.
    pub fn parse(bytes: Bytes) -> Result<Self, CheckpointError> {
        Self::parse_within(HeaderLimits::FILE, bytes)
    }

    /// The same within other limits.
    pub fn parse_within(limits: HeaderLimits, bytes: Bytes) -> Result<Self, CheckpointError> {
        let format = |e: safetensors::SafeTensorError| CheckpointError::Format(e.to_string());
        header::check(limits, &bytes)?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(format)?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let tensors = SafeTensors::deserialize(&bytes).map_err(format)?;
        let base = bytes.as_ptr() as usize;
        let entries = tensors
            .tensors()
            .into_iter()
            .map(|(name, view)| {
                let start = view.data().as_ptr() as usize - base;
                let range = start..start + view.data().len();
                (name, Entry { dtype: view.dtype(), shape: view.shape().to_vec(), range })
            })
            .collect();
        Ok(Self { bytes, entries, metadata })
    }

    /// The whole file.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// The file's `__metadata__`.
    pub fn metadata(&self) -> &HashMap<String, String> {
        &self.metadata
    }

    /// The tensor of this name.
    pub fn get(&self, name: &str) -> Option<RawTensor<'_>> {
        self.entries.get(name).map(|entry| self.view(entry))
    }

    /// Where the data of the tensor of this name lies in [`Self::bytes`].
    pub fn range(&self, name: &str) -> Option<Range<usize>> {
        self.entries.get(name).map(|entry| entry.range.clone())
    }

    /// All tensors in order of name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, RawTensor<'_>)> {
        self.entries.iter().map(|(name, entry)| (name.as_str(), self.view(entry)))
    }

    fn view<'a>(&'a self, entry: &'a Entry) -> RawTensor<'a> {
        RawTensor { dtype: entry.dtype, shape: &entry.shape, data: &self.bytes[entry.range.clone()] }
    }

    /// The same file with only the tensors whose names are `kept`.
    pub fn only(&self, kept: impl Fn(&str) -> bool) -> Self {
        let mut this = self.clone();
        this.entries.retain(|name, _| kept(name));
        this
    }

    /// Checks that every floating-point value is finite, also as the f32 that networks compute with, and that no
    /// `running_var` is negative.
    pub fn check_finite(&self) -> Result<(), CheckpointError> {
        for (name, tensor) in self.tensors() {
            let variance = name.ends_with("running_var");
            let bad = first(tensor, |value| !(value as f32).is_finite() || variance && value < 0.0);
            if let Some((index, value)) = bad {
                let name = name.to_owned();
                return Err(if value < 0.0 && value.is_finite() && variance {
                    CheckpointError::NegativeVariance { name, index, value }
                } else {
                    CheckpointError::NotFinite { name, index, value }
                });
            }
        }
        Ok(())
    }

    /// Checks that running statistics are of a plausible size. They are what a teacher's dreams are drawn to, so damaged
    /// ones would ruin every image without any error.
    pub fn check_statistics(&self) -> Result<(), CheckpointError> {
        for (name, tensor) in self.tensors() {
            let limit = match name.rsplit('.').next() {
                Some("running_var") => MAX_RUNNING_VAR,
                Some("running_mean") => MAX_RUNNING_MEAN,
                _ => continue,
            };
            if let Some((index, value)) = first(tensor, |value| value.abs() > limit) {
                return Err(CheckpointError::AbsurdStatistic { name: name.to_owned(), index, value, limit });
            }
        }
        Ok(())
    }

    /// SHA-256 over every tensor's name, dtype, shape and data in order of name: the same weights have the same
    /// identity whatever the file's layout and metadata. Tensors about a network, such as its golden sample, are no part of it.
    pub fn identity(&self) -> String {
        let mut hash = Sha256::new();
        for (name, tensor) in self.tensors().filter(|(name, _)| !name.starts_with(RESERVED)) {
            hash.update(format!("{name}\0{:?}\0{:?}\0", tensor.dtype, tensor.shape));
            hash.update(tensor.data);
        }
        hex(&hash.finalize())
    }
}

/// A tensor to be written: name, element type, shape, little-endian elements in row-major order.
pub type TensorToWrite<'a> = (&'a str, Dtype, &'a [usize], &'a [u8]);

/// A safetensors file. Data comes in the order given, so types with the strictest alignment go first; the header is
/// sorted, so that the same content is always the same bytes, which the safetensors crate does not promise of metadata.
pub fn encode(tensors: &[TensorToWrite<'_>], metadata: &BTreeMap<String, String>) -> Vec<u8> {
    let mut header = serde_json::Map::from_iter([("__metadata__".to_owned(), json!(metadata))]);
    let mut offset = 0;
    for (name, dtype, shape, data) in tensors {
        let end = offset + data.len();
        let entry = json!({ "dtype": format!("{dtype:?}"), "shape": shape, "data_offsets": [offset, end] });
        header.insert((*name).to_owned(), entry);
        offset = end;
    }
    let mut header = serde_json::Value::Object(header).to_string().into_bytes();
    header.resize(header.len().next_multiple_of(8), b' ');

    let mut file = Vec::with_capacity(8 + header.len() + offset);
    file.extend_from_slice(&(header.len() as u64).to_le_bytes());
    file.extend_from_slice(&header);
    for (_, _, _, data) in tensors {
        file.extend_from_slice(data);
    }
    file
}

/// The first element of a floating-point tensor that is `wanted`, with its flat index.
fn first(tensor: RawTensor<'_>, wanted: impl Fn(f64) -> bool) -> Option<(usize, f64)> {
    fn find<const N: usize>(
        data: &[u8],
        read: impl Fn([u8; N]) -> f64,
        wanted: impl Fn(f64) -> bool,
    ) -> Option<(usize, f64)> {
        let (elements, _) = data.as_chunks::<N>();
        elements.iter().map(|bytes| read(*bytes)).enumerate().find(|(_, value)| wanted(*value))
    }
    match tensor.dtype {
        Dtype::F64 => find(tensor.data, f64::from_le_bytes, wanted),
        Dtype::F32 => find(tensor.data, |b| f64::from(f32::from_le_bytes(b)), wanted),
        Dtype::F16 => find(tensor.data, |b| half::f16::from_le_bytes(b).to_f64(), wanted),
        Dtype::BF16 => find(tensor.data, |b| half::bf16::from_le_bytes(b).to_f64(), wanted),
        _ => None,
    }
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
