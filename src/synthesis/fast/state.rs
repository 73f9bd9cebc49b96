//! The generator as a safetensors file, so that a restarted daemon goes on where it was.

use std::collections::BTreeMap;

use bytes::Bytes;
use tch::{Kind, Tensor};

use super::{Adam, BETAS, FastGenerator, Health, Learned, Level, Settings, StatisticsMemory, Teacher, shape};
use crate::model::checkpoint::{Checkpoint, CheckpointError};
use crate::model::generator::Generator;
use crate::model::network::to_device;
use crate::model::trainable::write;

/// The `format` in the metadata.
const FORMAT: &str = "dreamfeed.generator.v1";

/// Why a generator's file cannot be gone on with.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// It cannot be read.
    #[error("the generator's file cannot be used: {0}")]
    File(#[from] CheckpointError),
    /// It is of another kind, or of another version.
    #[error("its format is {0:?}, and this program reads {FORMAT}")]
    Format(String),
    /// Its tensors do not fit the settings.
    #[error("tensor {0} is missing, or does not fit the generator's settings or this teacher")]
    Tensor(String),
}

/// Before the names of the last good state's tensors and metadata.
const GOOD: &str = "good.";

impl FastGenerator {
    /// Everything that outlives a batch: parameters, Adam's moments `first.*` and `second.*`, and the averages of the
    /// batch-norm statistics `mean.N` and `var.N`; all f32. Where a last good state is known, the same of it with `good.`
    /// before each name, so that what ruined the generator is undone after a restart, too.
    pub fn save(&self) -> Vec<u8> {
        let mut tensors = Vec::new();
        let mut metadata = BTreeMap::from([("format".to_owned(), FORMAT.to_owned())]);
        describe(&self.learned, "", &mut tensors, &mut metadata);
        if let Some((good, usual)) = self.health.good() {
            describe(good, GOOD, &mut tensors, &mut metadata);
            metadata.insert(format!("{GOOD}teacher_top1"), usual.teacher_top1.to_string());
            metadata.insert(format!("{GOOD}r_feature"), usual.r_feature.to_string());
        }
        write(tensors.into_iter(), &metadata)
    }

    /// Goes on from [`Self::save`], with a teacher and settings that make a generator of the same shape.
    pub fn restore(teacher: &Teacher, settings: &Settings, file: Bytes) -> Result<Self, StateError> {
        let _guard = tch::no_grad_guard();
        let file = Checkpoint::parse(file)?;
        file.check_finite()?;
        let text = |key: &str| file.metadata().get(key).cloned().unwrap_or_default();
        if text("format") != FORMAT {
            return Err(StateError::Format(text("format")));
        }
        let number = |key: &str| text(&format!("{GOOD}{key}")).parse().ok().filter(|value: &f64| value.is_finite());
        let health = match (number("teacher_top1"), number("r_feature")) {
            (Some(teacher_top1), Some(r_feature)) => {
                Health::resume(read(&file, GOOD, teacher, settings)?, Level { teacher_top1, r_feature })
            }
            _ => Health::default(),
        };
        Ok(Self { learned: read(&file, "", teacher, settings)?, health, adapted: None })
    }
}

/// Adds the tensors and the metadata of a state, each name with a prefix.
fn describe<'a>(
    learned: &'a Learned,
    prefix: &str,
    tensors: &mut Vec<(String, &'a Tensor)>,
    metadata: &mut BTreeMap<String, String>,
) {
    let Learned { generator, meta, memory, batches } = learned;
    let names = generator.shape().parameters();
    for (((name, _), parameter), adam) in names.iter().zip(generator.parameters()).zip(meta) {
        let [first, second] = adam.moments();
        tensors.push((format!("{prefix}{name}"), parameter));
        tensors.push((format!("{prefix}first.{name}"), first));
        tensors.push((format!("{prefix}second.{name}"), second));
    }
    for (index, [mean, var]) in memory.averages().iter().enumerate() {
        tensors.push((format!("{prefix}mean.{index}"), mean));
        tensors.push((format!("{prefix}var.{index}"), var));
    }
    let steps: Vec<String> = meta.iter().map(|adam| adam.steps().to_string()).collect();
    metadata.insert(format!("{prefix}batches"), batches.to_string());
    metadata.insert(format!("{prefix}steps"), steps.join(","));
}

/// The state that [`describe`] described with this prefix.
fn read(file: &Checkpoint, prefix: &str, teacher: &Teacher, settings: &Settings) -> Result<Learned, StateError> {
    let device = teacher.device();
    let text = |key: &str| file.metadata().get(&format!("{prefix}{key}")).cloned().unwrap_or_default();
    let read = |name: &str, size: &[i64]| -> Result<Tensor, StateError> {
        let name = format!("{prefix}{name}");
        let tensor = file.get(&name).and_then(|raw| to_device(&raw, Kind::Float, device));
        tensor.filter(|tensor| tensor.size() == size).ok_or(StateError::Tensor(name))
    };
    let shape = shape(teacher, settings);
    let steps: Vec<i32> = text("steps").split(',').filter_map(|steps| steps.parse().ok()).collect();
    let mut parameters = Vec::new();
    let mut meta = Vec::new();
    for (index, (name, size)) in shape.parameters().iter().enumerate() {
        parameters.push(read(name, size)?);
        let moments = [read(&format!("first.{name}"), size)?, read(&format!("second.{name}"), size)?];
        let steps = steps.get(index).copied().filter(|steps| *steps >= 0);
        meta.push(Adam::resume(
            BETAS,
            moments,
            steps.ok_or_else(|| StateError::Tensor(format!("{prefix}first.{name}")))?,
        ));
    }
    let mut averages = Vec::new();
    for (index, size) in teacher.network.spec().batch_norm_widths().into_iter().enumerate() {
        if file.get(&format!("{prefix}mean.0")).is_none() {
            break; // saved before its first batch
        }
        let size = [size as i64];
        averages.push([read(&format!("mean.{index}"), &size)?, read(&format!("var.{index}"), &size)?]);
    }
    let generator = Generator::with(shape, parameters).ok_or_else(|| StateError::Tensor("linear.weight".into()))?;
    let memory = StatisticsMemory::resume(settings.fast.statistics_momentum, averages);
    Ok(Learned { generator, meta, memory, batches: text("batches").parse().unwrap_or_default() })
}
