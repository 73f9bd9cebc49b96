//! What the log knows of its chunks without reading them: pure bookkeeping, no I/O.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::chunk::Summary;

/// One chunk in the index.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// What its first kilobytes say.
    pub summary: Summary,
    /// The size of the object.
    pub bytes: u64,
}

/// How much is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Retention {
    /// At most this many bytes.
    pub max_bytes: Option<u64>,
    /// At most this many images.
    pub max_images: Option<u64>,
    /// At most this old.
    pub max_age: Option<Duration>,
    /// The first so many images of the log, rounded up to whole chunks, are never evicted.
    pub seed_images: u64,
}

/// What the log holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// The sequence of the oldest image from which a reader can go on to the newest. Images of a protected seed set may
    /// lie before it.
    pub first_sequence: u64,
    /// The sequence that the next image will get.
    pub next_sequence: u64,
    /// Images held, the seed set's included.
    pub images: u64,
    /// Chunks held.
    pub chunks: u64,
    /// Bytes held.
    pub bytes: u64,
    /// The size of the largest chunk that was ever seen.
    pub largest_chunk_bytes: u64,
    /// Images that are lost to damage.
    pub lost_images: u64,
}

/// What lies at a position.
#[derive(Clone, Debug, PartialEq)]
pub enum Located {
    /// This chunk; it may begin before the position.
    Chunk(Arc<Entry>),
    /// Nothing yet: the next image to be made.
    Wait,
    /// The image was evicted.
    Overtaken {
        /// [`Extent::first_sequence`].
        first_sequence: u64,
    },
    /// The image is lost: its chunk is damaged, and in quarantine, or it is missing.
    Lost {
        /// The next sequence behind the damage.
        next_sequence: u64,
    },
    /// The position lies beyond the next image to be made.
    Ahead {
        /// The sequence that the next image will get.
        next_sequence: u64,
    },
}

/// Chunks by first sequence.
#[derive(Debug, Default)]
pub(super) struct Index {
    chunks: BTreeMap<u64, Arc<Entry>>,
    /// The same chunks by when they were made, then by first sequence.
    by_age: BTreeSet<(SystemTime, u64)>,
    /// Damaged segments: first sequence to the one behind.
    lost: BTreeMap<u64, u64>,
    extent: Extent,
    /// Counts the changes, for what is derived from the index.
    generation: u64,
}

impl Index {
    /// The index of a store's chunks, of its damaged segments, and of those that retention evicted.
    pub fn new(entries: Vec<Entry>, lost: Vec<(u64, u64)>, evicted: &[(u64, u64)]) -> Self {
        let mut this = Self::default();
        for (first, end) in lost {
            this.mark_lost(first, end);
        }
        for entry in entries {
            this.put(entry);
        }
        // Backwards from the newest to where retention stopped, which is on record. Any other hole is a loss.
        let mut first = this.extent.next_sequence;
        loop {
            let chunk = this.chunks.range(..first).next_back().map(|(start, entry)| (*start, entry.summary.end()));
            let lost = this.lost.range(..first).next_back().map(|(start, end)| (*start, *end));
            let Some((start, end)) = [chunk, lost].into_iter().flatten().max_by_key(|(_, end)| *end) else { break };
            if end < first {
                if evicted.iter().any(|(from, to)| *from < first && end < *to) {
                    break;
                }
                this.mark_lost(end, first);
            }
            first = start;
        }
        this.extent.first_sequence = first;
        this
    }

    fn put(&mut self, entry: Entry) {
        let summary = &entry.summary;
        self.extent.next_sequence = self.extent.next_sequence.max(summary.end());
        self.extent.bytes += entry.bytes;
        self.extent.images += u64::from(summary.count);
        self.extent.chunks += 1;
        self.extent.largest_chunk_bytes = self.extent.largest_chunk_bytes.max(entry.bytes);
        self.generation += 1;
        self.by_age.insert((summary.created_at, summary.first_sequence));
        self.chunks.insert(summary.first_sequence, Arc::new(entry));
    }

    /// Takes a chunk that follows the newest; false for one that does not, which then is not the log's.
    pub fn append(&mut self, entry: Entry) -> bool {
        let (first, next) = (entry.summary.first_sequence, self.extent.next_sequence);
        if first < next {
            return false;
        }
        if first > next {
            // Another replica went on and evicted what lies between before we looked.
            self.extent.first_sequence = first;
        }
        self.put(entry);
        true
    }

    /// Takes a chunk out. Evicted ones move the log's beginning, unless they are of the seed set.
    fn remove(&mut self, first: u64) -> Option<Arc<Entry>> {
        let entry = self.chunks.remove(&first)?;
        self.by_age.remove(&(entry.summary.created_at, first));
        self.extent.bytes = self.extent.bytes.saturating_sub(entry.bytes);
        self.extent.images = self.extent.images.saturating_sub(u64::from(entry.summary.count));
        self.extent.chunks = self.chunks.len() as u64;
        self.generation += 1;
        Some(entry)
    }

