//! The generator as a safetensors file, so that a restarted daemon goes on where it was.

use std::collections::BTreeMap;

use bytes::Bytes;
use tch::{Kind, Tensor};

use super::{Adam, BETAS, FastGenerator, Settings, StatisticsMemory, Teacher, shape};
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

impl FastGenerator {
    /// Everything that outlives a batch: parameters, Adam's moments `first.*` and `second.*`, and the averages of the
    /// batch-norm statistics `mean.N` and `var.N`; all f32.
    pub fn save(&self) -> Vec<u8> {
        let names = self.generator.shape().parameters();
        let mut tensors: Vec<(String, &Tensor)> = Vec::new();
        for (((name, _), parameter), adam) in names.iter().zip(self.generator.parameters()).zip(&self.meta) {
            let [first, second] = adam.moments();
            tensors.push(((*name).to_owned(), parameter));
            tensors.push((format!("first.{name}"), first));
            tensors.push((format!("second.{name}"), second));
        }
        for (index, [mean, var]) in self.memory.averages().iter().enumerate() {
            tensors.push((format!("mean.{index}"), mean));
            tensors.push((format!("var.{index}"), var));
        }
        let steps: Vec<String> = self.meta.iter().map(|adam| adam.steps().to_string()).collect();
        let metadata = BTreeMap::from([
            ("format".to_owned(), FORMAT.to_owned()),
            ("batches".to_owned(), self.batches.to_string()),
            ("steps".to_owned(), steps.join(",")),
        ]);
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
        let device = teacher.device();
        let read = |name: &str, size: &[i64]| -> Result<Tensor, StateError> {
            let tensor = file.get(name).and_then(|raw| to_device(&raw, Kind::Float, device));
            tensor.filter(|tensor| tensor.size() == size).ok_or_else(|| StateError::Tensor(name.to_owned()))
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
                steps.ok_or_else(|| StateError::Tensor(format!("first.{name}")))?,
            ));
        }
        let mut averages = Vec::new();
        for (index, size) in teacher.network.spec().batch_norm_widths().into_iter().enumerate() {
            if file.get("mean.0").is_none() {
                break; // saved before its first batch
            }
            let size = [size as i64];
            averages.push([read(&format!("mean.{index}"), &size)?, read(&format!("var.{index}"), &size)?]);
        }
        let generator =
            Generator::with(shape, parameters).ok_or_else(|| StateError::Tensor("linear.weight".into()))?;
        Ok(Self {
            generator,
            meta,
            memory: StatisticsMemory::resume(settings.fast.statistics_momentum, averages),
            batches: text("batches").parse().unwrap_or_default(),
            adapted: None,
        })
    }
}
