//! `dreamfeed distill`: trains a student on a daemon's stream.

use std::num::NonZeroU64;
use std::path::PathBuf;
use std::time::Duration;

use tracing_subscriber::EnvFilter;

use super::trainer::{LONGEST_PATIENCE, positive, stop_on_signal};
use crate::device::{DeviceArgs, Precision};
use crate::model::augment::Augmentation;
use crate::telemetry::{self, LogFormat};
use crate::trainers::distill::{self, Budget, Options};
use crate::trainers::loss::Loss;

/// Trains a student on a daemon's stream and pushes its weights back.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The daemon's address.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:7461")]
    connect: String,
    /// How long to wait for the daemon at the start.
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = humantime::parse_duration)]
    connect_timeout: Duration,
    /// The student's architecture; default: the teacher's.
    #[arg(long)]
    arch: Option<String>,
    /// Start from the newest student that the daemon holds, where it holds one.
    #[arg(long)]
    fetch: bool,
    /// Train this many steps [default: 2000].
    #[arg(long, conflicts_with = "duration")]
    steps: Option<NonZeroU64>,
    /// Train for this long, for example 30m.
    #[arg(long, value_parser = humantime::parse_duration)]
    duration: Option<Duration>,
    /// Make at most this many steps for each batch received, then wait for the next; default: never wait.
    #[arg(long, value_name = "N")]
    steps_per_batch: Option<NonZeroU64>,
    /// Begin once this many images are there.
    #[arg(long, default_value_t = 128)]
    min_images: usize,
    /// Images in a training step.
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u32).range(2..=65536))]
    batch_size: u32,
    /// The learning rate's peak; it warms up, then follows half a cosine to zero.
    #[arg(long, default_value_t = 0.1)]
    learning_rate: f64,
    /// SGD's (Nesterov) momentum.
    #[arg(long, default_value_t = 0.9)]
    momentum: f64,
    /// SGD's weight decay.
    #[arg(long, default_value_t = 5e-4)]
    weight_decay: f64,
    /// What the student learns: the teacher's logits by KL divergence or by their absolute difference, or only its class.
    #[arg(long, value_enum, default_value_t)]
    loss: Loss,
    /// The temperature of the KL divergence.
    #[arg(long, default_value_t = 4.0)]
    temperature: f64,
    /// What the student's convolutions compute in; weights, batch norm and losses stay f32.
    #[arg(long, value_enum, default_value_t)]
    precision: Precision,
    /// The teacher's own file. Its logits are then those of the images as augmented; without it, of the unchanged ones.
    #[arg(long, value_name = "FILE")]
    teacher: Option<PathBuf>,
    /// Learn the teacher's feature maps, too, with this weight: block by block where both have as many blocks, otherwise
    /// stage by stage; where widths differ, attention maps. Needs --teacher.
    #[arg(long, default_value_t = 0.0)]
    hint_weight: f64,
    /// In this part of the training, from its first step, each block (or stage) learns by itself what the teacher's makes of the
    /// teacher's feature maps; 0 up to, not including, 1. A random student is useful much earlier by it; one that was
    /// fetched, or is past this part, goes on as a whole. Needs --teacher and a student as wide.
    #[arg(long, value_name = "PART", default_value_t = 0.0)]
    blockwise: f64,
    /// Measure and save a moving average of the weights, of which this part stays at each step; 0: the weights themselves.
    #[arg(long, default_value_t = 0.0)]
    ema: f64,
    /// Changes to images before each step: none, or a list of shift:N and flip.
    #[arg(long, default_value = "shift:4,flip")]
    augment: Augmentation,
    /// Images kept to be drawn again; the oldest make room.
    #[arg(long, default_value_t = 50_000)]
    buffer_images: usize,
    /// Steps between two pushes of the student.
    #[arg(long, default_value_t = 50)]
    push_every: u64,
    /// Labelled pictures to measure accuracy on, in CIFAR binary format or in a folder with a subfolder for each class. Never
    /// trained on.
    #[arg(long, value_name = "PATH")]
    test_data: Option<PathBuf>,
    /// Steps between two measurements; 0: measure only at the end.
    #[arg(long, default_value_t = 500)]
    eval_every: u64,
    /// Measure after each of these times, too, for example 5m,10m.
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = humantime::parse_duration)]
    eval_at: Vec<Duration>,
    /// Where to write the trained student, a safetensors file.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// Where to keep the training's state (weights, momentum, step); a training that finds it there resumes from it.
    #[arg(long, value_name = "FILE")]
    checkpoint: Option<PathBuf>,
    /// Steps between two checkpoints; one is written at the end, too.
    #[arg(long, default_value_t = 500)]
    checkpoint_every: u64,
    /// Where to write the summary, JSON.
    #[arg(long, value_name = "FILE")]
    summary: Option<PathBuf>,
    /// Where to write a grid of the newest images.
    #[arg(long, value_name = "FILE.png")]
    grid: Option<PathBuf>,
    /// Decides the initial weights and what is drawn.
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
    positive("--learning-rate", args.learning_rate, false)?;
    positive("--temperature", args.temperature, false)?;
    positive("--weight-decay", args.weight_decay, true)?;
    positive("--momentum", args.momentum, true)?;
    positive("--hint-weight", args.hint_weight, true)?;
    anyhow::ensure!(
        (0.0..1.0).contains(&args.blockwise),
        "--blockwise is {}; give a part of the training, from 0 up to, not including, 1",
        args.blockwise
    );
    for (flag, value) in [("--hint-weight", args.hint_weight), ("--blockwise", args.blockwise)] {
        anyhow::ensure!(
            value == 0.0 || args.teacher.is_some(),
            "{flag} is {value}, and the teacher's feature maps come from its own file; give --teacher"
        );
    }
    anyhow::ensure!(
        (0.0..1.0).contains(&args.ema),
        "--ema is {}; give a number from 0 up to, not including, 1",
        args.ema
    );
    telemetry::install_logs(LogFormat::Text, EnvFilter::new("warn"));
    let options = Options {
        connect: args.connect,
        patience: args.connect_timeout.min(LONGEST_PATIENCE),
        arch: args.arch,
        fetch: args.fetch,
        budget: match (args.duration, args.steps) {
            (Some(time), _) => Budget::Time(time),
            (None, steps) => Budget::Steps(steps.map_or(2000, NonZeroU64::get)),
        },
        steps_per_batch: args.steps_per_batch.map(NonZeroU64::get),
        min_images: args.min_images.min(args.buffer_images),
        batch_size: args.batch_size as usize,
        learning_rate: args.learning_rate,
        momentum: args.momentum,
        weight_decay: args.weight_decay,
        loss: args.loss,
        temperature: args.temperature,
        precision: args.precision.kind(),
        teacher: args.teacher,
        hint_weight: args.hint_weight,
        blockwise: args.blockwise,
        augmentation: args.augment,
        buffer_images: args.buffer_images,
        push_every: args.push_every,
        test_data: args.test_data,
        eval_every: args.eval_every,
        eval_at: args.eval_at,
        ema: args.ema,
        out: args.out,
        checkpoint: args.checkpoint,
        checkpoint_every: args.checkpoint_every,
        summary: args.summary,
        grid: args.grid,
        seed: args.seed,
        device: args.device.prepare()?,
    };
    let summary = distill::run(&options, stop_on_signal)?;
    if args.json {
        say!("{}", serde_json::to_string(&summary)?);
    } else {
        let accuracy = summary.accuracy.map_or("not measured".into(), |a| format!("{:.2} %", a * 100.0));
        say!("student accuracy      {accuracy}");
        say!("training steps        {}", summary.steps);
        say!("images received       {}", summary.images_received);
        say!("images consumed       {}", summary.images_consumed);
        say!("student versions      {}", summary.student_versions_pushed);
        say!("wall time             {:.1} s", summary.wall_seconds);
    }
    summary.outputs.check()
}
