//! The identity of a network's file decides which store it may go on with, so it may never change for a file of today.

use std::path::{Path, PathBuf};

use crate::support::{ARCH, CHANNELS, CLASSES, file, network};
use dreamfeed::model::source::{NetworkSource, NumberList, SourceOptions};

/// Computed from the files by other means: SHA-256 over name, dtype, shape and data of every tensor in order of name.
const IDENTITIES: [(&str, &str, &str); 5] = [
    ("tests/golden/teacher", "resnet8", "cddbb01a082e9f10b3374e7be2c1c9d3d426cc0e16026707d90732788fc744a2"),
    ("tests/golden/student", "resnet8", "fdf40564eac126dbe0660562052fe3f6e6abac0c5aa2a49795eccfcdb6f13439"),
    (
        "../shared/models/cifar_resnet20",
        "resnet20",
        "b5be36dc2d5bffc19ca131716744c601e5f36deaec82fbcf58035f78e8f111dd",
    ),
    (
        "../shared/models/cifar_resnet20_first5",
        "resnet20",
        "d7ec8cc9255b4b8b9c8ff28f6292bc411e91caeb2ad35bd8a8777d4c30d736b1",
    ),
    (
        "../shared/models/cifar_resnet56",
        "resnet56",
        "cf5c3675b94824f889ea3dbc9d1464628eb75d7586e59d068573e6390e677ab7",
    ),
];

fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("{name}.safetensors"))
}

#[test]
fn the_identities_of_five_checkpoints_stay_as_they_are() {
    for (name, arch, identity) in IDENTITIES {
        // The trained checkpoints do not lie in the repository.
        if name.starts_with("../") && !path(name).exists() {
            eprintln!("skipped: {name} is missing");
            continue;
        }
        let options = SourceOptions {
            arch: Some(arch.to_owned()),
            mean: Some(NumberList(vec![0.485, 0.456, 0.406])),
            std: Some(NumberList(vec![0.229, 0.224, 0.225])),
            image_size: None,
        };
        assert_eq!(NetworkSource::open(&path(name), &options).unwrap().identity, identity, "{name}");
    }
}

#[test]
fn metadata_is_no_part_of_the_identity_and_every_weight_is() {
    let folder = tempfile::tempdir().unwrap();
    let identity = |seed: u64, mean: &str, more: &[(&str, &str)]| {
        let path = folder.path().join("network.safetensors");
        let metadata = [&[("arch", ARCH), ("mean", mean), ("std", "0.25")], more].concat();
        std::fs::write(&path, file(&network(ARCH, CHANNELS, CLASSES, seed), &metadata)).unwrap();
        NetworkSource::open(&path, &SourceOptions::default()).unwrap().identity
    };
    let one = identity(1, "0.5", &[]);
    assert_eq!(one, identity(1, "0.25", &[("image_size", "8,8"), ("comment", "the same weights")]));
    assert_ne!(one, identity(2, "0.5", &[]));
}
