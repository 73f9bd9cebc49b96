//! Where accepted versions live: in object storage, one object a version. A create-only put decides the number, so two
//! pushes, or two daemons, never share one. The newest valid version is held in memory too, for the engine.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, PoisonError, Weak};

use bytes::Bytes;
use metrics::counter;
use tokio::sync::{Mutex, watch};

use super::candidate::Candidate;
use super::{Accepted, PushError, Student, object};
use crate::storage::{Created, Storage, StorageError, blocking};
use crate::store::{Object, STUDENTS};
use crate::telemetry;

/// The name of a version; the order of names is the order of versions.
fn name(version: u64) -> String {
    Object::Student(version).name()
}

/// The version in a name.
fn version(name: &str) -> Option<u64> {
    match Object::named(name) {
        Some(Object::Student(version)) => Some(version),
        _ => None,
    }
}

/// The versions of one storage.
#[derive(Debug)]
pub(super) struct Versions {
    storage: Storage,
    kept: usize,
    /// Every version that lies there, damaged ones too: a number is never given twice.
    known: Mutex<BTreeSet<u64>>,
    current: watch::Sender<Option<Arc<Student>>>,
    /// Every version that somebody holds: all who read it share one copy.
    held: std::sync::Mutex<BTreeMap<u64, Weak<Student>>>,
    /// Taken while an old version is loaded, so that those who ask for it meanwhile find it held.
    loading: Mutex<()>,
}

impl Versions {
    /// Opens the versions of a storage; the newest valid one becomes the current one.
    pub async fn open(storage: Storage, kept: usize) -> Result<Self, StorageError> {
        let this = Self {
            storage,
            kept: kept.max(1),
            known: Mutex::default(),
            current: watch::Sender::new(None),
            held: Default::default(),
            loading: Mutex::default(),
        };
        {
            let mut known = this.known.lock().await;
            this.refresh(&mut known).await?;
            // What a crash kept from being deleted.
            if let Some(newest) = known.last().copied() {
                this.retain(&mut known, newest).await;
            }
        }
        if let Some(student) = this.current() {
            tracing::info!(version = student.version, arch = %student.arch, "the newest stored student is adopted");
        }
        Ok(this)
    }

    pub fn watch(&self) -> watch::Receiver<Option<Arc<Student>>> {
        self.current.subscribe()
    }

    pub fn current(&self) -> Option<Arc<Student>> {
        self.current.borrow().clone()
    }

    /// Takes what other daemons stored since the last look.
    pub async fn follow(&self) -> Result<(), StorageError> {
        self.refresh(&mut *self.known.lock().await).await
    }

    async fn refresh(&self, known: &mut BTreeSet<u64>) -> Result<(), StorageError> {
        let after = known.last().map(|version| name(*version));
        // What lies there now may be another store's.
        self.storage.check().await?;
        let found = self.storage.list(STUDENTS, after.as_deref()).await?;
        let new: Vec<u64> = found.iter().filter_map(|found| version(&found.name)).collect();
        // Newest first, until one is whole.
        for version in new.iter().rev() {
            if let Some(student) = self.load(*version).await? {
                self.publish(Arc::new(student));
                break;
            }
        }
        known.extend(new);
        Ok(())
    }

    /// The stored student; None where it is gone, or damaged.
    async fn load(&self, version: u64) -> Result<Option<Student>, StorageError> {
        let name = name(version);
        self.storage.check().await?;
        let Some(bytes) = self.storage.get(&name).await? else { return Ok(None) };
        match blocking(move || object::read(version, bytes)).await.and_then(|read| read) {
            Ok(student) => Ok(Some(student)),
            Err(problem) => {
                counter!(telemetry::STUDENTS_DAMAGED).increment(1);
                tracing::error!(%name, problem, "a stored student is damaged, and is not used");
                Ok(None)
            }
        }
    }

    /// The student, while it is kept or somebody still reads it; one copy for all who ask.
    pub async fn get(&self, version: u64) -> Result<Option<Arc<Student>>, StorageError> {
        if let Some(held) = self.held(version) {
            return Ok(Some(held));
        }
        let _loading = self.loading.lock().await;
        if let Some(held) = self.held(version) {
            return Ok(Some(held));
        }
        let student = self.load(version).await?.map(Arc::new);
        if let Some(student) = &student {
            self.hold(student);
        }
        Ok(student)
    }

    fn held(&self, version: u64) -> Option<Arc<Student>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).get(&version).and_then(Weak::upgrade)
    }

    fn hold(&self, student: &Arc<Student>) {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.retain(|_, student| student.strong_count() > 0);
        held.insert(student.version, Arc::downgrade(student));
    }

    fn publish(&self, student: Arc<Student>) {
        self.hold(&student);
        self.current.send_replace(Some(student));
    }

    /// Decides, numbers and publishes: of two pushes that replace the same version only one can win. The version is
    /// durable when this returns.
    pub async fn commit(&self, candidate: Candidate, replaces: Option<u64>) -> Result<Accepted, PushError> {
        let mut known = self.known.lock().await;
        let candidate = Arc::new(candidate);
        let encoding = candidate.clone();
        // Read back by the code that reads it after a restart: what is acknowledged can be read.
        let write = move || {
            let object: Bytes = object::write(&encoding)?;
            let read = object::read(1, object.clone())?;
            if encoding.is(&read) { Ok(object) } else { Err("another student came out than was put in".to_owned()) }
        };
        let bytes = blocking(write).await.and_then(|written| written).map_err(PushError::Unreadable)?;
        loop {
            self.refresh(&mut known).await?;
            let newest = self.current();
            if let Some(same) = newest.as_ref().filter(|student| candidate.is(student)) {
                return Ok(Accepted { student: same.clone(), already_current: true });
            }
            let current = newest.map_or(0, |student| student.version);
            if let Some(replaces) = replaces.filter(|replaces| *replaces != current) {
                return Err(PushError::Conflict { replaces, current });
            }
            let version = known.last().map_or(1, |newest| newest + 1);
            // After an error the version may be there all the same. It is then found by the next look, and the same push
            // again is no new one.
            if self.storage.create(&name(version), bytes.clone()).await? == Created::Taken {
                continue;
            }
            known.insert(version);
            // Free, or free again? While this push was under way, others may have taken the number and so many more that
            // retention deleted it. Nobody deletes one of the newest, so such a number is told by its age.
            self.refresh(&mut known).await?;
            let newest = known.last().copied().unwrap_or(version);
            if version + self.kept as u64 <= newest {
                self.storage.delete(&name(version)).await?;
                known.remove(&version);
                continue;
            }
            let student = Arc::new(Student {
                version,
                arch: candidate.arch.clone(),
                spec: candidate.spec.clone(),
                checkpoint: candidate.checkpoint.clone(),
                sha256: candidate.sha256,
                trainer_step: candidate.trainer_step,
                accepted_at: candidate.accepted_at,
                received_at: candidate.received_at,
            });
            if version == newest {
                self.publish(student.clone());
            }
            self.retain(&mut known, newest).await;
            return Ok(Accepted { student, already_current: false });
        }
    }

    /// Deletes all but the newest versions. What fails here is tried again with the next push.
    async fn retain(&self, known: &mut BTreeSet<u64>, newest: u64) {
        let most = self.kept as u64;
        let old: Vec<u64> = known.iter().copied().take_while(|version| *version + most <= newest).collect();
        for version in old {
            match self.storage.delete(&name(version)).await {
                Ok(()) => _ = known.remove(&version),
                Err(error) => return tracing::warn!(%error, "an old student stays for now"),
            }
        }
    }
}
