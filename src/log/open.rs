//! Opening a log: what it is, and the index of what lies in its storage. Also the names of its objects.

use std::sync::{Arc, Mutex, RwLock};

use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use uuid::Uuid;

use super::cache::Cache;
use super::chunk::{Head, Summary};
use super::evicted::{self, Evicting};
use super::index::Index;
use super::{ChunkError, Entry, Log, LogIdentity, LogOptions, Origin, verify};
use crate::model::source::Geometry;
use crate::storage::{Created, Found, Storage, StorageError, blocking};
use crate::store::{self, CHUNKS, IDENTITY, Object, QUARANTINE, SEQUENCES};

/// The `format` in the log's identity.
const FORMAT: &str = "dreamfeed.log.v1";
/// So much is read of each chunk at first: enough for some two thousand images.
const HEAD_BYTES: u64 = 48 << 10;
/// No chunk is larger: the daemon refuses settings that would make one.
pub(crate) const MAX_CHUNK_BYTES: u64 = 1 << 30;
/// Heads that are read in one piece of work, and such pieces at one time.
const GROUP: usize = 256;
const GROUPS: usize = 4;
/// So many names of strays are told at the start, one by one.
const TOLD: usize = 20;

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
    Object::Chunk(first_sequence).name()
}

pub(super) fn quarantine_name(first_sequence: u64, count: u64) -> String {
    Object::Quarantined(first_sequence..first_sequence.saturating_add(count)).name()
}

/// The sequence in a chunk's name; None where no chunk can have that name.
pub(super) fn first_sequence(name: &str) -> Option<u64> {
    match Object::named(name) {
        Some(Object::Chunk(first)) => Some(first),
        _ => None,
    }
}

