//! `dreamfeed prune`, from outside; and that a network without channels that do nothing does the same.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Command, Output};

use crate::support::{ARCH, Daemon, file, network, write_teacher};
use dreamfeed::model::channels::{Channel, Group, batch_norms, groups, without};
use dreamfeed::model::checkpoint::Checkpoint;
use dreamfeed::model::spec::NetworkSpec;
use dreamfeed::model::trainable::TrainableNetwork;
use tch::{Device, Kind, Tensor};

fn prune(folder: &Path, arguments: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dreamfeed"));
    command.args(["prune", "--device", "cpu", "--threads", "1", "--batch-size", "8", "--min-images", "16", "--json"]);
    command.args(["--rounds", "3", "--steps-per-round", "2", "--fine-tune-steps", "3", "--push-every", "2"]);
    command
        .arg("--model")
        .arg(folder.join("teacher.safetensors"))
        .arg("--out")
        .arg(folder.join("pruned.safetensors"));
    command.args(arguments).output().unwrap()
}

fn summary(output: Output) -> serde_json::Value {
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{errors}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_network_shrinks_to_its_target_and_is_the_daemons_student() {
    let daemon = Daemon::start(&["--batch-size", "16", "--max-images", "32"]);
    let folder = daemon.folder.path();
    let grpc = format!("http://{}", daemon.grpc);
    for (target, part) in [("flops", "0.4"), ("parameters", "0.3"), ("filters", "0.5")] {
        let summary = summary(prune(folder, &[&format!("--{target}"), part, "--connect", &grpc]));
        let number = |when: &str| summary[when][target].as_f64().unwrap();
        let left = number("pruned") / number("before");
        let wanted = 1.0 - part.parse::<f64>().unwrap();
        assert!(left <= wanted && left > wanted - 0.1, "{target}: {left} of {wanted}");
        assert_eq!(number("tuned"), number("pruned"));
        assert_eq!((&summary["steps"], &summary["complete"]), (&9.into(), &true.into()));

        // It loads by its shapes, and is what the daemon holds.
        let pruned = Checkpoint::open(&folder.join("pruned.safetensors")).unwrap();
        let spec = NetworkSpec::from_checkpoint(ARCH, &pruned).unwrap();
        assert_eq!(spec.num_parameters() as f64, summary["tuned"]["parameters"].as_f64().unwrap());
        let student = daemon.client().await.fetch_student(0).await.unwrap().unwrap();
        assert_eq!(student.checkpoint.identity(), pruned.identity());
    }
    assert!(daemon.metric("dreamfeed_pushes_total{outcome=\"accepted\"}").unwrap() >= 9.0);
}

#[test]
fn pictures_do_in_place_of_a_daemon() {
    let folder = tempfile::tempdir().unwrap();
    write_teacher(folder.path());
    let records: Vec<u8> = (0..20u8).flat_map(|at| std::iter::once(at % 10).chain([at * 12; 64])).collect();
    let data = folder.path().join("pictures.bin");
    std::fs::write(&data, records).unwrap();
    let data = data.to_str().unwrap();
    let more = ["--flops", "0.5", "--latency-weight", "0.5", "--pictures", data, "--test-data", data];
    let summary = summary(prune(folder.path(), &more));
    for when in ["before", "pruned", "tuned"] {
        assert!((0.0..=1.0).contains(&summary[when]["accuracy"].as_f64().unwrap()));
        assert!(summary[when]["batch_seconds"].as_f64().unwrap() > 0.0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn mistakes_are_told_in_one_sentence() {
    let daemon = Daemon::start(&["--batch-size", "16", "--max-images", "32"]);
    let folder = tempfile::tempdir().unwrap();
    let metadata = [("arch", ARCH), ("mean", "0.5"), ("std", "0.25"), ("image_size", "8,8")];
    std::fs::write(folder.path().join("teacher.safetensors"), file(&network(ARCH, 1, 10, 7), &metadata)).unwrap();
    let grpc = format!("http://{}", daemon.grpc);
    let refused = |arguments: &[&str], code: i32, parts: &[&str]| {
        let output = prune(folder.path(), arguments);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{errors}");
        assert!(parts.iter().all(|part| errors.contains(part)), "{parts:?} in {errors}");
    };
    refused(&["--flops", "0.4", "--connect", &grpc], 1, &["the daemon dreams from the network", "--model"]);
    refused(&["--flops", "1.5"], 1, &["--flops is 1.5", "between 0 and 1"]);
    refused(&["--flops", "0.4", "--filters", "0.4"], 2, &["cannot be used with"]);
    refused(&[], 2, &["--flops"]);
}

#[test]
fn without_channels_that_do_nothing_a_network_does_the_same() {
    for (arch, skip) in [("resnet20", 3), ("resnet20-projection", 2), ("resnet18", 5)] {
        tch::manual_seed(1);
        let spec = NetworkSpec::fresh(arch, 3, 10).unwrap();
        let whole = TrainableNetwork::fresh(&spec, Device::Cpu);
        let removed: BTreeSet<Channel> = groups(&spec).iter().step_by(skip).flat_map(Group::channels).collect();
        tch::no_grad(|| {
            for (prefix, place) in batch_norms(&spec) {
                let of = |part: &str| whole.parameter(&format!("{prefix}.{part}")).unwrap().shallow_clone();
                let mean = of("running_mean");
                let _ = mean.shallow_clone().normal_(0.0, 0.3);
                let _ = of("bias").normal_(0.0, 0.3);
                for (_, channel) in removed.iter().filter(|(other, _)| *other == place) {
                    for part in ["weight", "bias"] {
                        let _ = of(part).get(*channel as i64).fill_(0.0);
                    }
                }
            }
        });
        let (smaller, kept) = without(&spec, &removed);
        let shrunk = whole.shrunk(&smaller, &kept);
        assert!(shrunk.parameters().zip(whole.parameters()).any(|(a, b)| a.1.numel() < b.1.numel()));
        for expected in smaller.tensors() {
            let size: Vec<i64> = expected.shape.iter().map(|d| *d as i64).collect();
            assert_eq!(shrunk.parameter(&expected.name).unwrap().size(), size, "{arch}: {}", expected.name);
        }
        let x = Tensor::randn([4, 3, 32, 32], (Kind::Float, Device::Cpu));
        let difference = (whole.logits(&x) - shrunk.logits(&x)).abs().max().double_value(&[]);
        assert!(difference < 1e-3, "{arch}: logits differ by {difference}");
    }
}
