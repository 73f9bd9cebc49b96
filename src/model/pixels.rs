//! Between stored pixels (u8, 0..255) and what a network sees (normalized floats).

use tch::{Device, Kind, Tensor};

use super::source::Normalization;

/// The affine map of one [`Normalization`], on a device.
#[derive(Debug)]
pub struct Pixels {
    mean: Tensor,
    std: Tensor,
    kind: Kind,
}

impl Pixels {
    /// For images on `device` and networks that take `kind`.
    pub fn new(normalization: &Normalization, device: Device, kind: Kind) -> Self {
        let vector = |values: &[f32]| {
            Tensor::from_slice(values).to_device(device).to_kind(kind).view([1, values.len() as i64, 1, 1])
        };
        Self { mean: vector(&normalization.mean), std: vector(&normalization.std), kind }
    }

    /// u8 pixels `[N, C, H, W]` as the network wants them.
    pub fn normalize(&self, pixels: &Tensor) -> Tensor {
        (pixels.to_device(self.mean.device()).to_kind(self.kind) / 255.0 - &self.mean) / &self.std
    }

    /// Images `[N, C, H, W]` in 0..1 as the network wants them.
    pub fn normalize_unit(&self, images: &Tensor) -> Tensor {
        (images - &self.mean) / &self.std
    }

    /// Normalized images `[N, C, H, W]` as u8 pixels, rounded and saturated.
    pub fn quantize(&self, images: &Tensor) -> Tensor {
        ((images * &self.std + &self.mean) * 255.0).round().clamp(0.0, 255.0).to_kind(Kind::Uint8)
    }

    /// Keeps normalized images within what u8 pixels can hold, in place.
    pub fn clip(&self, images: &mut Tensor) {
        let (low, high) = (-&self.mean / &self.std, (1.0 - &self.mean) / &self.std);
        let _ = images.clamp_tensor_(Some(&low), Some(&high));
    }
}
