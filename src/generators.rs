//! The fast tier's generator in the daemon's storage, so that a restarted daemon goes on with it rather than warming up
//! again. One immutable object a save, `generators/NUMBER.safetensors`; the newest that is whole counts.

use bytes::Bytes;
use metrics::counter;
use tokio::sync::watch;

use crate::model::checkpoint::Checkpoint;
use crate::storage::{Created, Storage, StorageError, blocking};
use crate::store::{GENERATORS, Object};
use crate::telemetry;

/// This many stay: the newest, and one more should it be damaged.
const KEPT: u64 = 2;

fn name(number: u64) -> String {
    Object::Generator(number).name()
}

async fn numbers(storage: &Storage) -> Result<Vec<u64>, StorageError> {
    let number = |name: &str| match Object::named(name) {
        Some(Object::Generator(number)) => Some(number),
        _ => None,
    };
    Ok(storage.list(GENERATORS, None).await?.iter().filter_map(|found| number(&found.name)).collect())
}

/// What is wrong with a save; None where it is whole.
async fn problem(file: Bytes) -> Option<String> {
    match blocking(move || Checkpoint::parse(file).and_then(|file| file.check_finite())).await {
        Ok(Ok(())) => None,
        Ok(Err(error)) => Some(error.to_string()),
        Err(error) => Some(error),
    }
}

/// The newest generator that is whole.
pub async fn newest(storage: &Storage) -> Result<Option<Bytes>, StorageError> {
    for number in numbers(storage).await?.into_iter().rev() {
        let name = name(number);
        let Some(file) = storage.get(&name).await? else { continue };
        match problem(file.clone()).await {
            None => return Ok(Some(file)),
            Some(problem) => tracing::error!(%name, problem, "a stored generator is damaged, and is not used"),
        }
    }
    Ok(None)
}

/// Reads every stored generator, and says which are damaged: name and problem. Changes nothing.
pub async fn audit(storage: &Storage) -> Result<Vec<(String, String)>, StorageError> {
    let mut damaged = Vec::new();
    for number in numbers(storage).await? {
        let name = name(number);
        // One that is gone since the listing made place for newer ones.
        let Some(file) = storage.get(&name).await? else { continue };
        damaged.extend(problem(file).await.map(|problem| (name, problem)));
    }
    Ok(damaged)
}

/// Stores what comes, newest first, until no more can come. Losing one costs a few batches of learning and no image, so
/// errors are counted and told, and the next save is the next attempt.
pub async fn keep(storage: Storage, mut saved: watch::Receiver<Option<Bytes>>) {
    while saved.changed().await.is_ok() {
        let Some(file) = saved.borrow_and_update().clone() else { continue };
        if let Err(error) = store(&storage, file).await {
            counter!(telemetry::STORAGE_ERRORS, "operation" => "generator").increment(1);
            tracing::warn!(%error, "the generator could not be stored");
        }
    }
}

async fn store(storage: &Storage, file: Bytes) -> Result<(), StorageError> {
    let mut known = numbers(storage).await?;
    let mut next = known.last().map_or(1, |newest| newest + 1);
    // Another replica may take the number.
    while storage.create(&name(next), file.clone()).await? == Created::Taken {
        next += 1;
    }
    known.retain(|number| number + KEPT <= next);
    for number in known {
        storage.delete(&name(number)).await?;
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::model::checkpoint::encode;

    fn file(text: &str) -> Bytes {
        encode(&[], &BTreeMap::from([("text".to_owned(), text.to_owned())])).into()
    }

    #[tokio::test]
    async fn the_newest_whole_one_is_found_and_old_ones_go() {
        let storage = Storage::open("memory:").unwrap();
        assert_eq!(newest(&storage).await.unwrap(), None);
        let (sender, receiver) = watch::channel(None);
        let keeping = tokio::spawn(keep(storage.clone(), receiver));
        for text in ["a", "b", "c"] {
            sender.send_replace(Some(file(text)));
            while newest(&storage).await.unwrap() != Some(file(text)) {
                tokio::task::yield_now().await;
            }
        }
        sender.send_replace(Some(file("last")));
        drop(sender);
        keeping.await.unwrap();
        assert_eq!(newest(&storage).await.unwrap(), Some(file("last")));
        assert_eq!(numbers(&storage).await.unwrap(), [3, 4]);
        storage.create(&name(9), Bytes::from_static(b"torn")).await.unwrap();
        assert_eq!(newest(&storage).await.unwrap(), Some(file("last")));
    }
}
