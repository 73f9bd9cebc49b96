//! Where accepted versions live: here, in memory, the newest few. The durable store takes this type's place; its methods
//! are async for that reason.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime};

use tokio::sync::watch;

use super::{Accepted, PushError, Student};
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

/// The newest versions, oldest first, and a watch on the last of them.
#[derive(Debug)]
pub(super) struct Versions {
    kept: usize,
    held: Mutex<VecDeque<Arc<Student>>>,
    current: watch::Sender<Option<Arc<Student>>>,
}

impl Versions {
    pub fn new(kept: usize) -> Self {
        Self { kept: kept.max(1), held: Mutex::default(), current: watch::Sender::new(None) }
    }

    pub fn watch(&self) -> watch::Receiver<Option<Arc<Student>>> {
        self.current.subscribe()
    }

    pub fn current(&self) -> Option<Arc<Student>> {
        self.current.borrow().clone()
    }

    pub async fn get(&self, version: u64) -> Option<Arc<Student>> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.iter().find(|student| student.version == version).cloned()
    }

    /// Decides, numbers and publishes in one step: of two pushes that replace the same version only one can win.
    pub async fn commit(&self, candidate: Candidate, replaces: Option<u64>) -> Result<Accepted, PushError> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let newest = held.back();
        if let Some(same) = newest.filter(|s| s.sha256 == candidate.sha256 && s.arch == candidate.arch) {
            return Ok(Accepted { student: same.clone(), already_current: true });
        }
        let current = newest.map_or(0, |student| student.version);
        if let Some(replaces) = replaces.filter(|replaces| *replaces != current) {
            return Err(PushError::Conflict { replaces, current });
        }
        let student = Arc::new(Student {
            version: current + 1,
            arch: candidate.arch,
            spec: candidate.spec,
            checkpoint: candidate.checkpoint,
            sha256: candidate.sha256,
            trainer_step: candidate.trainer_step,
            accepted_at: candidate.accepted_at,
            received_at: candidate.received_at,
        });
        held.push_back(student.clone());
        while held.len() > self.kept {
            held.pop_front();
        }
        self.current.send_replace(Some(student.clone()));
        Ok(Accepted { student, already_current: false })
    }
}
