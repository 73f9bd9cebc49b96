//! Objects in a folder or a bucket: the one place where anything durable lives, and the only coordinator of replicas.
//!
//! The contract that the log and the student store build on is small: an object is written once, whole or not at all,
//! under a name that only one writer can win ([`Storage::create`]), and it is durable when that returns. Everything else
//! (`object_store` does the work) is reading, listing and deleting.

use std::fmt;
use std::ops::Range;
use std::path::{Path as FilePath, PathBuf};
use std::sync::{Arc, Once};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::TryStreamExt;
use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{
    ClientOptions, GetOptions, GetRange, ObjectStore, ObjectStoreExt, ObjectStoreScheme, PutMode, PutOptions,
    RetryConfig,
};
use url::Url;

/// No call to a store takes longer than this: a hung disk or bucket is a fault to report, not a wait for ever.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);
/// One request to a bucket; a store that is merely slow answers within this.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(20);
/// Retries within one call are few: whoever calls retries too, and says so in metrics.
const RETRIES: usize = 2;
const RETRY_TIMEOUT: Duration = Duration::from_secs(15);
/// A staged file of a local folder this old was left by a process that died in the middle of a put.
const STAGED_AGE: Duration = Duration::from_secs(600);

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
}

/// Whether a create won its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Created {
    /// The object is there, durable, and ours.
    Yes,
    /// The name was taken already. By whom is for the caller to find out: also our own put whose answer was lost.
    Taken,
}

/// One object of a listing.
#[derive(Clone, Debug)]
pub struct Found {
    /// Its name within the store.
    pub name: String,
    /// Its size.
    pub bytes: u64,
    /// When it was written.
    pub modified: SystemTime,
}

/// A folder or a bucket. Cheap to clone.
#[derive(Clone)]
pub struct Storage {
    store: Arc<dyn ObjectStore>,
    root: Path,
    folder: Option<PathBuf>,
    location: Arc<str>,
}

impl fmt::Debug for Storage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Storage").field(&self.location).finish()
    }
}

impl Storage {
    /// Opens a location: a folder (made where it is missing), `file://`, `s3://bucket/prefix`, `gs://`, `az://`, or
    /// `memory:`, which is gone with the process. Credentials and endpoints of buckets come from the environment under
    /// their vendors' usual names (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT`, `GOOGLE_SERVICE_ACCOUNT`,
    /// `AZURE_STORAGE_ACCOUNT_NAME`, ...).
    pub fn open(location: &str) -> Result<Self, StorageError> {
        Self::open_or(location, |folder| {
            if folder.is_file() {
                return Err("it is a file; give a folder".into());
            }
            std::fs::create_dir_all(folder).map_err(|e| format!("the folder cannot be made: {e}"))
        })
    }

    /// As [`Self::open`], for whoever only looks: a folder that is not there is an error, and is not made.
    pub fn open_existing(location: &str) -> Result<Self, StorageError> {
        Self::open_or(location, |folder| match folder.is_dir() {
            true => Ok(()),
            false => Err("there is no such folder".into()),
        })
    }

