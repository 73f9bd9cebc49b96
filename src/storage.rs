//! Objects in a folder or a bucket: the one place where anything durable lives, and the only coordinator of replicas.
//!
//! The contract that the log and the student store build on is small: an object is written once, whole or not at all,
//! under a name that only one writer can win ([`Storage::create`]), and it is durable when that returns. Everything else
//! (`object_store` does the work) is reading, listing and deleting.
//!
//! Two things are proven, not believed. A store whose server overwrites what it should not is refused when it is opened
//! ([`Storage::prove`]). And a storage that is [guarded](Storage::guarded) changes nothing once its store is gone or
//! another has taken its place.

mod folder;
mod location;

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use object_store::path::Path;
use object_store::{GetOptions, GetRange, ObjectStore, ObjectStoreExt, PutMode, PutOptions};

pub(crate) use folder::staged_for;

/// No call to a store takes longer than this: a hung disk or bucket is a fault to report, not a wait for ever.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);
/// Objects of a bucket that are read at one time.
const READERS: usize = 32;

/// Why a call to the storage failed.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The location cannot be used at all.
    #[error("the store {location:?} cannot be used: {problem}")]
    Location {
        /// What was given.
        location: String,
        /// What is wrong, and what would be right.
        problem: String,
    },
    /// A call failed; trying again may help.
    #[error("cannot {action} {name} in {location}: {problem}")]
    Call {
        /// What was tried.
        action: &'static str,
        /// The object.
        name: String,
        /// The store.
        location: String,
        /// What the store said.
        problem: String,
    },
    /// The store is not there any more, or another one is.
    #[error(
        "the store {location} is not the one that this daemon opened: {name} {problem}; nothing is written, moved or \
         deleted there until it is back; bring it back, or restart the daemon to use what is there now"
    )]
    Replaced {
        /// The store.
        location: String,
        /// The object that tells.
        name: String,
        /// What became of it.
        problem: &'static str,
    },
    /// The store does not keep the contract.
    #[error(
        "the store {location} cannot be used: its server overwrote an object although it was asked to write only a name \
         that is free (a PUT with If-None-Match: *), so two daemons would overwrite each other's images; use a store that \
         does conditional writes (AWS S3, Google Cloud Storage, Azure, a current MinIO or Ceph), or a folder"
    )]
    Unfit {
        /// The store.
        location: String,
    },
}

/// Whether a create won its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Created {
    /// The object is there, durable, and ours, be it by this call or by an earlier one whose answer was lost.
    Yes,
    /// The name is another object's.
    Taken,
}

/// One object of a listing.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its name within the store.
    pub name: String,
    /// Its size.
    pub bytes: u64,
}

/// Anything that lies in a store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lying {
    /// Its name within the store, with a slash behind it where it is a folder; what is no UTF-8 in it is replaced.
    pub name: String,
    /// Whether it can be an object at all: a file, with a name that is UTF-8.
    pub is_object: bool,
}

/// What tells a store from another in the same place.
#[derive(Debug)]
struct Guard {
    name: &'static str,
    object: Bytes,
    /// A new name for what proves that a name has one winner, and whether that is proven.
    probe: fn() -> String,
    proven: AtomicBool,
}

/// A folder or a bucket. Cheap to clone.
#[derive(Clone)]
pub struct Storage {
    store: Arc<dyn ObjectStore>,
    root: Path,
    folder: Option<PathBuf>,
    location: Arc<str>,
    guard: Option<Arc<Guard>>,
}

impl fmt::Debug for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Storage").field(&self.location).finish()
    }
}

impl Storage {
    /// The same storage, every read of which takes this long.
    #[cfg(test)]
    pub(crate) fn slowed(&self, wait: Duration) -> Self {
        let config = object_store::throttle::ThrottleConfig { wait_get_per_call: wait, ..Default::default() };
        let store = object_store::throttle::ThrottledStore::new(self.store.clone(), config);
        Self { store: Arc::new(store), ..self.clone() }
    }

