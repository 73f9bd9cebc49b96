//! safetensors files, read without a single tensor on a device: names, dtypes, shapes and bytes.
//!
//! Everything here is safe to call on bytes from the network. safetensors is the only format that is ever read; no
//! pickle is loaded anywhere in the project.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use safetensors::{Dtype, SafeTensors};
use sha2::{Digest, Sha256};

/// Why a file is not a usable safetensors file.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The file could not be read.
    #[error("cannot read {path}: {source}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The bytes are not safetensors.
    #[error("not a safetensors file: {0} (convert PyTorch checkpoints with safetensors.torch.save_file)")]
    Format(String),
    /// A floating-point tensor holds NaN or an infinity.
    #[error("tensor {name} is not finite: element {index} is {value}")]
    NotFinite {
        /// The first such tensor in order of name.
        name: String,
        /// The flat index of the first such element.
        index: usize,
        /// The element.
        value: f64,
    },
}

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
        let bytes = std::fs::read(path).map_err(|source| CheckpointError::Read { path: path.to_owned(), source })?;
        Self::parse(bytes.into())
    }

    /// Parses a file that is already in memory; copies no tensor.
    pub fn parse(bytes: Bytes) -> Result<Self, CheckpointError> {
        let format = |e: safetensors::SafeTensorError| CheckpointError::Format(e.to_string());
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

    /// Checks that every floating-point value is finite.
    pub fn check_finite(&self) -> Result<(), CheckpointError> {
        for (name, tensor) in self.tensors() {
            let bad = match tensor.dtype {
                Dtype::F64 => first_not_finite(tensor.data, f64::from_le_bytes),
                Dtype::F32 => first_not_finite(tensor.data, |b| f64::from(f32::from_le_bytes(b))),
                Dtype::F16 => first_not_finite(tensor.data, |b| half::f16::from_le_bytes(b).to_f64()),
                Dtype::BF16 => first_not_finite(tensor.data, |b| half::bf16::from_le_bytes(b).to_f64()),
                _ => None,
            };
            if let Some((index, value)) = bad {
                return Err(CheckpointError::NotFinite { name: name.to_owned(), index, value });
            }
        }
        Ok(())
    }

    /// SHA-256 over every tensor's name, dtype, shape and data in order of name: the same weights have the same
    /// identity whatever the file's layout and metadata.
    pub fn identity(&self) -> String {
        let mut hash = Sha256::new();
        for (name, tensor) in self.tensors() {
            hash.update(format!("{name}\0{:?}\0{:?}\0", tensor.dtype, tensor.shape));
            hash.update(tensor.data);
        }
        hex(&hash.finalize())
    }
}

fn first_not_finite<const N: usize>(data: &[u8], read: impl Fn([u8; N]) -> f64) -> Option<(usize, f64)> {
    let (elements, _) = data.as_chunks::<N>();
    elements.iter().map(|bytes| read(*bytes)).enumerate().find(|(_, value)| !value.is_finite())
}

/// Lower-case hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
