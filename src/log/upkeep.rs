//! What a daemon does for a log that it shares and that must not grow for ever: it takes what other replicas append,
//! notices what they let go of, and lets go of what retention does not keep.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use metrics::counter;
use tokio::time::MissedTickBehavior;

use super::chunk::ChunkError;
use super::index::Entry;
use super::{Log, chunk, evicted, open};
use crate::storage::StorageError;
use crate::telemetry;

/// How often the storage is looked through for chunks of other replicas.
const FOLLOW: Duration = Duration::from_secs(2);
/// How often retention by age is looked after, what other replicas evicted is noticed, and remains are swept.
pub(super) const UPKEEP: Duration = Duration::from_secs(30);

impl Log {
    /// Takes what other replicas wrote since the last look.
    pub async fn refresh(&self) -> Result<(), StorageError> {
        let asked = Instant::now();
        let newest = self.index().entries().next_back().map(|entry| entry.summary.first_sequence);
        let after = newest.map(open::chunk_name);
        let origin = self.identity.origin();
        for found in self.storage.list(open::CHUNKS, after.as_deref()).await? {
            let Some(first) = open::first_sequence(&found.name) else { continue };
            match open::read_head(&self.storage, &found, first, &origin).await {
                Ok(Some(entry)) if first >= self.extent().next_sequence => self.take(entry),
                Ok(_) => {}
                Err(open::HeadError::Storage(error)) => return Err(error),
                Err(open::HeadError::Chunk(error @ ChunkError::UnknownFormat { .. })) => {
                    // Whoever appends after it finds out, and says so.
                    tracing::debug!(%error, name = %found.name, "a newer replica's chunk");
                    return Ok(());
                }
                Err(open::HeadError::Chunk(error)) => {
                    let end = first.saturating_add(open::most_images(&error, &origin));
                    if first >= self.extent().next_sequence && end <= chunk::SEQUENCES {
                        // Left where it is, it would hide from this daemon's readers whatever comes after it.
                        self.set_aside(first, &error).await;
                    } else {
                        tracing::debug!(%error, name = %found.name, "not a chunk of this log");
                    }
                }
            }
        }
        self.set_looked(asked);
        Ok(())
    }

    /// Lets go of what retention does not keep. Readers of an evicted chunk finish with the bytes they hold. What the
    /// storage does not delete now is tried again with the next call.
    pub async fn retain(&self) -> Result<(), StorageError> {
        let mut evicting = self.evicting.lock().await;
        let victims: Vec<Arc<Entry>> = {
            let mut index = self.index_mut();
            let victims = index.victims(&self.options.retention, SystemTime::now());
            // Out of the index first: no new reader starts on what is about to go.
            victims.into_iter().filter_map(|first| index.evict(first)).collect()
        };
        for victim in &victims {
            self.cache.remove(victim.summary.first_sequence).await;
        }
        evicting.extend(victims.iter().map(|victim| (victim.summary.first_sequence, victim.summary.end())));
        if let (Some((first, _)), Some((_, end))) = (evicting.first_key_value(), evicting.last_key_value()) {
            // On record before anything is gone.
            evicted::record(&self.storage, *first, *end).await?;
        }
        let mut failed = None;
        // Oldest first, so that what a crash leaves has its holes where the log begins.
        for first in evicting.keys().copied().collect::<Vec<_>>() {
            match self.storage.delete(&open::chunk_name(first)).await {
                Ok(()) => {
                    evicting.remove(&first);
                    counter!(telemetry::LOG_EVICTED_CHUNKS).increment(1);
                }
                // One that cannot be deleted must not keep the others; a storage that does not answer is left alone.
                Err(error) => match failed.replace(error) {
                    None => {}
                    Some(_) => break,
                },
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// Follows other replicas, what they append and what they let go of, and looks after retention, until dropped.
    pub async fn upkeep(self: Arc<Self>) {
        let every = |period| {
            let mut interval = tokio::time::interval(period);
            // A storage that was slow for a while is not asked again and again at once.
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
            interval
        };
        let (mut follow, mut upkeep) = (every(FOLLOW), every(UPKEEP));
        loop {
            let done = tokio::select! {
                _ = follow.tick() => self.refresh().await,
                _ = upkeep.tick() => self.tend().await,
            };
            if let Err(error) = done {
                counter!(telemetry::STORAGE_ERRORS, "operation" => "upkeep").increment(1);
                tracing::warn!(%error, "the log's upkeep waits for the storage");
            }
        }
    }

    /// One round of upkeep.
    pub(super) async fn tend(&self) -> Result<(), StorageError> {
        self.storage.sweep().await;
        self.let_go().await?;
        self.retain().await
    }

    /// Takes everything out of the index and the cache that is not in the storage any more and that this daemon did not
    /// evict: another replica did, and hardly one chunk alone. So readers are told where they can really go on.
    pub(super) async fn let_go(&self) -> Result<(), StorageError> {
        let known: Vec<u64> = self.index().entries().map(|entry| entry.summary.first_sequence).collect();
        let found = self.storage.list(open::CHUNKS, None).await?;
        let there: BTreeSet<u64> = found.iter().filter_map(|found| open::first_sequence(&found.name)).collect();
        let gone: Vec<u64> = known.into_iter().filter(|first| !there.contains(first)).collect();
        if gone.is_empty() {
            return Ok(());
        }
        // After the chunks: a damaged chunk is in quarantine, and an evicted one on record, before it is gone from here.
        let quarantine = self.stretches(open::QUARANTINE).await?;
        let damaged: BTreeSet<u64> = quarantine.into_iter().map(|(first, _)| first).collect();
        if there.is_empty() && !gone.iter().all(|first| damaged.contains(first)) {
            // Retention never takes the newest chunk: the folder was emptied, or its disk is not mounted any more.
            return Err(StorageError::Call {
                action: "find",
                name: open::CHUNKS.to_owned(),
                location: self.storage.location().to_owned(),
                problem: "no chunk of the log is there any more".to_owned(),
            });
        }
        let mut records = Vec::new();
        let on_record =
            |records: &[(u64, u64)], first: u64| records.iter().any(|(from, end)| (*from..*end).contains(&first));
        // One look may miss both the old records and the one that they just became.
        for _ in 0..3 {
            records.extend(self.stretches(open::EVICTED).await?);
            if gone.iter().all(|first| damaged.contains(first) || on_record(&records, *first)) {
                break;
            }
        }
        {
            let mut index = self.index_mut();
            for first_sequence in gone.iter().copied() {
                if damaged.contains(&first_sequence) {
                    index.lose(first_sequence);
                } else if on_record(&records, first_sequence) {
                    index.evict(first_sequence);
                } else {
                    let images = index.lose(first_sequence);
                    tracing::error!(first_sequence, images, "a chunk is gone that retention did not let go of");
                }
            }
        }
        for first in gone {
            self.cache.remove(first).await;
        }
        Ok(())
    }

    /// The stretches of images that the names in a folder tell of.
    async fn stretches(&self, folder: &str) -> Result<Vec<(u64, u64)>, StorageError> {
        let found = self.storage.list(folder, None).await?;
        Ok(found.iter().filter_map(|found| open::stretch(folder, &found.name)).collect())
    }
}
