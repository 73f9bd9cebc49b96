#![allow(clippy::unwrap_used)]

use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::shape::Shapes;
use super::*;
use crate::model::checkpoint::Checkpoint;

/// What Python's `save_network` wrote.
const FILES: [&str; 5] = ["dense", "odd", "standardized", "tokens", "twice"];

fn file(name: &str) -> Checkpoint {
    let path = format!("{}/tests/golden/graph_{name}.safetensors", env!("CARGO_MANIFEST_DIR"));
    Checkpoint::open(Path::new(&path)).unwrap()
}

fn text(name: &str) -> String {
    file(name).metadata()[METADATA_KEY].clone()
}

#[test]
fn what_python_writes_is_read_and_written_again_byte_by_byte() {
    for name in FILES {
        let text = text(name);
        let graph = Graph::parse(&text).unwrap();
        assert_eq!(graph.encode(), text, "{name}");
        // Any spelling is the same graph.
        let value: Value = serde_json::from_str(&text).unwrap();
        let spelled = serde_json::to_string_pretty(&value).unwrap().replace("\"groups\": 1", "\"groups\": 1.0e0");
        assert_eq!(Graph::parse(&spelled).unwrap(), graph, "{name}");
    }
}

#[test]
fn shapes_are_those_of_the_files_tensors() {
    for name in FILES {
        let (graph, file) = (Graph::parse(&text(name)).unwrap(), file(name));
        let shapes = Shapes::infer(&graph, &file).unwrap();
        shapes.check_used(file.tensors().map(|(name, _)| name)).unwrap();
        assert_eq!((shapes.classes, shapes.values.len()), (5, graph.nodes.len() + 1), "{name}");
        for (tap, node) in graph.taps().into_iter().enumerate() {
            let channels = file.get(&format!("{RESERVED}golden.mean.{tap}")).unwrap().shape[0];
            assert_eq!(shapes.values[graph.nodes[node].inputs[0]][1], Extent::Fixed(channels), "{name}");
        }
    }
    let twice = Shapes::infer(&Graph::parse(&text("twice")).unwrap(), &file("twice")).unwrap();
    // A convolution of 3 to 4 channels of 12 x 12, kernel 3, and a head of 4 to 5; two norms share what they are.
    assert_eq!(twice.cost.multiply_adds, 144 * 4 * 27 + 20);
    assert_eq!(twice.cost.parameters, 4 * 27 + 2 * 4 + 20 + 5);
    assert_eq!(twice.cost.activation_bytes(2, 4), 2 * 4 * twice.cost.activations);
}

