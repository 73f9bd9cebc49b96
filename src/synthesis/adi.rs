//! DeepInversion on pixels, adaptive as soon as there is a student (Yin et al. 2020, §3.2 to 3.4).

use std::time::Instant;

use rand::RngExt;
use rand_chacha::ChaCha8Rng;
use tch::Tensor;

use super::adam::Adam;
use super::memory::StatisticsMemory;
use super::objective::{self, Bounded, Gradients, LossReport};
use super::settings::{Schedule, Settings};
use super::{Flow, Optimized, StepReport, Surroundings, SynthesisError, Teacher};
use crate::model::network::FrozenNetwork;

/// The loss is read, which waits for the device, at every step whose index is a multiple of this, and at the last.
pub const REPORT_EVERY: u32 = 10;

/// The student's part of an image's gradient is at most this many times the part of teacher and prior, or that of the
/// batch's average image where an image's own is smaller: so all of them together never lead away from what the teacher wants.
/// A student that learns stays below 0.5 in `adi`; in `fast` one image in ten reaches 1 and the largest 1.8 (digits). One with
/// logits of 10^4 would be thousands of times louder than the teacher.
const STUDENT_SHARE: f64 = 1.0;

/// The factor on the learning rate at `step` of `steps`.
pub fn schedule_factor(schedule: Schedule, step: u32, steps: u32) -> f64 {
    let cosine = |done: f64| 0.5 * (1.0 + (std::f64::consts::PI * done).cos());
    let (step, steps) = (f64::from(step), f64::from(steps.max(1)));
    match schedule {
        Schedule::Constant => 1.0,
        Schedule::Cosine => cosine(step / steps),
        Schedule::WarmupCosine => {
            let warmup = (steps * 0.05).max(1.0);
            if step < warmup { (step + 1.0) / warmup } else { cosine((step - warmup) / (steps - warmup).max(1.0)) }
        }
    }
}

/// The roll and mirror that a whole batch gets at one step. Both are permutations of pixels, so the gradient goes back
/// through their inverse.
#[derive(Clone, Copy, Debug)]
pub(super) struct Jitter {
    shift: [i64; 2],
    mirrored: bool,
}

impl Jitter {
    pub(super) fn draw(settings: &Settings, rng: &mut ChaCha8Rng) -> Self {
        let reach = i64::from(settings.jitter);
        Self {
            shift: [rng.random_range(-reach..=reach), rng.random_range(-reach..=reach)],
            mirrored: settings.flip && rng.random_bool(0.5),
        }
    }

    pub(super) fn apply(self, x: &Tensor) -> Tensor {
        let rolled = if self.shift == [0, 0] { x.shallow_clone() } else { x.roll(self.shift, [2, 3]) };
        if self.mirrored { rolled.flip([3]) } else { rolled }
    }

    pub(super) fn undo(self, gradient: &Tensor) -> Tensor {
        let gradient = if self.mirrored { gradient.flip([3]) } else { gradient.shallow_clone() };
        let [down, right] = self.shift;
        if self.shift == [0, 0] { gradient } else { gradient.roll([-down, -right], [2, 3]) }
    }
}

/// The gradient of one step's weighted loss with respect to the images as the networks see them, `[N, C, H, W]`, and
/// the loss. `seen` are normalized images, `targets` their classes `[N]`.
pub fn image_gradient(
    teacher: &Teacher,
    settings: &Settings,
    seen: &Tensor,
    targets: &Tensor,
    student: Option<&FrozenNetwork>,
) -> (Tensor, Gradients) {
    gradient_beside(teacher, settings, seen, targets, student, None)
}

