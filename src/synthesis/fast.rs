//! The fast tier: a meta-learned generator makes a batch in a handful of steps (FastDFKD, Fang et al., AAAI 2022).
//!
//! For each batch a copy of the generator and fresh latent vectors are optimized together for K steps; what the copy
//! learned moves the generator itself, from which the next copy starts. So each batch begins where the last one ended,
//! and generator and images adapt to the student as it learns.

use std::time::Instant;

use rand_chacha::ChaCha8Rng;
use tch::{Device, Kind, Tensor};

use super::adam::Adam;
use super::adi::{Jitter, gradient_beside};
use super::memory::StatisticsMemory;
use super::objective::{Bounded, LossReport};
use super::settings::{Meta, Settings};
use super::{Flow, Optimized, StepReport, Surroundings, SynthesisError, Teacher};
use crate::model::generator::{Generator, GeneratorShape};

mod health;
mod state;

use health::Health;
pub use health::{Level, Restored};
pub use state::StateError;

/// Adam's decays for generator and latent vectors, as published.
const BETAS: [f64; 2] = [0.5, 0.999];

/// All that outlives a batch.
#[derive(Debug)]
struct Learned {
    generator: Generator,
    /// One for each parameter.
    meta: Vec<Adam>,
    memory: StatisticsMemory,
    /// Batches made.
    batches: u64,
}

impl Learned {
    /// Shares no memory with this one.
    fn copy(&self) -> Self {
        Self {
            generator: self.generator.copy(),
            meta: self.meta.iter().map(Adam::copy).collect(),
            memory: self.memory.copy(),
            batches: self.batches,
        }
    }
}

/// The generator, and who watches over it.
#[derive(Debug)]
pub struct FastGenerator {
    learned: Learned,
    health: Health,
    /// The copy that made the last batch, the student it was made against, and how many batches it still samples.
    adapted: Option<(Generator, u64, u32)>,
}

impl FastGenerator {
    /// A random one. libtorch's generator decides.
    pub fn fresh(teacher: &Teacher, settings: &Settings) -> Self {
        let generator = Generator::fresh(shape(teacher, settings), teacher.device());
        let meta = generator.parameters().iter().map(|parameter| Adam::new(parameter, BETAS)).collect();
        let memory = StatisticsMemory::new(settings.fast.statistics_momentum);
        let learned = Learned { generator, meta, memory, batches: 0 };
        Self { learned, health: Health::default(), adapted: None }
    }

    /// Batches made so far, those of the warm-up among them.
    pub fn batches(&self) -> u64 {
        self.learned.batches
    }

    /// Goes back to the last good state; false where none is known.
    pub fn go_back(&mut self) -> bool {
        self.adapted = None;
        self.health.go_back(&mut self.learned).is_some()
    }

    /// Makes images for `targets`, `[N]`, and learns from it. Before its first batch it learns from a few that nobody gets.
    pub(super) fn make(
        &mut self,
        teacher: &Teacher,
        settings: &Settings,
        targets: &Tensor,
        rng: &mut ChaCha8Rng,
        surroundings: &mut dyn Surroundings,
    ) -> Result<Optimized, SynthesisError> {
        if let Some((copy, student_version, left)) = self.adapted.take().filter(|(_, _, left)| *left > 0) {
            let _guard = tch::no_grad_guard();
            let one_hot = one_hot(teacher, settings, targets);
            let latent = self.latent(teacher, settings, &copy, targets, one_hot.as_ref());
            let images = teacher.pixels.normalize_unit(&copy.forward(&latent, one_hot.as_ref()));
            self.adapted = Some((copy, student_version, left - 1));
            return Ok(Optimized { images, student_version });
        }
        while self.learned.batches < settings.fast.warmup {
            self.batch(teacher, settings, targets, rng, surroundings)?;
        }
        self.batch(teacher, settings, targets, rng, surroundings)
    }