/// A graph of one softmax whose text a test changes.
fn small(change: impl FnOnce(&mut Value)) -> String {
    let mut value = json!({
        "format": FORMAT,
        "input": { "channels": 3, "height": 8, "width": 8 },
        "nodes": [
            { "op": "conv2d", "inputs": [0], "module": "stem", "tensors": { "weight": "stem.weight" },
              "attributes": { "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "groups": 1 } },
            { "op": "reduce", "inputs": [1], "attributes": { "kind": "mean", "dims": [2, 3], "keepdim": false } },
        ],
        "output": 2,
    });
    change(&mut value);
    value.to_string()
}

fn node(op: &str, attributes: Value) -> impl FnOnce(&mut Value) {
    move |value| value["nodes"][1] = json!({ "op": op, "inputs": [1], "attributes": attributes })
}

fn said(text: &str) -> String {
    Graph::parse(text).unwrap_err().to_string()
}

#[test]
fn every_mistake_is_told_at_once_and_shortly() {
    Graph::parse(&small(|_| {})).unwrap();
    let told = said(&small(|value| {
        value["nodes"][0]["attributes"]["stride"] = json!([0, 1]);
        value["nodes"][0]["attributes"]["color"] = json!("red");
        value["nodes"][0]["tensors"]["weight"] = json!("../etc/passwd");
        value["nodes"][0]["tensors"]["alpha"] = json!("a");
        value["nodes"][1]["attributes"]["dims"] = json!([9]);
        value["nodes"][1]["attributes"].as_object_mut().unwrap().remove("keepdim");
        value["output"] = json!(-1);
    }));
    for mistake in [
        "node 0 (conv2d of \"stem\"): stride is [0,1]; a pair of integers from 1 to 2147483647 is right",
        "there is no field \"color\"",
        "weight is \"../etc/passwd\"; the name of a tensor",
        "the operation takes no tensor \"alpha\"",
        "node 1 (reduce): dims is [9]",
        "keepdim is missing; true or false is right",
        "output is -1",
    ] {
        assert!(told.contains(mistake), "{mistake:?} is not in {told}");
    }
    let many = said(&small(|value| value["nodes"] = vec![json!({ "op": "x".repeat(90) }); 5000].into()));
    assert!(many.len() < 4000 && many.ends_with("; and 4984 mistakes more"), "{many}");
}

#[test]
fn hostile_texts_are_refused() {
    let deep = format!("{{\"format\":{}1{}}}", "[".repeat(100_000), "]".repeat(100_000));
    let long = " ".repeat(MAX_BYTES + 1);
    let cases: Vec<(String, &str)> = vec![
        (String::new(), "not the JSON"),
        ("[]".into(), "no JSON object"),
        ("{}".into(), "it has no format"),
        ("{\"format\":\"dreamfeed.graph.v2\"}".into(), "its format is \"dreamfeed.graph.v2\""),
        (deep, "nested more than 8 deep"),
        (long, "at most 1048576 are allowed"),
        (small(|_| {}).replace("\"output\":2", "\"output\":2,\"output\":2"), "the key \"output\" comes twice"),
        (small(|_| {}).replace("\"output\":2", "\"output\":1e999"), "number out of range"),
        (small(|_| {}) + "x", "trailing characters"),
        (small(|value| value["more"] = json!(1)), "there is no field \"more\""),
        (small(|value| value["input"]["width"] = json!(0)), "width is 0"),
        (small(|value| value["input"]["width"] = json!(1u64 << 31)), "width is 2147483648"),
        (small(|value| value["input"]["width"] = json!(1.5)), "width is 1.5"),
        (small(|value| value["output"] = json!(3)), "output is 3, and the values of its nodes are 1 to 2"),
        (small(|value| value["output"] = json!(1)), "node 1 (reduce): the logits do not depend on it"),
        (small(|value| value["nodes"][0]["inputs"] = json!([1])), "takes value 1, which is not made before it"),
        (small(|value| value["nodes"][0]["inputs"] = json!([0, 0])), "it has 2 inputs; 1 are right"),
        (small(|value| value["nodes"][0]["op"] = json!("__import__")), "there is no operation \"__import__\""),
        (small(|value| value["nodes"][0]["module"] = json!("")), "module is a text of 1 to 256 bytes"),
        (
            small(|value| value["nodes"][0]["tensors"] = json!({ "weight": "dreamfeed.x" })),
            "name of a tensor of the network",
        ),
        (small(|value| value["nodes"][0]["tensors"] = json!({ "weight": "x".repeat(257) })), "at most 256 bytes"),
        (
            small(|value| {
                value["nodes"] = json!([{ "op": "constant", "inputs": [], "tensors": { "value": "x" },
                                               "attributes": { "trainable": false } }])
            }),
            "output is 2",
        ),
        (
            small(|value| {
                value["output"] = json!(1);
                value["nodes"] = json!([{ "op": "constant", "inputs": [],
            "tensors": { "value": "x" }, "attributes": { "trainable": false } }])
            }),
            "do not depend on the image",
        ),
        (small(node("activation", json!({ "kind": "exec" }))), "one of relu, sigmoid"),
        (small(node("activation", json!({ "kind": "clamp", "min": 0 }))), "max is missing; a number or null"),
        (small(node("pad", json!({ "mode": "constant", "widths": [[0, -3e9]], "value": "inf" }))), "widths is"),
        (small(node("pad", json!({ "mode": "constant", "widths": [[0, 0]], "value": "nan" }))), "value is \"nan\""),
        (small(node("reshape", json!({ "shape": [{ "batch": 0 }] }))), "shape is"),
        (small(node("reshape", json!({ "shape": [{ "batch": 1, "more": 1 }] }))), "shape is"),
        (small(node("reshape", json!({ "shape": [1, 1, 1, 1, 1, 1, 1, 1, 1] }))), "shape is"),
        (small(node("dropout", json!({ "p": 1, "whole_maps": false }))), "p is 1; a number from 0 on and below 1"),
    ];
    for (text, right) in cases {
        let told = said(&text);
        assert!(told.contains(right) && told.len() < 4000, "{right:?} is not in {told}");
    }
}

fn fit(text: &str, weight: &[usize]) -> Result<Shapes, GraphError> {
    let tensors = BTreeMap::from([("stem.weight".to_owned(), weight.to_vec())]);
    Shapes::infer(&Graph::parse(text).unwrap(), &tensors)
}

#[test]
fn what_does_not_fit_is_refused_whatever_the_sizes() {
    let size = MAX_SIZE;
    fit(&small(|_| {}), &[5, 3, 3, 3]).unwrap();
    let cases: Vec<(String, Vec<usize>, &str)> = vec![
        (small(|_| {}), vec![5, 4, 3, 3], "stem.weight is [5, 4, 3, 3], but 3 channels in 1 groups come in"),
        (small(|_| {}), vec![5, 3, 3], "[O, C/groups, h, w] is right"),
        (small(|_| {}), vec![5, 3, 0, 3], "without a single element"),
        (small(|_| {}), vec![size, 3, 3, 3], "more than 2147483647 elements"),
        (small(|_| {}), vec![usize::MAX, 3, 3, 3], "more than 2147483647 elements"),
        (small(|_| {}), vec![5, 3, 11, 3], "is larger than a map of [8, 8]"),
        (
            small(|value| value["input"] = json!({ "channels": size, "height": size, "width": size })),
            vec![5, 3, 3, 3],
            "input: [N, 2147483647, 2147483647, 2147483647] has more than",
        ),
        (
            small(|value| value["nodes"][0]["attributes"]["padding"] = json!([size, size])),
            vec![5, 3, 3, 3],
            "elements for one image",
        ),
        (
            small(|value| value["nodes"][0]["attributes"]["dilation"] = json!([size, size])),
            vec![5, 3, 3, 3],
            "is larger than a map",
        ),
        (
            small(|value| value["nodes"][1]["attributes"]["dims"] = json!([0, 2])),
            vec![5, 3, 3, 3],
            "dimension 0 of [N, 5, 8, 8] is the batch's",
        ),
        (small(|value| value["nodes"][1]["attributes"]["dims"] = json!([3, 2])), vec![5, 3, 3, 3], "ascending"),
        (
            small(|value| value["nodes"][1]["attributes"]["dims"] = json!([2])),
            vec![5, 3, 3, 3],
            "value 2 is [N, 5, 8]; logits are [N, classes]",
        ),
        (
            small(node("reshape", json!({ "shape": [{ "batch": 1 }, { "batch": 1 }] }))),
            vec![5, 3, 3, 3],
            "once at most",
        ),
        (small(node("reshape", json!({ "shape": [{ "batch": 2 }, 5] }))), vec![5, 3, 3, 3], "cannot hold"),
        (small(node("reshape", json!({ "shape": [5, 64] }))), vec![5, 3, 3, 3], "cannot hold"),
        (small(node("permute", json!({ "dims": [0, 1, 2, 2] }))), vec![5, 3, 3, 3], "each dimension once is right"),
        (
            small(node("slice", json!({ "dim": 1, "start": 3, "end": 6, "step": 1 }))),
            vec![5, 3, 3, 3],
            "<= 5 is right",
        ),
        (
            small(node("slice", json!({ "dim": 4, "start": 3, "end": 6, "step": 1 }))),
            vec![5, 3, 3, 3],
            "does not exist",
        ),
        (small(node("cat", json!({ "dim": 0 }))), vec![5, 3, 3, 3], "is the batch's"),
        (
            small(node("pad", json!({ "widths": [[0, 0], [0, 0], [8, 0], [0, 0]], "mode": "reflect", "value": 0 }))),
            vec![5, 3, 3, 3],
            "cannot be padded by 8 and 0",
        ),
        (
            small(node(
                "pad",
                json!({ "widths": [[0, 0], [0, 0], [-4, -4], [0, 0]], "mode": "constant", "value": 0 }),
            )),
            vec![5, 3, 3, 3],
            "cannot be padded by -4 and -4",
        ),
        (small(node("expand", json!({ "shape": [{ "batch": 1 }, 5, 8, 9] }))), vec![5, 3, 3, 3], "cannot become"),
        (
            small(node("group_norm", json!({ "groups": 2, "eps": 1e-5 }))),
            vec![5, 3, 3, 3],
            "which 2 groups do not divide",
        ),
        (
            small(node(
                "max_pool2d",
                json!({ "kernel": [2, 2], "stride": [1, 1], "padding": [2, 0], "dilation": [1, 1],
            "ceil_mode": true }),
            )),
            vec![5, 3, 3, 3],
            "at most half of the kernel",
        ),
    ];
    for (text, weight, right) in cases {
        let told = fit(&text, &weight).unwrap_err().to_string();
        assert!(told.contains(right) && told.len() < 4000, "{right:?} is not in {told}");
    }
    let none = Shapes::infer(&Graph::parse(&small(|_| {})).unwrap(), &BTreeMap::new()).unwrap_err().to_string();
    assert!(none.contains("there is no tensor stem.weight"), "{none}");
    let more =
        fit(&small(|_| {}), &[5, 3, 3, 3]).unwrap().check_used(["stem.weight", "x", "dreamfeed.y"].into_iter());
    assert_eq!(more.unwrap_err().mistakes(), ["no node takes the tensor \"x\"; leave it out"]);
}

#[test]
fn numbers_have_one_spelling() {
    for (value, text) in [
        (1.0, "1"),
        (-0.0, "0"),
        (1e-5, "0.00001"),
        (1e-6, "0.000001"),
        (1e-7, "1e-7"),
        (1.5e-10, "1.5e-10"),
        (0.1, "0.1"),
        (123.25, "123.25"),
        (1e20, "100000000000000000000"),
        (1e21, "1e+21"),
        (-2.5e22, "-2.5e+22"),
        (0.353_553_390_593_273_8, "0.3535533905932738"),
        (5e-324, "5e-324"),
    ] {
        assert_eq!(json::real_as_text(value), text);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn a_number_is_read_as_it_was_written(bits: u64) {
        let value = f64::from_bits(bits);
        prop_assume!(value.is_finite());
        let read = json::parse(&format!("[{}]", json::real_as_text(value))).unwrap();
        prop_assert_eq!(read[0].as_f64(), Some(value));
    }

    /// Whatever becomes of a text and of shapes, the answer is a graph or a short sentence.
    #[test]
    fn nothing_from_outside_panics(
        which in 0..FILES.len(),
        changes in proptest::collection::vec((0.0..1.0f64, 0usize..12), 1..4),
        spoiled in 0usize..8,
    ) {
        let mut text = text(FILES[which]);
        let hostile = ["0", "-1", "1", "7", "2147483647", "-2147483647", "9007199254740993", "1e300", "null", "[]", "\"inf\"", "[[1,2]]"];
        for (place, with) in changes {
            let numbers: Vec<usize> = text.match_indices(|c: char| c.is_ascii_digit()).map(|(at, _)| at).collect();
            let at = numbers[((numbers.len() - 1) as f64 * place) as usize];
            text.replace_range(at..=at, hostile[with]);
        }
        let told = match Graph::parse(&text) {
            Ok(graph) => {
                prop_assert_eq!(&Graph::parse(&graph.encode()).unwrap(), &graph);
                let mut tensors: BTreeMap<String, Vec<usize>> =
                    file(FILES[which]).tensors().map(|(name, tensor)| (name.to_owned(), tensor.shape.to_vec())).collect();
                if let Some(shape) = tensors.values_mut().nth(spoiled) {
                    shape[0] = [usize::MAX, 1, MAX_SIZE, 0][spoiled % 4];
                }
                Shapes::infer(&graph, &tensors).map_or_else(|e| e.to_string(), |_| String::new())
            }
            Err(error) => error.to_string(),
        };
        prop_assert!(told.len() < 8000, "{}", told);
    }
}
