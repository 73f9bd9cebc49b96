//! Gradients of operations other than convolutions and batch norms: by hand where that is cheap, else by autograd of the
//! operation alone, on inputs that were kept.

use tch::{Kind, TchError, Tensor};

use crate::model::graph::{ActivationKind, Op, PadMode, ReduceKind};
use crate::model::operate::{Mode, Tensors, list, operate, pair};

/// What an operation's backward pass needs of its forward pass.
#[derive(Debug)]
pub enum Saved {
    /// Nothing.
    Nothing,
    /// The size of each input, and the kind of the first.
    Sizes(Vec<Vec<i64>>, Kind),
    /// The result.
    Output(Tensor),
    /// The inputs, and what a maximum was found at.
    Inputs(Vec<Tensor>, Option<Tensor>),
}

/// A gradient for one input, and whether nobody else holds its memory.
type Part = Option<(Tensor, bool)>;

/// The gradients of values that are still to be taken.
pub struct Gradients(Vec<Option<(Tensor, bool)>>);

impl Gradients {
    pub fn new(values: usize) -> Self {
        Self(std::iter::repeat_with(|| None).take(values).collect())
    }

    /// Adds a part of a value's gradient. What is owned may be added to in place; what is shared never is.
    pub fn add(&mut self, value: usize, part: Tensor, owned: bool) -> Result<(), TchError> {
        let Some(slot) = self.0.get_mut(value) else { return Ok(()) };
        *slot = Some(match slot.take() {
            None => (part, owned),
            Some((mut sum, true)) => (sum.f_add_(&part)?, true),
            Some((sum, false)) if owned => ({ part }.f_add_(&sum)?, true),
            Some((sum, false)) => (sum.f_add(&part)?, true),
        });
        Ok(())
    }

    pub fn take(&mut self, value: usize) -> Option<Tensor> {
        self.0.get_mut(value)?.take().map(|(gradient, _)| gradient)
    }
}

/// Whether the gradient is by hand; `depends` tells which inputs need one.
fn by_hand(op: &Op, inputs: &[Tensor], depends: &[bool]) -> bool {
    match op {
        // A broadcast input's gradient is a sum.
        Op::Add(_) => inputs.windows(2).all(|two| two[0].size() == two[1].size()),
        Op::Pad(op) => {
            let grows = op.widths.iter().flatten().all(|width| *width >= 0);
            op.mode == PadMode::Constant && grows
        }
        Op::Reduce(op) => matches!(op.kind, ReduceKind::Mean | ReduceKind::Sum),
        Op::Activation(op) => !matches!(op.kind, ActivationKind::Elu { .. } | ActivationKind::LeakyRelu { .. }),
        Op::Linear(_) | Op::Affine(_) | Op::Reshape(_) | Op::Permute(_) | Op::Slice(_) | Op::Cat(_) => true,
        Op::MaxPool2d(_) | Op::AvgPool2d(_) | Op::Dropout(_) => true,
        // What depends on no image has none.
        _ => !depends.contains(&true),
    }
}

/// The value of an operation, and what its gradient will need.
pub fn forward(
    op: &Op,
    inputs: &[Tensor],
    depends: &[bool],
    tensors: &Tensors,
    kind: Kind,
    images: usize,
) -> Result<(Tensor, Saved), TchError> {
    if let (Op::MaxPool2d(op), [x]) = (op, inputs) {
        let [kernel, stride, padding, dilation] = [op.kernel, op.stride, op.padding, op.dilation].map(pair);
        let (value, indices) = x.f_max_pool2d_with_indices(kernel, stride, padding, dilation, op.ceil_mode)?;
        return Ok((value, Saved::Inputs(vec![x.shallow_clone()], Some(indices))));
    }
    let of: Vec<&Tensor> = inputs.iter().collect();
    let value = operate(op, &of, tensors, Mode::Evaluation, kind, images)?;
    let first = inputs.first().map_or(kind, Tensor::kind);
    let sizes = || Saved::Sizes(inputs.iter().map(Tensor::size).collect(), first);
    let saved = match op {
        _ if !by_hand(op, inputs, depends) => Saved::Inputs(inputs.iter().map(Tensor::shallow_clone).collect(), None),
        Op::Activation(op) => match op.kind {
            ActivationKind::Relu | ActivationKind::Sigmoid | ActivationKind::Tanh => {
                Saved::Output(value.shallow_clone())
            }
            _ => Saved::Inputs(inputs.iter().map(Tensor::shallow_clone).collect(), None),
        },
        Op::AvgPool2d(_) => Saved::Inputs(inputs.iter().map(Tensor::shallow_clone).collect(), None),
        _ => sizes(),
    };
    Ok((value, saved))
}

