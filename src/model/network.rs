//! A frozen network on libtorch, differentiable with respect to its input by hand.
//!
//! Synthesis needs exactly one thing from a network: the gradient of a loss on its logits and on its batch-norm
//! statistics with respect to the image. Doing that without autograd is what makes a step cheap:
//! - batch norm in evaluation mode is an affine map, folded into the convolution before it;
//! - the mean and variance of the batch-norm *input* follow from those of the folded output, by undoing the map;
//! - the gradient of any function of mean and variance is one affine map a channel, added to the gradient that comes from
//!   above, with no further pass over the statistics;
//! - weights have no gradients, so none can be computed by accident.
//!
//! In a 16-bit precision the maps and convolutions are of that kind; images, logits, statistics and all gradients that
//! leave this module are f32.
//!
//! Activations are kept channels-last.

use std::collections::BTreeMap;

use safetensors::Dtype;
use tch::{Device, Kind, Tensor};

use super::checkpoint::{Checkpoint, RawTensor};
use super::spec::{BlockSpec, NetworkSpec, Shortcut};

/// PyTorch's default epsilon of batch norm; no public checkpoint of these families uses another.
pub const BN_EPSILON: f64 = 1e-5;

/// Folding divides by the batch norm's scale to recover its input's statistics. A layer with a channel whose scale is
/// below this keeps its batch norm apart.
const SMALLEST_FOLDED_SCALE: f64 = 1e-3;

/// The batch's mean and variance at the input of one batch norm, and what the network remembers of the real data.
#[derive(Debug)]
pub struct BatchStatistics {
    /// Mean over batch and pixels, `[C]`.
    pub mean: Tensor,
    /// Biased variance over batch and pixels, `[C]`.
    pub var: Tensor,
    /// The batch norm's `running_mean`, `[C]`.
    pub running_mean: Tensor,
    /// The batch norm's `running_var`, `[C]`.
    pub running_var: Tensor,
}

/// A gradient with respect to one [`BatchStatistics`].
#[derive(Debug)]
pub struct StatisticsGradient {
    /// With respect to the mean, `[C]`.
    pub mean: Tensor,
    /// With respect to the variance, `[C]`.
    pub var: Tensor,
}

/// A convolution and its batch norm.
#[derive(Debug)]
struct Unit {
    stride: i64,
    padding: i64,
    weight: Tensor,
    /// The weight turned around, so that the input gradient of a stride-1 convolution is a plain convolution.
    turned: Tensor,
    /// The batch norm's scale and shift as `[C]`: `y = conv * scale + shift`.
    scale: Tensor,
    shift: Tensor,
    /// The shift in the kind of the maps.
    bias: Tensor,
    folded: bool,
    running_mean: Tensor,
    running_var: Tensor,
    /// `[C]` each, never read: see [`Self::forward`].
    unused: [Tensor; 2],
}

/// What the backward pass needs of a unit's forward pass.
#[derive(Debug)]
struct UnitRecord {
    in_size: [i64; 2],
    /// The tensor that the statistics were taken of: the folded output, or else the batch norm's input.
    tapped: Option<(Tensor, Tensor)>, // with its mean
}

impl Unit {
    fn new(tensors: &Tensors, kind: Kind, conv: &str, bn: &str, stride: usize, padding: i64) -> Self {
        let weight = tensors.get(&format!("{conv}.weight"));
        let norm = |part: &str| tensors.get(&format!("{bn}.{part}"));
        let (running_mean, running_var) = (norm("running_mean"), norm("running_var"));
        let scale = norm("weight") / (&running_var + BN_EPSILON).sqrt();
        let shift = norm("bias") - &running_mean * &scale;
        let folded = scale.abs().min().double_value(&[]) >= SMALLEST_FOLDED_SCALE;
        let weight = if folded { weight * scale.view([-1, 1, 1, 1]) } else { weight }.to_kind(kind);
        let turned = channels_last(&weight.transpose(0, 1).flip([2, 3]));
        Self {
            stride: stride as i64,
            padding,
            weight: channels_last(&weight),
            turned,
            bias: shift.to_kind(kind),
            scale,
            shift,
            folded,
            unused: [running_mean.zeros_like(), running_var.zeros_like()],
            running_mean,
            running_var,
        }
    }

