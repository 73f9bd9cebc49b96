//! `dreamfeed bench rpc`: how soon a daemon answers.

use std::time::{Duration, Instant};

use super::quantile;
use crate::client::Client;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The daemon's address.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:7461")]
    connect: String,
    /// Calls of Describe to make.
    #[arg(long, default_value_t = 500)]
    calls: usize,
    /// The pause between two calls.
    #[arg(long, default_value = "20ms", value_parser = humantime::parse_duration)]
    pause: Duration,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// Calls Describe again and again.
pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let mut seconds = runtime.block_on(async {
        let client = Client::connect(&args.connect).await?;
        let mut seconds = Vec::with_capacity(args.calls);
        for _ in 0..args.calls {
            let began = Instant::now();
            client.describe().await?;
            seconds.push(began.elapsed().as_secs_f64());
            tokio::time::sleep(args.pause).await;
        }
        Ok::<_, crate::client::ClientError>(seconds)
    })?;
    seconds.sort_by(f64::total_cmp);
    let quantile = |part| 1e3 * quantile(&seconds, part);
    let (p50, p99, longest) = (quantile(0.5), quantile(0.99), quantile(1.0));
    if args.json {
        let report = serde_json::json!({
            "calls": args.calls, "p50_milliseconds": p50, "p99_milliseconds": p99, "max_milliseconds": longest,
        });
        say!("{report}");
    } else {
        say!("Describe, {} calls: p50 {p50:.2} ms, p99 {p99:.2} ms, longest {longest:.2} ms", args.calls);
    }
    Ok(())
}
