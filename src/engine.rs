//! The device thread: it alone owns tensors. It adopts the newest student between two optimizer steps, synthesizes, and
//! hands finished batches over. Nothing asynchronous runs on it, and nothing asynchronous ever waits for it.

use std::any::Any;
use std::io;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bytes::Bytes;
use metrics::{counter, gauge, histogram};
use tch::{Device, Kind};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub use crate::device::DeviceOption;
use crate::device::{Precision, set_threads};
use crate::model::network::FrozenNetwork;
use crate::model::source::NetworkSource;
use crate::students::Student;
use crate::synthesis::batch::DreamBatch;
use crate::synthesis::fast::FastGenerator;
use crate::synthesis::settings::{Settings, SynthesizerKind};
use crate::synthesis::{Flow, Recalled, StepReport, Surroundings, SynthesisError, Synthesizer, Teacher};
use crate::telemetry;

/// How often an idle or blocked engine says that it is alive.
const IDLE_HEARTBEAT: Duration = Duration::from_millis(500);

/// So many failed runs in a row are no accident; the engine gives up rather than spin.
const MAX_FAILURES: u32 = 10;

/// After so many dropped runs in a row the student is set aside until the next one comes.
const MAX_DROPPED: u32 = 3;

/// The pause after a run that was dropped.
const DROPPED_PAUSE: Duration = Duration::from_millis(100);

/// How soon new demand is seen.
const DEMAND_PAUSE: Duration = Duration::from_millis(50);

/// How much of a generator's learning a crash may cost.
const SAVE_GENERATOR_EVERY: Duration = Duration::from_secs(30);

/// The pause after a run that failed.
const FAILURE_PAUSE: Duration = Duration::from_secs(1);

/// The engine gives way to the runtime's threads by this much (`nice`), so that an RPC is answered at once while
/// libtorch has every core busy.
const NICENESS: i32 = 5;

/// What the engine runs with.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Where tensors live.
    pub device: DeviceOption,
    /// The element type in which the networks compute.
    pub precision: Precision,
    /// Threads of libtorch's operators; default: one a core.
    pub threads: Option<usize>,
    /// What to make.
    pub settings: Settings,
    /// Decides what is made.
    pub seed: u64,
    /// Stop synthesizing after so many images; the last batch may be cut short.
    pub max_images: Option<u64>,
}

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
    fn new() -> Self {
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

    fn beat(&self) {
        self.heartbeat_millis.store(self.started.elapsed().as_millis() as u64, Ordering::Release);
    }

    fn enter(&self, state: EngineState) {
        self.state.store(state as u8, Ordering::Release);
        self.beat();
    }

    fn fail(&self, why: String) {
        tracing::error!(reason = %why, "the engine has failed");
        let _ = self.failure.set(why);
        self.enter(EngineState::Failed);
    }
}

/// A running engine.
#[derive(Debug)]
pub struct Engine {
    /// What it is doing.
    pub status: Arc<EngineStatus>,
    thread: JoinHandle<()>,
}

impl Engine {
    /// Waits for the thread to end, which it does within one optimizer step once it was told to stop; false where it
    /// takes longer than `within`.
    pub fn join(self, within: Duration) -> bool {
        let deadline = Instant::now() + within;
        while !self.thread.is_finished() {
            if Instant::now() >= deadline {
                return false;
            }
            thread::sleep(Duration::from_millis(5));
        }
        self.thread.join().is_ok()
    }
}

/// Whether images are wanted now; asked between two synthesis runs.
pub type Wanted = Arc<dyn Fn() -> bool + Send + Sync>;

/// Images of the log, to be optimized further; may wait for the storage. None where the log has none.
pub type Recall = Arc<dyn Fn(usize) -> Option<Recalled> + Send + Sync>;

/// What the engine is connected to.
pub struct Connections {
    /// Pushed students.
    pub students: watch::Receiver<Option<Arc<Student>>>,
    /// Whether images are wanted.
    pub wanted: Wanted,
    /// Images of the log.
    pub recall: Recall,
    /// Which synthesizer makes the next batch.
    pub synthesizer: watch::Receiver<SynthesizerKind>,
    /// The file of a generator to go on with.
    pub generator: Option<Bytes>,
    /// Where the generator's file goes from time to time, and in the end.
    pub saved: watch::Sender<Option<Bytes>>,
    /// Finished batches.
    pub output: async_channel::Sender<DreamBatch>,
    /// Cancelled when the engine must end.
    pub stop: CancellationToken,
}

/// Starts the engine. Call within a tokio runtime: the engine waits on its queues with that runtime's timers, but no
/// task of the runtime ever runs on the engine's thread.
pub fn spawn(source: Arc<NetworkSource>, options: EngineOptions, connections: Connections) -> io::Result<Engine> {
    // A device that is not there is a mistake to tell at the start, not a daemon that stays up and does nothing.
    let device = options.device.resolve().map_err(io::Error::other)?;
    let status = Arc::new(EngineStatus::new());
    status.enter(EngineState::Loading);
    let runtime = Handle::current();
    let seen = status.clone();
    let thread = thread::Builder::new().name("engine".into()).spawn(move || {
        let outcome =
            catch_unwind(AssertUnwindSafe(|| run(source, options, device, connections, runtime, seen.clone())));
        match outcome {
            Ok(Ok(())) => {}
            Ok(Err(why)) => seen.fail(why),
            Err(panic) => seen.fail(panic_message(&*panic)),
        }
    })?;
    Ok(Engine { status, thread })
}

