//! STAND-IN for the device thread, until the real one is merged: random batches from a plain thread, so that the server
//! is tested without a model.

use std::fmt;
use std::str::FromStr;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant, SystemTime};

use rand::{Rng, RngExt, SeedableRng};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::model::source::NetworkSource;
use crate::students::Student;
use crate::synthesis::batch::DreamBatch;
use crate::synthesis::settings::Settings;

/// The device that synthesis runs on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum DeviceOption {
    /// CUDA if there is one, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// The CUDA device of this index.
    Cuda(usize),
}

impl FromStr for DeviceOption {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("cuda:").map(str::parse)) {
            ("auto", _) => Ok(Self::Auto),
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda", _) => Ok(Self::Cuda(0)),
            (_, Some(Ok(index))) => Ok(Self::Cuda(index)),
            _ => Err(format!("device {text:?}: give auto, cpu, cuda or cuda:N")),
        }
    }
}

impl TryFrom<String> for DeviceOption {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<DeviceOption> for String {
    fn from(device: DeviceOption) -> Self {
        device.to_string()
    }
}

impl fmt::Display for DeviceOption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

/// How to run the engine.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// The device.
    pub device: DeviceOption,
    /// libtorch's threads; None: its default.
    pub threads: Option<usize>,
    /// What to make.
    pub settings: Settings,
    /// The seed of every random number.
    pub seed: u64,
    /// Synthesis stops after this many images.
    pub max_images: Option<u64>,
}

/// What the engine is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum EngineState {
    /// Bringing the teacher onto the device.
    Loading,
    /// Making images.
    Synthesizing,
    /// Waiting for room in the output queue.
    Blocked,
    /// All images were made; idle.
    Finished,
    /// Ended by an error.
    Failed,
}

/// The engine's condition, readable without a lock.
pub struct EngineStatus {
    state: AtomicU8,
    heartbeat_ms: AtomicU64,
    start: Instant,
    failure: OnceLock<String>,
}

impl EngineStatus {
    /// What the engine is doing.
    pub fn state(&self) -> EngineState {
        match self.state.load(Ordering::Acquire) {
            0 => EngineState::Loading,
            1 => EngineState::Synthesizing,
            2 => EngineState::Blocked,
            3 => EngineState::Finished,
            _ => EngineState::Failed,
        }
    }

    /// How long ago the engine last showed that it lives.
    pub fn heartbeat_age(&self) -> Duration {
        self.start.elapsed().saturating_sub(Duration::from_millis(self.heartbeat_ms.load(Ordering::Acquire)))
    }

    /// Why it failed.
    pub fn failure(&self) -> Option<String> {
        self.failure.get().cloned()
    }

    fn set(&self, state: EngineState) {
        self.state.store(state as u8, Ordering::Release);
        self.beat();
    }

    fn beat(&self) {
        self.heartbeat_ms.store(self.start.elapsed().as_millis() as u64, Ordering::Release);
    }
}

/// A running engine.
pub struct Engine {
    /// Its condition.
    pub status: Arc<EngineStatus>,
    thread: std::thread::JoinHandle<()>,
}

/// Starts the engine's thread.
pub fn spawn(
    source: Arc<NetworkSource>,
    options: EngineOptions,
    students: watch::Receiver<Option<Arc<Student>>>,
    output: async_channel::Sender<DreamBatch>,
    stop: CancellationToken,
) -> std::io::Result<Engine> {
    let status = Arc::new(EngineStatus {
        state: AtomicU8::new(0),
        heartbeat_ms: AtomicU64::new(0),
        start: Instant::now(),
        failure: OnceLock::new(),
    });
    let shared = status.clone();
    let thread = std::thread::Builder::new()
        .name("engine".into())
        .spawn(move || run(&source, &options, &students, &output, &stop, &shared))?;
    Ok(Engine { status, thread })
}

impl Engine {
    /// Waits for the thread to end; false where it did not.
    pub fn join(self, within: Duration) -> bool {
        let deadline = Instant::now() + within;
        while !self.thread.is_finished() {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        self.thread.join().is_ok()
    }
}

fn run(
    source: &NetworkSource,
    options: &EngineOptions,
    students: &watch::Receiver<Option<Arc<Student>>>,
    output: &async_channel::Sender<DreamBatch>,
    stop: &CancellationToken,
    status: &EngineStatus,
) {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(options.seed);
    std::thread::sleep(Duration::from_millis(50));
    status.set(EngineState::Synthesizing);
    let mut made = 0u64;
    while !stop.is_cancelled() {
        status.beat();
        if options.max_images.is_some_and(|max| made >= max) {
            status.set(EngineState::Finished);
            std::thread::sleep(Duration::from_millis(10));
            continue;
        }
        let count = options.settings.batch_size;
        let mut images = vec![0; count * source.geometry.pixels()];
        rng.fill_bytes(&mut images);
        let k = source.spec.num_classes;
        let version = students.borrow().as_ref().map_or(0, |student| student.version as i64);
        let mut batch = DreamBatch {
            images,
            labels: (0..count).map(|i| (i % k) as i64).collect(),
            teacher_logits: (0..count * k).map(|_| rng.random_range(-1.0..1.0)).collect(),
            student_version: vec![version; count],
            competition: vec![0.0; count],
            geometry: source.geometry,
            num_classes: k,
            synthesizer: options.settings.synthesizer.name(),
            created_at: SystemTime::now(),
        };
        made += count as u64;
        std::thread::sleep(Duration::from_millis(2));
        while let Err(async_channel::TrySendError::Full(back)) = output.try_send(batch) {
            status.set(EngineState::Blocked);
            if stop.is_cancelled() {
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
            batch = back;
        }
        status.set(EngineState::Synthesizing);
    }
}