    /// The batch norm's output; with `tap`, also the statistics of its input.
    fn forward(&self, x: &Tensor, tap: Option<&mut Vec<BatchStatistics>>) -> (Tensor, UnitRecord) {
        let (stride, padding) = ([self.stride; 2], [self.padding; 2]);
        let bias = self.folded.then_some(&self.bias);
        let conv = x.conv2d(&self.weight, bias, stride, padding, [1, 1], 1);
        let tapped = tap.map(|statistics| {
            // Given running statistics in f32, which momentum 0 leaves alone, the result is in f32, too; without, on the CPU
            // it is rounded to the map's own kind.
            let [mean, var] = &self.unused;
            let (mean, var) = conv.batch_norm_update_stats(Some(mean), Some(var), 0.0);
            let (mean, var) = (mean.to_kind(self.scale.kind()), var.to_kind(self.scale.kind()));
            let (input_mean, input_var) = if self.folded {
                ((&mean - &self.shift) / &self.scale, &var / self.scale.square())
            } else {
                (mean.shallow_clone(), var)
            };
            statistics.push(BatchStatistics {
                mean: input_mean,
                var: input_var,
                running_mean: self.running_mean.shallow_clone(),
                running_var: self.running_var.shallow_clone(),
            });
            (conv.shallow_clone(), mean)
        });
        let (height, width) = (x.size()[2], x.size()[3]);
        let out = if self.folded {
            conv
        } else {
            per_channel(&self.bias).addcmul(&conv, &per_channel(&self.scale.to_kind(conv.kind())))
        };
        (out, UnitRecord { in_size: [height, width], tapped })
    }

    /// From the gradient of the batch norm's output to that of the convolution's input.
    fn backward(&self, grad: Tensor, record: UnitRecord, statistics: Option<&StatisticsGradient>) -> Tensor {
        let mut grad = if self.folded { grad } else { grad * per_channel(&self.scale.to_kind(self.weight.kind())) };
        if let (Some((conv, mean)), Some(statistics)) = (&record.tapped, statistics) {
            // d mean / d c = 1/n and d var / d c = 2 (c - mean) / n. Where the batch norm is folded, c = (y - shift) / scale.
            let size = conv.size();
            let n = (size[0] * size[2] * size[3]) as f64;
            let (slope, constant) = if self.folded {
                (&statistics.var * (2.0 / n) / self.scale.square(), &statistics.mean / n / &self.scale)
            } else {
                (&statistics.var * (2.0 / n), &statistics.mean / n)
            };
            let constant = (constant - &slope * mean).to_kind(conv.kind());
            grad = per_channel(&constant).addcmul(conv, &per_channel(&slope.to_kind(conv.kind()))) + grad;
        }
        let [height, width] = record.in_size;
        if self.stride == 1 {
            let padding = self.weight.size()[2] - 1 - self.padding;
            return grad.conv2d(&self.turned, None::<&Tensor>, [1, 1], [padding; 2], [1, 1], 1);
        }
        let lost =
            |input: i64, output: i64| input - ((output - 1) * self.stride - 2 * self.padding + self.weight.size()[2]);
        let output = [lost(height, grad.size()[2]), lost(width, grad.size()[3])];
        grad.conv_transpose2d(&self.weight, None::<&Tensor>, [self.stride; 2], [self.padding; 2], output, 1, [1, 1])
    }
}

#[derive(Debug)]
struct Block {
    spec: BlockSpec,
    first: Unit,
    second: Unit,
    projection: Option<Unit>,
}

#[derive(Debug)]
struct BlockRecord {
    first: UnitRecord,
    inner: Tensor,
    second: UnitRecord,
    projection: Option<UnitRecord>,
    in_shape: Vec<i64>,
    output: Tensor,
}

/// A forward pass, remembered for one backward pass.
#[derive(Debug)]
pub struct Recorded {
    /// The logits, `[N, K]`.
    pub logits: Tensor,
    /// Where asked for: one entry a batch norm, in the order in which they run (a block's projection after its second
    /// batch norm). That is also PyTorch's registration order for these families.
    pub statistics: Vec<BatchStatistics>,
    stem: UnitRecord,
    stem_output: Tensor,
    blocks: Vec<BlockRecord>,
}

impl Recorded {
    /// The feature map `[N, C, H, W]` that each block gives, after its ReLU.
    pub fn block_outputs(&self) -> impl Iterator<Item = &Tensor> {
        self.blocks.iter().map(|block| &block.output)
    }

