//! A graph without some channels, and what stays of each tensor.

use std::collections::{BTreeMap, BTreeSet};

use super::{Axis, Couplings};
use crate::model::graph::{Extent, Graph, Op};

/// Of tensors of which something goes, by name: for each dimension the indices that stay, or None for all.
pub type Kept = BTreeMap<String, Vec<Option<Vec<usize>>>>;

impl Couplings {
    /// The graph without some of [`Self::groups`], which it was found of, and what stays of its tensors. At least one class
    /// of each dimension should stay; a tensor without a single element is refused where shapes are inferred.
    pub fn without(&self, graph: &Graph, removed: &BTreeSet<usize>) -> (Graph, Kept) {
        let stays = |class: &usize| !removed.contains(class) || !self.groups.contains_key(class);
        let mut kept = Kept::new();
        for (name, axes) in &self.tensors {
            let each = |axis: &Axis| {
                let ids = axis.as_ref().filter(|ids| !ids.iter().all(stays))?;
                Some((0..ids.len()).filter(|index| stays(&ids[*index])).collect())
            };
            let each: Vec<Option<Vec<usize>>> = axes.iter().map(each).collect();
            if each.iter().any(Option::is_some) {
                kept.insert(name.clone(), each);
            }
        }
        let mut smaller = graph.clone();
        for (index, node) in smaller.nodes.iter_mut().enumerate() {
            let input = node.inputs.first().map_or(&[][..], |input| self.value(*input));
            let made = self.value(index + 1);
            // How many of a stretch of a dimension stay.
            let count = |axis: &Axis, from: usize, to: usize| {
                axis.as_ref().map(|ids| ids.iter().take(to).skip(from).filter(|class| stays(class)).count())
            };
            let all = |axis: &Axis| count(axis, 0, usize::MAX);
            match &mut node.op {
                // Depthwise: as many groups as channels.
                Op::Conv2d(op)
                    if self.tensor(&op.weight).get(1).is_some_and(|axis| all(axis) == Some(1)) && op.groups > 1 =>
                {
                    op.groups = input.get(1).and_then(all).unwrap_or(op.groups);
                }
                Op::LayerNorm(op) => {
                    if let ([size], Some(left)) = (op.shape.as_mut_slice(), input.last().and_then(all)) {
                        *size = left;
                    }
                }
                Op::Pad(op) => {
                    for ((widths, axis), inner) in op.widths.iter_mut().zip(made).zip(input) {
                        let (Some(ids), Some(inner)) = (axis, inner) else { continue };
                        let front = usize::try_from(widths[0]).unwrap_or(0);
                        let ends = [(0, front), (front + inner.len(), ids.len())];
                        *widths = ends.map(|(from, to)| count(axis, from, to).unwrap_or(0) as i64);
                    }
                }
                Op::Slice(op) => {
                    if let (1, Some(axis)) = (op.step, input.get(op.dim)) {
                        let before = count(axis, 0, op.start).unwrap_or(op.start);
                        op.end = before + count(axis, op.start, op.end).unwrap_or(op.end - op.start);
                        op.start = before;
                    }
                }
                Op::Reshape(op) => resize(&mut op.shape, made, all),
                Op::Expand(op) => resize(&mut op.shape, made, all),
                _ => {}
            }
        }
        (smaller, kept)
    }
}

fn resize(shape: &mut [Extent], made: &[Axis], all: impl Fn(&Axis) -> Option<usize>) {
    for (extent, axis) in shape.iter_mut().zip(made) {
        if let Some(left) = all(axis) {
            *extent = Extent::Fixed(left);
        }
    }
}
