//! Labelled pictures in CIFAR binary format, and a network's accuracy on them.

use std::path::{Path, PathBuf};

use tch::{Device, Kind, Tensor};

use super::source::Geometry;

/// Why a labelled file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LabelledError {
    /// The file could not be read.
    #[error("cannot read {path}: {cause}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said. Told in the message, so not a source of its own, which would be printed again.
        cause: std::io::Error,
    },
    /// The length is not a multiple of the record.
    #[error(
        "{path} is not CIFAR binary for this network: {length} bytes are not a whole number of records of {record} bytes \
         (1 byte of class and {geometry} of pixels)",
        path = path.display()
    )]
    Length {
        /// The file.
        path: PathBuf,
        /// Its length.
        length: usize,
        /// The length of one record.
        record: usize,
        /// The network's geometry.
        geometry: Geometry,
    },
    /// A label names no output of the network.
    #[error("{path}: record {record} has class {class}, but the network has {num_classes} outputs", path = path.display())]
    Class {
        /// The file.
        path: PathBuf,
        /// The record's index.
        record: usize,
        /// Its class.
        class: u8,
        /// The outputs of the network.
        num_classes: usize,
    },
}

/// Pictures and their classes, on the host.
#[derive(Debug)]
pub struct LabelledImages {
    /// u8 pixels, `[N, C, H, W]`.
    pub images: Tensor,
    /// Classes, `[N]`.
    pub labels: Tensor,
}

impl LabelledImages {
    /// Reads CIFAR binary: each record is 1 byte of class and C·H·W bytes of pixels, plane by plane, row by row.
    pub fn open(path: &Path, geometry: Geometry, num_classes: usize) -> Result<Self, LabelledError> {
        let bytes = std::fs::read(path).map_err(|cause| LabelledError::Read { path: path.to_owned(), cause })?;
        let record = 1 + geometry.pixels();
        if bytes.is_empty() || bytes.len() % record != 0 {
            return Err(LabelledError::Length { path: path.to_owned(), length: bytes.len(), record, geometry });
        }
        let count = bytes.len() / record;
        let mut labels = Vec::with_capacity(count);
        let mut pixels = Vec::with_capacity(bytes.len() - count);
        for (index, bytes) in bytes.chunks_exact(record).enumerate() {
            if usize::from(bytes[0]) >= num_classes {
                let (record, class) = (index, bytes[0]);
                return Err(LabelledError::Class { path: path.to_owned(), record, class, num_classes });
            }
            labels.push(i64::from(bytes[0]));
            pixels.extend_from_slice(&bytes[1..]);
        }
        let size = [count, geometry.channels, geometry.height, geometry.width].map(|d| d as i64);
        Ok(Self { images: Tensor::from_slice(&pixels).view(size), labels: Tensor::from_slice(&labels) })
    }

    /// N.
    pub fn count(&self) -> usize {
        self.labels.size()[0] as usize
    }

    /// The fraction of pictures whose highest logit is that of their class. `logits` maps u8 pixels `[n, C, H, W]` to
    /// `[n, K]`.
    pub fn accuracy(&self, logits: impl Fn(&Tensor) -> Tensor) -> f64 {
        accuracy(&self.images, &self.labels, logits)
    }
}

/// The fraction of `images` (u8 pixels `[N, C, H, W]`) whose highest logit is that of their label (`[N]`).
pub fn accuracy(images: &Tensor, labels: &Tensor, logits: impl Fn(&Tensor) -> Tensor) -> f64 {
    const BATCH: i64 = 250;
    let _guard = tch::no_grad_guard();
    let count = labels.size()[0];
    let mut correct = 0;
    let mut at = 0;
    while at < count {
        let length = BATCH.min(count - at);
        let predicted = logits(&images.narrow(0, at, length)).argmax(1, false).to_device(Device::Cpu);
        correct += predicted.eq_tensor(&labels.narrow(0, at, length)).sum(Kind::Int64).int64_value(&[]);
        at += length;
    }
    correct as f64 / count.max(1) as f64
}
