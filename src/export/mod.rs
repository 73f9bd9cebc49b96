//! A log's images in formats that others read: a folder of PNG files, WebDataset tar shards, Parquet. Streams chunk by
//! chunk, so that memory does not grow with the log, and takes no image that is damaged.

mod folder;
mod parquet;
mod shards;
mod webdataset;

use std::collections::BTreeSet;
use std::io;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};

use futures_util::{StreamExt, pin_mut};
use serde::Serialize;

use crate::files::cannot_write;
use crate::grid;
use crate::log::inspect::{self, InspectError};
use crate::log::{Chunk, Identity};
use crate::storage::{Storage, StorageError, blocking};

use self::parquet::ParquetFile;
use folder::ImageFolder;
use shards::Shards;
use webdataset::TarFile;

/// What an export makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// PNG files in a folder for each class, and metadata.jsonl.
    Folder,
    /// Tar shards of KEY.png, KEY.cls and KEY.json.
    Webdataset,
    /// Parquet files that Hugging Face `datasets` decodes.
    Parquet,
}

/// Which images.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selection {
    /// The first sequence.
    pub from: u64,
    /// The sequence behind the last one; None = to the end.
    pub to: Option<u64>,
    /// Only these classes; empty = all.
    pub classes: BTreeSet<usize>,
}

/// What was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exported {
    /// Images written.
    pub images: u64,
    /// Files written.
    pub files: u64,
    /// Chunks that were left out because they are damaged: name and problem.
    pub left_out: Vec<(String, String)>,
}

/// Why an export ended early.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The storage failed.
    #[error(transparent)]
    Storage(#[from] StorageError),
    /// The folder holds something.
    #[error("{} is not empty; give --out a folder that is empty, or that is not there yet", .0.display())]
    NotEmpty(PathBuf),
    /// No such class.
    #[error("there is no class {class}: the log's classes are 0 to {last}")]
    Class {
        /// What was asked for.
        class: usize,
        /// The largest class.
        last: usize,
    },
    /// A file could not be written; the sentence names it.
    #[error(transparent)]
    Write(#[from] io::Error),
    /// The process could not go on.
    #[error("{0}")]
    Internal(String),
}

/// One image and what is known of it, as the files have it.
struct Sample<'a> {
    /// Its sequence in 20 digits.
    key: String,
    png: Vec<u8>,
    record: Record<'a>,
}

/// What is known of an image. A number that is not finite is null.
#[derive(Debug, Serialize)]
pub struct Record<'a> {
    /// Its place in the log.
    pub sequence: u64,
    /// The class that it was made for.
    pub label: i64,
    /// The newest student that it was optimized against; 0 = none.
    pub student_version: i64,
    /// JS divergence of teacher and student in nats.
    pub competition: f32,
    /// The teacher's logits on it, `[K]`.
    pub teacher_logits: Vec<f32>,
    /// Its pixels `[C, H, W]`; in no file's metadata.
    #[serde(skip)]
    pub pixels: &'a [u8],
}

/// A chunk's images, one by one.
pub fn records(chunk: &Chunk) -> impl Iterator<Item = Record<'_>> {
    let scalars = chunk.labels().iter().zip(chunk.student_versions()).zip(chunk.competition());
    let logits = chunk.teacher_logits().chunks_exact((4 * chunk.num_classes).max(1));
    let pixels = chunk.images().chunks_exact(chunk.geometry.pixels().max(1));
    let rows = (chunk.first_sequence()..).zip(scalars).zip(logits).zip(pixels);
    rows.map(|(((sequence, ((label, student_version), competition)), logits), pixels)| Record {
        sequence,
        label: i64::from_le_bytes(*label),
        student_version: i64::from_le_bytes(*student_version),
        competition: f32::from_le_bytes(*competition),
        teacher_logits: logits.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
        pixels,
    })
}

