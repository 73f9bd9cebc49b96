//! A preset and what flags, environment and files change in it.

use serde::{Deserialize, Serialize};

use super::{CompeteForm, FastOptions, PRESETS, Schedule, Settings, SynthesizerKind, Targets};
use crate::model::augment::Augmentation;

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
    /// Hand each batch over so many times more in other views, each with the teacher's logits on its own pixels.
    #[arg(long, value_name = "N")]
    pub views: Option<u32>,
    /// What a view changes: none, or a list of shift:N and flip.
    #[arg(long, value_name = "LIST")]
    pub view_augmentation: Option<Augmentation>,
    /// The generator.
    #[command(flatten)]
    pub fast: FastOptions,
}

impl SynthesisOptions {
    /// These options, with those of `over` wherever it gives one.
    pub fn overridden_by(self, over: Self) -> Self {
        Self {
            synthesizer: over.synthesizer.or(self.synthesizer),
            preset: over.preset.or(self.preset),
            batch_size: over.batch_size.or(self.batch_size),
            iterations: over.iterations.or(self.iterations),
            warm_iterations: over.warm_iterations.or(self.warm_iterations),
            hybrid_iterations: over.hybrid_iterations.or(self.hybrid_iterations),
            learning_rate: over.learning_rate.or(self.learning_rate),
            schedule: over.schedule.or(self.schedule),
            cross_entropy_weight: over.cross_entropy_weight.or(self.cross_entropy_weight),
            tv_l1_weight: over.tv_l1_weight.or(self.tv_l1_weight),
            tv_l2_weight: over.tv_l2_weight.or(self.tv_l2_weight),
            l2_weight: over.l2_weight.or(self.l2_weight),
            r_feature_weight: over.r_feature_weight.or(self.r_feature_weight),
            first_bn_multiplier: over.first_bn_multiplier.or(self.first_bn_multiplier),
            compete_weight: over.compete_weight.or(self.compete_weight),
            compete_form: over.compete_form.or(self.compete_form),
            compete_temperature: over.compete_temperature.or(self.compete_temperature),
            jitter: over.jitter.or(self.jitter),
            flip: over.flip.or(self.flip),
            clip: over.clip.or(self.clip),
            targets: over.targets.or(self.targets),
            views: over.views.or(self.views),
            view_augmentation: over.view_augmentation.or(self.view_augmentation),
            fast: self.fast.overridden_by(over.fast),
        }
    }

    /// The settings that these options mean, for a teacher of `num_classes` outputs; otherwise every problem.
    pub fn resolve(&self, num_classes: usize) -> Result<Settings, Vec<String>> {
        let name = self.preset.as_deref().unwrap_or("cifar10");
        // An unknown preset must not hide what else is wrong.
        let (known, p) = match Settings::preset(name) {
            Some(preset) => (Ok(()), preset),
            None => match Settings::preset("cifar10") {
                Some(preset) => (Err(format!("preset is {name:?}; known are {}", PRESETS.join(", "))), preset),
                None => return Err(Vec::new()),
            },
        };
        let settings = Settings {
            synthesizer: self.synthesizer.unwrap_or(p.synthesizer),
            preset: p.preset,
            batch_size: self.batch_size.unwrap_or(p.batch_size),
            iterations: self.iterations.unwrap_or(p.iterations),
            warm_iterations: self.warm_iterations.unwrap_or(p.warm_iterations),
            hybrid_iterations: self.hybrid_iterations.unwrap_or(p.hybrid_iterations),
            learning_rate: self.learning_rate.unwrap_or(p.learning_rate),
            betas: p.betas,
            schedule: self.schedule.unwrap_or(p.schedule),
            cross_entropy_weight: self.cross_entropy_weight.unwrap_or(p.cross_entropy_weight),
            tv_l1_weight: self.tv_l1_weight.unwrap_or(p.tv_l1_weight),
            tv_l2_weight: self.tv_l2_weight.unwrap_or(p.tv_l2_weight),
            l2_weight: self.l2_weight.unwrap_or(p.l2_weight),
            r_feature_weight: self.r_feature_weight.unwrap_or(p.r_feature_weight),
            first_bn_multiplier: self.first_bn_multiplier.unwrap_or(p.first_bn_multiplier),
            compete_weight: self.compete_weight.unwrap_or(p.compete_weight),
            compete_form: self.compete_form.unwrap_or(p.compete_form),
            compete_temperature: self.compete_temperature.unwrap_or(p.compete_temperature),
            jitter: self.jitter.unwrap_or(p.jitter),
            flip: self.flip.unwrap_or(p.flip),
            clip: self.clip.unwrap_or(p.clip),
            targets: self.targets.clone().unwrap_or(p.targets),
            views: self.views.unwrap_or(p.views),
            view_augmentation: self.view_augmentation.unwrap_or(p.view_augmentation),
            fast: self.fast.apply(p.fast),
        };
        let problems: Vec<String> = known.err().into_iter().chain(settings.problems(num_classes)).collect();
        if problems.is_empty() { Ok(settings) } else { Err(problems) }
    }
}
