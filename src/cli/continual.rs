//! `dreamfeed continual`: teaches a network new classes, without the data of its old ones.

use std::path::PathBuf;
use std::time::Duration;

use tracing_subscriber::EnvFilter;

use super::trainer::{LONGEST_PATIENCE, positive, stop_on_signal};
use crate::device::DeviceArgs;
use crate::model::augment::Augmentation;
use crate::model::source::SourceOptions;
use crate::model::trainable::Statistics;
use crate::telemetry::{self, LogFormat};
use crate::trainers::continual::{self, Method, Options, Source};

/// Teaches a network new classes from real pictures, while dreams keep its old ones.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The network that knows the old classes, a safetensors file: the teacher of the first task.
    #[arg(long, value_name = "FILE")]
    model: PathBuf,
    #[command(flatten)]
    source: SourceOptions,
    /// Real pictures of the new classes: a file in CIFAR binary format, or a folder with a subfolder for each class. Those of
    /// other classes are passed over.
    #[arg(long, value_name = "PATH")]
    data: PathBuf,
    /// The classes of one task, for example 5,6 of a CIFAR file or cat,dog of a folder. Once for each task; the result of one
    /// is the teacher of the next [default: all classes that the network does not know, as one task].
    #[arg(long = "task", value_name = "CLASSES")]
    tasks: Vec<String>,
    /// How the old classes are kept.
    #[arg(long, value_enum, default_value_t)]
    method: Method,
    /// A daemon that dreams from the network already [default: one of its own for each task].
    #[arg(long, value_name = "URL")]
    connect: Option<String>,
    /// How long to wait for that daemon at the start.
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = humantime::parse_duration)]
    connect_timeout: Duration,
    /// Further flags of `dreamfeed serve` for a daemon of its own, separated by spaces.
    #[arg(long, value_name = "FLAGS", default_value = "", allow_hyphen_values = true, conflicts_with = "connect")]
    serve: String,
    /// Training steps a task.
    #[arg(long, default_value_t = 1000)]
    steps: u64,
    /// Real images in a training step.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(2..=65536))]
    batch_size: u32,
    /// Dreams in a training step beside them.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(2..=65536))]
    dream_batch_size: u32,
    /// Begin once this many dreams are there.
    #[arg(long, default_value_t = 1024)]
    min_images: usize,
    /// Dreams kept to be drawn again; the oldest make room.
    #[arg(long, default_value_t = 50_000)]
    buffer_images: usize,
    /// What the distance from the teacher counts beside cross-entropy [default: 1; for abd 0.1].
    #[arg(long)]
    teacher_weight: Option<f64>,
    /// The temperature of the KL divergences.
    #[arg(long, default_value_t = 1.0)]
    temperature: f64,
    /// Keep batch norm's running statistics as they are and normalize with them, instead of with each batch's own.
    #[arg(long)]
    freeze_statistics: bool,
    /// The learning rate at the start; it follows half a cosine to zero.
    #[arg(long, default_value_t = 0.01)]
    learning_rate: f64,
    /// SGD's (Nesterov) momentum.
    #[arg(long, default_value_t = 0.9)]
    momentum: f64,
    /// SGD's weight decay.
    #[arg(long, default_value_t = 5e-4)]
    weight_decay: f64,
    /// Changes to images before each step: none, or a list of shift:N and flip.
    #[arg(long, default_value = "shift:4,flip")]
    augment: Augmentation,
    /// Steps between two pushes of the network.
    #[arg(long, default_value_t = 50)]
    push_every: u64,
    /// Labelled pictures of old and new classes to measure accuracy on, named as in --data. Never trained on.
    #[arg(long, value_name = "PATH")]
    test_data: Option<PathBuf>,
    /// Where to put task-1.safetensors and so on, continual.json, and each own daemon's store.
    #[arg(long, value_name = "FOLDER")]
    out_dir: PathBuf,
    /// Decides the new outputs' initial weights and what is drawn.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print the summary as JSON.
    #[arg(long)]
    json: bool,
}

/// Runs the subcommand.
pub fn run(args: Args) -> anyhow::Result<()> {
    let teacher_weight = args.teacher_weight.unwrap_or_else(|| args.method.teacher_weight());
    for (name, value, zero) in [
        ("--learning-rate", args.learning_rate, false),
        ("--temperature", args.temperature, false),
        ("--momentum", args.momentum, true),
        ("--weight-decay", args.weight_decay, true),
        ("--teacher-weight", teacher_weight, true),
    ] {
        positive(name, value, zero)?;
    }
    telemetry::install_logs(LogFormat::Text, EnvFilter::new("warn"));
    let classes = |task: &String| task.split(',').map(|class| class.trim().to_owned()).collect();
    let options = Options {
        model: args.model,
        source: args.source,
        dreams: match args.connect {
            Some(url) => Source::Connect(url, args.connect_timeout.min(LONGEST_PATIENCE)),
            None => Source::Own(args.device.for_daemon(&args.serve)),
        },
        data: args.data,
        tasks: args.tasks.iter().map(classes).collect(),
        method: args.method,
        steps: args.steps,
        batch_size: args.batch_size as usize,
        dream_batch_size: args.dream_batch_size as usize,
        min_images: args.min_images.min(args.buffer_images),
        buffer_images: args.buffer_images,
        teacher_weight,
        temperature: args.temperature,
        statistics: if args.freeze_statistics { Statistics::Running } else { Statistics::Batch },
        learning_rate: args.learning_rate,
        momentum: args.momentum,
        weight_decay: args.weight_decay,
        augmentation: args.augment,
        push_every: args.push_every,
        test_data: args.test_data,
        out_dir: args.out_dir,
        seed: args.seed,
        device: args.device.prepare()?,
    };
    let summary = continual::run(&options, stop_on_signal)?;
    if args.json {
        say!("{}", serde_json::to_string(&summary)?);
    } else {
        for task in &summary.tasks {
            say!("{task}");
        }
    }
    summary.outputs.check()
}