    /// The same storage, which from now on writes, moves and deletes only while this object is what it is now, and writes
    /// only once it is [proven](Self::prove), under a name of `probe`, that a name has one winner.
    pub fn guarded(&self, name: &'static str, object: Bytes, probe: fn() -> String) -> Self {
        let guard = Guard { name, object, probe, proven: AtomicBool::new(false) };
        Self { guard: Some(Arc::new(guard)), ..self.clone() }
    }

    /// Whether nothing is left to be proven.
    pub fn is_proven(&self) -> bool {
        self.guard.as_ref().is_none_or(|guard| guard.proven.load(Ordering::Relaxed))
    }

    /// Whether it still is the store that it was when it was guarded; always, where it is not guarded.
    pub async fn check(&self) -> Result<(), StorageError> {
        let Some(guard) = &self.guard else { return Ok(()) };
        let problem = match self.get(guard.name).await? {
            Some(object) if object == guard.object => return Ok(()),
            Some(_) => "is another store's",
            None => "is gone",
        };
        Err(StorageError::Replaced { location: self.location.to_string(), name: guard.name.to_owned(), problem })
    }

    /// Proves that a name has one winner: of two puts under a new name the second must be refused. Once it is proven this
    /// does nothing.
    pub async fn prove(&self) -> Result<(), StorageError> {
        let Some(guard) = self.guard.as_ref().filter(|_| !self.is_proven()) else { return Ok(()) };
        let name = (guard.probe)();
        let puts = async {
            if self.create_proven(&name, Bytes::from_static(b"first")).await? == Created::Taken {
                return Err(self.failed("write", &name, "its name is new, and was taken all the same".into()));
            }
            match self.put(&name, Bytes::from_static(b"second")).await? {
                Created::Taken => Ok(()),
                Created::Yes => Err(StorageError::Unfit { location: self.location.to_string() }),
            }
        };
        let proven = puts.await;
        guard.proven.store(proven.is_ok(), Ordering::Relaxed);
        if let Err(error) = self.delete(&name).await {
            tracing::warn!(%error, "what proved that a name has one winner stays for now");
        }
        proven
    }

    /// Where it is, as it was given.
    pub fn location(&self) -> &str {
        &self.location
    }

    fn path(&self, name: &str) -> Path {
        Path::from_iter(self.root.parts().chain(Path::from(name).parts()))
    }

    pub(crate) fn failed(&self, action: &'static str, name: &str, problem: String) -> StorageError {
        StorageError::Call { action, name: name.to_owned(), location: self.location.to_string(), problem }
    }

    async fn bounded<T>(
        &self,
        action: &'static str,
        name: &str,
        call: impl Future<Output = object_store::Result<T>>,
    ) -> Result<Option<T>, StorageError> {
        match tokio::time::timeout(CALL_TIMEOUT, call).await {
            Ok(Ok(value)) => Ok(Some(value)),
            Ok(Err(object_store::Error::NotFound { .. })) => Ok(None),
            Ok(Err(error)) => Err(self.failed(action, name, root_cause(&error))),
            Err(_) => Err(self.failed(action, name, format!("no answer after {} s", CALL_TIMEOUT.as_secs()))),
        }
    }

    /// Writes an object under a name that nobody has taken yet. When this returns [`Created::Yes`] it is whole, durable
    /// and visible. Where the answer to a put was lost, what lies under the name decides. After an error it may still
    /// arrive: create it again, with the same bytes.
    pub async fn create(&self, name: &str, object: Bytes) -> Result<Created, StorageError> {
        self.prove().await?;
        self.create_proven(name, object).await
    }

