//! The daemon from outside: a real process, real sockets, a small random teacher.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

pub mod s3;

use std::collections::{BTreeMap, HashMap};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use bytes::Bytes;
use dreamfeed::client::{Batch, BatchStream, Client};
use dreamfeed::model::checkpoint::Checkpoint;
use dreamfeed::model::spec::NetworkSpec;
use futures_util::StreamExt;
use safetensors::tensor::{Dtype, TensorView};
use tempfile::TempDir;

/// Far beyond what anything here takes, also on a busy machine: a test waits on conditions, never on the clock.
pub const LONG: Duration = Duration::from_secs(120);

pub const ARCH: &str = "resnet8";
pub const CHANNELS: usize = 1;
pub const CLASSES: usize = 10;

/// Named tensors that a test can spoil before they become a file.
pub type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

/// A network with finite weights; different seeds give different weights.
pub fn network(arch: &str, channels: usize, classes: usize, seed: u64) -> Tensors {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    let spec = NetworkSpec::fresh(arch, channels, classes).unwrap();
    let tensor = |t: dreamfeed::model::spec::ExpectedTensor| {
        let size: usize = t.shape.iter().product();
        let positive = t.name.ends_with("running_var");
        let values = (0..size).map(|_| if positive { 1.0 + random().abs() } else { random() * 0.2 });
        let data = values.flat_map(f32::to_le_bytes).collect();
        (t.name, (Dtype::F32, t.shape, data))
    };
    spec.tensors().into_iter().map(tensor).collect()
}

pub fn file(tensors: &Tensors, metadata: &[(&str, &str)]) -> Bytes {
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, data))| (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap()));
    let metadata: HashMap<String, String> =
        metadata.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    safetensors::serialize(views, Some(metadata)).unwrap().into()
}

/// A student that the test daemons accept.
pub fn student(seed: u64) -> Bytes {
    file(&network(ARCH, CHANNELS, CLASSES, seed), &[])
}

pub fn write_teacher(folder: &Path) -> PathBuf {
    let path = folder.join("teacher.safetensors");
    let metadata = [("arch", ARCH), ("mean", "0.5"), ("std", "0.25"), ("image_size", "8,8")];
    std::fs::write(&path, file(&network(ARCH, CHANNELS, CLASSES, 1), &metadata)).unwrap();
    path
}

/// A command that serves a fresh teacher on free ports, in a clean environment; nothing of it runs yet.
pub fn serve_command(folder: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dreamfeed"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("DREAMFEED_") {
            command.env_remove(name);
        }
    }
    command.arg("serve");
    if !arguments.contains(&"--teacher") {
        command.arg("--teacher").arg(write_teacher(folder));
    }
    command.args(["--device", "cpu", "--threads", "1"]);
    if !arguments.contains(&"--synthesizer") {
        command.args(["--synthesizer", "noise"]);
    }
    if !arguments.contains(&"--store") {
        command.arg("--store").arg(folder.join("store"));
    }
    command.args(arguments);
    command
}

/// A running daemon; killed when dropped.
pub struct Daemon {
    pub child: Child,
    pub grpc: String,
    pub admin: String,
    pub folder: TempDir,
}

impl Daemon {
    /// Starts one and waits until it is ready.
    pub fn start(arguments: &[&str]) -> Self {
        let daemon = Self::launch(arguments);
        daemon.wait_ready();
        daemon
    }

    /// Starts one and waits until its ports are bound.
    pub fn launch(arguments: &[&str]) -> Self {
        Self::launch_in(tempfile::tempdir().unwrap(), arguments)
    }

    /// Drains this one, and starts another on the same folder.
    pub fn restart(&mut self, arguments: &[&str]) {
        self.restart_unready(arguments);
        self.wait_ready();
    }

    /// As [`Self::restart`], without the wait until it is ready.
    pub fn restart_unready(&mut self, arguments: &[&str]) {
        self.signal("TERM");
        assert!(self.wait_exit().success());
        let folder = std::mem::replace(&mut self.folder, tempfile::tempdir().unwrap());
        *self = Self::launch_in(folder, arguments);
    }

    /// Starts one in this folder, where an earlier one may have been.
    pub fn launch_in(folder: TempDir, arguments: &[&str]) -> Self {
        Self::launch_with(folder, arguments, |_| {})
    }

