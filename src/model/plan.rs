//! A graph compiled for a frozen network, differentiable with respect to its images by hand.
//!
//! Synthesis needs one thing of a network: the gradient of a loss on logits and batch-norm statistics with respect to the
//! images. A [`Plan`] is made once for a graph; [`FrozenGraph`] fills it with weights, which cannot require gradients:
//! - a batch norm that is all that takes a convolution's map is folded into it, where no channel's scale is tiny; the
//!   statistics of its input follow from those of the folded map;
//! - maps are freed as soon as neither a later operation nor the backward pass needs them;
//! - what is hot has its gradient by hand, everything else by libtorch's autograd of that one operation, computed again.
//!
//! Gradients that are added up are either owned or shared (an addition hands one to both of its inputs); only those that are
//! owned are added to in place.

mod gradient;
mod layer;
#[cfg(test)]
mod tests;

use std::sync::Arc;

use tch::{Device, Kind, TchError, Tensor};

use super::checkpoint::Checkpoint;
use super::graph::shape::Shapes;
use super::graph::{ActivationKind, BatchNorm, Graph, Op};
use super::network::{BatchStatistics, StatisticsGradient, channels_last, to_device};
use super::operate::{Mode, Tensors, operate};
use gradient::{Gradients, Saved};
use layer::{ConvRecord, ConvUnit, Norm, Tapped};

/// What is done, in order. Each step makes the value of its index.
#[derive(Debug)]
enum Step {
    /// A convolution and, if one is all that takes its map, the batch norm behind it: then the step makes the norm's value.
    Convolution { node: usize, norm: Option<usize> },
    /// A batch norm by itself.
    Norm { node: usize },
    /// Any other operation; one that needs its input no more may be done in place.
    Other { node: usize, in_place: bool },
}

/// A graph compiled for frozen networks.
#[derive(Debug)]
pub struct Plan {
    graph: Graph,
    steps: Vec<Step>,
    /// Of each value: whether it depends on the images, so that it has a gradient.
    depends: Vec<bool>,
    /// Of each node: its place among the taps.
    taps: Vec<Option<usize>>,
    /// Of each value: how many steps take it; the output is taken once more.
    uses: Vec<usize>,
}

impl Plan {
    /// Compiles a graph of which shapes could be inferred.
    pub fn compile(graph: &Graph) -> Self {
        let mut takers: Vec<Vec<usize>> = vec![Vec::new(); graph.nodes.len() + 1];
        for (index, node) in graph.nodes.iter().enumerate() {
            node.inputs.iter().for_each(|input| takers[*input].push(index));
        }
        let depends = graph.depends_on_image();
        let mut taps = vec![None; graph.nodes.len()];
        graph.taps().into_iter().enumerate().for_each(|(tap, node)| taps[node] = Some(tap));
        // All that takes a value, where that is one node and the value is not the logits.
        let sole = |value: usize| match takers[value].as_slice() {
            [taker] if value != graph.output => Some(*taker),
            _ => None,
        };
        let mut steps = Vec::new();
        let mut folded = vec![false; graph.nodes.len()];
        for (node, of) in graph.nodes.iter().enumerate() {
            match &of.op {
                _ if folded[node] => {}
                Op::Conv2d(_) => {
                    let norm = sole(node + 1).filter(|taker| matches!(graph.nodes[*taker].op, Op::BatchNorm(_)));
                    norm.into_iter().for_each(|norm| folded[norm] = true);
                    steps.push(Step::Convolution { node, norm });
                }
                Op::BatchNorm(_) => steps.push(Step::Norm { node }),
                op => {
                    // A sum is nobody's but the activation's behind it, and no backward pass needs it.
                    let sum = |value: &usize| {
                        let made = value.checked_sub(1).map(|node| &graph.nodes[node].op);
                        matches!(made, Some(Op::Add(_))) && sole(*value) == Some(node)
                    };
                    let relu = matches!(op, Op::Activation(op) if op.kind == ActivationKind::Relu);
                    steps.push(Step::Other { node, in_place: relu && of.inputs.iter().all(sum) });
                }
            }
        }
        let mut uses: Vec<usize> = takers.iter().map(Vec::len).collect();
        uses[graph.output] += 1;
        Self { graph: graph.clone(), steps, depends, taps, uses }
    }

    /// What was compiled.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    fn norm(&self, node: usize) -> Option<&BatchNorm> {
        match &self.graph.nodes.get(node)?.op {
            Op::BatchNorm(norm) => Some(norm),
            _ => None,
        }
    }
}

/// What a step has of the weights.
#[derive(Debug)]
enum Filled {
    Convolution(ConvUnit),
    Norm(Norm),
    Other,
}

/// A forward pass, remembered for one backward pass.
#[derive(Debug)]
pub struct RecordedGraph {
    /// The logits, `[N, K]`.
    pub logits: Tensor,
    /// Where asked for: one entry a tap, in order.
    pub statistics: Vec<BatchStatistics>,
    records: Vec<Record>,
    images: usize,
}

