#![allow(clippy::unwrap_used)]

use std::path::Path;

use super::*;
use crate::model::families::resnet;
use crate::model::golden::{self, GoldenError, Proof};
use crate::model::network::FrozenNetwork;
use crate::model::spec::NetworkSpec;
use crate::model::trainable::{TrainableNetwork, write};

/// What Python's `save_network` wrote, and beside each what PyTorch made of it.
const FILES: [&str; 5] = ["dense", "odd", "standardized", "tokens", "twice"];

fn open(name: &str) -> Checkpoint {
    Checkpoint::open(Path::new(&format!("{}/tests/golden/{name}.safetensors", env!("CARGO_MANIFEST_DIR")))).unwrap()
}

fn load(file: &Checkpoint, kind: Kind) -> GraphNetwork {
    let graph = Graph::parse(&file.metadata()["graph"]).unwrap();
    let shapes = Shapes::infer(&graph, file).unwrap();
    GraphNetwork::load(&graph, &shapes, file, Device::Cpu, kind).unwrap()
}

fn images(network: &GraphNetwork, kind: Kind) -> Tensor {
    let size = network.graph().input;
    let shape = [2, size.channels as i64, size.height as i64, size.width as i64];
    Tensor::from_slice(&golden::images(size)).view(shape).to_kind(kind)
}

/// Of the largest absolute value of `expected`.
fn difference(computed: &Tensor, expected: &Tensor) -> f64 {
    assert_eq!(computed.size(), expected.size());
    ((computed - expected).abs().max() / expected.abs().max()).double_value(&[])
}

#[test]
fn golden_samples_of_pytorch_are_reproduced() {
    assert_eq!(
        golden::images(crate::model::source::Geometry { channels: 3, height: 12, width: 12 })[..3],
        [1.533_243_2, -0.273_888_1, -1.894_264_9]
    );
    for name in FILES {
        let file = open(&format!("graph_{name}"));
        assert_eq!(golden::check(&load(&file, Kind::Float), &file, Device::Cpu).unwrap(), Proof::Proven, "{name}");
    }
    let bare = open("graph_twice").only(|name| !name.starts_with("dreamfeed."));
    assert_eq!(golden::check(&load(&bare, Kind::Float), &bare, Device::Cpu).unwrap(), Proof::Unproven);
    let half = open("graph_twice").only(|name| name != "dreamfeed.golden.var.1");
    let error = golden::check(&load(&half, Kind::Float), &half, Device::Cpu).unwrap_err();
    assert!(error.to_string().contains("dreamfeed.golden.var.1 is missing, [4] is right"), "{error}");
}

#[test]
fn a_network_of_the_right_shapes_that_computes_something_else_is_found_out() {
    for (name, from, to) in [
        ("twice", "\"eps\":0.001", "\"eps\":0.1"),
        ("twice", "\"kind\":\"relu\"", "\"kind\":\"silu\""),
        ("dense", "\"kind\":\"silu\"", "\"kind\":\"relu\""),
        ("odd", "\"count_include_pad\":false", "\"count_include_pad\":true"),
        ("tokens", "\"causal\":false", "\"causal\":true"),
        ("standardized", "\"kind\":\"gelu_tanh\"", "\"kind\":\"hardswish\""),
    ] {
        let file = open(&format!("graph_{name}"));
        let text = file.metadata()["graph"].replacen(from, to, 1);
        assert_ne!(text, file.metadata()["graph"]);
        let graph = Graph::parse(&text).unwrap();
        let shapes = Shapes::infer(&graph, &file).unwrap();
        let network = GraphNetwork::load(&graph, &shapes, &file, Device::Cpu, Kind::Float).unwrap();
        let error = golden::check(&network, &file, Device::Cpu).unwrap_err();
        assert!(matches!(error, GoldenError::Differs { .. }), "{name}: {error}");
    }
}

#[test]
fn gradients_and_training_are_those_of_pytorch() {
    for name in FILES {
        let (network, reference) =
            (load(&open(&format!("graph_{name}")), Kind::Double), open(&format!("graph_{name}.reference")));
        let expected =
            |name: &str| reference.get(name).map(|raw| to_device(&raw, Kind::Double, Device::Cpu).unwrap());
        let differentiated = |mode| {
            let x = images(&network, Kind::Double).set_requires_grad(true);
            let logits = network.forward(&x, mode).unwrap();
            let gradient = Tensor::run_backward(&[logits.square().sum(Kind::Double)], &[&x], false, false).remove(0);
            (logits.detach(), gradient)
        };
        let (_, gradient) = differentiated(Mode::Evaluation);
        assert!(difference(&gradient, &expected("gradient").unwrap()) < 1e-9, "{name}");
        let Some(trained) = expected("trained.logits") else { continue };
        let (logits, gradient) = differentiated(Mode::Training);
        assert!(difference(&logits, &trained) < 1e-9, "{name}");
        assert!(difference(&gradient, &expected("trained.gradient").unwrap()) < 1e-9, "{name}");
        for (tensor, _) in reference.tensors().filter(|(name, _)| name.contains("running_")) {
            assert!(difference(&network.tensors()[tensor], &expected(tensor).unwrap()) < 1e-9, "{name}: {tensor}");
        }
    }
}

