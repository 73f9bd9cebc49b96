//! Operations that compute: weights, norms, activations, sums and products.

use super::{ANY, DIMS, SOME};
use crate::model::graph::form::{Form, Reals};

/// A tensor of the file.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Constant {
    /// The tensor.
    pub value: String,
    /// Whether it is a parameter.
    pub trainable: bool,
}

impl Constant {
    pub(super) fn visit(&mut self, form: &mut impl Form) {
        form.tensor("value", &mut self.value);
        form.flag("trainable", &mut self.trainable);
    }
}

/// A convolution of maps `[B, C, H, W]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Conv2d {
    /// `[O, C/groups, h, w]`.
    pub weight: String,
    /// `[O]`.
    pub bias: Option<String>,
    /// Pixels from window to window.
    pub stride: [usize; 2],
    /// Zeros on each side.
    pub padding: [usize; 2],
    /// Pixels from element to element of the window.
    pub dilation: [usize; 2],
    /// Parts of the channels that know nothing of each other.
    pub groups: usize,
}

impl Default for Conv2d {
    fn default() -> Self {
        Self { weight: String::new(), bias: None, stride: [1; 2], padding: [0; 2], dilation: [1; 2], groups: 1 }
    }
}

impl Conv2d {
    pub(super) fn visit(&mut self, form: &mut impl Form) {
        form.tensor("weight", &mut self.weight);
        form.optional_tensor("bias", &mut self.bias);
        form.pair("stride", &mut self.stride, SOME);
        form.pair("padding", &mut self.padding, ANY);
        form.pair("dilation", &mut self.dilation, SOME);
        form.size("groups", &mut self.groups, SOME);
    }
}

/// An affine map of the last dimension.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Linear {
    /// `[O, C]`.
    pub weight: String,
    /// `[O]`.
    pub bias: Option<String>,
}

impl Linear {
    pub(super) fn visit(&mut self, form: &mut impl Form) {
        form.tensor("weight", &mut self.weight);
        form.optional_tensor("bias", &mut self.bias);
    }
}

/// A batch norm of `[B, C, ...]`; all tensors are `[C]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BatchNorm {
    /// The mean that it remembers.
    pub running_mean: String,
    /// The variance that it remembers.
    pub running_var: String,
    /// Scale.
    pub weight: Option<String>,
    /// Shift.
    pub bias: Option<String>,
    /// Added to the variance.
    pub eps: f64,
    /// The part of what is remembered that a batch replaces in training.
    pub momentum: f64,
}

impl BatchNorm {
    pub(super) fn visit(&mut self, form: &mut impl Form) {
        form.tensor("running_mean", &mut self.running_mean);
        form.tensor("running_var", &mut self.running_var);
        form.optional_tensor("weight", &mut self.weight);
        form.optional_tensor("bias", &mut self.bias);
        form.real("eps", &mut self.eps, Reals::Positive);
        form.real("momentum", &mut self.momentum, Reals::Any);
    }
}

/// A norm over the last dimensions.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LayerNorm {
    /// Scale, of that shape.
    pub weight: Option<String>,
    /// Shift, of that shape.
    pub bias: Option<String>,
    /// The last dimensions.
    pub shape: Vec<usize>,
    /// Added to the variance.
    pub eps: f64,
}

impl LayerNorm {
    pub(super) fn visit(&mut self, form: &mut impl Form) {
        form.optional_tensor("weight", &mut self.weight);
        form.optional_tensor("bias", &mut self.bias);
        form.sizes("shape", &mut self.shape, SOME);
        form.real("eps", &mut self.eps, Reals::Positive);
    }
}

/// A norm over each of some parts of the channels of `[B, C, ...]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GroupNorm {
    /// Scale, `[C]`.
    pub weight: Option<String>,
    /// Shift, `[C]`.
    pub bias: Option<String>,
    /// How many parts.
    pub groups: usize,
    /// Added to the variance.
    pub eps: f64,
}

impl GroupNorm {
    pub(super) fn visit(&mut self, form: &mut impl Form) {
        form.optional_tensor("weight", &mut self.weight);
        form.optional_tensor("bias", &mut self.bias);
        form.size("groups", &mut self.groups, SOME);
        form.real("eps", &mut self.eps, Reals::Positive);
    }
}

/// A function of each element.
#[derive(Clone, Debug, PartialEq)]
pub struct Activation {
    /// Which.
    pub kind: ActivationKind,
}

/// The functions.
#[derive(Clone, Copy, Debug, PartialEq)]
#[allow(missing_docs)] // As PyTorch has them.
pub enum ActivationKind {
    Relu,
    Sigmoid,
    Tanh,
    Silu,
    Gelu,
    GeluTanh,
    Hardsigmoid,
    Hardswish,
    Clamp { min: Option<f64>, max: Option<f64> },
    LeakyRelu { slope: f64 },
    Elu { alpha: f64 },
}

