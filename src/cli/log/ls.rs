//! `dreamfeed log ls`: the chunks of a log.

use std::fmt::Write;

use bytesize::ByteSize;
use serde_json::json;

use super::{StoreArgs, counted, headline, images, print};
use crate::log::Entry;
use crate::log::inspect;

/// Lists the chunks of a log, oldest first.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    store: StoreArgs,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(args: Args) -> anyhow::Result<()> {
    let storage = args.store.open()?;
    let log = args.store.found(inspect::inspect(&storage).await)?;
    let total: u64 = log.entries.iter().map(|entry| u64::from(entry.summary.count)).sum();
    let bytes: u64 = log.entries.iter().map(|entry| entry.bytes).sum();
    if args.json {
        let segments = |segments: &[(u64, u64)]| -> Vec<_> {
            segments.iter().map(|(first, end)| json!({ "first_sequence": first, "end": end })).collect()
        };
        let report = json!({
            "location": storage.location(), "log": log.identity,
            "chunks": log.entries.iter().map(entry_json).collect::<Vec<_>>(), "images": total, "bytes": bytes,
            "damaged": log.damaged.iter().map(|damaged| &damaged.name).collect::<Vec<_>>(),
            "quarantined": segments(&log.quarantined), "evicted": segments(&log.evicted), "strange": log.strange,
        });
        return Ok(print(&format!("{report}\n"))?);
    }
    let mut text = headline(&storage, &log.identity);
    if !log.entries.is_empty() {
        writeln!(
            text,
            "{:>12} {:>8} {:>10}  {:24} {:>11} {:>11}  REPLICA",
            "FIRST", "IMAGES", "SIZE", "CREATED", "STUDENTS", "COMPETITION"
        )?;
    }
    for Entry { summary, bytes } in &log.entries {
        let (oldest, newest) = summary.student_versions;
        writeln!(
            text,
            "{:>12} {:>8} {:>10}  {:24} {:>11} {:>11.4}  {}",
            summary.first_sequence,
            summary.count,
            ByteSize(*bytes).to_string(),
            humantime::format_rfc3339_millis(summary.created_at).to_string(),
            if oldest == newest { newest.to_string() } else { format!("{oldest}-{newest}") },
            summary.competition / f64::from(summary.count),
            summary.replica
        )?;
    }
    let first = log.entries.first().map_or(0, |entry| entry.summary.first_sequence);
    let end = log.entries.iter().map(|entry| entry.summary.end()).max().unwrap_or(0);
    let chunks = counted(log.entries.len() as u64, "chunk");
    writeln!(text, "{chunks} with {}, of {}, {}", counted(total, "image"), images(first..end), ByteSize(bytes))?;
    let wrong = log.damaged.len() + log.quarantined.len() + log.strange.len();
    if wrong > 0 {
        let objects = counted(wrong as u64, "object");
        writeln!(text, "{objects} beside them: dreamfeed log verify says what is wrong")?;
    }
    Ok(print(&text)?)
}

fn entry_json(Entry { summary, bytes }: &Entry) -> serde_json::Value {
    let classes = summary.classes.iter().map(|(class, images, competition)| {
        json!({ "class": class, "images": images, "competition_mean": f64::from(*competition) / f64::from(*images) })
    });
    json!({
        "object": inspect::object_name(summary.first_sequence),
        "first_sequence": summary.first_sequence, "count": summary.count, "bytes": bytes,
        "created_at": humantime::format_rfc3339_millis(summary.created_at).to_string(),
        "student_versions": [summary.student_versions.0, summary.student_versions.1],
        "competition_mean": summary.competition / f64::from(summary.count),
        "classes": classes.collect::<Vec<_>>(),
        "replica": summary.replica, "data_sha256": summary.data_sha256,
    })
}