/// What the backward pass needs of a step.
#[derive(Debug)]
enum Record {
    Convolution(ConvRecord),
    Norm(Option<Tapped>),
    Other(Saved),
}

/// A network that is never trained: no tensor in it can require a gradient.
#[derive(Debug)]
pub struct FrozenGraph {
    plan: Arc<Plan>,
    filled: Vec<Filled>,
    tensors: Tensors,
    kind: Kind,
}

/// The kind of everything but the maps: f32 beside 16-bit maps.
fn outer(kind: Kind) -> Kind {
    if matches!(kind, Kind::BFloat16 | Kind::Half) { Kind::Float } else { kind }
}

impl FrozenGraph {
    /// Puts a network on a device. `shapes` are those of the plan's graph with the file's tensors.
    pub fn fill(
        plan: &Arc<Plan>,
        shapes: &Shapes,
        file: &Checkpoint,
        device: Device,
        kind: Kind,
    ) -> Result<Self, TchError> {
        let _guard = tch::no_grad_guard();
        let mut tensors = Tensors::new();
        for name in shapes.tensors.keys() {
            let tensor = file.get(name).and_then(|raw| to_device(&raw, outer(kind), device));
            let tensor = tensor
                .ok_or_else(|| TchError::FileFormat(format!("the file has no floating-point tensor {name}")))?;
            tensors.insert(name.clone(), tensor);
        }
        let mut filled = Vec::with_capacity(plan.steps.len());
        for step in &plan.steps {
            let norm = |node: usize| plan.norm(node).map(|op| Norm::new(op, &tensors)).transpose();
            filled.push(match step {
                Step::Convolution { node, norm: behind } => match &plan.graph.nodes[*node].op {
                    Op::Conv2d(op) => {
                        let norm = behind.map(norm).transpose()?.flatten();
                        Filled::Convolution(ConvUnit::new(op, norm, &tensors, kind)?)
                    }
                    _ => Filled::Other,
                },
                Step::Norm { node } => norm(*node)?.map_or(Filled::Other, Filled::Norm),
                Step::Other { .. } => Filled::Other,
            });
        }
        Ok(Self { plan: plan.clone(), filled, tensors, kind })
    }

    /// The graph.
    pub fn graph(&self) -> &Graph {
        &self.plan.graph
    }

    /// The element type of images, logits and gradients; that of the maps may be a shorter one.
    pub fn kind(&self) -> Kind {
        outer(self.kind)
    }

    /// Logits `[N, K]` of normalized images `[N, C, H, W]`, in evaluation mode.
    pub fn logits(&self, x: &Tensor) -> Result<Tensor, TchError> {
        Ok(tch::no_grad(|| self.run(x, false, false))?.logits)
    }

    /// The same, remembered for [`Self::backward`]; with `tap`, also the statistics at every tap.
    pub fn forward(&self, x: &Tensor, tap: bool) -> Result<RecordedGraph, TchError> {
        tch::no_grad(|| self.run(x, true, tap))
    }

    fn run(&self, x: &Tensor, record: bool, tap: bool) -> Result<RecordedGraph, TchError> {
        let graph = &self.plan.graph;
        let images = x.size().first().map_or(0, |images| usize::try_from(*images).unwrap_or(0));
        let mut statistics: Vec<Option<BatchStatistics>> = Vec::new();
        statistics.resize_with(self.plan.taps.iter().flatten().count(), || None);
        let mut values = Values { left: self.plan.uses.clone(), values: Vec::new() };
        values.values.resize_with(graph.nodes.len() + 1, || None);
        values.values[0] = Some(channels_last(&x.to_kind(self.kind)));
        let mut records = Vec::new();
        for (step, filled) in self.plan.steps.iter().zip(&self.filled) {
            let wanted = |node: usize| self.plan.taps[node].filter(|_| tap);
            let (made, value, remembered) = match (step, filled) {
                (Step::Convolution { node, norm }, Filled::Convolution(unit)) => {
                    let x = values.take(graph.nodes[*node].inputs[0])?;
                    let tap = norm.and_then(wanted);
                    let (value, record, found) = unit.forward(&x, tap.is_some())?;
                    if let (Some(tap), Some(found)) = (tap, found) {
                        statistics[tap] = Some(found);
                    }
                    (norm.unwrap_or(*node) + 1, value, Record::Convolution(record))
                }
                (Step::Norm { node }, Filled::Norm(norm)) => {
                    let x = values.take(graph.nodes[*node].inputs[0])?;
                    let mut tapped = None;
                    if let Some(tap) = wanted(*node) {
                        let (found, record) = norm.tap(&x, false)?;
                        statistics[tap] = Some(found);
                        tapped = Some(record);
                    }
                    (*node + 1, norm.apply(&x)?, Record::Norm(tapped))
                }
                (Step::Other { node, in_place }, _) => {
                    let of = &graph.nodes[*node];
                    let mut inputs = of.inputs.iter().map(|at| values.take(*at)).collect::<Result<Vec<_>, _>>()?;
                    let depends: Vec<bool> = of.inputs.iter().map(|at| self.plan.depends[*at]).collect();
                    let (value, saved) = match inputs.as_mut_slice() {
                        [sum] if *in_place => {
                            let value = sum.f_relu_()?;
                            (value.shallow_clone(), Saved::Output(value))
                        }
                        _ if record => {
                            gradient::forward(&of.op, &inputs, &depends, &self.tensors, self.kind, images)?
                        }
                        _ => {
                            let inputs: Vec<&Tensor> = inputs.iter().collect();
                            let value = operate(&of.op, &inputs, &self.tensors, Mode::Evaluation, self.kind, images)?;
                            (value, Saved::Nothing)
                        }
                    };
                    (*node + 1, value, Record::Other(saved))
                }
                _ => return Err(TchError::FileFormat("a step lacks its weights".to_owned())),
            };
            values.values[made] = Some(value);
            if record {
                records.push(remembered);
            }
        }
        let logits = values.take(graph.output)?.to_kind(outer(self.kind));
        Ok(RecordedGraph { logits, statistics: statistics.into_iter().flatten().collect(), records, images })
    }

