//! Settings of the generator of the fast tier (Fang et al., AAAI 2022).

use serde::{Deserialize, Serialize};

use super::CompeteForm;

/// How the generator learns from the copies that make the batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Meta {
    /// First-order MAML: along the sum of the copy's gradients, at the learning rate times the number of steps.
    Fomaml,
    /// Reptile: towards the copy's parameters, at the learning rate.
    Reptile,
}

/// Every setting of the generator.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FastSettings {
    /// Optimizer steps a batch, K.
    pub steps: u32,
    /// Adam's learning rate for the generator.
    pub learning_rate: f64,
    /// Adam's learning rate for the latent vectors.
    pub latent_learning_rate: f64,
    /// How the generator learns.
    pub meta: Meta,
    /// The length of a latent vector.
    pub latent: usize,
    /// Channels of the last hidden map.
    pub width: usize,
    /// Whether the generator is told the class.
    pub conditional: bool,
    /// Whether each target goes to an image in which the teacher already sees it, as far as there are enough.
    pub assign: bool,
    /// Weight of the cross-entropy of the teacher's logits with the targets.
    pub cross_entropy_weight: f64,
    /// Weight of R_feature.
    pub r_feature_weight: f64,
    /// The part of earlier batches in the statistics that R_feature compares.
    pub statistics_momentum: f64,
    /// Weight of R_compete. Without a student the term is absent.
    pub compete_weight: f64,
    /// Which form R_compete takes; at temperature 1.
    pub compete_form: CompeteForm,
    /// Batches after which the generator's first layer starts anew, again and again; 0 = never.
    pub reset_every: u64,
    /// Batches that a new generator makes for itself before the first one that is handed over.
    pub warmup: u64,
    /// After each optimized batch its generator makes this many more from new latent vectors without optimizing them: they
    /// are nearly as good, and cost two forward passes.
    pub samples: u32,
}

impl FastSettings {
    /// Every way in which the settings cannot work.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut check = |ok: bool, problem: String| {
            if !ok {
                problems.push(problem);
            }
        };
        let steps = self.steps;
        check((1..=10_000).contains(&steps), format!("fast.steps is {steps}; give 1 to 10000"));
        for (name, value) in
            [("learning_rate", self.learning_rate), ("latent_learning_rate", self.latent_learning_rate)]
        {
            check(value.is_finite() && value > 0.0, format!("fast.{name} is {value}; give a positive number"));
        }
        let (latent, width) = (self.latent, self.width);
        check((1..=16_384).contains(&latent), format!("fast.latent is {latent}; give 1 to 16384"));
        check((1..=4096).contains(&width), format!("fast.width is {width}; give 1 to 4096"));
        for (name, weight) in [
            ("cross_entropy_weight", self.cross_entropy_weight),
            ("r_feature_weight", self.r_feature_weight),
            ("compete_weight", self.compete_weight),
        ] {
            check(weight.is_finite() && weight >= 0.0, format!("fast.{name} is {weight}; give a number from 0"));
        }
        let momentum = self.statistics_momentum;
        check(
            (0.0..1.0).contains(&momentum),
            format!("fast.statistics_momentum is {momentum}; give a number from 0 up to, not including, 1"),
        );
        problems
    }
}

/// What to change in a preset's generator. What is not given keeps the preset's value.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(default, deny_unknown_fields)]
pub struct FastOptions {
    /// The generator's optimizer steps a batch.
    #[arg(id = "fast_steps", long = "fast-steps", value_name = "K")]
    pub steps: Option<u32>,
    /// Adam's learning rate for the generator.
    #[arg(id = "fast_learning_rate", long = "fast-learning-rate", value_name = "RATE")]
    pub learning_rate: Option<f64>,
    /// Adam's learning rate for the latent vectors.
    #[arg(id = "fast_latent_learning_rate", long = "fast-latent-learning-rate", value_name = "RATE")]
    pub latent_learning_rate: Option<f64>,
    /// How the generator learns from its copies.
    #[arg(id = "fast_meta", long = "fast-meta", value_enum, value_name = "META")]
    pub meta: Option<Meta>,
    /// The length of a latent vector.
    #[arg(id = "fast_latent", long = "fast-latent", value_name = "N")]
    pub latent: Option<usize>,
    /// Channels of the generator's last hidden map.
    #[arg(id = "fast_width", long = "fast-width", value_name = "N")]
    pub width: Option<usize>,
    /// Whether the generator is told the class: true or false.
    #[arg(id = "fast_conditional", long = "fast-conditional", value_name = "BOOL")]
    pub conditional: Option<bool>,
    /// Whether each target goes to an image in which the teacher already sees it: true or false.
    #[arg(id = "fast_assign", long = "fast-assign", value_name = "BOOL")]
    pub assign: Option<bool>,
    /// Weight of the teacher's cross-entropy.
    #[arg(id = "fast_cross_entropy_weight", long = "fast-cross-entropy-weight", value_name = "WEIGHT")]
    pub cross_entropy_weight: Option<f64>,
    /// Weight of R_feature.
    #[arg(id = "fast_r_feature_weight", long = "fast-r-feature-weight", value_name = "WEIGHT")]
    pub r_feature_weight: Option<f64>,
    /// The part of earlier batches in the statistics that R_feature compares, 0 to below 1.
    #[arg(id = "fast_statistics_momentum", long = "fast-statistics-momentum", value_name = "PART")]
    pub statistics_momentum: Option<f64>,
    /// Weight of R_compete.
    #[arg(id = "fast_compete_weight", long = "fast-compete-weight", value_name = "WEIGHT")]
    pub compete_weight: Option<f64>,
    /// The form of R_compete.
    #[arg(id = "fast_compete_form", long = "fast-compete-form", value_enum, value_name = "FORM")]
    pub compete_form: Option<CompeteForm>,
    /// Start the generator's first layer anew each time after this many batches; 0 = never.
    #[arg(id = "fast_reset_every", long = "fast-reset-every", value_name = "N")]
    pub reset_every: Option<u64>,
    /// Batches that a new generator makes for itself before the first that is handed over.
    #[arg(id = "fast_warmup", long = "fast-warmup", value_name = "N")]
    pub warmup: Option<u64>,
    /// Batches that the generator only samples after each that it optimizes.
    #[arg(id = "fast_samples", long = "fast-samples", value_name = "N")]
    pub samples: Option<u32>,
}
