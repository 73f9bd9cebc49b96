//! A log looked at from outside, without a daemon and without its teacher. Changes nothing.

use futures_util::stream::{self, Stream, StreamExt};

use super::{Chunk, ChunkError, Entry, Identity, OpenError, open};
use crate::storage::{Storage, StorageError, blocking};
use crate::store::CHUNKS;

/// Chunks that are read ahead of the one in use.
const READ_AHEAD: usize = 4;

/// What a log is and holds.
#[derive(Debug)]
pub struct Inspection {
    /// What it is.
    pub identity: Identity,
    /// The chunks whose beginning can be read, oldest first.
    pub entries: Vec<Entry>,
    /// Objects that should be chunks and cannot be read.
    pub damaged: Vec<Damaged>,
    /// Segments whose chunks are in quarantine: first sequence, and the one behind.
    pub quarantined: Vec<(u64, u64)>,
    /// Segments that retention evicted, as the log has it on record; chunks of a seed set may lie before them.
    pub evicted: Vec<(u64, u64)>,
    /// Objects with the name of a chunk that cannot be one: their sequences would be the last that there can be.
    pub strange: Vec<String>,
}

/// A chunk whose beginning cannot be read.
#[derive(Debug)]
pub struct Damaged {
    /// The object.
    pub name: String,
    /// The sequence in its name.
    pub first_sequence: u64,
    /// The sequence behind it, as far as can be told: the next chunk's, or what an object of its size can hold.
    pub end: u64,
    /// What is wrong.
    pub problem: String,
    /// Whether it is intact, and another log's.
    pub foreign: bool,
}

/// Why a chunk cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum InspectError {
    /// The storage failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// There is none.
    #[error("{0} is not there")]
    Missing(String),
    /// No chunk holds the image.
    #[error(
        "no chunk holds image {0}: it was evicted, is lost, or is not made yet; `dreamfeed log verify` tells which"
    )]
    NotHeld(u64),
    /// It is damaged.
    #[error("{name}: {problem}")]
    Damaged {
        /// The object.
        name: String,
        /// What is wrong.
        problem: String,
    },
    /// It is intact, and belongs elsewhere.
    #[error("{name}: {problem}")]
    Foreign {
        /// The object.
        name: String,
        /// Why it is not this log's.
        problem: String,
    },
}

/// What the log in a storage is; None where there is none.
pub async fn identity(storage: &Storage) -> Result<Option<Identity>, OpenError> {
    open::identity(storage).await
}

/// Looks at the log in a storage; None where there is none. Reads the first kilobytes of every chunk.
pub async fn inspect(storage: &Storage) -> Result<Option<Inspection>, OpenError> {
    let Some(identity) = open::identity(storage).await? else { return Ok(None) };
    let contents = open::read(storage, identity).await?;
    let damaged = contents.damaged.into_iter().map(|head| Damaged {
        name: head.name,
        first_sequence: head.first,
        end: head.end,
        problem: head.error.to_string(),
        foreign: matches!(head.error, ChunkError::Foreign(_)),
    });
    Ok(Some(Inspection {
        identity: contents.identity,
        entries: contents.entries,
        damaged: damaged.collect(),
        quarantined: contents.lost,
        evicted: contents.evicted,
        strange: contents.strange,
    }))
}

/// The first sequences of all chunks in order, by the objects' names alone.
pub async fn first_sequences(storage: &Storage) -> Result<Vec<u64>, StorageError> {
    let found = storage.list(CHUNKS, None).await?;
    Ok(found.iter().filter_map(|found| open::first_sequence(&found.name)).collect())
}

/// The object that holds the chunk that begins with this sequence.
pub fn object_name(first_sequence: u64) -> String {
    open::chunk_name(first_sequence)
}

/// Reads the chunk that begins with a sequence, verifies its checksum, that it is one of this log's, and that every image
/// in it is possible.
pub async fn load(storage: &Storage, log: &Identity, first_sequence: u64) -> Result<Chunk, InspectError> {
    let name = open::chunk_name(first_sequence);
    let Some(object) = storage.get(&name).await? else { return Err(InspectError::Missing(name)) };
    let chunk = match blocking(move || Chunk::parse(object)).await {
        Ok(chunk) => chunk,
        Err(problem) => return Err(InspectError::Damaged { name, problem }),
    };
    let checked = chunk.and_then(|chunk| chunk.check(first_sequence, &log.origin()).map(|()| chunk));
    checked.map_err(|error| match error {
        ChunkError::Foreign(problem) => InspectError::Foreign { name, problem },
        damaged => InspectError::Damaged { name, problem: damaged.to_string() },
    })
}

/// The chunk that holds an image.
pub async fn find(storage: &Storage, log: &Identity, sequence: u64) -> Result<Chunk, InspectError> {
    let firsts = first_sequences(storage).await?;
    let at = firsts.partition_point(|first| *first <= sequence);
    let not_held = InspectError::NotHeld(sequence);
    let Some(first) = at.checked_sub(1).and_then(|at| firsts.get(at)) else { return Err(not_held) };
    let chunk = load(storage, log, *first).await?;
    if chunk.end() > sequence { Ok(chunk) } else { Err(not_held) }
}

/// Chunks in their order, a few read ahead.
pub fn load_all<'a>(
    storage: &'a Storage,
    log: &'a Identity,
    first_sequences: impl IntoIterator<Item = u64> + 'a,
) -> impl Stream<Item = Result<Chunk, InspectError>> + 'a {
    stream::iter(first_sequences).map(move |first| load(storage, log, first)).buffered(READ_AHEAD)
}
