//! What a daemon does for a log that it shares and that must not grow for ever: it takes what other replicas append,
//! notices what they evict, and evicts what retention does not keep.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use metrics::counter;
use tokio::time::MissedTickBehavior;

use super::index::Entry;
use super::{Log, evicted, open};
use crate::storage::{Found, StorageError};
use crate::store::{CHUNKS, FOLDERS};
use crate::telemetry;

/// How often other replicas' chunks are looked for.
const FOLLOW: Duration = Duration::from_secs(2);
/// How often retention by age is looked after, and what other replicas evicted is noticed.
pub(super) const UPKEEP: Duration = Duration::from_secs(30);
/// Of so many rounds of upkeep one lists the whole log, which takes as long as the log is large.
const THOROUGH: u64 = 10;
/// Who has not looked for so long lists the log: another replica may have used the next sequence and evicted it again,
/// before an older chunk if their clocks differ.
const LONG_AGO: Duration = Duration::from_secs(10);

impl Log {
    /// Takes what other replicas wrote since the last look. Where nothing is new this asks for three objects, whatever the
    /// size of the log: its identity, the next chunk, and the newest that is known. While that one is there, the next
    /// cannot have come and gone.
    pub async fn refresh(&self) -> Result<(), StorageError> {
        self.storage.check().await?;
        let long_ago = self.looked().elapsed() > LONG_AGO;
        loop {
            let asked = Instant::now();
            let next = self.extent().next_sequence;
            let newest = self.index().newest();
            let name = open::chunk_name(next);
            let Some(bytes) = self.storage.size(&name).await? else {
                let newest = newest.filter(|_| !long_ago);
                let is_there = match newest.map(open::chunk_name) {
                    Some(name) => self.storage.size(&name).await?.is_some(),
                    None => false,
                };
                if !is_there {
                    return self.relist().await;
                }
                self.set_looked(asked);
                return Ok(());
            };
            if let Some(error) = self.take_found(&Found { name: name.clone(), bytes }, next).await? {
                // Whoever appends after it finds out, and says so.
                tracing::debug!(%error, name, "a newer replica's chunk");
                self.set_looked(asked);
                return Ok(());
            }
            if self.extent().next_sequence == next {
                return self.relist().await;
            }
        }
    }

    /// As [`Self::refresh`], by a list of all that lies behind the newest chunk that is known.
    pub(super) async fn relist(&self) -> Result<(), StorageError> {
        let asked = Instant::now();
        self.storage.check().await?;
        let after = self.index().newest().map(open::chunk_name);
        for found in self.storage.list(CHUNKS, after.as_deref()).await? {
            let Some(first) = open::first_sequence(&found.name) else { continue };
            if let Some(error) = self.take_found(&found, first).await? {
                tracing::debug!(%error, name = %found.name, "a newer replica's chunk");
                return Ok(());
            }
        }
        self.set_looked(asked);
        Ok(())
    }

