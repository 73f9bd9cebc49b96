//! What a continual training is told, and what it tells in the end.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;
use serde::Serialize;
use tch::Device;

use crate::model::augment::Augmentation;
use crate::model::source::SourceOptions;
use crate::model::trainable::Statistics;
use crate::trainers::outputs::Outputs;

/// How the old classes are kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// KL to the teacher on dreams, over old and new outputs; cross-entropy on the real images; KL of the old outputs on
    /// those (Yin et al. 2020, §3.4).
    #[default]
    Deepinversion,
    /// Always Be Dreaming (Smith et al. 2021): cross-entropy of the new outputs alone on the real images, cross-entropy of
    /// the head alone on both, and the squared distance of the features on both, seen through the old head.
    Abd,
    /// Learning without forgetting, multi-class (LwF.MC in Rebuffi et al. 2017): each output on its own against its label,
    /// or against the teacher's for old ones, on the real images alone.
    LwfMc,
    /// Cross-entropy on the real images alone: what happens when nothing is done about forgetting.
    Finetune,
}

impl Method {
    /// Whether it takes dreams.
    pub fn dreams(self) -> bool {
        matches!(self, Self::Deepinversion | Self::Abd)
    }

    /// What the distance from the teacher counts beside cross-entropy, by default.
    pub fn teacher_weight(self) -> f64 {
        if self == Self::Abd { 0.1 } else { 1.0 }
    }
}

/// Where dreams come from.
#[derive(Clone, Debug)]
pub enum Source {
    /// A daemon that dreams from the model already, and how long to wait for it. Only one task can be learned.
    Connect(String, Duration),
    /// A daemon of the training's own for each task, with these further flags of `dreamfeed serve`.
    Own(Vec<String>),
}

/// Everything a continual training needs to know.
#[derive(Clone, Debug)]
pub struct Options {
    /// The network that knows the old classes: the first teacher.
    pub model: PathBuf,
    /// How to read it.
    pub source: SourceOptions,
    /// Where dreams come from.
    pub dreams: Source,
    /// Real pictures of the new classes, in CIFAR binary format or in an image folder. Those of other classes are passed over.
    pub data: PathBuf,
    /// The classes of each task, as the data names them; none: all that the model does not know, as one task.
    pub tasks: Vec<Vec<String>>,
    /// How the old classes are kept.
    pub method: Method,
    /// Training steps a task.
    pub steps: u64,
    /// Real images in a step.
    pub batch_size: usize,
    /// Dreams in a step, where the method takes any.
    pub dream_batch_size: usize,
    /// Begin once this many dreams are there.
    pub min_images: usize,
    /// Dreams kept to be drawn again.
    pub buffer_images: usize,
    /// What the distance from the teacher counts beside cross-entropy.
    pub teacher_weight: f64,
    /// T of the KL divergences.
    pub temperature: f64,
    /// What batch norm normalizes with.
    pub statistics: Statistics,
    /// The learning rate at the start; half a cosine.
    pub learning_rate: f64,
    /// SGD's momentum.
    pub momentum: f64,
    /// SGD's weight decay.
    pub weight_decay: f64,
    /// Changes to images before each step.
    pub augmentation: Augmentation,
    /// Steps between two pushes of the network.
    pub push_every: u64,
    /// Labelled pictures to measure on.
    pub test_data: Option<PathBuf>,
    /// Where each task's network, and the own daemon's files, are put.
    pub out_dir: PathBuf,
    /// Decides the new outputs' initial weights and what is drawn.
    pub seed: u64,
    /// Where to train.
    pub device: Device,
}

impl Options {
    /// Where the network of a task is put, counted from 1.
    pub fn result(&self, task: usize) -> PathBuf {
        self.out_dir.join(format!("task-{task}.safetensors"))
    }
}

/// What came of one task.
#[derive(Clone, Debug, Serialize)]
pub struct Task {
    /// The classes that were new in it, in the order of their outputs.
    pub classes: Vec<String>,
    /// Accuracy on the classes before it, over all outputs, 0..1.
    pub old: Option<f64>,
    /// On its own.
    pub new: Option<f64>,
    /// On both.
    pub all: Option<f64>,
    /// Training steps made.
    pub steps: u64,
    /// Dreams received.
    pub images_received: u64,
    /// Wall time.
    pub wall_seconds: f64,
    /// The network.
    pub network: PathBuf,
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = |part: Option<f64>| part.map_or("-".into(), |part| format!("{:.2} %", 100.0 * part));
        let (old, new, all) = (percent(self.old), percent(self.new), percent(self.all));
        write!(f, "{}: old {old}  new {new}  all {all}", self.classes.join(","))
    }
}

/// What came out.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// How the old classes were kept.
    pub method: Method,
    /// Accuracy of the first teacher on its own classes.
    pub before: Option<f64>,
    /// One entry a task that was begun.
    pub tasks: Vec<Task>,
    /// False where a signal, or a file that could not be written, ended the training early.
    pub complete: bool,
    /// What could not be written.
    #[serde(skip)]
    pub outputs: Outputs,
}
