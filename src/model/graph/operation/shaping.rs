//! Operations that move elements or take them together: pools, shapes, parts, dropout.

use super::{ANY, DIMS, SOME};
use crate::model::graph::Extent;
use crate::model::graph::form::{Form, Reals};

/// The largest element of each window.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct MaxPool2d {
    /// Size of a window.
    pub kernel: [usize; 2],
    /// Pixels from window to window.
    pub stride: [usize; 2],
    /// Minus infinity on each side.
    pub padding: [usize; 2],
    /// Pixels from element to element of a window.
    pub dilation: [usize; 2],
    /// Whether a window that is not full counts.
    pub ceil_mode: bool,
}

impl MaxPool2d {
    pub(super) fn visit(&mut self, form: &mut impl Form) {
        form.pair("kernel", &mut self.kernel, SOME);
        form.pair("stride", &mut self.stride, SOME);
        form.pair("padding", &mut self.padding, ANY);
        form.pair("dilation", &mut self.dilation, SOME);
        form.flag("ceil_mode", &mut self.ceil_mode);
    }
}

/// The mean of each window.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AvgPool2d {
    /// Size of a window.
    pub kernel: [usize; 2],
    /// Pixels from window to window.
    pub stride: [usize; 2],
    /// Zeros on each side.
    pub padding: [usize; 2],
    /// Whether a window that is not full counts.
    pub ceil_mode: bool,
    /// Whether these zeros count.
    pub count_include_pad: bool,
}

impl AvgPool2d {
    pub(super) fn visit(&mut self, form: &mut impl Form) {
        form.pair("kernel", &mut self.kernel, SOME);
        form.pair("stride", &mut self.stride, SOME);
        form.pair("padding", &mut self.padding, ANY);
        form.flag("ceil_mode", &mut self.ceil_mode);
        form.flag("count_include_pad", &mut self.count_include_pad);
    }
}

/// Means of windows that make a map of a given size.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct AdaptiveAvgPool2d {
    /// Height and width.
    pub size: [usize; 2],
}

impl AdaptiveAvgPool2d {
    pub(super) fn visit(&mut self, form: &mut impl Form) {
        form.pair("size", &mut self.size, SOME);
    }
}

/// A map of another size.
#[derive(Clone, Debug, PartialEq)]
pub struct Upsample {
    /// How it is made.
    pub kind: UpsampleKind,
    /// Height and width.
    pub size: [usize; 2],
}

/// How [`Upsample`] finds elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum UpsampleKind {
    Nearest,
}

impl Default for Upsample {
    fn default() -> Self {
        Self { kind: UpsampleKind::Nearest, size: [0; 2] }
    }
}

impl Upsample {
    pub(super) fn visit(&mut self, form: &mut impl Form) {
        form.word("kind", &mut self.kind, &[("nearest", UpsampleKind::Nearest)]);
        form.pair("size", &mut self.size, SOME);
    }
}

/// More, or less, at the ends of dimensions.
#[derive(Clone, Debug, PartialEq)]
pub struct Pad {
    /// Before and after each dimension; negative ones cut.
    pub widths: Vec<[i64; 2]>,
    /// What is there.
    pub mode: PadMode,
    /// What is there, where the mode is constant.
    pub value: f64,
}

/// What [`Pad`] puts there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum PadMode {
    Constant,
    Reflect,
    Replicate,
    Circular,
}

impl Default for Pad {
    fn default() -> Self {
        Self { widths: Vec::new(), mode: PadMode::Constant, value: 0.0 }
    }
}

impl Pad {
    pub(super) fn visit(&mut self, form: &mut impl Form) {
        use PadMode::{Circular, Constant, Reflect, Replicate};
        let words = [("constant", Constant), ("reflect", Reflect), ("replicate", Replicate), ("circular", Circular)];
        form.widths("widths", &mut self.widths);
        form.word("mode", &mut self.mode, &words);
        form.real_or_infinite("value", &mut self.value);
    }
}

/// The same elements in row-major order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Reshape {
    /// The new shape.
    pub shape: Vec<Extent>,
}

impl Reshape {
    pub(super) fn visit(&mut self, form: &mut impl Form) {
        form.shape("shape", &mut self.shape);
    }
}

/// Dimensions in another order.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Permute {
    /// Dimension `i` is the input's `dims[i]`.
    pub dims: Vec<usize>,
}

impl Permute {
    pub(super) fn visit(&mut self, form: &mut impl Form) {
        form.sizes("dims", &mut self.dims, DIMS);
    }
}

/// The same, broadcast to a shape.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Expand {
    /// The shape.
    pub shape: Vec<Extent>,
}

impl Expand {
    pub(super) fn visit(&mut self, form: &mut impl Form) {
        form.shape("shape", &mut self.shape);
    }
}

/// Values one behind the other.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Cat {
    /// Along this dimension.
    pub dim: usize,
}

impl Cat {
    pub(super) fn visit(&mut self, form: &mut impl Form) {
        form.size("dim", &mut self.dim, DIMS);
    }
}

/// A part of a dimension.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Slice {
    /// The dimension.
    pub dim: usize,
    /// The first element.
    pub start: usize,
    /// Behind the last one.
    pub end: usize,
    /// From one to the next.
    pub step: usize,
}

impl Slice {
    pub(super) fn visit(&mut self, form: &mut impl Form) {
        form.size("dim", &mut self.dim, DIMS);
        form.size("start", &mut self.start, ANY);
        form.size("end", &mut self.end, SOME);
        form.size("step", &mut self.step, SOME);
    }
}

/// Elements moved along dimensions, the last ones to the front.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Roll {
    /// The dimensions.
    pub dims: Vec<usize>,
    /// How far along each.
    pub shifts: Vec<i64>,
}

impl Roll {
    pub(super) fn visit(&mut self, form: &mut impl Form) {
        form.sizes("dims", &mut self.dims, DIMS);
        form.integers("shifts", &mut self.shifts);
    }
}

/// What training drops by chance; nothing else does.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Dropout {
    /// The chance.
    pub p: f64,
    /// Whether each channel of an image is dropped as one.
    pub whole_maps: bool,
}

impl Dropout {
    pub(super) fn visit(&mut self, form: &mut impl Form) {
        form.real("p", &mut self.p, Reals::Chance);
        form.flag("whole_maps", &mut self.whole_maps);
    }
}
