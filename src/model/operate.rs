//! What each operation of a graph computes, on libtorch.

use std::collections::BTreeMap;

use tch::{Kind, TchError, Tensor};

use super::graph::{ActivationKind, Op, Pad, PadMode, Reduce, ReduceKind};

/// Whether a network learns, which batch norms and dropout want to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Norms with what they remember; nothing is dropped.
    Evaluation,
    /// Norms with the batch's statistics, which move what they remember; dropout by libtorch's generator.
    Training,
}

/// A network's tensors by name, on a device.
pub type Tensors = BTreeMap<String, Tensor>;

/// The value of one operation. Shapes and names are those that were inferred for the graph and its tensors; what is left to
/// fail is memory. `kind` is what convolutions and linear maps compute in, `images` the size of the batch.
pub fn operate(
    op: &Op,
    inputs: &[&Tensor],
    tensors: &Tensors,
    mode: Mode,
    kind: Kind,
    images: usize,
) -> Result<Tensor, TchError> {
    let named = |name: &str| tensors.get(name).ok_or_else(|| missing(name));
    let optional = |name: &Option<String>| name.as_deref().map(named).transpose();
    if let Op::Constant(op) = op {
        return Ok(named(&op.value)?.shallow_clone());
    }
    let x = input(inputs, 0)?;
    match op {
        Op::Constant(op) => Ok(named(&op.value)?.shallow_clone()),
        Op::Conv2d(op) => {
            let weight = named(&op.weight)?.f_to_kind(kind)?;
            let bias = optional(&op.bias)?.map(|bias| bias.f_to_kind(kind)).transpose()?;
            let [stride, padding, dilation] = [op.stride, op.padding, op.dilation].map(pair);
            x.f_to_kind(kind)?.f_conv2d(&weight, bias.as_ref(), stride, padding, dilation, op.groups as i64)
        }
        Op::Linear(op) => {
            let weight = named(&op.weight)?;
            x.f_to_kind(weight.kind())?.f_linear(weight, optional(&op.bias)?)
        }
        Op::BatchNorm(op) => x.f_batch_norm(
            optional(&op.weight)?,
            optional(&op.bias)?,
            Some(named(&op.running_mean)?),
            Some(named(&op.running_var)?),
            mode == Mode::Training,
            op.momentum,
            op.eps,
            true,
        ),
        Op::LayerNorm(op) => {
            x.f_layer_norm(list(&op.shape), optional(&op.weight)?, optional(&op.bias)?, op.eps, true)
        }
        Op::GroupNorm(op) => {
            x.f_group_norm(op.groups as i64, optional(&op.weight)?, optional(&op.bias)?, op.eps, true)
        }
        Op::Activation(op) => activate(op.kind, x),
        Op::Add(op) if op.alpha == 1.0 => x.f_add(input(inputs, 1)?),
        Op::Add(op) if op.alpha == -1.0 => x.f_sub(input(inputs, 1)?),
        Op::Add(op) => x.f_add(&input(inputs, 1)?.f_mul_scalar(op.alpha)?),
        Op::Mul(_) => x.f_mul(input(inputs, 1)?),
        Op::Div(_) => x.f_div(input(inputs, 1)?),
        Op::Affine(op) => {
            let scaled = if op.scale == 1.0 { x.shallow_clone() } else { x.f_mul_scalar(op.scale)? };
            if op.shift == 0.0 { Ok(scaled) } else { scaled.f_add_scalar(op.shift) }
        }
        Op::Reduce(op) => reduce(op, x),
        Op::Softmax(op) => x.f_softmax(op.dim as i64, None),
        Op::Matmul(_) => x.f_matmul(&input(inputs, 1)?.f_to_kind(x.kind())?),
        Op::Attention(op) => {
            let [k, v] = [input(inputs, 1)?.f_to_kind(x.kind())?, input(inputs, 2)?.f_to_kind(x.kind())?];
            let mask = inputs.get(3).map(|mask| mask.f_to_kind(x.kind())).transpose()?;
            Tensor::f_scaled_dot_product_attention(x, &k, &v, mask, 0.0, op.causal, op.scale, false)
        }
        Op::MaxPool2d(op) => {
            let [kernel, stride, padding, dilation] = [op.kernel, op.stride, op.padding, op.dilation].map(pair);
            x.f_max_pool2d(kernel, stride, padding, dilation, op.ceil_mode)
        }
        Op::AvgPool2d(op) => {
            let [kernel, stride, padding] = [op.kernel, op.stride, op.padding].map(pair);
            x.f_avg_pool2d(kernel, stride, padding, op.ceil_mode, op.count_include_pad, None)
        }
        Op::AdaptiveAvgPool2d(op) => x.f_adaptive_avg_pool2d(pair(op.size)),
        Op::Upsample(op) => x.f_upsample_nearest2d(pair(op.size), None, None),
        Op::Pad(op) => pad(op, x),
        Op::Reshape(op) => x.f_reshape(shape(&op.shape, images)),
        Op::Permute(op) => x.f_permute(list(&op.dims)),
        Op::Expand(op) => x.f_expand(shape(&op.shape, images), false),
        Op::Cat(op) => Tensor::f_cat(inputs, op.dim as i64),
        Op::Slice(op) => x.f_slice(op.dim as i64, op.start as i64, op.end as i64, op.step as i64),
        Op::Roll(op) => x.f_roll(op.shifts.as_slice(), list(&op.dims)),
        Op::Dropout(_) if mode == Mode::Evaluation => Ok(x.shallow_clone()),
        Op::Dropout(op) if op.whole_maps => x.f_feature_dropout(op.p, true),
        Op::Dropout(op) => x.f_dropout(op.p, true),
    }
}

