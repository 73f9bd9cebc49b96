//! A preset and what flags, environment and files change in it.

use serde::{Deserialize, Serialize};

use toml::{Table, Value};

use super::{CompeteForm, FastOptions, PRESETS, Schedule, Settings, SynthesizerKind, Targets, presets};
use crate::model::augment::Augmentation;
use crate::overlay::overlay;

/// A preset, and what to change in it. What is not given keeps the preset's value.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(default, deny_unknown_fields)]
pub struct SynthesisOptions {
    /// What makes the images: adi (DeepInversion, adaptive with a student), warm-adi (the same from images of the log),
    /// fast (a generator), hybrid (adi from the generator's images) or noise [default: the preset's; serve takes fast with
    /// cifar10 and cifar10-live, adi with the others].
    #[arg(long, value_enum)]
    pub synthesizer: Option<SynthesizerKind>,
    /// The preset: cifar10 (default), cifar10-live, cifar10-paper, digits.
    #[arg(long)]
    pub preset: Option<String>,
    /// Images in one synthesis run; one chunk.
    #[arg(long)]
    pub batch_size: Option<usize>,
    /// Optimizer steps in one synthesis run.
    #[arg(long)]
    pub iterations: Option<u32>,
    /// The same for warm-adi.
    #[arg(long)]
    pub warm_iterations: Option<u32>,
    /// The same for hybrid.
    #[arg(long)]
    pub hybrid_iterations: Option<u32>,
    /// Adam's learning rate.
    #[arg(long)]
    pub learning_rate: Option<f64>,
    /// How the learning rate goes over a run.
    #[arg(long, value_enum)]
    pub schedule: Option<Schedule>,
    /// Weight of the teacher's cross-entropy.
    #[arg(long)]
    pub cross_entropy_weight: Option<f64>,
    /// Weight of total variation, l1.
    #[arg(long)]
    pub tv_l1_weight: Option<f64>,
    /// Weight of total variation, l2.
    #[arg(long)]
    pub tv_l2_weight: Option<f64>,
    /// Weight of the l2 norm.
    #[arg(long)]
    pub l2_weight: Option<f64>,
    /// Weight of R_feature; 0 gives DeepDream.
    #[arg(long)]
    pub r_feature_weight: Option<f64>,
    /// How often the first batch norm counts in R_feature.
    #[arg(long)]
    pub first_bn_multiplier: Option<f64>,
    /// Weight of R_compete; 0 gives plain DeepInversion.
    #[arg(long)]
    pub compete_weight: Option<f64>,
    /// The form of R_compete.
    #[arg(long, value_enum)]
    pub compete_form: Option<CompeteForm>,
    /// The temperature of R_compete.
    #[arg(long)]
    pub compete_temperature: Option<f64>,
    /// Largest roll of the images at each step, in pixels.
    #[arg(long)]
    pub jitter: Option<u32>,
    /// Whether to mirror the batch at random steps: true or false.
    #[arg(long)]
    pub flip: Option<bool>,
    /// Whether to keep pixels within 0..255: true or false.
    #[arg(long)]
    pub clip: Option<bool>,
    /// balanced, a list of classes (3,5,5), or a mix (3:0.2,5:0.8).
    #[arg(long)]
    pub targets: Option<Targets>,
    /// Hand each batch over this many more times in other views, each with the teacher's logits on its own pixels.
    #[arg(long, value_name = "N")]
    pub views: Option<u32>,
    /// What a view changes: none, or a list of shift:N and flip.
    #[arg(long, value_name = "LIST")]
    pub view_augmentation: Option<Augmentation>,
    /// The generator.
    #[command(flatten)]
    pub fast: FastOptions,
}

/// The preset where none is given.
const DEFAULT: &str = "cifar10";

impl SynthesisOptions {
    /// The settings that these options mean, for a teacher of `num_classes` outputs; otherwise every problem.
    pub fn resolve(&self, num_classes: usize) -> Result<Settings, Vec<String>> {
        let name = self.preset.as_deref().unwrap_or(DEFAULT);
        let mut problems = Vec::new();
        let mut table = presets::table(name).unwrap_or_else(|| {
            problems.push(format!("preset is {name:?}; known are {}", PRESETS.join(", ")));
            // An unknown preset must not hide what else is wrong.
            presets::table(DEFAULT).unwrap_or_default()
        });
        let given = Self { preset: None, ..self.clone() };
        let settings = Table::try_from(given).map_err(|error| error.to_string()).and_then(|given| {
            overlay(&mut table, given);
            Settings::deserialize(Value::Table(table)).map_err(|error| error.message().to_owned())
        });
        match settings {
            Ok(settings) => {
                problems.extend(settings.problems(num_classes));
                if problems.is_empty() { Ok(settings) } else { Err(problems) }
            }
            Err(problem) => {
                problems.push(problem);
                Err(problems)
            }
        }
    }
}
