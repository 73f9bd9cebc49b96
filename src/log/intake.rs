//! Finished batches on their way into the log.

use std::sync::Arc;
use std::time::Duration;

use metrics::counter;
use tokio::sync::watch;

use super::{AppendError, Log};
use crate::synthesis::batch::DreamBatch;
use crate::telemetry;

/// The pauses between two attempts to store a batch.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);

impl Log {
    /// Appends batches until no more can come. While the storage fails, `fault` says why, the batch waits here, the queue
    /// fills and the engine rests: nothing that cost device time is dropped.
    pub async fn take_in(
        self: Arc<Self>,
        batches: async_channel::Receiver<DreamBatch>,
        fault: watch::Sender<Option<String>>,
    ) {
        while let Ok(batch) = batches.recv().await {
            self.store(Arc::new(batch), &fault).await;
            if let Err(error) = self.retain().await {
                counter!(telemetry::STORAGE_ERRORS, "operation" => "upkeep").increment(1);
                tracing::warn!(%error, "an evicted chunk could not be deleted yet");
            }
        }
    }

    /// Tries until the batch is stored, or turns out to be none that can be.
    async fn store(&self, batch: Arc<DreamBatch>, fault: &watch::Sender<Option<String>>) {
        let mut pause = FIRST_PAUSE;
        loop {
            match self.append(&batch).await {
                Ok(sequence) => {
                    tracing::debug!(sequence, "chunk appended");
                    if fault.send_replace(None).is_some() {
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
                    fault.send_replace(Some(error.to_string()));
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
    }
}
