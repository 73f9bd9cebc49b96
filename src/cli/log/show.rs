//! `dreamfeed log show`: one chunk.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::path::PathBuf;

use serde_json::json;

use super::{StoreArgs, images, print};
use crate::export::records;
use crate::files::write_whole;
use crate::grid;
use crate::log::inspect;

/// Shows the chunk that holds an image: its metadata, and its images in a PNG grid.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The image's sequence.
    sequence: u64,
    #[command(flatten)]
    store: StoreArgs,
    /// Where to write the PNG grid.
    #[arg(long, value_name = "FILE.png")]
    grid: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub(super) async fn run(args: Args) -> anyhow::Result<()> {
    let storage = args.store.open()?;
    let log = args.store.found(inspect::identity(&storage).await)?;
    let chunk = inspect::find(&storage, &log, args.sequence).await?;
    let image = records(&chunk).find(|record| record.sequence == args.sequence);
    // After what was asked of standard output: a full disk does not cost that.
    let draw = || match &args.grid {
        Some(path) => {
            let columns = (chunk.count() as usize).isqrt().max(10);
            write_whole(path, &grid::png_of_all(chunk.images(), chunk.geometry, columns)?)
        }
        None => Ok(()),
    };
    let object = inspect::object_name(chunk.first_sequence());
    let bytes = chunk.payload().len();
    let metadata: BTreeMap<_, _> = chunk.metadata().iter().collect();
    let classes: BTreeMap<u32, u32> =
        chunk.summary.classes.iter().map(|(class, images, _)| (*class, *images)).collect();
    if args.json {
        let report = json!({
            "object": object, "bytes": bytes, "first_sequence": chunk.first_sequence(), "count": chunk.count(),
            "metadata": metadata, "classes": classes, "image": image,
        });
        print(&format!("{report}\n"))?;
        return Ok(draw()?);
    }
    let mut text = format!("{object}: {}, {bytes} bytes\n", images(chunk.first_sequence()..chunk.end()));
    for (key, value) in metadata {
        writeln!(text, "{key:16} {value}")?;
    }
    let classes: Vec<String> = classes.iter().map(|(class, images)| format!("{class}: {images}")).collect();
    writeln!(text, "{:16} {}", "images by class", classes.join(", "))?;
    if let Some(image) = image {
        let (label, student, competition) = (image.label, image.student_version, image.competition);
        let name = format!("image {}", image.sequence);
        writeln!(text, "{name:16} class {label}, student {student}, competition {competition}")?;
    }
    print(&text)?;
    Ok(draw()?)
}
