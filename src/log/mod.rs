//! The log: immutable chunks under consecutive sequence numbers in object storage, read by position.
//!
//! A reader holds a position and nothing else, so a slow one costs no memory and stalls nobody. A chunk is encoded once,
//! when it is born: the same bytes go to the storage and to every reader. [`Log`] is the only writer of its folder or
//! prefix; several daemons may share one, because a create-only put decides who gets a sequence number.
//!
//! Where everything lies is said in [`crate::store`].

mod cache;
pub mod chunk;
mod cursor;
mod evicted;
mod index;
pub mod inspect;
mod intake;
mod open;
mod upkeep;
pub mod verify;

use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use bytes::Bytes;
use metrics::{counter, histogram};
use tokio::sync::watch;
use uuid::Uuid;

use crate::model::source::Geometry;
use crate::storage::{Created, Found, Storage, StorageError, blocking};
use crate::store::{CHUNKS, SEQUENCES};
use crate::synthesis::batch::DreamBatch;
use crate::telemetry;

use cache::Cache;
pub use cache::CacheUse;
pub use chunk::{Chunk, ChunkError, FORMAT};
pub use cursor::CursorError;
use evicted::Evicting;
use index::Index;
pub use index::{Entry, Extent, Located, Retention};
pub use intake::Faults;
pub(crate) use open::MAX_CHUNK_BYTES;
pub use open::{Identity, Maker, OpenError};

/// A daemon that has not looked for so long (it was stopped, or the storage did not answer) looks again before it appends:
/// the sequence that it takes for the next one may have been used by another replica, and evicted again. So what retention
/// keeps must be more than all replicas make within this and one put.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// What every chunk of a log says of itself.
#[derive(Clone, Debug)]
pub struct LogIdentity {
    /// The log; cursors are valid within one log only.
    pub log_id: Uuid,
    /// Which daemon makes the chunks.
    pub replica: String,
    /// `NetworkSource::identity` of the teacher.
    pub teacher_sha256: String,
    /// The size of every image in it.
    pub geometry: Geometry,
    /// K.
    pub num_classes: usize,
}

impl LogIdentity {
    fn origin(&self) -> Origin<'_> {
        let Self { log_id, teacher_sha256, geometry, num_classes, .. } = self;
        Origin { log_id: *log_id, teacher_sha256, geometry: *geometry, num_classes: *num_classes }
    }
}

/// What a log asks of its chunks.
#[derive(Clone, Copy, Debug)]
struct Origin<'a> {
    log_id: Uuid,
    teacher_sha256: &'a str,
    geometry: Geometry,
    num_classes: usize,
}

/// How a log is kept.
#[derive(Clone, Copy, Debug)]
pub struct LogOptions {
    /// How much is kept in storage.
    pub retention: Retention,
    /// Memory for recent chunks, in bytes; one cache serves all readers.
    pub cache_bytes: u64,
}

/// What [`Log::news`] tells.
#[derive(Clone, Debug)]
pub struct News {
    /// Chunks.
    pub entries: Vec<Arc<Entry>>,
    /// What the log holds.
    pub extent: Extent,
    /// [`Log::generation`].
    pub generation: u64,
}

/// Why a batch did not become a chunk.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// Trying again may help.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// It never will.
    #[error(transparent)]
    Chunk(#[from] ChunkError),
}

/// Why a chunk cannot be read.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ReadError {
    /// It was evicted while it was being looked for.
    #[error("it was evicted")]
    Gone,
    /// It is damaged, or another log's, and now in quarantine.
    #[error("it is damaged")]
    Damaged,
    /// The storage does not answer; trying again may help.
    #[error("{0}")]
    Storage(String),
}

/// The log. Cheap to share.
#[derive(Debug)]
pub struct Log {
    identity: LogIdentity,
    storage: Storage,
    options: LogOptions,
    /// One appending task at a time; the sequences at which its batch was tried before.
    writer: tokio::sync::Mutex<Vec<u64>>,
    evicting: tokio::sync::Mutex<Evicting>,
    /// When the end of the log was last known for certain.
    looked: Mutex<Instant>,
    index: RwLock<Index>,
    next: watch::Sender<u64>,
    faults: watch::Sender<Faults>,
    cache: Cache,
}

impl Log {
    /// What it is.
    pub fn identity(&self) -> &LogIdentity {
        &self.identity
    }

    /// Where it is.
    pub fn storage(&self) -> &Storage {
        &self.storage
    }

    /// How it is kept.
    pub fn options(&self) -> &LogOptions {
        &self.options
    }