    fn batch(
        &mut self,
        teacher: &Teacher,
        settings: &Settings,
        targets: &Tensor,
        rng: &mut ChaCha8Rng,
        surroundings: &mut dyn Surroundings,
    ) -> Result<Optimized, SynthesisError> {
        let fast = &settings.fast;
        let batches = self.learned.batches;
        if fast.reset_every > 0 && batches > 0 && batches.is_multiple_of(fast.reset_every) {
            self.reset();
        }
        let weighed = self.weighed(settings);
        let one_hot = one_hot(teacher, settings, targets);
        let latent = self.latent(teacher, settings, &self.learned.generator, targets, one_hot.as_ref());
        let mut latent = latent.set_requires_grad(true);
        let copy = self.learned.generator.trainable_copy();
        let mut adam: Vec<Adam> = copy.parameters().iter().map(|parameter| Adam::new(parameter, BETAS)).collect();
        let mut latent_adam = Adam::new(&latent, BETAS);
        let mut learned: Option<Vec<Tensor>> = None;
        let mut student_version = 0;
        let mut images = None;
        let mut bounded = Bounded::default();
        let mut level = None;
        for step in 0..fast.steps {
            if surroundings.flow() == Flow::Stop {
                return Err(SynthesisError::Stopped);
            }
            let began = Instant::now();
            let x = teacher.pixels.normalize_unit(&copy.forward(&latent, one_hot.as_ref()));
            let made = x.detach();
            let jitter = Jitter::draw(settings, rng);
            let seen = jitter.apply(&made);
            let student = if fast.compete_weight > 0.0 { surroundings.student() } else { None };
            student_version = student.map_or(student_version, |(_, version)| version);
            let student = student.map(|(network, _)| network);
            let (gradient, loss) =
                gradient_beside(teacher, &weighed, &seen, targets, student, Some(&mut self.learned.memory));
            bounded.count(&loss);
            let gradient = jitter.undo(&gradient);
            let leaves: Vec<&Tensor> = copy.parameters().iter().chain([&latent]).collect();
            let mut gradients = Tensor::run_backward(&[(x * gradient).sum(None)], &leaves, false, false);
            let last = step + 1 == fast.steps;
            tch::no_grad(|| {
                if let Some(gradient) = gradients.pop() {
                    latent_adam.step(&mut latent, &gradient, fast.latent_learning_rate);
                }
                let moved = adam.iter_mut().zip(copy.parameters()).zip(&gradients);
                for ((adam, parameter), gradient) in moved {
                    adam.step(&mut parameter.shallow_clone(), gradient, fast.learning_rate);
                }
                learned = Some(match learned.take() {
                    None => gradients,
                    Some(sums) => sums.into_iter().zip(gradients).map(|(sum, gradient)| sum + gradient).collect(),
                });
            });
            // Reading them waits for the device.
            let losses = last.then(|| loss.report(&mut bounded));
            level = losses.as_ref().map(Level::of);
            let finite = losses.as_ref().is_none_or(LossReport::is_finite);
            surroundings.step_done(StepReport { step, elapsed: began.elapsed(), student_version, losses });
            if !finite {
                // Nothing of this batch has reached the generator.
                return Err(SynthesisError::NotFinite { step });
            }
            // The images of the last step are the best and need no further pass; its gradient still teaches the generator.
            images = Some(made);
        }
        let (Some(images), Some(gradients)) = (images, learned) else {
            return Err(SynthesisError::NotFinite { step: 0 });
        };
        if images.isfinite().all().int64_value(&[]) != 1 {
            return Err(SynthesisError::NotFinite { step: fast.steps - 1 });
        }
        self.learn(settings, &copy, gradients);
        self.adapted = Some((copy.frozen_copy(), student_version, fast.samples));
        if let Some(restored) = level.and_then(|level| self.health.judge(level, &mut self.learned)) {
            self.adapted = None;
            surroundings.generator_restored(restored);
        }
        Ok(Optimized { images, student_version })
    }

    /// Latent vectors, in the order of the targets that they suit.
    fn latent(
        &self,
        teacher: &Teacher,
        settings: &Settings,
        generator: &Generator,
        targets: &Tensor,
        one_hot: Option<&Tensor>,
    ) -> Tensor {
        let _guard = tch::no_grad_guard();
        // Drawn on the CPU, so that one seed means the same images on every device.
        let size = [targets.size()[0], settings.fast.latent as i64];
        let latent = Tensor::randn(size, (Kind::Float, Device::Cpu)).to_device(teacher.device());
        if !settings.fast.assign {
            return latent;
        }
        let first = teacher.pixels.normalize_unit(&generator.forward(&latent, one_hot));
        latent.index_select(0, &assignment(&teacher.network.logits(&first), targets))
    }