    async fn create_proven(&self, name: &str, object: Bytes) -> Result<Created, StorageError> {
        self.check().await?;
        let put = self.put(name, object.clone()).await;
        if let Ok(Created::Yes) = put {
            // The store may have gone between the look and the put.
            return match self.check().await {
                Err(error @ StorageError::Replaced { .. }) => {
                    self.take_back(name).await;
                    Err(error)
                }
                Err(error) => Err(error),
                Ok(()) => Ok(Created::Yes),
            };
        }
        // An attempt whose answer was lost is tried again below us, and then finds its own object.
        match self.get(name).await {
            Ok(Some(found)) if found == object => Ok(Created::Yes),
            Ok(Some(_)) => Ok(Created::Taken),
            // Taken, and gone since; or by a folder, or by a link that leads nowhere, which stay.
            Ok(None) if put.is_ok() && self.is_blocked(name).await? => {
                let problem = "its name is taken by what is no object, a folder or a broken link; move that away";
                Err(self.failed("write", name, problem.into()))
            }
            Ok(None) => put,
            Err(error) => Err(put.err().unwrap_or(error)),
        }
    }

    /// Whether something lies under a name that cannot be read as an object.
    async fn is_blocked(&self, name: &str) -> Result<bool, StorageError> {
        if self.folder.is_none() {
            return Ok(false);
        }
        let below = name.to_owned();
        self.in_folder("read", name, move |root| Ok(root.join(below).symlink_metadata().is_ok())).await
    }

    /// Removes what was just put into a place that is not this store, and the folders that the put made for it.
    async fn take_back(&self, name: &str) {
        let path = self.path(name);
        let _ = self.bounded("delete", name, self.store.delete(&path)).await;
        if self.folder.is_some() {
            let name = name.to_owned();
            let _ = self.in_folder("delete", "empty folders", move |root| folder::prune(root, &name)).await;
        }
    }

    /// One create-only put, its answer taken at its word.
    async fn put(&self, name: &str, object: Bytes) -> Result<Created, StorageError> {
        let options = PutOptions { mode: PutMode::Create, ..PutOptions::default() };
        let path = self.path(name);
        let put = async {
            match self.store.put_opts(&path, object.into(), options).await {
                Ok(_) => Ok(Created::Yes),
                Err(object_store::Error::AlreadyExists { .. }) => Ok(Created::Taken),
                Err(error) => Err(error),
            }
        };
        let created = self.bounded("write", name, put).await?;
        created.ok_or_else(|| self.failed("write", name, "its folder or bucket is not there".into()))
    }

    /// A whole object; None where there is none of that name.
    pub async fn get(&self, name: &str) -> Result<Option<Bytes>, StorageError> {
        let path = self.path(name);
        self.bounded("read", name, async { self.store.get(&path).await?.bytes().await }).await
    }

    /// A range of an object, cut at its end; None where there is none of that name.
    pub async fn get_range(&self, name: &str, range: Range<u64>) -> Result<Option<Bytes>, StorageError> {
        let path = self.path(name);
        let options = GetOptions { range: Some(GetRange::Bounded(range)), ..GetOptions::default() };
        self.bounded("read", name, async { self.store.get_opts(&path, options).await?.bytes().await }).await
    }

    /// The size of an object; None where there is none of that name.
    pub async fn size(&self, name: &str) -> Result<Option<u64>, StorageError> {
        let path = self.path(name);
        self.bounded("read", name, async { Ok(self.store.head(&path).await?.size) }).await
    }

    /// The first bytes of each of many objects, in the order of their names; None where there is none of that name.
    pub(crate) async fn heads(&self, names: Vec<String>, bytes: u64) -> Result<Vec<Option<Bytes>>, StorageError> {
        if self.folder.is_some() {
            let name = names.first().cloned().unwrap_or_default();
            return self.in_folder("read", &name, move |root| folder::heads(root, &names, bytes)).await;
        }
        let reads = stream::iter(names).map(|name| async move { self.get_range(&name, 0..bytes).await });
        reads.buffered(READERS).try_collect().await
    }

