//! `dreamfeed log export`: a log's images for other tools.

use std::num::NonZeroU64;
use std::path::PathBuf;

use clap::error::ErrorKind;

use super::{StoreArgs, counted, print};
use crate::export::{Format, Selection, export};
use crate::log::inspect;

/// Images in one tar or Parquet file.
const SHARD_IMAGES: NonZeroU64 = NonZeroU64::MIN.saturating_add(9_999);

/// Exports images to a folder of PNG files, WebDataset shards or Parquet, in order of sequence.
///
/// Chunks that are damaged are left out and named, and the command then ends with 1.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    #[command(flatten)]
    store: StoreArgs,
    /// What to make.
    #[arg(long, value_enum)]
    format: Format,
    /// A folder that is empty or not there yet.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// The first sequence.
    #[arg(long, value_name = "SEQ", default_value_t = 0)]
    from: u64,
    /// The sequence behind the last one; default: the end of the log.
    #[arg(long, value_name = "SEQ")]
    to: Option<u64>,
    /// Only images made for these classes, for example 0,7; default: all.
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    classes: Vec<usize>,
    /// Images in one tar or Parquet file [default: 10000].
    #[arg(long, value_name = "N")]
    shard_images: Option<NonZeroU64>,
}

pub(super) async fn run(args: Args) -> anyhow::Result<()> {
    if args.shard_images.is_some() && args.format == Format::Folder {
        refuse("--shard-images has no meaning for a folder of images; leave it out");
    }
    if let Some(to) = args.to.filter(|to| *to <= args.from) {
        refuse(&format!("--from {} does not lie before --to {to}", args.from));
    }
    let storage = args.store.open()?;
    let log = args.store.found(inspect::identity(&storage).await)?;
    let selection = Selection { from: args.from, to: args.to, classes: args.classes.into_iter().collect() };
    let shard_images = args.shard_images.unwrap_or(SHARD_IMAGES);
    let exported = export(&storage, &log, &selection, args.format, &args.out, shard_images).await?;
    if exported.images > 0 {
        let (images, files) = (counted(exported.images, "image"), counted(exported.files, "file"));
        print(&format!("{images} in {files} in {}\n", args.out.display()))?;
    }
    for (name, problem) in &exported.left_out {
        eprintln!("left out {name}: {problem}");
    }
    let damaged = counted(exported.left_out.len() as u64, "damaged chunk");
    let rest = if exported.images > 0 { "the rest is there" } else { "nothing else was asked for" };
    anyhow::ensure!(exported.left_out.is_empty(), "{damaged} could not be exported; {rest}");
    anyhow::ensure!(exported.images > 0, "the log holds no image that was asked for");
    Ok(())
}

/// A usage error, as clap ends with one.
fn refuse(problem: &str) -> ! {
    clap::Error::raw(ErrorKind::ArgumentConflict, format!("{problem}\n")).exit()
}