/// libtorch reports its errors through panics of tch.
fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str).or_else(|| panic.downcast_ref::<&str>().copied());
    // The first line says what happened, the rest is a C++ stack.
    let line = text.and_then(|text| text.split(['\n']).next()?.split("\\n").next()).unwrap_or("unknown panic");
    format!("libtorch: {line}")
}

fn give_way() {
    #[cfg(target_os = "linux")]
    if let Err(error) = rustix::process::setpriority_process(None, NICENESS) {
        tracing::warn!(%error, "cannot lower the engine's priority; RPCs may be answered late under load");
    }
}

fn run(
    source: Arc<NetworkSource>,
    options: EngineOptions,
    device: Device,
    connections: Connections,
    runtime: Handle,
    status: Arc<EngineStatus>,
) -> Result<(), String> {
    // Before libtorch makes its own threads, which inherit the priority.
    give_way();
    set_threads(options.threads.and_then(NonZeroUsize::new));
    let teacher = Teacher::load(&source, device, options.precision.kind());
    tracing::info!(?device, arch = source.spec.arch(), sha256 = %source.identity, "the teacher is on the device");

    let Connections { students, wanted, recall, synthesizer: mut chosen, generator, saved, output, stop } =
        connections;
    let mut synthesizer = Synthesizer::new(options.settings, teacher.num_classes(), options.seed);
    if let Some(file) = generator {
        match FastGenerator::restore(&teacher, synthesizer.settings(), file) {
            Ok(generator) => {
                tracing::info!(batches = generator.batches(), "going on with the stored generator");
                synthesizer.adopt_generator(generator);
            }
            Err(error) => tracing::warn!(%error, "the stored generator cannot be gone on with; a new one begins"),
        }
    }
    let kind = options.precision.kind();
    let mut world = World { device, kind, students, recall, adopted: None, unreported: None, stop, status };
    let mut keeper = Keeper { saved, at: Instant::now(), batches: 0 };
    let outcome = produce(
        &mut synthesizer,
        &teacher,
        &mut world,
        &wanted,
        &mut chosen,
        &output,
        &runtime,
        &mut keeper,
        options.max_images,
    );
    keeper.save(&synthesizer);
    outcome?;
    if !world.stop.is_cancelled() {
        tracing::info!("max_images are made; the log goes on being served");
        world.status.enter(EngineState::Finished);
        world.rest(&runtime, Duration::MAX);
    }
    Ok(())
}

/// Saves the generator from time to time.
struct Keeper {
    saved: watch::Sender<Option<Bytes>>,
    at: Instant,
    /// The generator's batches when it was saved last.
    batches: u64,
}

impl Keeper {
    fn save_if_due(&mut self, synthesizer: &Synthesizer) {
        if self.at.elapsed() >= SAVE_GENERATOR_EVERY {
            self.save(synthesizer);
        }
    }

    fn save(&mut self, synthesizer: &Synthesizer) {
        let Some(generator) = synthesizer.generator().filter(|generator| generator.batches() != self.batches) else {
            return;
        };
        self.batches = generator.batches();
        self.at = Instant::now();
        self.saved.send_replace(Some(generator.save().into()));
    }
}

