//! Presets and settings of the synthesizers, validated before anything runs. No tensors here.
//!
//! Weights are those of the published code at its batch of 256 ([`REFERENCE_BATCH`]). The published TV-l2 and l2 terms
//! are norms over the whole batch and grow with its square root while cross-entropy is a mean; here those two are
//! scaled by `sqrt(256 / batch)`, so that one set of weights means the same at any batch size and equals the published
//! loss at 256.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::model::augment::Augmentation;

mod fast;
mod options;
mod presets;

pub use fast::{FastOptions, FastSettings, Meta};
pub use options::SynthesisOptions;
pub use presets::PRESETS;

/// The batch size at which the published weights were chosen.
pub const REFERENCE_BATCH: f64 = 256.0;

/// What makes the images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum SynthesizerKind {
    /// Pixels optimized by DeepInversion; adaptive as soon as there is a student.
    Adi,
    /// The same from images of the log instead of noise; the smaller the log, the more often still from noise.
    WarmAdi,
    /// A meta-learned generator.
    Fast,
    /// A few steps of DeepInversion on the generator's images.
    Hybrid,
    /// Random images labelled by the teacher.
    Noise,
}

impl SynthesizerKind {
    /// Every kind, in the order of the codes in a batch's `synthesizer` tensor.
    pub const ALL: [Self; 5] = [Self::Adi, Self::WarmAdi, Self::Fast, Self::Hybrid, Self::Noise];

    /// The kind of this name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// The name in chunks, metrics and Describe.
    pub fn name(self) -> &'static str {
        match self {
            Self::Adi => "adi",
            Self::WarmAdi => "warm-adi",
            Self::Fast => "fast",
            Self::Hybrid => "hybrid",
            Self::Noise => "noise",
        }
    }
}

/// How the learning rate goes over a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Schedule {
    /// Always the same.
    Constant,
    /// Half a cosine from the rate to zero.
    Cosine,
    /// Linear warm-up over the first 5 % of the run (the published code's 100 of 2000 iterations), then the cosine.
    WarmupCosine,
}

/// How competition between teacher and student is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum CompeteForm {
    /// True Jensen–Shannon divergence (Yin et al. 2020, eq. 8).
    Js,
    /// As the published code computes it: reversed KL terms, probabilities clamped to [0.01, 0.99].
    Reference,
    /// Minus KL(teacher, student) of the images in which both see the same class; the others have no gradient
    /// (Fang et al. 2022).
    Agreement,
}

/// Which classes the images of a batch are made for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Targets {
    /// Every class alike.
    Balanced,
    /// These classes in turn, repeated as often as they are listed.
    List(Vec<u32>),
    /// These classes in these proportions.
    Mix(Vec<(u32, f64)>),
}

impl FromStr for Targets {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text == "balanced" {
            return Ok(Self::Balanced);
        }
        let wrong = || {
            format!("targets {text:?}: give balanced, a list of classes such as 3,5,5, or a mix such as 3:0.2,5:0.8")
        };
        if text.contains(':') {
            let part = |part: &str| {
                let (class, share) = part.split_once(':')?;
                let share: f64 = share.trim().parse().ok().filter(|s: &f64| s.is_finite() && *s > 0.0)?;
                Some((class.trim().parse().ok()?, share))
            };
            text.split(',').map(part).collect::<Option<_>>().map(Self::Mix).ok_or_else(wrong)
        } else {
            text.split(',').map(|c| c.trim().parse().ok()).collect::<Option<_>>().map(Self::List).ok_or_else(wrong)
        }
    }
}

impl TryFrom<String> for Targets {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl fmt::Display for Targets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let join = |parts: Vec<String>| parts.join(",");
        match self {
            Self::Balanced => f.write_str("balanced"),
            Self::List(classes) => f.write_str(&join(classes.iter().map(u32::to_string).collect())),
            Self::Mix(mix) => {
                f.write_str(&join(mix.iter().map(|(class, share)| format!("{class}:{share}")).collect()))
            }
        }
    }
}

impl From<Targets> for String {
    fn from(targets: Targets) -> Self {
        targets.to_string()
    }
}

