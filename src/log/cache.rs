//! One cache with a byte bound for all readers: recent chunks, and messages derived from them that many readers want.

use std::sync::Arc;

use bytes::Bytes;
use moka::future::Cache as Moka;
use moka::policy::EvictionPolicy;

use super::{Chunk, ReadError};

/// A message that many readers may want: which images, in which form.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct CacheUse {
    /// The sequence of its first image.
    pub first_sequence: u64,
    /// The sequence behind its last image.
    pub end: u64,
    /// Everything else that decides about its bytes: shard, classes, size, pixel format.
    pub form: Arc<str>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Key {
    Chunk(u64),
    Derived(CacheUse),
}

#[derive(Clone, Debug)]
enum Value {
    Chunk(Arc<Chunk>),
    Derived(Bytes),
}

impl Value {
    fn bytes(&self) -> usize {
        match self {
            Self::Chunk(chunk) => chunk.payload().len(),
            Self::Derived(bytes) => bytes.len(),
        }
    }
}

#[derive(Debug)]
pub(super) struct Cache {
    held: Moka<Key, Value>,
}

impl Cache {
    pub fn new(capacity_bytes: u64) -> Self {
        let weigh = |_: &Key, value: &Value| u32::try_from(value.bytes()).unwrap_or(u32::MAX);
        // Least recently used, not least often: the chunk that was just made is the one that everybody wants next.
        let policy = EvictionPolicy::lru();
        Self { held: Moka::builder().max_capacity(capacity_bytes).weigher(weigh).eviction_policy(policy).build() }
    }

    pub async fn put(&self, chunk: Arc<Chunk>) {
        self.held.insert(Key::Chunk(chunk.first_sequence()), Value::Chunk(chunk)).await;
    }

    pub async fn remove(&self, first_sequence: u64) {
        self.held.invalidate(&Key::Chunk(first_sequence)).await;
    }

    /// The chunk; of many who miss it at one time, one fetches it for all.
    pub async fn get<F>(&self, first_sequence: u64, fetch: impl FnOnce() -> F) -> Result<Arc<Chunk>, ReadError>
    where
        F: Future<Output = Result<Arc<Chunk>, ReadError>>,
    {
        let value = async { fetch().await.map(Value::Chunk) };
        match self.held.try_get_with(Key::Chunk(first_sequence), value).await {
            Ok(Value::Chunk(chunk)) => Ok(chunk),
            Ok(Value::Derived(_)) => Err(ReadError::Gone),
            Err(error) => Err((*error).clone()),
        }
    }

    pub async fn derived<F>(&self, key: CacheUse, make: impl FnOnce() -> F) -> Result<Bytes, ReadError>
    where
        F: Future<Output = Result<Bytes, ReadError>>,
    {
        let value = async { make().await.map(Value::Derived) };
        match self.held.try_get_with(Key::Derived(key), value).await {
            Ok(Value::Derived(bytes)) => Ok(bytes),
            Ok(Value::Chunk(_)) => Err(ReadError::Gone),
            Err(error) => Err((*error).clone()),
        }
    }

    pub async fn bytes(&self) -> u64 {
        // moka counts late, when it has other work to do; nobody may have read anything since.
        self.held.run_pending_tasks().await;
        self.held.weighted_size()
    }
}