/// Makes batches until `max_images` are made or the engine must end.
#[allow(clippy::too_many_arguments)] // the thread's world, taken apart once
fn produce(
    synthesizer: &mut Synthesizer,
    teacher: &Teacher,
    world: &mut World,
    wanted: &Wanted,
    chosen: &mut watch::Receiver<SynthesizerKind>,
    output: &async_channel::Sender<DreamBatch>,
    runtime: &Handle,
    keeper: &mut Keeper,
    max_images: Option<u64>,
) -> Result<(), String> {
    let mut made = 0u64;
    let mut failures = 0;
    let mut dropped = 0;
    while max_images.is_none_or(|most| made < most) {
        if !wanted() {
            world.status.enter(EngineState::Resting);
            world.rest(runtime, DEMAND_PAUSE);
            if world.stop.is_cancelled() {
                return Ok(());
            }
            continue;
        }
        world.status.enter(EngineState::Synthesizing);
        let kind = *chosen.borrow_and_update();
        if kind != synthesizer.settings().synthesizer {
            tracing::info!(synthesizer = kind.name(), "switched");
            synthesizer.switch(kind);
        }
        let batch = match catch_unwind(AssertUnwindSafe(|| synthesizer.run(teacher, world))) {
            Ok(Ok(batch)) => batch,
            Ok(Err(SynthesisError::Stopped)) => return Ok(()),
            Ok(Err(error @ SynthesisError::NotFinite { .. })) => {
                count_run("non_finite");
                dropped += 1;
                tracing::warn!(%error, dropped, "a synthesis run was dropped");
                // Not an error of the machine: other noise may well do better, so this does not count as a failure.
                // But where it is the student that makes every run fail, images without one are better than none.
                if dropped % MAX_DROPPED == 0 {
                    world.set_student_aside();
                }
                world.rest(runtime, DROPPED_PAUSE);
                continue;
            }
            Err(panic) => {
                count_run("error");
                failures += 1;
                let error = panic_message(&*panic);
                tracing::error!(%error, failures, "a synthesis run failed");
                if failures >= MAX_FAILURES {
                    return Err(format!("{failures} synthesis runs failed in a row; the last one: {error}"));
                }
                world.rest(runtime, FAILURE_PAUSE);
                continue;
            }
        };
        (failures, dropped) = (0, 0);
        count_run("finished");
        keeper.save_if_due(synthesizer);
        let batch = match max_images {
            Some(most) => batch.truncated((most - made) as usize),
            None => batch,
        };
        made += batch.count() as u64;
        report_batch(&batch);
        world.report_staleness();
        if !world.hand_over(runtime, output, batch) {
            return Ok(());
        }
    }
    Ok(())
}

fn count_run(outcome: &'static str) {
    counter!(telemetry::SYNTHESIS_RUNS, "outcome" => outcome).increment(1);
}

fn report_batch(batch: &DreamBatch) {
    counter!(telemetry::IMAGES_SYNTHESIZED, "synthesizer" => batch.synthesizer).increment(batch.count() as u64);
    gauge!(telemetry::TEACHER_TOP1).set(batch.teacher_top1());
    let competition: f64 = batch.competition.iter().map(|js| f64::from(*js)).sum();
    gauge!(telemetry::COMPETITION_JS).set(competition / batch.count().max(1) as f64);
}

/// A student on the device.
struct Adopted {
    network: FrozenNetwork,
    version: u64,
}

/// Everything outside the optimizer that a run meets.
struct World {
    device: Device,
    kind: Kind,
    students: watch::Receiver<Option<Arc<Student>>>,
    recall: Recall,
    adopted: Option<Adopted>,
    /// The arrival of a student's last byte, and how long ago that was when the newest step began, until the first step
    /// against it has been made.
    unreported: Option<(Instant, Duration)>,
    stop: CancellationToken,
    status: Arc<EngineStatus>,
}

impl World {
    fn adopt_newest(&mut self) {
        if !self.students.has_changed().unwrap_or(false) {
            return;
        }
        let Some(student) = self.students.borrow_and_update().clone() else { return };
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

    fn report_staleness(&self) {
        let accepted = self.students.borrow().as_ref().map_or(0, |student| student.version);
        let adopted = self.adopted.as_ref().map_or(0, |adopted| adopted.version);
        gauge!(telemetry::STUDENT_STALENESS_VERSIONS).set(accepted.saturating_sub(adopted) as f64);
    }

    fn set_student_aside(&mut self) {
        if let Some(adopted) = self.adopted.take() {
            tracing::error!(version = adopted.version, "no run against this student succeeds; dreaming without one");
            gauge!(telemetry::STUDENT_VERSION_ADOPTED).set(0.0);
        }
    }

    /// Puts a batch into the queue, waiting as long as it is full; false where the engine must end.
    fn hand_over(&self, runtime: &Handle, output: &async_channel::Sender<DreamBatch>, batch: DreamBatch) -> bool {
        let batch = match output.try_send(batch) {
            Ok(()) => return true,
            Err(async_channel::TrySendError::Closed(_)) => return false,
            Err(async_channel::TrySendError::Full(batch)) => batch,
        };
        self.status.enter(EngineState::Blocked);
        runtime.block_on(async {
            let mut send = pin!(output.send(batch));
            loop {
                tokio::select! {
                    sent = &mut send => return sent.is_ok(),
                    () = self.stop.cancelled() => return false,
                    () = tokio::time::sleep(IDLE_HEARTBEAT) => self.status.beat(),
                }
            }
        })
    }

    /// Does nothing for a while, or until told to stop.
    fn rest(&self, runtime: &Handle, pause: Duration) {
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
        (self.recall)(count)
    }

    fn step_done(&mut self, report: StepReport) {
        histogram!(telemetry::OPTIMIZER_STEP_SECONDS).record(report.elapsed.as_secs_f64());
        if report.student_version > 0
            && let Some((_, waited)) = self.unreported.take()
        {
            histogram!(telemetry::STUDENT_ADOPTION_SECONDS).record(waited.as_secs_f64());
        }
        if let Some(losses) = report.losses {
            gauge!(telemetry::LOSS, "term" => "total").set(losses.total);
            for (term, value) in losses.terms {
                gauge!(telemetry::LOSS, "term" => term).set(value);
            }
        }
        self.report_staleness();
    }
}