#[test]
fn resnets_compute_what_the_code_of_today_computes() {
    let _alone = crate::testing::drawing_alone();
    tch::manual_seed(3);
    for arch in ["resnet8", "resnet20", "resnet8-projection", "resnet18"] {
        let spec = NetworkSpec::fresh(arch, 3, 7).unwrap();
        let today = TrainableNetwork::fresh(&spec, Device::Cpu);
        let x = Tensor::randn([4, 3, 16, 16], (Kind::Float, Device::Cpu));
        // Statistics that no fresh network has.
        (0..3).for_each(|_| drop(today.forward(&x)));
        let file = Checkpoint::parse(
            write(today.tensors().map(|(name, tensor)| (name.to_owned(), tensor)), &Default::default()).into(),
        )
        .unwrap();
        let graph = resnet::graph(&spec, [16, 16]);
        let shapes = Shapes::infer(&graph, &file).unwrap();
        let network = GraphNetwork::load(&graph, &shapes, &file, Device::Cpu, Kind::Float).unwrap();
        let (logits, taps) = network.logits_and_taps(&x).unwrap();
        assert!(difference(&logits, &today.logits(&x)) < 1e-5, "{arch}");
        let frozen = FrozenNetwork::load(&spec, &file, Device::Cpu, Kind::Float).forward(&x, true);
        assert_eq!(frozen.statistics.len(), taps.len());
        for (known, (mean, var)) in frozen.statistics.iter().zip(&taps) {
            assert!(difference(mean, &known.mean) < 1e-4 && difference(var, &known.var) < 1e-4, "{arch}");
        }
        let trained = network.forward(&x, Mode::Training).unwrap();
        assert!(difference(&trained, &today.forward(&x)) < 1e-5, "{arch}");
        for (name, tensor) in today.tensors().filter(|(name, _)| name.contains("running_")) {
            assert!(difference(&network.tensors()[name], tensor) < 1e-5, "{arch}: {name}");
        }
    }
}

#[test]
fn a_stretch_between_two_values_is_a_part_of_the_whole() {
    let network = load(&open("graph_dense"), Kind::Double);
    let x = images(&network, Kind::Double);
    let last = network.graph().output;
    let whole = network.evaluate((0, &x), &[last - 1, last], Mode::Evaluation).unwrap();
    let rest = network.evaluate((last - 1, &whole[0]), &[last], Mode::Evaluation).unwrap();
    assert_eq!(rest[0], whole[1]);
    // The first convolution's map is not all that the logits follow from.
    let error = network.evaluate((3, &whole[0]), &[last], Mode::Evaluation).unwrap_err().to_string();
    assert!(error.contains("does not follow from value 3 alone"), "{error}");
}

#[test]
fn a_file_with_a_graph_and_a_name_is_held_to_both() {
    use crate::model::source::{NetworkSource, SourceError, SourceOptions};

    let options = |size: &str| SourceOptions {
        arch: Some("resnet8".to_owned()),
        image_size: Some(size.parse().unwrap()),
        ..SourceOptions::default()
    };
    let folder = tempfile::tempdir().unwrap();
    let open_changed = |size: &str, change: &dyn Fn(&str) -> String, keep: &dyn Fn(&str) -> bool| {
        let file = open("graph_resnet");
        let tensors: Vec<(String, Tensor)> = file
            .tensors()
            .filter(|(name, _)| keep(name))
            .map(|(name, raw)| (name.to_owned(), to_device(&raw, Kind::Float, Device::Cpu).unwrap()))
            .collect();
        let mut metadata: std::collections::BTreeMap<String, String> = file.metadata().clone().into_iter().collect();
        metadata.insert("graph".to_owned(), change(&metadata["graph"]));
        let path = folder.path().join("network.safetensors");
        std::fs::write(&path, write(tensors.iter().map(|(name, tensor)| (name.clone(), tensor)), &metadata)).unwrap();
        NetworkSource::open(&path, &options(size))
    };
    let whole = open_changed("16,16", &str::to_owned, &|_| true).unwrap();
    assert_eq!(whole.proof, Some(Proof::Proven));
    // The golden sample is no part of what the network is.
    let bare = open_changed("16,16", &str::to_owned, &|name| !name.starts_with("dreamfeed.")).unwrap();
    assert_eq!((bare.proof, &bare.identity), (Some(Proof::Unproven), &whole.identity));
    let relu = |text: &str| text.replacen("\"kind\":\"relu\"", "\"kind\":\"silu\"", 1);
    let told = |opened: Result<NetworkSource, SourceError>| opened.unwrap_err().to_string();
    let error = told(open_changed("16,16", &relu, &|_| true));
    assert!(error.contains("does not compute what it computed where it was exported"), "{error}");
    let error = told(open_changed("16,16", &relu, &|name| !name.starts_with("dreamfeed.")));
    assert!(error.contains("its graph computes something else than resnet8"), "{error}");
    let error = told(open_changed("32,32", &str::to_owned, &|_| true));
    assert!(error.contains("its graph takes images of 3x16x16, and the file is said to take 3x32x32"), "{error}");
    let error = told(open_changed("16,16", &|_| "{}".to_owned(), &|_| true));
    assert!(error.contains("the graph is wrong: it has no format"), "{error}");
}
