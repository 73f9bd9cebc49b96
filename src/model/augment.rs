//! Shifted and mirrored images.

use std::fmt;
use std::str::FromStr;

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

/// Random changes that leave the class of a real image alone. Of a dream the teacher can think otherwise once it is shifted
/// or mirrored, so logits belong to the changed image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Augmentation {
    /// Each image moves by up to this many pixels in each direction; black comes in at the edges.
    pub shift: u32,
    /// Each image is mirrored with probability one half.
    pub flip: bool,
}

impl FromStr for Augmentation {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut this = Self::default();
        for part in text.split(',').map(str::trim) {
            match (part, part.strip_prefix("shift:").and_then(|pixels| pixels.parse().ok())) {
                ("none", _) => {}
                ("flip", _) => this.flip = true,
                (_, Some(pixels)) if pixels <= 64 => this.shift = pixels,
                _ => {
                    return Err(format!(
                        "augmentation {part:?}: give none, or a list of shift:N (N up to 64) and flip"
                    ));
                }
            }
        }
        Ok(this)
    }
}

impl TryFrom<String> for Augmentation {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Augmentation> for String {
    fn from(augmentation: Augmentation) -> Self {
        augmentation.to_string()
    }
}

impl fmt::Display for Augmentation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.shift, self.flip) {
            (0, false) => f.write_str("none"),
            (0, true) => f.write_str("flip"),
            (shift, false) => write!(f, "shift:{shift}"),
            (shift, true) => write!(f, "shift:{shift},flip"),
        }
    }
}

impl Augmentation {
    /// Changes u8 images `[N, C, H, W]`, each in its own way.
    pub fn apply(self, images: &Tensor, rng: &mut ChaCha8Rng) -> Tensor {
        if self == Self::default() {
            return images.shallow_clone();
        }
        let (n, c, h, w) = match images.size().as_slice() {
            [n, c, h, w] => (*n, *c, *h, *w),
            _ => return images.shallow_clone(),
        };
        let reach = i64::from(self.shift);
        let mut draw = || (0..n).map(|_| rng.random_range(0..=2 * reach)).collect::<Vec<i64>>();
        let (down, right) = (draw(), draw());
        let mirrored: Vec<i64> = (0..n).map(|_| i64::from(self.flip && rng.random_bool(0.5))).collect();
        // One gather does it all: for each image its rows and columns in the padded image.
        let padded = images.constant_pad_nd([reach; 4]);
        let device = images.device();
        let per_image = |values: &[i64]| Tensor::from_slice(values).to_device(device).view([n, 1, 1, 1]);
        let range = |length: i64| Tensor::arange(length, (Kind::Int64, device));
        let columns = range(w).view([1, 1, 1, w]);
        let mirror = per_image(&mirrored);
        let columns = &columns * (1 - &mirror) + (w - 1 - &columns) * &mirror + per_image(&right);
        let rows = range(h).view([1, 1, h, 1]) + per_image(&down);
        padded.index(&[
            Some(range(n).view([n, 1, 1, 1])),
            Some(range(c).view([1, c, 1, 1])),
            Some(rows),
            Some(columns),
        ])
    }
}

/// Images that no augmentation changes stay on their device; a fresh tensor for tests and tools.
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use tch::Device;

    fn numbered(n: i64, c: i64, h: i64, w: i64) -> Tensor {
        Tensor::arange(n * c * h * w, (Kind::Int64, Device::Cpu))
            .remainder(251)
            .view([n, c, h, w])
            .to_kind(Kind::Uint8)
    }

    #[test]
    fn a_flip_mirrors_and_a_shift_moves() {
        let images = numbered(8, 3, 5, 6);
        let mut rng = ChaCha8Rng::seed_from_u64(3);
        let flipped = "flip".parse::<Augmentation>().unwrap().apply(&images, &mut rng);
        for n in 0..8 {
            let (image, result) = (images.get(n), flipped.get(n));
            assert!(result == image || result == image.flip([2]), "image {n} is neither");
        }
        let shifted = "shift:2".parse::<Augmentation>().unwrap().apply(&images, &mut rng);
        assert_eq!(shifted.size(), images.size());
        let padded = images.constant_pad_nd([2, 2, 2, 2]);
        for n in 0..8 {
            let found = (0..5)
                .flat_map(|y| (0..5).map(move |x| (y, x)))
                .any(|(y, x)| padded.get(n).narrow(1, y, 5).narrow(2, x, 6) == shifted.get(n));
            assert!(found, "image {n} is not a shift of itself");
        }
    }

    #[test]
    fn a_wrong_augmentation_is_refused_with_what_would_be_right() {
        let error = "rotate:3".parse::<Augmentation>().unwrap_err();
        assert!(error.contains("rotate:3") && error.contains("shift:N"), "{error}");
    }
}
