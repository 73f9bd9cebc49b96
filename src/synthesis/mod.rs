//! Making images out of a teacher and, as soon as there is one, the current student.
//!
//! [`Synthesizer::run`] makes one batch. Everything that happens between two optimizer steps (a newer student, being
//! told to stop, reporting) goes through [`Surroundings`], so this module knows nothing of threads, queues or the wire.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

use crate::model::network::FrozenNetwork;
use crate::model::pixels::Pixels;
use crate::model::source::{Geometry, NetworkSource};

pub mod adam;
pub mod adi;
pub mod batch;
pub mod fast;
mod memory;
pub mod objective;
pub mod settings;
pub mod targets;

use batch::DreamBatch;
use fast::{FastGenerator, Restored};
use objective::LossReport;
use settings::{Settings, SynthesizerKind};
use targets::TargetSequence;

/// As long as the log holds fewer batches, warm-adi starts from noise.
const WARM_LOG_BATCHES: usize = 16;

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
    /// Puts a teacher on a device; its maps are of this kind.
    pub fn load(source: &NetworkSource, device: Device, kind: Kind) -> Self {
        let network = FrozenNetwork::load(&source.spec, &source.checkpoint, device, kind);
        Self {
            geometry: source.geometry,
            pixels: Pixels::new(&source.normalization, device, network.kind()),
            network,
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
    /// The loss before the step; on pixels only every [`adi::REPORT_EVERY`] steps and at the last, of a generator only at
    /// the last, because reading it waits for the device.
    pub losses: Option<LossReport>,
}

/// Images that were made before.
#[derive(Clone, Debug, Default)]
pub struct Recalled {
    /// Pixels 0..255, `[N, C, H, W]`.
    pub images: Vec<u8>,
    /// The class each was made for, `[N]`.
    pub labels: Vec<i64>,
    /// Images in the log that these were drawn from.
    pub drawn_from: u64,
}

/// Images after their last step.
struct Optimized {
    /// Normalized, `[N, C, H, W]`.
    images: Tensor,
    /// The newest student the images were optimized against; 0 = none.
    student_version: u64,
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

    /// This many images of earlier batches, to be optimized further; None where there are none.
    fn recall(&mut self, count: usize) -> Option<Recalled> {
        let _ = count;
        None
    }

    /// The generator's images had collapsed, and it went back to its last good state.
    fn generator_restored(&mut self, restored: Restored) {
        let _ = restored;
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
    #[error(
        "the loss is not finite at step {step}; at the first step look at the networks' weights and normalization, later a \
         smaller learning_rate or smaller weights of the terms would help"
    )]
    NotFinite {
        /// The step's index.
        step: u32,
    },
    /// The teacher's logits on finished images are NaN or infinite.
    #[error("the teacher's logits on finished images are not finite; look at its weights and its normalization")]
    Logits,
    /// [`Flow::Stop`].
    #[error("stopped")]
    Stopped,
}

/// Makes batches; owns the random state, so that a seed decides what it makes.
#[derive(Debug)]
pub struct Synthesizer {
    settings: Settings,
    /// The same as JSON.
    json: Arc<str>,
    targets: TargetSequence,
    rng: ChaCha8Rng,
    /// From the first batch that needs it.
    generator: Option<FastGenerator>,
    /// The batch that is handed over again in other views, and how often.
    viewed: Option<(Made, u32)>,
}

/// A batch before networks look at it for the last time.
#[derive(Debug)]
struct Made {
    /// u8, `[N, C, H, W]`.
    pixels: Tensor,
    /// The class of each; without, the teacher says what it sees.
    labels: Option<Vec<i64>>,
    student_version: u64,
}

impl Synthesizer {
    /// `settings` have been validated for a teacher of `num_classes` outputs. Seeds libtorch's generator too.
    pub fn new(settings: Settings, num_classes: usize, seed: u64) -> Self {
        tch::manual_seed(seed as i64);
        Self {
            targets: TargetSequence::new(&settings.targets, num_classes),
            rng: ChaCha8Rng::seed_from_u64(seed),
            json: settings.json(),
            settings,
            generator: None,
            viewed: None,
        }
    }

