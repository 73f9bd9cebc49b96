//! Every loss term and its gradient with respect to the image, against an independent PyTorch computation in float64
//! (tests/golden/make_golden.py).

use std::path::{Path, PathBuf};

use dreamfeed::model::checkpoint::Checkpoint;
use dreamfeed::model::network::{FrozenNetwork, to_device};
use dreamfeed::model::source::{NetworkSource, SourceOptions};
use dreamfeed::synthesis::settings::{CompeteForm, Settings};
use dreamfeed::synthesis::{Teacher, adi, objective};
use tch::{Device, Kind, Tensor};

const TOLERANCE: f64 = 1e-5;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

struct Golden {
    teacher: Teacher,
    student: FrozenNetwork,
    values: Checkpoint,
    kind: Kind,
}

impl Golden {
    fn load(kind: Kind) -> Self {
        let open = |name: &str| NetworkSource::open(&golden(name), &SourceOptions::default()).unwrap();
        let student = open("student.safetensors");
        Self {
            teacher: Teacher::load(&open("teacher.safetensors"), Device::Cpu, kind),
            student: FrozenNetwork::load(&student.spec, &student.checkpoint, Device::Cpu, kind),
            values: Checkpoint::open(&golden("objective.safetensors")).unwrap(),
            kind,
        }
    }

    fn tensor(&self, name: &str, kind: Kind) -> Tensor {
        to_device(&self.values.get(name).unwrap_or_else(|| panic!("no {name}")), kind, Device::Cpu).unwrap()
    }

    /// Checks one term, which `settings` weights by 1 and every other by 0.
    fn check(&self, golden: &str, term: &str, settings: &Settings, scale: f64) {
        let x = self.tensor("x", self.kind);
        let targets = self.tensor("targets", Kind::Int64);
        let (gradient, loss) = adi::image_gradient(&self.teacher, settings, &x, &targets, Some(&self.student));
        let report = loss.report(&mut objective::Bounded::default());
        let value = report.terms.iter().find(|(name, _)| *name == term).unwrap().1 / scale;
        let expected = self.tensor(&format!("{golden}.value"), Kind::Double).double_value(&[0]);
        assert!(
            (value - expected).abs() <= TOLERANCE * expected.abs(),
            "{golden} ({:?}): value {value}, PyTorch {expected}",
            self.kind
        );
        assert!((report.total / scale - expected).abs() <= TOLERANCE * expected.abs(), "{golden}: {report:?}");
        let expected = self.tensor(&format!("{golden}.grad"), Kind::Double);
        let error = relative_error(&(gradient.to_kind(Kind::Double) / scale), &expected);
        assert!(error <= TOLERANCE, "{golden} ({:?}): gradient is off by {error:e} relative", self.kind);
    }
}

fn relative_error(value: &Tensor, expected: &Tensor) -> f64 {
    ((value - expected).norm() / expected.norm()).double_value(&[])
}

fn only(change: impl FnOnce(&mut Settings)) -> Settings {
    let mut settings = Settings::preset("cifar10-paper").unwrap();
    settings.cross_entropy_weight = 0.0;
    settings.tv_l1_weight = 0.0;
    settings.tv_l2_weight = 0.0;
    settings.l2_weight = 0.0;
    settings.r_feature_weight = 0.0;
    settings.compete_weight = 0.0;
    change(&mut settings);
    settings
}

#[test]
fn every_term_and_its_gradient_equals_pytorch() {
    for kind in [Kind::Double, Kind::Float] {
        let golden = Golden::load(kind);
        let scale = objective::batch_scale(6);
        golden.check("cross_entropy", "cross_entropy", &only(|s| s.cross_entropy_weight = 1.0), 1.0);
        golden.check("tv_l1", "tv_l1", &only(|s| s.tv_l1_weight = 1.0), 1.0);
        golden.check("tv_l2", "tv_l2", &only(|s| s.tv_l2_weight = 1.0), scale);
        golden.check("l2", "l2", &only(|s| s.l2_weight = 1.0), scale);
        golden.check("r_feature", "r_feature", &only(|s| s.r_feature_weight = 1.0), 1.0);
        let first10 = only(|s| (s.r_feature_weight, s.first_bn_multiplier) = (1.0, 10.0));
        golden.check("r_feature_first10", "r_feature", &first10, 1.0);
        let js = only(|s| (s.compete_weight, s.compete_form) = (1.0, CompeteForm::Js));
        golden.check("compete_js", "compete", &js, 1.0);
        let reference = only(|s| (s.compete_weight, s.compete_form) = (1.0, CompeteForm::Reference));
        golden.check("compete_reference", "compete", &reference, 1.0);
        let agreement = only(|s| (s.compete_weight, s.compete_form) = (1.0, CompeteForm::Agreement));
        golden.check("compete_agreement", "compete", &agreement, 1.0);
    }
}

