#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::Path;

use proptest::prelude::*;

use super::*;
use crate::model::families::resnet;
use crate::model::golden;
use crate::model::graph::*;
use crate::model::network::FrozenNetwork;
use crate::model::source::Geometry;
use crate::model::spec::NetworkSpec;
use crate::model::train::{GraphNetwork, moments};
use crate::model::trainable::{TrainableNetwork, write};

/// What Python's `save_network` wrote, and beside each what PyTorch made of it.
const FILES: [&str; 5] = ["dense", "odd", "standardized", "tokens", "twice"];

fn open(name: &str) -> Checkpoint {
    Checkpoint::open(Path::new(&format!("{}/tests/golden/{name}.safetensors", env!("CARGO_MANIFEST_DIR")))).unwrap()
}

fn both(graph: &Graph, file: &Checkpoint, kind: Kind) -> (FrozenGraph, GraphNetwork) {
    let shapes = Shapes::infer(graph, file).unwrap();
    let plan = Arc::new(Plan::compile(graph));
    let frozen = FrozenGraph::fill(&plan, &shapes, file, Device::Cpu, kind).unwrap();
    (frozen, GraphNetwork::load(graph, &shapes, file, Device::Cpu, kind).unwrap())
}

/// Of the largest absolute value of `expected`.
fn difference(computed: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(computed.size(), expected.size());
    let largest = expected.abs().max().double_value(&[]).max(1e-12);
    (computed - expected).abs().max().double_value(&[]) / largest
}

/// A loss on logits and statistics, each of which it pulls in another direction.
fn loss(logits: &Tensor, statistics: &[(Tensor, Tensor)]) -> Tensor {
    let each = statistics.iter().enumerate().map(|(tap, (mean, var))| {
        let weight = 0.3 + tap as f64;
        (mean - 0.1).square().sum(None) * weight + (var - 0.7).square().sum(None) / weight
    });
    each.fold(logits.square().sum(None), |sum, term| sum + term)
}

/// Logits, moments and the gradient at the images.
type Computed = (Tensor, Vec<(Tensor, Tensor)>, Tensor);

/// By the plan, and by autograd through all.
fn gradients(frozen: &FrozenGraph, network: &GraphNetwork, x: &Tensor) -> [Computed; 2] {
    let recorded = frozen.forward(x, true).unwrap();
    let leaf = |tensor: &Tensor| tensor.detach().set_requires_grad(true);
    let logits = leaf(&recorded.logits);
    let taps: Vec<(Tensor, Tensor)> = recorded.statistics.iter().map(|s| (leaf(&s.mean), leaf(&s.var))).collect();
    let leaves: Vec<&Tensor> = [&logits].into_iter().chain(taps.iter().flat_map(|(mean, var)| [mean, var])).collect();
    let mut found = Tensor::run_backward(&[loss(&logits, &taps)], &leaves, false, false).into_iter();
    let at_logits = found.next().unwrap();
    let mut at_statistics = Vec::new();
    while let (Some(mean), Some(var)) = (found.next(), found.next()) {
        at_statistics.push(StatisticsGradient { mean, var });
    }
    let by_plan = frozen.backward(recorded, &at_logits, &at_statistics).unwrap();

    let x = leaf(x);
    let graph = network.graph();
    let wanted: Vec<usize> =
        [graph.output].into_iter().chain(graph.taps().into_iter().map(|tap| graph.nodes[tap].inputs[0])).collect();
    let values = network.evaluate((0, &x), &wanted, Mode::Evaluation).unwrap();
    let moments: Vec<(Tensor, Tensor)> = values[1..].iter().map(|value| moments(value).unwrap()).collect();
    let by_autograd = Tensor::run_backward(&[loss(&values[0], &moments)], &[&x], false, false).remove(0);
    [(logits, taps, by_plan), (values[0].detach(), moments, by_autograd)]
}

