//! A network as a value: operations beside named tensors, as `docs/network-format.md` specifies it.
//!
//! A [`Graph`] says what is computed, and of which tensors by name; it holds no weights, and widths are those of the tensors.
//! Everything here is host only and safe to call on text from outside: sizes are bounded, arithmetic is checked, and every
//! mistake is told at once.

pub mod couple;
mod form;
mod json;
mod mistakes;
mod operation;
pub mod shape;

#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use serde_json::{Value, json};

pub use mistakes::GraphError;
pub use operation::{
    Activation, ActivationKind, AdaptiveAvgPool2d, Add, Affine, Attention, AvgPool2d, BatchNorm, Cat, Constant,
    Conv2d, Div, Dropout, Expand, GroupNorm, LayerNorm, Linear, Matmul, MaxPool2d, Mul, Op, Pad, PadMode, Permute,
    Reduce, ReduceKind, Reshape, Roll, Slice, Softmax, Upsample, UpsampleKind,
};

use super::source::Geometry;
use mistakes::Mistakes;

/// The format that is read and written.
pub const FORMAT: &str = "dreamfeed.graph.v1";
/// The key of a file's `__metadata__`.
pub const METADATA_KEY: &str = "graph";
/// Names of tensors that are about a network and not of it begin with this.
pub const RESERVED: &str = "dreamfeed.";
/// The most bytes of a graph's text.
pub const MAX_BYTES: usize = 1 << 20;
/// The most nodes.
pub const MAX_NODES: usize = 20_000;
/// The most inputs of a node.
pub const MAX_INPUTS: usize = 1024;
/// The most bytes of the name of a tensor or module.
pub const MAX_NAME: usize = 256;
/// The most dimensions of a value or tensor.
pub const MAX_RANK: usize = 8;
/// The largest size, and the most elements of a value for one image.
pub const MAX_SIZE: usize = (1 << 31) - 1;

/// One dimension of a shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Extent {
    /// So many, whatever the batch.
    Fixed(usize),
    /// So many for each image of the batch.
    Batch(usize),
}

impl Extent {
    /// For this many images.
    pub fn at(self, images: usize) -> usize {
        match self {
            Self::Fixed(size) => size,
            Self::Batch(factor) => factor.saturating_mul(images),
        }
    }
}

/// The shape of a value, outermost dimension first.
pub type Shape = Vec<Extent>;

/// One operation, which makes one value.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// What it does, with its attributes and the names of its tensors.
    pub op: Op,
    /// Indices of the values that it takes.
    pub inputs: Vec<usize>,
    /// The path of the module that it belongs to; empty for the root.
    pub module: String,
}

/// A network. Value 0 is the batch of normalized images, and node `i` makes value `i + 1`.
#[derive(Clone, Debug, PartialEq)]
pub struct Graph {
    /// The size of one image.
    pub input: Geometry,
    /// The operations; each takes only values made before it.
    pub nodes: Vec<Node>,
    /// The index of the logits, `[N, K]`.
    pub output: usize,
}

impl Graph {
    /// Reads a graph in any spelling of its JSON, and checks all that can be told without the tensors.
    pub fn parse(text: &str) -> Result<Self, GraphError> {
        let mut mistakes = Mistakes::default();
        if text.len() > MAX_BYTES {
            mistakes.add(format!("it has {} bytes; at most {MAX_BYTES} are allowed", text.len()));
            return Err(mistakes.into_error());
        }
        let graph = match json::parse(text) {
            Ok(value) => read(value, &mut mistakes),
            Err(problem) => {
                mistakes.add(format!("it is not the JSON of a graph: {problem}"));
                None
            }
        };
        match graph {
            Some(graph) if mistakes.is_empty() => {
                graph.check(&mut mistakes);
                mistakes.into_result(graph)
            }
            _ => Err(mistakes.into_error()),
        }
    }

    /// The canonical text (RFC 8785): what is written and hashed.
    pub fn encode(&self) -> String {
        let nodes: Vec<Value> = self.nodes.iter().map(write_node).collect();
        let Geometry { channels, height, width } = self.input;
        json::canonical(&json!({
            "format": FORMAT,
            "input": { "channels": channels, "height": height, "width": width },
            "nodes": nodes,
            "output": self.output,
        }))
    }

    /// What can be wrong beyond a single node: order, use, size. Builders need it too, so it is not part of reading.
    fn check(&self, mistakes: &mut Mistakes) {
        let mut used = vec![false; self.nodes.len() + 1];
        if (1..=self.nodes.len()).contains(&self.output) {
            used[self.output] = true;
        } else {
            mistakes.add(format!(
                "output is {}, and the values of its nodes are 1 to {}",
                self.output,
                self.nodes.len()
            ));
            return;
        }
        for (index, node) in self.nodes.iter().enumerate().rev() {
            for input in &node.inputs {
                if *input > index {
                    mistakes
                        .add(format!("{}: it takes value {input}, which is not made before it", self.place(index)));
                } else if used[index + 1] {
                    used[*input] = true;
                }
            }
        }
        if !used[0] {
            mistakes.add("the logits do not depend on the image".to_owned());
        }
        for (index, _) in used.iter().skip(1).enumerate().filter(|(_, used)| !**used) {
            mistakes.add(format!("{}: the logits do not depend on it; leave it out", self.place(index)));
        }
    }

    /// A node as messages name it.
    pub fn place(&self, index: usize) -> String {
        self.nodes
            .get(index)
            .map_or_else(|| format!("node {index}"), |node| place(index, node.op.name(), &node.module))
    }