    /// One step of the generator itself. FOMAML: along the sum of the copy's gradients. Reptile: towards where the copy
    /// ended.
    fn learn(&mut self, settings: &Settings, copy: &Generator, gradients: Vec<Tensor>) {
        let _guard = tch::no_grad_guard();
        let fast = &settings.fast;
        let (rate, directions) = match fast.meta {
            Meta::Fomaml => (fast.learning_rate * f64::from(fast.steps), gradients),
            Meta::Reptile => {
                let pairs = self.learned.generator.parameters().iter().zip(copy.parameters());
                (fast.learning_rate, pairs.map(|(here, there)| here - there).collect())
            }
        };
        let Learned { generator, meta, memory, batches } = &mut self.learned;
        let moved = meta.iter_mut().zip(generator.parameters()).zip(&directions);
        for ((adam, parameter), direction) in moved {
            adam.step(&mut parameter.shallow_clone(), direction, rate);
        }
        memory.remember();
        *batches += 1;
    }

    /// New latent features against images that grow alike.
    fn reset(&mut self) {
        let Learned { generator, meta, .. } = &mut self.learned;
        generator.reset_first_layer();
        for (adam, parameter) in meta.iter_mut().zip(generator.parameters()).take(3) {
            *adam = Adam::new(parameter, BETAS);
        }
        self.health.begin_anew();
    }

    /// The settings with this tier's weights in place of those on pixels.
    fn weighed(&self, settings: &Settings) -> Settings {
        let fast = &settings.fast;
        Settings {
            cross_entropy_weight: fast.cross_entropy_weight,
            tv_l1_weight: 0.0,
            tv_l2_weight: 0.0,
            l2_weight: 0.0,
            r_feature_weight: fast.r_feature_weight * self.learned.memory.weight(),
            first_bn_multiplier: 1.0,
            compete_weight: fast.compete_weight,
            compete_form: fast.compete_form,
            compete_temperature: 1.0,
            ..settings.clone()
        }
    }
}

fn one_hot(teacher: &Teacher, settings: &Settings, targets: &Tensor) -> Option<Tensor> {
    // As loud as all of the latent vector together; else the class drowns in it for the first hundred batches.
    let loudness = (settings.fast.latent as f64).sqrt();
    settings.fast.conditional.then(|| {
        let one_hot = targets.one_hot(teacher.num_classes() as i64).to_kind(Kind::Float);
        one_hot.to_device(teacher.device()) * loudness
    })
}

/// For each target `[N]` the image that shall become it, `[N]`, each image once: of all pairs the one of the highest
/// logit first, `[N, K]`. A generator that is not told the class then makes what was asked for without having to turn one
/// class into another.
fn assignment(logits: &Tensor, targets: &Tensor) -> Tensor {
    let device = logits.device();
    let scores = logits.log_softmax(1, None).index_select(1, targets).to_device(Device::Cpu).to_kind(Kind::Float);
    let order: Vec<i64> = Vec::try_from(scores.view(-1).argsort(0, true)).unwrap_or_default();
    let count = targets.size()[0] as usize;
    let mut chosen = vec![None; count];
    let mut taken = vec![false; count];
    for pair in order {
        // Rows are images, columns targets.
        let (image, target) = (pair as usize / count.max(1), pair as usize % count.max(1));
        if !taken[image] && chosen[target].is_none() {
            taken[image] = true;
            chosen[target] = Some(image as i64);
        }
    }
    let chosen: Vec<i64> = chosen.into_iter().enumerate().map(|(at, image)| image.unwrap_or(at as i64)).collect();
    Tensor::from_slice(&chosen).to_device(device)
}

fn shape(teacher: &Teacher, settings: &Settings) -> GeneratorShape {
    let fast = &settings.fast;
    GeneratorShape {
        latent: fast.latent,
        classes: if fast.conditional { teacher.num_classes() } else { 0 },
        width: fast.width,
        geometry: teacher.geometry,
    }
}

#[cfg(test)]
pub(super) mod tests;