    fn open_or(location: &str, prepare: impl Fn(&FilePath) -> Result<(), String>) -> Result<Self, StorageError> {
        let refused = |problem: String| StorageError::Location { location: location.to_owned(), problem };
        if location.is_empty() {
            return Err(refused("give a folder or a URL, for example ./dreams or s3://bucket/dreams".into()));
        }
        if location == "memory:" {
            return Ok(Self::new(Arc::new(InMemory::new()), Path::default(), None, location));
        }
        if !location.contains("://") {
            return Self::open_folder(FilePath::new(location), location, prepare);
        }
        let url = Url::parse(location).map_err(|e| refused(format!("it is no URL: {e}")))?;
        let known = "give a folder, file://, s3://, gs://, az:// or memory:";
        let (scheme, root) = ObjectStoreScheme::parse(&url).map_err(|e| refused(format!("{e}; {known}")))?;
        let retry = RetryConfig { max_retries: RETRIES, retry_timeout: RETRY_TIMEOUT, backoff: Default::default() };
        let options = || ClientOptions::new().with_timeout(REQUEST_TIMEOUT).with_connect_timeout(REQUEST_TIMEOUT / 4);
        let failed = |e: object_store::Error| refused(root_cause(&e));
        use_ring();
        let store: Arc<dyn ObjectStore> = match scheme {
            ObjectStoreScheme::Local => {
                let folder = url.to_file_path().map_err(|()| refused("it names no folder of this machine".into()))?;
                return Self::open_folder(&folder, location, prepare);
            }
            ObjectStoreScheme::AmazonS3 => {
                // from_env reads AWS_ALLOW_HTTP only as a client option, which our own options replace.
                let allow_http = std::env::var("AWS_ALLOW_HTTP").is_ok_and(|value| value == "true" || value == "1");
                let builder = AmazonS3Builder::from_env()
                    .with_url(location)
                    .with_retry(retry)
                    .with_client_options(options().with_allow_http(allow_http));
                Arc::new(builder.build().map_err(failed)?)
            }
            ObjectStoreScheme::GoogleCloudStorage => {
                let builder = GoogleCloudStorageBuilder::from_env()
                    .with_url(location)
                    .with_retry(retry)
                    .with_client_options(options());
                Arc::new(builder.build().map_err(failed)?)
            }
            ObjectStoreScheme::MicrosoftAzure => {
                let builder = MicrosoftAzureBuilder::from_env()
                    .with_url(location)
                    .with_retry(retry)
                    .with_client_options(options());
                Arc::new(builder.build().map_err(failed)?)
            }
            _ => return Err(refused(format!("{} stores are not supported; {known}", url.scheme()))),
        };
        Ok(Self::new(store, root, None, location))
    }

    fn open_folder(
        folder: &FilePath,
        location: &str,
        prepare: impl Fn(&FilePath) -> Result<(), String>,
    ) -> Result<Self, StorageError> {
        let refused = |problem: String| StorageError::Location { location: location.to_owned(), problem };
        prepare(folder).map_err(refused)?;
        let store = LocalFileSystem::new_with_prefix(folder).map_err(|e| refused(root_cause(&e)))?.with_fsync(true);
        Ok(Self::new(Arc::new(store), Path::default(), Some(folder.to_owned()), location))
    }

    fn new(store: Arc<dyn ObjectStore>, root: Path, folder: Option<PathBuf>, location: &str) -> Self {
        Self { store, root, folder, location: location.into() }
    }

    /// The same storage, every read of which takes this long.
    #[cfg(test)]
    pub(crate) fn slowed(&self, wait: Duration) -> Self {
        let config = object_store::throttle::ThrottleConfig { wait_get_per_call: wait, ..Default::default() };
        let store = object_store::throttle::ThrottledStore::new(self.store.clone(), config);
        Self { store: Arc::new(store), ..self.clone() }
    }

    /// Where it is, as it was given.
    pub fn location(&self) -> &str {
        &self.location
    }

    fn path(&self, name: &str) -> Path {
        Path::from_iter(self.root.parts().chain(Path::from(name).parts()))
    }

