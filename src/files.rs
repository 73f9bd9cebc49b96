//! Files that users name. An output is never half there, and never takes the place of a device, a pipe or a link; an input
//! is a regular file, so that nobody waits for ever for what a pipe or a device never sends.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, ErrorKind, Read, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Access, OFlags, access, fcntl_setfl, syncfs};

/// How an output is put where it belongs.
#[derive(Debug)]
enum Place {
    /// A regular file, or nothing yet: what is written beside it takes its name at the end.
    Renamed { temporary: PathBuf, target: PathBuf },
    /// A device or a pipe gets the bytes as they come.
    Itself,
}

/// An output that has its name only once it is complete; dropped before, it leaves nothing behind.
#[derive(Debug)]
pub struct NewFile {
    path: PathBuf,
    place: Place,
    file: BufWriter<File>,
}

impl NewFile {
    /// Begins it, in a folder that is made where it is not there. Every error names the file.
    pub fn create(path: &Path) -> io::Result<Self> {
        let (place, file) = open_output(path).map_err(cannot_write(path))?;
        Ok(Self { path: path.to_owned(), place, file: BufWriter::new(file) })
    }

    /// Gives it its name, once all of it is on the disk.
    pub fn complete(mut self) -> io::Result<()> {
        self.flush()?;
        let Place::Renamed { target, .. } = &self.place else { return Ok(()) };
        let complete = || {
            // Else the name may outlive a power cut, and the content not.
            self.file.get_ref().sync_all()?;
            self.name()?;
            sync_folder(target)
        };
        complete().map_err(cannot_write(&self.path))
    }

    /// [`Self::complete`] for many files on one disk, which takes hardly longer than for one.
    pub fn complete_all(mut files: Vec<Self>) -> io::Result<()> {
        files.iter_mut().try_for_each(Self::flush)?;
        let Some(first) = files.first() else { return Ok(()) };
        let sync = || syncfs(first.file.get_ref()).map_err(|error| cannot_write(&first.path)(error.into()));
        sync()?;
        for file in &files {
            file.name().map_err(cannot_write(&file.path))?;
        }
        sync()
    }

    fn name(&self) -> io::Result<()> {
        let Place::Renamed { temporary, target } = &self.place else { return Ok(()) };
        if let Ok(before) = fs::metadata(target) {
            self.file.get_ref().set_permissions(before.permissions())?;
        }
        fs::rename(temporary, target)
    }
}

impl Write for NewFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.file.write(bytes).map_err(cannot_write(&self.path))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush().map_err(cannot_write(&self.path))
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Place::Renamed { temporary, .. } = &self.place {
            let _ = fs::remove_file(temporary); // not there any more once it was completed
        }
    }
}

/// Writes a whole output, so that a reader, or a crash, sees the old or the new one whole.
pub fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let mut file = NewFile::create(path)?;
    file.write_all(bytes)?;
    file.complete()
}

/// Whether an output could be written there later; leaves nothing behind but its folder.
pub fn check_writable(path: &Path) -> io::Result<()> {
    match place(path).map_err(cannot_write(path))? {
        Place::Renamed { .. } => NewFile::create(path).map(drop),
        // Opened, a pipe would end for its reader when it is closed.
        Place::Itself => access(path, Access::WRITE_OK).map_err(|error| cannot_write(path)(error.into())),
    }
}

/// Removes an output of [`write_whole`]; what is not a regular file stays.
pub fn remove(path: &Path) -> io::Result<()> {
    match place(path)? {
        Place::Renamed { target, .. } => fs::remove_file(target),
        Place::Itself => Ok(()),
    }
}

/// Opens an input, which must be a regular file.
pub fn open(path: &Path) -> io::Result<File> {
    let regular = |found: fs::Metadata| {
        let kind = found.file_type();
        let what = match () {
            () if kind.is_file() => return Ok(()),
            () if kind.is_dir() => "a folder",
            () if kind.is_fifo() => "a pipe",
            () => "a device or a socket",
        };
        Err(io::Error::new(ErrorKind::InvalidInput, format!("it is {what}; give a regular file")))
    };
    regular(fs::metadata(path)?)?;
    // Whatever took its place meanwhile, opening it does not wait.
    let file = OpenOptions::new().read(true).custom_flags(OFlags::NONBLOCK.bits() as i32).open(path)?;
    regular(file.metadata()?)?;
    Ok(file)
}

/// The bytes of an input.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = open(path)?;
    let mut bytes = Vec::with_capacity(file.metadata()?.len() as usize);
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Puts the file's name into an error.
pub fn cannot_write(path: &Path) -> impl FnOnce(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("cannot write {}: {error}", path.display()))
}

/// Links are followed: they stay, and what they point to is written.
fn place(path: &Path) -> io::Result<Place> {
    let refused = |problem: &str| Err(io::Error::new(ErrorKind::InvalidInput, problem));
    let there = match fs::metadata(path) {
        Ok(found) => Some(found.file_type()),
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        Err(error) => return Err(error),
    };
    match there {
        Some(kind) if kind.is_dir() => return refused("it is a folder; name a file"),
        Some(kind) if kind.is_char_device() || kind.is_fifo() => return Ok(Place::Itself),
        Some(kind) if !kind.is_file() => return refused("it is neither a file nor a pipe; name a file"),
        _ => {}
    }
    let mut target = path.to_owned();
    while let Ok(next) = fs::read_link(&target) {
        let folder = folder_of(&target);
        if folder.canonicalize()?.starts_with("/proc") {
            // /dev/stdout and its like: a file that somebody has open, and means by it.
            return Ok(Place::Itself);
        }
        target = folder.join(next);
    }
    // The process in its name: two that write the same file do not write into each other's.
    let mut temporary = target.clone().into_os_string();
    temporary.push(format!(".{}.partial", std::process::id()));
    Ok(Place::Renamed { temporary: temporary.into(), target })
}

fn open_output(path: &Path) -> io::Result<(Place, File)> {
    let place = place(path)?;
    let file = match &place {
        Place::Renamed { temporary, target } => {
            fs::create_dir_all(folder_of(target))?;
            // Of a process that had this number before. A link that somebody put there is not followed.
            let _ = fs::remove_file(temporary);
            OpenOptions::new().write(true).create_new(true).open(temporary)?
        }
        Place::Itself => {
            // Without waiting for a reader: a pipe that has none is an error.
            let mut options = OpenOptions::new();
            options.write(true).truncate(true).custom_flags(OFlags::NONBLOCK.bits() as i32);
            let file = options.open(path).map_err(|error| match error.raw_os_error() {
                Some(libc::ENXIO) => io::Error::new(error.kind(), "nobody reads this pipe; start its reader first"),
                _ => error,
            })?;
            fcntl_setfl(&file, OFlags::empty())?;
            file
        }
    };
    Ok((place, file))
}

/// Makes a new name durable, where the file system can.
fn sync_folder(path: &Path) -> io::Result<()> {
    match File::open(folder_of(path))?.sync_all() {
        Err(error) if matches!(error.kind(), ErrorKind::InvalidInput | ErrorKind::Unsupported) => Ok(()),
        synced => synced,
    }
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."))
}
