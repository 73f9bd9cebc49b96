//! Images of the log for warm starts. The engine waits for them as for everything: alive, and ready to stop.

use std::fmt;
use std::pin::pin;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::IDLE_HEARTBEAT;
use crate::synthesis::Recalled;

type Read = dyn Fn(usize) -> BoxFuture<'static, Option<Recalled>> + Send + Sync;

/// How the engine gets images of the log, to be optimized further; none where the log has none, or they cannot be read at
/// present.
#[derive(Clone)]
pub struct Recall {
    runtime: Handle,
    read: Arc<Read>,
}

impl fmt::Debug for Recall {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Recall")
    }
}

impl Recall {
    /// By this function, which gets the number of images. Call within a tokio runtime, which does the reading.
    pub fn new(read: impl Fn(usize) -> BoxFuture<'static, Option<Recalled>> + Send + Sync + 'static) -> Self {
        Self { runtime: Handle::current(), read: Arc::new(read) }
    }

    /// Waits for images on a thread of no runtime, calling `beat` meanwhile; None at once where `stop` is cancelled.
    pub(super) fn images(&self, count: usize, stop: &CancellationToken, beat: impl Fn()) -> Option<Recalled> {
        self.runtime.block_on(watched((self.read)(count), stop, beat))
    }
}

async fn watched<T>(
    reading: impl Future<Output = Option<T>>,
    stop: &CancellationToken,
    beat: impl Fn(),
) -> Option<T> {
    let mut reading = pin!(reading);
    loop {
        tokio::select! {
            biased;
            () = stop.cancelled() => return None,
            recalled = &mut reading => return recalled,
            () = tokio::time::sleep(IDLE_HEARTBEAT) => beat(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::future::pending;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn waiting_for_images_beats_and_ends_with_the_stop() {
        let stop = CancellationToken::new();
        let beats = Cell::new(0);
        let beat = || {
            beats.set(beats.get() + 1);
            if beats.get() == 5 {
                stop.cancel();
            }
        };
        assert_eq!(watched(pending::<Option<u8>>(), &stop, beat).await, None);
        assert_eq!(beats.get(), 5);
        let idle = CancellationToken::new();
        assert_eq!(watched(async { Some(7) }, &idle, || ()).await, Some(7));
    }
}
