//! Convolutions and batch norms with their weights: folded, tapped, and turned around.

use tch::{Kind, TchError, Tensor};

use crate::model::graph::{BatchNorm, Conv2d};
use crate::model::network::{BatchStatistics, StatisticsGradient, channels_last};
use crate::model::operate::{Tensors, pair};

/// Folding divides by the batch norm's scale to recover its input's statistics. A layer with a channel whose scale is
/// below this keeps its batch norm apart.
const SMALLEST_FOLDED_SCALE: f64 = 1e-3;

fn named<'a>(tensors: &'a Tensors, name: &str) -> Result<&'a Tensor, TchError> {
    tensors.get(name).ok_or_else(|| TchError::FileFormat(format!("the network has no tensor {name}")))
}

/// `[C]` beside a value `[N, C, ...]`.
fn per_channel(vector: &Tensor, like: &Tensor) -> Tensor {
    let mut shape = vec![1; like.dim()];
    if let Some(channels) = shape.get_mut(1) {
        *channels = -1;
    }
    vector.to_kind(like.kind()).view(shape.as_slice())
}

/// What the backward pass needs of a tap: what the statistics were taken of, and its mean.
pub type Tapped = (Tensor, Tensor);

/// A batch norm in evaluation mode: `y = scale x + shift`, `[C]` each.
#[derive(Debug)]
pub struct Norm {
    scale: Tensor,
    shift: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    /// `[C]` each, never read: see [`Self::tap`].
    unused: [Tensor; 2],
}

impl Norm {
    pub fn new(op: &BatchNorm, tensors: &Tensors) -> Result<Self, TchError> {
        let running_mean = named(tensors, &op.running_mean)?.shallow_clone();
        let running_var = named(tensors, &op.running_var)?.shallow_clone();
        let deviation = (&running_var + op.eps).sqrt();
        let scale = match &op.weight {
            Some(weight) => named(tensors, weight)? / deviation,
            None => deviation.reciprocal(),
        };
        let shift = -&running_mean * &scale;
        let shift = if let Some(bias) = &op.bias { named(tensors, bias)? + shift } else { shift };
        let unused = [running_mean.zeros_like(), running_var.zeros_like()];
        Ok(Self { scale, shift, running_mean, running_var, unused })
    }

    pub fn apply(&self, x: &Tensor) -> Result<Tensor, TchError> {
        per_channel(&self.shift, x).f_addcmul(x, &per_channel(&self.scale, x))
    }

    /// The statistics of its input, told from `x`: the input itself, or what the folded norm made of it.
    pub fn tap(&self, x: &Tensor, folded: bool) -> Result<(BatchStatistics, Tapped), TchError> {
        // Given running statistics in f32, which momentum 0 leaves alone, the result is in f32, too; without, on the CPU
        // it is rounded to the map's own kind.
        let [mean, var] = &self.unused;
        let (mean, var) = x.f_batch_norm_update_stats(Some(mean), Some(var), 0.0)?;
        let (mean, var) = (mean.to_kind(self.scale.kind()), var.to_kind(self.scale.kind()));
        let (input_mean, input_var) = if folded {
            ((&mean - &self.shift) / &self.scale, &var / self.scale.square())
        } else {
            (mean.shallow_clone(), var)
        };
        let statistics = BatchStatistics {
            mean: input_mean,
            var: input_var,
            running_mean: self.running_mean.shallow_clone(),
            running_var: self.running_var.shallow_clone(),
        };
        Ok((statistics, (x.shallow_clone(), mean)))
    }

    /// From the gradient of what comes out to that of what came in.
    pub fn backward(
        &self,
        grad: &Tensor,
        tapped: Option<Tapped>,
        statistics: Option<&StatisticsGradient>,
    ) -> Result<Tensor, TchError> {
        let grad = grad.f_mul(&per_channel(&self.scale, grad))?;
        self.pull(grad, tapped, statistics, false)
    }

    /// Adds the gradient of the statistics to that of what they were taken of, x:
    /// d mean / d c = 1/n and d var / d c = 2 (c - mean) / n, where the norm's input c is x, or, folded, (x - shift) / scale.
    fn pull(
        &self,
        grad: Tensor,
        tapped: Option<Tapped>,
        statistics: Option<&StatisticsGradient>,
        folded: bool,
    ) -> Result<Tensor, TchError> {
        let (Some((x, mean)), Some(statistics)) = (tapped, statistics) else { return Ok(grad) };
        let n = x.numel() as f64 / self.scale.numel() as f64;
        let (slope, constant) = if folded {
            (&statistics.var * (2.0 / n) / self.scale.square(), &statistics.mean / n / &self.scale)
        } else {
            (&statistics.var * (2.0 / n), &statistics.mean / n)
        };
        let constant = constant - &slope * mean;
        per_channel(&constant, &x).f_addcmul(&x, &per_channel(&slope, &x))?.f_add_(&grad.f_to_kind(x.kind())?)
    }
}

