//! `dreamfeed prune`: a smaller network out of a daemon's teacher, without data.

use std::path::PathBuf;
use std::time::Duration;

use tracing_subscriber::EnvFilter;

use super::trainer::{LONGEST_PATIENCE, positive, stop_on_signal};
use crate::device::DeviceArgs;
use crate::model::augment::Augmentation;
use crate::model::source::SourceOptions;
use crate::telemetry::{self, LogFormat};
use crate::trainers::prune::{self, Images, Measure, Options};

/// Removes the filters of a daemon's teacher that matter least on its dreams, fine-tunes what is left, and pushes it as
/// the student while it shrinks.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The network to prune, a safetensors file: the daemon's teacher.
    #[arg(long, value_name = "FILE")]
    model: PathBuf,
    #[command(flatten)]
    source: SourceOptions,
    #[command(flatten)]
    target: Target,
    /// The daemon's address.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:7461")]
    connect: String,
    /// How long to wait for the daemon at the start.
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = humantime::parse_duration)]
    connect_timeout: Duration,
    /// Take pictures instead of a daemon's stream, from a file in CIFAR binary format or from a folder of .png and .jpg files,
    /// with or without subfolders; labels are not used.
    #[arg(long, value_name = "PATH", conflicts_with = "connect")]
    pictures: Option<PathBuf>,
    /// How much the measured time of a filter counts beside its importance; 0: not at all.
    #[arg(long, default_value_t = 0.0)]
    latency_weight: f64,
    /// Remove in this many rounds.
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rounds: u32,
    /// Training steps before each round, whose gradients decide what goes.
    #[arg(long, default_value_t = 30)]
    steps_per_round: u64,
    /// Training steps after the last round.
    #[arg(long, default_value_t = 600)]
    fine_tune_steps: u64,
    /// Images in a training step.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(2..=65536))]
    batch_size: u32,
    /// Begin once this many images are there.
    #[arg(long, default_value_t = 512)]
    min_images: usize,
    /// Images kept to be drawn again; the oldest make room.
    #[arg(long, default_value_t = 50_000)]
    buffer_images: usize,
    /// The learning rate. 0: nothing is learned, only importance is measured and batch norm follows the images.
    #[arg(long, default_value_t = 0.01)]
    learning_rate: f64,
    /// SGD's momentum.
    #[arg(long, default_value_t = 0.9)]
    momentum: f64,
    /// SGD's weight decay.
    #[arg(long, default_value_t = 1e-4)]
    weight_decay: f64,
    /// The temperature of the distillation loss.
    #[arg(long, default_value_t = 4.0)]
    temperature: f64,
    /// Changes to images before each step: none, or a list of shift:N and flip.
    #[arg(long, default_value = "shift:2,flip")]
    augment: Augmentation,
    /// Steps between two pushes of the shrinking network.
    #[arg(long, default_value_t = 30)]
    push_every: u64,
    /// Labelled pictures to measure accuracy on, in CIFAR binary format or in a folder with a subfolder for each class. Never
    /// trained on.
    #[arg(long, value_name = "PATH")]
    test_data: Option<PathBuf>,
    /// Where to write the pruned network, a safetensors file.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Where to write the summary, JSON.
    #[arg(long, value_name = "FILE")]
    summary: Option<PathBuf>,
    /// Decides what is drawn.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print the summary as JSON.
    #[arg(long)]
    json: bool,
}

/// How much to remove.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Target {
    /// The part of the floating-point operations to remove, for example 0.4.
    #[arg(long, value_name = "PART")]
    flops: Option<f64>,
    /// The part of the parameters to remove.
    #[arg(long, value_name = "PART")]
    parameters: Option<f64>,
    /// The part of the filters (output channels of all convolutions) to remove.
    #[arg(long, value_name = "PART")]
    filters: Option<f64>,
}

/// Runs the subcommand.
pub fn run(args: Args) -> anyhow::Result<()> {
    let Target { flops, parameters, filters } = args.target;
    let targets = [(Measure::Flops, flops), (Measure::Parameters, parameters), (Measure::Filters, filters)];
    let given = targets.into_iter().find_map(|(measure, part)| Some((measure, part?)));
    let (measure, remove) =
        given.ok_or_else(|| anyhow::anyhow!("give one of --flops, --parameters and --filters"))?;
    anyhow::ensure!(remove > 0.0 && remove < 1.0, "--{} is {remove}; give a part between 0 and 1", measure.name());
    for (name, value, zero) in [
        ("--learning-rate", args.learning_rate, true),
        ("--temperature", args.temperature, false),
        ("--momentum", args.momentum, true),
        ("--weight-decay", args.weight_decay, true),
        ("--latency-weight", args.latency_weight, true),
    ] {
        positive(name, value, zero)?;
    }
    telemetry::install_logs(LogFormat::Text, EnvFilter::new("warn"));
    let options = Options {
        model: args.model,
        source: args.source,
        images: match args.pictures {
            Some(path) => Images::File(path),
            None => Images::Stream { connect: args.connect, patience: args.connect_timeout.min(LONGEST_PATIENCE) },
        },
        measure,
        remove,
        latency_weight: args.latency_weight,
        rounds: args.rounds,
        steps_per_round: args.steps_per_round,
        fine_tune_steps: args.fine_tune_steps,
        batch_size: args.batch_size as usize,
        min_images: args.min_images.min(args.buffer_images),
        buffer_images: args.buffer_images,
        learning_rate: args.learning_rate,
        momentum: args.momentum,
        weight_decay: args.weight_decay,
        temperature: args.temperature,
        augmentation: args.augment,
        push_every: args.push_every,
        test_data: args.test_data,
        out: args.out,
        summary: args.summary,
        seed: args.seed,
        device: args.device.prepare()?,
    };
    let summary = prune::run(&options, stop_on_signal)?;
    if args.json {
        say!("{}", serde_json::to_string(&summary)?);
    } else {
        say!("before       {}", summary.before);
        say!("pruned       {}", summary.pruned);
        say!("fine-tuned   {}", summary.tuned);
    }
    summary.outputs.check()
}