    fn failed(&self, action: &'static str, name: &str, problem: String) -> StorageError {
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
    /// and visible. An error leaves open whether it was written: create it again and look who has the name.
    pub async fn create(&self, name: &str, object: Bytes) -> Result<Created, StorageError> {
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

    /// Every object under a prefix that ends in a slash, in order of name; with `after`, only the names behind that one.
    /// Where an object is in the list, so is every one with a smaller name that was there before it and still is.
    pub async fn list(&self, prefix: &str, after: Option<&str>) -> Result<Vec<Found>, StorageError> {
        let mut found = self.list_once(prefix, after).await?;
        if let (Some(newest), true) = (found.last().map(|found| found.name.clone()), self.folder.is_some()) {
            // A folder is not read at one instant: of two files that are made meanwhile, the later one may show and the
            // earlier one not. Whatever was there before the newest one shows in a second look.
            let again = self.list_once(prefix, after).await?;
            found = again.into_iter().filter(|found| found.name <= newest).collect();
        }
        Ok(found)
    }

    async fn list_once(&self, prefix: &str, after: Option<&str>) -> Result<Vec<Found>, StorageError> {
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
                Some(Found { name: parts.join("/"), bytes: meta.size, modified: meta.last_modified.into() })
            })
            .collect();
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    /// The name of everything that lies there, also of what [`Self::list`] leaves out: the staged files of a folder. What
    /// may not be looked into (a disk's lost+found) is left out.
    pub async fn names(&self) -> Result<Vec<String>, StorageError> {
        let Some(folder) = self.folder.clone() else {
            return Ok(self.list("", None).await?.into_iter().map(|found| found.name).collect());
        };
        let walk = move || {
            let mut names = Vec::new();
            walk(&folder, &mut |path, _| {
                let parts = path.strip_prefix(&folder).into_iter().flatten();
                names.push(parts.map(|part| part.to_string_lossy()).collect::<Vec<_>>().join("/"));
            });
            names.sort();
            names
        };
        blocking(walk).await.map_err(|problem| self.failed("list", "everything", problem))
    }

    /// Removes an object; one that is not there is no error.
    pub async fn delete(&self, name: &str) -> Result<(), StorageError> {
        let path = self.path(name);
        self.bounded("delete", name, self.store.delete(&path)).await.map(drop)
    }

    /// Moves an object aside, replacing what was there.
    pub async fn rename(&self, from: &str, to: &str) -> Result<(), StorageError> {
        let (source, target) = (self.path(from), self.path(to));
        self.bounded("move", from, self.store.rename(&source, &target)).await.map(drop)
    }

    /// Frees what processes left behind that died in the middle of a put. Only folders have such remains: a bucket shows
    /// nothing of an upload that did not end.
    pub async fn sweep(&self) {
        let Some(folder) = self.folder.clone() else { return };
        let _ = tokio::task::spawn_blocking(move || sweep_folder(&folder, SystemTime::now())).await;
    }
}

/// The name of an object that a number tells apart in its folder, which ends in a slash; the order of names is that of the
/// numbers.
pub(crate) fn numbered(folder: &str, number: u64) -> String {
    format!("{folder}{number:020}.safetensors")
}

/// The number in such a name; None where it is no such name, or its number leaves none to count on to.
pub(crate) fn number(folder: &str, name: &str) -> Option<u64> {
    let digits = name.strip_prefix(folder)?.strip_suffix(".safetensors")?;
    let number = (digits.len() == 20).then(|| digits.parse().ok()).flatten()?;
    (number < i64::MAX as u64).then_some(number)
}

/// Runs what would hold up the runtime's threads elsewhere; the error is that it did not end.
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, String> {
    tokio::task::spawn_blocking(work).await.map_err(|e| format!("a task of this process did not end: {e}"))
}

/// The object that a file was staged for: the staged files of `object_store` are named NAME#NUMBER beside the object that
/// they were to become.
pub(crate) fn staged_for(name: &str) -> Option<&str> {
    let (folder, file) = name.rsplit_once('/').map_or((0, name), |(folder, file)| (folder.len() + 1, file));
    let (object, number) = file.split_once('#')?;
    let staged = !number.is_empty() && number.bytes().all(|b| b.is_ascii_digit());
    staged.then(|| name.get(..folder + object.len())).flatten()
}

/// Every file below a folder. Links are not followed.
fn walk(folder: &FilePath, visit: &mut impl FnMut(&FilePath, &std::fs::DirEntry)) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        match entry.file_type() {
            Ok(kind) if kind.is_dir() => walk(&entry.path(), visit),
            Ok(kind) if kind.is_file() => visit(&entry.path(), &entry),
            _ => {}
        }
    }
}

fn sweep_folder(folder: &FilePath, now: SystemTime) {
    walk(folder, &mut |path, entry| {
        let staged = staged_for(&entry.file_name().to_string_lossy()).is_some();
        let modified = entry.metadata().and_then(|meta| meta.modified());
        let old = modified.is_ok_and(|at| now.duration_since(at).is_ok_and(|age| age > STAGED_AGE));
        if staged && old && std::fs::remove_file(path).is_ok() {
            tracing::info!(path = %path.display(), "removed what a put left that was broken off");
        }
    });
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

/// The provider that rustls takes where a library asks for none by name.
fn use_ring() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}
