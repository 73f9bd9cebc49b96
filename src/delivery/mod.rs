//! Delivery: what one subscriber gets next. A [`Subscription`] is a position, a policy and a few counters; images stay in
//! the log and its one cache.

mod assemble;
mod audience;
mod demand;
mod flight;
mod policy;
mod sampling;
mod subscription;

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tokio::sync::watch;

use crate::log::{Log, ReadError};
use crate::model::source::Normalization;
use crate::students::Student;
use crate::synthesis::Recalled;

pub use assemble::FORMAT;
use assemble::PixelTables;
pub use audience::{Audience, Lag, Ticket};
pub use demand::{Demand, DemandMode, Reason};
pub use flight::{Flight, NoRoom, Room};
pub use policy::{COMPETITION_FLOOR, PixelFormat, Policy, Replay, Sampling, Shard, Staleness};
use sampling::{ROWS_PER_DRAW, Table, draw_rows};
pub use subscription::{End, Message, Subscription};

/// The longest that a warm start waits for its images: dreaming from noise is better than waiting for a storage.
const RECALL_PATIENCE: Duration = Duration::from_secs(2);

type TableKey = (Sampling, Option<Arc<BTreeSet<u32>>>);

/// What all subscriptions share.
#[derive(Debug)]
pub struct Delivery {
    log: Arc<Log>,
    pixels: Arc<PixelTables>,
    students: watch::Receiver<Option<Arc<Student>>>,
    audience: Arc<Audience>,
    flight: Arc<Flight>,
    tables: Mutex<HashMap<TableKey, Weak<Table>>>,
    /// For [`Self::recall`].
    uniform: Arc<Table>,
    sent: AtomicU64,
    replayed: AtomicU64,
}

impl Delivery {
    /// Delivery out of a log. Messages of all readers together hold as many bytes as there is room for in `flight`.
    pub fn new(
        log: Arc<Log>,
        normalization: &Normalization,
        students: watch::Receiver<Option<Arc<Student>>>,
        flight: Arc<Flight>,
    ) -> Arc<Self> {
        Arc::new(Self {
            log,
            pixels: Arc::new(PixelTables::new(normalization)),
            students,
            audience: Arc::default(),
            flight,
            tables: Mutex::default(),
            uniform: Arc::new(Table::new(Sampling::Uniform, None)),
            sent: AtomicU64::new(0),
            replayed: AtomicU64::new(0),
        })
    }

    /// The log.
    pub fn log(&self) -> &Arc<Log> {
        &self.log
    }

    /// Who reads it now.
    pub fn audience(&self) -> &Arc<Audience> {
        &self.audience
    }

    /// The memory of messages on their way.
    pub fn flight(&self) -> &Arc<Flight> {
        &self.flight
    }

    /// The newest accepted student version, 0 = none.
    pub fn current_version(&self) -> u64 {
        self.students.borrow().as_ref().map_or(0, |student| student.version)
    }

    /// The share of all images sent so far that were replayed, 0..1.
    pub fn replay_ratio(&self) -> f64 {
        let sent = self.sent.load(Ordering::Relaxed).max(1);
        self.replayed.load(Ordering::Relaxed) as f64 / sent as f64
    }

    /// A subscription that starts with the image at `position`.
    pub fn subscribe(self: &Arc<Self>, position: u64, policy: Policy) -> Subscription {
        Subscription::new(self.clone(), position, policy)
    }

    /// `count` images of the log, drawn uniformly, to be optimized further. None where it has none, or where the storage
    /// does not answer: the first error ends it, and so does `RECALL_PATIENCE`, which is for all reads together.
    pub async fn recall(&self, count: usize) -> Option<Recalled> {
        let end = tokio::time::Instant::now() + RECALL_PATIENCE;
        let mut random = ChaCha8Rng::seed_from_u64(rand::random());
        self.uniform.follow(&self.log).await;
        let mut recalled = Recalled { drawn_from: self.log.extent().images, ..Recalled::default() };
        // A chunk that cannot be read is one draw in vain; a log of nothing else ends this.
        for _ in 0..2 * count.div_ceil(ROWS_PER_DRAW) {
            let missing = count - recalled.labels.len();
            if missing == 0 {
                break;
            }
            let drawn = self.uniform.draw(&mut random)?;
            let load = self.log.load(drawn.entry.summary.first_sequence);
            let chunk = match tokio::time::timeout_at(end, load).await {
                Ok(Ok(chunk)) => chunk,
                Ok(Err(ReadError::Gone | ReadError::Damaged)) => continue,
                Ok(Err(ReadError::Storage(_))) | Err(_) => return None,
            };
            let pixels = self.log.identity().geometry.pixels();
            for row in draw_rows(&chunk, Sampling::Uniform, ROWS_PER_DRAW.min(missing), None, &mut random) {
                let row = row as usize;
                recalled.images.extend_from_slice(chunk.images().get(row * pixels..(row + 1) * pixels)?);
                recalled.labels.push(i64::from_le_bytes(*chunk.labels().get(row)?));
            }
        }
        (recalled.labels.len() == count).then_some(recalled)
    }

    /// The chunks to replay from, by weight; one table for all who sample alike, for as long as one of them does.
    fn table(&self, sampling: Sampling, classes: Option<&Arc<BTreeSet<u32>>>) -> Arc<Table> {
        let key = (sampling, classes.cloned());
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(table) = tables.get(&key).and_then(Weak::upgrade) {
            return table;
        }
        tables.retain(|_, table| table.strong_count() > 0);
        let table = Arc::new(Table::new(sampling, classes.cloned()));
        tables.insert(key, Arc::downgrade(&table));
        table
    }
}

#[cfg(test)]
mod tests;
