//! A folder for each class with PNG files in it, as torchvision's `ImageFolder` reads it, and `metadata.jsonl`, with which
//! Hugging Face's `imagefolder` reads the rest. A class without an image has no folder.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::shards::PartialFile;
use super::{Record, Sample, Sink, cannot_write};

/// CLASS/KEY.png, and a line of JSON for each image.
pub(super) struct ImageFolder {
    folder: PathBuf,
    /// So many digits has a class, so that the order of names is the order of classes.
    digits: usize,
    /// From the first image on.
    metadata: Option<PartialFile>,
    images: u64,
}

#[derive(Serialize)]
struct Line<'a> {
    file_name: &'a str,
    #[serde(flatten)]
    record: &'a Record<'a>,
}

impl ImageFolder {
    pub fn new(folder: &Path, num_classes: usize) -> Self {
        let digits = num_classes.saturating_sub(1).to_string().len();
        Self { folder: folder.to_owned(), digits, metadata: None, images: 0 }
    }
}

impl Sink for ImageFolder {
    fn write(&mut self, sample: &Sample<'_>) -> io::Result<()> {
        let Sample { key, png, record } = sample;
        let class = format!("{:0digits$}", record.label, digits = self.digits);
        let file_name = format!("{class}/{key}.png");
        let (folder, path) = (self.folder.join(class), self.folder.join(&file_name));
        std::fs::create_dir_all(&folder).map_err(cannot_write(&folder))?;
        std::fs::write(&path, png).map_err(cannot_write(&path))?;
        let mut line = serde_json::to_vec(&Line { file_name: &file_name, record })?;
        line.push(b'\n');
        self.images += 1;
        let metadata = match &mut self.metadata {
            Some(metadata) => metadata,
            none => none.insert(PartialFile::create(&self.folder.join("metadata.jsonl"))?),
        };
        metadata.write_all(&line)
    }

    fn finish(self: Box<Self>) -> io::Result<u64> {
        let metadata = u64::from(self.metadata.is_some());
        self.metadata.map_or(Ok(()), PartialFile::complete)?;
        Ok(self.images + metadata)
    }
}