    /// The objects directly under a prefix that ends in a slash, in order of name; with `after`, only the names behind
    /// that one. Where an object is in the list, so is every one with a smaller name that was there before it and still
    /// is. What cannot be an object is not in the list: [`Self::everything`] has it.
    pub async fn list(&self, prefix: &str, after: Option<&str>) -> Result<Vec<Found>, StorageError> {
        if self.folder.is_some() {
            let (below, after) = (prefix.to_owned(), after.map(str::to_owned));
            return self.in_folder("list", prefix, move |root| folder::list(root, &below, after.as_deref())).await;
        }
        let found = self.list_all(prefix, after).await?;
        Ok(found.into_iter().filter(|found| found.name.rfind('/') == prefix.rfind('/')).collect())
    }

    /// Every object of a bucket under a prefix, in order of name.
    async fn list_all(&self, prefix: &str, after: Option<&str>) -> Result<Vec<Found>, StorageError> {
        let (folder, root) = (self.path(prefix), self.root.clone());
        let listing = async {
            let stream = match after {
                Some(after) => self.store.list_with_offset(Some(&folder), &self.path(after)),
                None => self.store.list(Some(&folder)),
            };
            stream.try_collect::<Vec<_>>().await
        };
        let mut found: Vec<Found> = self
            .bounded("list", prefix, listing)
            .await?
            .unwrap_or_default()
            .into_iter()
            .filter_map(|meta| {
                let parts: Vec<String> =
                    meta.location.prefix_match(&root)?.map(|part| part.as_ref().to_owned()).collect();
                Some(Found { name: parts.join("/"), bytes: meta.size })
            })
            .collect();
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    /// Whatever lies in a store of these folders, also what cannot be an object, and the staged files of a folder. Of a
    /// folder that is none of these only its name; a disk's lost+found is left out.
    pub async fn everything(&self, folders: &'static [&'static str]) -> Result<Vec<Lying>, StorageError> {
        if self.folder.is_some() {
            return self.in_folder("list", "everything", |root| folder::everything(root, folders)).await;
        }
        let found = self.list_all("", None).await?;
        Ok(found.into_iter().map(|found| Lying { name: found.name, is_object: true }).collect())
    }

    /// Removes an object; one that is not there is no error.
    pub async fn delete(&self, name: &str) -> Result<(), StorageError> {
        self.check().await?;
        let path = self.path(name);
        self.bounded("delete", name, self.store.delete(&path)).await.map(drop)
    }

    /// Moves an object aside, replacing what was there.
    pub async fn rename(&self, from: &str, to: &str) -> Result<(), StorageError> {
        self.check().await?;
        let (source, target) = (self.path(from), self.path(to));
        self.bounded("move", from, self.store.rename(&source, &target)).await.map(drop)
    }

    /// Frees what processes left in these folders that died in the middle of a put. Only folders have such remains: a
    /// bucket shows nothing of an upload that did not end.
    pub async fn sweep(&self, folders: &'static [&'static str]) -> Result<(), StorageError> {
        if self.folder.is_none() {
            return Ok(());
        }
        self.check().await?;
        self.in_folder("sweep", "staged files", |root| folder::sweep(root, folders, SystemTime::now())).await
    }

    /// Work on the folder that it is, away from the runtime's threads.
    async fn in_folder<T: Send + 'static>(
        &self,
        action: &'static str,
        name: &str,
        work: impl FnOnce(&std::path::Path) -> std::io::Result<T> + Send + 'static,
    ) -> Result<T, StorageError> {
        let root = self.folder.clone().unwrap_or_default();
        let work = blocking(move || work(&root).map_err(|error| error.to_string()));
        match tokio::time::timeout(CALL_TIMEOUT, work).await {
            Ok(done) => done.and_then(|done| done).map_err(|problem| self.failed(action, name, problem)),
            Err(_) => Err(self.failed(action, name, format!("no answer after {} s", CALL_TIMEOUT.as_secs()))),
        }
    }
}

/// Runs what would hold up the runtime's threads elsewhere; the error is that it did not end.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.map_err(|e| format!("a task of this process did not end: {e}"))
}

/// The innermost sentence: outer ones repeat names and say "Generic error".
fn root_cause(error: &object_store::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    let text: String = cause.to_string().chars().map(|c| if c.is_control() { ' ' } else { c }).take(500).collect();
    text
}
