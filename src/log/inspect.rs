//! A log looked at from outside, without a daemon and without its teacher. Changes nothing.

use futures_util::stream::{self, StreamExt};
use uuid::Uuid;

use super::{Chunk, Entry, OpenError, open};
use crate::storage::{Storage, StorageError, blocking};

/// What a log is and holds.
#[derive(Debug)]
pub struct Inspection {
    /// The log.
    pub log_id: Uuid,
    /// The teacher that it was dreamed from.
    pub teacher_sha256: String,
    /// C, H, W of every image.
    pub geometry: [usize; 3],
    /// K.
    pub num_classes: usize,
    /// Its chunks, oldest first.
    pub entries: Vec<Entry>,
    /// Objects that should be chunks and are not: name and problem.
    pub damaged: Vec<(String, String)>,
    /// Stretches whose chunks are in quarantine: first sequence, and the one behind.
    pub quarantined: Vec<(u64, u64)>,
    /// Objects in the log's place that are none of its own.
    pub strange: Vec<String>,
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
    /// It is damaged.
    #[error("{name}: {problem}")]
    Damaged {
        /// The object.
        name: String,
        /// What is wrong.
        problem: String,
    },
}

/// Looks at the log in a storage; None where there is none.
pub async fn inspect(storage: &Storage) -> Result<Option<Inspection>, OpenError> {
    let Some(contents) = open::read(storage).await? else { return Ok(None) };
    let damaged = contents.damaged.into_iter().map(|(found, error)| (found.name, error.to_string())).collect();
    Ok(Some(Inspection {
        log_id: contents.log_id,
        teacher_sha256: contents.teacher_sha256,
        geometry: contents.geometry,
        num_classes: contents.num_classes,
        entries: contents.entries,
        damaged,
        quarantined: contents.lost,
        strange: contents.strange,
    }))
}

/// Reads the chunk that begins with a sequence, and verifies its checksum.
pub async fn load(storage: &Storage, first_sequence: u64) -> Result<Chunk, InspectError> {
    let name = open::chunk_name(first_sequence);
    let Some(object) = storage.get(&name).await? else { return Err(InspectError::Missing(name)) };
    match blocking(move || Chunk::parse(object)).await {
        Ok(Ok(chunk)) if chunk.first_sequence() == first_sequence => Ok(chunk),
        Ok(Ok(chunk)) => {
            let problem = format!("it says that its first sequence is {}", chunk.first_sequence());
            Err(InspectError::Damaged { name, problem })
        }
        Ok(Err(error)) => Err(InspectError::Damaged { name, problem: error.to_string() }),
        Err(problem) => Err(InspectError::Damaged { name, problem }),
    }
}

/// Chunks in their order, a few read ahead.
pub fn load_all<'a>(
    storage: &'a Storage,
    first_sequences: impl IntoIterator<Item = u64> + 'a,
) -> impl StreamExt<Item = Result<Chunk, InspectError>> + 'a {
    stream::iter(first_sequences).map(move |first| load(storage, first)).buffered(4)
}
