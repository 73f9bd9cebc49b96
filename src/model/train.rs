//! A graph through libtorch's autograd: whole, or between two of its values; learning, or as it is.

#[cfg(test)]
mod tests;

use tch::{Device, Kind, TchError, Tensor};

use super::checkpoint::Checkpoint;
use super::graph::shape::Shapes;
use super::graph::{Extent, Graph, Role};
use super::network::{channels_last, to_device};
use super::operate::{Mode, Tensors, operate};

/// Mean and biased variance of each channel of a value, over images and positions.
pub type Moments = (Tensor, Tensor);

/// A graph and its tensors, of which parameters require gradients.
#[derive(Debug)]
pub struct GraphNetwork {
    graph: Graph,
    shapes: Shapes,
    tensors: Tensors,
    /// What convolutions compute in; everything else is of the tensors' kind.
    kind: Kind,
}

impl GraphNetwork {
    /// Puts a network on a device, in f32 or f64. `shapes` are those of the graph with the file's tensors.
    pub fn load(
        graph: &Graph,
        shapes: &Shapes,
        file: &Checkpoint,
        device: Device,
        kind: Kind,
    ) -> Result<Self, TchError> {
        let _guard = tch::no_grad_guard();
        let mut tensors = Tensors::new();
        for (name, (_, role)) in &shapes.tensors {
            let tensor = file.get(name).and_then(|raw| to_device(&raw, kind, device));
            let tensor = tensor
                .ok_or_else(|| TchError::FileFormat(format!("the file has no floating-point tensor {name}")))?;
            let tensor = if tensor.dim() == 4 { channels_last(&tensor) } else { tensor };
            tensors.insert(name.clone(), tensor.detach().set_requires_grad(*role == Role::Parameter));
        }
        Ok(Self { graph: graph.clone(), shapes: shapes.clone(), tensors, kind })
    }

    /// The same network, whose convolutions compute in this element type: mixed precision, where it is a shorter one.
    pub fn in_precision(mut self, kind: Kind) -> Self {
        self.kind = kind;
        self
    }

    /// What is computed.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// The shapes of its values and tensors.
    pub fn shapes(&self) -> &Shapes {
        &self.shapes
    }

    /// Every tensor by name.
    pub fn tensors(&self) -> &Tensors {
        &self.tensors
    }

    /// Logits `[N, K]` of normalized images `[N, C, H, W]`.
    pub fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor, TchError> {
        self.evaluate((0, x), &[self.graph.output], mode).map(first)
    }

    /// The same in evaluation mode, without a gradient.
    pub fn logits(&self, x: &Tensor) -> Result<Tensor, TchError> {
        tch::no_grad(|| self.forward(x, Mode::Evaluation))
    }

    /// The same, and the moments at the input of each of [`Graph::taps`].
    pub fn logits_and_taps(&self, x: &Tensor) -> Result<(Tensor, Vec<Moments>), TchError> {
        let _guard = tch::no_grad_guard();
        let taps = self.graph.taps().into_iter().filter_map(|tap| self.graph.nodes.get(tap)?.inputs.first().copied());
        let wanted: Vec<usize> = [self.graph.output].into_iter().chain(taps).collect();
        let mut values = self.evaluate((0, x), &wanted, Mode::Evaluation)?.into_iter();
        let logits = first(values.by_ref());
        Ok((logits, values.map(|value| moments(&value)).collect::<Result<_, _>>()?))
    }

    /// Some values, as they follow from another one; every path from the images to them leads through that one.
    pub fn evaluate(
        &self,
        (from, x): (usize, &Tensor),
        wanted: &[usize],
        mode: Mode,
    ) -> Result<Vec<Tensor>, TchError> {
        let images = self.images(from, x);
        let uses = self.uses(from, wanted);
        let mut left = uses.clone();
        let mut values: Vec<Option<Tensor>> = std::iter::repeat_with(|| None).take(uses.len()).collect();
        if let Some(value) = values.get_mut(from) {
            *value = Some(if x.dim() == 4 { channels_last(x) } else { x.shallow_clone() });
        }
        for (index, node) in self.graph.nodes.iter().enumerate() {
            if uses.get(index + 1).is_none_or(|uses| *uses == 0) || index + 1 == from {
                continue;
            }
            let inputs: Option<Vec<&Tensor>> = node.inputs.iter().map(|at| values.get(*at)?.as_ref()).collect();
            let inputs = inputs.ok_or_else(|| {
                TchError::FileFormat(format!("{} does not follow from value {from} alone", self.graph.place(index)))
            })?;
            let made = operate(&node.op, &inputs, &self.tensors, mode, self.kind, images)?;
            values[index + 1] = Some(made);
            // A value that nobody takes any more is freed at once; autograd keeps what it needs.
            for input in &node.inputs {
                left[*input] -= 1;
                if left[*input] == 0 {
                    values[*input] = None;
                }
            }
        }
        let value = |at: &usize| values.get(*at).and_then(Option::as_ref).map(Tensor::shallow_clone);
        let found: Option<Vec<Tensor>> = wanted.iter().map(value).collect();
        found.ok_or_else(|| TchError::FileFormat(format!("a value of {wanted:?} does not exist")))
    }

    /// How many images a value is of.
    fn images(&self, value: usize, x: &Tensor) -> usize {
        let shape = self.shapes.values.get(value).map_or(&[][..], Vec::as_slice);
        let batch = shape.iter().zip(x.size()).find_map(|(extent, size)| match extent {
            Extent::Batch(factor) => Some(usize::try_from(size).unwrap_or(0) / factor),
            Extent::Fixed(_) => None,
        });
        batch.unwrap_or(0)
    }

    /// How often each value is taken on the way from one value to others, which count as taken once themselves.
    fn uses(&self, from: usize, wanted: &[usize]) -> Vec<usize> {
        let mut uses = vec![0; self.graph.nodes.len() + 1];
        for value in wanted {
            if let Some(uses) = uses.get_mut(*value) {
                *uses += 1;
            }
        }
        for (index, node) in self.graph.nodes.iter().enumerate().rev() {
            if uses[index + 1] > 0 && index + 1 != from {
                node.inputs.iter().for_each(|input| uses[*input] += 1);
            }
        }
        uses
    }
}

fn first(values: impl IntoIterator<Item = Tensor>) -> Tensor {
    // As many come back as were asked for.
    values.into_iter().next().unwrap_or_default()
}

/// Mean and biased variance of each channel.
pub(super) fn moments(x: &Tensor) -> Result<Moments, TchError> {
    let dims: Vec<i64> = (0..x.dim() as i64).filter(|dim| *dim != 1).collect();
    let (var, mean) = x.f_var_mean_correction(dims.as_slice(), 0, false)?;
    Ok((mean, var))
}