fn assert_equal(name: &str, frozen: &FrozenGraph, network: &GraphNetwork, x: &Tensor, tolerance: f64) {
    let [computed, expected] = gradients(frozen, network, x);
    assert!(difference(&computed.0, &expected.0) < tolerance, "{name}: logits");
    assert_eq!(computed.1.len(), expected.1.len());
    for (tap, (computed, expected)) in computed.1.iter().zip(&expected.1).enumerate() {
        assert!(difference(&computed.0, &expected.0) < tolerance, "{name}: mean {tap}");
        assert!(difference(&computed.1, &expected.1) < tolerance, "{name}: var {tap}");
    }
    let apart = difference(&computed.2, &expected.2);
    assert!(apart < tolerance, "{name}: gradient, {apart:e}");
    assert_eq!(frozen.logits(x).unwrap(), frozen.forward(x, false).unwrap().logits, "{name}");
}

#[test]
fn plans_compute_what_pytorch_computes() {
    for name in FILES {
        let (file, reference) = (open(&format!("graph_{name}")), open(&format!("graph_{name}.reference")));
        let graph = Graph::parse(&file.metadata()["graph"]).unwrap();
        let (frozen, network) = both(&graph, &file, Kind::Double);
        let size = graph.input;
        let x = Tensor::from_slice(&golden::images(size)).to_kind(Kind::Double);
        let x = x.view([2, size.channels as i64, size.height as i64, size.width as i64]);
        assert_equal(name, &frozen, &network, &x, 1e-9);
        let recorded = frozen.forward(&x, false).unwrap();
        assert!(recorded.statistics.is_empty());
        let at_logits = &recorded.logits * 2.0;
        let gradient = frozen.backward(recorded, &at_logits, &[]).unwrap();
        let expected = to_device(&reference.get("gradient").unwrap(), Kind::Double, Device::Cpu).unwrap();
        assert!(difference(&gradient, &expected) < 1e-9, "{name}");
    }
}

#[test]
fn plans_of_the_resnets_compute_what_the_code_of_today_computes() {
    let _alone = crate::testing::drawing_alone();
    tch::manual_seed(4);
    for arch in ["resnet8", "resnet20", "resnet8-projection"] {
        let spec = NetworkSpec::fresh(arch, 3, 7).unwrap();
        let today = TrainableNetwork::fresh(&spec, Device::Cpu);
        let x = Tensor::randn([4, 3, 16, 16], (Kind::Float, Device::Cpu));
        (0..3).for_each(|_| drop(today.forward(&x)));
        // One channel's scale is too small to be folded.
        let _ = tch::no_grad(|| today.parameter("layer1.0.bn1.weight").unwrap().get(1).fill_(1e-5));
        let tensors = today.tensors().map(|(name, tensor)| (name.to_owned(), tensor));
        let file = Checkpoint::parse(write(tensors, &BTreeMap::new()).into()).unwrap();
        for (kind, tolerance) in [(Kind::Double, 1e-9), (Kind::Float, 1e-3), (Kind::BFloat16, 0.2)] {
            let graph = resnet::graph(&spec, [16, 16]);
            let shapes = Shapes::infer(&graph, &file).unwrap();
            let frozen =
                FrozenGraph::fill(&Arc::new(Plan::compile(&graph)), &shapes, &file, Device::Cpu, kind).unwrap();
            let known = FrozenNetwork::load(&spec, &file, Device::Cpu, kind);
            let x = x.to_kind(known.kind());
            let (one, other) = (frozen.forward(&x, true).unwrap(), known.forward(&x, true));
            assert!(difference(&one.logits, &other.logits) < tolerance, "{arch} {kind:?}");
            assert_eq!(one.statistics.len(), other.statistics.len());
            let pull = |s: &BatchStatistics| StatisticsGradient {
                mean: &s.mean - &s.running_mean,
                var: &s.var - &s.running_var,
            };
            let at_statistics: Vec<StatisticsGradient> = other.statistics.iter().map(pull).collect();
            for (one, other) in one.statistics.iter().zip(&other.statistics) {
                assert!(difference(&one.mean, &other.mean) < tolerance, "{arch} {kind:?}");
                assert!(difference(&one.var, &other.var) < tolerance, "{arch} {kind:?}");
            }
            let at_logits = other.logits.softmax(-1, None);
            let by_plan = frozen.backward(one, &at_logits, &at_statistics).unwrap();
            let apart = difference(&by_plan, &known.backward(other, &at_logits, &at_statistics));
            assert!(apart < tolerance, "{arch} {kind:?}: {apart:e}");
        }
    }
}