#[test]
fn the_weighted_sum_is_the_sum_of_its_terms() {
    let golden = Golden::load(Kind::Double);
    let settings = Settings {
        tv_l1_weight: 0.5,
        l2_weight: 0.25,
        first_bn_multiplier: 10.0,
        ..Settings::preset("cifar10-paper").unwrap()
    };
    let (x, targets) = (golden.tensor("x", Kind::Double), golden.tensor("targets", Kind::Int64));
    let (gradient, loss) = adi::image_gradient(&golden.teacher, &settings, &x, &targets, Some(&golden.student));
    let scale = objective::batch_scale(6);
    let weighted = [
        ("cross_entropy", settings.cross_entropy_weight),
        ("tv_l1", settings.tv_l1_weight),
        ("tv_l2", settings.tv_l2_weight * scale),
        ("l2", settings.l2_weight * scale),
        ("r_feature_first10", settings.r_feature_weight),
        ("compete_js", settings.compete_weight),
    ];
    let sum = |part: &str| {
        let terms =
            weighted.iter().map(|(name, weight)| golden.tensor(&format!("{name}.{part}"), Kind::Double) * *weight);
        terms.reduce(|a, b| a + b).unwrap()
    };
    let total = sum("value").double_value(&[0]);
    assert!((loss.report(&mut objective::Bounded::default()).total - total).abs() <= TOLERANCE * total);
    assert!(relative_error(&gradient, &sum("grad")) <= TOLERANCE);
}

/// Eight bits of mantissa carry the direction of the gradient, and everything that leaves the networks is f32.
#[test]
fn bf16_maps_give_nearly_the_same_gradient() {
    let (golden, short) = (Golden::load(Kind::Float), Golden::load(Kind::BFloat16));
    let (x, targets) = (golden.tensor("x", Kind::Float), golden.tensor("targets", Kind::Int64));
    let settings = Settings { jitter: 0, ..Settings::preset("cifar10").unwrap() };
    let gradient = |golden: &Golden| {
        let (gradient, _) = adi::image_gradient(&golden.teacher, &settings, &x, &targets, Some(&golden.student));
        assert_eq!(gradient.kind(), Kind::Float);
        gradient
    };
    let (exact, rounded) = (gradient(&golden), gradient(&short));
    let cosine = ((&exact * &rounded).sum(None) / (exact.norm() * rounded.norm())).double_value(&[]);
    assert!(cosine > 0.99, "{cosine}");
    assert_eq!(short.teacher.network.logits(&x).kind(), Kind::Float);
}

#[test]
fn outputs_equal_pytorch() {
    let golden = Golden::load(Kind::Float);
    let x = golden.tensor("x", Kind::Float);
    for (network, name) in [(&golden.teacher.network, "teacher_logits"), (&golden.student, "student_logits")] {
        let difference = (network.logits(&x) - golden.tensor(name, Kind::Float)).abs().max().double_value(&[]);
        assert!(difference <= 1e-4, "{name} differ by {difference}");
    }
}

#[test]
fn networks_and_their_gradients_never_require_gradients() {
    let golden = Golden::load(Kind::Float);
    let x = golden.tensor("x", Kind::Float).set_requires_grad(true);
    let recorded = golden.teacher.network.forward(&x, true);
    assert!(!recorded.logits.requires_grad());
    assert!(
        recorded
            .statistics
            .iter()
            .all(|s| { ![&s.mean, &s.var, &s.running_mean, &s.running_var].iter().any(|t| t.requires_grad()) })
    );
    let targets = golden.tensor("targets", Kind::Int64);
    let settings = Settings::preset("cifar10").unwrap();
    let (gradient, _) = adi::image_gradient(&golden.teacher, &settings, &x, &targets, Some(&golden.student));
    assert!(!gradient.requires_grad());
}

/// A random network for `size` images, one batch norm's scale so small that it is not folded.
fn unusual(size: [i64; 2], folder: &Path) -> Teacher {
    let mut tensors = crate::support::network("resnet8", 2, 3, 11);
    let scale = tensors.get_mut("layer2.0.bn1.weight").unwrap();
    scale.2[..4].copy_from_slice(&1e-6f32.to_le_bytes());
    let image_size = format!("{},{}", size[0], size[1]);
    let metadata = [("arch", "resnet8"), ("mean", "0.5,0.5"), ("std", "0.25,0.2"), ("image_size", &image_size)];
    let path = folder.join("unusual.safetensors");
    std::fs::write(&path, crate::support::file(&tensors, &metadata)).unwrap();
    let source = NetworkSource::open(&path, &SourceOptions::default()).unwrap();
    Teacher::load(&source, Device::Cpu, Kind::Double)
}

#[test]
fn gradients_are_right_at_odd_sizes_and_without_folding() {
    let folder = tempfile::tempdir().unwrap();
    for size in [[15, 15], [9, 6], [2, 2], [1, 3]] {
        let teacher = unusual(size, folder.path());
        tch::manual_seed(3);
        let options = (Kind::Double, Device::Cpu);
        let x = Tensor::randn([4, 2, size[0], size[1]], options);
        let direction = Tensor::randn([4, 2, size[0], size[1]], options);
        let targets = Tensor::from_slice(&[0i64, 1, 2, 0]);
        let settings = Settings { tv_l1_weight: 0.3, ..Settings::preset("cifar10-paper").unwrap() };
        let total = |x: &Tensor| {
            adi::image_gradient(&teacher, &settings, x, &targets, None)
                .1
                .report(&mut objective::Bounded::default())
                .total
        };
        let (gradient, _) = adi::image_gradient(&teacher, &settings, &x, &targets, None);
        let slope = (gradient * &direction).sum(Kind::Double).double_value(&[]);
        let step = 1e-6;
        let measured = (total(&(&x + &direction * step)) - total(&(&x - &direction * step))) / (2.0 * step);
        assert!((slope - measured).abs() <= 1e-5 * measured.abs().max(1.0), "{size:?}: {slope} is not {measured}");
    }
}
