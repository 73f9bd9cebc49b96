//! What a ruined student does to a generator that outlives it.

use super::*;
use crate::model::checkpoint::Checkpoint;
use crate::trainers::sgd::Sgd;

/// Meets a student, and forgets it as the engine does when the generator was restored.
struct Against {
    student: Option<FrozenNetwork>,
    restored: Vec<Restored>,
    bounded: u64,
}

impl Surroundings for Against {
    fn student(&mut self) -> Option<(&FrozenNetwork, u64)> {
        self.student.as_ref().map(|network| (network, 1))
    }

    fn generator_restored(&mut self, restored: Restored) {
        self.restored.push(restored);
        self.student = None;
    }

    fn step_done(&mut self, report: StepReport) {
        self.bounded += report.losses.map_or(0, |losses| losses.bounded_images);
    }
}

/// Pictures `[N, 1, 8, 8]` of three classes, normalized: horizontal stripes, vertical stripes, a chequered board; in noise,
/// moved about, of any contrast.
fn pictures(targets: &Tensor) -> Tensor {
    let along = Tensor::arange(8, (Kind::Float, Device::Cpu));
    let stripes = |of: Tensor| (of / 2.0).floor().remainder(2.0) * 2.0 - 1.0;
    let count = targets.size()[0];
    let shift = || Tensor::randint(4, [count, 1, 1], (Kind::Float, Device::Cpu));
    let horizontal = stripes(along.view([1, 8, 1]) + shift()).expand([count, 8, 8], false);
    let vertical = stripes(along.view([1, 1, 8]) + shift()).expand([count, 8, 8], false);
    let board = &horizontal * &vertical;
    let all = Tensor::stack(&[horizontal, vertical, board], 1);
    let chosen = all.gather(1, &targets.view([count, 1, 1, 1]).expand([count, 1, 8, 8], false), false);
    let contrast = Tensor::rand([count, 1, 1, 1], (Kind::Float, Device::Cpu)) + 0.5;
    chosen * contrast + Tensor::randn([count, 1, 8, 8], (Kind::Float, Device::Cpu)) * 0.3
}

/// A network that has learned them.
fn trained(seed: i64, steps: usize) -> TrainableNetwork {
    tch::manual_seed(seed);
    let spec = NetworkSpec::fresh("resnet8", 1, 3).unwrap();
    let network = TrainableNetwork::fresh(&spec, Device::Cpu);
    let mut sgd = Sgd::new(0.9, 1e-4);
    for _ in 0..steps {
        let targets = Tensor::randint(3, [32], (Kind::Int64, Device::Cpu));
        network.forward(&pictures(&targets)).cross_entropy_for_logits(&targets).backward();
        sgd.step(&network, 0.05);
    }
    network
}

fn frozen(network: &TrainableNetwork) -> FrozenNetwork {
    let file = network.to_safetensors(&Metadata::new("resnet8", &[0.5], &[0.25], [8, 8], &[]));
    FrozenNetwork::load(network.spec(), &Checkpoint::parse(file.into()).unwrap(), Device::Cpu, Kind::Float)
}

/// The network with its head times a factor.
fn louder(network: &TrainableNetwork, factor: f64) -> FrozenNetwork {
    let copy = network.frozen_copy();
    let _guard = tch::no_grad_guard();
    let _ = copy.parameter("linear.weight").unwrap().shallow_clone().multiply_scalar_(factor);
    frozen(&copy)
}

/// The share of images in which the teacher sees the target, over the last ten of this many batches.
fn share(
    generator: &mut FastGenerator,
    world: &mut Against,
    teacher: &Teacher,
    settings: &Settings,
    batches: u64,
) -> f64 {
    let targets = Tensor::arange(24, (Kind::Int64, Device::Cpu)).remainder(3);
    let mut rng = ChaCha8Rng::seed_from_u64(batches);
    let mut shares = Vec::new();
    for _ in 0..batches {
        match generator.make(teacher, settings, &targets, &mut rng, world) {
            Ok(made) => {
                let seen = teacher.network.logits(&made.images).argmax(1, false).eq_tensor(&targets);
                shares.push(seen.to_kind(Kind::Double).mean(None).double_value(&[]));
            }
            // As the engine does after a few of them.
            Err(_) => world.student = None,
        }
    }
    let last = &shares[shares.len().saturating_sub(10)..];
    last.iter().sum::<f64>() / last.len() as f64
}

