//! The loss terms of DeepInversion, each a pure function of images, logits or batch-norm statistics.
//!
//! No state, no I/O, no network: a test can hold every term and its gradient against an independent computation. Terms
//! are unweighted; [`Settings`] says how they are summed. Source: Yin et al., CVPR 2020 (arXiv 1912.08795), eqs. 2 to 8,
//! and the published code where the paper leaves the form open.

use tch::{Kind, Reduction, Tensor};

use super::settings::{CompeteForm, REFERENCE_BATCH, Settings};
use crate::model::network::{BatchStatistics, StatisticsGradient};

/// Cross-entropy of the teacher's logits `[N, K]` with the target classes `[N]`, the batch's mean.
pub fn cross_entropy(logits: &Tensor, targets: &Tensor) -> Tensor {
    logits.cross_entropy_loss(targets, None::<&Tensor>, Reduction::Mean, -100, 0.0)
}

/// The four one-pixel differences of total variation: horizontal, vertical and the two diagonals.
fn differences(x: &Tensor) -> [Tensor; 4] {
    let (h, w) = (x.size()[2], x.size()[3]);
    let part = |top: i64, left: i64| x.narrow(2, top, h - 1).narrow(3, left, w - 1);
    let (upper, lower) = (x.narrow(2, 0, h - 1), x.narrow(2, 1, h - 1));
    let (left, right) = (x.narrow(3, 0, w - 1), x.narrow(3, 1, w - 1));
    [left - right, upper - lower, part(0, 0) - part(1, 1), part(1, 0) - part(0, 1)]
}

/// Frobenius norm over a whole tensor.
fn norm(x: &Tensor) -> Tensor {
    x.norm()
}

fn sum(terms: impl IntoIterator<Item = Tensor>) -> Option<Tensor> {
    terms.into_iter().reduce(|a, b| a + b)
}

/// Total variation l2 of images `[N, C, H, W]`: the sum of the Frobenius norms of the four differences over the whole
/// batch, as published. It grows with the square root of N; [`batch_scale`] undoes that.
pub fn tv_l2(x: &Tensor) -> Tensor {
    let [a, b, c, d] = differences(x).map(|difference| norm(&difference));
    a + b + c + d
}

/// Total variation l1 of images `[N, C, H, W]`: the sum of the mean absolute values of the four differences.
pub fn tv_l1(x: &Tensor) -> Tensor {
    let [a, b, c, d] = differences(x).map(|difference| difference.abs().sum(None) / difference.numel().max(1) as f64);
    a + b + c + d
}

/// The l2 norm of images `[N, C, H, W]` over the whole batch, as published for CIFAR. Grows like [`tv_l2`].
pub fn l2(x: &Tensor) -> Tensor {
    norm(x)
}

/// What makes [`tv_l2`] and [`l2`] mean the same at any batch size, and exactly the published terms at 256.
pub fn batch_scale(batch_size: usize) -> f64 {
    (REFERENCE_BATCH / batch_size as f64).sqrt()
}

/// R_feature (eq. 4): over all batch norms, the distance of the batch's mean from `running_mean` plus that of its
/// variance from `running_var`. The first batch norm counts `first_bn_multiplier` times. Zero without batch norms.
pub fn r_feature(statistics: &[BatchStatistics], first_bn_multiplier: f64) -> Option<Tensor> {
    sum(statistics.iter().enumerate().map(|(index, s)| {
        let distance = norm(&(&s.running_mean - &s.mean)) + norm(&(&s.running_var - &s.var));
        if index == 0 { distance * first_bn_multiplier } else { distance }
    }))
}

/// Jensen–Shannon divergence of teacher and student `[N]`, in nats, 0..ln 2, at a temperature. Of a student with more
/// outputs than the teacher's K the first K count.
pub fn js_divergence(teacher_logits: &Tensor, student_logits: &Tensor, temperature: f64) -> Tensor {
    let log_q = (teacher_logits / temperature).log_softmax(1, None);
    let log_p = (first_classes(student_logits, teacher_logits) / temperature).log_softmax(1, None);
    let log_m = log_p.logaddexp(&log_q) - std::f64::consts::LN_2;
    let kl = |log_a: &Tensor| (log_a.exp() * (log_a - &log_m)).sum_dim_intlist([1i64].as_slice(), false, None);
    (kl(&log_p) + kl(&log_q)) * 0.5
}