impl Default for Activation {
    fn default() -> Self {
        Self { kind: ActivationKind::Relu }
    }
}

impl ActivationKind {
    /// Without its own attributes.
    fn bare(self) -> Self {
        match self {
            Self::Clamp { .. } => Self::Clamp { min: None, max: None },
            Self::LeakyRelu { .. } => Self::LeakyRelu { slope: 0.0 },
            Self::Elu { .. } => Self::Elu { alpha: 0.0 },
            plain => plain,
        }
    }
}

impl Activation {
    pub(super) fn visit(&mut self, form: &mut impl Form) {
        use ActivationKind::{
            Clamp, Elu, Gelu, GeluTanh, Hardsigmoid, Hardswish, LeakyRelu, Relu, Sigmoid, Silu, Tanh,
        };
        let words = [
            ("relu", Relu),
            ("sigmoid", Sigmoid),
            ("tanh", Tanh),
            ("silu", Silu),
            ("gelu", Gelu),
            ("gelu_tanh", GeluTanh),
            ("hardsigmoid", Hardsigmoid),
            ("hardswish", Hardswish),
            ("clamp", Clamp { min: None, max: None }),
            ("leaky_relu", LeakyRelu { slope: 0.0 }),
            ("elu", Elu { alpha: 0.0 }),
        ];
        let mut bare = self.kind.bare();
        form.word("kind", &mut bare, &words);
        if bare != self.kind.bare() {
            self.kind = bare;
        }
        match &mut self.kind {
            Clamp { min, max } => {
                form.limit("min", min);
                form.limit("max", max);
            }
            LeakyRelu { slope } => form.real("slope", slope, Reals::Any),
            Elu { alpha } => form.real("alpha", alpha, Reals::Any),
            _ => {}
        }
    }
}

/// `x + alpha y`, broadcast.
#[derive(Clone, Debug, PartialEq)]
pub struct Add {
    /// Of the second input.
    pub alpha: f64,
}

impl Default for Add {
    fn default() -> Self {
        Self { alpha: 1.0 }
    }
}

impl Add {
    pub(super) fn visit(&mut self, form: &mut impl Form) {
        form.real("alpha", &mut self.alpha, Reals::Any);
    }
}

/// `x y`, broadcast.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Mul;

impl Mul {
    pub(super) fn visit(&mut self, _: &mut impl Form) {}
}

/// `x / y`, broadcast.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Div;

impl Div {
    pub(super) fn visit(&mut self, _: &mut impl Form) {}
}

/// `scale x + shift`.
#[derive(Clone, Debug, Default, PartialEq)]
#[allow(missing_docs)]
pub struct Affine {
    pub scale: f64,
    pub shift: f64,
}

impl Affine {
    pub(super) fn visit(&mut self, form: &mut impl Form) {
        form.real("scale", &mut self.scale, Reals::Any);
        form.real("shift", &mut self.shift, Reals::Any);
    }
}

/// One number of all along some dimensions.
#[derive(Clone, Debug, PartialEq)]
pub struct Reduce {
    /// Which number.
    pub kind: ReduceKind,
    /// Ascending; the batch is none of them.
    pub dims: Vec<usize>,
    /// Whether they stay, as dimensions of 1.
    pub keepdim: bool,
}

/// What [`Reduce`] makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum ReduceKind {
    Mean,
    Sum,
    Max,
    /// The Euclidean norm.
    Norm,
}

impl Default for Reduce {
    fn default() -> Self {
        Self { kind: ReduceKind::Mean, dims: Vec::new(), keepdim: false }
    }
}

impl Reduce {
    pub(super) fn visit(&mut self, form: &mut impl Form) {
        use ReduceKind::{Max, Mean, Norm, Sum};
        form.word("kind", &mut self.kind, &[("mean", Mean), ("sum", Sum), ("max", Max), ("norm", Norm)]);
        form.sizes("dims", &mut self.dims, DIMS);
        form.flag("keepdim", &mut self.keepdim);
    }
}

/// Softmax along a dimension.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Softmax {
    /// The dimension.
    pub dim: usize,
}

impl Softmax {
    pub(super) fn visit(&mut self, form: &mut impl Form) {
        form.size("dim", &mut self.dim, DIMS);
    }
}

/// A product of matrices, `[..., L, E]` by `[..., E, M]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Matmul;

impl Matmul {
    pub(super) fn visit(&mut self, _: &mut impl Form) {}
}

/// `softmax(scale q kᵀ + mask) v`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Attention {
    /// Of the products.
    pub scale: f64,
    /// Whether each position sees those up to its own only.
    pub causal: bool,
}

impl Attention {
    pub(super) fn visit(&mut self, form: &mut impl Form) {
        form.real("scale", &mut self.scale, Reals::Any);
        form.flag("causal", &mut self.causal);
    }
}
