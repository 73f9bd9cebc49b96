//! `dreamfeed bench synth`: what one optimizer step costs.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use tch::{Kind, Tensor};

use super::plain::{PlainNetwork, PlainStep};
use crate::device::{DeviceArgs, Precision};
use crate::model::network::FrozenNetwork;
use crate::model::source::{NetworkSource, SourceOptions};
use crate::synthesis::settings::{Settings, SynthesisOptions, SynthesizerKind};
use crate::synthesis::{Flow, StepReport, Surroundings, SynthesisError, Synthesizer, Teacher};
use crate::synthesis::{adi, objective};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The teacher, a safetensors file.
    #[arg(long, value_name = "FILE")]
    teacher: PathBuf,
    #[command(flatten)]
    source: SourceOptions,
    #[command(flatten)]
    synthesis: SynthesisOptions,
    /// A student, a safetensors file; default: the teacher itself.
    #[arg(long, value_name = "FILE")]
    student: Option<PathBuf>,
    /// The student's architecture; default: --arch, or its file's metadata.
    #[arg(long, value_name = "ARCH", requires = "student")]
    student_arch: Option<String>,
    /// Images in a batch.
    #[arg(long, default_value_t = 128)]
    batch: usize,
    /// Steps to measure.
    #[arg(long, default_value_t = 12)]
    steps: u16,
    /// Steps before the first that is measured.
    #[arg(long, default_value_t = 3)]
    warmup: u16,
    /// The element type of the networks' maps.
    #[arg(long, value_enum, default_value = "f32")]
    precision: Precision,
    /// Also time the parts of a step one by one.
    #[arg(long)]
    profile: bool,
    /// Leave out the plain autograd step, which is slow.
    #[arg(long)]
    no_plain: bool,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// The side of the square matrices whose product measures the peak.
const MATRIX: i64 = 2048;

struct Timing<'a> {
    student: &'a FrozenNetwork,
    /// What is timed in turn with the steps, so that a machine whose speed drifts slows both.
    bare: &'a mut dyn FnMut() -> f64,
    bares: Vec<f64>,
    last: Instant,
    /// From the end of one step to the end of the next.
    steps: Vec<Duration>,
    wanted: usize,
}

impl Surroundings for Timing<'_> {
    fn flow(&mut self) -> Flow {
        if self.steps.len() < self.wanted { Flow::Continue } else { Flow::Stop }
    }

    fn student(&mut self) -> Option<(&FrozenNetwork, u64)> {
        Some((self.student, 1))
    }

    fn step_done(&mut self, _: StepReport) {
        synchronize(self.student.device());
        self.steps.push(self.last.elapsed());
        self.bares.push((self.bare)());
        self.last = Instant::now();
    }
}

/// The same step by autograd through networks as they are, in f32.
struct Plain {
    seconds: f64,
    /// Of our loss from its, relative.
    loss_error: f64,
    /// Of our image gradient from its: the norm of the difference over the norm.
    gradient_error: f64,
}