    /// The gradient with respect to the images, `[N, C, H, W]`, of a loss whose gradients with respect to the logits and,
    /// one entry a tap, to the statistics are given. `statistics` is empty where they do not matter.
    pub fn backward(
        &self,
        recorded: RecordedGraph,
        logits: &Tensor,
        statistics: &[StatisticsGradient],
    ) -> Result<Tensor, TchError> {
        let _guard = tch::no_grad_guard();
        let graph = &self.plan.graph;
        let RecordedGraph { records, images, .. } = recorded;
        let mut gradients = Gradients::new(graph.nodes.len() + 1);
        gradients.add(graph.output, logits.shallow_clone(), false)?;
        // Popping frees each record before the next one is worked on.
        let mut records = records.into_iter();
        for (step, filled) in self.plan.steps.iter().zip(&self.filled).rev() {
            let Some(record) = records.next_back() else { break };
            let at = |node: usize| self.plan.taps[node].and_then(|tap| statistics.get(tap));
            match (step, filled, record) {
                (Step::Convolution { node, norm }, Filled::Convolution(unit), Record::Convolution(record)) => {
                    let input = graph.nodes[*node].inputs[0];
                    let Some(grad) = gradients.take(norm.unwrap_or(*node) + 1) else { continue };
                    if self.plan.depends[input] {
                        gradients.add(input, unit.backward(grad, record, norm.and_then(at))?, true)?;
                    }
                }
                (Step::Norm { node }, Filled::Norm(norm), Record::Norm(tapped)) => {
                    let input = graph.nodes[*node].inputs[0];
                    let Some(grad) = gradients.take(*node + 1) else { continue };
                    if self.plan.depends[input] {
                        gradients.add(input, norm.backward(&grad, tapped, at(*node))?, true)?;
                    }
                }
                (Step::Other { node, .. }, _, Record::Other(saved)) => {
                    let of = &graph.nodes[*node];
                    let Some(grad) = gradients.take(*node + 1) else { continue };
                    let depends: Vec<bool> = of.inputs.iter().map(|at| self.plan.depends[*at]).collect();
                    let parts = gradient::backward(&of.op, grad, saved, &depends, &self.tensors, self.kind, images)?;
                    for (input, part) in of.inputs.iter().zip(parts) {
                        if let Some((part, owned)) = part {
                            gradients.add(*input, part, owned)?;
                        }
                    }
                }
                _ => return Err(TchError::FileFormat("a step lacks its weights".to_owned())),
            }
        }
        let images =
            gradients.take(0).ok_or_else(|| TchError::FileFormat("no gradient reaches the images".to_owned()))?;
        images.f_to_kind(outer(self.kind))
    }
}

/// Values that are still to be taken.
struct Values {
    values: Vec<Option<Tensor>>,
    left: Vec<usize>,
}

impl Values {
    /// A value, which is forgotten here once nobody takes it any more.
    fn take(&mut self, index: usize) -> Result<Tensor, TchError> {
        let left = self.left.get_mut(index).filter(|left| **left > 0);
        let last = left.is_some_and(|left| {
            *left -= 1;
            *left == 0
        });
        let value = self.values.get_mut(index);
        let found =
            value.and_then(|value| if last { value.take() } else { value.as_ref().map(Tensor::shallow_clone) });
        found.ok_or_else(|| TchError::FileFormat(format!("value {index} is not there yet")))
    }
}
