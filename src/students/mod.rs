//! Versions of the student: checked in full before anything changes, then published to whoever watches.
//!
//! Nothing here knows of a device or of the wire. [`StudentStore::slot`] and [`Slot::begin`] open a [`Push`], which takes bytes as they
//! come; [`Push::finish`] checks them and commits. Where versions live is the business of `versions` alone.

mod candidate;
mod error;
mod object;
mod push;
mod versions;

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::{Semaphore, watch};

use crate::model::checkpoint::Checkpoint;
use crate::model::spec::NetworkSpec;
use crate::storage::{Storage, StorageError, blocking};
use crate::store::{Object, STUDENTS};

pub use error::PushError;
pub(crate) use error::beginning;
pub use push::{Push, PushHeader, Slot};
use versions::Versions;

/// How often the storage is looked through for students of other daemons.
const FOLLOW: Duration = Duration::from_secs(2);

/// One accepted version of the student.
#[derive(Debug)]
pub struct Student {
    /// From 1, one more for each accepted push.
    pub version: u64,
    /// The architecture, as the trainer named it.
    pub arch: String,
    /// The network that the tensors make.
    pub spec: NetworkSpec,
    /// The weights, every value finite.
    pub checkpoint: Checkpoint,
    /// SHA-256 of the file.
    pub sha256: [u8; 32],
    /// The trainer's own step counter.
    pub trainer_step: u64,
    /// When it became the current version.
    pub accepted_at: SystemTime,
    /// When the last byte of the push arrived.
    pub received_at: Instant,
}

/// What the teacher asks of every student.
#[derive(Clone, Copy, Debug)]
pub struct Requirements {
    /// The teacher's classes; a student may have more outputs, not fewer.
    pub num_classes: usize,
    /// The teacher's input channels; a student must have the same.
    pub in_channels: usize,
}

/// What pushes may cost.
#[derive(Clone, Copy, Debug)]
pub struct StudentLimits {
    /// The largest file, in bytes.
    pub max_bytes: u64,
    /// The most outputs of a student; at least the teacher's.
    pub max_classes: usize,
    /// Pushes under way at one time. Each may hold up to `max_bytes` in memory.
    pub max_pushes: usize,
    /// Newest versions that can still be fetched; at least 1.
    pub kept_versions: usize,
    /// A push is abandoned when no message arrived for this long.
    pub idle_timeout: Duration,
    /// A push is abandoned when it is not complete after this long.
    pub push_timeout: Duration,
}

/// The outcome of a successful push.
#[derive(Clone, Debug)]
pub struct Accepted {
    /// The version that now holds these weights.
    pub student: Arc<Student>,
    /// Whether it already was the current version, so that no new one was made.
    pub already_current: bool,
}

/// What lies in a storage's place for students.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Audit {
    /// Versions whose bytes are those that were pushed.
    pub sound: Vec<u64>,
    /// Versions that are not: name and problem.
    pub damaged: Vec<(String, String)>,
}

/// Reads every stored student, one at a time, and proves its SHA-256. Changes nothing.
pub async fn audit(storage: &Storage) -> Result<Audit, StorageError> {
    let mut audit = Audit::default();
    for found in storage.list(STUDENTS, None).await? {
        let Some(Object::Student(version)) = Object::named(&found.name) else { continue };
        // One that is gone since the listing was deleted for newer ones.
        let Some(bytes) = storage.get(&found.name).await? else { continue };
        match blocking(move || object::read(version, bytes)).await.and_then(|read| read) {
            Ok(_) => audit.sound.push(version),
            Err(problem) => audit.damaged.push((found.name, problem)),
        }
    }
    Ok(audit)
}

/// Takes pushes and keeps the newest versions. Cheap to share.
#[derive(Debug)]
pub struct StudentStore {
    requirements: Requirements,
    limits: StudentLimits,
    slots: Arc<Semaphore>,
    versions: Versions,
}

impl StudentStore {
    /// The students of a storage; the newest valid one is current.
    pub async fn open(
        storage: Storage,
        requirements: Requirements,
        limits: StudentLimits,
    ) -> Result<Arc<Self>, StorageError> {
        Ok(Arc::new(Self {
            requirements,
            limits,
            slots: Arc::new(Semaphore::new(limits.max_pushes)),
            versions: Versions::open(storage, limits.kept_versions).await?,
        }))
    }

    /// Follows what other daemons on the same storage accept, until dropped.
    pub async fn follow(self: Arc<Self>) {
        let mut look = tokio::time::interval(FOLLOW);
        loop {
            look.tick().await;
            if let Err(error) = self.versions.follow().await {
                tracing::warn!(%error, "students of other daemons are not seen for now");
            }
        }
    }

    /// The limits it was made with.
    pub fn limits(&self) -> &StudentLimits {
        &self.limits
    }

    /// Follows the current student; None before the first push.
    pub fn watch(&self) -> watch::Receiver<Option<Arc<Student>>> {
        self.versions.watch()
    }

    /// The current student.
    pub fn current(&self) -> Option<Arc<Student>> {
        self.versions.current()
    }

    /// The current version, 0 = none.
    pub fn current_version(&self) -> u64 {
        self.versions.current().map_or(0, |student| student.version)
    }

    /// The student of this version, while it is still kept.
    pub async fn get(&self, version: u64) -> Result<Option<Arc<Student>>, StorageError> {
        self.versions.get(version).await
    }

    /// Pushes that hold a slot now.
    pub fn pushes_under_way(&self) -> usize {
        self.limits.max_pushes.saturating_sub(self.slots.available_permits())
    }
}