/// Draws from a seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 33) as usize % limit
    }

    fn real(&mut self) -> f64 {
        self.below(2001) as f64 / 1000.0 - 1.0
    }
}

/// A network drawn by chance: nodes on maps, some with several takers, a head.
struct Drawn {
    dice: Dice,
    nodes: Vec<Node>,
    tensors: BTreeMap<String, Vec<usize>>,
    /// Index, channels, height and width of each map.
    maps: Vec<(usize, [usize; 3])>,
}

impl Drawn {
    fn tensor(&mut self, shape: &[usize]) -> String {
        let name = format!("t{}", self.tensors.len());
        self.tensors.insert(name.clone(), shape.to_vec());
        name
    }

    fn push(&mut self, op: Op, inputs: &[usize]) -> usize {
        self.nodes.push(Node { op, inputs: inputs.to_vec(), module: String::new() });
        self.nodes.len()
    }

    fn grow(&mut self) {
        let (x, [c, h, w]) = self.maps[self.dice.below(self.maps.len())];
        let pick = |dice: &mut Dice, options: &[usize]| options[dice.below(options.len())];
        let (op, inputs, made) = match self.dice.below(14) {
            0..=2 => {
                let groups = pick(&mut self.dice, &[1, 1, c]);
                let out = groups * (1 + self.dice.below(3));
                let kernel = [1 + self.dice.below(3), 1 + self.dice.below(3)].map(|k| k.min(h).min(w));
                let stride = [1 + self.dice.below(2), 1 + self.dice.below(3)];
                let padding = [self.dice.below(3), self.dice.below(2)];
                let bias = (self.dice.below(2) == 0).then(|| self.tensor(&[out]));
                let weight = self.tensor(&[out, c / groups, kernel[0], kernel[1]]);
                let side = |n: usize, i: usize| (n + 2 * padding[i] - kernel[i]) / stride[i] + 1;
                let size = [out, side(h, 0), side(w, 1)];
                (Op::Conv2d(Conv2d { weight, bias, stride, padding, dilation: [1, 1], groups }), vec![x], size)
            }
            3..=5 => {
                let norm = BatchNorm {
                    running_mean: self.tensor(&[c]),
                    running_var: self.tensor(&[c]),
                    weight: (self.dice.below(4) > 0).then(|| self.tensor(&[c])),
                    bias: (self.dice.below(4) > 0).then(|| self.tensor(&[c])),
                    eps: 1e-3,
                    momentum: 0.1,
                };
                (Op::BatchNorm(norm), vec![x], [c, h, w])
            }
            6 | 7 => {
                use ActivationKind::*;
                let kinds = [
                    Relu,
                    Sigmoid,
                    Tanh,
                    Silu,
                    Gelu,
                    GeluTanh,
                    Hardsigmoid,
                    Hardswish,
                    Clamp { min: Some(0.0), max: Some(6.0) },
                    Clamp { min: None, max: Some(0.5) },
                    LeakyRelu { slope: 0.1 },
                    Elu { alpha: 0.7 },
                    Relu,
                    Relu,
                ];
                (Op::Activation(Activation { kind: kinds[self.dice.below(kinds.len())] }), vec![x], [c, h, w])
            }
            8 | 9 => {
                let alike: Vec<usize> =
                    self.maps.iter().filter(|(_, s)| *s == [c, h, w]).map(|(at, _)| *at).collect();
                let y = pick(&mut self.dice, &alike);
                let op = match self.dice.below(3) {
                    0 => Op::Mul(Mul),
                    1 => Op::Add(Add { alpha: -0.5 }),
                    _ => Op::Add(Add::default()),
                };
                (op, vec![x, y], [c, h, w])
            }
            10 => {
                let alike: Vec<(usize, [usize; 3])> =
                    self.maps.iter().filter(|(_, s)| s[1..] == [h, w]).copied().collect();
                let (y, [other, ..]) = alike[self.dice.below(alike.len())];
                (Op::Cat(Cat { dim: 1 }), vec![x, y, x], [2 * c + other, h, w])
            }
            11 => {
                let start = self.dice.below(w);
                let step = 1 + self.dice.below(2);
                (Op::Slice(Slice { dim: 3, start, end: w, step }), vec![x], [c, h, (w - start).div_ceil(step)])
            }
            12 => {
                let mode =
                    [PadMode::Constant, PadMode::Replicate, PadMode::Circular, PadMode::Reflect][self.dice.below(4)];
                let after = i64::from(w > 1);
                let widths = vec![[0, 0], [0, 0], [0, 0], [0, after]];
                (Op::Pad(Pad { widths, mode, value: 0.0 }), vec![x], [c, h, w + after as usize])
            }
            _ => match self.dice.below(4) {
                0 => (Op::Affine(Affine { scale: -1.5, shift: 0.25 }), vec![x], [c, h, w]),
                1 => (Op::Roll(Roll { dims: vec![2, 3], shifts: vec![1, -1] }), vec![x], [c, h, w]),
                2 => {
                    (Op::Upsample(Upsample { kind: UpsampleKind::Nearest, size: [h + 1, w] }), vec![x], [c, h + 1, w])
                }
                _ => {
                    let kernel = [h.min(2), w.min(3)];
                    let (padding, stride) = (kernel.map(|k| k / 2), [1, 2]);
                    let side = |n: usize, i: usize| (n + 2 * padding[i] - kernel[i]) / stride[i] + 1;
                    let size = [c, side(h, 0), side(w, 1)];
                    let max = MaxPool2d { kernel, stride, padding, dilation: [1, 1], ceil_mode: false };
                    let mean = AvgPool2d { kernel, stride, padding, ceil_mode: false, count_include_pad: false };
                    let op = if self.dice.below(2) == 0 { Op::MaxPool2d(max) } else { Op::AvgPool2d(mean) };
                    (op, vec![x], size)
                }
            },
        };
        // Of maps one pixel wide, libtorch 2.11 computes wrong gradients of a batch norm on the CPU (differences and the plan
        // agree with each other), because both of its layouts of memory look alike: there is nothing to hold the plan to.
        if made[1..].iter().all(|side| *side > 1) && made.iter().product::<usize>() <= 4096 {
            let at = self.push(op, &inputs);
            self.maps.push((at, made));
        }
    }

