//! A training's state in a file: weights, momentum, the moving average, and where in the log it stood.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};

use super::teacher::TeacherFacts;
use crate::model::checkpoint::Checkpoint;
use crate::model::spec::NetworkSpec;
use crate::model::trainable::Metadata;
use crate::trainers::feed::From;
use crate::trainers::progress::State;
use crate::trainers::{average, sgd};

/// An interrupted training.
pub(super) struct Saved {
    path: PathBuf,
    /// Every tensor of it.
    pub checkpoint: Checkpoint,
}

impl Saved {
    /// None where there is no such file.
    pub fn open(path: &Path) -> anyhow::Result<Option<Self>> {
        if !path.exists() {
            return Ok(None);
        }
        let checkpoint = Checkpoint::open(path).with_context(|| format!("cannot resume from {}", path.display()))?;
        Ok(Some(Self { path: path.to_owned(), checkpoint }))
    }

    fn number(&self, key: &str) -> f64 {
        self.checkpoint.metadata().get(key).and_then(|text| text.parse::<f64>().ok()).unwrap_or_default()
    }

    /// Steps made, images consumed, and whether the student still learned block by block.
    pub fn state(&self) -> State {
        let blockwise = self.checkpoint.metadata().get("blockwise").is_some_and(|text| text == "true");
        let (step, consumed) = (self.number("step") as u64, self.number("consumed") as u64);
        State { step, consumed, blockwise, ..State::default() }
    }

    /// Wall time before the first step; None where none was made. An older file does not tell it.
    pub fn waited(&self) -> Option<Duration> {
        let Some(seconds) = self.checkpoint.metadata().get("waited_seconds") else { return Some(Duration::ZERO) };
        Duration::try_from_secs_f64(seconds.parse().ok()?).ok()
    }

    /// Wall time so far.
    pub fn elapsed(&self) -> Duration {
        Duration::from_secs_f64(self.number("seconds").clamp(0.0, 1e9))
    }

    /// Where the stream goes on: at the very next image, after those that the buffer of `buffer_images` held.
    pub fn from(&self, buffer_images: u64) -> From {
        let metadata = self.checkpoint.metadata();
        let sequence = metadata.get("position").and_then(|text| text.parse().ok()).filter(|sequence| *sequence > 0);
        match (metadata.get("log_id"), sequence) {
            (Some(log_id), Some(sequence)) => {
                From::Position { log_id: log_id.clone(), sequence, before: buffer_images }
            }
            _ => From::Newest(buffer_images),
        }
    }

    /// The network in it alone, and what that is.
    pub fn network(&self, arch: Option<&str>, facts: &TeacherFacts) -> anyhow::Result<(Checkpoint, NetworkSpec)> {
        let path = self.path.display();
        let ours = |name: &str| !name.starts_with(sgd::PREFIX) && !name.starts_with(average::PREFIX);
        let network = self.checkpoint.only(ours);
        let known = self.checkpoint.metadata().get("arch").map(String::as_str);
        if let (Some(arch), Some(known)) = (arch, known)
            && arch != known
        {
            bail!("cannot resume from {path}: it is the training of a {known}, not of a {arch}");
        }
        let spec = NetworkSpec::from_checkpoint(known.or(arch).unwrap_or(&facts.arch), &network)
            .with_context(|| format!("cannot resume from {path}"))?;
        if spec.in_channels != facts.geometry.channels || spec.num_classes < facts.num_classes {
            bail!("cannot resume from {path}: its network does not fit this teacher's images and classes");
        }
        eprintln!("distill: resuming {path} at step {}", self.number("step"));
        Ok((network, spec))
    }
}

/// What [`Saved`] reads back, beside the tensors.
pub(super) fn metadata(
    network: Metadata,
    state: &State,
    (elapsed, waited): (Duration, Option<Duration>),
    log_id: &str,
    position: u64,
) -> Metadata {
    network
        .with("step", state.step)
        .with("consumed", state.consumed)
        .with("blockwise", state.blockwise)
        .with("seconds", elapsed.as_secs_f64())
        .with("waited_seconds", waited.map_or_else(String::new, |waited| waited.as_secs_f64().to_string()))
        .with("log_id", log_id)
        .with("position", position)
}
