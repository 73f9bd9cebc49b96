//! Which images of the log are sent again: pure arithmetic on the index, and on the rows of one chunk.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use rand::{Rng, RngExt};

use super::policy::{COMPETITION_FLOOR, Sampling};
use crate::log::{Chunk, Entry};

/// Images taken from a chunk at one draw. Each image's chance is what the policy says; that some of one message come from
/// the same chunk saves most of the reading.
pub const ROWS_PER_DRAW: usize = 8;

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

/// Chunks by weight.
#[derive(Debug, Default)]
pub struct Table {
    chunks: Vec<Arc<Candidate>>,
    /// The sum of the weights up to and with each chunk.
    cumulative: Vec<f64>,
}

impl Table {
    /// The chunks that hold at least one wanted image, oldest first.
    pub fn new(entries: &[Arc<Entry>], sampling: Sampling, classes: Option<&BTreeSet<u32>>) -> Self {
        let next = entries.last().map_or(0, |entry| entry.summary.end());
        let images: u64 = entries.iter().map(|entry| u64::from(entry.summary.count)).sum();
        let half_life = (images as f64 / 4.0).max(1.0);
        let mut table = Self::default();
        let mut sum = 0.0;
        for entry in entries {
            let weight = chunk_weight(entry, sampling, classes, next, half_life);
            if weight > 0.0 {
                sum += weight;
                table.chunks.push(Arc::new(Candidate { entry: entry.clone(), held: Mutex::default() }));
                table.cumulative.push(sum);
            }
        }
        table
    }

    /// Whether there is nothing to draw.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// The sum of all weights: where sampling is uniform, the number of wanted images.
    pub fn weight(&self) -> f64 {
        self.cumulative.last().copied().unwrap_or_default()
    }

    /// A chunk, drawn by weight.
    pub fn draw(&self, random: &mut impl Rng) -> Option<&Arc<Candidate>> {
        let total = *self.cumulative.last()?;
        let at = random.random::<f64>() * total;
        let index = self.cumulative.partition_point(|sum| *sum <= at);
        self.chunks.get(index.min(self.chunks.len() - 1))
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