/// A convolution, and the batch norm behind it.
#[derive(Debug)]
pub struct ConvUnit {
    op: Conv2d,
    weight: Tensor,
    bias: Option<Tensor>,
    /// The weight turned around, where the gradient of the input is a plain convolution with it.
    turned: Option<Tensor>,
    norm: Option<Norm>,
    folded: bool,
    kind: Kind,
}

/// What the backward pass needs of a convolution.
#[derive(Debug)]
pub struct ConvRecord {
    size: [i64; 2],
    kind: Kind,
    tapped: Option<Tapped>,
}

impl ConvUnit {
    pub fn new(op: &Conv2d, norm: Option<Norm>, tensors: &Tensors, kind: Kind) -> Result<Self, TchError> {
        let mut weight = named(tensors, &op.weight)?.shallow_clone();
        let mut bias = op.bias.as_deref().map(|name| named(tensors, name)).transpose()?.map(Tensor::shallow_clone);
        let folds = |norm: &&Norm| norm.scale.abs().min().double_value(&[]) >= SMALLEST_FOLDED_SCALE;
        let folding = norm.as_ref().filter(folds);
        if let Some(norm) = folding {
            weight = &weight * norm.scale.view([-1, 1, 1, 1]);
            // The convolution's own bias is scaled as its map is.
            bias = Some(bias.map_or_else(|| norm.shift.shallow_clone(), |bias| bias * &norm.scale + &norm.shift));
        }
        let folded = folding.is_some();
        let weight = weight.to_kind(kind);
        // Padding beyond the kernel would be negative in the turned convolution.
        let plain = op.stride == [1; 2]
            && op.dilation == [1; 2]
            && op.groups == 1
            && (0..2).all(|i| (op.padding[i] as i64) < weight.size()[i + 2]);
        let turned = plain.then(|| channels_last(&weight.transpose(0, 1).flip([2, 3])));
        Ok(Self {
            op: op.clone(),
            weight: channels_last(&weight),
            bias: bias.map(|bias| bias.to_kind(kind)),
            turned,
            norm,
            folded,
            kind,
        })
    }

    /// What comes out of the norm, if there is one; with `tap`, also the statistics of its input.
    pub fn forward(&self, x: &Tensor, tap: bool) -> Result<(Tensor, ConvRecord, Option<BatchStatistics>), TchError> {
        let Conv2d { stride, padding, dilation, groups, .. } = &self.op;
        let [stride, padding, dilation] = [*stride, *padding, *dilation].map(pair);
        let (kind, shape) = (x.kind(), x.size());
        let x = x.f_to_kind(self.kind)?;
        let conv = x.f_conv2d(&self.weight, self.bias.as_ref(), stride, padding, dilation, *groups as i64)?;
        let mut record = ConvRecord { size: [shape[2], shape[3]], kind, tapped: None };
        let mut statistics = None;
        if let Some(norm) = self.norm.as_ref().filter(|_| tap) {
            let (found, tapped) = norm.tap(&conv, self.folded)?;
            (statistics, record.tapped) = (Some(found), Some(tapped));
        }
        let made = match &self.norm {
            Some(norm) if !self.folded => norm.apply(&conv)?,
            _ => conv,
        };
        Ok((made, record, statistics))
    }

    /// From the gradient of what comes out to that of what came in.
    pub fn backward(
        &self,
        grad: Tensor,
        record: ConvRecord,
        statistics: Option<&StatisticsGradient>,
    ) -> Result<Tensor, TchError> {
        let ConvRecord { size, kind, tapped } = record;
        let grad = match &self.norm {
            Some(norm) if self.folded => norm.pull(grad, tapped, statistics, true)?,
            Some(norm) => norm.backward(&grad, tapped, statistics)?,
            None => grad,
        };
        let grad = grad.f_to_kind(self.kind)?;
        let Conv2d { stride, padding, dilation, groups, .. } = &self.op;
        let [stride, padding, dilation] = [*stride, *padding, *dilation].map(pair);
        let kernel = [self.weight.size()[2], self.weight.size()[3]];
        let none = None::<&Tensor>;
        if let Some(turned) = &self.turned {
            let padding = [kernel[0] - 1 - padding[0], kernel[1] - 1 - padding[1]];
            return grad.f_conv2d(turned, none, [1, 1], padding, [1, 1], 1)?.f_to_kind(kind);
        }
        // Pixels at the end that no window reached.
        let lost = [0, 1].map(|i| {
            let reached = (grad.size()[i + 2] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1;
            size[i] + 2 * padding[i] - reached
        });
        grad.f_conv_transpose2d(&self.weight, none, stride, padding, lost, *groups as i64, dilation)?.f_to_kind(kind)
    }
}