    /// The settings.
    pub fn settings(&self) -> &Settings {
        &self.settings
    }

    /// The next batch is made by another synthesizer; everything else stays, the generator too.
    pub fn switch(&mut self, kind: SynthesizerKind) {
        self.settings.synthesizer = kind;
        self.viewed = None;
        self.json = self.settings.json();
    }

    /// The generator of the fast tier, where there is one.
    pub fn generator(&self) -> Option<&FastGenerator> {
        self.generator.as_ref()
    }

    /// Goes on with this generator.
    pub fn adopt_generator(&mut self, generator: FastGenerator) {
        self.generator = Some(generator);
    }

    /// No run succeeds: the generator goes back to its last good state, or begins anew where none is known.
    pub fn recover_generator(&mut self) {
        if let Some(generator) = &mut self.generator
            && !generator.go_back()
        {
            self.generator = None;
        }
    }

    /// Makes one batch of `batch_size` images, or the next view of the last one.
    pub fn run(
        &mut self,
        teacher: &Teacher,
        surroundings: &mut dyn Surroundings,
    ) -> Result<DreamBatch, SynthesisError> {
        if surroundings.flow() == Flow::Stop {
            return Err(SynthesisError::Stopped);
        }
        let made = match self.viewed.take().filter(|(_, left)| *left > 0) {
            Some((made, left)) => {
                let pixels = self.settings.view_augmentation.apply(&made.pixels, &mut self.rng);
                let (labels, student_version) = (made.labels.clone(), made.student_version);
                self.viewed = Some((made, left - 1));
                Made { pixels, labels, student_version }
            }
            None => {
                let (done, labels) = self.make(teacher, surroundings)?;
                let pixels = tch::no_grad(|| teacher.pixels.quantize(&done.images));
                let made = Made { pixels, labels, student_version: done.student_version };
                // Noise has no class that a view could keep.
                if self.settings.views > 0 && made.labels.is_some() {
                    let again = Made { pixels: made.pixels.shallow_clone(), labels: made.labels.clone(), ..made };
                    self.viewed = Some((again, self.settings.views));
                }
                made
            }
        };
        let batch = finish(teacher, made, (self.settings.synthesizer, &self.json), surroundings);
        // Nobody can learn from an infinite logit, also not of noise.
        if batch.teacher_logits.iter().all(|logit| logit.is_finite()) {
            Ok(batch)
        } else {
            self.viewed = None;
            Err(SynthesisError::Logits)
        }
    }

    /// Whether a warm-started batch is made from noise nevertheless, with a chance that falls as the log grows: images
    /// that are made of images are as diverse as the few that were made from nothing.
    fn starts_anew(&mut self, log_images: u64) -> bool {
        let enough = (WARM_LOG_BATCHES * self.settings.batch_size) as f64;
        self.rng.random_bool((enough / log_images.max(1) as f64).min(1.0))
    }

    /// Images, and the class of each unless they are noise.
    fn make(
        &mut self,
        teacher: &Teacher,
        surroundings: &mut dyn Surroundings,
    ) -> Result<(Optimized, Option<Vec<i64>>), SynthesisError> {
        let kind = self.settings.synthesizer;
        if kind == SynthesizerKind::Noise {
            let images = initial_images(teacher, self.settings.batch_size);
            return Ok((Optimized { images, student_version: 0 }, None));
        }
        let recalled = match kind {
            SynthesizerKind::WarmAdi => surroundings.recall(self.settings.batch_size),
            _ => None,
        };
        let recalled = recalled
            .filter(|recalled| !self.starts_anew(recalled.drawn_from))
            .map(|recalled| (tensor(teacher, &recalled), recalled.labels));
        let (start, labels) = match recalled {
            Some((images, labels)) => (Some(images), labels),
            None => (None, self.targets.next_batch(self.settings.batch_size, &mut self.rng)),
        };
        let targets = Tensor::from_slice(&labels).to_device(teacher.device());
        let (settings, rng) = (&self.settings, &mut self.rng);
        let generated = match kind {
            SynthesizerKind::Fast | SynthesizerKind::Hybrid => {
                let generator = self.generator.get_or_insert_with(|| FastGenerator::fresh(teacher, settings));
                Some(generator.make(teacher, settings, &targets, rng, surroundings)?)
            }
            _ => None,
        };
        let (images, iterations) = match (kind, generated, start) {
            (SynthesizerKind::Fast, Some(done), _) => {
                return Ok((done, Some(labels)));
            }
            (_, Some(generated), _) => (generated.images, settings.hybrid_iterations),
            (_, None, Some(recalled)) => (recalled, settings.warm_iterations),
            (_, None, None) => (initial_images(teacher, labels.len()), settings.iterations),
        };
        let settings = Settings { iterations, ..settings.clone() };
        let done = adi::optimize(teacher, &settings, images, &targets, rng, surroundings)?;
        Ok((done, Some(labels)))
    }
}

