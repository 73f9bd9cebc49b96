//! What a distillation is told, and what it tells in the end.

use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;
use tch::{Device, Kind};

use crate::model::augment::Augmentation;
use crate::trainers::loss::Loss;
use crate::trainers::outputs::Outputs;

/// How long to train.
#[derive(Clone, Copy, Debug)]
pub enum Budget {
    /// This many steps.
    Steps(u64),
    /// This long, by the clock. A resumed training goes on for what is left.
    Time(Duration),
}

/// Everything a distillation needs to know.
#[derive(Clone, Debug)]
pub struct Options {
    /// The daemon's address.
    pub connect: String,
    /// How long to wait for the daemon at the start.
    pub patience: Duration,
    /// The student's architecture; default: the teacher's.
    pub arch: Option<String>,
    /// Start from the newest student that the daemon holds, where it holds one.
    pub fetch: bool,
    /// How long to train.
    pub budget: Budget,
    /// At most this many steps for each batch received; then wait for the next.
    pub steps_per_batch: Option<u64>,
    /// Begin once this many images are there.
    pub min_images: usize,
    /// Images in a training step.
    pub batch_size: usize,
    /// The learning rate's peak.
    pub learning_rate: f64,
    /// SGD's momentum.
    pub momentum: f64,
    /// SGD's weight decay.
    pub weight_decay: f64,
    /// The part of the moving average of the weights that stays at each step; that average is what is measured and saved.
    /// 0: the weights themselves.
    pub ema: f64,
    /// How far the student's logits are from the teacher's.
    pub loss: Loss,
    /// T of that loss, where it is KL.
    pub temperature: f64,
    /// The weight of the distance from the teacher's feature maps; needs `teacher`. 0: only its logits are
    /// learned.
    pub hint_weight: f64,
    /// The part of the training, from its start, in which each segment of the student learns on its own, from the
    /// teacher's maps; needs `teacher`.
    pub blockwise: f64,
    /// What the student's convolutions compute in.
    pub precision: Kind,
    /// The teacher's own file, to be asked about exactly the pixels that the student sees; otherwise the logits of the
    /// unchanged images, which came with them, are learned.
    pub teacher: Option<PathBuf>,
    /// Changes to images before each step.
    pub augmentation: Augmentation,
    /// Images kept to be drawn again.
    pub buffer_images: usize,
    /// Steps between two pushes of the student.
    pub push_every: u64,
    /// Labelled pictures to measure on.
    pub test_data: Option<PathBuf>,
    /// Steps between two measurements; 0: measure only at the end.
    pub eval_every: u64,
    /// Measure after each of these times, too.
    pub eval_at: Vec<Duration>,
    /// Where to write the student.
    pub out: Option<PathBuf>,
    /// Where to keep the training's state, and to resume from if it is there.
    pub checkpoint: Option<PathBuf>,
    /// Steps between two checkpoints.
    pub checkpoint_every: u64,
    /// Where to write the summary.
    pub summary: Option<PathBuf>,
    /// Where to write a grid of received images.
    pub grid: Option<PathBuf>,
    /// Decides the initial weights and what is drawn.
    pub seed: u64,
    /// Where to train.
    pub device: Device,
}

/// A measured accuracy.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Measurement {
    /// Training steps made.
    pub step: u64,
    /// Wall time since the start of the training, resumed parts included.
    pub seconds: f64,
    /// 0..1.
    pub accuracy: f64,
}

/// What came out.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// Accuracy on the test file at the end, 0..1.
    pub accuracy: Option<f64>,
    /// Every accuracy that was measured.
    pub accuracies: Vec<Measurement>,
    /// Training steps made.
    pub steps: u64,
    /// The mean loss of the last steps.
    pub loss: f64,
    /// Agreement with the teacher's class on the last training batches, 0..1.
    pub agreement: f64,
    /// Images received by this process.
    pub images_received: u64,
    /// Images drawn for training.
    pub images_consumed: u64,
    /// Students that became a version.
    pub student_versions_pushed: u64,
    /// Connections that were lost and made again.
    pub reconnects: u64,
    /// Wall time, resumed parts included.
    pub wall_seconds: f64,
    /// False where a signal ended the training early.
    pub complete: bool,
    /// What could not be written.
    #[serde(skip)]
    pub outputs: Outputs,
}
