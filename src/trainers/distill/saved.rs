//! A training's state in a file: weights, momentum, the moving average, and where in the log it stood.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use sha2::{Digest, Sha256};

use super::teacher::TeacherFacts;
use crate::model::checkpoint::{Checkpoint, hex};
use crate::model::spec::NetworkSpec;
use crate::model::trainable::Metadata;
use crate::trainers::feed::From;
use crate::trainers::progress::State;
use crate::trainers::{average, sgd};

/// The key of the checksum: SHA-256 of the whole file, with zeros in place of these 64 digits.
const CHECKSUM: &str = "file_sha256";
const NO_CHECKSUM: &str = "0000000000000000000000000000000000000000000000000000000000000000";

/// An interrupted training.
pub(super) struct Saved {
    path: PathBuf,
    /// Every tensor of it.
    pub checkpoint: Checkpoint,
    state: State,
    elapsed: Duration,
    waited: Option<Duration>,
    position: Option<u64>,
}

impl Saved {
    /// None where there is no such file.
    pub fn open(path: &Path) -> anyhow::Result<Option<Self>> {
        let context = || format!("cannot resume from {}", path.display());
        if !path.try_exists().with_context(context)? {
            return Ok(None);
        }
        let checkpoint = Checkpoint::open(path).with_context(context)?;
        Self::read(path, checkpoint).map(Some).with_context(context)
    }

    fn read(path: &Path, checkpoint: Checkpoint) -> anyhow::Result<Self> {
        let metadata = checkpoint.metadata();
        let text = |key: &str| metadata.get(key).map(String::as_str);
        // Files of before have none.
        if let Some(told) = text(CHECKSUM)
            && checksum(checkpoint.bytes()).as_deref() != Some(told)
        {
            bail!("it is damaged: its checksum does not match; remove it, or give --checkpoint another path");
        }
        let Some(step) = text("step") else {
            bail!("it is not the checkpoint of a training; give --checkpoint another path");
        };
        let whole = |key: &str, text: &str| text.parse::<u64>().map_err(|_| senseless(key, text));
        let seconds = |key: &str, text: &str| {
            let seconds = text.parse().ok().filter(|seconds| *seconds <= 1e9);
            seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()).ok_or_else(|| senseless(key, text))
        };
        let state = State {
            step: whole("step", step)?,
            consumed: whole("consumed", text("consumed").unwrap_or("0"))?,
            blockwise: text("blockwise") == Some("true"),
            ..State::default()
        };
        Ok(Self {
            path: path.to_owned(),
            state,
            elapsed: seconds("seconds", text("seconds").unwrap_or("0"))?,
            // An older file does not tell it.
            waited: match text("waited_seconds") {
                Some("") => None,
                text => Some(seconds("waited_seconds", text.unwrap_or("0"))?),
            },
            position: text("position").map(|text| whole("position", text)).transpose()?,
            checkpoint,
        })
    }

    /// Steps made, images consumed, and whether the student still learned block by block.
    pub fn state(&self) -> State {
        self.state
    }

    /// Wall time before the first step; None where none was made.
    pub fn waited(&self) -> Option<Duration> {
        self.waited
    }

    /// Wall time so far.
    pub fn elapsed(&self) -> Duration {
        self.elapsed
    }

    /// Where the stream goes on: at the very next image, after those that the buffer of `buffer_images` held.
    pub fn from(&self, buffer_images: u64) -> From {
        let sequence = self.position.filter(|sequence| *sequence > 0);
        match (self.checkpoint.metadata().get("log_id"), sequence) {
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
        eprintln!("distill: resuming {path} at step {}", self.state.step);
        Ok((network, spec))
    }
}

fn senseless(key: &str, text: &str) -> anyhow::Error {
    anyhow!("its {key} is {text:?}, which makes no sense; remove it, or give --checkpoint another path")
}

/// A file with [`metadata`] in it, with its checksum.
pub(super) fn sealed(mut file: Vec<u8>) -> Vec<u8> {
    if let (Some(checksum), Some(digits)) = (checksum(&file), digits(&file)) {
        file[digits].copy_from_slice(checksum.as_bytes());
    }
    file
}

fn checksum(file: &[u8]) -> Option<String> {
    let digits = digits(file)?;
    let mut hash = Sha256::new();
    for part in [&file[..digits.start], NO_CHECKSUM.as_bytes(), &file[digits.end..]] {
        hash.update(part);
    }
    Some(hex(&hash.finalize()))
}

/// Where the checksum stands in a file.
fn digits(file: &[u8]) -> Option<Range<usize>> {
    let key = format!("\"{CHECKSUM}\":\"");
    let header = usize::try_from(u64::from_le_bytes(*file.first_chunk()?)).ok()?.checked_add(8)?;
    let start = file.get(..header)?.windows(key.len()).position(|part| part == key.as_bytes())? + key.len();
    (start + NO_CHECKSUM.len() <= header).then_some(start..start + NO_CHECKSUM.len())
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
        .with(CHECKSUM, NO_CHECKSUM)
}