    fn index(&self) -> RwLockReadGuard<'_, Index> {
        self.index.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn index_mut(&self) -> RwLockWriteGuard<'_, Index> {
        self.index.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes the batch a chunk; returns its first sequence once it is durable. After an error of the storage the same
    /// batch can be appended again: if the chunk did get through, it is recognized and not written twice.
    pub async fn append(&self, batch: &Arc<DreamBatch>) -> Result<u64, AppendError> {
        let mut tried = self.writer.lock().await;
        let began = Instant::now();
        if self.looked().elapsed() > LOOK_AGAIN {
            self.refresh().await?;
        }
        loop {
            let asked = Instant::now();
            let first_sequence = self.extent().next_sequence;
            if first_sequence.checked_add(batch.count() as u64).is_none_or(|end| end > SEQUENCES) {
                let problem = "its sequences are used up, give another --store".to_owned();
                return Err(self.cannot_append("append to", CHUNKS.to_owned(), problem));
            }
            let (batch, identity) = (batch.clone(), self.identity.clone());
            let encode = move || Chunk::encode(&batch, first_sequence, &identity);
            let chunk = blocking(encode).await.map_err(ChunkError::Inconsistent)??;
            if let Some(first_sequence) = self.got_through(&tried, &chunk) {
                tried.clear();
                return Ok(first_sequence);
            }
            let bytes = chunk.payload().len() as u64;
            // Before the put: it may get through although no answer comes.
            tried.push(first_sequence);
            let created = self.storage.create(&open::chunk_name(first_sequence), chunk.payload().clone()).await?;
            if created == Created::Taken {
                self.take_theirs(first_sequence).await?;
                continue;
            }
            let entry = Entry { summary: chunk.summary.clone(), bytes };
            self.cache.put(Arc::new(chunk)).await;
            self.take(entry);
            self.set_looked(asked);
            tried.clear();
            histogram!(telemetry::LOG_APPEND_SECONDS).record(began.elapsed().as_secs_f64());
            return Ok(first_sequence);
        }
    }

    /// Where an earlier attempt to write the same batch got through although no answer came. Whoever looked through the
    /// storage since has then taken the chunk into the index like another replica's.
    fn got_through(&self, tried: &[u64], chunk: &Chunk) -> Option<u64> {
        tried.iter().copied().find(|first| match self.locate(*first) {
            Located::Chunk(entry) => entry.summary.first_sequence == *first && same(&entry.summary, &chunk.summary),
            _ => false,
        })
    }

    /// Takes the chunk of another replica that has the name that we wanted, and so comes before ours.
    async fn take_theirs(&self, first_sequence: u64) -> Result<(), AppendError> {
        let name = open::chunk_name(first_sequence);
        let Some(bytes) = self.storage.size(&name).await? else {
            // Retention evicted it since.
            return Ok(self.relist().await?);
        };
        match self.take_found(&Found { name: name.clone(), bytes }, first_sequence).await? {
            // Of a newer replica. Nothing may be written after what we cannot read.
            Some(error) => Err(self.cannot_append("append after", name, error.to_string())),
            None => Ok(()),
        }
    }

    /// Takes a chunk that lies at or behind the end of the log into the index; what cannot be read is set aside. Returns
    /// the problem of one that only newer software can read, which is left alone.
    async fn take_found(&self, found: &Found, first: u64) -> Result<Option<ChunkError>, StorageError> {
        let origin = self.identity.origin();
        match open::read_head(&self.storage, found, first, &origin).await {
            Ok(Some(entry)) if first >= self.extent().next_sequence => self.take(entry),
            Ok(_) => {}
            Err(open::HeadError::Storage(error)) => return Err(error),
            Err(open::HeadError::Chunk(error @ ChunkError::UnknownFormat { .. })) => return Ok(Some(error)),
            Err(open::HeadError::Chunk(error)) => {
                let end = first.saturating_add(open::most_images(&error, &origin));
                if first >= self.extent().next_sequence && end <= SEQUENCES {
                    // Left where it is, it would hide from this daemon's readers whatever comes after it.
                    self.set_aside(first, &error).await?;
                } else {
                    tracing::debug!(%error, name = %found.name, "not a chunk of this log");
                }
            }
        }
        Ok(None)
    }

    fn cannot_append(&self, action: &'static str, name: String, problem: String) -> AppendError {
        let location = self.storage.location().to_owned();
        AppendError::Storage(StorageError::Call { action, name, location, problem })
    }

    /// Quarantine for what was to be the next chunk and cannot be read; none of the sequences that it may have is given
    /// again.
    async fn set_aside(&self, first_sequence: u64, error: &ChunkError) -> Result<(), StorageError> {
        // What lies there may be sound, and another log's that took this one's place.
        self.storage.check().await?;
        let count = open::most_images(error, &self.identity.origin());
        let end = first_sequence.saturating_add(count).min(SEQUENCES);
        self.quarantine(first_sequence, end - first_sequence, &error.to_string()).await;
        let next = {
            let mut index = self.index_mut();
            index.mark_lost(first_sequence, end);
            index.extent().next_sequence
        };
        self.wake(next);
        Ok(())
    }