    /// Evicts what retention does not keep. Readers of an evicted chunk finish with the bytes they hold. What the
    /// storage does not delete now is tried again with the next call.
    pub async fn retain(&self) -> Result<(), StorageError> {
        let mut evicting = self.evicting.lock().await;
        let victims = self.index().victims(&self.options.retention, SystemTime::now());
        if victims.is_empty() && evicting.pending.is_empty() {
            return Ok(());
        }
        // What lies there now may be another log's.
        self.storage.check().await?;
        let victims: Vec<Arc<Entry>> = {
            let mut index = self.index_mut();
            // Out of the index first: no new reader starts on what is about to go.
            victims.into_iter().filter_map(|first| index.evict(first)).collect()
        };
        for victim in &victims {
            self.cache.remove(victim.summary.first_sequence).await;
        }
        let segment = |victim: &Arc<Entry>| (victim.summary.first_sequence, victim.summary.end());
        evicting.pending.extend(victims.iter().map(segment));
        // On record before anything is gone.
        evicting.record(&self.storage).await?;
        let mut failed = None;
        // Oldest first, so that what a crash leaves has its holes where the log begins.
        for first in evicting.pending.keys().copied().collect::<Vec<_>>() {
            match self.storage.delete(&open::chunk_name(first)).await {
                Ok(()) => {
                    evicting.pending.remove(&first);
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

    /// Follows other replicas, what they append and what they evict, and looks after retention, until dropped.
    pub async fn upkeep(self: Arc<Self>) {
        let every = |period| {
            let mut interval = tokio::time::interval(period);
            // A storage that was slow for a while is not asked again and again at once.
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
            interval
        };
        let (mut follow, mut upkeep) = (every(FOLLOW), every(UPKEEP));
        let mut rounds = 0u64;
        loop {
            let done = tokio::select! {
                _ = follow.tick() => match self.refresh().await {
                    Ok(()) => self.storage.prove().await,
                    failed => failed,
                },
                _ = upkeep.tick() => {
                    rounds += 1;
                    self.tend(rounds.is_multiple_of(THOROUGH)).await
                }
            };
            self.looked_at_the_store(&done);
            if let Err(error) = done {
                counter!(telemetry::STORAGE_ERRORS, "operation" => "upkeep").increment(1);
                tracing::warn!(%error, "the log's upkeep waits for the storage");
            }
        }
    }

    /// One round of upkeep; a thorough one looks at everything.
    pub(super) async fn tend(&self, thorough: bool) -> Result<(), StorageError> {
        self.storage.check().await?;
        if thorough {
            self.storage.sweep(&FOLDERS).await?;
            self.relist().await?;
            self.evicting.lock().await.known(&evicted::records(&self.storage).await?);
        }
        if thorough || self.oldest_is_gone().await? {
            self.drop_missing().await?;
        }
        self.retain().await
    }

    /// Whether another replica evicted the log's beginning.
    async fn oldest_is_gone(&self) -> Result<bool, StorageError> {
        let oldest = self.index().oldest(&self.options.retention);
        match oldest.map(open::chunk_name) {
            Some(name) => Ok(self.storage.size(&name).await?.is_none()),
            None => Ok(false),
        }
    }

    /// Takes everything out of the index and the cache that is not in the storage any more and that this daemon did not
    /// evict: another replica did, and hardly one chunk alone. So readers are told where they can really go on.
    pub(super) async fn drop_missing(&self) -> Result<(), StorageError> {
        self.storage.check().await?;
        let known: Vec<u64> = self.index().entries().map(|entry| entry.summary.first_sequence).collect();
        let found = self.storage.list(CHUNKS, None).await?;
        let there: BTreeSet<u64> = found.iter().filter_map(|found| open::first_sequence(&found.name)).collect();
        let gone: Vec<u64> = known.into_iter().filter(|first| !there.contains(first)).collect();
        if gone.is_empty() {
            return Ok(());
        }
        // After the chunks: a damaged chunk is in quarantine, and an evicted one on record, before it is gone from here.
        let quarantine = open::quarantined(&self.storage).await?;
        let damaged: BTreeSet<u64> = quarantine.into_iter().map(|(first, _)| first).collect();
        if there.is_empty() && !gone.iter().all(|first| damaged.contains(first)) {
            // Retention never takes the newest chunk: the folder was emptied, or its disk is not mounted any more.
            return Err(StorageError::Call {
                action: "find",
                name: CHUNKS.to_owned(),
                location: self.storage.location().to_owned(),
                problem: "no chunk of the log is there any more".to_owned(),
            });
        }
        let mut records = Vec::new();
        let on_record =
            |records: &[(u64, u64)], first: u64| records.iter().any(|(from, end)| (*from..*end).contains(&first));
        // One look may miss both the old records and the one that they just became.
        for _ in 0..3 {
            records.extend(evicted::records(&self.storage).await?);
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
                    tracing::error!(first_sequence, images, "a chunk is gone that retention did not evict");
                }
            }
        }
        for first in gone {
            self.cache.remove(first).await;
        }
        Ok(())
    }
}
