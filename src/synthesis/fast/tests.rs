#![allow(clippy::unwrap_used)]

use rand::SeedableRng;

use super::*;
use crate::model::network::FrozenNetwork;
use crate::model::pixels::Pixels;
use crate::model::source::{Geometry, Normalization};
use crate::model::spec::NetworkSpec;
use crate::model::trainable::{Metadata, TrainableNetwork};
use crate::synthesis::settings::FastSettings;

mod poison;

const GEOMETRY: Geometry = Geometry { channels: 1, height: 8, width: 8 };

struct Alone;

impl Surroundings for Alone {}

/// Of 3 classes of 8x8 grey images, random.
pub(in crate::synthesis) fn teacher() -> Teacher {
    tch::manual_seed(5);
    let spec = NetworkSpec::fresh("resnet8", 1, 3).unwrap();
    let metadata = Metadata::new("resnet8", &[0.5], &[0.25], [8, 8], &[]);
    let file = TrainableNetwork::fresh(&spec, Device::Cpu).to_safetensors(&metadata);
    let checkpoint = crate::model::checkpoint::Checkpoint::parse(file.into()).unwrap();
    let normalization = Normalization { mean: vec![0.5], std: vec![0.25] };
    Teacher {
        network: FrozenNetwork::load(&spec, &checkpoint, Device::Cpu, Kind::Float),
        geometry: GEOMETRY,
        pixels: Pixels::new(&normalization, Device::Cpu, Kind::Float),
    }
}

fn settings() -> Settings {
    let digits = Settings::preset("digits").unwrap();
    let fast = FastSettings { steps: 2, width: 4, latent: 8, warmup: 1, ..digits.fast };
    Settings { batch_size: 6, fast, ..digits }
}

fn batch(generator: &mut FastGenerator, teacher: &Teacher, settings: &Settings, seed: u64) -> Tensor {
    tch::manual_seed(seed as i64);
    let targets = Tensor::from_slice(&[0i64, 1, 2, 0, 1, 2]);
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    generator.make(teacher, settings, &targets, &mut rng, &mut Alone).unwrap().images
}

#[test]
fn a_restored_generator_makes_what_the_saved_one_would_have_made() {
    let _alone = crate::testing::drawing_alone();
    let teacher = teacher();
    for meta in [Meta::Fomaml, Meta::Reptile] {
        let mut settings = settings();
        settings.fast.meta = meta;
        let mut generator = FastGenerator::fresh(&teacher, &settings);
        let _ = batch(&mut generator, &teacher, &settings, 1);
        let file = generator.save();
        let mut restored = FastGenerator::restore(&teacher, &settings, file.into()).unwrap();
        assert_eq!(restored.batches(), 2);
        for seed in [2, 3] {
            let wanted = batch(&mut generator, &teacher, &settings, seed);
            assert_eq!(batch(&mut restored, &teacher, &settings, seed), wanted, "{meta:?}, batch {seed}");
        }
    }
}

#[test]
fn a_file_that_does_not_fit_is_refused_by_name() {
    let _alone = crate::testing::drawing_alone();
    let (teacher, settings) = (teacher(), settings());
    let file = FastGenerator::fresh(&teacher, &settings).save();
    let wider = Settings { fast: FastSettings { width: 5, ..settings.fast.clone() }, ..settings.clone() };
    let error = FastGenerator::restore(&teacher, &wider, file.clone().into()).unwrap_err();
    assert!(error.to_string().contains("linear.weight"), "{error}");
    let cut = file[..file.len() - 4].to_vec();
    assert!(matches!(FastGenerator::restore(&teacher, &settings, cut.into()), Err(StateError::File(_))));
}

#[test]
fn samples_are_new_images_and_teach_the_generator_nothing() {
    let _alone = crate::testing::drawing_alone();
    let (teacher, mut settings) = (teacher(), settings());
    settings.fast.samples = 2;
    let mut generator = FastGenerator::fresh(&teacher, &settings);
    let made: Vec<Tensor> = (0..4).map(|seed| batch(&mut generator, &teacher, &settings, seed)).collect();
    // Warm-up, optimized, two sampled, optimized.
    assert_eq!(generator.batches(), 3);
    for (a, b) in [(0, 1), (1, 2), (2, 3)] {
        assert_ne!(made[a], made[b]);
    }
}

#[test]
fn each_target_gets_the_image_that_suits_it() {
    // Image 0 is class 1, image 1 class 0; image 2 is class 1 too, but less so, and must take what is left.
    let logits = Tensor::from_slice(&[0f32, 9.0, 9.0, 0.0, 0.0, 3.0]).view([3, 2]);
    let chosen = assignment(&logits, &Tensor::from_slice(&[1i64, 0, 0]));
    assert_eq!(Vec::<i64>::try_from(chosen).unwrap(), [0, 1, 2]);
    let chosen = assignment(&logits, &Tensor::from_slice(&[0i64, 1, 1]));
    assert_eq!(Vec::<i64>::try_from(chosen).unwrap(), [1, 0, 2]);
}

#[test]
fn a_generator_that_is_told_the_class_makes_it() {
    let _alone = crate::testing::drawing_alone();
    let (teacher, mut settings) = (teacher(), settings());
    // Classes only, so that nothing else decides.
    settings.fast = FastSettings {
        conditional: true,
        assign: false,
        r_feature_weight: 0.0,
        compete_weight: 0.0,
        cross_entropy_weight: 1.0,
        ..settings.fast
    };
    let mut generator = FastGenerator::fresh(&teacher, &settings);
    (0..40).for_each(|seed| drop(batch(&mut generator, &teacher, &settings, seed)));
    // Sixteen of each class, mixed as in training.
    let latent = Tensor::randn([48, 8], (Kind::Float, Device::Cpu));
    let targets = Tensor::arange(48, (Kind::Int64, Device::Cpu)).remainder(3);
    let one_hot = one_hot(&teacher, &settings, &targets);
    let images = tch::no_grad(|| generator.learned.generator.forward(&latent, one_hot.as_ref()));
    let scores = teacher.network.logits(&teacher.pixels.normalize_unit(&images)).log_softmax(1, None);
    // The mean score of each class where one is asked for: rows are classes asked for, columns classes seen.
    let seen = scores.view([16, 3, 3]).mean_dim([0i64].as_slice(), false, Kind::Double);
    for class in 0..3 {
        let best = seen.select(1, class).argmax(0, false).int64_value(&[]);
        assert_eq!(best, class, "{seen:?}");
    }
}

#[test]
fn a_reset_renews_the_first_layer_alone() {
    let _alone = crate::testing::drawing_alone();
    let (teacher, settings) = (teacher(), settings());
    let mut generator = FastGenerator::fresh(&teacher, &settings);
    let _ = batch(&mut generator, &teacher, &settings, 1);
    let copies = |generator: &FastGenerator| -> Vec<Tensor> {
        generator.learned.generator.parameters().iter().map(|parameter| parameter.detach().copy()).collect()
    };
    let before = copies(&generator);
    generator.reset();
    let after = copies(&generator);
    assert_ne!(before[0], after[0]);
    assert_eq!(before[3..], after[3..]);
    let mut often = settings;
    often.fast.reset_every = 1;
    assert!(batch(&mut generator, &teacher, &often, 2).isfinite().all().int64_value(&[]) == 1);
}
