//! What a synthesis run hands over: plain host memory, no tensor of any device.

use std::sync::Arc;
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
    /// Its settings, JSON.
    pub settings: Arc<str>,
    /// When the batch was finished.
    pub created_at: SystemTime,
}

impl DreamBatch {
    /// N.
    pub fn count(&self) -> usize {
        self.labels.len()
    }

    /// The first `most` images.
    pub fn truncated(mut self, most: usize) -> Self {
        if most < self.count() {
            self.images.truncate(most * self.geometry.pixels());
            self.labels.truncate(most);
            self.teacher_logits.truncate(most * self.num_classes);
            self.student_version.truncate(most);
            self.competition.truncate(most);
        }
        self
    }

    /// The fraction of images in which the teacher sees their label.
    pub fn teacher_top1(&self) -> f64 {
        let right =
            self.teacher_logits.chunks_exact(self.num_classes.max(1)).zip(&self.labels).filter(|(row, label)| {
                let best = row.iter().enumerate().max_by(|a, b| a.1.total_cmp(b.1));
                best.is_some_and(|(class, _)| class as i64 == **label)
            });
        right.count() as f64 / self.count().max(1) as f64
    }
}
