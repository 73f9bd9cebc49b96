//! A student on its way to becoming a version.

use std::time::{Instant, SystemTime};

use super::Student;
use crate::model::checkpoint::Checkpoint;
use crate::model::spec::NetworkSpec;

/// A checked student that has no version yet.
pub(super) struct Candidate {
    pub arch: String,
    pub spec: NetworkSpec,
    pub checkpoint: Checkpoint,
    pub sha256: [u8; 32],
    pub trainer_step: u64,
    pub accepted_at: SystemTime,
    pub received_at: Instant,
}

impl Candidate {
    /// Whether it is this student, whatever its version.
    pub fn is(&self, student: &Student) -> bool {
        self.sha256 == student.sha256 && self.arch == student.arch
    }
}
