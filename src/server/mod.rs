//! The daemon's ports: the gRPC service (a file a method, all conversion in `convert`), and the admin pages.
//!
//! [`bind`] takes the ports before anything expensive starts; [`run`] serves on them until a signal, then drains.

mod admin;
mod connections;
mod context;
mod convert;
mod daemon;
mod describe;
mod fetch_student;
mod frames;
mod health;
mod limits;
mod push_student;
mod requests;
mod service;
mod set_synthesizer;
mod signals;
mod status;
mod stream;
mod tasks;

use std::net::{SocketAddr, TcpListener};

pub use daemon::run;

use crate::config::Config;

/// Why the daemon cannot serve, or did not end as it should.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// A port cannot be had.
    #[error(
        "cannot listen on {address} ({what}): {cause}; is another daemon running there? choose another with {flag}"
    )]
    Bind {
        /// What was to listen there.
        what: &'static str,
        /// The address.
        address: SocketAddr,
        /// The flag that changes it.
        flag: &'static str,
        /// What the operating system said. Told in the message, so not a source of its own, which would be printed again.
        cause: std::io::Error,
    },
    /// The ready file cannot be written; the sentence names it.
    #[error("the ready file: {0}")]
    ReadyFile(std::io::Error),
    /// The engine's thread cannot be started.
    #[error("cannot start the engine's thread: {0}")]
    Engine(std::io::Error),
    /// The operating system refused something that a server needs.
    #[error("cannot serve: {0}")]
    Io(std::io::Error),
    /// The log cannot be opened.
    #[error(transparent)]
    Log(#[from] crate::log::OpenError),
    /// The storage cannot be used.
    #[error(transparent)]
    Storage(#[from] crate::storage::StorageError),
    /// A task ended that lives as long as the daemon.
    #[error("{task} ended: {cause}")]
    Ended {
        /// Which it was.
        task: &'static str,
        /// Why it ended.
        cause: String,
    },
    /// The metrics recorder.
    #[error(transparent)]
    Metrics(#[from] crate::telemetry::InstallError),
    /// The settings cannot be written as JSON, or the contract not be reflected.
    #[error("{0}")]
    Internal(String),
}

impl From<std::io::Error> for ServeError {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

/// The two bound ports.
#[derive(Debug)]
pub struct Listeners {
    grpc: TcpListener,
    admin: TcpListener,
    grpc_address: SocketAddr,
    admin_address: SocketAddr,
}

/// Takes both ports, so that a second daemon on one of them fails before it loads anything onto a device.
pub fn bind(config: &Config) -> Result<Listeners, ServeError> {
    let listen = |what, address, flag| {
        let failed = |cause| ServeError::Bind { what, address, flag, cause };
        let listener = TcpListener::bind(address).map_err(failed)?;
        listener.set_nonblocking(true).map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        Ok::<_, ServeError>((listener, bound))
    };
    let (grpc, grpc_address) = listen("gRPC", config.listen, "--listen")?;
    let (admin, admin_address) = listen("admin pages", config.admin_listen, "--admin-listen")?;
    Ok(Listeners { grpc, admin, grpc_address, admin_address })
}
