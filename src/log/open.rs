//! Opening a log: what it is, and the index of what lies in its storage. Also the names of its objects.

use std::sync::{Arc, Mutex, RwLock};

use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use uuid::Uuid;

use super::cache::Cache;
use super::chunk::{Head, SEQUENCES, Summary};
use super::index::Index;
use super::{ChunkError, Entry, Log, LogIdentity, LogOptions, Origin};
use crate::model::source::Geometry;
use crate::storage::{Created, Found, Storage, StorageError, number, numbered};

/// What the log is; written once.
const IDENTITY: &str = "log/log.json";
/// Where chunks lie.
pub(super) const CHUNKS: &str = "log/chunks/";
/// Where damaged chunks lie.
pub(super) const QUARANTINE: &str = "log/quarantine/";
/// Where it is on record what retention let go of.
pub(super) const EVICTED: &str = "log/evicted/";
/// The `format` in the log's identity.
const FORMAT: &str = "dreamfeed.log.v1";
/// So much is read of each chunk at first: enough for some two thousand images.
const HEAD_BYTES: u64 = 48 << 10;
/// No chunk is larger: the daemon refuses settings that would make one.
pub(crate) const MAX_CHUNK_BYTES: u64 = 1 << 30;
/// Heads read at one time.
const READERS: usize = 32;

/// Why a log cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The storage failed.
    #[error("the log cannot be opened: {0}")]
    Storage(StorageError),
    /// Something lies there that is no log of ours.
    #[error("the log in {location} cannot be opened: {problem}")]
    Refused {
        /// Where.
        location: String,
        /// What, and what would be right.
        problem: String,
    },
}

// By hand: what thiserror converts from is a source too, and whoever prints the chain would print it twice.
impl From<StorageError> for OpenError {
    fn from(error: StorageError) -> Self {
        Self::Storage(error)
    }
}

/// Why the beginning of a chunk cannot be read.
#[derive(Debug)]
pub(super) enum HeadError {
    Storage(StorageError),
    Chunk(ChunkError),
}

/// What a log is: `log/log.json`, written once.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Identity {
    format: String,
    /// The log.
    pub log_id: Uuid,
    /// `NetworkSource::identity` of the teacher that it is dreamed from.
    pub teacher_sha256: String,
    /// C, H, W of every image.
    geometry: [usize; 3],
    /// K.
    pub num_classes: usize,
}

/// What the identity of every version has.
#[derive(Deserialize)]
struct Versioned {
    format: String,
}

impl Identity {
    /// The size of every image.
    pub fn geometry(&self) -> Geometry {
        let [channels, height, width] = self.geometry;
        Geometry { channels, height, width }
    }

    /// What it asks of its chunks.
    pub(super) fn origin(&self) -> Origin<'_> {
        let (geometry, num_classes) = (self.geometry(), self.num_classes);
        Origin { log_id: self.log_id, teacher_sha256: &self.teacher_sha256, geometry, num_classes }
    }
}

/// The name of the chunk that begins with this sequence. The order of names is the order of sequences.
pub(super) fn chunk_name(first_sequence: u64) -> String {
    numbered(CHUNKS, first_sequence)
}

pub(super) fn quarantine_name(first_sequence: u64, count: u64) -> String {
    format!("{QUARANTINE}{first_sequence:020}-{count}.safetensors")
}

/// The sequence in a chunk's name; None where no chunk can have that name.
pub(super) fn first_sequence(name: &str) -> Option<u64> {
    number(CHUNKS, name).filter(|first| *first < SEQUENCES)
}

pub(super) fn evicted_name(first: u64, end: u64) -> String {
    format!("{EVICTED}{first:020}-{}", end.saturating_sub(first))
}

/// The stretch in the name of a damaged chunk or of a record: first sequence, and the one behind.
pub(super) fn stretch(folder: &str, name: &str) -> Option<(u64, u64)> {
    let name = name.strip_prefix(folder)?;
    let (first, count) = name.strip_suffix(".safetensors").unwrap_or(name).split_once('-')?;
    let first: u64 = first.parse().ok()?;
    let end = first.checked_add(count.parse().ok()?).filter(|end| *end <= SEQUENCES)?;
    Some((first, end))
}

/// No more images than this were in a chunk that cannot be read: its size now says nothing of what it was. Where its
/// header can be read, that tells; otherwise as many as the largest chunk could hold. Too many only leaves a hole in the
/// numbers; too few would give numbers twice.
pub(super) fn most_images(error: &ChunkError, origin: &Origin<'_>) -> u64 {
    match error {
        ChunkError::Length { count: Some(count), .. } => (*count).max(1),
        ChunkError::Impossible { count, .. } => u64::from(*count),
        // What lies there in its place says nothing of it.
        _ => MAX_CHUNK_BYTES / (origin.geometry.pixels() + 4 * origin.num_classes + 20) as u64 + 1,
    }
}

