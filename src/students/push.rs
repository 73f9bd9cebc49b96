//! One push, from its header to its commit.

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use bytes::Bytes;
use sha2::{Digest, Sha256};
use tokio::sync::OwnedSemaphorePermit;

use super::candidate::Candidate;
use super::error::PushError;
use super::{Accepted, Requirements, StudentStore};
use crate::model::checkpoint::{Checkpoint, hex};
use crate::model::spec::NetworkSpec;

/// The longest name of an architecture, in bytes.
const MAX_ARCH_BYTES: usize = 100;
/// Memory is reserved for the bytes that came, at most doubling, and never for what a header claims beyond this.
const FIRST_RESERVATION: u64 = 1 << 20;

/// What a trainer announces.
#[derive(Clone, Debug)]
pub struct PushHeader {
    /// The architecture.
    pub arch: String,
    /// The length of the file in bytes.
    pub byte_length: u64,
    /// SHA-256 of the file.
    pub sha256: [u8; 32],
    /// The trainer's own step counter.
    pub trainer_step: u64,
    /// Accept only while this is the current version; 0 = while there is none.
    pub replaces_version: Option<u64>,
}

/// A push under way. Dropping it abandons the push and frees its slot and its memory.
#[derive(Debug)]
pub struct Push {
    store: Arc<StudentStore>,
    header: PushHeader,
    file: Vec<u8>,
    hash: Sha256,
    received_at: Instant,
    slot: OwnedSemaphorePermit,
}

/// A place among the pushes under way, freed when this is dropped.
#[derive(Debug)]
pub struct Slot {
    store: Arc<StudentStore>,
    permit: OwnedSemaphorePermit,
}

impl StudentStore {
    /// Takes a place before anything of a push is read.
    pub fn slot(self: &Arc<Self>) -> Result<Slot, PushError> {
        let busy = |_| PushError::Busy { limit: self.limits.max_pushes };
        let permit = self.slots.clone().try_acquire_owned().map_err(busy)?;
        Ok(Slot { store: self.clone(), permit })
    }
}

impl Slot {
    /// Opens a push, or refuses it before any byte of the file is read.
    pub fn begin(self, header: PushHeader) -> Result<Push, PushError> {
        let Self { store, permit } = self;
        if header.arch.len() > MAX_ARCH_BYTES {
            return Err(PushError::Arch(format!(
                "arch has {} bytes; give at most {MAX_ARCH_BYTES}",
                header.arch.len()
            )));
        }
        if header.byte_length > store.limits.max_bytes {
            return Err(PushError::TooLarge { bytes: header.byte_length, limit: store.limits.max_bytes });
        }
        NetworkSpec::fresh(&header.arch, store.requirements.in_channels, store.requirements.num_classes)?;
        // Only an early answer to what commit decides atomically. A repeated push of the current bytes is no conflict: it
        // is what a trainer does that lost the answer to its first.
        if let Some(replaces) = header.replaces_version {
            let current = store.current();
            let same = current.as_ref().is_some_and(|s| s.sha256 == header.sha256 && s.arch == header.arch);
            let current = current.map_or(0, |student| student.version);
            if replaces != current && !same {
                return Err(PushError::Conflict { replaces, current });
            }
        }
        Ok(Push { store, file: Vec::new(), hash: Sha256::new(), received_at: Instant::now(), header, slot: permit })
    }
}

impl Push {
    /// Takes the next piece of the file. Hashes it: call it where a few milliseconds of work are welcome.
    pub fn write(&mut self, piece: &Bytes) -> Result<(), PushError> {
        let announced = self.header.byte_length;
        let received = (self.file.len() as u64).saturating_add(piece.len() as u64);
        if received > announced {
            return Err(PushError::TooLong { received, announced });
        }
        self.reserve(received)?;
        self.file.extend_from_slice(piece);
        self.hash.update(piece);
        self.received_at = Instant::now();
        Ok(())
    }

    /// Doubles the buffer up to the announced length. Vec's own growth would overshoot it.
    fn reserve(&mut self, needed: u64) -> Result<(), PushError> {
        if needed <= self.file.capacity() as u64 {
            return Ok(());
        }
        let doubled = (self.file.capacity() as u64).saturating_mul(2).max(FIRST_RESERVATION);
        let target = doubled.min(self.header.byte_length).max(needed);
        let more = usize::try_from(target).unwrap_or(usize::MAX).saturating_sub(self.file.len());
        self.file.try_reserve_exact(more).map_err(|e| PushError::Internal(format!("no memory for the file: {e}")))
    }

    /// Checks the whole file and makes it the next version. Nothing changes where it is refused.
    pub async fn finish(self) -> Result<Accepted, PushError> {
        let Self { store, header, file, hash, received_at, slot } = self;
        let (received, announced) = (file.len() as u64, header.byte_length);
        if received < announced {
            return Err(PushError::Truncated { received, announced });
        }
        let (requirements, max_classes) = (store.requirements, store.limits.max_classes);
        let replaces = header.replaces_version;
        // The slot travels along: a push whose client vanished keeps it for as long as the check really runs.
        let check = move || {
            let candidate = check(header, file, hash, received_at, requirements, max_classes);
            (candidate, slot)
        };
        let (candidate, _slot) = tokio::task::spawn_blocking(check)
            .await
            .map_err(|e| PushError::Internal(format!("the check did not end: {e}")))?;
        store.versions.commit(candidate?, replaces).await
    }
}

fn check(
    header: PushHeader,
    file: Vec<u8>,
    hash: Sha256,
    received_at: Instant,
    requirements: Requirements,
    max_classes: usize,
) -> Result<Candidate, PushError> {
    let sha256: [u8; 32] = hash.finalize().into();
    if sha256 != header.sha256 {
        return Err(PushError::Digest { found: hex(&sha256), announced: hex(&header.sha256) });
    }
    let checkpoint = Checkpoint::parse(file.into())?;
    let spec = NetworkSpec::from_checkpoint(&header.arch, &checkpoint)?;
    if spec.in_channels != requirements.in_channels {
        return Err(PushError::Channels { found: spec.in_channels, expected: requirements.in_channels });
    }
    if spec.num_classes < requirements.num_classes {
        let (found, expected) = (spec.num_classes, requirements.num_classes);
        return Err(PushError::Classes { head: spec.naming.head, found, expected });
    }
    if spec.num_classes > max_classes {
        return Err(PushError::Cost(format!(
            "tensor {}.weight has {} outputs, and at most {max_classes} are taken (its setting students.max_classes)",
            spec.naming.head, spec.num_classes
        )));
    }
    checkpoint.check_finite()?;
    Ok(Candidate {
        arch: header.arch,
        spec,
        checkpoint,
        sha256,
        trainer_step: header.trainer_step,
        accepted_at: SystemTime::now(),
        received_at,
    })
}