/// Measures steps of one synthesis run.
pub(super) fn run(args: Args) -> anyhow::Result<()> {
    let device = args.device.prepare()?;
    let source = NetworkSource::open(&args.teacher, &args.source)?;
    let set = &args.synthesis;
    for (flag, given, instead) in [
        ("--batch-size", set.batch_size.is_some(), "give --batch"),
        ("--iterations", set.iterations.is_some(), "give --steps"),
        ("--synthesizer", set.synthesizer.is_some(), "leave it out, a step is one of ADI"),
    ] {
        anyhow::ensure!(!given, "{flag} has no meaning for a bench of single steps; {instead}");
    }
    let options = SynthesisOptions {
        batch_size: Some(args.batch),
        iterations: Some(u32::from(args.steps) + u32::from(args.warmup) + 1),
        synthesizer: Some(SynthesizerKind::Adi),
        ..args.synthesis
    };
    let settings =
        options.resolve(source.spec.num_classes).map_err(|problems| anyhow::anyhow!("{}", problems.join("; ")))?;
    let kind = args.precision.kind();
    let teacher = Teacher::load(&source, device, kind);
    let student_source = match &args.student {
        Some(path) => {
            let arch = args.student_arch.or_else(|| args.source.arch.clone());
            NetworkSource::open(path, &SourceOptions { arch, ..args.source })?
        }
        None => source.clone(),
    };
    anyhow::ensure!(
        student_source.geometry == source.geometry && student_source.spec.num_classes == source.spec.num_classes,
        "teacher and student differ in image size, channels or classes; give --student a network for the same images"
    );
    let student = FrozenNetwork::load(&student_source.spec, &student_source.checkpoint, device, kind);

    let competes = settings.compete_weight > 0.0;
    let x = crate::synthesis::initial_images(&teacher, args.batch);
    let runs = || 0..u32::from(args.steps) + u32::from(args.warmup);
    let timed = |work: &mut dyn FnMut()| {
        let began = Instant::now();
        work();
        synchronize(device);
        began.elapsed().as_secs_f64()
    };

    // The same work without any loss: one forward and one backward pass of each network.
    let gradient = Tensor::ones([args.batch as i64, 1], (Kind::Float, device));
    let mut both = || {
        for network in std::iter::once(&teacher.network).chain(competes.then_some(&student)) {
            let recorded = network.forward(&x, false);
            let logits = gradient.expand([args.batch as i64, network.spec().num_classes as i64], false);
            let _ = network.backward(recorded, &logits, &[]);
        }
    };
    // What these processors can do at best, on the largest product that they may meet.
    let square = Tensor::randn([MATRIX, MATRIX], (Kind::Float, device)).to_kind(kind);
    let mut multiply = || _ = square.matmul(&square);
    let peak = 2.0 * (MATRIX as f64).powi(3) / median((0..5).map(|_| timed(&mut multiply)), 2);
    let (height, width) = (source.geometry.height, source.geometry.width);
    let students = if competes { student_source.spec.multiply_adds(height, width) } else { 0 };
    // Forward and backward to the input: each multiply-add twice, and two operations each.
    let operations = 4.0 * (source.spec.multiply_adds(height, width) + students) as f64 * args.batch as f64;

    let parts = args.profile.then(|| {
        let competitor = competes.then_some(&student);
        profile(&teacher, competitor, &settings, &x, &mut |work| median(runs().map(|_| timed(work)), args.warmup))
    });

    let mut synthesizer = Synthesizer::new(settings.clone(), teacher.num_classes(), 0);
    let wanted = usize::from(args.steps) + usize::from(args.warmup);
    let mut bare = || timed(&mut both);
    let (steps, bares) = (Vec::new(), Vec::new());
    let mut timing = Timing { student: &student, bare: &mut bare, bares, last: Instant::now(), steps, wanted };
    match synthesizer.run(&teacher, &mut timing) {
        Ok(_) | Err(SynthesisError::Stopped) => {}
        Err(error) => return Err(error.into()),
    }
    let step = median(timing.steps.iter().map(Duration::as_secs_f64), args.warmup);
    let bare = median(timing.bares.into_iter(), args.warmup);
    // Before the plain step, which needs more.
    let peak_memory = peak_memory_bytes(device);

    let plain = (!args.no_plain).then(|| {
        let load = |source: &NetworkSource| PlainNetwork::load(&source.spec, &source.checkpoint, device, Kind::Float);
        let mut plain = PlainStep::new(load(&source), competes.then(|| load(&student_source)), settings.clone(), &x);
        let (theirs, their_gradient) = plain.gradient(&x);
        let (gradient, ours) =
            adi::image_gradient(&teacher, &settings, &x, &plain.targets, competes.then_some(&student));
        let difference = (gradient - &their_gradient).norm() / their_gradient.norm();
        Plain {
            loss_error: ((ours.report(&mut objective::Bounded::default()).total - theirs) / theirs).abs(),
            gradient_error: difference.double_value(&[]),
            seconds: median(runs().map(|_| timed(&mut || plain.step())), args.warmup),
        }
    });
    let plain_seconds = plain.as_ref().map(|plain| plain.seconds);
    let parts = parts.map(|mut parts| {
        let known: f64 = parts.iter().map(|(_, seconds)| seconds).sum();
        parts.push(("jitter, flip, Adam, clipping, and the rest", step - known));
        parts
    });
    let (images, fraction) = (args.batch as f64 / step, operations / step / peak);
    if args.json {
        let report = serde_json::json!({
            "step_seconds": step, "bare_seconds": bare, "pytorch_seconds": plain_seconds, "batch": args.batch,
            "steps": args.steps, "competes": competes, "precision": args.precision, "images_per_second": images,
            "ratio_to_bare": step / bare, "ratio_to_pytorch": plain_seconds.map(|plain| step / plain),
            "loss_error": plain.as_ref().map(|plain| plain.loss_error),
            "gradient_error": plain.as_ref().map(|plain| plain.gradient_error),
            "matmul_peak_flops": peak, "fraction_of_peak": fraction, "peak_memory_bytes": peak_memory,
            "profile": parts.map(|parts| parts.into_iter().collect::<BTreeMap<_, _>>()),
        });
        say!("{report}");
        return Ok(());
    }
    say!("one step                                    {step:.4} s (median of {})", args.steps);
    say!("bare forward and backward of the networks   {bare:.4} s (a step is {:.2} of it)", step / bare);
    if let Some(Plain { seconds, loss_error, gradient_error }) = plain {
        say!("plain step by libtorch's autograd, f32      {seconds:.4} s (a step is {:.2} of it)", step / seconds);
        say!(
            "relative difference of the loss from its    {loss_error:.1e}, of the image gradient {gradient_error:.1e}"
        );
    }
    say!("images a second and step                    {images:.0}");
    say!("matrix-multiply peak                        {:.1} GFLOP/s (a step uses {:.2} of it)", peak / 1e9, fraction);
    if let Some(bytes) = peak_memory {
        say!("peak memory                                 {:.0} MB", bytes as f64 / 1e6);
    }
    for (name, seconds) in parts.unwrap_or_default() {
        say!("{name:<43} {seconds:.4} s ({:.0} %)", 100.0 * seconds / step);
    }
    Ok(())
}

