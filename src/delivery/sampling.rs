//! Which images of the log are sent again: pure arithmetic on the index, and on the rows of one chunk.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};

use rand::{Rng, RngExt};

use super::policy::{COMPETITION_FLOOR, Sampling};
use crate::log::{Chunk, Entry, Log, News};
use crate::storage::blocking;

/// Images taken from a chunk at one draw. Each image's chance is what the policy says; that some of one message come from
/// the same chunk saves most of the reading.
pub const ROWS_PER_DRAW: usize = 8;

/// The most new chunks that are weighed at once on a thread of the runtime: a few microseconds' work.
const NEWS_AT_ONCE: usize = 256;

/// A chunk that can be drawn.
#[derive(Debug)]
pub struct Candidate {
    /// Which it is.
    pub entry: Arc<Entry>,
    held: Mutex<Weak<Chunk>>,
}

impl Candidate {
    /// The chunk, where somebody still holds it since the last draw: the cache does as a rule, and looking there costs more
    /// than drawing. Nothing is held by this.
    pub fn chunk(&self) -> Option<Arc<Chunk>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).upgrade()
    }

    /// Remembers the chunk for the next draw.
    pub fn remember(&self, chunk: &Arc<Chunk>) {
        *self.held.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(chunk);
    }
}

/// The chunks of a log by weight, for one way to sample and one set of classes. It follows the log: what was appended there
/// is appended here. It is made anew, away from the runtime's threads and while others draw from what it was, only where
/// that does not do: the first time, once an eighth of its chunks is gone, or once recency is measured against a log that
/// has grown by more than a hundredth.
#[derive(Debug)]
pub struct Table {
    sampling: Sampling,
    classes: Option<Arc<BTreeSet<u32>>>,
    weights: RwLock<Weights>,
    /// Held by whoever makes it anew.
    renewing: tokio::sync::Mutex<()>,
}

#[derive(Debug, Default)]
struct Weights {
    candidates: Vec<Arc<Candidate>>,
    /// The sum of the weights up to and with each candidate.
    cumulative: Vec<f64>,
    /// The log's generation that this is of.
    generation: u64,
    /// Behind the newest chunk that was looked at.
    end: u64,
    /// Chunks looked at, also those without a wanted image.
    chunks: u64,
    /// What recency is measured by: the log's end and images when this was made.
    measure: (u64, u64),
}

impl Table {
    /// One that has seen nothing of any log yet.
    pub fn new(sampling: Sampling, classes: Option<Arc<BTreeSet<u32>>>) -> Self {
        Self { sampling, classes, weights: RwLock::default(), renewing: tokio::sync::Mutex::default() }
    }

    fn weights(&self) -> RwLockReadGuard<'_, Weights> {
        self.weights.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn weights_mut(&self) -> RwLockWriteGuard<'_, Weights> {
        self.weights.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Catches up with the log. May be dropped at any time.
    pub async fn follow(self: &Arc<Self>, log: &Arc<Log>) {
        if self.caught_up(log) {
            return;
        }
        let _renewing = self.renewing.lock().await;
        // Another reader may have made it anew meanwhile.
        if !self.caught_up(log) {
            let (this, log) = (self.clone(), log.clone());
            if let Err(problem) = blocking(move || this.renew(&log)).await {
                tracing::error!(problem, "images to replay could not be weighed anew; those known before are drawn");
            }
        }
    }

    /// Takes what was appended; false where the table must be made anew.
    fn caught_up(&self, log: &Log) -> bool {
        if self.weights().generation == log.generation() {
            return true;
        }
        let mut weights = self.weights_mut();
        let news = log.news(weights.end, NEWS_AT_ONCE + 1);
        let gone = (weights.chunks + news.entries.len() as u64).saturating_sub(news.extent.chunks);
        let drift = news.extent.images.abs_diff(weights.measure.1);
        if news.entries.len() > NEWS_AT_ONCE
            || gone > news.extent.chunks / 8
            || self.sampling == Sampling::Recency && drift > weights.measure.1 / 128
        {
            return false;
        }
        weights.take(news, self.sampling, self.classes.as_deref());
        true
    }

    fn renew(&self, log: &Log) {
        let news = log.news(0, usize::MAX);
        let mut weights = Weights { measure: (news.extent.next_sequence, news.extent.images), ..Weights::default() };
        weights.take(news, self.sampling, self.classes.as_deref());
        let before = std::mem::replace(&mut *self.weights_mut(), weights);
        // Not under the lock.
        drop(before);
    }

