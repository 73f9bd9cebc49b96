//! `dreamfeed evaluate`: a network's accuracy on labelled pictures.

use std::path::PathBuf;

use crate::device::DeviceArgs;
use crate::model::labelled::LabelledImages;
use crate::model::source::{NetworkSource, SourceOptions};
use crate::synthesis::Teacher;

/// Prints a network's accuracy on labelled pictures.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The network, a safetensors file.
    #[arg(long, value_name = "FILE")]
    model: PathBuf,
    #[command(flatten)]
    source: SourceOptions,
    /// Labelled pictures: a file in CIFAR binary format (records of 1 byte of class and C*H*W bytes of pixels), or a folder
    /// with a subfolder of .png and .jpg files for each class.
    #[arg(long, value_name = "PATH")]
    data: PathBuf,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print one JSON object: {"accuracy": 0.91, "count": 5000}.
    #[arg(long)]
    json: bool,
}

/// Runs the subcommand.
pub fn run(args: Args) -> anyhow::Result<()> {
    let device = args.device.prepare()?;
    let source = NetworkSource::open(&args.model, &args.source)?;
    let data = LabelledImages::open(&args.data, source.geometry, &source.class_names, source.spec.num_classes)?;
    let network = Teacher::load(&source, device, tch::Kind::Float);
    let accuracy = data.accuracy(|pixels| network.network.logits(&network.pixels.normalize(pixels)));
    if args.json {
        say!("{}", serde_json::json!({ "accuracy": accuracy, "count": data.count() }));
    } else {
        say!("accuracy {:.2} % on {} pictures", accuracy * 100.0, data.count());
    }
    Ok(())
}
