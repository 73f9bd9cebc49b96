//! What a trainer writes at its end: each file is tried, whatever becomes of another, and what was not written is told last.

use std::io;
use std::path::Path;

use crate::files::write_whole;

/// The files of one end of a training that could not be written.
#[derive(Clone, Debug, Default)]
pub struct Outputs(Vec<String>);

impl Outputs {
    /// Writes a file, where one was asked for.
    pub fn write(&mut self, path: Option<&Path>, bytes: impl FnOnce() -> io::Result<Vec<u8>>) {
        let Some(path) = path else { return };
        if let Err(error) = bytes().and_then(|bytes| write_whole(path, &bytes)) {
            self.0.push(error.to_string());
        }
    }

    /// An error where anything is missing: one sentence that names every such file.
    pub fn check(&self) -> anyhow::Result<()> {
        anyhow::ensure!(self.0.is_empty(), "{}", self.0.join("; "));
        Ok(())
    }

    /// Says what is missing where another error is what the training ends with.
    pub fn tell(&self, trainer: &str) {
        for problem in &self.0 {
            eprintln!("{trainer}: {problem}");
        }
    }
}