/// Reads the beginning of the chunk with this first sequence; None where it is gone.
pub(super) async fn read_head(
    storage: &Storage,
    found: &Found,
    first_sequence: u64,
    origin: &Origin<'_>,
) -> Result<Option<Entry>, HeadError> {
    if found.bytes == 0 {
        // A store refuses an empty range, which would look like a fault of the store.
        return Err(HeadError::Chunk(ChunkError::Damaged("it is empty".into())));
    }
    let mut wanted = HEAD_BYTES;
    // Twice at most: the first piece tells how long the header is, the second how long its tensors are.
    for _ in 0..3 {
        let range = 0..wanted.min(found.bytes);
        let Some(head) = storage.get_range(&found.name, range).await.map_err(HeadError::Storage)? else {
            return Ok(None);
        };
        match Summary::from_head(&head, found.bytes).map_err(HeadError::Chunk)? {
            Head::Summary(summary) => {
                summary.check(first_sequence, origin).map_err(HeadError::Chunk)?;
                return Ok(Some(Entry { summary, bytes: found.bytes }));
            }
            Head::Longer(more) => wanted = more,
        }
    }
    Err(HeadError::Chunk(ChunkError::Damaged("its header goes on and on".into())))
}

/// What is known of a log without its teacher.
pub(super) struct Contents {
    pub identity: Identity,
    /// In order of their first sequences.
    pub entries: Vec<Entry>,
    pub damaged: Vec<DamagedHead>,
    /// Stretches in quarantine.
    pub lost: Vec<(u64, u64)>,
    /// Stretches that retention let go of.
    pub evicted: Vec<(u64, u64)>,
    pub strange: Vec<String>,
}

/// A chunk whose beginning cannot be read.
pub(super) struct DamagedHead {
    pub name: String,
    pub first: u64,
    /// The sequence behind it: the next chunk's, if it can hold so many images.
    pub end: u64,
    pub error: ChunkError,
}

/// Whether objects of this name are looked at by [`read`], which says what is wrong with them.
pub(super) fn is_in_the_log(name: &str) -> bool {
    name == IDENTITY || [CHUNKS, QUARANTINE, EVICTED].iter().any(|folder| name.starts_with(folder))
}

/// Whether an object of the log can have this name.
pub(super) fn is_own_name(name: &str) -> bool {
    let stretches = |folder| stretch(folder, name).is_some();
    name == IDENTITY || first_sequence(name).is_some() || stretches(QUARANTINE) || stretches(EVICTED)
}

/// Reads what the log in a storage is; None where there is none.
pub(super) async fn identity(storage: &Storage) -> Result<Option<Identity>, OpenError> {
    let refused = |problem| OpenError::Refused { location: storage.location().to_owned(), problem };
    let Some(identity) = storage.get(IDENTITY).await? else {
        return Ok(None);
    };
    let damaged = |e| refused(format!("{IDENTITY} is damaged ({e}); restore that file, or give another --store"));
    // First, and alone: another version may have other fields.
    let Versioned { format } = serde_json::from_slice(&identity).map_err(damaged)?;
    if format != FORMAT {
        return Err(refused(format!(
            "its format is {format:?}, and this version of dreamfeed reads {FORMAT}; use the version that wrote it"
        )));
    }
    serde_json::from_slice(&identity).map(Some).map_err(damaged)
}

/// Reads what the log in a storage is and holds; None where there is none. Changes nothing.
pub(super) async fn read(storage: &Storage) -> Result<Option<Contents>, OpenError> {
    let Some(identity) = identity(storage).await? else {
        return Ok(None);
    };
    let mut contents = Contents {
        identity,
        entries: Vec::new(),
        damaged: Vec::new(),
        lost: Vec::new(),
        evicted: Vec::new(),
        strange: Vec::new(),
    };
    let mut chunks = Vec::new();
    for found in storage.list(CHUNKS, None).await? {
        match first_sequence(&found.name) {
            Some(first) => chunks.push((first, found)),
            None => contents.strange.push(found.name),
        }
    }
    let names: Vec<u64> = chunks.iter().map(|(first, _)| *first).collect();
    let origin = contents.identity.origin();
    let heads = stream::iter(chunks)
        .map(|(first, found)| async move { (read_head(storage, &found, first, &origin).await, first, found.name) })
        .buffered(READERS)
        .collect::<Vec<_>>()
        .await;
    for (head, first, name) in heads {
        match head {
            Ok(Some(entry)) => contents.entries.push(entry),
            Ok(None) => {}
            Err(HeadError::Storage(error)) => return Err(error.into()),
            Err(HeadError::Chunk(error)) => {
                let most = first.saturating_add(most_images(&error, &origin));
                // What would take the last sequences away from the log is none of its own.
                if most > SEQUENCES {
                    contents.strange.push(name);
                    continue;
                }
                let next = names.iter().copied().find(|next| *next > first);
                contents.damaged.push(DamagedHead { name, first, end: next.unwrap_or(most).min(most), error });
            }
        }
    }
    // After the chunks: a daemon at work records before it deletes, and what it moves aside in the meantime shows here.
    for (folder, stretches) in [(QUARANTINE, &mut contents.lost), (EVICTED, &mut contents.evicted)] {
        for found in storage.list(folder, None).await? {
            match stretch(folder, &found.name) {
                Some(range) => stretches.push(range),
                None => contents.strange.push(found.name),
            }
        }
    }
    Ok(Some(contents))
}

