//! Which indices of which dimensions of which tensors are the same channel, wherever it goes.
//!
//! One union-find over (value, dimension, index) and (tensor, dimension, index). Each operation says what is the same: an
//! addition ties the channels of its inputs, a batch norm those of its tensors to those of the map, a flattening a channel
//! to all the elements that it becomes. A class of this relation is a [`Group`]: it stays or goes as one. What must keep its
//! size (images, logits, positions of maps and tokens, what reshapes and heads of attention take apart) is *whole*.
//!
//! Fitting widths to a file, pruning and the comparison of two networks' maps all follow from these classes.

mod rules;
#[cfg(test)]
mod tests;
mod without;

use std::collections::BTreeMap;

use super::mistakes::Mistakes;
use super::shape::Shapes;
use super::{Extent, Graph, GraphError};

pub use without::Kept;

/// The most indices that are told apart, and that values name: some ten times what the largest public classifiers have.
const MAX_IDS: usize = 1 << 23;

/// The classes of one dimension, one an index; None where the whole dimension keeps its size.
pub type Axis = Option<Vec<usize>>;

/// Indices of one dimension of a tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The tensor.
    pub tensor: String,
    /// Its dimension.
    pub dim: usize,
    /// Ascending.
    pub indices: Vec<usize>,
}

/// What can only stay or go as one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Every place of it.
    pub places: Vec<Place>,
}

/// The classes of a graph's channels.
#[derive(Clone, Debug)]
pub struct Couplings {
    values: Vec<Vec<Axis>>,
    tensors: BTreeMap<String, Vec<Axis>>,
    groups: BTreeMap<usize, Group>,
}

impl Couplings {
    /// Finds them; `shapes` are the graph's.
    pub fn find(graph: &Graph, shapes: &Shapes) -> Result<Self, GraphError> {
        let mut builder = Builder::default();
        for (name, (shape, _)) in &shapes.tensors {
            let axes = shape.iter().map(|size| builder.fresh(*size)).collect::<Option<Vec<_>>>();
            builder.tensors.insert(name.clone(), axes.ok_or_else(too_many)?);
        }
        // The channels of images stay, but are joined with others.
        let colours = builder.fresh(graph.input.channels).ok_or_else(too_many)?;
        builder.keep_whole(&colours);
        builder.values.push(vec![None, colours, None, None]);
        for (index, node) in graph.nodes.iter().enumerate() {
            let shape = shapes.values.get(index + 1).map_or(&[][..], Vec::as_slice);
            let inputs: Vec<(Vec<Axis>, &[Extent])> = node
                .inputs
                .iter()
                .filter_map(|input| {
                    Some((builder.values.get(*input)?.clone(), shapes.values.get(*input)?.as_slice()))
                })
                .collect();
            let made = rules::couple(&mut builder, &node.op, &inputs, shape).ok_or_else(too_many)?;
            builder.values.push(made);
        }
        if let Some(logits) = builder.values.get(graph.output).cloned() {
            logits.iter().for_each(|axis| builder.keep_whole(axis));
        }
        Ok(builder.finish())
    }

    /// What can go, by class, in the order in which tensors first have it. Nothing in it is whole.
    pub fn groups(&self) -> impl Iterator<Item = (usize, &Group)> {
        self.groups.iter().map(|(class, group)| (*class, group))
    }

    /// The classes of each dimension of a value.
    pub fn value(&self, index: usize) -> &[Axis] {
        self.values.get(index).map_or(&[], Vec::as_slice)
    }

    /// The classes of each dimension of a tensor.
    pub fn tensor(&self, name: &str) -> &[Axis] {
        self.tensors.get(name).map_or(&[], Vec::as_slice)
    }
}

fn too_many() -> GraphError {
    let mut mistakes = Mistakes::default();
    mistakes.add(format!("its tensors and maps have more than {MAX_IDS} channels in all; fewer are told apart"));
    mistakes.into_error()
}

/// The union-find, as operations tell it what is the same.
#[derive(Default)]
struct Builder {
    /// Each index's parent; a root is its own.
    parents: Vec<usize>,
    /// Of roots: whether the class keeps its size.
    whole: Vec<bool>,
    tensors: BTreeMap<String, Vec<Axis>>,
    values: Vec<Vec<Axis>>,
    /// Indices that all values name together, which bounds memory.
    named: usize,
}

impl Builder {
    /// A dimension of so many new classes; None where there would be too many.
    fn fresh(&mut self, size: usize) -> Option<Axis> {
        let first = self.parents.len();
        let end = first.checked_add(size).filter(|end| *end <= MAX_IDS)?;
        self.parents.extend(first..end);
        self.whole.resize(end, false);
        Some(Some((first..end).collect()))
    }

    /// Counts what a value names beyond its inputs' own lists.
    fn named(&mut self, count: usize) -> Option<()> {
        self.named = self.named.checked_add(count).filter(|named| *named <= MAX_IDS)?;
        Some(())
    }

    fn root(&mut self, mut id: usize) -> usize {
        while self.parents[id] != id {
            // Halving the path on the way keeps it short.
            self.parents[id] = self.parents[self.parents[id]];
            id = self.parents[id];
        }
        id
    }

    fn join(&mut self, a: usize, b: usize) {
        let (a, b) = (self.root(a), self.root(b));
        let (first, second) = (a.min(b), a.max(b));
        self.parents[second] = first;
        self.whole[first] |= self.whole[second];
    }

    /// Index by index the same.
    fn tie(&mut self, a: &Axis, b: &Axis) {
        match (a, b) {
            (Some(a), Some(b)) if a.len() == b.len() => {
                for (a, b) in a.iter().zip(b) {
                    self.join(*a, *b);
                }
            }
            _ => [a, b].into_iter().for_each(|axis| self.keep_whole(axis)),
        }
    }

    /// A dimension that keeps its size.
    fn keep_whole(&mut self, axis: &Axis) {
        for id in axis.iter().flatten() {
            let root = self.root(*id);
            self.whole[root] = true;
        }
    }

    fn tensor(&self, name: &str) -> Vec<Axis> {
        self.tensors.get(name).cloned().unwrap_or_default()
    }

    fn finish(mut self) -> Couplings {
        let (tensors, values) = (std::mem::take(&mut self.tensors), std::mem::take(&mut self.values));
        let mut rooted = |axes: Vec<Axis>| -> Vec<Axis> {
            axes.into_iter().map(|axis| axis.map(|ids| ids.into_iter().map(|id| self.root(id)).collect())).collect()
        };
        let tensors: BTreeMap<String, Vec<Axis>> =
            tensors.into_iter().map(|(name, axes)| (name, rooted(axes))).collect();
        let values: Vec<Vec<Axis>> = values.into_iter().map(rooted).collect();
        let mut groups: BTreeMap<usize, Group> = BTreeMap::new();
        for (name, axes) in &tensors {
            for (dim, axis) in axes.iter().enumerate() {
                for (index, class) in axis.iter().flatten().enumerate().filter(|(_, class)| !self.whole[**class]) {
                    let places = &mut groups.entry(*class).or_insert_with(|| Group { places: Vec::new() }).places;
                    match places.last_mut().filter(|place| place.tensor == *name && place.dim == dim) {
                        Some(place) => place.indices.push(index),
                        None => places.push(Place { tensor: name.clone(), dim, indices: vec![index] }),
                    }
                }
            }
        }
        Couplings { values, tensors, groups }
    }
}
