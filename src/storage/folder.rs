//! What a folder shows of itself. `object_store` lists a folder with everything below it, asks the disk about each file,
//! and gives up at the first name that is no UTF-8; here one level is read, and what is no object is passed over.

use std::fs::{DirEntry, File, Metadata};
use std::io::{self, ErrorKind, Read};
use std::path::Path;
use std::time::{Duration, SystemTime};

use bytes::Bytes;

use super::{Found, Lying};

/// A staged file this old was left by a process that died in the middle of a put.
const STAGED_AGE: Duration = Duration::from_secs(600);

/// The object that a file was staged for: the staged files of `object_store` are named NAME#NUMBER beside the object that
/// they were to become.
pub(crate) fn staged_for(name: &str) -> Option<&str> {
    let (folder, file) = name.rsplit_once('/').map_or((0, name), |(folder, file)| (folder.len() + 1, file));
    let (object, number) = file.split_once('#')?;
    let staged = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
    staged.then(|| name.get(..folder + object.len())).flatten()
}

/// The entries of one folder; none where it is not there.
fn entries(folder: &Path) -> io::Result<impl Iterator<Item = io::Result<DirEntry>> + use<>> {
    match std::fs::read_dir(folder) {
        Ok(entries) => Ok(Some(entries).into_iter().flatten()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None.into_iter().flatten()),
        Err(error) => Err(error),
    }
}

/// The metadata of a file, or of the file that a link leads to; None for everything else.
fn file_metadata(entry: &DirEntry) -> io::Result<Option<Metadata>> {
    let kind = entry.file_type()?;
    if !kind.is_file() && !kind.is_symlink() {
        return Ok(None);
    }
    match std::fs::metadata(entry.path()) {
        Ok(metadata) => Ok(Some(metadata).filter(Metadata::is_file)),
        // Deleted since, or a link that leads nowhere, or in a circle.
        Err(_) if kind.is_symlink() => Ok(None),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Names of what may be objects in a folder below `root`, as they are in the store.
fn names<'a>(
    root: &Path,
    prefix: &'a str,
    after: Option<&'a str>,
) -> io::Result<impl Iterator<Item = io::Result<(String, DirEntry)>> + use<'a>> {
    Ok(entries(&root.join(prefix))?.filter_map(move |entry| {
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) => return Some(Err(error)),
        };
        let name = format!("{prefix}{}", entry.file_name().to_str()?);
        let wanted = after.is_none_or(|after| name.as_str() > after) && staged_for(&name).is_none();
        wanted.then_some(Ok((name, entry)))
    }))
}

/// The objects in one folder, in order of name. Where an object is in the list, so is every one with a smaller name that
/// was there before it and still is.
pub(super) fn list(root: &Path, prefix: &str, after: Option<&str>) -> io::Result<Vec<Found>> {
    // A folder is not read at one instant: of two files that are made meanwhile, the later one may show and the earlier
    // one not. Whatever was there before the newest one shows in a second look.
    let mut newest = None;
    for named in names(root, prefix, after)? {
        newest = newest.max(Some(named?.0));
    }
    let Some(newest) = newest else { return Ok(Vec::new()) };
    let mut found = Vec::new();
    for named in names(root, prefix, after)? {
        let (name, entry) = named?;
        if name <= newest
            && let Some(metadata) = file_metadata(&entry)?
        {
            found.push(Found { name, bytes: metadata.len() });
        }
    }
    found.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    Ok(found)
}

/// The first bytes of each object; None where there is none of that name.
pub(super) fn heads(root: &Path, names: &[String], bytes: u64) -> io::Result<Vec<Option<Bytes>>> {
    let head = |name: &String| {
        let file = match File::open(root.join(name)) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        // Most are read whole at once.
        let mut head = Vec::with_capacity(8 << 10);
        file.take(bytes).read_to_end(&mut head)?;
        Ok(Some(Bytes::from(head)))
    };
    names.iter().map(head).collect()
}

