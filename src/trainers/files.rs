//! Files that a trainer writes: known to be possible before the training, and never half there.

use std::path::Path;

use anyhow::Context;

/// Whether a file could be written there later; leaves nothing behind but its folder.
pub fn check_writable(path: &Path) -> anyhow::Result<()> {
    let mut probe = path.to_owned().into_os_string();
    probe.push(format!(".{}.probe", std::process::id()));
    let try_it = || {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        anyhow::ensure!(!path.is_dir(), "it is a folder; name a file");
        std::fs::File::create(&probe)?;
        Ok(std::fs::remove_file(&probe)?)
    };
    try_it().with_context(|| format!("cannot write {}", path.display()))
}

/// Writes a file so that a reader, or a crash, sees the old or the new one whole.
pub fn write_whole(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let write = || {
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        let temporary = path.with_extension("partial");
        let mut file = std::fs::File::create(&temporary)?;
        std::io::Write::write_all(&mut file, bytes)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    };
    write().with_context(|| format!("cannot write {}", path.display()))
}