/// Takes images in their order.
trait Sink: Send {
    fn write(&mut self, sample: &Sample<'_>) -> io::Result<()>;
    /// Completes what is open; returns the number of files.
    fn finish(self: Box<Self>) -> io::Result<u64>;
}

/// Writes the selected images of a log into an empty or new folder, in order of sequence, each once; tar and Parquet
/// files hold `shard_images` each. A file has its name only once it is complete. Damaged chunks are left out and named in the result; what a daemon evicts in the meantime is left out too.
pub async fn export(
    storage: &Storage,
    log: &Identity,
    selection: &Selection,
    format: Format,
    out: &Path,
    shard_images: NonZeroU64,
) -> Result<Exported, ExportError> {
    let last = log.num_classes.saturating_sub(1);
    if let Some(class) = selection.classes.iter().copied().find(|class| *class > last) {
        return Err(ExportError::Class { class, last });
    }
    let firsts = inspect::first_sequences(storage).await?;
    let made = take_folder(out)?;
    let num_classes = log.num_classes;
    let mut sink: Box<dyn Sink> = match format {
        Format::Folder => Box::new(ImageFolder::new(out, num_classes)),
        Format::Webdataset => Box::new(Shards::<TarFile>::new(out, shard_images, num_classes)),
        Format::Parquet => Box::new(Shards::<ParquetFile>::new(out, shard_images, num_classes)),
    };
    let begin = firsts.partition_point(|first| *first <= selection.from).saturating_sub(1);
    let before_end = |first: &u64| selection.to.is_none_or(|to| *first < to);
    let chunks = inspect::load_all(storage, log, firsts.into_iter().skip(begin).take_while(before_end));
    pin_mut!(chunks);
    let mut exported = Exported::default();
    let mut next = selection.from;
    while let Some(chunk) = chunks.next().await {
        let chunk = match chunk {
            Ok(chunk) => chunk,
            Err(InspectError::Storage(error)) => return Err(error.into()),
            Err(InspectError::Damaged { name, problem } | InspectError::Foreign { name, problem }) => {
                exported.left_out.push((name, problem));
                continue;
            }
            Err(InspectError::Missing(_) | InspectError::NotHeld(_)) => continue,
        };
        // Where two chunks overlap, an image is written once.
        let wanted = Selection { from: next, ..selection.clone() };
        next = next.max(chunk.end());
        let images;
        let written = blocking(move || (write_chunk(&mut *sink, &chunk, &wanted), sink));
        (images, sink) = written.await.map_err(ExportError::Internal)?;
        exported.images += images?;
    }
    exported.files = blocking(move || sink.finish()).await.map_err(ExportError::Internal)??;
    if exported.images == 0 && made {
        // Whoever asks again, for images that exist, should find the place as it was. It is empty; else this would fail.
        std::fs::remove_dir(out).map_err(cannot_write(out))?;
    }
    Ok(exported)
}

/// Writes what is wanted of a chunk; returns the number of images.
fn write_chunk(sink: &mut dyn Sink, chunk: &Chunk, wanted: &Selection) -> io::Result<u64> {
    let mut images = 0;
    for record in records(chunk) {
        let in_range = record.sequence >= wanted.from && wanted.to.is_none_or(|to| record.sequence < to);
        let of_class = || usize::try_from(record.label).is_ok_and(|class| wanted.classes.contains(&class));
        if !in_range || !(wanted.classes.is_empty() || of_class()) {
            continue;
        }
        let png = grid::png(record.pixels, chunk.geometry)?;
        sink.write(&Sample { key: format!("{:020}", record.sequence), png, record })?;
        images += 1;
    }
    Ok(images)
}

/// Makes the folder, and says whether it had to; one that holds something is refused.
fn take_folder(out: &Path) -> Result<bool, ExportError> {
    let made = !out.exists();
    std::fs::create_dir_all(out).map_err(cannot_write(out))?;
    match std::fs::read_dir(out).map_err(cannot_write(out))?.next() {
        None => Ok(made),
        Some(_) => Err(ExportError::NotEmpty(out.to_owned())),
    }
}
