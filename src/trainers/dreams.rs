//! Dreams for trainers that have the daemon's teacher at hand: received, kept, and drawn again.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use rand_chacha::ChaCha8Rng;
use tch::Device;

use crate::model::source::NetworkSource;
use crate::trainers::feed::{Feed, From, Snapshot};
use crate::trainers::replay::{Drawn, ReplayBuffer};

/// How long to wait for a batch before looking around again.
const WAIT: Duration = Duration::from_millis(200);
/// While dreams are too few, a line says so this often.
const SAY_EVERY: Duration = Duration::from_secs(10);
/// How long the last push may take.
const LAST_PUSH: Duration = Duration::from_secs(2);

/// A daemon's stream, and a buffer of what came of it.
#[derive(Debug)]
pub struct Dreams {
    feed: Feed,
    buffer: ReplayBuffer,
    min_images: usize,
    trainer: &'static str,
    said: Instant,
}

impl Dreams {
    /// Connects to a daemon, which must dream from the network `source`, read from `model`. Images are drawn once
    /// `min_images` are there; the newest `buffer_images` are kept.
    pub fn open(
        trainer: &'static str,
        connect: &str,
        patience: Duration,
        (model, source): (&Path, &NetworkSource),
        (min_images, buffer_images): (usize, usize),
        device: Device,
    ) -> anyhow::Result<Self> {
        let feed = Feed::connect(connect, patience, From::Newest(buffer_images as u64))?;
        let teacher = feed.description().teacher.clone().context("Describe names no teacher")?;
        if teacher.sha256 != source.identity {
            let short = |sha256: &str| sha256.chars().take(12).collect::<String>();
            bail!(
                "the daemon dreams from the network {}, but {} is {}; give --model the daemon's teacher",
                short(&teacher.sha256),
                model.display(),
                short(&source.identity)
            );
        }
        let g = source.geometry;
        let shape = [g.channels, g.height, g.width];
        let buffer = ReplayBuffer::new(buffer_images, shape, source.spec.num_classes, device);
        Ok(Self { feed, buffer, min_images: min_images.max(1), trainer, said: Instant::now() })
    }

    /// What the feed has seen so far.
    pub fn feed(&self) -> &Feed {
        &self.feed
    }

    /// Images for a step; None, after a moment, where there are not enough yet.
    pub fn draw(&mut self, count: usize, rng: &mut ChaCha8Rng) -> anyhow::Result<Option<Drawn>> {
        while let Some(batch) = self.feed.try_next()? {
            self.buffer.push(&batch)?;
        }
        if self.buffer.len() < self.min_images {
            if let Some(batch) = self.feed.next(WAIT)? {
                self.buffer.push(&batch)?;
            }
            if self.said.elapsed() >= SAY_EVERY {
                self.said = Instant::now();
                let (trainer, held, wanted) = (self.trainer, self.buffer.len(), self.min_images);
                eprintln!("{trainer}: waiting for dreams: {held} of the {wanted} to begin with (--min-images)");
            }
            return Ok(None);
        }
        Ok(Some(self.buffer.draw(count, rng)))
    }

    /// Pushes weights in the background.
    pub fn push(&self, snapshot: Snapshot) {
        self.feed.push(snapshot);
    }

    /// Pushes the final weights and waits a moment for it; says so where they did not arrive.
    pub fn push_last(&self, snapshot: Snapshot) {
        if let Err(error) = self.feed.push_and_wait(snapshot, LAST_PUSH) {
            eprintln!("{}: the final network was not pushed: {error}", self.trainer);
        }
    }
}
