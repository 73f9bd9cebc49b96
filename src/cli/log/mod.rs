//! `dreamfeed log`: looks at a store without a daemon, and changes nothing in it.

mod export;
mod ls;
mod show;
mod verify;

use std::ops::Range;

use super::print;
use crate::log::{Identity, OpenError};
use crate::storage::Storage;

/// Looks at a log in its store, without a daemon; changes nothing in it.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    Ls(ls::Args),
    Verify(verify::Args),
    Show(show::Args),
    Export(export::Args),
}

/// The store, the same flag everywhere.
#[derive(Debug, clap::Args)]
struct StoreArgs {
    /// The store of a daemon: a folder, or s3://bucket/prefix, gs://..., az://... with credentials from the environment.
    #[arg(long, value_name = "LOCATION")]
    store: String,
}

impl StoreArgs {
    fn open(&self) -> anyhow::Result<Storage> {
        Ok(Storage::open_existing(&self.store)?)
    }

    /// What a look at the log found; an error where there is no log.
    fn found<T>(&self, found: Result<Option<T>, OpenError>) -> anyhow::Result<T> {
        found?.ok_or_else(|| {
            let store = &self.store;
            anyhow::anyhow!("there is no log in {store}; give the --store of a daemon that has run")
        })
    }
}

/// Runs the subcommand.
pub fn run(args: Args) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        match args.what {
            What::Ls(args) => ls::run(args).await,
            What::Verify(args) => verify::run(args).await,
            What::Show(args) => show::run(args).await,
            What::Export(args) => export::run(args).await,
        }
    })
}

/// `images 0 to 63`: both are of the range.
fn images(range: Range<u64>) -> String {
    match range.end.saturating_sub(range.start) {
        0 => "no image".into(),
        1 => format!("image {}", range.start),
        _ => format!("images {} to {}", range.start, range.end - 1),
    }
}

/// `1 chunk`, `2 chunks`.
fn counted(count: u64, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// One line about the log.
fn headline(storage: &Storage, log: &Identity) -> String {
    let teacher: String = log.teacher_sha256.chars().take(12).collect();
    let (id, place, geometry, classes) = (log.log_id, storage.location(), log.geometry(), log.num_classes);
    format!("log {id} in {place}: images {geometry}, {classes} classes, teacher {teacher}\n")
}