#[test]
fn what_a_ruined_student_did_to_the_generator_is_undone_within_twenty_batches() {
    let _alone = crate::testing::drawing_alone();
    let teacher = Teacher { network: frozen(&trained(5, 60)), ..teacher() };
    let student = trained(6, 20);
    let mut settings = settings();
    settings.fast = FastSettings { latent: 32, width: 8, warmup: 0, ..settings.fast };
    let mut generator = FastGenerator::fresh(&teacher, &settings);
    let mut world = Against { student: Some(frozen(&student)), restored: Vec::new(), bounded: 0 };
    let before = share(&mut generator, &mut world, &teacher, &settings, 50);
    assert!(before > 0.7 && world.restored.is_empty(), "{before} {:?}", world.restored);
    let sane = generator.save();
    let diverging: Vec<f64> = (0..6).map(|power| 10f64.powi(7 * power)).collect();
    for factors in [vec![1e4], vec![1e18], vec![3e37], diverging] {
        let mut generator = FastGenerator::restore(&teacher, &settings, sane.clone().into()).unwrap();
        let mut world = Against { student: None, restored: Vec::new(), bounded: 0 };
        for factor in &factors {
            world.student = Some(louder(&student, *factor));
            let _ = share(&mut generator, &mut world, &teacher, &settings, 10 / factors.len() as u64 + 1);
        }
        world.student = Some(frozen(&student));
        let after = share(&mut generator, &mut world, &teacher, &settings, 20);
        // 0.05, and the noise of 240 images.
        assert!(after > before - 0.1, "times {factors:?}: {before} before, {after} after");
    }
}

#[test]
fn a_collapsed_generator_goes_back_to_its_last_good_state_also_after_a_restart() {
    let _alone = crate::testing::drawing_alone();
    let teacher = teacher();
    let settings = settings();
    let mut generator = FastGenerator::fresh(&teacher, &settings);
    for seed in 0..3 {
        let _ = batch(&mut generator, &teacher, &settings, seed);
    }
    generator.health = Health::default();
    let good = Level { teacher_top1: 0.9, r_feature: 5.0 };
    let bad = Level { teacher_top1: 0.1, r_feature: 5.0 };
    for _ in 0..32 {
        assert_eq!(generator.health.judge(good, &mut generator.learned), None);
    }
    let weights = |generator: &FastGenerator| generator.learned.generator.parameters()[3].copy();
    let wanted = weights(&generator);
    let ruin = |generator: &mut FastGenerator| {
        let _guard = tch::no_grad_guard();
        let _ = generator.learned.generator.parameters()[3].shallow_clone().fill_(7.0);
    };
    ruin(&mut generator);
    let mut restarted = FastGenerator::restore(&teacher, &settings, generator.save().into()).unwrap();
    for generator in [&mut generator, &mut restarted] {
        assert_ne!(weights(generator), wanted);
        let restored = (0..8).find_map(|_| generator.health.judge(bad, &mut generator.learned)).unwrap();
        assert!(restored.recent.teacher_top1 < restored.usual.teacher_top1);
        assert_eq!(weights(generator), wanted);
        // And again, should it be ruined again.
        ruin(generator);
        assert!(generator.go_back());
        assert_eq!(weights(generator), wanted);
    }
    // A rise of R_feature is a collapse, too.
    let far = Level { teacher_top1: 0.9, r_feature: 50.0 };
    assert!((0..8).any(|_| generator.health.judge(far, &mut generator.learned).is_some()));
}