fn first_classes(student_logits: &Tensor, teacher_logits: &Tensor) -> Tensor {
    student_logits.narrow(1, 0, teacher_logits.size()[1])
}

/// R_compete (eq. 8), the batch's mean: `1 − JS(teacher, student)`.
///
/// [`CompeteForm::Reference`] is what the published code computes instead: probabilities (but not before their mean is
/// taken) clamped to [0.01, 0.99], KL terms reversed, and the sum clamped to [0, 1]. It has no gradient once teacher and
/// student disagree enough, nor for classes below one per cent.
///
/// [`CompeteForm::Agreement`] is the adversarial term of Fang et al. 2022: minus KL(teacher, student), of those images only
/// in which both see the same class.
pub fn r_compete(teacher_logits: &Tensor, student_logits: &Tensor, temperature: f64, form: CompeteForm) -> Tensor {
    match form {
        CompeteForm::Js => js_divergence(teacher_logits, student_logits, temperature).mean(None).neg() + 1.0,
        CompeteForm::Reference => {
            let q = (teacher_logits / temperature).softmax(1, None);
            let p = (first_classes(student_logits, teacher_logits) / temperature).softmax(1, None);
            let m = (&p + &q) * 0.5;
            let [p, q, m] = [p, q, m].map(|t| t.clamp(0.01, 0.99));
            // KLDivLoss(log a, m) with batchmean is the mean over the batch of sum m (log m - log a).
            let kl = |a: &Tensor| (&m * (m.log() - a.log())).sum(None) / teacher_logits.size()[0] as f64;
            let js = (kl(&p) + kl(&q)) * 0.5;
            js.clamp(0.0, 1.0).neg() + 1.0
        }
        CompeteForm::Agreement => {
            let student_logits = first_classes(student_logits, teacher_logits);
            let agree = teacher_logits.argmax(1, false).eq_tensor(&student_logits.argmax(1, false));
            let log_q = (teacher_logits / temperature).log_softmax(1, None);
            let log_p = (student_logits / temperature).log_softmax(1, None);
            let kl = (log_q.exp() * (&log_q - log_p)).sum_dim_intlist([1i64].as_slice(), false, None);
            (kl * agree).mean(None).neg()
        }
    }
}

/// The unweighted value of every term that took part, and their weighted sum.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct LossReport {
    /// The weighted sum.
    pub total: f64,
    /// Names (`cross_entropy`, `tv_l1`, `tv_l2`, `l2`, `r_feature`, `compete`) and unweighted values. `tv_l2` and `l2`
    /// include [`batch_scale`].
    pub terms: Vec<(&'static str, f64)>,
    /// The share of the batch's images in which the teacher sees the target, 0..1.
    pub teacher_top1: f64,
    /// How often since the last report the student's part of an image's gradient was bounded.
    pub bounded_images: u64,
}

impl LossReport {
    /// Whether the loss and all its terms are finite.
    pub fn is_finite(&self) -> bool {
        self.total.is_finite() && self.terms.iter().all(|(_, value)| value.is_finite())
    }
}

/// How often the student's part of an image's gradient was bounded, counted on the device.
#[derive(Debug, Default)]
pub struct Bounded(Option<Tensor>);

impl Bounded {
    /// Adds those of one step. Does not wait for the device.
    pub fn count(&mut self, step: &Gradients) {
        if let Some(bounded) = &step.bounded {
            let here = bounded.sum(Kind::Double);
            self.0 = Some(self.0.take().map_or_else(|| here.shallow_clone(), |before| before + &here));
        }
    }
}

