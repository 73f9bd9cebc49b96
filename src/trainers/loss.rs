//! What a student is taught by: its distance from the teacher's logits.

use clap::ValueEnum;
use serde::Serialize;
use tch::{Kind, Reduction, Tensor};

/// How far a student's logits are from the teacher's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Loss {
    /// T² KL(teacher ‖ student) at temperature T (Hinton et al. 2015).
    #[default]
    Kl,
    /// The mean absolute difference of the logits (as in PRE-DFKD; Binici et al. 2022). Has no temperature.
    L1,
    /// Cross-entropy with the teacher's class: its highest logit.
    Hard,
}

impl Loss {
    /// The batch's mean, of logits `[N, K]` each. `temperature` matters to KL only.
    pub fn between(self, student: &Tensor, teacher: &Tensor, temperature: f64) -> Tensor {
        match self {
            Self::Kl => distillation_loss(student, teacher, temperature),
            Self::L1 => student.l1_loss(teacher, Reduction::Mean),
            Self::Hard => student.cross_entropy_for_logits(&teacher.argmax(1, false)),
        }
    }
}

/// T² KL(teacher ‖ student) of logits `[N, K]` at temperature T, the batch's mean (Hinton et al. 2015).
pub fn distillation_loss(student: &Tensor, teacher: &Tensor, temperature: f64) -> Tensor {
    divergence(&(student / temperature).log_softmax(1, None), &(teacher / temperature).log_softmax(1, None))
        * (temperature * temperature)
}

/// KL(teacher ‖ student) of log-probabilities `[N, K]`, the batch's mean, in nats.
pub fn divergence(student: &Tensor, teacher: &Tensor) -> Tensor {
    let count = student.size()[0] as f64;
    (teacher.exp() * (teacher - student)).sum(Kind::Float) / count
}