    /// Of each value, whether it depends on the image; the others are the same for every batch.
    pub fn depends_on_image(&self) -> Vec<bool> {
        let mut depends = vec![true];
        for node in &self.nodes {
            depends.push(node.inputs.iter().any(|input| depends.get(*input) == Some(&true)));
        }
        depends
    }

    /// The batch norms whose input's statistics are held against what they remember: those on the way from image to
    /// logits, in order. A module that is called twice is there twice.
    pub fn taps(&self) -> Vec<usize> {
        let depends = self.depends_on_image();
        let norm = |(index, node): (usize, &Node)| {
            (matches!(node.op, Op::BatchNorm(_)) && depends.get(index + 1) == Some(&true)).then_some(index)
        };
        self.nodes.iter().enumerate().filter_map(norm).collect()
    }

    /// The tensors that it names, in the order in which nodes first name them, each with what it is.
    pub fn tensors(&self) -> Vec<(&str, Role)> {
        let mut seen = BTreeMap::new();
        let mut list = Vec::new();
        for (name, role) in self.nodes.iter().flat_map(|node| node.op.tensors()) {
            match seen.get(name) {
                None => {
                    seen.insert(name, list.len());
                    list.push((name, role));
                }
                Some(at) if role == Role::Parameter => list[*at].1 = role,
                Some(_) => {}
            }
        }
        list
    }
}

/// What a tensor is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// It is trained.
    Parameter,
    /// It stays as it is.
    Constant,
    /// A batch norm keeps it.
    Statistic,
}

fn place(index: usize, op: &str, module: &str) -> String {
    if module.is_empty() {
        format!("node {index} ({op})")
    } else {
        format!("node {index} ({op} of {})", mistakes::quoted(module))
    }
}

fn read(value: Value, mistakes: &mut Mistakes) -> Option<Graph> {
    let Value::Object(mut whole) = value else {
        mistakes.add("it is no JSON object".to_owned());
        return None;
    };
    match whole.remove("format") {
        Some(Value::String(format)) if format == FORMAT => {}
        // What another format means by its keys is not known here: nothing more is to be said.
        Some(Value::String(format)) => {
            mistakes.add(format!("its format is {}; this version reads {FORMAT:?}", mistakes::quoted(&format)));
            return None;
        }
        _ => mistakes.add(format!("it has no format; {FORMAT:?} is right")),
    }
    let mut top = form::Reader::new("the graph", whole, mistakes);
    let output = top.size("output", 1..=MAX_NODES);
    let nodes = top.list("nodes");
    let size = top.object("input");
    top.finish();
    let mut input = form::Reader::new("input", size, mistakes);
    let [channels, height, width] = ["channels", "height", "width"].map(|key| input.size(key, 1..=MAX_SIZE));
    input.finish();
    if nodes.len() > MAX_NODES {
        mistakes.add(format!("it has {} nodes; at most {MAX_NODES} are allowed", nodes.len()));
        return None;
    }
    let nodes: Vec<Option<Node>> =
        nodes.into_iter().enumerate().map(|(index, node)| read_node(index, node, mistakes)).collect();
    Some(Graph {
        input: Geometry { channels, height, width },
        nodes: nodes.into_iter().collect::<Option<_>>()?,
        output,
    })
}

fn read_node(index: usize, value: Value, mistakes: &mut Mistakes) -> Option<Node> {
    let Value::Object(mut fields) = value else {
        mistakes.add(format!("node {index}: it is no JSON object"));
        return None;
    };
    let op = match fields.remove("op") {
        Some(Value::String(op)) => op,
        _ => String::new(),
    };
    let Some(mut op) = Op::blank(&op) else {
        mistakes.add(format!("node {index}: there is no operation {}", mistakes::quoted(&op)));
        return None;
    };
    let module = match fields.remove("module") {
        None => String::new(),
        Some(Value::String(module)) if (1..=MAX_NAME).contains(&module.len()) => module,
        Some(_) => {
            mistakes.add(format!("node {index}: module is a text of 1 to {MAX_NAME} bytes, or left out"));
            String::new()
        }
    };
    let place = place(index, op.name(), &module);
    let mut reader = form::Reader::new(&place, fields, mistakes);
    let inputs: Vec<usize> = reader.sizes("inputs", 0..=MAX_INPUTS, 0..=MAX_NODES);
    let attributes = reader.optional_object("attributes");
    let tensors = reader.optional_object("tensors");
    reader.finish();
    let mut reader = form::OpReader::new(&place, attributes, tensors, mistakes);
    op.visit(&mut reader);
    reader.finish();
    let arity = op.arity();
    if !arity.contains(&inputs.len()) {
        let right = if arity.start() == arity.end() {
            arity.start().to_string()
        } else {
            format!("{} to {}", arity.start(), arity.end())
        };
        mistakes.add(format!("{place}: it has {} inputs; {right} are right", inputs.len()));
    }
    Some(Node { op, inputs, module })
}

fn write_node(node: &Node) -> Value {
    let mut writer = form::Writer::default();
    // Fields are visited mutably by whoever reads them; writing changes nothing.
    node.op.clone().visit(&mut writer);
    let mut fields = serde_json::Map::from_iter([
        ("inputs".to_owned(), json!(node.inputs)),
        ("op".to_owned(), json!(node.op.name())),
    ]);
    for (key, map) in [("attributes", writer.attributes), ("tensors", writer.tensors)] {
        if !map.is_empty() {
            fields.insert(key.to_owned(), Value::Object(map));
        }
    }
    if !node.module.is_empty() {
        fields.insert("module".to_owned(), json!(node.module));
    }
    Value::Object(fields)
}
