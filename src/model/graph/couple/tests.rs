#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::model::channels;
use crate::model::checkpoint::Checkpoint;
use crate::model::families::resnet;
use crate::model::spec::NetworkSpec;

type Tensors = BTreeMap<String, Vec<usize>>;

fn tensors(spec: &NetworkSpec) -> Tensors {
    spec.tensors().into_iter().map(|tensor| (tensor.name, tensor.shape)).collect()
}

fn couplings(graph: &Graph, tensors: &Tensors) -> Couplings {
    Couplings::find(graph, &Shapes::infer(graph, tensors).unwrap()).unwrap()
}

fn file(name: &str) -> (Graph, Tensors) {
    let path = format!("{}/tests/golden/graph_{name}.safetensors", env!("CARGO_MANIFEST_DIR"));
    let file = Checkpoint::open(std::path::Path::new(&path)).unwrap();
    let shapes = file.tensors().map(|(name, tensor)| (name.to_owned(), tensor.shape.to_vec())).collect();
    (Graph::parse(&file.metadata()["graph"]).unwrap(), shapes)
}

fn shrink(tensors: &Tensors, kept: &Kept) -> Tensors {
    let mut smaller = tensors.clone();
    for (name, dims) in kept {
        let shape = smaller.get_mut(name).unwrap();
        for (size, stays) in shape.iter_mut().zip(dims) {
            *size = stays.as_ref().map_or(*size, Vec::len);
        }
    }
    smaller
}

/// The groups as a set of sets of channels of batch norms, which is how `model::channels` tells them.
#[test]
fn groups_of_the_resnets_are_those_that_pruning_has() {
    for arch in ["resnet20", "resnet20-projection", "resnet18"] {
        let spec = NetworkSpec::fresh(arch, 3, 10).unwrap();
        let found = couplings(&resnet::graph(&spec, [32, 32]), &tensors(&spec));
        let norms = channels::batch_norms(&spec);
        let mut lanes = BTreeMap::new();
        for (name, place) in &norms {
            for (index, class) in found.tensor(&format!("{name}.weight"))[0].iter().flatten().enumerate() {
                lanes.entry(*class).or_insert_with(Vec::new).push((*place, index));
            }
        }
        let sorted = |mut lane: Vec<channels::Channel>| {
            lane.sort_unstable();
            lane.dedup();
            lane
        };
        let mut found: Vec<_> = lanes.into_values().map(sorted).collect();
        let mut known: Vec<_> =
            channels::groups(&spec).into_iter().flat_map(|group| group.lanes).map(sorted).collect();
        found.sort();
        known.sort();
        assert_eq!(found, known, "{arch}");
    }
}

#[test]
fn a_graph_without_channels_is_the_network_without_them() {
    for arch in ["resnet20", "resnet20-projection", "resnet18"] {
        let spec = NetworkSpec::fresh(arch, 3, 10).unwrap();
        let graph = resnet::graph(&spec, [32, 32]);
        let found = couplings(&graph, &tensors(&spec));
        let norms: BTreeMap<channels::Place, String> =
            channels::batch_norms(&spec).into_iter().map(|(name, place)| (place, name)).collect();
        for skip in [2, 3, 7] {
            let groups: Vec<channels::Group> = channels::groups(&spec).into_iter().step_by(skip).collect();
            let removed: BTreeSet<channels::Channel> = groups.iter().flat_map(channels::Group::channels).collect();
            let classes = removed
                .iter()
                .map(|(place, index)| found.tensor(&format!("{}.weight", norms[place]))[0].as_ref().unwrap()[*index]);
            let (smaller, kept) = found.without(&graph, &classes.collect());
            let (expected, _) = channels::without(&spec, &removed);
            assert_eq!(shrink(&tensors(&spec), &kept), tensors(&expected), "{arch}");
            assert_eq!(smaller, resnet::graph(&expected, [32, 32]), "{arch}");
        }
    }
}

#[test]
fn dense_channels_go_wherever_they_are_joined() {
    let (graph, shapes) = file("dense");
    let found = couplings(&graph, &shapes);
    // The images' three stay; each convolution makes four, and the head and the second norm see all.
    assert_eq!(found.groups().count(), 8);
    let (_, group) =
        found.groups().find(|(_, group)| group.places.iter().any(|p| p.tensor == "body.one.2.weight")).unwrap();
    let mut names: Vec<&str> = group.places.iter().map(|place| place.tensor.as_str()).collect();
    names.sort_unstable();
    assert_eq!(
        names,
        [
            "body.one.2.bias",
            "body.one.2.weight",
            "body.two.0.bias",
            "body.two.0.running_mean",
            "body.two.0.running_var",
            "body.two.0.weight",
            "body.two.2.weight",
            "head.weight",
        ]
    );
}

#[test]
fn what_attention_takes_apart_stays_whole() {
    let (graph, shapes) = file("tokens");
    let found = couplings(&graph, &shapes);
    assert_eq!(found.groups().collect::<Vec<_>>(), []);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever goes, what is left is a network.
    #[test]
    fn any_groups_can_go(which in 0usize..6, chances in proptest::collection::vec(0.0..1.0f64, 512)) {
        let resnet = |arch| {
            let spec = NetworkSpec::fresh(arch, 3, 10).unwrap();
            (resnet::graph(&spec, [16, 16]), tensors(&spec))
        };
        let (graph, shapes) = match which {
            0 => resnet("resnet8"),
            1 => resnet("resnet8-projection"),
            2 => file("dense"),
            3 => file("odd"),
            4 => file("twice"),
            _ => file("standardized"),
        };
        let found = couplings(&graph, &shapes);
        let mut removed: BTreeSet<usize> =
            found.groups().zip(&chances).filter(|(_, chance)| **chance < 0.5).map(|((class, _), _)| class).collect();
        // Something of every dimension stays.
        for axis in (0..=graph.nodes.len()).flat_map(|value| found.value(value)).flatten() {
            if axis.iter().all(|class| removed.contains(class)) {
                removed.remove(&axis[0]);
            }
        }
        let (smaller, kept) = found.without(&graph, &removed);
        let smaller_tensors = shrink(&shapes, &kept);
        let inferred = Shapes::infer(&smaller, &smaller_tensors);
        prop_assert!(inferred.is_ok(), "{inferred:?}");
        prop_assert_eq!(removed.is_empty(), smaller_tensors == shapes);
    }
}