fn missing(name: &str) -> TchError {
    TchError::FileFormat(format!("the network has no tensor {name}"))
}

fn input<'a>(inputs: &[&'a Tensor], index: usize) -> Result<&'a Tensor, TchError> {
    inputs.get(index).copied().ok_or_else(|| TchError::FileFormat("an operation lacks an input".to_owned()))
}

pub(super) fn pair(values: [usize; 2]) -> [i64; 2] {
    values.map(|value| value as i64)
}

pub(super) fn list(values: &[usize]) -> Vec<i64> {
    values.iter().map(|value| *value as i64).collect()
}

pub(super) fn shape(extents: &[super::graph::Extent], images: usize) -> Vec<i64> {
    extents.iter().map(|extent| extent.at(images) as i64).collect()
}

/// PyTorch's function of each element. libtorch's binding has no slope and no alpha, so these two are told in parts.
pub(super) fn activate(kind: ActivationKind, x: &Tensor) -> Result<Tensor, TchError> {
    match kind {
        ActivationKind::Relu => x.f_relu(),
        ActivationKind::Sigmoid => x.f_sigmoid(),
        ActivationKind::Tanh => x.f_tanh(),
        ActivationKind::Silu => x.f_silu(),
        ActivationKind::Gelu => x.f_gelu("none"),
        ActivationKind::GeluTanh => x.f_gelu("tanh"),
        ActivationKind::Hardsigmoid => x.f_hardsigmoid(),
        ActivationKind::Hardswish => x.f_hardswish(),
        ActivationKind::Clamp { min, max } => {
            let above = min.map_or_else(|| Ok(x.shallow_clone()), |min| x.f_clamp_min(min))?;
            max.map_or_else(|| Ok(above.shallow_clone()), |max| above.f_clamp_max(max))
        }
        ActivationKind::LeakyRelu { slope } => x.f_relu()?.f_add(&x.f_clamp_max(0.0)?.f_mul_scalar(slope)?),
        ActivationKind::Elu { alpha } => x.f_relu()?.f_add(&x.f_clamp_max(0.0)?.f_expm1()?.f_mul_scalar(alpha)?),
    }
}

fn reduce(op: &Reduce, x: &Tensor) -> Result<Tensor, TchError> {
    let dims = list(&op.dims);
    match op.kind {
        ReduceKind::Mean => x.f_mean_dim(dims.as_slice(), op.keepdim, None),
        ReduceKind::Sum => x.f_sum_dim_intlist(dims.as_slice(), op.keepdim, None),
        ReduceKind::Max => x.f_amax(dims, op.keepdim),
        ReduceKind::Norm => x.f_norm_scalaropt_dim(2.0, dims, op.keepdim),
    }
}

/// libtorch pads the last dimensions of some ranks only, but for constants; an index for each element does it anywhere.
fn pad(op: &Pad, x: &Tensor) -> Result<Tensor, TchError> {
    if op.mode == PadMode::Constant {
        let flat: Vec<i64> = op.widths.iter().rev().flatten().copied().collect();
        return x.f_pad(flat, "constant", op.value);
    }
    let mut padded = x.shallow_clone();
    for (dim, [before, after]) in op.widths.iter().copied().enumerate().filter(|(_, widths)| *widths != [0, 0]) {
        let size = x.size().get(dim).copied().unwrap_or(0);
        let indices: Vec<i64> = (-before..size + after).map(|at| source(op.mode, at, size, before, after)).collect();
        padded = padded.f_index_select(dim as i64, &Tensor::from_slice(&indices).to_device(x.device()))?;
    }
    Ok(padded)
}

/// The element that lies at `at`, which may be outside. What a negative width cuts is no longer there to be looked at.
fn source(mode: PadMode, at: i64, size: i64, before: i64, after: i64) -> i64 {
    let (first, last) = ((-before).max(0), size - 1 - (-after).max(0));
    let length = last - first + 1;
    match mode {
        PadMode::Constant | PadMode::Replicate => at.clamp(first, last),
        PadMode::Circular => first + (at - first).rem_euclid(length),
        PadMode::Reflect if at < first => 2 * first - at,
        PadMode::Reflect if at > last => 2 * last - at,
        PadMode::Reflect => at,
    }
}
