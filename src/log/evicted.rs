//! What retention let go of, on record: a stretch is written down before its chunks are deleted. So a hole in the log that
//! no record covers is a loss, and whoever looks at a log from outside can tell the two apart.

use bytes::Bytes;

use super::open::{EVICTED, evicted_name, stretch};
use crate::storage::{Storage, StorageError};

/// Records that the images from `first` to before `end` are let go. Records that touch become one, so there is one for
/// the whole log unless damage or a changed seed set lies between.
pub(super) async fn record(storage: &Storage, first: u64, end: u64) -> Result<(), StorageError> {
    let (mut all, mut merged) = ((first, end), Vec::new());
    for found in storage.list(EVICTED, None).await? {
        let Some(old) = stretch(EVICTED, &found.name) else { continue };
        if old.0 <= all.1 && all.0 <= old.1 {
            all = (all.0.min(old.0), all.1.max(old.1));
            merged.push(found.name);
        }
    }
    let name = evicted_name(all.0, all.1);
    // A name that is taken says the same. The old records go only once the new one is durable.
    storage.create(&name, Bytes::new()).await?;
    for old in merged.iter().filter(|old| **old != name) {
        storage.delete(old).await?;
    }
    Ok(())
}
