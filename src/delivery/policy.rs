//! What a subscriber asked for.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// The type of the pixels in a message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum PixelFormat {
    /// Unsigned bytes, 0..255, as stored.
    #[default]
    U8,
    /// 32-bit floats, normalized as the teacher wants them.
    F32Normalized,
    /// 16-bit floats, normalized as the teacher wants them.
    F16Normalized,
}

impl PixelFormat {
    /// Its name in a batch's metadata.
    pub fn name(self) -> &'static str {
        match self {
            Self::U8 => "u8",
            Self::F32Normalized => "f32_normalized",
            Self::F16Normalized => "f16_normalized",
        }
    }
}

/// A data-parallel rank's part: the images whose sequence leaves `index` when divided by `count`. Nothing else decides,
/// so ranks need not know of each other, and a cursor means the same to every rank and for every count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Shard {
    /// From 0 to `count` - 1.
    pub index: u32,
    /// At least 1.
    pub count: u32,
}

impl Shard {
    /// The shard that is everything.
    pub const ALL: Self = Self { index: 0, count: 1 };

    /// Whether an image is of this shard.
    pub fn has(self, sequence: u64) -> bool {
        self.count <= 1 || sequence % u64::from(self.count) == u64::from(self.index)
    }
}

/// How replayed images are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Sampling {
    /// Every image in the log alike.
    #[default]
    Uniform,
    /// An image's weight halves with every quarter of the log that is newer than its chunk.
    Recency,
    /// An image's weight is its competition (JS divergence at birth, in nats) plus [`COMPETITION_FLOOR`].
    Competition,
}

/// Added to every image's competition, so that images without any are still replayed sometimes; in nats.
pub const COMPETITION_FLOOR: f64 = 1e-3;

/// Images that are sent again.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Replay {
    /// The share of each message that is replayed even where enough fresh images wait, 0..1.
    pub share: f64,
    /// How they are chosen.
    pub sampling: Sampling,
}

/// How stale an image may be when it is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Staleness {
    /// Versions that the current student may be ahead of the image's. Images made without a student never go stale so.
    pub max_student_versions: Option<u64>,
    /// The image's age.
    pub max_age: Option<Duration>,
}

impl Staleness {
    /// Whether there is any bound.
    pub fn is_bounded(&self) -> bool {
        self.max_student_versions.is_some() || self.max_age.is_some()
    }

    /// Whether an image is too stale to be sent now.
    pub fn exceeded(
        &self,
        image_version: i64,
        created_at: SystemTime,
        current_version: u64,
        now: SystemTime,
    ) -> bool {
        let behind = match u64::try_from(image_version) {
            Ok(version) if version > 0 => current_version.saturating_sub(version),
            _ => 0,
        };
        self.max_student_versions.is_some_and(|most| behind > most)
            || self.max_age.is_some_and(|most| now.duration_since(created_at).unwrap_or_default() > most)
    }
}

/// Everything that a subscriber asked for but the start.
#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    /// Its part of the fresh images.
    pub shard: Shard,
    /// Its share of replayed ones.
    pub replay: Replay,
    /// How stale images may be.
    pub staleness: Staleness,
    /// Images a message; None: as many as a chunk has.
    pub batch_size: Option<usize>,
    /// The type of the pixels.
    pub pixels: PixelFormat,
    /// Only these classes; None: all.
    pub classes: Option<Arc<BTreeSet<u32>>>,
}

impl Default for Policy {
    fn default() -> Self {
        Self {
            shard: Shard::ALL,
            replay: Replay::default(),
            staleness: Staleness::default(),
            batch_size: None,
            pixels: PixelFormat::U8,
            classes: None,
        }
    }
}

impl Policy {
    /// Whether chunks go out as they are.
    pub fn is_plain(&self) -> bool {
        *self == Self::default()
    }

    /// Whether a message follows from its first image alone, so that readers with the same policy get the same bytes.
    pub fn is_deterministic(&self) -> bool {
        self.replay.share == 0.0 && !self.staleness.is_bounded()
    }

    /// Whether an image of this class is wanted.
    pub fn wants(&self, label: i64) -> bool {
        self.classes.as_ref().is_none_or(|classes| u32::try_from(label).is_ok_and(|label| classes.contains(&label)))
    }

    /// What decides about a message's bytes beside its images, as a key.
    pub fn form(&self) -> Arc<str> {
        let classes: Vec<String> =
            self.classes.iter().flat_map(|classes| classes.iter()).map(ToString::to_string).collect();
        let Shard { index, count } = self.shard;
        format!("{}/{index}of{count}/{:?}/{}", self.pixels.name(), self.batch_size, classes.join(",")).into()
    }
}