/// The same. With a memory, R_feature (weight and all) holds the batch's statistics mixed with those of earlier batches
/// against the teacher's.
pub(super) fn gradient_beside(
    teacher: &Teacher,
    settings: &Settings,
    seen: &Tensor,
    targets: &Tensor,
    student: Option<&FrozenNetwork>,
    memory: Option<&mut StatisticsMemory>,
) -> (Tensor, Gradients) {
    let mut recorded = teacher.network.forward(seen, settings.r_feature_weight > 0.0);
    if let Some(memory) = memory {
        memory.mix(&mut recorded.statistics);
    }
    let student = student.map(|network| (network, network.forward(seen, false)));
    let mut loss = objective::evaluate(
        settings,
        seen,
        targets,
        &recorded.logits,
        &recorded.statistics,
        student.as_ref().map(|(_, recorded)| &recorded.logits),
    );
    let mut gradient = teacher.network.backward(recorded, &loss.teacher_logits, &loss.statistics);
    if let Some(prior) = &loss.images {
        gradient += prior;
    }
    if let (Some((network, recorded)), Some(logits)) = (student, &loss.student_logits) {
        let mut part = network.backward(recorded, logits, &[]);
        // Where nothing is asked of the teacher, there is nothing to hold the student against.
        if settings.cross_entropy_weight > 0.0 || settings.r_feature_weight > 0.0 {
            let norms = gradient.flatten(1, -1).norm_scalaropt_dim(2, [1i64].as_slice(), false);
            let most = norms.maximum(&norms.square().mean(None).sqrt()) * STUDENT_SHARE;
            let bounded;
            (part, bounded) = objective::bounded(&part, &most);
            loss.bounded = loss.bounded.map(|other| other.logical_or(&bounded));
        }
        gradient += part;
    }
    (gradient, loss)
}

/// Optimizes `[N, C, H, W]` normalized images in place of `images`, whose targets are `[N]`.
pub(super) fn optimize(
    teacher: &Teacher,
    settings: &Settings,
    mut images: Tensor,
    targets: &Tensor,
    rng: &mut ChaCha8Rng,
    surroundings: &mut dyn Surroundings,
) -> Result<Optimized, SynthesisError> {
    let mut adam = Adam::new(&images, settings.betas);
    let mut bounded = Bounded::default();
    let mut student_version = 0;
    for step in 0..settings.iterations {
        if surroundings.flow() == Flow::Stop {
            return Err(SynthesisError::Stopped);
        }
        let began = Instant::now();
        let jitter = Jitter::draw(settings, rng);
        let seen = jitter.apply(&images);

        // Without competition a student would be a forward and a backward pass for a gradient of zero.
        let student = if settings.compete_weight > 0.0 { surroundings.student() } else { None };
        student_version = student.map_or(student_version, |(_, version)| version);
        let (gradient, loss) = image_gradient(teacher, settings, &seen, targets, student.map(|(net, _)| net));
        bounded.count(&loss);
        let rate = settings.learning_rate * schedule_factor(settings.schedule, step, settings.iterations);
        tch::no_grad(|| {
            adam.step(&mut images, &jitter.undo(&gradient).contiguous(), rate);
            if settings.clip {
                teacher.pixels.clip(&mut images);
            }
        });

        let last = step + 1 == settings.iterations;
        let losses = (step.is_multiple_of(REPORT_EVERY) || last).then(|| loss.report(&mut bounded));
        let finite = losses.as_ref().is_none_or(LossReport::is_finite)
            && (!last || images.isfinite().all().int64_value(&[]) == 1);
        surroundings.step_done(StepReport { step, elapsed: began.elapsed(), student_version, losses });
        if !finite {
            return Err(SynthesisError::NotFinite { step });
        }
    }
    Ok(Optimized { images, student_version })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use rand::SeedableRng;
    use tch::Kind;

    #[test]
    fn jitter_is_undone_exactly() {
        let _alone = crate::testing::drawing_alone();
        let settings = Settings { jitter: 3, flip: true, ..Settings::preset("cifar10").unwrap() };
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        let x = Tensor::randn([2, 3, 8, 9], (Kind::Float, tch::Device::Cpu));
        for _ in 0..20 {
            let jitter = Jitter::draw(&settings, &mut rng);
            assert_eq!(jitter.undo(&jitter.apply(&x)), x);
        }
    }

    #[test]
    fn schedules_start_and_end_where_they_should() {
        assert_eq!(schedule_factor(Schedule::Constant, 1999, 2000), 1.0);
        assert_eq!(schedule_factor(Schedule::Cosine, 0, 2000), 1.0);
        assert!(schedule_factor(Schedule::Cosine, 1999, 2000) < 1e-5);
        assert_eq!(schedule_factor(Schedule::WarmupCosine, 0, 2000), 0.01);
        assert_eq!(schedule_factor(Schedule::WarmupCosine, 99, 2000), 1.0);
        assert_eq!(schedule_factor(Schedule::WarmupCosine, 100, 2000), 1.0);
        assert!(schedule_factor(Schedule::WarmupCosine, 1999, 2000) < 1e-5);
    }
}