/// Images of the log as a network sees them.
fn tensor(teacher: &Teacher, recalled: &Recalled) -> Tensor {
    let g = teacher.geometry;
    let size = [recalled.labels.len(), g.channels, g.height, g.width].map(|d| d as i64);
    teacher.pixels.normalize(&Tensor::from_slice(&recalled.images).view(size))
}

/// Where optimization starts: standard normal noise in normalized space, `[N, C, H, W]`.
pub fn initial_images(teacher: &Teacher, count: usize) -> Tensor {
    let g = teacher.geometry;
    let size = [count as i64, g.channels as i64, g.height as i64, g.width as i64];
    // Always drawn on the CPU, so that one seed means the same images on every device.
    Tensor::randn(size, (Kind::Float, Device::Cpu)).to_device(teacher.device()).to_kind(teacher.kind())
}

/// Asks both networks what they see in exactly these pixels. Without labels the teacher gives them.
fn finish(
    teacher: &Teacher,
    made: Made,
    (kind, json): (SynthesizerKind, &Arc<str>),
    surroundings: &mut dyn Surroundings,
) -> DreamBatch {
    let _guard = tch::no_grad_guard();
    let Made { pixels, labels, student_version } = made;
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
        settings: json.clone(),
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// A log that is large and consists of one batch.
    struct Log(Recalled);

    impl Surroundings for Log {
        fn recall(&mut self, count: usize) -> Option<Recalled> {
            assert_eq!(count, self.0.labels.len());
            Some(self.0.clone())
        }
    }

    #[test]
    fn warm_adi_goes_on_with_images_of_the_log() {
        let _alone = crate::testing::drawing_alone();
        let teacher = fast::tests::teacher();
        let images: Vec<u8> = (0..6 * 64).map(|at| (at * 7 % 256) as u8).collect();
        let labels = vec![2, 1, 0, 2, 1, 0];
        let mut log = Log(Recalled { images: images.clone(), labels: labels.clone(), drawn_from: u64::MAX });
        let settings = Settings {
            synthesizer: SynthesizerKind::WarmAdi,
            batch_size: 6,
            warm_iterations: 1,
            // Steps too small to be seen.
            learning_rate: 1e-9,
            ..Settings::preset("digits").unwrap()
        };
        let batch = Synthesizer::new(settings, 3, 1).run(&teacher, &mut log).unwrap();
        assert_eq!(batch.images, images);
        assert_eq!(batch.labels, labels);
    }

    #[test]
    fn a_small_log_starts_anew_and_a_large_one_seldom() {
        let _alone = crate::testing::drawing_alone();
        let settings = Settings { batch_size: 10, ..Settings::preset("digits").unwrap() };
        let mut synthesizer = Synthesizer::new(settings, 10, 1);
        let mut of_a_thousand = |log_images| (0..1000).filter(|_| synthesizer.starts_anew(log_images)).count();
        assert_eq!(of_a_thousand(0), 1000);
        assert_eq!(of_a_thousand(160), 1000);
        assert!((200..300).contains(&of_a_thousand(640)), "a quarter");
        assert!((1..30).contains(&of_a_thousand(16_000)), "a hundredth: the log never stops growing");
    }
}
