//! `dreamfeed bench synth`: what one optimizer step costs.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use tch::{Kind, Tensor};

use crate::device::DeviceArgs;
use crate::model::network::FrozenNetwork;
use crate::model::source::{NetworkSource, SourceOptions};
use crate::synthesis::settings::SynthesisOptions;
use crate::synthesis::{Flow, StepReport, Surroundings, SynthesisError, Synthesizer, Teacher};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The teacher, a safetensors file.
    #[arg(long, value_name = "FILE")]
    teacher: PathBuf,
    #[command(flatten)]
    source: SourceOptions,
    #[command(flatten)]
    synthesis: SynthesisOptions,
    /// A student, a safetensors file of the teacher's architecture; default: the teacher itself.
    #[arg(long, value_name = "FILE")]
    student: Option<PathBuf>,
    /// Images in a batch.
    #[arg(long, default_value_t = 128)]
    batch: usize,
    /// Steps to measure.
    #[arg(long, default_value_t = 12)]
    steps: u16,
    /// Steps before the first that is measured.
    #[arg(long, default_value_t = 3)]
    warmup: u16,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

struct Timing {
    student: FrozenNetwork,
    last: Instant,
    /// From the end of one step to the end of the next.
    steps: Vec<Duration>,
    wanted: usize,
}

impl Surroundings for Timing {
    fn flow(&mut self) -> Flow {
        if self.steps.len() < self.wanted { Flow::Continue } else { Flow::Stop }
    }

    fn student(&mut self) -> Option<(&FrozenNetwork, u64)> {
        Some((&self.student, 1))
    }

    fn step_done(&mut self, _: StepReport) {
        if let tch::Device::Cuda(index) = self.student.device() {
            tch::Cuda::synchronize(index as i64);
        }
        self.steps.push(self.last.elapsed());
        self.last = Instant::now();
    }
}

/// Measures steps of one synthesis run.
pub(super) fn run(args: Args) -> anyhow::Result<()> {
    let device = args.device.prepare()?;
    let source = NetworkSource::open(&args.teacher, &args.source)?;
    let options = SynthesisOptions {
        batch_size: Some(args.batch),
        iterations: Some(u32::from(args.steps) + u32::from(args.warmup) + 1),
        ..args.synthesis
    };
    let settings =
        options.resolve(source.spec.num_classes).map_err(|problems| anyhow::anyhow!("{}", problems.join("; ")))?;
    let teacher = Teacher::load(&source, device, Kind::Float);
    let student = match &args.student {
        Some(path) => NetworkSource::open(path, &args.source)?,
        None => source,
    };
    let student = FrozenNetwork::load(&student.spec, &student.checkpoint, device, Kind::Float);

    // The same work without any loss: one forward and one backward pass of each network.
    let competes = settings.compete_weight > 0.0;
    let x = crate::synthesis::initial_images(&teacher, args.batch);
    let gradient = Tensor::ones([args.batch as i64, teacher.num_classes() as i64], (Kind::Float, device));
    let bare = median(
        (0..u32::from(args.steps) + u32::from(args.warmup)).map(|_| {
            let began = Instant::now();
            for network in std::iter::once(&teacher.network).chain(competes.then_some(&student)) {
                let recorded = network.forward(&x, false);
                let logits =
                    gradient.narrow(1, 0, 1).expand([args.batch as i64, network.spec().num_classes as i64], false);
                let _ = network.backward(recorded, &logits, &[]);
            }
            if let tch::Device::Cuda(index) = device {
                tch::Cuda::synchronize(index as i64);
            }
            began.elapsed().as_secs_f64()
        }),
        args.warmup,
    );

    let mut synthesizer = Synthesizer::new(settings, teacher.num_classes(), 0);
    let wanted = usize::from(args.steps) + usize::from(args.warmup);
    let mut timing = Timing { student, last: Instant::now(), steps: Vec::new(), wanted };
    match synthesizer.run(&teacher, &mut timing) {
        Ok(_) | Err(SynthesisError::Stopped) => {}
        Err(error) => return Err(error.into()),
    }
    let step = median(timing.steps.iter().map(Duration::as_secs_f64), args.warmup);
    if args.json {
        let report = serde_json::json!({
            "step_seconds": step, "bare_seconds": bare, "batch": args.batch, "steps": args.steps, "competes": competes,
        });
        say!("{report}");
    } else {
        say!("one step                                   {:.4} s (median of {})", step, args.steps);
        say!("bare forward and backward of the networks  {bare:.4} s (ratio {:.2})", step / bare);
        say!("images a second and step                   {:.0}", args.batch as f64 / step);
    }
    Ok(())
}

/// The median, without the first `skip`.
fn median(values: impl Iterator<Item = f64>, skip: u16) -> f64 {
    let mut values: Vec<f64> = values.skip(usize::from(skip)).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}