/// The loss of one step and its gradients with respect to everything that depends on the images.
#[derive(Debug)]
pub struct Gradients {
    /// With respect to the images through the image prior alone, `[N, C, H, W]`; absent without a prior.
    pub images: Option<Tensor>,
    /// With respect to the teacher's logits, `[N, K]`; that of R_compete is bounded.
    pub teacher_logits: Tensor,
    /// With respect to the teacher's batch-norm statistics; empty where R_feature has no weight.
    pub statistics: Vec<StatisticsGradient>,
    /// With respect to the student's logits; absent without a student.
    pub student_logits: Option<Tensor>,
    /// Of which images the student's part was bounded, `[N]`; absent without a student.
    pub bounded: Option<Tensor>,
    /// In which images the teacher sees the target, `[N]`.
    recognized: Tensor,
    total: Tensor,
    terms: Vec<(&'static str, Tensor)>,
}

impl Gradients {
    /// The values of the loss, and what was bounded since the last report. Waits for the device.
    pub fn report(&self, bounded: &mut Bounded) -> LossReport {
        let names = self.terms.iter().map(|(name, _)| *name);
        let recognized = self.recognized.to_kind(Kind::Double).mean(None);
        let bounded = bounded.0.take().unwrap_or_else(|| recognized.zeros_like());
        let values: Vec<Tensor> = [&bounded, &recognized, &self.total]
            .into_iter()
            .chain(self.terms.iter().map(|(_, value)| value))
            .map(|value| value.to_kind(Kind::Double))
            .collect();
        // One transfer rather than one a term.
        let values: Vec<f64> = Vec::try_from(Tensor::stack(&values, 0)).unwrap_or_default();
        let mut values = values.into_iter();
        let mut next = || values.next().unwrap_or(f64::NAN);
        LossReport {
            bounded_images: next() as u64,
            teacher_top1: next(),
            total: next(),
            terms: names.zip(values).collect(),
        }
    }
}

/// What [`terms`] gives: a term's name, its weight, its value.
pub type Term = (&'static str, f64, Tensor);

/// The terms of one step's loss, those of the prior only where they count; arguments as in [`evaluate`].
pub fn terms(
    settings: &Settings,
    images: &Tensor,
    targets: &Tensor,
    teacher_logits: &Tensor,
    statistics: &[BatchStatistics],
    student_logits: Option<&Tensor>,
) -> Vec<Term> {
    let scale = batch_scale(images.size()[0] as usize);
    let mut terms = vec![("cross_entropy", settings.cross_entropy_weight, cross_entropy(teacher_logits, targets))];
    if settings.tv_l1_weight > 0.0 {
        terms.push(("tv_l1", settings.tv_l1_weight, tv_l1(images)));
    }
    if settings.tv_l2_weight > 0.0 {
        terms.push(("tv_l2", settings.tv_l2_weight, tv_l2(images) * scale));
    }
    if settings.l2_weight > 0.0 {
        terms.push(("l2", settings.l2_weight, l2(images) * scale));
    }
    if let Some(value) = r_feature(statistics, settings.first_bn_multiplier) {
        terms.push(("r_feature", settings.r_feature_weight, value));
    }
    terms.extend(student_logits.map(|student| competition(settings, teacher_logits, student)));
    terms
}

fn competition(settings: &Settings, teacher_logits: &Tensor, student_logits: &Tensor) -> Term {
    let value = r_compete(teacher_logits, student_logits, settings.compete_temperature, settings.compete_form);
    ("compete", settings.compete_weight, value)
}

/// The steepest that R_compete of weight 1 and temperature 1 may be in the teacher's logits of one image (Euclidean norm).
/// The Jensen–Shannon divergence never is steeper than 0.7; the KL divergence of a student that learns from the teacher
/// seldom is, and that of one with logits of 10^4 would be ten thousand.
const STEEPEST_COMPETITION: f64 = 1.0;

/// A gradient `[N, ...]` with that of each image scaled down to a Euclidean norm of at most `most` (a scalar, or one an
/// image, `[N]`), and which images that changed, `[N]`. An image whose gradient is not finite gets none.
pub fn bounded(gradient: &Tensor, most: &Tensor) -> (Tensor, Tensor) {
    let rows = gradient.flatten(1, -1);
    let peak = rows.abs().amax([1i64].as_slice(), false);
    let finite = peak.isfinite();
    // Divided by its largest element first: the squares of large ones would overflow.
    let peak = peak.where_self(&finite, &peak.ones_like()).clamp_min(f64::from(f32::MIN_POSITIVE));
    let unit = &rows / peak.unsqueeze(1);
    let length = unit.norm_scalaropt_dim(2, [1i64].as_slice(), false);
    let limit = most / length.clamp_min(1.0);
    let scaled = (unit * peak.minimum(&limit).unsqueeze(1)).nan_to_num(0.0, Some(0.0), Some(0.0));
    let changed = peak.gt_tensor(&limit).logical_or(&finite.logical_not());
    let kept = rows.where_self(&changed.logical_not().unsqueeze(1), &scaled);
    (kept.view_as(gradient), changed)
}

/// The weighted sum of [`terms`], a scalar; None of no terms.
pub fn total(terms: &[Term]) -> Option<Tensor> {
    sum(terms.iter().map(|(_, weight, value)| value * *weight))
}

/// The weighted loss of one step: images as the networks saw them, the teacher's logits, its statistics, and the
/// student's logits where there is one.
pub fn evaluate(
    settings: &Settings,
    images: &Tensor,
    targets: &Tensor,
    teacher_logits: &Tensor,
    statistics: &[BatchStatistics],
    student_logits: Option<&Tensor>,
) -> Gradients {
    // Small graphs over leaves of their own; the networks carry these gradients on to the images by hand.
    let leaf = |t: &Tensor| t.detach().set_requires_grad(true);
    // The same logits twice: what the competition asks of them is bounded by itself.
    let (teacher_logits, compared) = (leaf(teacher_logits), leaf(teacher_logits));
    let statistics: Vec<BatchStatistics> = statistics
        .iter()
        .map(|s| BatchStatistics {
            mean: leaf(&s.mean),
            var: leaf(&s.var),
            running_mean: s.running_mean.shallow_clone(),
            running_var: s.running_var.shallow_clone(),
        })
        .collect();
    let student_logits = student_logits.map(leaf);
    let prior = settings.tv_l1_weight > 0.0 || settings.tv_l2_weight > 0.0 || settings.l2_weight > 0.0;
    let prior_images = prior.then(|| leaf(images));

    let images = prior_images.as_ref().unwrap_or(images);
    let mut terms = terms(settings, images, targets, &teacher_logits, &statistics, None);
    terms.extend(student_logits.as_ref().map(|student| competition(settings, &compared, student)));
    let total = total(&terms).unwrap_or_else(|| teacher_logits.sum(None) * 0.0);
    let mut leaves: Vec<&Tensor> = vec![&teacher_logits];
    leaves.extend(student_logits.is_some().then_some(&compared));
    leaves.extend(&prior_images);
    leaves.extend(&student_logits);
    leaves.extend(statistics.iter().flat_map(|s| [&s.mean, &s.var]));
    let mut gradients = Tensor::run_backward(&[&total], &leaves, false, false).into_iter();

    let mut next = || gradients.next().unwrap_or_default();
    let mut teacher_gradient = next();
    let mut clipped = None;
    if student_logits.is_some() {
        let slope = STEEPEST_COMPETITION * settings.compete_weight / settings.compete_temperature;
        let (bounded, rows) = bounded(&next(), &Tensor::from(slope / targets.size()[0].max(1) as f64));
        teacher_gradient += bounded;
        clipped = Some(rows);
    }
    let images = prior_images.as_ref().map(|_| next());
    let student_logits = student_logits.map(|_| next());
    let statistics = statistics.iter().map(|_| StatisticsGradient { mean: next(), var: next() }).collect();
    let terms = terms.into_iter().map(|(name, _, value)| (name, value.detach())).collect();
    Gradients {
        images,
        recognized: teacher_logits.argmax(1, false).eq_tensor(targets),
        teacher_logits: teacher_gradient,
        statistics,
        student_logits,
        bounded: clipped,
        total: total.detach(),
        terms,
    }
}
