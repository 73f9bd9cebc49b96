//! The shape of every value for any batch, the shape of every tensor, and what a pass costs; or every way in which a graph and
//! its tensors do not fit.

mod rules;

use std::collections::BTreeMap;

use super::mistakes::Mistakes;
use super::{Extent, Graph, GraphError, MAX_SIZE, Node, RESERVED, Role, Shape};
use crate::model::checkpoint::Checkpoint;

/// Where a graph's tensors are looked up.
pub trait TensorShapes {
    /// The shape of the tensor of this name.
    fn shape_of(&self, name: &str) -> Option<&[usize]>;
}

impl TensorShapes for Checkpoint {
    fn shape_of(&self, name: &str) -> Option<&[usize]> {
        self.get(name).map(|tensor| tensor.shape)
    }
}

impl TensorShapes for BTreeMap<String, Vec<usize>> {
    fn shape_of(&self, name: &str) -> Option<&[usize]> {
        self.get(name).map(Vec::as_slice)
    }
}

/// What one image costs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Multiply-adds of a forward pass: convolutions, linear maps, products of matrices, attention.
    pub multiply_adds: u64,
    /// Numbers that are trained.
    pub parameters: u64,
    /// Elements of all values together.
    pub activations: u64,
}

impl Cost {
    /// Bytes of all values of a batch, if none were freed before the end.
    pub fn activation_bytes(&self, images: usize, element: usize) -> u64 {
        self.activations.saturating_mul(images as u64).saturating_mul(element as u64)
    }
}

/// A graph's shapes with given tensors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shapes {
    /// One an index of a value.
    pub values: Vec<Shape>,
    /// The tensors that nodes name, by name.
    pub tensors: BTreeMap<String, (Vec<usize>, Role)>,
    /// Outputs.
    pub classes: usize,
    /// For one image.
    pub cost: Cost,
}

impl Shapes {
    /// Infers them. A tensor that no node names is not looked at: [`Self::check_used`] does that.
    pub fn infer(graph: &Graph, tensors: &impl TensorShapes) -> Result<Self, GraphError> {
        let mut mistakes = Mistakes::default();
        graph.check(&mut mistakes);
        if !mistakes.is_empty() {
            return Err(mistakes.into_error());
        }
        let mut shapes = Self {
            values: Vec::new(),
            tensors: find_tensors(graph, tensors, &mut mistakes),
            classes: 0,
            cost: Cost::default(),
        };
        // None where a mistake has left no shape: what comes after it is not looked at.
        let mut values: Vec<Option<Shape>> = Vec::with_capacity(graph.nodes.len() + 1);
        let size = graph.input;
        let images = vec![
            Extent::Batch(1),
            Extent::Fixed(size.channels),
            Extent::Fixed(size.height),
            Extent::Fixed(size.width),
        ];
        match elements(&images) {
            Ok(_) => values.push(Some(images)),
            Err(problem) => {
                mistakes.add(format!("input: {problem}"));
                values.push(None);
            }
        }
        for (index, node) in graph.nodes.iter().enumerate() {
            let made = shapes.value(node, &values).map(|made| {
                made.and_then(|(shape, multiply_adds)| {
                    shapes.cost.activations = shapes.cost.activations.saturating_add(elements(&shape)?);
                    shapes.cost.multiply_adds = shapes.cost.multiply_adds.saturating_add(multiply_adds);
                    Ok(shape)
                })
            });
            values.push(match made {
                None => None,
                Some(Ok(shape)) => Some(shape),
                Some(Err(problem)) => {
                    mistakes.add(format!("{}: {problem}", graph.place(index)));
                    None
                }
            });
        }
        match values.get(graph.output).and_then(Option::as_ref).map(Vec::as_slice) {
            Some([Extent::Batch(1), Extent::Fixed(classes)]) => shapes.classes = *classes,
            Some(other) => {
                mistakes.add(format!("output: value {} is {}; logits are [N, classes]", graph.output, text(other)));
            }
            None => {}
        }
        let parameters = shapes.tensors.values().filter(|(_, role)| *role == Role::Parameter);
        shapes.cost.parameters = parameters.map(|(shape, _)| shape.iter().product::<usize>() as u64).sum();
        shapes.values = values.into_iter().flatten().collect();
        mistakes.into_result(shapes)
    }