    /// The graph of all that its logits depend on, and its weights.
    fn finish(mut self) -> (Graph, Checkpoint) {
        // Everything made late is taken, so that values have several takers.
        let last: Vec<(usize, [usize; 3])> = self.maps.iter().rev().take(3).copied().collect();
        let pooled: Vec<usize> = last
            .iter()
            .map(|(x, _)| self.push(Op::Reduce(Reduce { dims: vec![2, 3], ..Reduce::default() }), &[*x]))
            .collect();
        let joined = self.push(Op::Cat(Cat { dim: 1 }), &pooled);
        let weight = self.tensor(&[4, last.iter().map(|(_, [c, ..])| c).sum()]);
        let output = self.push(Op::Linear(Linear { weight, bias: None }), &[joined]);
        let mut used = vec![false; self.nodes.len() + 1];
        used[output] = true;
        for (index, node) in self.nodes.iter().enumerate().rev() {
            if used[index + 1] {
                node.inputs.iter().for_each(|input| used[*input] = true);
            }
        }
        let mut numbers = vec![0; self.nodes.len() + 1];
        let mut nodes = Vec::new();
        for (index, mut node) in self.nodes.into_iter().enumerate().filter(|(index, _)| used[index + 1]) {
            node.inputs.iter_mut().for_each(|input| *input = numbers[*input]);
            nodes.push(node);
            numbers[index + 1] = nodes.len();
        }
        let graph = Graph { input: Geometry { channels: 2, height: 5, width: 6 }, output: nodes.len(), nodes };
        let statistics: Vec<String> = graph
            .nodes
            .iter()
            .filter_map(|node| if let Op::BatchNorm(norm) = &node.op { Some(norm.running_var.clone()) } else { None })
            .collect();
        let mut values = Vec::new();
        for (name, _) in graph.tensors() {
            let shape: Vec<i64> = self.tensors[name].iter().map(|size| *size as i64).collect();
            let variance = statistics.iter().any(|each| each == name);
            let count = shape.iter().product::<i64>() as usize;
            let each: Vec<f32> =
                (0..count).map(|_| self.dice.real() as f32 * 0.8 + if variance { 1.0 } else { 0.0 }).collect();
            values.push((name.to_owned(), Tensor::from_slice(&each).view(shape.as_slice())));
        }
        let bytes = write(values.iter().map(|(name, tensor)| (name.clone(), tensor)), &BTreeMap::new());
        (graph, Checkpoint::parse(bytes.into()).unwrap())
    }
}

