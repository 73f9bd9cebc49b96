//! What a pruning is told, and what it tells in the end.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;
use tch::Device;

use crate::model::augment::Augmentation;
use crate::model::source::SourceOptions;
use crate::trainers::outputs::Outputs;

/// What is counted until the target is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    /// Floating-point operations of one image, two a multiply-add.
    Flops,
    /// Trainable parameters.
    Parameters,
    /// Output channels of all convolutions.
    Filters,
}

impl Measure {
    /// Its name in flags and lines.
    pub fn name(self) -> &'static str {
        match self {
            Self::Flops => "flops",
            Self::Parameters => "parameters",
            Self::Filters => "filters",
        }
    }
}

/// Where images come from.
#[derive(Clone, Debug)]
pub enum Images {
    /// A daemon, and how long to wait for it at the start.
    Stream {
        /// Its address.
        connect: String,
        /// How long to wait.
        patience: Duration,
    },
    /// Pictures in CIFAR binary format or in an image folder; their labels are not used.
    File(PathBuf),
}

/// Everything a pruning needs to know.
#[derive(Clone, Debug)]
pub struct Options {
    /// The network to prune, which is also the teacher.
    pub model: PathBuf,
    /// How to read it.
    pub source: SourceOptions,
    /// Where images come from.
    pub images: Images,
    /// What the target counts.
    pub measure: Measure,
    /// The part of it to remove, 0..1.
    pub remove: f64,
    /// How much a channel's time counts beside its importance; 0 = not at all.
    pub latency_weight: f64,
    /// Pruning steps.
    pub rounds: u32,
    /// Training steps whose gradients decide each of them.
    pub steps_per_round: u64,
    /// Training steps after the last.
    pub fine_tune_steps: u64,
    /// Images in a training step.
    pub batch_size: usize,
    /// Begin once this many images are there.
    pub min_images: usize,
    /// Images kept to be drawn again.
    pub buffer_images: usize,
    /// The learning rate; after the last removal it falls to zero along half a cosine.
    pub learning_rate: f64,
    /// SGD's momentum.
    pub momentum: f64,
    /// SGD's weight decay.
    pub weight_decay: f64,
    /// T of the distillation loss.
    pub temperature: f64,
    /// Changes to images before each step.
    pub augmentation: Augmentation,
    /// Steps between two pushes of the network; it is pushed after each removal, too.
    pub push_every: u64,
    /// Labelled pictures to measure on.
    pub test_data: Option<PathBuf>,
    /// Where to write the pruned network.
    pub out: Option<PathBuf>,
    /// Where to write the summary.
    pub summary: Option<PathBuf>,
    /// Decides what is drawn.
    pub seed: u64,
    /// Where to train.
    pub device: Device,
}

/// How large, fast and right a network is.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Condition {
    /// Floating-point operations of one image, two a multiply-add.
    pub flops: u64,
    /// Trainable parameters.
    pub parameters: u64,
    /// Output channels of all convolutions.
    pub filters: u64,
    /// Seconds for a forward pass of one batch, measured.
    pub batch_seconds: f64,
    /// On the test pictures, 0..1.
    pub accuracy: Option<f64>,
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { flops, parameters, filters, batch_seconds, accuracy } = self;
        let millions = |count: &u64| *count as f64 / 1e6;
        write!(
            f,
            "{:.1} MFLOPs  {:.3} M parameters  {filters} filters  {:.1} ms a batch",
            millions(flops),
            millions(parameters),
            1e3 * batch_seconds
        )?;
        match accuracy {
            Some(accuracy) => write!(f, "  accuracy {:.2} %", 100.0 * accuracy),
            None => Ok(()),
        }
    }
}

/// What came out.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// The whole network.
    pub before: Condition,
    /// After the last removal.
    pub pruned: Condition,
    /// After fine-tuning.
    pub tuned: Condition,
    /// Training steps made.
    pub steps: u64,
    /// False where a signal ended the pruning early.
    pub complete: bool,
    /// What could not be written.
    #[serde(skip)]
    pub outputs: Outputs,
}