/// What a daemon brings to its log.
#[derive(Clone, Debug)]
pub struct Maker {
    /// `NetworkSource::identity` of the teacher.
    pub teacher_sha256: String,
    /// The size of its images.
    pub geometry: Geometry,
    /// K.
    pub num_classes: usize,
}

impl Log {
    /// Opens the log in a storage, or begins one. Reads the first kilobytes of every chunk.
    pub async fn open(storage: Storage, options: LogOptions, maker: Maker) -> Result<Arc<Self>, OpenError> {
        let Maker { teacher_sha256, geometry, num_classes } = maker;
        let shape = [geometry.channels, geometry.height, geometry.width];
        let began = std::time::Instant::now();
        let contents = match read(&storage).await? {
            Some(contents) => contents,
            None => {
                let refused = |problem| OpenError::Refused { location: storage.location().to_owned(), problem };
                let chunks = storage.list(CHUNKS, None).await?;
                let orphans = chunks.iter().any(|found| first_sequence(&found.name).is_some());
                // Another replica may have begun it since: chunks come after the identity.
                if orphans && self::identity(&storage).await?.is_none() {
                    let problem = format!(
                        "{IDENTITY} is not there, and chunks are; restore that file, or give another --store"
                    );
                    return Err(refused(problem));
                }
                let identity = Identity {
                    format: FORMAT.into(),
                    log_id: Uuid::now_v7(),
                    teacher_sha256: teacher_sha256.clone(),
                    geometry: shape,
                    num_classes,
                };
                let json = serde_json::to_vec(&identity).unwrap_or_default();
                // Another replica may begin it at the same time: who wins decides its id, for both.
                let _: Created = storage.create(IDENTITY, Bytes::from(json)).await?;
                read(&storage).await?.ok_or_else(|| refused(format!("{IDENTITY} was written and is not there")))?
            }
        };
        let found = &contents.identity;
        if found.teacher_sha256 != teacher_sha256 {
            let short = |sha256: &str| sha256.chars().take(12).collect::<String>();
            return Err(OpenError::Refused {
                location: storage.location().to_owned(),
                problem: format!(
                    "it was dreamed from the teacher {}, not from {}; give that teacher, or another --store",
                    short(&found.teacher_sha256),
                    short(&teacher_sha256)
                ),
            });
        }
        if (found.geometry, found.num_classes) != (shape, num_classes) {
            return Err(OpenError::Refused {
                location: storage.location().to_owned(),
                problem: format!(
                    "it holds images of {} with {} logits each, not of {geometry} with {num_classes}; give the same \
                     --image-size again, or another --store",
                    found.geometry(),
                    found.num_classes
                ),
            });
        }
        for name in &contents.strange {
            tracing::warn!(name, "an object in the log is none of its own; it is left alone");
        }
        // One such chunk among ours was put there by mistake. Where there is no other, it is the identity that is wrong.
        let foreign = contents.damaged.iter().find(|head| matches!(head.error, ChunkError::Foreign(_)));
        if let (Some(DamagedHead { name, error, .. }), true) = (foreign, contents.entries.is_empty()) {
            return Err(OpenError::Refused {
                location: storage.location().to_owned(),
                problem: format!("{name}: {error}; restore {IDENTITY}, or give another --store"),
            });
        }
        let mut lost = contents.lost;
        for DamagedHead { name, first, end, error } in &contents.damaged {
            // Of a newer version, not damaged: nothing may be written after what we cannot read.
            if matches!(error, ChunkError::UnknownFormat { .. }) {
                return Err(OpenError::Refused {
                    location: storage.location().to_owned(),
                    problem: format!("{name}: {error}"),
                });
            }
            lost.push((*first, *end));
        }
        let index = Index::new(contents.entries, lost, &contents.evicted);
        let extent = index.extent();
        let log = Arc::new(Self {
            identity: LogIdentity {
                log_id: contents.identity.log_id,
                replica: Uuid::new_v4().to_string(),
                teacher_sha256,
                geometry,
                num_classes,
            },
            storage,
            options,
            writer: tokio::sync::Mutex::default(),
            evicting: tokio::sync::Mutex::default(),
            looked: Mutex::new(began),
            index: RwLock::new(index),
            next: watch::Sender::new(extent.next_sequence),
            cache: Cache::new(options.cache_bytes),
        });
        for DamagedHead { first, end, error, .. } in contents.damaged {
            log.quarantine(first, end - first, &error.to_string()).await;
        }
        log.storage.sweep().await;
        tracing::info!(
            location = log.storage.location(),
            log_id = %log.identity.log_id,
            chunks = extent.chunks,
            next_sequence = extent.next_sequence,
            seconds = began.elapsed().as_secs_f64(),
            "the log is open"
        );
        Ok(log)
    }
}
