//! Graphs of the families whose bare checkpoints are known by a name, where a file brings no graph of its own.

pub mod resnet;

use super::graph::{Activation, ActivationKind, BatchNorm, Conv2d, Graph, Linear, Node, Op};
use super::source::Geometry;

/// PyTorch's defaults of batch norm; no public checkpoint of these families uses others.
const NORM: (f64, f64) = (1e-5, 0.1);

/// A graph as it grows; each call makes a node and gives the index of its value.
pub(super) struct Builder {
    graph: Graph,
}

impl Builder {
    pub(super) fn new(input: Geometry) -> Self {
        Self { graph: Graph { input, nodes: Vec::new(), output: 0 } }
    }

    pub(super) fn node(&mut self, module: &str, op: Op, inputs: &[usize]) -> usize {
        self.graph.nodes.push(Node { op, inputs: inputs.to_vec(), module: module.to_owned() });
        self.graph.nodes.len()
    }

    /// A square convolution without a bias that keeps the size, up to its stride.
    pub(super) fn conv(&mut self, name: &str, x: usize, kernel: usize, stride: usize) -> usize {
        let weight = format!("{name}.weight");
        let conv = Conv2d { weight, stride: [stride; 2], padding: [kernel / 2; 2], ..Conv2d::default() };
        self.node(name, Op::Conv2d(conv), &[x])
    }

    pub(super) fn norm(&mut self, name: &str, x: usize) -> usize {
        let [weight, bias, running_mean, running_var] =
            ["weight", "bias", "running_mean", "running_var"].map(|part| format!("{name}.{part}"));
        let (eps, momentum) = NORM;
        let norm = BatchNorm { running_mean, running_var, weight: Some(weight), bias: Some(bias), eps, momentum };
        self.node(name, Op::BatchNorm(norm), &[x])
    }

    pub(super) fn relu(&mut self, module: &str, x: usize) -> usize {
        self.node(module, Op::Activation(Activation { kind: ActivationKind::Relu }), &[x])
    }

    pub(super) fn linear(&mut self, name: &str, x: usize) -> usize {
        let linear = Linear { weight: format!("{name}.weight"), bias: Some(format!("{name}.bias")) };
        self.node(name, Op::Linear(linear), &[x])
    }

    /// The graph, whose logits are this value.
    pub(super) fn finish(mut self, output: usize) -> Graph {
        self.graph.output = output;
        self.graph
    }
}