fn drawn(seed: u64) -> (Graph, Checkpoint) {
    let dice = Dice(seed.wrapping_mul(2).wrapping_add(1));
    let mut drawn = Drawn { dice, nodes: Vec::new(), tensors: BTreeMap::new(), maps: vec![(0, [2, 5, 6])] };
    for _ in 0..14 {
        drawn.grow();
    }
    drawn.finish()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Whatever the graph: by hand, by autograd and by differences it is the same gradient.
    #[test]
    fn a_plan_is_autograd_is_finite_differences(seed: u64) {
        let (graph, file) = drawn(seed);
        prop_assume!(graph.depends_on_image()[graph.output]);
        prop_assert_eq!(&Graph::parse(&graph.encode()).unwrap(), &graph);
        let (frozen, network) = both(&graph, &file, Kind::Double);
        let mut dice = Dice(seed | 1);
        let mut image = |images: i64| {
            // Never zero and never twice the same, where activations and maxima have no gradient.
            let value = |at: i64| dice.real() * 1.5 + 0.0003 + at as f64 * 5e-6;
            let values: Vec<f64> = (0..images * 60).map(value).collect();
            Tensor::from_slice(&values).view([images, 2, 5, 6])
        };
        let (x, direction) = (image(3), image(3));
        assert_equal(&graph.encode(), &frozen, &network, &x, 1e-9);
        let at = |offset: f64| {
            let recorded = frozen.forward(&(&x + &direction * offset), true).unwrap();
            let taps: Vec<(Tensor, Tensor)> = recorded.statistics.into_iter().map(|s| (s.mean, s.var)).collect();
            loss(&recorded.logits, &taps).double_value(&[])
        };
        let step = 1e-6;
        let slope = (at(step) - at(-step)) / (2.0 * step);
        let [(_, _, gradient), _] = gradients(&frozen, &network, &x);
        let expected = (gradient * &direction).sum(None).double_value(&[]);
        // Rounding of the loss itself, and an element in a thousand whose sign changes within the step.
        let allowed = 1e-3 * expected.abs().max(slope.abs()) + 1e-7 * at(0.0).abs().max(1.0);
        prop_assert!((slope - expected).abs() <= allowed, "{slope} {expected} {}", graph.encode());
    }
}