    /// A chunk, drawn by weight; None where there is nothing to draw. It may be gone from the log since the table last
    /// followed it, and a few that were gone before are drawn, too.
    pub fn draw(&self, random: &mut impl Rng) -> Option<Arc<Candidate>> {
        let weights = self.weights();
        let total = *weights.cumulative.last()?;
        let at = random.random::<f64>() * total;
        let index = weights.cumulative.partition_point(|sum| *sum <= at);
        weights.candidates.get(index.min(weights.candidates.len() - 1)).cloned()
    }
}

impl Weights {
    fn take(&mut self, news: News, sampling: Sampling, classes: Option<&BTreeSet<u32>>) {
        let (next, images) = self.measure;
        let half_life = (images as f64 / 4.0).max(1.0);
        let mut sum = self.cumulative.last().copied().unwrap_or_default();
        self.chunks += news.entries.len() as u64;
        for entry in news.entries {
            self.end = entry.summary.end();
            let weight = chunk_weight(&entry, sampling, classes, next, half_life);
            if weight > 0.0 {
                sum += weight;
                self.candidates.push(Arc::new(Candidate { entry, held: Mutex::default() }));
                self.cumulative.push(sum);
            }
        }
        self.generation = news.generation;
    }
}

/// The sum of the weights of a chunk's wanted images.
fn chunk_weight(
    entry: &Entry,
    sampling: Sampling,
    classes: Option<&BTreeSet<u32>>,
    next_sequence: u64,
    half_life: f64,
) -> f64 {
    let summary = &entry.summary;
    let (count, competition) = match classes {
        None => (f64::from(summary.count), summary.competition),
        Some(wanted) => summary
            .classes
            .iter()
            .filter(|(class, ..)| wanted.contains(class))
            .fold((0.0, 0.0), |(count, sum), (_, n, c)| (count + f64::from(*n), sum + f64::from(*c))),
    };
    match sampling {
        Sampling::Uniform => count,
        Sampling::Recency => {
            let middle = (summary.first_sequence + summary.end()) as f64 / 2.0;
            count * (-(next_sequence as f64 - middle) / half_life).exp2()
        }
        Sampling::Competition => competition + COMPETITION_FLOOR * count,
    }
}

/// `count` rows of a chunk, drawn by weight among those of the wanted classes; none where it has none of them.
///
/// Always the same number, so that an image's chance does not depend on how many others its chunk has. Uniform and
/// recency take neighbours from a random row on and go round at the end: every image's chance is equal, each comes once
/// before any comes twice, and what lies together is copied in one piece. Competition draws with replacement, which alone
/// keeps chances proportional to weights.
pub fn draw_rows(
    chunk: &Chunk,
    sampling: Sampling,
    count: usize,
    classes: Option<&BTreeSet<u32>>,
    random: &mut impl Rng,
) -> Vec<u32> {
    let rows: Vec<u32> = match classes {
        None => (0..chunk.count()).collect(),
        Some(wanted) => {
            let labels = chunk.labels().iter().map(|bytes| i64::from_le_bytes(*bytes));
            let is_wanted = |label: i64| u32::try_from(label).is_ok_and(|class| wanted.contains(&class));
            (0..).zip(labels).filter(|(_, label)| is_wanted(*label)).map(|(row, _)| row).collect()
        }
    };
    if rows.is_empty() {
        return rows;
    }
    match sampling {
        Sampling::Uniform | Sampling::Recency => {
            let start = random.random_range(0..rows.len());
            rows.iter().cycle().skip(start).take(count).copied().collect()
        }
        Sampling::Competition => {
            let competition = chunk.competition();
            let mut sum = 0.0;
            let cumulative: Vec<f64> = rows
                .iter()
                .map(|row| {
                    let value =
                        competition.get(*row as usize).map_or(0.0, |bytes| f64::from(f32::from_le_bytes(*bytes)));
                    sum += value + COMPETITION_FLOOR;
                    sum
                })
                .collect();
            let mut draw = || {
                let at = random.random::<f64>() * sum;
                cumulative.partition_point(|sum| *sum <= at).min(rows.len() - 1)
            };
            (0..count).map(|_| draw()).filter_map(|index| rows.get(index).copied()).collect()
        }
    }
}