/// The parts of a step, timed one by one: what a part costs is what the work costs with it less what it costs without.
fn profile(
    teacher: &Teacher,
    student: Option<&FrozenNetwork>,
    settings: &Settings,
    x: &Tensor,
    time: &mut dyn FnMut(&mut dyn FnMut()) -> f64,
) -> Vec<(&'static str, f64)> {
    let networks = || std::iter::once(&teacher.network).chain(student);
    let targets = Tensor::arange(x.size()[0], (Kind::Int64, x.device())).remainder(teacher.num_classes() as i64);
    let recorded = teacher.network.forward(x, true);
    let student_logits = student.map(|network| network.logits(x));
    let evaluate = || {
        let (logits, statistics) = (&recorded.logits, &recorded.statistics);
        objective::evaluate(settings, x, &targets, logits, statistics, student_logits.as_ref())
    };
    let loss = evaluate();
    let forward = time(&mut || networks().for_each(|network| _ = network.forward(x, false)));
    let tapped = time(&mut || _ = teacher.network.forward(x, true));
    let untapped = time(&mut || _ = teacher.network.forward(x, false));
    let objective = time(&mut || _ = evaluate());
    let mut both = |statistics: bool| {
        time(&mut || {
            for (index, network) in networks().enumerate() {
                let tap = statistics && index == 0;
                let gradients = if tap { loss.statistics.as_slice() } else { &[] };
                let logits = if index == 0 { Some(&loss.teacher_logits) } else { loss.student_logits.as_ref() };
                if let Some(logits) = logits {
                    let _ = network.backward(network.forward(x, tap), logits, gradients);
                }
            }
        })
    };
    let (with, without) = (both(true), both(false));
    let statistics = tapped - untapped;
    vec![
        ("forward: convolutions, ReLU, shortcuts", forward),
        ("statistics of every batch norm's input", statistics),
        ("losses and their gradients at the networks", objective),
        ("backward to the image", without - forward),
        ("backward of the statistics", with - without - statistics),
    ]
}

fn synchronize(device: tch::Device) {
    if let tch::Device::Cuda(index) = device {
        tch::Cuda::synchronize(index as i64);
    }
}

/// The most memory that this process held so far. On a GPU what is in use on the whole of it now, by the driver's word:
/// libtorch gives nothing back, so that is its peak and what others hold.
fn peak_memory_bytes(device: tch::Device) -> Option<u64> {
    if let tch::Device::Cuda(index) = device {
        let index = index.to_string();
        let query = ["--query-gpu=memory.used", "--format=csv,noheader,nounits", "-i", &index];
        let output = std::process::Command::new("nvidia-smi").args(query).output().ok()?;
        return String::from_utf8(output.stdout).ok()?.trim().parse::<u64>().ok().map(|mebibytes| mebibytes << 20);
    }
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kilobytes| kilobytes << 10)
}

/// The median, without the first `skip`.
fn median(values: impl Iterator<Item = f64>, skip: u16) -> f64 {
    let mut values: Vec<f64> = values.skip(usize::from(skip)).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
