//! The engine seen from other threads: a few atomics, no lock.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What the engine is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EngineState {
    /// The teacher is on its way to the device.
    Loading,
    /// Making images.
    Synthesizing,
    /// No images are wanted.
    Resting,
    /// A finished batch waits because the queue to the log is full.
    Blocked,
    /// `max_images` are made.
    Finished,
    /// It has ended for good; [`EngineStatus::failure`] says why.
    Failed,
}

impl EngineState {
    /// Every state, in the order of their numbers.
    pub const ALL: [Self; 6] =
        [Self::Loading, Self::Synthesizing, Self::Resting, Self::Blocked, Self::Finished, Self::Failed];

    /// The state's name in metrics and pages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Loading => "loading",
            Self::Synthesizing => "synthesizing",
            Self::Resting => "resting",
            Self::Blocked => "blocked",
            Self::Finished => "finished",
            Self::Failed => "failed",
        }
    }
}

/// The engine seen from other threads; no method waits for it.
#[derive(Debug)]
pub struct EngineStatus {
    started: Instant,
    state: AtomicU8,
    heartbeat_millis: AtomicU64,
    failure: OnceLock<String>,
}

impl EngineStatus {
    pub(super) fn new() -> Self {
        Self {
            started: Instant::now(),
            state: AtomicU8::new(0),
            heartbeat_millis: AtomicU64::new(0),
            failure: OnceLock::new(),
        }
    }

    /// What it is doing.
    pub fn state(&self) -> EngineState {
        EngineState::ALL[usize::from(self.state.load(Ordering::Acquire)).min(EngineState::ALL.len() - 1)]
    }

    /// How long ago it last made progress, or said that it has nothing to do.
    pub fn heartbeat_age(&self) -> Duration {
        let last = Duration::from_millis(self.heartbeat_millis.load(Ordering::Acquire));
        self.started.elapsed().saturating_sub(last)
    }

    /// Why it failed, where it did.
    pub fn failure(&self) -> Option<String> {
        self.failure.get().cloned()
    }

    pub(super) fn beat(&self) {
        self.heartbeat_millis.store(self.started.elapsed().as_millis() as u64, Ordering::Release);
    }

    pub(super) fn enter(&self, state: EngineState) {
        self.state.store(state as u8, Ordering::Release);
        self.beat();
    }

    pub(super) fn fail(&self, why: String) {
        tracing::error!(reason = %why, "the engine has failed");
        let _ = self.failure.set(why);
        self.enter(EngineState::Failed);
    }
}