    /// The feature map that the first block gets.
    pub fn stem_output(&self) -> &Tensor {
        &self.stem_output
    }
}

/// A network that is never trained: no tensor in it can require a gradient.
#[derive(Debug)]
pub struct FrozenNetwork {
    spec: NetworkSpec,
    stem: Unit,
    blocks: Vec<Block>,
    head_weight: Tensor,
    head_bias: Tensor,
    device: Device,
    kind: Kind,
}

/// The tensors of a checkpoint on a device.
struct Tensors(BTreeMap<String, Tensor>);

impl Tensors {
    fn get(&self, name: &str) -> Tensor {
        // Only called with names that NetworkSpec::tensors listed, for checkpoints that it accepted.
        self.0[name].shallow_clone()
    }
}

/// Copies one tensor of a checkpoint to a device.
pub fn to_device(raw: &RawTensor<'_>, kind: Kind, device: Device) -> Option<Tensor> {
    let from = match raw.dtype {
        Dtype::F32 => Kind::Float,
        Dtype::F64 => Kind::Double,
        Dtype::F16 => Kind::Half,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::I64 => Kind::Int64,
        Dtype::U8 => Kind::Uint8,
        _ => return None,
    };
    let size: Vec<i64> = raw.shape.iter().map(|d| *d as i64).collect();
    Tensor::f_from_data_size(raw.data, &size, from).ok().map(|tensor| tensor.to_device(device).to_kind(kind))
}

fn per_channel(vector: &Tensor) -> Tensor {
    vector.view([1, -1, 1, 1])
}

/// The kind of everything but the maps: f32 beside 16-bit maps.
fn outer(kind: Kind) -> Kind {
    if matches!(kind, Kind::BFloat16 | Kind::Half) { Kind::Float } else { kind }
}

/// The same values with channels innermost in memory.
pub fn channels_last(x: &Tensor) -> Tensor {
    x.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2])
}

impl FrozenNetwork {
    /// Puts a network on a device. The checkpoint is one from which `spec` was made.
    pub fn load(spec: &NetworkSpec, checkpoint: &Checkpoint, device: Device, kind: Kind) -> Self {
        let _guard = tch::no_grad_guard();
        let named = spec.tensors().into_iter().filter_map(|tensor| {
            let raw = checkpoint.get(&tensor.name)?;
            Some((tensor.name, to_device(&raw, outer(kind), device)?))
        });
        let tensors = Tensors(named.collect());
        let block = |block: &BlockSpec| {
            let p = &block.prefix;
            let projection = (block.shortcut == Shortcut::Projection).then(|| {
                let s = format!("{p}.{}", spec.naming.shortcut);
                Unit::new(&tensors, kind, &format!("{s}.0"), &format!("{s}.1"), block.stride, 0)
            });
            Block {
                first: Unit::new(&tensors, kind, &format!("{p}.conv1"), &format!("{p}.bn1"), block.stride, 1),
                second: Unit::new(&tensors, kind, &format!("{p}.conv2"), &format!("{p}.bn2"), 1, 1),
                projection,
                spec: block.clone(),
            }
        };
        Self {
            stem: Unit::new(&tensors, kind, "conv1", "bn1", 1, 1),
            blocks: spec.blocks.iter().map(block).collect(),
            head_weight: tensors.get(&format!("{}.weight", spec.naming.head)),
            head_bias: tensors.get(&format!("{}.bias", spec.naming.head)),
            spec: spec.clone(),
            device,
            kind,
        }
    }

    /// The architecture.
    pub fn spec(&self) -> &NetworkSpec {
        &self.spec
    }

    /// Where the network lives.
    pub fn device(&self) -> Device {
        self.device
    }

    /// The element type of images, logits and gradients; that of the maps may be a shorter one.
    pub fn kind(&self) -> Kind {
        outer(self.kind)
    }

    /// Logits `[N, K]` of normalized images `[N, C, H, W]`, in evaluation mode.
    pub fn logits(&self, x: &Tensor) -> Tensor {
        tch::no_grad(|| self.run(x, false).logits)
    }

    /// The same, remembered for [`Self::backward`]; with `tap`, also the statistics at every batch norm's input.
    pub fn forward(&self, x: &Tensor, tap: bool) -> Recorded {
        tch::no_grad(|| self.run(x, tap))
    }

