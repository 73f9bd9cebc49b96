//! `dreamfeed synthesizer`: lets a running daemon make its images by another tier.

use crate::client::Client;
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
}

/// Runs the subcommand.
pub fn run(args: Args) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let client = Client::connect(&args.connect).await?;
        let synthesizer = client.set_synthesizer(args.name.name()).await?;
        say!("{} from the next batch on", synthesizer.name);
        Ok(())
    })
}
