//! A folder for each class with PNG files in it, as torchvision's `ImageFolder` reads it, and `metadata.jsonl`, with which
//! Hugging Face's `imagefolder` reads the rest. A class without an image has a folder too: readers number the folders.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::{Record, Sample, Sink};
use crate::files::{NewFile, cannot_write};

/// Files that get their names together; each is open until then.
const MOST_UNNAMED: usize = 128;

/// CLASS/KEY.png, and a line of JSON for each image.
pub(super) struct ImageFolder {
    folder: PathBuf,
    num_classes: usize,
    /// From the first image on.
    metadata: Option<NewFile>,
    /// Written, and not yet under their names.
    unnamed: Vec<NewFile>,
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
        Self { folder: folder.to_owned(), num_classes, metadata: None, unnamed: Vec::new(), images: 0 }
    }

    /// The name of a class, with leading zeros, so that the order of names is the order of classes.
    fn name(&self, class: impl std::fmt::Display) -> String {
        let digits = self.num_classes.saturating_sub(1).to_string().len();
        format!("{class:0>digits$}")
    }

    fn begin(&self) -> io::Result<NewFile> {
        for class in 0..self.num_classes {
            let folder = self.folder.join(self.name(class));
            std::fs::create_dir_all(&folder).map_err(cannot_write(&folder))?;
        }
        NewFile::create(&self.folder.join("metadata.jsonl"))
    }
}

impl Sink for ImageFolder {
    fn write(&mut self, sample: &Sample<'_>) -> io::Result<()> {
        let Sample { key, png, record } = sample;
        let mut metadata = match self.metadata.take() {
            Some(metadata) => metadata,
            None => self.begin()?,
        };
        let file_name = format!("{}/{key}.png", self.name(record.label));
        let mut file = NewFile::create(&self.folder.join(&file_name))?;
        file.write_all(png)?;
        self.unnamed.push(file);
        if self.unnamed.len() >= MOST_UNNAMED {
            NewFile::complete_all(std::mem::take(&mut self.unnamed))?;
        }
        let mut line = serde_json::to_vec(&Line { file_name: &file_name, record })?;
        line.push(b'\n');
        metadata.write_all(&line)?;
        self.metadata = Some(metadata);
        self.images += 1;
        Ok(())
    }

    fn finish(self: Box<Self>) -> io::Result<u64> {
        let metadata = u64::from(self.metadata.is_some());
        NewFile::complete_all(self.unnamed)?;
        self.metadata.map_or(Ok(()), NewFile::complete)?;
        Ok(self.images + metadata)
    }
}
