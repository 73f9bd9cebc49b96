//! `dreamfeed dream`: images of one teacher without a daemon, judged by the teacher and by networks that had no part in
//! making them.

use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::time::Instant;

use tch::Tensor;

use crate::device::{DeviceArgs, Precision};
use crate::files::{check_writable, write_whole};
use crate::grid;
use crate::model::labelled::accuracy;
use crate::model::network::FrozenNetwork;
use crate::model::source::{NetworkSource, SourceError, SourceOptions};
use crate::synthesis::batch::DreamBatch;
use crate::synthesis::settings::{SynthesisOptions, SynthesizerKind};
use crate::synthesis::{StepReport, Surroundings, Synthesizer, Teacher};

/// Dreams images of one teacher without a daemon, and says what networks see in them.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The teacher, a safetensors file.
    #[arg(long, value_name = "FILE")]
    teacher: PathBuf,
    #[command(flatten)]
    source: SourceOptions,
    #[command(flatten)]
    synthesis: SynthesisOptions,
    /// A student to compete against, a safetensors file.
    #[arg(long, value_name = "FILE")]
    student: Option<PathBuf>,
    /// The student's architecture; default: its metadata, or the teacher's.
    #[arg(long)]
    student_arch: Option<String>,
    /// Images to make, rounded up to whole batches; default: one batch.
    #[arg(long)]
    images: Option<NonZeroUsize>,
    /// A network that had no part in making the images, a safetensors file normalized like the teacher.
    #[arg(long, value_name = "FILE")]
    verifier: Option<PathBuf>,
    /// The verifier's architecture; default: its metadata.
    #[arg(long)]
    verifier_arch: Option<String>,
    /// Where to write the PNG grid.
    #[arg(long, value_name = "FILE.png")]
    grid: Option<PathBuf>,
    /// Images in the grid.
    #[arg(long, default_value_t = 60)]
    grid_images: usize,
    /// Decides what is made.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The element type in which the networks compute.
    #[arg(long, value_enum, default_value = "f32")]
    precision: Precision,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Prints progress to standard error, and holds a student that never changes.
struct Watching {
    student: Option<FrozenNetwork>,
    steps: u32,
    began: Instant,
}

impl Surroundings for Watching {
    fn student(&mut self) -> Option<(&FrozenNetwork, u64)> {
        self.student.as_ref().map(|student| (student, 1))
    }

    fn step_done(&mut self, report: StepReport) {
        if let Some(losses) =
            report.losses.filter(|_| report.step.is_multiple_of(100) || report.step + 1 == self.steps)
        {
            let terms: Vec<String> = losses.terms.iter().map(|(name, value)| format!("{name} {value:.4}")).collect();
            let seconds = self.began.elapsed().as_secs_f64();
            eprintln!("step {:>5}  {seconds:6.1} s  loss {:.4}  {}", report.step, losses.total, terms.join("  "));
        }
    }
}

/// A network that looks at the teacher's images: its architecture is what the flag says, else its metadata, else the
/// teacher's.
fn open(
    path: &Path,
    arch: Option<&String>,
    flags: &SourceOptions,
    teacher: &NetworkSource,
) -> anyhow::Result<NetworkSource> {
    let options = |arch: Option<String>| SourceOptions { arch, ..flags.clone() };
    let source = match NetworkSource::open(path, &options(arch.cloned())) {
        Err(SourceError::NoArch(_)) => NetworkSource::open(path, &options(Some(teacher.spec.arch().to_owned())))?,
        source => source?,
    };
    anyhow::ensure!(
        source.spec.in_channels == teacher.spec.in_channels && source.spec.num_classes >= teacher.spec.num_classes,
        "{}: it takes {} channels and has {} outputs, which does not fit the teacher's {} and {}",
        path.display(),
        source.spec.in_channels,
        source.spec.num_classes,
        teacher.spec.in_channels,
        teacher.spec.num_classes
    );
    Ok(source)
}

/// Runs the subcommand.
pub fn run(args: Args) -> anyhow::Result<()> {
    args.grid.as_deref().map_or(Ok(()), check_writable)?; // now, and not after hours
    let device = args.device.prepare()?;
    let source = NetworkSource::open(&args.teacher, &args.source)?;
    let mut options = args.synthesis;
    // One batch for its own sake: the generator of the fast tier pays only over many.
    options.synthesizer.get_or_insert(SynthesizerKind::Adi);
    let settings =
        options.resolve(source.spec.num_classes).map_err(|problems| anyhow::anyhow!("{}", problems.join("; ")))?;
    let teacher = Teacher::load(&source, device, args.precision.kind());
    let frozen = |path: &Path, arch: Option<&String>| -> anyhow::Result<FrozenNetwork> {
        let source = open(path, arch, &args.source, &source)?;
        Ok(FrozenNetwork::load(&source.spec, &source.checkpoint, device, args.precision.kind()))
    };
    let student = args.student.as_ref().map(|path| frozen(path, args.student_arch.as_ref())).transpose()?;
    let verifier = args.verifier.as_ref().map(|path| frozen(path, args.verifier_arch.as_ref())).transpose()?;

    let wanted = args.images.map_or(settings.batch_size, usize::from);
    let (batch_size, iterations) = (settings.batch_size, settings.iterations);
    let mut synthesizer = Synthesizer::new(settings, teacher.num_classes(), args.seed);
    let began = Instant::now();
    let mut watching = Watching { student, steps: iterations, began };
    let mut batches = Vec::new();
    for _ in 0..wanted.div_ceil(batch_size) {
        batches.push(synthesizer.run(&teacher, &mut watching)?);
    }
    let seconds = began.elapsed().as_secs_f64();

    let (images, labels) = tensors(&batches);
    let agreement = |network: &FrozenNetwork| {
        accuracy(&images, &labels, |pixels| network.logits(&teacher.pixels.normalize(pixels)))
    };
    let teacher_accuracy = agreement(&teacher.network);
    let verifier_accuracy = verifier.as_ref().map(agreement);
    let count = labels.numel();
    if args.json {
        let report = serde_json::json!({
            "images": count, "iterations": iterations, "batch_size": batch_size, "wall_seconds": seconds,
            "seconds_per_image": seconds / count as f64, "teacher_accuracy": teacher_accuracy,
            "verifier_accuracy": verifier_accuracy,
        });
        say!("{report}");
    } else {
        say!("images                {count}");
        say!("wall time             {seconds:.1} s ({:.2} s an image)", seconds / count as f64);
        say!("teacher sees class    {:.1} %", teacher_accuracy * 100.0);
        if let Some(accuracy) = verifier_accuracy {
            say!("verifier sees class   {:.1} %", accuracy * 100.0);
        }
    }
    if let Some(path) = &args.grid {
        let bytes: Vec<u8> = batches.iter().flat_map(|batch| &batch.images).copied().collect();
        let shown = args.grid_images.min(labels.numel()) * source.geometry.pixels();
        write_whole(path, &grid::png_of_all(&bytes[..shown], source.geometry, 10)?)?;
    }
    Ok(())
}

fn tensors(batches: &[DreamBatch]) -> (Tensor, Tensor) {
    let images: Vec<Tensor> = batches
        .iter()
        .map(|b| {
            let g = b.geometry;
            let size = [b.count(), g.channels, g.height, g.width].map(|d| d as i64);
            Tensor::from_slice(&b.images).view(size)
        })
        .collect();
    let labels: Vec<Tensor> = batches.iter().map(|b| Tensor::from_slice(&b.labels)).collect();
    (Tensor::cat(&images, 0), Tensor::cat(&labels, 0))
}