    /// A chunk is gone because of retention, ours or another replica's: so is everything before it but the seed set.
    pub fn evict(&mut self, first: u64) -> Option<Arc<Entry>> {
        let entry = self.remove(first)?;
        self.extent.first_sequence = self.extent.first_sequence.max(entry.summary.end());
        Some(entry)
    }

    /// A chunk turned out to be damaged; the number of its images.
    pub fn lose(&mut self, first: u64) -> u64 {
        if let Some(entry) = self.remove(first) {
            self.mark_lost(first, entry.summary.end());
        }
        self.lost.get(&first).map_or(0, |end| end.saturating_sub(first))
    }

    /// A segment of the log is damaged.
    pub fn mark_lost(&mut self, first: u64, end: u64) {
        let before = self.lost.get(&first).copied().unwrap_or(first);
        // A chunk can be found damaged twice, the second time without its length.
        self.lost.insert(first, end.max(before));
        self.extent.lost_images += end.saturating_sub(before);
        self.extent.next_sequence = self.extent.next_sequence.max(end);
        self.generation += 1;
    }

    /// What lies at a position.
    pub fn locate(&self, position: u64) -> Located {
        let Extent { first_sequence, next_sequence, .. } = self.extent;
        if position == next_sequence {
            return Located::Wait;
        }
        if position > next_sequence {
            return Located::Ahead { next_sequence };
        }
        if let Some((_, entry)) = self.chunks.range(..=position).next_back()
            && entry.summary.end() > position
        {
            return Located::Chunk(entry.clone());
        }
        if position < first_sequence {
            return Located::Overtaken { first_sequence };
        }
        let next_chunk = self.chunks.range(position..).next().map_or(next_sequence, |(first, _)| *first);
        Located::Lost { next_sequence: next_chunk }
    }

    /// The chunks that retention evicts, in order of sequence: whatever is too old, wherever it lies (the clocks of
    /// replicas differ), and then the first ones until the rest fits. The newest always stays: it is also what tells the
    /// next sequence after a restart.
    pub fn victims(&self, retention: &Retention, now: SystemTime) -> Vec<u64> {
        let newest = self.chunks.keys().next_back().copied();
        let protected = |first: u64| first < retention.seed_images || Some(first) == newest;
        let too_old = |made: SystemTime| {
            let age = now.duration_since(made).unwrap_or_default();
            retention.max_age.is_some_and(|most| age > most)
        };
        let old = self.by_age.iter().take_while(|(made, _)| too_old(*made)).map(|(_, first)| *first);
        let mut victims: BTreeSet<u64> = old.filter(|first| !protected(*first)).collect();
        let size = |entry: &Arc<Entry>| (entry.bytes, u64::from(entry.summary.count));
        let less = |(bytes, images): (u64, u64), gone: (u64, u64)| {
            (bytes.saturating_sub(gone.0), images.saturating_sub(gone.1))
        };
        let gone = victims.iter().filter_map(|first| self.chunks.get(first)).map(size);
        let mut held = gone.fold((self.extent.bytes, self.extent.images), less);
        for (first, entry) in &self.chunks {
            let over = retention.max_bytes.is_some_and(|most| held.0 > most)
                || retention.max_images.is_some_and(|most| held.1 > most);
            if !over {
                break;
            }
            if !protected(*first) && victims.insert(*first) {
                held = less(held, size(entry));
            }
        }
        victims.into_iter().collect()
    }

    /// The chunks that begin at or behind a sequence, oldest first.
    pub fn entries_from(&self, sequence: u64) -> impl Iterator<Item = &Arc<Entry>> {
        self.chunks.range(sequence..).map(|(_, entry)| entry)
    }

    /// Whether a chunk that begins there can be read.
    pub fn holds(&self, first_sequence: u64) -> bool {
        self.chunks.contains_key(&first_sequence)
    }

    /// The first of the chunks that retention may take.
    pub fn oldest(&self, retention: &Retention) -> Option<u64> {
        self.chunks.range(retention.seed_images..).next().map(|(first, _)| *first)
    }

    /// The chunk with the highest sequences.
    pub fn newest(&self) -> Option<u64> {
        self.chunks.keys().next_back().copied()
    }

    /// Every chunk, oldest first.
    pub fn entries(&self) -> impl DoubleEndedIterator<Item = &Arc<Entry>> {
        self.chunks.values()
    }

    /// What the log holds.
    pub fn extent(&self) -> Extent {
        self.extent
    }

    /// Grows with every change.
    pub fn generation(&self) -> u64 {
        self.generation
    }
}
