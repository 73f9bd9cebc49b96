//! Making images out of a teacher and, as soon as there is one, the current student.
//!
//! [`Synthesizer::run`] makes one batch. Everything that happens between two optimizer steps (a newer student, being
//! told to stop, reporting) goes through [`Surroundings`], so this module knows nothing of threads, queues or the wire.

use std::time::{Duration, SystemTime};

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

use crate::model::network::FrozenNetwork;
use crate::model::pixels::Pixels;
use crate::model::source::{Geometry, NetworkSource};

pub mod adi;
pub mod batch;
pub mod objective;
pub mod settings;
pub mod targets;

use batch::DreamBatch;
use objective::LossReport;
use settings::{Settings, SynthesizerKind};
use targets::TargetSequence;

/// A teacher on its device.
#[derive(Debug)]
pub struct Teacher {
    /// The network.
    pub network: FrozenNetwork,
    /// The size of its images.
    pub geometry: Geometry,
    /// The normalization of its images.
    pub pixels: Pixels,
}

impl Teacher {
    /// Puts a teacher on a device.
    pub fn load(source: &NetworkSource, device: Device, kind: Kind) -> Self {
        Self {
            network: FrozenNetwork::load(&source.spec, &source.checkpoint, device, kind),
            geometry: source.geometry,
            pixels: Pixels::new(&source.normalization, device, kind),
        }
    }

    /// Where it lives.
    pub fn device(&self) -> Device {
        self.network.device()
    }

    /// The element type of its input.
    pub fn kind(&self) -> Kind {
        self.network.kind()
    }

    /// The number of classes K.
    pub fn num_classes(&self) -> usize {
        self.network.spec().num_classes
    }
}

/// Whether to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Make the next step.
    Continue,
    /// Give the run up now.
    Stop,
}

/// One optimizer step that was made.
#[derive(Debug)]
pub struct StepReport {
    /// Its index within the run, from 0.
    pub step: u32,
    /// How long it took. On an asynchronous device the time to hand it over, except where `losses` are read.
    pub elapsed: Duration,
    /// The student it was made against; 0 = none.
    pub student_version: u64,
    /// The loss before the step; only every [`adi::REPORT_EVERY`] steps, because reading it waits for the device.
    pub losses: Option<LossReport>,
}

/// What a run needs of the world between two optimizer steps.
pub trait Surroundings {
    /// Whether to make the next step.
    fn flow(&mut self) -> Flow {
        Flow::Continue
    }

    /// The newest student and its version, adopted now; called once before each step.
    fn student(&mut self) -> Option<(&FrozenNetwork, u64)> {
        None
    }

    /// Called after each step.
    fn step_done(&mut self, report: StepReport) {
        let _ = report;
    }
}

/// Why a run gave no batch.
#[derive(Debug, thiserror::Error)]
pub enum SynthesisError {
    /// The loss or the images became NaN or infinite.
    #[error("the loss is not finite at step {step}; a smaller learning_rate or smaller weights would help")]
    NotFinite {
        /// The step's index.
        step: u32,
    },
    /// [`Flow::Stop`].
    #[error("stopped")]
    Stopped,
}

/// Makes batches with one group of settings; owns the random state, so that a seed decides what it makes.
#[derive(Debug)]
pub struct Synthesizer {
    settings: Settings,
    targets: TargetSequence,
    rng: ChaCha8Rng,
}

impl Synthesizer {
    /// `settings` have been validated for a teacher of `num_classes` outputs. Seeds libtorch's generator too.
    pub fn new(settings: Settings, num_classes: usize, seed: u64) -> Self {
        tch::manual_seed(seed as i64);
        Self {
            targets: TargetSequence::new(&settings.targets, num_classes),
            rng: ChaCha8Rng::seed_from_u64(seed),
            settings,
        }
    }

    /// The settings.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// Makes one batch of `batch_size` images.
    pub fn run(
        &mut self,
        teacher: &Teacher,
        surroundings: &mut dyn Surroundings,
    ) -> Result<DreamBatch, SynthesisError> {
        let count = self.settings.batch_size;
        let noise = initial_images(teacher, count);
        let (images, labels, student_version) = match self.settings.synthesizer {
            SynthesizerKind::Noise => {
                if surroundings.flow() == Flow::Stop {
                    return Err(SynthesisError::Stopped);
                }
                (noise, None, 0)
            }
            SynthesizerKind::Adi => {
                let labels = self.targets.next_batch(count, &mut self.rng);
                let targets = Tensor::from_slice(&labels).to_device(teacher.device());
                let done = adi::optimize(teacher, &self.settings, noise, &targets, &mut self.rng, surroundings)?;
                (done.images, Some(labels), done.student_version)
            }
        };
        Ok(finish(teacher, &images, labels, student_version, self.settings.synthesizer, surroundings))
    }
}

/// Where optimization starts: standard normal noise in normalized space, `[N, C, H, W]`.
pub fn initial_images(teacher: &Teacher, count: usize) -> Tensor {
    let g = teacher.geometry;
    let size = [count as i64, g.channels as i64, g.height as i64, g.width as i64];
    // Always drawn on the CPU, so that one seed means the same images on every device.
    Tensor::randn(size, (Kind::Float, Device::Cpu)).to_device(teacher.device()).to_kind(teacher.kind())
}

/// Quantizes images and asks both networks what they see in exactly these pixels. Without labels the teacher gives them.
fn finish(
    teacher: &Teacher,
    images: &Tensor,
    labels: Option<Vec<i64>>,
    student_version: u64,
    kind: SynthesizerKind,
    surroundings: &mut dyn Surroundings,
) -> DreamBatch {
    let _guard = tch::no_grad_guard();
    let pixels = teacher.pixels.quantize(images);
    let count = pixels.size()[0] as usize;
    let normalized = teacher.pixels.normalize(&pixels);
    let logits = teacher.network.logits(&normalized);
    let competition = match surroundings.student() {
        Some((student, _)) => {
            let divergence = objective::js_divergence(&logits, &student.logits(&normalized), 1.0);
            // Rounding can leave a tiny negative number where both agree, and a student whose logits overflow none at all.
            host_f32(&divergence.nan_to_num(0.0, None, None).clamp(0.0, std::f64::consts::LN_2))
        }
        None => vec![0.0; count],
    };
    let labels = labels.unwrap_or_else(|| {
        let mut labels = vec![0i64; count];
        logits.argmax(1, false).to_device(Device::Cpu).copy_data(&mut labels, count);
        labels
    });
    let mut bytes = vec![0u8; count * teacher.geometry.pixels()];
    let (pixels, length) = (pixels.to_device(Device::Cpu).contiguous(), bytes.len());
    pixels.copy_data(&mut bytes, length);
    DreamBatch {
        images: bytes,
        labels,
        teacher_logits: host_f32(&logits),
        student_version: vec![student_version as i64; count],
        competition,
        geometry: teacher.geometry,
        num_classes: teacher.num_classes(),
        synthesizer: kind.name(),
        created_at: SystemTime::now(),
    }
}

fn host_f32(tensor: &Tensor) -> Vec<f32> {
    let tensor = tensor.to_device(Device::Cpu).to_kind(Kind::Float).contiguous();
    let mut values = vec![0f32; tensor.numel()];
    let length = values.len();
    tensor.copy_data(&mut values, length);
    values
}
