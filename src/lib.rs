//! Dreamfeed: a daemon that dreams training data.

pub mod cli;
pub mod client;
pub mod config;
pub mod delivery;
pub mod device;
pub mod engine;
pub mod export;
pub mod files;
pub mod generators;
pub mod grid;
pub mod log;
pub mod model;
pub mod native;
mod overlay;
pub mod server;
pub mod storage;
pub mod store;
pub mod students;
pub mod synthesis;
pub mod telemetry;
pub mod trainers;

/// What unit tests, threads of one process, share.
#[cfg(test)]
mod testing {
    use std::sync::{Mutex, MutexGuard, PoisonError};

    /// Held by every test that draws from libtorch's generator, of which there is one: nobody else draws between its seed
    /// and its draws.
    pub fn drawing_alone() -> MutexGuard<'static, ()> {
        static GENERATOR: Mutex<()> = Mutex::new(());
        // The same sums in the same order on every machine; and small operators are faster so.
        tch::set_num_threads(1);
        GENERATOR.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The contract.
#[allow(missing_docs)]
pub mod proto {
    tonic::include_proto!("dreamfeed.v1");

    /// The compiled contract, for the reflection service.
    pub const FILE_DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("dreamfeed.v1");
}
