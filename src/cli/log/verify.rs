//! `dreamfeed log verify`: whether a store is sound.

use std::fmt::Write;

use serde_json::json;

use super::{StoreArgs, counted, headline, images, print};
use crate::log::inspect;
use crate::log::verify::{Finding, Kind, elsewhere, verify};
use crate::{generators, students};

/// Reads everything in a store, and says what is wrong with it.
///
/// Every chunk's and every stored student's checksum, every stored generator, holes and overlaps in the log, whatever has
/// no business there (also names that are not UTF-8, links that lead nowhere, folders), and what lies in quarantine. Ends with 0 where nothing is wrong, else with 1. What retention evicted is a note:
/// daemons put it on record before they delete, so every other hole is a loss. So is what a put left that was broken off or
/// is under way: daemons remove it. Chunks missing behind the newest that is left cannot be noticed.
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
    let mut findings = elsewhere(&storage).await?;
    findings.extend(verify(&storage, &log).await?);
    let students = students::audit(&storage).await?;
    findings.extend(students.damaged.into_iter().map(|(name, why)| Finding::object(Kind::Student, name, why)));
    let generators = generators::audit(&storage).await?;
    findings.extend(generators.into_iter().map(|(name, why)| Finding::object(Kind::Generator, name, why)));

    let problems = findings.iter().filter(|finding| finding.kind.is_problem()).count() as u64;
    let total: u64 = log.entries.iter().map(|entry| u64::from(entry.summary.count)).sum();
    if args.json {
        let report = json!({
            "location": storage.location(), "log_id": log.identity.log_id, "sound": problems == 0,
            "chunks": log.entries.len(), "images": total, "sound_students": students.sound,
            "problems": problems, "findings": findings,
        });
        print(&format!("{report}\n"))?;
    } else {
        let mut text = headline(&storage, &log.identity);
        for finding in &findings {
            writeln!(text, "{:12} {}", finding.kind.name(), sentence(finding))?;
        }
        writeln!(
            text,
            "{} with {} and {} were read: {}",
            counted(log.entries.len() as u64, "chunk"),
            counted(total, "image"),
            counted(students.sound.len() as u64, "sound student"),
            if problems == 0 { "nothing is wrong".into() } else { counted(problems, "problem") }
        )?;
        print(&text)?;
    }
    anyhow::ensure!(problems == 0, "{} is not sound: {}", storage.location(), counted(problems, "problem"));
    Ok(())
}

fn sentence(finding: &Finding) -> String {
    let range = finding.first_sequence.zip(finding.end).map(|(first, end)| images(first..end));
    let subject = match (finding.object.clone(), range) {
        (Some(object), Some(range)) => format!("{object} ({range})"),
        (object, range) => object.or(range).unwrap_or_default(),
    };
    format!("{subject}: {}", finding.message)
}
