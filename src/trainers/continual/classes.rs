//! Which class is which output: the model's classes first, then each task's in turn.

use std::path::Path;

use anyhow::bail;
use tch::{Kind, Tensor};

use crate::model::labelled::Pictures;
use crate::model::source::NetworkSource;

/// The classes of the outputs, as the data names them: an image folder's subfolders, or the numbers in a CIFAR file.
#[derive(Clone, Debug)]
pub(super) struct Classes {
    pub outputs: Vec<String>,
    /// Whether classes have names, and not only numbers.
    named: bool,
}

impl Classes {
    /// The classes that a network knows.
    pub fn of(source: &NetworkSource, data: &Pictures) -> Self {
        let named = data.names.is_some();
        let name = |output: usize| match source.class_names.get(output) {
            // Numbers for names come from an earlier task on a CIFAR file.
            Some(name) if named || name.parse::<u8>().is_ok() => name.clone(),
            _ => output.to_string(),
        };
        Self { outputs: (0..source.spec.num_classes).map(name).collect(), named }
    }

    /// What a network that knows them is to call them.
    pub fn names(&self, source: &NetworkSource) -> Vec<String> {
        if !self.named && self.outputs.iter().enumerate().all(|(output, class)| *class == output.to_string()) {
            // The numbers of the outputs themselves say nothing; what the model called its own is kept.
            let known = source.class_names.iter().cloned();
            let new = self.outputs.iter().skip(source.class_names.len()).cloned();
            return if source.class_names.is_empty() { Vec::new() } else { known.chain(new).collect() };
        }
        self.outputs.clone()
    }

    /// The classes of each task, checked: what is asked for, or all that the data has and the network does not know.
    pub fn tasks(&self, asked: &[Vec<String>], data: &Pictures, path: &Path) -> anyhow::Result<Vec<Vec<String>>> {
        let there = present(data);
        let unknown: Vec<String> = there.iter().filter(|class| !self.outputs.contains(class)).cloned().collect();
        let tasks = if asked.is_empty() { vec![unknown] } else { asked.to_vec() };
        let mut known = self.outputs.clone();
        for class in tasks.iter().flatten() {
            if known.contains(class) {
                bail!(
                    "class {class:?} is known already: the model's are {}; ask for others",
                    self.outputs.join(", ")
                );
            }
            if !there.contains(class) {
                bail!("{} has no pictures of class {class:?}; it has {}", path.display(), there.join(", "));
            }
            known.push(class.clone());
        }
        if tasks.iter().any(Vec::is_empty) {
            bail!("{} has no class that the model does not know; there is nothing to learn", path.display());
        }
        Ok(tasks)
    }

    /// The same with a task's.
    pub fn with(&self, task: &[String]) -> Self {
        Self { outputs: [self.outputs.as_slice(), task].concat(), named: self.named }
    }

    /// The pictures (u8 pixels) of the outputs from `first` on, and those outputs: `[N, C, H, W]` and `[N]`.
    pub fn select(&self, data: &Pictures, first: usize) -> (Tensor, Tensor) {
        let output = |label: &i64| {
            let class = class(data, *label);
            let output = self.outputs.iter().position(|known| *known == class);
            output.filter(|output| *output >= first).map_or(-1, |output| output as i64)
        };
        let outputs = Tensor::from_slice(&data.labels.iter().map(output).collect::<Vec<i64>>());
        let chosen = outputs.ge(0).nonzero().squeeze_dim(1);
        (data.images.index_select(0, &chosen), outputs.index_select(0, &chosen).to_kind(Kind::Int64))
    }
}

fn class(data: &Pictures, label: i64) -> String {
    let name = data.names.as_ref().and_then(|names| names.get(label as usize));
    name.cloned().unwrap_or_else(|| label.to_string())
}

/// The classes of which there are pictures: by number, or by name.
fn present(data: &Pictures) -> Vec<String> {
    let mut labels = data.labels.clone();
    labels.sort_unstable();
    labels.dedup();
    labels.into_iter().map(|label| class(data, label)).collect()
}
