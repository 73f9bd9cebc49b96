//! What a synthesis run hands over: plain host memory, no tensor of any device.

use std::time::SystemTime;

use crate::model::source::Geometry;

/// N finished images and what is known of them.
#[derive(Clone, Debug)]
pub struct DreamBatch {
    /// Pixels 0..255, `[N, C, H, W]` row-major.
    pub images: Vec<u8>,
    /// The class each image was made for, `[N]`.
    pub labels: Vec<i64>,
    /// The teacher's logits on exactly these pixels, `[N, K]`.
    pub teacher_logits: Vec<f32>,
    /// The newest student each image was optimized against, `[N]`; 0 = none.
    pub student_version: Vec<i64>,
    /// JS divergence of teacher and student at temperature 1 in nats, `[N]`; 0 where there was no student.
    pub competition: Vec<f32>,
    /// The size of one image.
    pub geometry: Geometry,
    /// K.
    pub num_classes: usize,
    /// The synthesizer's name.
    pub synthesizer: &'static str,
    /// When the batch was finished.
    pub created_at: SystemTime,
}

impl DreamBatch {
    /// N.
    pub fn count(&self) -> usize {
        self.labels.len()
    }
}
