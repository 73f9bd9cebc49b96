//! Numbered files of a bounded number of images, each under its own name only once it is whole.

use std::io;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};

use super::{Sample, Sink};
use crate::files::NewFile;

/// One file of images.
pub(super) trait Shard: Sized + Send {
    const EXTENSION: &'static str;
    fn begin(file: NewFile, num_classes: usize) -> io::Result<Self>;
    fn write(&mut self, sample: &Sample<'_>) -> io::Result<()>;
    fn finish(self) -> io::Result<()>;
}

/// Files `dreams-000000.EXTENSION` and so on.
pub(super) struct Shards<S> {
    folder: PathBuf,
    num_classes: usize,
    most: NonZeroU64,
    /// The one being written, and its images so far.
    open: Option<(S, u64)>,
    files: u64,
}

impl<S: Shard> Shards<S> {
    pub fn new(folder: &Path, most: NonZeroU64, num_classes: usize) -> Self {
        Self { folder: folder.to_owned(), num_classes, most, open: None, files: 0 }
    }

    fn complete(&mut self) -> io::Result<()> {
        self.open.take().map_or(Ok(()), |(shard, _)| shard.finish())
    }
}

impl<S: Shard> Sink for Shards<S> {
    fn write(&mut self, sample: &Sample<'_>) -> io::Result<()> {
        if self.open.as_ref().is_some_and(|(_, images)| *images >= self.most.get()) {
            self.complete()?;
        }
        let (shard, images) = match &mut self.open {
            Some(open) => open,
            none => {
                let name = format!("dreams-{:06}.{}", self.files, S::EXTENSION);
                let shard = S::begin(NewFile::create(&self.folder.join(name))?, self.num_classes)?;
                self.files += 1;
                none.insert((shard, 0))
            }
        };
        *images += 1;
        shard.write(sample)
    }

    fn finish(mut self: Box<Self>) -> io::Result<u64> {
        self.complete()?;
        Ok(self.files)
    }
}