/// Every setting of a synthesis run. What each means is said here, and its value in each preset's file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    /// What makes the images.
    pub synthesizer: SynthesizerKind,
    /// The preset that the other settings started from.
    pub preset: String,
    /// Images a run.
    pub batch_size: usize,
    /// Optimizer steps a run.
    pub iterations: u32,
    /// Optimizer steps of a run that starts from images of the log.
    pub warm_iterations: u32,
    /// Optimizer steps on the pixels of the generator's images.
    pub hybrid_iterations: u32,
    /// Adam's learning rate, in units of normalized pixels.
    pub learning_rate: f64,
    /// Adam's decay of the first and second moment.
    pub betas: [f64; 2],
    /// How the learning rate goes over a run.
    pub schedule: Schedule,
    /// Weight of the cross-entropy of the teacher's logits with the targets.
    pub cross_entropy_weight: f64,
    /// Weight of total variation, l1.
    pub tv_l1_weight: f64,
    /// Weight of total variation, l2.
    pub tv_l2_weight: f64,
    /// Weight of the images' l2 norm.
    pub l2_weight: f64,
    /// Weight of R_feature, the distance of batch-norm statistics.
    pub r_feature_weight: f64,
    /// The first batch norm counts this many times in R_feature.
    pub first_bn_multiplier: f64,
    /// Weight of R_compete. Without a student the term is absent.
    pub compete_weight: f64,
    /// Which form R_compete takes.
    pub compete_form: CompeteForm,
    /// The temperature of R_compete.
    pub compete_temperature: f64,
    /// Images are rolled by up to this many pixels in each direction at every step.
    pub jitter: u32,
    /// Whether the batch is mirrored at every other step, at random.
    pub flip: bool,
    /// Whether pixels are kept within 0..255 after each step.
    pub clip: bool,
    /// Which classes to make.
    pub targets: Targets,
    /// Each batch is handed over this many more times, changed by `view_augmentation`, with the teacher's logits on exactly
    /// the changed pixels.
    pub views: u32,
    /// What a view changes, for each image in its own way.
    pub view_augmentation: Augmentation,
    /// The generator.
    pub fast: FastSettings,
}

impl Settings {
    /// The settings of the preset of this name.
    pub fn preset(name: &str) -> Option<Self> {
        let table = presets::table(name)?;
        Self::deserialize(toml::Value::Table(table)).ok()
    }

    /// These settings as JSON.
    pub fn json(&self) -> Arc<str> {
        // Numbers, names and text: nothing in it can fail to be written.
        serde_json::to_string(self).unwrap_or_default().into()
    }

    /// Every way in which the settings cannot work with a teacher of `num_classes` outputs.
    pub fn problems(&self, num_classes: usize) -> Vec<String> {
        let mut problems = Vec::new();
        let mut check = |ok: bool, problem: String| {
            if !ok {
                problems.push(problem);
            }
        };
        let batch = self.batch_size;
        check((1..=65_536).contains(&batch), format!("batch_size is {batch}; give 1 to 65536"));
        for (name, iterations) in [
            ("iterations", self.iterations),
            ("warm_iterations", self.warm_iterations),
            ("hybrid_iterations", self.hybrid_iterations),
        ] {
            check((1..=1_000_000).contains(&iterations), format!("{name} is {iterations}; give 1 to 1000000"));
        }
        let positive = |v: f64| v.is_finite() && v > 0.0;
        let lr = self.learning_rate;
        check(positive(lr), format!("learning_rate is {lr}; give a positive number"));
        let temperature = self.compete_temperature;
        check(positive(temperature), format!("compete_temperature is {temperature}; give a positive number"));
        check(
            self.betas.iter().all(|b| (0.0..1.0).contains(b)),
            format!("betas are {:?}; give two numbers from 0 up to, not including, 1", self.betas),
        );
        for (name, weight) in [
            ("cross_entropy_weight", self.cross_entropy_weight),
            ("tv_l1_weight", self.tv_l1_weight),
            ("tv_l2_weight", self.tv_l2_weight),
            ("l2_weight", self.l2_weight),
            ("r_feature_weight", self.r_feature_weight),
            ("first_bn_multiplier", self.first_bn_multiplier),
            ("compete_weight", self.compete_weight),
        ] {
            check(weight.is_finite() && weight >= 0.0, format!("{name} is {weight}; give a number from 0"));
        }
        let classes: Vec<u32> = match &self.targets {
            Targets::Balanced => Vec::new(),
            Targets::List(classes) => classes.clone(),
            Targets::Mix(mix) => mix.iter().map(|(class, _)| *class).collect(),
        };
        for class in classes {
            check(
                (class as usize) < num_classes,
                format!(
                    "targets name class {class}; the teacher has the classes 0 to {}",
                    num_classes.saturating_sub(1)
                ),
            );
        }
        let views = self.views;
        check(views <= 1000, format!("views is {views}; give at most 1000"));
        problems.extend(self.fast.problems());
        problems
    }
}
