//! Memory of messages on their way to readers, over all of them: what a slow reader holds is bounded by all that slow
//! readers may hold together.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// How long a reader waits for room.
const PATIENCE: Duration = Duration::from_secs(30);
/// Bytes are counted in these.
const UNIT: u64 = 1 << 10;

/// The bytes of messages in flight. A quarter of them is divided among the readers: a message that fits into a reader's
/// share never waits for others. What is beyond comes out of the rest, first come, first served.
#[derive(Debug)]
pub struct Flight {
    capacity: u64,
    /// Of one message.
    share: u64,
    rest: Arc<Semaphore>,
    rest_units: u32,
    bytes: AtomicU64,
}

/// There was no room for a message of this many bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoRoom {
    /// The message's.
    pub bytes: u64,
    /// Of all messages together.
    pub capacity: u64,
}

impl Flight {
    /// At most `capacity` bytes at one time, shared by up to this many `messages`.
    pub fn new(capacity: u64, messages: usize) -> Arc<Self> {
        let share = capacity / 4 / messages.max(1) as u64;
        let rest_units = u32::try_from((capacity - capacity / 4) / UNIT).unwrap_or(u32::MAX);
        let rest = Arc::new(Semaphore::new(rest_units as usize));
        Arc::new(Self { capacity, share, rest, rest_units, bytes: AtomicU64::new(0) })
    }

    /// Bytes in flight now.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// The bound on them.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Room for a message of this size, waiting for it. May be dropped at any time.
    pub async fn room(self: &Arc<Self>, bytes: u64) -> Result<Room, NoRoom> {
        let beyond = bytes.saturating_sub(self.share).div_ceil(UNIT);
        // A message that is larger than all the room goes out alone.
        let units = u32::try_from(beyond).unwrap_or(u32::MAX).min(self.rest_units);
        let permit = match units {
            0 => None,
            _ => {
                let wait = self.rest.clone().acquire_many_owned(units);
                let permit = tokio::time::timeout(PATIENCE, wait).await.ok().and_then(Result::ok);
                Some(permit.ok_or(NoRoom { bytes, capacity: self.capacity })?)
            }
        };
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        Ok(Room { flight: self.clone(), bytes, _permit: permit })
    }
}

/// Room for one message, until this is dropped.
#[derive(Debug)]
pub struct Room {
    flight: Arc<Flight>,
    bytes: u64,
    _permit: Option<OwnedSemaphorePermit>,
}

impl Drop for Room {
    fn drop(&mut self) {
        self.flight.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

struct Held {
    payload: Bytes,
    _room: Room,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.payload
    }
}

impl Room {
    /// The same bytes, which keep the room for as long as anybody holds them: until the transport has sent them.
    pub fn hold(self, payload: Bytes) -> Bytes {
        Bytes::from_owner(Held { payload, _room: self })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_share_is_everybodys_and_the_rest_is_for_the_first() {
        let flight = Flight::new(1 << 20, 16);
        assert_eq!((flight.capacity(), flight.share), (1 << 20, 16 << 10));
        let payload = Bytes::from(vec![7u8; 700 << 10]);
        let large = flight.room(700 << 10).await.unwrap().hold(payload.clone());
        assert_eq!((large.as_ptr(), flight.bytes()), (payload.as_ptr(), 700 << 10));
        // A second one has no room, and says so in the end.
        assert_eq!(flight.room(700 << 10).await.unwrap_err(), NoRoom { bytes: 700 << 10, capacity: 1 << 20 });
        // Small ones never wait.
        let small: Vec<Room> = futures_util::future::join_all((0..16).map(|_| flight.room(16 << 10)))
            .await
            .into_iter()
            .map(Result::unwrap)
            .collect();
        assert!(flight.bytes() <= flight.capacity());
        // A slice keeps the room as the whole does.
        let slice = large.slice(1..2);
        drop(large);
        let waiting = tokio::spawn({
            let flight = flight.clone();
            async move { flight.room(u64::MAX).await.map(drop) }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(slice);
        waiting.await.unwrap().unwrap();
        drop(small);
        assert_eq!(flight.bytes(), 0);
    }
}
