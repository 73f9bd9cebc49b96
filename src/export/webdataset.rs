//! WebDataset: tar files in which the entries of one sample follow each other under one key.

use std::io;

use tar::{Builder, Header};

use super::Sample;
use super::shards::Shard;
use crate::files::NewFile;

/// One tar shard of KEY.png, KEY.cls (the class in decimal digits) and KEY.json (a [`super::Record`]).
pub(super) struct TarFile(Builder<NewFile>);

impl TarFile {
    fn append(&mut self, name: String, bytes: &[u8]) -> io::Result<()> {
        // Owner and time stay 0: the same images are the same bytes.
        let mut header = Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        self.0.append_data(&mut header, name, bytes)
    }
}

impl Shard for TarFile {
    const EXTENSION: &'static str = "tar";

    fn begin(file: NewFile, _: usize) -> io::Result<Self> {
        Ok(Self(Builder::new(file)))
    }

    fn write(&mut self, sample: &Sample<'_>) -> io::Result<()> {
        let Sample { key, png, record } = sample;
        self.append(format!("{key}.png"), png)?;
        self.append(format!("{key}.cls"), record.label.to_string().as_bytes())?;
        self.append(format!("{key}.json"), &serde_json::to_vec(record)?)
    }

    fn finish(self) -> io::Result<()> {
        self.0.into_inner()?.complete()
    }
}
