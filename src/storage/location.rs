//! Where a storage is: a folder, or a bucket of a vendor.

use std::path::Path as FilePath;
use std::sync::{Arc, Once};
use std::time::Duration;

use object_store::aws::AmazonS3Builder;
use object_store::azure::MicrosoftAzureBuilder;
use object_store::gcp::GoogleCloudStorageBuilder;
use object_store::local::LocalFileSystem;
use object_store::memory::InMemory;
use object_store::path::Path;
use object_store::{ClientOptions, ObjectStore, ObjectStoreScheme, RetryConfig};
use url::Url;

use super::{Storage, StorageError, root_cause};

/// One request to a bucket; a store that is merely slow answers within this.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(20);
/// Retries within one call are few: whoever calls retries too, and says so in metrics.
const RETRIES: usize = 2;
const RETRY_TIMEOUT: Duration = Duration::from_secs(15);

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
        // Once and for all: behind a link that is pointed elsewhere there is another store.
        let folder = &folder.canonicalize().map_err(|e| refused(e.to_string()))?;
        let store = LocalFileSystem::new_with_prefix(folder).map_err(|e| refused(root_cause(&e)))?.with_fsync(true);
        Ok(Self::new(Arc::new(store), Path::default(), Some(folder.to_owned()), location))
    }

    fn new(store: Arc<dyn ObjectStore>, root: Path, folder: Option<std::path::PathBuf>, location: &str) -> Self {
        Self { store, root, folder, location: location.into(), guard: None }
    }
}

/// The provider that rustls takes where a library asks for none by name.
fn use_ring() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let _ = rustls::crypto::ring::default_provider().install_default();
    });
}