/// The segments of images that lie in quarantine.
pub(super) async fn quarantined(storage: &Storage) -> Result<Vec<(u64, u64)>, StorageError> {
    let segment = |name: &str| match Object::named(name) {
        Some(Object::Quarantined(range)) => Some((range.start, range.end)),
        _ => None,
    };
    Ok(storage.list(QUARANTINE, None).await?.iter().filter_map(|found| segment(&found.name)).collect())
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

/// What the beginning of a chunk says of it, as far as it was read.
fn entry(
    found: &Found,
    first_sequence: u64,
    origin: &Origin<'_>,
    head: &[u8],
) -> Result<Result<Entry, u64>, ChunkError> {
    match Summary::from_head(head, found.bytes)? {
        Head::Summary(summary) => {
            summary.check(first_sequence, origin)?;
            Ok(Ok(Entry { summary, bytes: found.bytes }))
        }
        Head::Longer(more) => Ok(Err(more)),
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
        match entry(found, first_sequence, origin, &head).map_err(HeadError::Chunk)? {
            Ok(entry) => return Ok(Some(entry)),
            Err(more) => wanted = more,
        }
    }
    Err(HeadError::Chunk(ChunkError::Damaged("its header goes on and on".into())))
}

/// A chunk's object, and what its beginning came to; None where it is gone.
type ReadHead = (u64, Found, Result<Option<Entry>, ChunkError>);

/// Reads the beginnings of many chunks, in their order.
async fn read_heads(
    storage: &Storage,
    chunks: Vec<(u64, Found)>,
    identity: Arc<Identity>,
) -> Result<Vec<ReadHead>, StorageError> {
    // One of no bytes would make a bucket refuse the range: it is read by itself, and refused there.
    let names = chunks.iter().filter(|(_, found)| found.bytes > 0).map(|(_, found)| found.name.clone()).collect();
    let heads = storage.heads(names, HEAD_BYTES).await?;
    let parsing = identity.clone();
    let parse = move || {
        let (origin, mut heads) = (parsing.origin(), heads.into_iter());
        let parse = |(first, found): (u64, Found)| {
            let head = if found.bytes > 0 { heads.next().flatten() } else { Some(Bytes::new()) };
            let parsed = head.map(|head| entry(&found, first, &origin, &head));
            (first, found, parsed)
        };
        chunks.into_iter().map(parse).collect::<Vec<_>>()
    };
    let parsed = blocking(parse).await.map_err(|problem| storage.failed("read", CHUNKS, problem))?;
    let mut read = Vec::with_capacity(parsed.len());
    for (first, found, parsed) in parsed {
        let entry = match parsed {
            None => Ok(None),
            Some(Ok(Ok(entry))) => Ok(Some(entry)),
            Some(Err(error)) if found.bytes > 0 => Err(error),
            // It has more to say than was read.
            Some(_) => match read_head(storage, &found, first, &identity.origin()).await {
                Ok(entry) => Ok(entry),
                Err(HeadError::Chunk(error)) => Err(error),
                Err(HeadError::Storage(error)) => return Err(error),
            },
        };
        read.push((first, found, entry));
    }
    Ok(read)
}

/// What is known of a log without its teacher.
pub(super) struct Contents {
    pub identity: Identity,
    /// In order of their first sequences.
    pub entries: Vec<Entry>,
    pub damaged: Vec<DamagedHead>,
    /// Segments in quarantine.
    pub lost: Vec<(u64, u64)>,
    /// Segments that retention evicted.
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

/// Reads what the log in a storage is; None where there is none.
pub(super) async fn identity(storage: &Storage) -> Result<Option<Identity>, OpenError> {
    Ok(identity_object(storage).await?.map(|(identity, _)| identity))
}

/// The same, and the very bytes that say so.
async fn identity_object(storage: &Storage) -> Result<Option<(Identity, Bytes)>, OpenError> {
    let refused = |problem| OpenError::Refused { location: storage.location().to_owned(), problem };
    let Some(object) = storage.get(IDENTITY).await? else {
        return Ok(None);
    };
    let damaged = |e| refused(format!("{IDENTITY} is damaged ({e}); restore that file, or give another --store"));
    // First, and alone: another version may have other fields.
    let Versioned { format } = serde_json::from_slice(&object).map_err(damaged)?;
    if format != FORMAT {
        return Err(refused(format!(
            "its format is {format:?}, and this version of dreamfeed reads {FORMAT}; use the version that wrote it"
        )));
    }
    let identity = serde_json::from_slice(&object).map_err(damaged)?;
    Ok(Some((identity, object)))
}

/// Reads what the log of this identity holds. Changes nothing.
pub(super) async fn read(storage: &Storage, identity: Identity) -> Result<Contents, OpenError> {
    let mut contents = Contents {
        identity,
        entries: Vec::new(),
        damaged: Vec::new(),
        lost: Vec::new(),
        evicted: Vec::new(),
        strange: Vec::new(),
    };
    let found = storage.list(CHUNKS, None).await?;
    let chunks: Vec<(u64, Found)> =
        found.into_iter().filter_map(|found| Some((first_sequence(&found.name)?, found))).collect();
    let firsts: Vec<u64> = chunks.iter().map(|(first, _)| *first).collect();
    let identity = Arc::new(contents.identity.clone());
    let groups: Vec<Vec<(u64, Found)>> = chunks.chunks(GROUP).map(<[_]>::to_vec).collect();
    let mut read = stream::iter(groups).map(|group| read_heads(storage, group, identity.clone())).buffered(GROUPS);
    while let Some(heads) = read.next().await {
        for (first, found, head) in heads? {
            match head {
                Ok(Some(entry)) => contents.entries.push(entry),
                Ok(None) => {}
                Err(error) => {
                    let most = first.saturating_add(most_images(&error, &identity.origin()));
                    // What would take the last sequences away from the log is none of its own.
                    if most > SEQUENCES {
                        contents.strange.push(found.name);
                        continue;
                    }
                    let next = firsts.get(firsts.partition_point(|next| *next <= first)).copied();
                    let end = next.unwrap_or(most).min(most);
                    contents.damaged.push(DamagedHead { name: found.name, first, end, error });
                }
            }
        }
    }
    drop(read);
    // After the chunks: a daemon at work records before it deletes, and what it moves aside in the meantime shows here.
    contents.lost = quarantined(storage).await?;
    contents.evicted = evicted::records(storage).await?;
    Ok(contents)
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

/// Why a log in a place is not the one that was meant.
fn refused(storage: &Storage, problem: String) -> OpenError {
    OpenError::Refused { location: storage.location().to_owned(), problem }
}

/// Begins a log where none is.
async fn begin(storage: &Storage, maker: &Maker) -> Result<(), OpenError> {
    let chunks = storage.list(CHUNKS, None).await?;
    let orphans = chunks.iter().any(|found| first_sequence(&found.name).is_some());
    // Another replica may have begun it since: chunks come after the identity.
    if orphans && identity(storage).await?.is_none() {
        let problem = format!("{IDENTITY} is not there, and chunks are; restore that file, or give another --store");
        return Err(refused(storage, problem));
    }
    let Maker { teacher_sha256, geometry, num_classes } = maker;
    let identity = Identity {
        format: FORMAT.into(),
        log_id: Uuid::now_v7(),
        teacher_sha256: teacher_sha256.clone(),
        geometry: [geometry.channels, geometry.height, geometry.width],
        num_classes: *num_classes,
    };
    let json = serde_json::to_vec(&identity).unwrap_or_default();
    // Another replica may begin it at the same time: who wins decides its id, for both.
    let _: Created = storage.create(IDENTITY, Bytes::from(json)).await?;
    Ok(())
}

/// Refuses a log of another teacher, or of images of another size.
fn check_maker(storage: &Storage, found: &Identity, maker: &Maker) -> Result<(), OpenError> {
    let Maker { teacher_sha256, geometry, num_classes } = maker;
    if found.teacher_sha256 != *teacher_sha256 {
        let short = |sha256: &str| sha256.chars().take(12).collect::<String>();
        let problem = format!(
            "it was dreamed from the teacher {}, not from {}; give that teacher, or another --store",
            short(&found.teacher_sha256),
            short(teacher_sha256)
        );
        return Err(refused(storage, problem));
    }
    if (found.geometry(), found.num_classes) != (*geometry, *num_classes) {
        let problem = format!(
            "it holds images of {} with {} logits each, not of {geometry} with {num_classes}; give the same --image-size \
             again, or another --store",
            found.geometry(),
            found.num_classes
        );
        return Err(refused(storage, problem));
    }
    Ok(())
}

/// Tells of what lies in the store and is nobody's.
async fn tell_strays(storage: &Storage) -> Result<(), StorageError> {
    let strays = verify::strays(storage).await?;
    for name in strays.iter().take(TOLD) {
        tracing::warn!(name, "no object of a store has this name; it is left alone");
    }
    if strays.len() > TOLD {
        tracing::warn!("{} more such names: dreamfeed log verify lists them", strays.len() - TOLD);
    }
    Ok(())
}

impl Log {
    /// Opens the log in a storage, or begins one, once the storage has proven what the log is built on. Reads the first
    /// kilobytes of every chunk. From then on nothing is changed in the storage unless it still is this log's:
    /// [`Log::storage`] is [guarded](Storage::guarded).
    pub async fn open(storage: Storage, options: LogOptions, maker: Maker) -> Result<Arc<Self>, OpenError> {
        let began = std::time::Instant::now();
        let (identity, object) = match identity_object(&storage).await? {
            Some(found) => found,
            None => {
                begin(&storage, &maker).await?;
                let written = identity_object(&storage).await?;
                written.ok_or_else(|| refused(&storage, format!("{IDENTITY} was written and is not there")))?
            }
        };
        check_maker(&storage, &identity, &maker)?;
        let storage = storage.guarded(IDENTITY, object, || Object::Probe(Uuid::new_v4()).name());
        match storage.prove().await {
            Ok(()) => {}
            Err(error @ StorageError::Unfit { .. }) => return Err(error.into()),
            // One that is full or read-only can be read all the same, and is proven when it takes something again.
            Err(error) => tracing::warn!(%error, "the store takes nothing for now"),
        }
        tell_strays(&storage).await?;
        let contents = read(&storage, identity).await?;
        for name in &contents.strange {
            tracing::warn!(name, "an object in the log is none of its own; it is left alone");
        }
        // One such chunk among ours was put there by mistake. Where there is no other, it is the identity that is wrong.
        let foreign = contents.damaged.iter().find(|head| matches!(head.error, ChunkError::Foreign(_)));
        if let (Some(DamagedHead { name, error, .. }), true) = (foreign, contents.entries.is_empty()) {
            return Err(refused(&storage, format!("{name}: {error}; restore {IDENTITY}, or give another --store")));
        }
        let mut lost = contents.lost;
        for DamagedHead { name, first, end, error } in &contents.damaged {
            // Of a newer version, not damaged: nothing may be written after what we cannot read.
            if matches!(error, ChunkError::UnknownFormat { .. }) {
                return Err(refused(&storage, format!("{name}: {error}")));
            }
            lost.push((*first, *end));
        }
        let index = Index::new(contents.entries, lost, &contents.evicted);
        let extent = index.extent();
        let Maker { teacher_sha256, geometry, num_classes } = maker;
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
            evicting: tokio::sync::Mutex::new(Evicting::new(&contents.evicted)),
            looked: Mutex::new(began),
            index: RwLock::new(index),
            next: watch::Sender::new(extent.next_sequence),
            faults: watch::Sender::default(),
            cache: Cache::new(options.cache_bytes),
        });
        for DamagedHead { first, end, error, .. } in contents.damaged {
            log.quarantine(first, end - first, &error.to_string()).await;
        }
        log.storage.sweep(&store::FOLDERS).await?;
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
