//! The newest chunks, in memory, within a byte bound.

use std::collections::VecDeque;
use std::sync::Arc;

use super::{Chunk, Extent, Read};

/// Consecutive chunks, oldest first.
#[derive(Debug)]
pub(super) struct Tail {
    capacity_bytes: u64,
    chunks: VecDeque<Arc<Chunk>>,
    extent: Extent,
}

impl Tail {
    pub fn new(capacity_bytes: u64) -> Self {
        Self { capacity_bytes, chunks: VecDeque::new(), extent: Extent::default() }
    }

    /// Appends the chunk that follows the last one, and lets the oldest go until the rest fits. The newest always stays:
    /// a bound smaller than one chunk must not leave a log in which nothing can ever be read.
    pub fn push(&mut self, chunk: Arc<Chunk>) {
        self.extent.next_sequence = chunk.end();
        self.extent.bytes += chunk.payload.len() as u64;
        self.chunks.push_back(chunk);
        while self.extent.bytes > self.capacity_bytes && self.chunks.len() > 1 {
            if let Some(oldest) = self.chunks.pop_front() {
                self.extent.bytes -= oldest.payload.len() as u64;
                self.extent.first_sequence = oldest.end();
                self.extent.evicted_chunks += 1;
            }
        }
        self.extent.chunks = self.chunks.len() as u64;
    }

    /// The chunk that holds the image at `position`; it may begin before it.
    pub fn read(&self, position: u64) -> Read {
        let Extent { first_sequence, next_sequence, .. } = self.extent;
        if position < first_sequence {
            return Read::Overtaken { first_sequence };
        }
        if position > next_sequence {
            return Read::Ahead { next_sequence };
        }
        let index = self.chunks.partition_point(|chunk| chunk.end() <= position);
        self.chunks.get(index).map_or(Read::Wait, |chunk| Read::Chunk(chunk.clone()))
    }

    pub fn extent(&self) -> Extent {
        self.extent
    }
}
