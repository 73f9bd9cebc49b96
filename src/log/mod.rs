//! The log: immutable chunks under consecutive sequence numbers, read by position.
//!
//! A reader holds a position and nothing else, so a slow one costs no memory and stalls nobody. A chunk is encoded once,
//! when it is born; readers share its bytes. For now the log is a tail in memory with a byte bound ([`tail`]): the
//! durable log takes that type's place behind [`Log`], and cursors already carry what it needs.

mod chunk;
mod cursor;
mod tail;

use std::sync::{Arc, Mutex, PoisonError, RwLock};

use bytes::Bytes;
use tokio::sync::watch;
use uuid::Uuid;

use crate::synthesis::batch::DreamBatch;

pub use chunk::{Chunk, ChunkError, FORMAT};
pub use cursor::CursorError;
use tail::Tail;

/// What every chunk of a log says of itself.
#[derive(Clone, Debug)]
pub struct LogIdentity {
    /// The log; cursors are valid within one log only.
    pub log_id: Uuid,
    /// Which daemon makes the chunks.
    pub replica: String,
    /// `NetworkSource::identity` of the teacher.
    pub teacher_sha256: String,
    /// The synthesizer's settings, JSON.
    pub settings_json: String,
}

/// What the log holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// The sequence of the oldest image that can still be read.
    pub first_sequence: u64,
    /// The sequence that the next image will get.
    pub next_sequence: u64,
    /// Chunks held.
    pub chunks: u64,
    /// Bytes held.
    pub bytes: u64,
    /// Chunks that had to leave, so far.
    pub evicted_chunks: u64,
}

/// What lies at a position.
#[derive(Clone, Debug)]
pub enum Read {
    /// A chunk whose first image is the one asked for; the next position is [`Chunk::end`].
    Chunk(Arc<Chunk>),
    /// Nothing yet: wait until [`Log::watch`] changes.
    Wait,
    /// The image is gone.
    Overtaken {
        /// The oldest image that can still be read.
        first_sequence: u64,
    },
    /// The position lies beyond the next image to be made.
    Ahead {
        /// The sequence that the next image will get.
        next_sequence: u64,
    },
}

/// The log. Cheap to share.
#[derive(Debug)]
pub struct Log {
    identity: LogIdentity,
    /// One writer at a time; readers never wait for an encoding.
    writer: Mutex<()>,
    tail: RwLock<Tail>,
    next: watch::Sender<u64>,
}

impl Log {
    /// An empty log that holds at most `memory_bytes` of chunks, but always the newest one.
    pub fn new(identity: LogIdentity, memory_bytes: u64) -> Arc<Self> {
        Arc::new(Self {
            identity,
            writer: Mutex::default(),
            tail: RwLock::new(Tail::new(memory_bytes)),
            next: watch::Sender::new(0),
        })
    }

    /// What it is.
    pub fn identity(&self) -> &LogIdentity {
        &self.identity
    }

    /// Makes the batch a chunk; returns its first sequence. Encodes and hashes: call it where blocking is allowed.
    pub fn append(&self, batch: &DreamBatch) -> Result<u64, ChunkError> {
        let _writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let first_sequence = *self.next.borrow();
        let chunk = Chunk::encode(batch, first_sequence, &self.identity)?;
        let next = chunk.end();
        self.tail.write().unwrap_or_else(PoisonError::into_inner).push(Arc::new(chunk));
        self.next.send_replace(next);
        Ok(first_sequence)
    }

    /// What lies at a position. A position inside a chunk gives the rest of that chunk, no image twice and none skipped.
    pub fn read(&self, position: u64) -> Read {
        let found = self.tail.read().unwrap_or_else(PoisonError::into_inner).read(position);
        match found {
            Read::Chunk(chunk) if chunk.first_sequence < position => match chunk.tail_from(position) {
                Ok(rest) => Read::Chunk(Arc::new(rest)),
                // Our own encoding does not parse: never, but a reader must not skip in silence.
                Err(_) => Read::Overtaken { first_sequence: chunk.end() },
            },
            found => found,
        }
    }

    /// Follows the sequence that the next image will get.
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.next.subscribe()
    }

    /// What it holds.
    pub fn extent(&self) -> Extent {
        self.tail.read().unwrap_or_else(PoisonError::into_inner).extent()
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

#[cfg(test)]
mod tests;
