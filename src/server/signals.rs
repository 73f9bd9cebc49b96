//! What whoever supervises the process sends and reads: signals, and the file that tells the ports.

use std::io;
use std::path::{Path, PathBuf};

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;

use super::{Listeners, ServeError};
use crate::files;

/// SIGTERM and SIGINT. The first one is told, a second one ends the process at once, whatever it is at.
#[derive(Debug)]
pub(super) struct Signals {
    first: watch::Receiver<Option<&'static str>>,
}

impl Signals {
    /// Listens from now on. `ready_file` is removed where a second signal ends the process.
    pub fn install(ready_file: Option<PathBuf>) -> io::Result<Self> {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let (sender, first) = watch::channel(None);
        tokio::spawn(async move {
            sender.send_replace(Some(next(&mut terminate, &mut interrupt).await));
            // From here on a supervisor that does not want to wait gets its way.
            let name = next(&mut terminate, &mut interrupt).await;
            eprintln!("error: {name} again: exiting at once");
            remove(ready_file.as_deref());
            crate::native::exit_now(1);
        });
        Ok(Self { first })
    }

    /// The name of the first one, once it has come. May be dropped at any time.
    pub async fn first(&mut self) -> &'static str {
        match self.first.wait_for(Option::is_some).await {
            Ok(name) => name.unwrap_or("a signal"),
            // The listening task never ends.
            Err(_) => std::future::pending().await,
        }
    }
}

async fn next(terminate: &mut Signal, interrupt: &mut Signal) -> &'static str {
    tokio::select! {
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    }
}

/// The file that tells which ports were bound; removed when this is dropped.
#[derive(Debug)]
pub(super) struct ReadyFile {
    path: Option<PathBuf>,
}

impl ReadyFile {
    /// Writes it whole or not at all: whoever waits for it may read it the instant it appears.
    pub fn write(path: Option<PathBuf>, listeners: &Listeners) -> Result<Self, ServeError> {
        if let Some(path) = &path {
            let text = serde_json::json!({
                "grpc": listeners.grpc_address.to_string(),
                "admin": listeners.admin_address.to_string(),
                "pid": std::process::id(),
            });
            files::write_whole(path, format!("{text}\n").as_bytes()).map_err(ServeError::ReadyFile)?;
        }
        Ok(Self { path })
    }
}

impl Drop for ReadyFile {
    fn drop(&mut self) {
        remove(self.path.as_deref());
    }
}

fn remove(ready_file: Option<&Path>) {
    if let Some(path) = ready_file {
        let _ = files::remove(path);
    }
}
