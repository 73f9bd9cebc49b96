//! Which class is which output: the model's classes first, then each task's in turn.

use std::path::Path;

use anyhow::bail;
use tch::{Kind, Tensor};

use crate::model::labelled::{Pictures, output_classes};
use crate::model::source::NetworkSource;

/// The classes of the outputs, as the data names them: an image folder's subfolders, or the numbers in a CIFAR file.
#[derive(Clone, Debug)]
pub(super) struct Classes {
    pub outputs: Vec<String>,
}

impl Classes {
    /// The classes that a network knows.
    pub fn of(source: &NetworkSource, data: &Pictures) -> Self {
        Self { outputs: output_classes(&source.class_names, source.spec.num_classes, data.names.is_some()) }
    }

    /// What a network that knows them is to call them: what its teacher called its own, and the data's names for the rest.
    /// None where all of them are only the outputs' own numbers.
    pub fn names(&self, source: &NetworkSource) -> Vec<String> {
        let number = |(output, class): (usize, &String)| *class == output.to_string();
        if source.class_names.is_empty() && self.outputs.iter().enumerate().all(number) {
            return Vec::new();
        }
        let name = |(output, class): (usize, &String)| match source.class_names.get(output) {
            Some(name) => name.clone(),
            None => class.clone(),
        };
        self.outputs.iter().enumerate().map(name).collect()
    }

    /// The classes of each task, checked: what is asked for, or all that the data has and the network does not know.
    pub fn tasks(&self, asked: &[Vec<String>], data: &Pictures, path: &Path) -> anyhow::Result<Vec<Vec<String>>> {
        let there = present(data);
        let unknown = || there.iter().filter(|class| !self.outputs.contains(class)).cloned().collect();
        let tasks: Vec<Vec<String>> = if asked.is_empty() { vec![unknown()] } else { asked.to_vec() };
        let mut seen: Vec<&String> = Vec::new();
        for class in tasks.iter().flatten() {
            if self.outputs.contains(class) {
                bail!(
                    "class {class:?} is known already: the model's are {}; ask for others",
                    self.outputs.join(", ")
                );
            }
            if seen.contains(&class) {
                bail!("class {class:?} is asked for twice; name it in one task only");
            }
            if !there.contains(class) {
                bail!("{} has no pictures of class {class:?}; it has {}", path.display(), there.join(", "));
            }
            seen.push(class);
        }
        if tasks.iter().any(Vec::is_empty) {
            bail!("{} has no class that the model does not know; there is nothing to learn", path.display());
        }
        Ok(tasks)
    }

    /// The same with a task's.
    pub fn with(&self, task: &[String]) -> Self {
        Self { outputs: [self.outputs.as_slice(), task].concat() }
    }

    /// The pictures (u8 pixels) of the outputs from `first` on, and those outputs: `[N, C, H, W]` and `[N]`.
    pub fn select(&self, data: &Pictures, first: usize) -> (Tensor, Tensor) {
        let output = |label: &i64| {
            let class = data.class(*label);
            let output = self.outputs.iter().position(|known| *known == class);
            output.filter(|output| *output >= first).map_or(-1, |output| output as i64)
        };
        let outputs = Tensor::from_slice(&data.labels.iter().map(output).collect::<Vec<i64>>());
        let chosen = outputs.ge(0).nonzero().squeeze_dim(1);
        (data.images.index_select(0, &chosen), outputs.index_select(0, &chosen).to_kind(Kind::Int64))
    }
}

/// The classes of which there are pictures: by number, or by name.
fn present(data: &Pictures) -> Vec<String> {
    let mut labels = data.labels.clone();
    labels.sort_unstable();
    labels.dedup();
    labels.into_iter().map(|label| data.class(label)).collect()
}
