//! Delivery: what one subscriber gets next. A [`Subscription`] is a position, a policy and a few counters; images stay in
//! the log and its one cache.

mod assemble;
mod audience;
mod demand;
mod policy;
mod sampling;
mod subscription;

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tokio::sync::watch;

use crate::log::Log;
use crate::model::source::Normalization;
use crate::students::Student;
use crate::synthesis::Recalled;

pub use assemble::FORMAT;
use assemble::PixelTables;
pub use audience::{Audience, Lag, Ticket};
pub use demand::{Demand, DemandMode, Reason};
pub use policy::{COMPETITION_FLOOR, PixelFormat, Policy, Replay, Sampling, Shard, Staleness};
pub use sampling::{ROWS_PER_DRAW, Table, draw_rows};
pub use subscription::{End, Message, Subscription};

/// Tables of different policies that are kept; a policy beyond them has its table made anew for each message.
const TABLES: usize = 64;

type TableKey = (Sampling, Option<Arc<BTreeSet<u32>>>);

/// What all subscriptions share.
#[derive(Debug)]
pub struct Delivery {
    log: Arc<Log>,
    pixels: PixelTables,
    students: watch::Receiver<Option<Arc<Student>>>,
    audience: Arc<Audience>,
    tables: Mutex<(u64, HashMap<TableKey, Arc<Table>>)>,
    sent: AtomicU64,
    replayed: AtomicU64,
}

impl Delivery {
    /// Delivery out of a log.
    pub fn new(
        log: Arc<Log>,
        normalization: &Normalization,
        students: watch::Receiver<Option<Arc<Student>>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            log,
            pixels: PixelTables::new(normalization),
            students,
            audience: Arc::default(),
            tables: Mutex::default(),
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

    /// So many images of the log, drawn uniformly, to be optimized further. None where it has none, or they cannot be
    /// read at present.
    pub async fn recall(&self, count: usize) -> Option<Recalled> {
        let mut random = ChaCha8Rng::seed_from_u64(rand::random());
        let drawn_from = self.table(Sampling::Uniform, None).weight() as u64;
        let mut recalled = Recalled { drawn_from, ..Recalled::default() };
        // A chunk that cannot be read is one draw in vain; a log of nothing else ends this.
        for _ in 0..2 * count.div_ceil(ROWS_PER_DRAW) {
            let missing = count - recalled.labels.len();
            if missing == 0 {
                break;
            }
            let drawn = self.table(Sampling::Uniform, None).draw(&mut random).cloned()?;
            let Ok(chunk) = self.log.load(drawn.entry.summary.first_sequence).await else { continue };
            let pixels = self.log.identity().geometry.pixels();
            for row in draw_rows(&chunk, Sampling::Uniform, ROWS_PER_DRAW.min(missing), None, &mut random) {
                let row = row as usize;
                recalled.images.extend_from_slice(chunk.images().get(row * pixels..(row + 1) * pixels)?);
                recalled.labels.push(i64::from_le_bytes(*chunk.labels().get(row)?));
            }
        }
        (recalled.labels.len() == count).then_some(recalled)
    }

    /// The chunks to replay from, by weight.
    fn table(&self, sampling: Sampling, classes: Option<&Arc<BTreeSet<u32>>>) -> Arc<Table> {
        let key = (sampling, classes.cloned());
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        if tables.0 == self.log.generation()
            && let Some(table) = tables.1.get(&key)
        {
            return table.clone();
        }
        let (entries, generation) = self.log.entries();
        if tables.0 != generation {
            *tables = (generation, HashMap::new());
        }
        let table = Arc::new(Table::new(&entries, sampling, classes.map(|classes| &**classes)));
        if tables.1.len() < TABLES {
            tables.1.insert(key, table.clone());
        }
        table
    }
}

#[cfg(test)]
mod tests;