/// Whatever lies in these folders, one level each; the folders themselves are left out, and a disk's lost+found.
pub(super) fn everything(root: &Path, folders: &[&str]) -> io::Result<Vec<Lying>> {
    let mut lying = Vec::new();
    for folder in folders {
        for entry in entries(&root.join(folder))? {
            let entry = entry?;
            let file_name = entry.file_name();
            let name = format!("{folder}{}", file_name.to_string_lossy());
            let kind = entry.file_type()?;
            // Also where it is a link to a folder on another disk.
            let below = format!("{name}/");
            let leads_to_folder = || std::fs::metadata(entry.path()).is_ok_and(|metadata| metadata.is_dir());
            if kind.is_dir() || kind.is_symlink() && leads_to_folder() {
                if !folders.contains(&below.as_str()) && below != "lost+found/" {
                    lying.push(Lying { name: below, is_object: false });
                }
                continue;
            }
            let is_object = file_name.to_str().is_some() && (kind.is_file() || file_metadata(&entry)?.is_some());
            lying.push(Lying { name, is_object });
        }
    }
    lying.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    Ok(lying)
}

/// Removes the folders of an object that is gone, as far as they are empty.
pub(super) fn prune(root: &Path, name: &str) -> io::Result<()> {
    let within = root.join(name);
    for folder in within.ancestors().skip(1).take_while(|folder| folder.starts_with(root)) {
        // One that is not empty stays, and so do those around it.
        if std::fs::remove_dir(folder).is_err() {
            break;
        }
    }
    Ok(())
}

/// Removes staged files that were left by processes that died; errors are those of whole folders.
pub(super) fn sweep(root: &Path, folders: &[&str], now: SystemTime) -> io::Result<()> {
    for folder in folders {
        for entry in entries(&root.join(folder))? {
            let entry = entry?;
            if entry.file_name().to_str().and_then(staged_for).is_none() {
                continue;
            }
            let modified = entry.metadata().and_then(|metadata| metadata.modified());
            let old = modified.is_ok_and(|at| now.duration_since(at).is_ok_and(|age| age > STAGED_AGE));
            if old && std::fs::remove_file(entry.path()).is_ok() {
                tracing::info!(path = %entry.path().display(), "removed what a put left that was broken off");
            }
        }
    }
    Ok(())
}

#[cfg(all(test, unix))]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn what_is_no_object_keeps_no_object_from_being_listed() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        std::fs::create_dir_all(root.join("a/folder/below")).unwrap();
        std::fs::create_dir_all(root.join("b/c")).unwrap();
        prune(root, "b/c/gone").unwrap();
        assert!(!root.join("b").exists() && root.join("a").exists());
        for name in ["a/2", "a/1", "a/3#7", "a/folder/4"] {
            std::fs::write(root.join(name), name).unwrap();
        }
        std::fs::write(root.join("a").join(OsStr::from_bytes(b"\xff")), "x").unwrap();
        symlink("loop", root.join("a/loop")).unwrap();
        symlink("nowhere", root.join("a/dangling")).unwrap();
        symlink("2", root.join("a/link")).unwrap();
        symlink("..", root.join("a/up")).unwrap();
        let listed = |after| -> Vec<(String, u64)> {
            list(root, "a/", after).unwrap().into_iter().map(|found| (found.name, found.bytes)).collect()
        };
        let expected = [("a/1", 3), ("a/2", 3), ("a/link", 3)].map(|(name, bytes)| (name.to_owned(), bytes));
        assert_eq!(listed(None), expected);
        assert_eq!(listed(Some("a/1")), expected[1..]);
        assert!(list(root, "none/", None).unwrap().is_empty());
        assert!(list(root, "a/1/", None).is_err());
        let lying: Vec<(String, bool)> =
            everything(root, &["", "a/"]).unwrap().into_iter().map(|lying| (lying.name, lying.is_object)).collect();
        let expected = [
            ("a/1", true),
            ("a/2", true),
            ("a/3#7", true),
            ("a/dangling", false),
            ("a/folder/", false),
            ("a/link", true),
            ("a/loop", false),
            ("a/up/", false),
            ("a/\u{fffd}", false),
        ];
        assert_eq!(lying, expected.map(|(name, object)| (name.to_owned(), object)));
        let heads = heads(root, &["a/1".into(), "a/9".into(), "a/link".into()], 2).unwrap();
        assert_eq!(heads, [Some(Bytes::from_static(b"a/")), None, Some(Bytes::from_static(b"a/"))]);
        sweep(root, &["a/"], SystemTime::now()).unwrap();
        assert!(root.join("a/3#7").exists());
        sweep(root, &["a/"], SystemTime::now() + 2 * STAGED_AGE).unwrap();
        assert!(!root.join("a/3#7").exists());
    }
}
