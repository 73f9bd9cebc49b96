//! What every method of the service works with.

use std::sync::Arc;

use tokio::sync::{Semaphore, watch};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::requests::Requests;
use crate::delivery::Delivery;
use crate::engine::{EngineState, Statuses};
use crate::log::Faults;
use crate::model::source::NetworkSource;
use crate::students::StudentStore;
use crate::synthesis::settings::{Settings, SynthesizerKind};

/// Whether work can be accepted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// Yes.
    Ready,
    /// The teacher is not on the device yet.
    Loading,
    /// The log can be read, but the storage takes no new images, and synthesis waits for it; the reason.
    Storage(String),
    /// The daemon is about to end.
    Draining,
    /// The engine has failed; the reason.
    Failed(String),
}

/// Shared by all methods. No method takes a lock that the engine holds.
pub struct Context {
    /// The teacher, on the host.
    pub teacher: Arc<NetworkSource>,
    /// What the engine began with.
    pub settings: Settings,
    /// Which synthesizer makes the next batch.
    pub synthesizer: watch::Sender<SynthesizerKind>,
    /// What the engines do.
    pub engines: Statuses,
    /// The log, and who reads it.
    pub delivery: Arc<Delivery>,
    /// What is wrong with the storage at present.
    pub storage_faults: watch::Receiver<Faults>,
    /// Memory of requests.
    pub requests: Arc<Requests>,
    /// Pushed students.
    pub students: Arc<StudentStore>,
    /// A permit for each student that is being fetched.
    pub fetches: Arc<Semaphore>,
    /// The number of those permits.
    pub max_fetches: usize,
    /// A permit for each open stream.
    pub streams: Arc<Semaphore>,
    /// The number of those permits.
    pub max_streams: usize,
    /// A permit for each stream whose messages are made before they are asked for.
    pub early: Arc<Semaphore>,
    /// Cancelled when the drain begins.
    pub draining: CancellationToken,
    /// Cancelled when open calls must end: the drain begins, or the engine has failed.
    pub closing: CancellationToken,
}

impl Context {
    /// What the engine makes from the next batch on.
    pub fn settings(&self) -> Settings {
        Settings { synthesizer: *self.synthesizer.borrow(), ..self.settings.clone() }
    }

    /// The bytes of one image in a message, at this many bytes a pixel.
    pub fn image_bytes(&self, pixel_bytes: u64) -> u64 {
        let (pixels, classes) = (self.teacher.geometry.pixels() as u64, self.teacher.spec.num_classes as u64);
        pixel_bytes * pixels + 4 * classes + 4 * 8 + 4
    }

    /// Whether work can be accepted. Takes no lock that anybody holds for long.
    pub fn readiness(&self) -> Readiness {
        if self.draining.is_cancelled() {
            return Readiness::Draining;
        }
        match self.engines.state() {
            EngineState::Loading => Readiness::Loading,
            EngineState::Failed => {
                Readiness::Failed(self.engines.failure().unwrap_or_else(|| "no reason was given".into()))
            }
            EngineState::Synthesizing | EngineState::Resting | EngineState::Blocked | EngineState::Finished => {
                match self.storage_faults.borrow().reason() {
                    Some(reason) => Readiness::Storage(reason.to_owned()),
                    None => Readiness::Ready,
                }
            }
        }
    }

    /// Err with the status that a new call gets while work cannot be accepted.
    pub fn accept(&self) -> Result<(), Status> {
        match self.readiness() {
            // What is in the log can be read all the same, and a push finds out by itself.
            Readiness::Ready | Readiness::Storage(_) => Ok(()),
            Readiness::Loading => Err(Status::unavailable(
                "the daemon is starting: the teacher is not on the device yet; retry with back-off",
            )),
            Readiness::Draining | Readiness::Failed(_) => Err(self.closing_status()),
        }
    }

    /// The status with which open calls end once [`Self::closing`] is cancelled.
    pub fn closing_status(&self) -> Status {
        match self.readiness() {
            Readiness::Failed(reason) => {
                super::status::of(tonic::Code::Unavailable, &format!("the engine has failed: {reason}"))
            }
            _ => Status::unavailable("draining; resume elsewhere from the last cursor"),
        }
    }
}