    fn run(&self, x: &Tensor, tap: bool) -> Recorded {
        let mut statistics = Vec::new();
        let x = channels_last(&x.to_kind(self.kind));
        let (out, stem) = self.stem.forward(&x, tap.then_some(&mut statistics));
        let mut h = out.relu();
        let stem_output = h.shallow_clone();
        let mut blocks = Vec::with_capacity(self.blocks.len());
        for block in &self.blocks {
            let (out, first) = block.first.forward(&h, tap.then_some(&mut statistics));
            let inner = out.relu();
            let (out, second) = block.second.forward(&inner, tap.then_some(&mut statistics));
            let (shortcut, projection) = match &block.projection {
                Some(unit) => {
                    let (shortcut, record) = unit.forward(&h, tap.then_some(&mut statistics));
                    (shortcut, Some(record))
                }
                None => (pad_shortcut(&h, &block.spec), None),
            };
            let output = (out + shortcut).relu_();
            blocks.push(BlockRecord {
                first,
                inner,
                second,
                projection,
                in_shape: h.size(),
                output: output.shallow_clone(),
            });
            h = output;
        }
        let features = h.mean_dim([2i64, 3].as_slice(), false, outer(self.kind));
        let logits = features.linear(&self.head_weight, Some(&self.head_bias));
        Recorded { logits, statistics, stem, stem_output, blocks }
    }

    /// The gradient with respect to the input, `[N, C, H, W]`, of a loss whose gradients with respect to the logits
    /// and, one entry a batch norm, to the statistics are given. `statistics` is empty where they do not matter.
    pub fn backward(&self, recorded: Recorded, logits: &Tensor, statistics: &[StatisticsGradient]) -> Tensor {
        let _guard = tch::no_grad_guard();
        let Recorded { stem, stem_output, blocks, .. } = recorded;
        let mut taps = statistics.iter();
        // The features are means over the last map's pixels.
        let shape = blocks.last().map_or_else(|| stem_output.size(), |block| block.output.size());
        let features = logits.matmul(&self.head_weight) / (shape[2] * shape[3]) as f64;
        let mut grad = channels_last(&per_pixel(&features.to_kind(self.kind), &shape));
        for (block, record) in self.blocks.iter().zip(blocks).rev() {
            grad = record.output.threshold_backward(&grad, 0.0);
            let tap = if block.projection.is_some() { taps.next_back() } else { None };
            let second = block.second.backward(grad.shallow_clone(), record.second, taps.next_back());
            let inner = record.inner.threshold_backward(&second, 0.0);
            let mut below = block.first.backward(inner, record.first, taps.next_back());
            match (&block.projection, record.projection) {
                (Some(unit), Some(record)) => below += unit.backward(grad, record, tap),
                _ => add_pad_gradient(&mut below, &grad, &block.spec, &record.in_shape),
            }
            grad = below;
        }
        grad = stem_output.threshold_backward(&grad, 0.0);
        self.stem.backward(grad, stem, taps.next_back()).to_kind(outer(self.kind))
    }
}

fn per_pixel(features: &Tensor, shape: &[i64]) -> Tensor {
    features.unsqueeze(-1).unsqueeze(-1).expand(shape, false)
}

/// Where the zeros of option A go: half of the new channels before the old ones, the rest after.
fn padding(spec: &BlockSpec) -> (i64, i64) {
    let new = (spec.out_width - spec.in_width) as i64;
    (new / 2, new - new / 2)
}

/// The block input as option A or the identity shortcut passes it on.
pub(super) fn pad_shortcut(h: &Tensor, spec: &BlockSpec) -> Tensor {
    if spec.shortcut == Shortcut::Identity {
        return h.shallow_clone();
    }
    let stride = spec.stride as i64;
    let (before, after) = padding(spec);
    h.slice(2, None, None, stride).slice(3, None, None, stride).constant_pad_nd([0, 0, 0, 0, before, after])
}

fn add_pad_gradient(below: &mut Tensor, grad: &Tensor, spec: &BlockSpec, in_shape: &[i64]) {
    if spec.shortcut == Shortcut::Identity {
        *below += grad;
        return;
    }
    let stride = spec.stride as i64;
    let mut kept = below.slice(2, None, None, stride).slice(3, None, None, stride);
    kept += grad.narrow(1, padding(spec).0, in_shape[1]);
}