/// The gradient of each input from that of the value.
pub fn backward(
    op: &Op,
    grad: Tensor,
    saved: Saved,
    depends: &[bool],
    tensors: &Tensors,
    kind: Kind,
    images: usize,
) -> Result<Vec<Part>, TchError> {
    let parts = match (op, saved) {
        (Op::Activation(op), Saved::Output(y)) => vec![Some((by_output(op.kind, &y, &grad)?, true))],
        (Op::Activation(op), Saved::Inputs(x, None)) if by_input(op.kind) => {
            let [x] = x.as_slice() else { return Err(lacking()) };
            vec![Some((through(op.kind, x, &grad)?, true))]
        }
        (Op::MaxPool2d(op), Saved::Inputs(x, Some(indices))) => {
            let [x] = x.as_slice() else { return Err(lacking()) };
            let [kernel, stride, padding, dilation] = [op.kernel, op.stride, op.padding, op.dilation].map(pair);
            let grad = x.f_max_pool2d_with_indices_backward(
                &grad,
                kernel,
                stride,
                padding,
                dilation,
                op.ceil_mode,
                &indices,
            )?;
            vec![Some((grad, true))]
        }
        (Op::AvgPool2d(op), Saved::Inputs(x, None)) => {
            let [x] = x.as_slice() else { return Err(lacking()) };
            let [kernel, stride, padding] = [op.kernel, op.stride, op.padding].map(pair);
            let grad =
                x.f_avg_pool2d_backward(&grad, kernel, stride, padding, op.ceil_mode, op.count_include_pad, None)?;
            vec![Some((grad, true))]
        }
        (_, Saved::Sizes(sizes, kind)) => by_size(op, grad, &sizes, tensors)?
            .into_iter()
            .map(|part| part.map(|(part, owned)| Ok((part.f_to_kind(kind)?, owned))).transpose())
            .collect::<Result<_, TchError>>()?,
        (_, Saved::Inputs(inputs, _)) => locally(op, &grad, &inputs, depends, tensors, kind, images)?,
        _ => return Err(lacking()),
    };
    Ok(parts.into_iter().zip(depends).map(|(part, depends)| part.filter(|_| *depends)).collect())
}

fn lacking() -> TchError {
    TchError::FileFormat("a step's forward pass was not remembered".to_owned())
}

fn by_output(kind: ActivationKind, y: &Tensor, grad: &Tensor) -> Result<Tensor, TchError> {
    match kind {
        ActivationKind::Sigmoid => Tensor::f_sigmoid_backward(grad, y),
        ActivationKind::Tanh => Tensor::f_tanh_backward(grad, y),
        _ => y.f_threshold_backward(grad, 0.0),
    }
}

/// Whether [`through`] knows it.
fn by_input(kind: ActivationKind) -> bool {
    !matches!(kind, ActivationKind::Elu { .. } | ActivationKind::LeakyRelu { .. })
}

fn through(kind: ActivationKind, x: &Tensor, grad: &Tensor) -> Result<Tensor, TchError> {
    match kind {
        ActivationKind::Silu => x.f_silu_backward(grad),
        ActivationKind::Gelu => x.f_gelu_backward(grad, "none"),
        ActivationKind::GeluTanh => x.f_gelu_backward(grad, "tanh"),
        ActivationKind::Hardsigmoid => x.f_hardsigmoid_backward(grad),
        ActivationKind::Hardswish => x.f_hardswish_backward(grad),
        ActivationKind::Clamp { min, max } => {
            // Both limits pass the gradient on, as PyTorch's clamp does.
            let inside = match (min, max) {
                (Some(min), Some(max)) => x.f_ge(min)?.f_logical_and(&x.f_le(max)?)?,
                (Some(min), None) => x.f_ge(min)?,
                (None, Some(max)) => x.f_le(max)?,
                (None, None) => return grad.f_mul_scalar(1.0),
            };
            grad.f_mul(&inside.f_to_kind(grad.kind())?)
        }
        _ => Err(lacking()),
    }
}

