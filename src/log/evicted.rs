//! What retention evicted, on record: a segment is written down before its chunks are deleted. So a hole in the log that
//! no record covers is a loss, and whoever looks at a log from outside can tell the two apart.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use bytes::Bytes;

use crate::storage::{Storage, StorageError};
use crate::store::{EVICTED, Object};

/// What this daemon evicted and has yet to delete, and the records that it knows.
#[derive(Debug, Default)]
pub(super) struct Evicting {
    /// Chunks that the storage still holds: first sequence to the one behind.
    pub pending: BTreeMap<u64, u64>,
    /// Segments on record, by first sequence and end. Other replicas write and merge records too, so some of these may be
    /// gone, each within a larger one.
    records: BTreeSet<(u64, u64)>,
}

impl Evicting {
    pub fn new(records: &[(u64, u64)]) -> Self {
        Self { pending: BTreeMap::new(), records: records.iter().copied().collect() }
    }

    /// Puts on record what is pending. Records that touch become one, so there is one for the whole log unless something
    /// that is kept, or damage, lies between.
    pub async fn record(&mut self, storage: &Storage) -> Result<(), StorageError> {
        for (first, end) in merged(self.pending.iter().map(|(first, end)| (*first, *end))) {
            let (mut all, mut old) = ((first, end), Vec::new());
            for record in self.records.iter().copied() {
                if record.0 <= all.1 && all.0 <= record.1 {
                    all = (all.0.min(record.0), all.1.max(record.1));
                    old.push(record);
                }
            }
            if self.records.contains(&all) {
                continue;
            }
            // A name that is taken says the same. The old records go only once the new one is durable.
            storage.create(&name(all), Bytes::new()).await?;
            self.records.insert(all);
            for record in old {
                storage.delete(&name(record)).await?;
                self.records.remove(&record);
            }
        }
        Ok(())
    }

    /// Takes the records that lie in the storage for those that there are.
    pub fn known(&mut self, records: &[(u64, u64)]) {
        self.records = records.iter().copied().collect();
    }
}

fn name((first, end): (u64, u64)) -> String {
    Object::Evicted(first..end).name()
}

/// The segments on record.
pub(super) async fn records(storage: &Storage) -> Result<Vec<(u64, u64)>, StorageError> {
    let record = |name: &str| match Object::named(name) {
        Some(Object::Evicted(Range { start, end })) => Some((start, end)),
        _ => None,
    };
    Ok(storage.list(EVICTED, None).await?.iter().filter_map(|found| record(&found.name)).collect())
}

/// Segments in their order, those that touch or overlap made one.
pub(super) fn merged(segments: impl Iterator<Item = (u64, u64)>) -> Vec<(u64, u64)> {
    let mut sorted: Vec<(u64, u64)> = segments.collect();
    sorted.sort_unstable();
    let mut merged: Vec<(u64, u64)> = Vec::new();
    for (first, end) in sorted {
        match merged.last_mut() {
            Some(last) if first <= last.1 => last.1 = last.1.max(end),
            _ => merged.push((first, end)),
        }
    }
    merged
}