    /// Checks that nodes name every tensor of a file but those that are about a network and not of it.
    pub fn check_used<'a>(&self, names: impl Iterator<Item = &'a str>) -> Result<(), GraphError> {
        let mut mistakes = Mistakes::default();
        let unused = |name: &&str| {
            !name.starts_with(RESERVED)
                && !name.ends_with(".num_batches_tracked")
                && !self.tensors.contains_key(*name)
        };
        for name in names.filter(unused) {
            mistakes.add(format!("no node takes the tensor {}; leave it out", super::mistakes::quoted(name)));
        }
        mistakes.into_result(())
    }

    /// The shape of a node's value, and its multiply-adds for one image; None where what it takes has no known shape.
    fn value(&self, node: &Node, values: &[Option<Shape>]) -> Option<Result<(Shape, u64), String>> {
        let inputs: Option<Vec<&Shape>> = node.inputs.iter().map(|index| values.get(*index)?.as_ref()).collect();
        let inputs = inputs?;
        let mut named = Vec::new();
        for (name, _) in node.op.tensors() {
            named.push((name, self.tensors.get(name)?.0.as_slice()));
        }
        let of = |name: &str| named.iter().find(|(each, _)| *each == name).map_or(&[][..], |(_, shape)| *shape);
        Some(rules::shape(&node.op, &inputs, &of))
    }
}

fn find_tensors(
    graph: &Graph,
    shapes: &impl TensorShapes,
    mistakes: &mut Mistakes,
) -> BTreeMap<String, (Vec<usize>, Role)> {
    let mut found = BTreeMap::new();
    let mut statistics = BTreeMap::new();
    for (index, node) in graph.nodes.iter().enumerate() {
        for (name, role) in node.op.tensors() {
            let statistic = role == Role::Statistic;
            if *statistics.entry(name).or_insert(statistic) != statistic {
                mistakes.add(format!(
                    "{}: {name} is a running statistic at one node and a weight at another",
                    graph.place(index)
                ));
            }
        }
    }
    for (name, role) in graph.tensors() {
        match shapes.shape_of(name) {
            None => mistakes.add(format!("there is no tensor {name}")),
            Some(shape) if shape.len() > super::MAX_RANK => {
                mistakes.add(format!(
                    "{name} has {} dimensions; at most {} are allowed",
                    shape.len(),
                    super::MAX_RANK
                ));
            }
            Some(shape) => {
                let extents: Shape = shape.iter().map(|size| Extent::Fixed(*size)).collect();
                match elements(&extents) {
                    Ok(0) => mistakes.add(format!("{name} is {shape:?}, without a single element")),
                    Ok(_) => {
                        found.insert(name.to_owned(), (shape.to_vec(), role));
                    }
                    Err(problem) => mistakes.add(format!("{name}: {problem}")),
                }
            }
        }
    }
    found
}

/// How many elements a value has for one image, which is bounded.
fn elements(shape: &[Extent]) -> Result<u64, String> {
    let total = shape.iter().try_fold(1usize, |total, extent| total.checked_mul(extent.at(1)));
    match total {
        Some(total) if total <= MAX_SIZE => Ok(total as u64),
        _ => Err(format!("{} has more than {MAX_SIZE} elements for one image", text(shape))),
    }
}

/// A shape as messages tell it.
fn text(shape: &[Extent]) -> String {
    let each = shape.iter().map(|extent| match extent {
        Extent::Fixed(size) => size.to_string(),
        Extent::Batch(1) => "N".to_owned(),
        Extent::Batch(factor) => format!("{factor}N"),
    });
    format!("[{}]", each.collect::<Vec<_>>().join(", "))
}

/// The elements for one image, as a count that cannot overflow.
fn product(shape: &[Extent]) -> u64 {
    shape.iter().fold(1, |total: u64, extent| total.saturating_mul(extent.at(1) as u64))
}
