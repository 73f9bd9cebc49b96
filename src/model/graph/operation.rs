//! The operations of the format. Each is a struct of its attributes and the names of its tensors; `docs/network-format.md`
//! says what they compute.

use std::ops::RangeInclusive;

mod arithmetic;
mod shaping;

pub use arithmetic::{
    Activation, ActivationKind, Add, Affine, Attention, BatchNorm, Constant, Conv2d, Div, GroupNorm, LayerNorm,
    Linear, Matmul, Mul, Reduce, ReduceKind, Softmax,
};
pub use shaping::{
    AdaptiveAvgPool2d, AvgPool2d, Cat, Dropout, Expand, MaxPool2d, Pad, PadMode, Permute, Reshape, Roll, Slice,
    Upsample, UpsampleKind,
};

use super::form::Form;
use super::{MAX_INPUTS, MAX_SIZE, Role};

macro_rules! operations {
    ($($variant:ident $name:literal $arity:expr;)*) => {
        /// An operation.
        #[derive(Clone, Debug, PartialEq)]
        #[allow(missing_docs)] // Each says it on the struct.
        pub enum Op { $($variant($variant)),* }

        impl Op {
            /// The operation of this name, of which nothing is told yet.
            pub(super) fn blank(name: &str) -> Option<Self> {
                match name { $($name => Some(Self::$variant($variant::default())),)* _ => None }
            }

            /// The name in the format.
            pub fn name(&self) -> &'static str {
                match self { $(Self::$variant(_) => $name),* }
            }

            /// How many inputs it takes.
            pub fn arity(&self) -> RangeInclusive<usize> {
                match self { $(Self::$variant(_) => $arity),* }
            }

            /// Shows every attribute and name to a [`Form`].
            pub(super) fn visit(&mut self, form: &mut impl Form) {
                match self { $(Self::$variant(op) => op.visit(form)),* }
            }
        }
    };
}

operations! {
    Constant "constant" 0..=0;
    Conv2d "conv2d" 1..=1;
    Linear "linear" 1..=1;
    BatchNorm "batch_norm" 1..=1;
    LayerNorm "layer_norm" 1..=1;
    GroupNorm "group_norm" 1..=1;
    Activation "activation" 1..=1;
    Add "add" 2..=2;
    Mul "mul" 2..=2;
    Div "div" 2..=2;
    Affine "affine" 1..=1;
    Reduce "reduce" 1..=1;
    Softmax "softmax" 1..=1;
    Matmul "matmul" 2..=2;
    Attention "attention" 3..=4;
    MaxPool2d "max_pool2d" 1..=1;
    AvgPool2d "avg_pool2d" 1..=1;
    AdaptiveAvgPool2d "adaptive_avg_pool2d" 1..=1;
    Upsample "upsample" 1..=1;
    Pad "pad" 1..=1;
    Reshape "reshape" 1..=1;
    Permute "permute" 1..=1;
    Expand "expand" 1..=1;
    Cat "cat" 1..=MAX_INPUTS;
    Slice "slice" 1..=1;
    Roll "roll" 1..=1;
    Dropout "dropout" 1..=1;
}

impl Op {
    /// The tensors that it names.
    pub fn tensors(&self) -> Vec<(&str, Role)> {
        fn both<'a>(weight: &'a Option<String>, bias: &'a Option<String>) -> Vec<(&'a str, Role)> {
            [weight, bias].into_iter().flatten().map(|name| (name.as_str(), Role::Parameter)).collect()
        }
        let one = |name| (name, Role::Parameter);
        match self {
            Self::Constant(op) => {
                vec![(op.value.as_str(), if op.trainable { Role::Parameter } else { Role::Constant })]
            }
            Self::Conv2d(op) => [one(op.weight.as_str())].into_iter().chain(both(&None, &op.bias)).collect(),
            Self::Linear(op) => [one(op.weight.as_str())].into_iter().chain(both(&None, &op.bias)).collect(),
            Self::BatchNorm(op) => {
                let statistics = [&op.running_mean, &op.running_var].map(|name| (name.as_str(), Role::Statistic));
                both(&op.weight, &op.bias).into_iter().chain(statistics).collect()
            }
            Self::LayerNorm(op) => both(&op.weight, &op.bias),
            Self::GroupNorm(op) => both(&op.weight, &op.bias),
            _ => Vec::new(),
        }
    }
}

/// Sizes of windows, shapes and strides.
pub(super) const SOME: RangeInclusive<usize> = 1..=MAX_SIZE;
/// Paddings and places.
pub(super) const ANY: RangeInclusive<usize> = 0..=MAX_SIZE;
/// Dimensions; whether the value has them is told with its shape.
pub(super) const DIMS: RangeInclusive<usize> = 0..=crate::model::graph::MAX_RANK - 1;