    /// As [`Self::launch_in`], with a last word on the command: its environment, its user.
    pub fn launch_with(folder: TempDir, arguments: &[&str], adjust: impl FnOnce(&mut Command)) -> Self {
        let ready_file = folder.path().join("ready.json");
        let log = std::fs::File::create(folder.path().join("daemon.log")).unwrap();
        let mut command = serve_command(folder.path(), arguments);
        command.args(["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--log-level", "debug,h2=info"]);
        command.arg("--ready-file").arg(&ready_file).stdout(Stdio::null()).stderr(log);
        adjust(&mut command);
        let mut child = command.spawn().unwrap();
        let mut text = String::new();
        wait_for("the ready file", || {
            if let Some(status) = child.try_wait().unwrap() {
                let log = std::fs::read_to_string(folder.path().join("daemon.log")).unwrap();
                panic!("the daemon ended with {status}: {log}");
            }
            text = std::fs::read_to_string(&ready_file).unwrap_or_default();
            !text.is_empty()
        });
        let ready: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(ready["pid"], child.id());
        let address = |key: &str| ready[key].as_str().unwrap().to_owned();
        Self { child, grpc: address("grpc"), admin: address("admin"), folder }
    }

    pub fn wait_ready(&self) {
        wait_for("readiness", || self.get("/readyz").0 == 200);
    }

    pub async fn client(&self) -> Client {
        Client::connect(&self.grpc).await.unwrap()
    }

    /// Status and body of an admin page.
    pub fn get(&self, path: &str) -> (u16, String) {
        try_get(&self.admin, path).unwrap_or_default()
    }

    /// The value of a series as `/metrics` writes it, labels and all; None where it is not there.
    pub fn metric(&self, series: &str) -> Option<f64> {
        let (status, text) = self.get("/metrics");
        assert_eq!(status, 200);
        text.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' ')?.trim().parse().ok())
    }

    pub fn wait_metric(&self, series: &str, value: f64) {
        wait_for(&format!("{series} = {value}, not {:?}", self.metric(series)), || {
            self.metric(series) == Some(value)
        });
    }

    /// What the daemon holds in memory now.
    pub fn resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap() << 10
    }

    /// Sends a signal by name, for example TERM.
    pub fn signal(&self, name: &str) {
        let status = Command::new("kill").arg(format!("-{name}")).arg(self.child.id().to_string()).status().unwrap();
        assert!(status.success());
    }

    pub fn wait_exit(&mut self) -> ExitStatus {
        let mut status = None;
        wait_for("the daemon's end", || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("daemon.log")).unwrap_or_default()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(40).collect();
            eprintln!("--- the daemon's log, newest first ---\n{}", tail.join("\n"));
        }
    }
}

pub fn try_get(address: &str, path: &str) -> Option<(u16, String)> {
    let mut socket = TcpStream::connect(address).ok()?;
    socket.set_read_timeout(Some(LONG)).ok()?;
    write!(socket, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").ok()?;
    let mut text = String::new();
    socket.read_to_string(&mut text).ok()?;
    let status = text.split(' ').nth(1)?.parse().ok()?;
    Some((status, text.split_once("\r\n\r\n")?.1.to_owned()))
}

pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + LONG;
    while !condition() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The future's output, within a generous bound.
pub async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(LONG, future).await.expect("waited in vain")
}

/// What a stream sent, for comparison: each image's sequence and pixels.
pub fn images(payload: &Checkpoint) -> Vec<Vec<u8>> {
    let tensor = payload.get("images").unwrap();
    let size: usize = tensor.shape[1..].iter().product();
    tensor.data.chunks_exact(size).map(<[u8]>::to_vec).collect()
}

/// Batches until there are at least so many images.
pub async fn take(stream: &mut BatchStream, images: usize) -> Vec<Batch> {
    let mut batches: Vec<Batch> = Vec::new();
    while batches.iter().map(|batch| batch.count).sum::<usize>() < images {
        batches.push(within(stream.next()).await.expect("the stream goes on").unwrap());
    }
    batches
}

/// Each batch begins where the one before it ended.
pub fn assert_consecutive(batches: &[Batch], from: u64) {
    let mut next = from;
    for batch in batches {
        assert_eq!(batch.first_sequence, next);
        next += batch.count as u64;
    }
}
