//! Residual networks for small images: the CIFAR ResNets, and ResNet-18 and -34 with a stem that does not pool.

use super::Builder;
use crate::model::graph::{Add, Graph, Op, Pad, Reduce, Slice};
use crate::model::source::Geometry;
use crate::model::spec::{BlockSpec, NetworkSpec, Shortcut};

/// The graph of a network, for images of this height and width. Operations come in the order in which PyTorch registers their
/// modules, which is also that of batch-norm statistics.
pub fn graph(spec: &NetworkSpec, [height, width]: [usize; 2]) -> Graph {
    let mut builder = Builder::new(Geometry { channels: spec.in_channels, height, width });
    let stem = builder.conv("conv1", 0, 3, 1);
    let stem = builder.norm("bn1", stem);
    let mut x = builder.relu("", stem);
    let mut size = [height, width];
    for of in &spec.blocks {
        x = block(&mut builder, of, spec.naming.shortcut, x, size);
        size = size.map(|side| side.div_ceil(of.stride));
    }
    let pooled = builder.node("", Op::Reduce(Reduce { dims: vec![2, 3], ..Reduce::default() }), &[x]);
    let logits = builder.linear(spec.naming.head, pooled);
    builder.finish(logits)
}

fn block(builder: &mut Builder, of: &BlockSpec, shortcut: &str, x: usize, size: [usize; 2]) -> usize {
    let p = &of.prefix;
    let inner = builder.conv(&format!("{p}.conv1"), x, 3, of.stride);
    let inner = builder.norm(&format!("{p}.bn1"), inner);
    let inner = builder.relu(p, inner);
    let out = builder.conv(&format!("{p}.conv2"), inner, 3, 1);
    let out = builder.norm(&format!("{p}.bn2"), out);
    let shortcut = match of.shortcut {
        Shortcut::Identity => x,
        Shortcut::Projection => {
            let conv = builder.conv(&format!("{p}.{shortcut}.0"), x, 1, of.stride);
            builder.norm(&format!("{p}.{shortcut}.1"), conv)
        }
        Shortcut::Pad => padded(builder, of, x, size),
    };
    let sum = builder.node(p, Op::Add(Add::default()), &[out, shortcut]);
    builder.relu(p, sum)
}

/// Option A: every second pixel, and zeros for half of the new channels before the old ones, for the rest after.
fn padded(builder: &mut Builder, of: &BlockSpec, mut x: usize, size: [usize; 2]) -> usize {
    let p = &of.prefix;
    if of.stride > 1 {
        for (dim, end) in [2, 3].into_iter().zip(size) {
            x = builder.node(p, Op::Slice(Slice { dim, start: 0, end, step: of.stride }), &[x]);
        }
    }
    let new = of.out_width.saturating_sub(of.in_width) as i64;
    let widths = vec![[0, 0], [new / 2, new - new / 2], [0, 0], [0, 0]];
    builder.node(p, Op::Pad(Pad { widths, ..Pad::default() }), &[x])
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::model::graph::shape::Shapes;
    use crate::model::graph::{Extent, Role};

    #[test]
    fn graphs_have_the_tensors_shapes_and_cost_of_their_networks() {
        for arch in ["resnet8", "resnet20", "resnet56", "resnet110", "resnet20-projection", "resnet18", "resnet34"] {
            for (channels, size) in [(3, [32, 32]), (1, [9, 14])] {
                let spec = NetworkSpec::fresh(arch, channels, 7).unwrap();
                let graph = graph(&spec, size);
                assert_eq!(Graph::parse(&graph.encode()).unwrap(), graph, "{arch}");
                let expected = spec.tensors();
                let tensors: BTreeMap<String, Vec<usize>> =
                    expected.iter().map(|tensor| (tensor.name.clone(), tensor.shape.clone())).collect();
                let shapes = Shapes::infer(&graph, &tensors).unwrap();
                shapes.check_used(tensors.keys().map(String::as_str)).unwrap();
                // The order of tensors decides the random draws of a fresh network.
                let order: Vec<(String, bool)> = graph
                    .tensors()
                    .into_iter()
                    .map(|(name, role)| (name.to_owned(), role == Role::Parameter))
                    .collect();
                assert_eq!(order, expected.into_iter().map(|t| (t.name, t.trainable)).collect::<Vec<_>>(), "{arch}");
                assert_eq!(shapes.classes, 7);
                assert_eq!(shapes.cost.multiply_adds, spec.multiply_adds(size[0], size[1]), "{arch}");
                assert_eq!(shapes.cost.parameters, spec.num_parameters(), "{arch}");
                let widths = graph.taps().into_iter().map(|tap| shapes.values[tap + 1][1]);
                let expected = spec.batch_norm_widths().into_iter().map(Extent::Fixed);
                assert_eq!(widths.collect::<Vec<_>>(), expected.collect::<Vec<_>>(), "{arch}");
            }
        }
    }

    #[test]
    fn a_graph_is_told_from_a_pruned_file() {
        let path = format!("{}/tests/golden/teacher.safetensors", env!("CARGO_MANIFEST_DIR"));
        let file = crate::model::checkpoint::Checkpoint::open(std::path::Path::new(&path)).unwrap();
        let spec = NetworkSpec::from_checkpoint("resnet8", &file).unwrap();
        let shapes = Shapes::infer(&graph(&spec, [16, 16]), &file).unwrap();
        shapes.check_used(file.tensors().map(|(name, _)| name)).unwrap();
    }
}
