//! `dreamfeed bench`: measures the daemon's own code. The scripts in `benches/` put these together.

mod bare;
mod load;
mod plain;
mod rpc;
mod synth;

/// Measures the daemon's own code.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// The time of one optimizer step, all terms.
    Synth(Box<synth::Args>),
    /// The time that a daemon takes to answer a unary RPC, while it does whatever it does.
    Rpc(rpc::Args),
    /// What many subscribers get from a daemon: bytes a second, and the time from durable to received.
    Load(load::Args),
    /// A server that streams one message again and again through tonic's own encoder: what a daemon is compared with.
    Bare(bare::Args),
}

/// Runs the subcommand.
pub fn run(args: Args) -> anyhow::Result<()> {
    match args.what {
        What::Synth(args) => synth::run(*args),
        What::Rpc(args) => rpc::run(&args),
        What::Load(args) => load::run(&args),
        What::Bare(args) => bare::run(&args),
    }
}

/// The value below which this part of sorted values lies.
fn quantile(sorted: &[f64], part: f64) -> f64 {
    let index = (part * sorted.len() as f64).ceil() as usize;
    sorted.get(index.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}
