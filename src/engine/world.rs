//! What a synthesis run meets between two optimizer steps: the newest student, the wish to end, the queue to the log.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use metrics::{counter, gauge, histogram};
use tch::{Device, Kind};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::{EngineState, EngineStatus, IDLE_HEARTBEAT, Recall, panic_message};
use crate::model::network::FrozenNetwork;
use crate::students::Student;
use crate::synthesis::batch::DreamBatch;
use crate::synthesis::fast::Restored;
use crate::synthesis::{Flow, Recalled, StepReport, Surroundings};
use crate::telemetry;

/// A student on the device.
pub(super) struct Adopted {
    network: FrozenNetwork,
    version: u64,
}

/// What became of a finished batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Handed {
    /// It is in the queue.
    Over,
    /// The engine must end.
    Stopped,
    /// Whoever took batches has ended, and will take no more.
    NobodyThere,
}

/// Everything outside the optimizer that a run meets.
pub(super) struct World {
    pub device: Device,
    pub kind: Kind,
    pub students: watch::Receiver<Option<Arc<Student>>>,
    pub recall: Recall,
    pub adopted: Option<Adopted>,
    /// The version that was looked at last: adopted, or set aside, or impossible to adopt. Compared with what the channel
    /// holds rather than asking it for a change, since a channel's first value does not count as a change.
    pub considered: u64,
    /// A student was set aside, and no run has given a batch since: the next one's turn comes when one has. Otherwise
    /// students that fail and come all the time would leave no run without one, and nobody would ever see an image, or that
    /// the teacher itself is at fault.
    pub alone: bool,
    /// The version whose part of a gradient was bounded, and that this was told of.
    pub told_bounded: u64,
    /// The arrival of a student's last byte, and how long ago that was when the newest step began, until the first step
    /// against it has been made.
    pub unreported: Option<(Instant, Duration)>,
    pub stop: CancellationToken,
    pub status: Arc<EngineStatus>,
}

impl World {
    fn adopt_newest(&mut self) {
        if self.alone {
            return;
        }
        let Some(student) = self.students.borrow().clone().filter(|student| student.version != self.considered)
        else {
            return;
        };
        self.considered = student.version;
        let load = || FrozenNetwork::load(&student.spec, &student.checkpoint, self.device, self.kind);
        let network = match catch_unwind(AssertUnwindSafe(load)) {
            Ok(network) => network,
            Err(panic) => {
                let error = panic_message(&*panic);
                tracing::error!(%error, version = student.version, "a student cannot be adopted; the one before stays");
                return;
            }
        };
        tracing::debug!(version = student.version, "adopted a student");
        self.adopted = Some(Adopted { network, version: student.version });
        self.unreported = Some((student.received_at, Duration::ZERO));
        gauge!(telemetry::STUDENT_VERSION_ADOPTED).set(student.version as f64);
    }

    pub fn report_staleness(&self) {
        let accepted = self.students.borrow().as_ref().map_or(0, |student| student.version);
        let adopted = self.adopted.as_ref().map_or(0, |adopted| adopted.version);
        gauge!(telemetry::STUDENT_STALENESS_VERSIONS).set(accepted.saturating_sub(adopted) as f64);
    }

    /// Dreams without the student until a newer one comes, for one batch at least.
    pub fn set_student_aside(&mut self, why: &'static str) {
        if let Some(adopted) = self.adopted.take() {
            tracing::error!(version = adopted.version, "{why}; dreaming without a student until the next one comes");
            gauge!(telemetry::STUDENT_VERSION_ADOPTED).set(0.0);
            counter!(telemetry::STUDENTS_SET_ASIDE).increment(1);
            self.alone = true;
        }
    }

    /// Puts a batch into the queue, waiting as long as it is full.
    pub fn hand_over(
        &self,
        runtime: &Handle,
        output: &async_channel::Sender<DreamBatch>,
        batch: DreamBatch,
    ) -> Handed {
        let batch = match output.try_send(batch) {
            Ok(()) => return Handed::Over,
            Err(async_channel::TrySendError::Closed(_)) => return Handed::NobodyThere,
            Err(async_channel::TrySendError::Full(batch)) => batch,
        };
        self.status.enter(EngineState::Blocked);
        runtime.block_on(async {
            let mut send = pin!(output.send(batch));
            loop {
                tokio::select! {
                    sent = &mut send => return if sent.is_ok() { Handed::Over } else { Handed::NobodyThere },
                    () = self.stop.cancelled() => return Handed::Stopped,
                    () = tokio::time::sleep(IDLE_HEARTBEAT) => self.status.beat(),
                }
            }
        })
    }

    /// Does nothing for a while, or until told to stop.
    pub fn rest(&self, runtime: &Handle, pause: Duration) {
        let began = Instant::now();
        while !self.stop.is_cancelled() && began.elapsed() < pause {
            let nap = IDLE_HEARTBEAT.min(pause.saturating_sub(began.elapsed()));
            runtime.block_on(async {
                let _ = tokio::time::timeout(nap, self.stop.cancelled()).await;
            });
            self.status.beat();
        }
    }
}

impl Surroundings for World {
    fn flow(&mut self) -> Flow {
        self.status.beat();
        if self.stop.is_cancelled() { Flow::Stop } else { Flow::Continue }
    }

    fn student(&mut self) -> Option<(&FrozenNetwork, u64)> {
        self.adopt_newest();
        if let Some((received, waited)) = &mut self.unreported {
            *waited = received.elapsed();
        }
        self.adopted.as_ref().map(|adopted| (&adopted.network, adopted.version))
    }

    fn recall(&mut self, count: usize) -> Option<Recalled> {
        self.recall.images(count, &self.stop, || self.status.beat())
    }

    fn generator_restored(&mut self, restored: Restored) {
        let Restored { usual, recent, batches: [from, to] } = restored;
        counter!(telemetry::GENERATOR_RESTORES).increment(1);
        tracing::error!(
            usual_top1 = usual.teacher_top1,
            recent_top1 = recent.teacher_top1,
            usual_r_feature = usual.r_feature,
            recent_r_feature = recent.r_feature,
            "the generator's images collapsed after {from} batches; it goes back to its last good state, after {to}"
        );
        self.set_student_aside("the generator's images collapsed against this student");
    }

    fn step_done(&mut self, report: StepReport) {
        histogram!(telemetry::OPTIMIZER_STEP_SECONDS).record(report.elapsed.as_secs_f64());
        if report.student_version > 0
            && let Some((_, waited)) = self.unreported.take()
        {
            histogram!(telemetry::STUDENT_ADOPTION_SECONDS).record(waited.as_secs_f64());
        }
        if let Some(losses) = report.losses {
            if losses.bounded_images > 0 {
                counter!(telemetry::STUDENT_BOUNDED_IMAGES).increment(losses.bounded_images);
                if self.told_bounded != report.student_version {
                    self.told_bounded = report.student_version;
                    // Also of a student that learns, now and then: no warning.
                    tracing::info!(
                        version = report.student_version,
                        "the student's part of some images' gradient was above the teacher's, and is bounded"
                    );
                }
            }
            gauge!(telemetry::LOSS, "term" => "total").set(losses.total);
            for (term, value) in losses.terms {
                gauge!(telemetry::LOSS, "term" => term).set(value);
            }
        }
        self.report_staleness();
    }
}