    fn looked(&self) -> Instant {
        *self.looked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_looked(&self, at: Instant) {
        let mut looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        *looked = at.max(*looked);
    }

    fn wake(&self, next: u64) {
        self.next.send_if_modified(|current| std::mem::replace(current, next) != next);
    }

    /// Puts a durable chunk into the index and wakes whoever waits for it.
    fn take(&self, entry: Entry) {
        let first_sequence = entry.summary.first_sequence;
        let next = {
            let mut index = self.index_mut();
            if !index.append(entry) {
                tracing::debug!(first_sequence, "a chunk before the end of the log was left alone");
            }
            index.extent().next_sequence
        };
        self.wake(next);
    }

    /// What lies at a position.
    pub fn locate(&self, position: u64) -> Located {
        self.index().locate(position)
    }

    /// The chunk that begins at `first_sequence`, from the cache or the storage, its checksum verified.
    pub async fn load(&self, first_sequence: u64) -> Result<Arc<Chunk>, ReadError> {
        let result = self.cache.get(first_sequence, || self.fetch(first_sequence)).await;
        match &result {
            Err(ReadError::Gone) => drop(self.index_mut().evict(first_sequence)),
            Err(ReadError::Storage(_)) => counter!(telemetry::STORAGE_ERRORS, "operation" => "read").increment(1),
            _ => {}
        }
        result
    }

    async fn fetch(&self, first_sequence: u64) -> Result<Arc<Chunk>, ReadError> {
        let name = open::chunk_name(first_sequence);
        let storage_failed = |error: StorageError| ReadError::Storage(error.to_string());
        let mut problem = String::new();
        // Twice: what was damaged on its way here may still be whole where it lies.
        for _ in 0..2 {
            let Some(object) = self.storage.get(&name).await.map_err(storage_failed)? else {
                self.drop_missing().await.map_err(storage_failed)?;
                return Err(ReadError::Gone);
            };
            match blocking(move || Chunk::parse(object)).await.map_err(ReadError::Storage)? {
                Ok(chunk) => match chunk.check(first_sequence, &self.identity.origin()) {
                    Ok(()) => return Ok(Arc::new(chunk)),
                    Err(error) => problem = error.to_string(),
                },
                Err(error) => problem = error.to_string(),
            }
        }
        // What lies there may be sound, and another log's that took this one's place.
        self.storage.check().await.map_err(storage_failed)?;
        let count = self.index_mut().lose(first_sequence);
        self.quarantine(first_sequence, count, &problem).await;
        Err(ReadError::Damaged)
    }

    async fn quarantine(&self, first_sequence: u64, count: u64, problem: &str) {
        let name = open::chunk_name(first_sequence);
        tracing::error!(%name, problem, images = count, "a chunk is damaged: moved to quarantine, and never served");
        counter!(telemetry::LOG_QUARANTINED_CHUNKS).increment(1);
        if let Err(error) = self.storage.rename(&name, &open::quarantine_name(first_sequence, count)).await {
            tracing::warn!(%error, "the damaged chunk stays where it is; this daemon does not read it again");
        }
    }

    /// Whatever is derived from a chunk or several and may serve many readers, made at most once while it is in use.
    pub async fn shared<F>(&self, key: CacheUse, make: impl FnOnce() -> F) -> Result<Bytes, ReadError>
    where
        F: Future<Output = Result<Bytes, ReadError>>,
    {
        self.cache.derived(key, make).await
    }

    /// At most `most` chunks that begin at or behind `sequence`, oldest first, and what the log holds at that moment.
    pub fn news(&self, sequence: u64, most: usize) -> News {
        let index = self.index();
        let entries = index.entries_from(sequence).take(most).cloned().collect();
        News { entries, extent: index.extent(), generation: index.generation() }
    }

    /// Whether a chunk that begins at this sequence can be read.
    pub fn holds(&self, first_sequence: u64) -> bool {
        self.index().holds(first_sequence)
    }

    /// Grows whenever a chunk comes or goes.
    pub fn generation(&self) -> u64 {
        self.index().generation()
    }

    /// Follows the sequence that the next image will get.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.next.subscribe()
    }

    /// What it holds.
    pub fn extent(&self) -> Extent {
        self.index().extent()
    }

    /// Bytes in the cache.
    pub async fn cached_bytes(&self) -> u64 {
        self.cache.bytes().await
    }

    /// The cursor from which a stream continues with the image at `sequence`.
    pub fn cursor(&self, sequence: u64) -> Bytes {
        cursor::encode(self.identity.log_id, sequence)
    }

    /// The sequence that a cursor of this log names.
    pub fn position(&self, cursor: &[u8]) -> Result<u64, CursorError> {
        cursor::decode(self.identity.log_id, cursor)
    }
}

/// Whether two chunks are one batch of one daemon; their sequences do not matter.
fn same(a: &chunk::Summary, b: &chunk::Summary) -> bool {
    (&a.replica, &a.data_sha256, a.count) == (&b.replica, &b.data_sha256, b.count)
}

#[cfg(test)]
pub(crate) mod tests;
