//! Finished batches on their way into the log, and what keeps them from it.

use std::sync::Arc;
use std::time::Duration;

use metrics::counter;
use tokio::sync::watch;

use super::{AppendError, Log};
use crate::storage::StorageError;
use crate::synthesis::batch::DreamBatch;
use crate::telemetry;

/// The pauses between two attempts to store a batch.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

/// What is wrong with a log's storage at present.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Faults {
    /// Why the last attempt to append failed.
    append: Option<String>,
    /// Why the store is not the one that was opened, or was never one that could be written.
    store: Option<String>,
}

impl Faults {
    /// Why nothing can be stored; None where nothing is wrong.
    pub fn reason(&self) -> Option<&str> {
        self.store.as_deref().or(self.append.as_deref())
    }
}

impl Log {
    /// Follows what is wrong with the storage.
    pub fn faults(&self) -> watch::Receiver<Faults> {
        self.faults.subscribe()
    }

    fn set_fault(&self, fault: impl FnOnce(&mut Faults) -> &mut Option<String>, now: Option<String>) -> bool {
        self.faults.send_if_modified(|faults| {
            let fault = fault(faults);
            *fault != now && {
                *fault = now;
                true
            }
        })
    }

    /// What a look at the storage says of whether it is the store that was opened.
    pub(super) fn looked_at_the_store<T>(&self, done: &Result<T, StorageError>) {
        match done {
            Ok(_) => {
                if self.set_fault(|faults| &mut faults.store, None) {
                    tracing::info!("the store is the one that was opened, and can be written");
                }
            }
            Err(error) if matches!(error, StorageError::Replaced { .. }) || !self.storage.is_proven() => {
                if self.set_fault(|faults| &mut faults.store, Some(error.to_string())) {
                    tracing::error!("synthesis waits: {error}");
                }
            }
            // Says nothing of which store it is.
            Err(_) => {}
        }
    }

    /// Appends batches until no more can come. While the storage fails, [`Self::faults`] says why, the batch waits here,
    /// the queue fills and the engine rests: nothing that cost device time is dropped.
    pub async fn take_in(self: Arc<Self>, batches: async_channel::Receiver<DreamBatch>) {
        while let Ok(batch) = batches.recv().await {
            self.store(Arc::new(batch)).await;
            if let Err(error) = self.retain().await {
                counter!(telemetry::STORAGE_ERRORS, "operation" => "upkeep").increment(1);
                tracing::warn!(%error, "an evicted chunk could not be deleted yet");
            }
        }
    }

    /// Tries until the batch is stored, or turns out to be none that can be.
    async fn store(&self, batch: Arc<DreamBatch>) {
        let mut pause = FIRST_PAUSE;
        loop {
            match self.append(&batch).await {
                Ok(sequence) => {
                    tracing::debug!(sequence, "chunk appended");
                    self.looked_at_the_store(&Ok(()));
                    if self.set_fault(|faults| &mut faults.append, None) {
                        tracing::info!("the storage takes images again");
                    }
                    return;
                }
                Err(AppendError::Chunk(error)) => {
                    counter!(telemetry::BATCHES_REFUSED).increment(1);
                    tracing::error!("a batch was dropped: {error}");
                    return;
                }
                Err(AppendError::Storage(error)) => {
                    counter!(telemetry::STORAGE_ERRORS, "operation" => "append").increment(1);
                    self.set_fault(|faults| &mut faults.append, Some(error.to_string()));
                    self.looked_at_the_store::<()>(&Err(error));
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    }
}