/// Operations whose gradient needs no more than the inputs' sizes.
fn by_size(op: &Op, grad: Tensor, sizes: &[Vec<i64>], tensors: &Tensors) -> Result<Vec<Part>, TchError> {
    let Some(size) = sizes.first() else { return Ok(Vec::new()) };
    let one = |grad, owned| Ok(vec![Some((grad, owned))]);
    match op {
        Op::Linear(op) => {
            let weight = tensors.get(&op.weight).ok_or_else(lacking)?;
            one(grad.f_to_kind(weight.kind())?.f_matmul(weight)?, true)
        }
        Op::Add(op) => {
            let other =
                if op.alpha == 1.0 { (grad.shallow_clone(), false) } else { (grad.f_mul_scalar(op.alpha)?, true) };
            Ok(vec![Some((grad, false)), Some(other)])
        }
        Op::Affine(op) => one(grad.f_mul_scalar(op.scale)?, true),
        Op::Dropout(_) => one(grad, false),
        Op::Reshape(_) => one(grad.f_reshape(size.as_slice())?, false),
        Op::Permute(op) => {
            let mut back = vec![0; op.dims.len()];
            op.dims.iter().enumerate().for_each(|(at, dim)| back[*dim] = at as i64);
            one(grad.f_permute(back)?, false)
        }
        Op::Slice(op) => {
            let whole = Tensor::f_zeros(size.as_slice(), (grad.kind(), grad.device()))?;
            let (start, end) = (op.start as i64, op.end as i64);
            whole.f_slice(op.dim as i64, start, end, op.step as i64)?.f_copy_(&grad)?;
            one(whole, true)
        }
        Op::Cat(op) => {
            let (dim, mut start, mut parts) = (op.dim as i64, 0, Vec::with_capacity(sizes.len()));
            for size in sizes {
                let length = size.get(op.dim).copied().unwrap_or(0);
                parts.push(Some((grad.f_narrow(dim, start, length)?, false)));
                start += length;
            }
            Ok(parts)
        }
        Op::Pad(op) => {
            let mut inner = grad;
            for (dim, ([before, _], size)) in op.widths.iter().zip(size).enumerate() {
                inner = inner.f_narrow(dim as i64, *before, *size)?;
            }
            one(inner, false)
        }
        Op::Reduce(op) => {
            let mut spread = grad;
            if !op.keepdim {
                for dim in list(&op.dims) {
                    spread = spread.f_unsqueeze(dim)?;
                }
            }
            if op.kind == ReduceKind::Mean {
                let count: i64 = op.dims.iter().filter_map(|dim| size.get(*dim)).product();
                spread = spread.f_div_scalar(count as f64)?;
            }
            one(spread.f_expand(size.as_slice(), false)?, false)
        }
        _ => Ok(sizes.iter().map(|_| None).collect()),
    }
}

/// By autograd of the operation alone.
fn locally(
    op: &Op,
    grad: &Tensor,
    inputs: &[Tensor],
    depends: &[bool],
    tensors: &Tensors,
    kind: Kind,
    images: usize,
) -> Result<Vec<Part>, TchError> {
    let leaves: Vec<Tensor> =
        inputs.iter().zip(depends).map(|(input, depends)| input.detach().set_requires_grad(*depends)).collect();
    let of: Vec<&Tensor> = leaves.iter().collect();
    let needing: Vec<&Tensor> = leaves.iter().filter(|leaf| leaf.requires_grad()).collect();
    let value =
        tch::with_grad(|| operate(op, &of, tensors, Mode::Evaluation, kind, images)?.f_mul(grad)?.f_sum(None))?;
    let mut found = Tensor::f_run_backward(&[value], &needing, false, false)?.into_iter();
    // Shared: autograd may hand one tensor to two leaves.
    Ok(leaves.iter().map(|leaf| if leaf.requires_grad() { Some((found.next()?, false)) } else { None }).collect())
}
