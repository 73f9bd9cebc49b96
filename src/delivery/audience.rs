//! Who reads the log now, and how far behind: what demand for fresh images is decided by.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Every open subscription.
#[derive(Debug, Default)]
pub struct Audience {
    seats: Mutex<HashMap<u64, Seat>>,
    next: AtomicU64,
}

#[derive(Debug)]
struct Seat {
    position: Arc<AtomicU64>,
    wants_fresh: bool,
}

/// A subscription's place; it is left when dropped.
#[derive(Debug)]
pub struct Ticket {
    audience: Arc<Audience>,
    id: u64,
    position: Arc<AtomicU64>,
}

/// How far behind the readers of fresh images are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lag {
    /// Readers that want fresh images.
    pub readers: usize,
    /// Images that the foremost of them has not read yet.
    pub min: u64,
    /// Images that the hindmost of them has not read yet.
    pub max: u64,
}

impl Audience {
    /// Takes a place at a position.
    pub fn join(self: &Arc<Self>, position: u64, wants_fresh: bool) -> Ticket {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let position = Arc::new(AtomicU64::new(position));
        let seat = Seat { position: position.clone(), wants_fresh };
        self.seats.lock().unwrap_or_else(PoisonError::into_inner).insert(id, seat);
        Ticket { audience: self.clone(), id, position }
    }

    /// How far behind the readers of fresh images are when the log ends at `next_sequence`.
    pub fn lag(&self, next_sequence: u64) -> Lag {
        let seats = self.seats.lock().unwrap_or_else(PoisonError::into_inner);
        let lags = seats
            .values()
            .filter(|seat| seat.wants_fresh)
            .map(|seat| next_sequence.saturating_sub(seat.position.load(Ordering::Relaxed)));
        Lag { readers: lags.clone().count(), min: lags.clone().min().unwrap_or(0), max: lags.max().unwrap_or(0) }
    }
}

impl Ticket {
    /// The subscription has read everything before this.
    pub fn move_to(&self, position: u64) {
        self.position.store(position, Ordering::Relaxed);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.audience.seats.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}
