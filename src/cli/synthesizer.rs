//! `dreamfeed synthesizer`: lets a running daemon make its images by another tier.

use std::time::Duration;

use super::trainer::LONGEST_PATIENCE;
use crate::client::{Client, ClientError};
use crate::synthesis::settings::SynthesizerKind;

/// Lets a running daemon make its images by another synthesizer, from the next batch on; no stream ends.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The synthesizer.
    #[arg(value_enum)]
    name: SynthesizerKind,
    /// The daemon's address.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:7461")]
    connect: String,
    /// How long to wait for the daemon and its answer.
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = humantime::parse_duration)]
    connect_timeout: Duration,
}

/// Runs the subcommand.
pub fn run(args: Args) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let within = args.connect_timeout.min(LONGEST_PATIENCE);
    let call = async { Client::connect(&args.connect).await?.set_synthesizer(args.name.name()).await };
    let changed = runtime.block_on(async { tokio::time::timeout(within, call).await });
    // Not waiting for a name that is still being looked up.
    runtime.shutdown_background();
    let unanswered = |_| ClientError::Unanswered { url: args.connect.clone(), within };
    let synthesizer = changed.map_err(unanswered)??;
    say!("{} from the next batch on", synthesizer.name);
    Ok(())
}
