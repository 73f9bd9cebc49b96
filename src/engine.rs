//! The device thread: it alone owns tensors. It adopts the newest student between two optimizer steps, synthesizes, and
//! hands finished batches over. Nothing asynchronous runs on it, and nothing asynchronous ever waits for it.

use std::any::Any;
use std::io;
use std::num::NonZeroUsize;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use bytes::Bytes;
use metrics::{counter, gauge};
use tch::Device;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub use crate::device::DeviceOption;
use crate::device::{Precision, set_threads};
use crate::model::golden::Proof;
use crate::model::source::NetworkSource;
use crate::students::Student;
use crate::synthesis::batch::DreamBatch;
use crate::synthesis::fast::FastGenerator;
use crate::synthesis::settings::{Settings, SynthesizerKind};
use crate::synthesis::{SynthesisError, Synthesizer, Teacher};
use crate::telemetry;

mod list;
mod recall;
mod status;
mod world;

pub use list::{Engines, Statuses};
pub use recall::Recall;
pub use status::{EngineState, EngineStatus};
use world::{Handed, World};

/// This many runs in a row that give no batch although no student takes part do not happen by accident; the engine gives up rather
/// than spin.
const MAX_FAILURES: u32 = 10;

/// After this many runs in a row that give no batch the student is set aside until the next one comes.
const MAX_BLAMED: u32 = 3;

/// The pause after a run whose loss was not finite.
const DROPPED_PAUSE: Duration = Duration::from_millis(100);

/// How often an idle or blocked engine says that it is alive.
const IDLE_HEARTBEAT: Duration = Duration::from_millis(500);

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
    /// Stop synthesizing after this many images; the last batch may be cut short.
    pub max_images: Option<u64>,
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
    if source.proof == Some(Proof::Unproven) {
        tracing::warn!(
            "the teacher's file brings a graph without a golden sample: nothing shows that it computes what it was"
        );
    }

    let Connections { students, wanted, recall, synthesizer: chosen, generator, saved, output, stop } = connections;
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
    let world = World {
        device,
        kind,
        students,
        recall,
        adopted: None,
        considered: 0,
        alone: false,
        told_bounded: 0,
        unreported: None,
        stop,
        status,
    };
    let keeper = Keeper { saved, at: Instant::now(), batches: 0 };
    let mut production = Production { synthesizer, teacher, world, wanted, chosen, output, runtime, keeper };
    let outcome = production.run(options.max_images);
    let Production { synthesizer, world, runtime, mut keeper, .. } = production;
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

/// Everything that making batches takes.
struct Production {
    synthesizer: Synthesizer,
    teacher: Teacher,
    world: World,
    wanted: Wanted,
    chosen: watch::Receiver<SynthesizerKind>,
    output: async_channel::Sender<DreamBatch>,
    runtime: Handle,
    keeper: Keeper,
}

impl Production {
    /// Makes batches until `max_images` are made or the engine must end.
    fn run(&mut self, max_images: Option<u64>) -> Result<(), String> {
        let mut made = 0u64;
        let mut vain = Vain::default();
        while max_images.is_none_or(|most| made < most) {
            if !(self.wanted)() {
                self.world.status.enter(EngineState::Resting);
                self.world.rest(&self.runtime, DEMAND_PAUSE);
                if self.world.stop.is_cancelled() {
                    return Ok(());
                }
                continue;
            }
            self.world.status.enter(EngineState::Synthesizing);
            let kind = *self.chosen.borrow_and_update();
            if kind != self.synthesizer.settings().synthesizer {
                tracing::info!(synthesizer = kind.name(), "switched");
                self.synthesizer.switch(kind);
            }
            // A panic out of tch::no_grad leaves gradients switched off for this thread, and the next backward pass would
            // dereference a null pointer.
            let run = || tch::with_grad(|| self.synthesizer.run(&self.teacher, &mut self.world));
            let run = catch_unwind(AssertUnwindSafe(run));
            let (outcome, error, pause) = match run {
                Ok(Ok(batch)) => {
                    vain = Vain::default();
                    self.world.alone = false;
                    made += self.finish(batch, max_images.map(|most| most - made))?;
                    if self.world.stop.is_cancelled() {
                        return Ok(());
                    }
                    continue;
                }
                Ok(Err(SynthesisError::Stopped)) => return Ok(()),
                Ok(Err(error)) => ("non_finite", error.to_string(), DROPPED_PAUSE),
                Err(panic) => ("error", panic_message(&*panic), FAILURE_PAUSE),
            };
            count_run(outcome);
            // Told once: the metric counts the rest.
            if vain.blamed + vain.failures == 0 {
                tracing::warn!(%error, "a synthesis run gave no batch");
            }
            // Where it is the student that makes every run fail, images without one are better than none, and no student
            // can end the engine.
            if self.world.adopted.is_some() {
                vain.blamed += 1;
                if vain.blamed == MAX_BLAMED {
                    vain.blamed = 0;
                    self.world.set_student_aside("no run against this student succeeds");
                }
            } else {
                vain.failures += 1;
                if vain.failures == MAX_BLAMED {
                    self.synthesizer.recover_generator();
                }
                if vain.failures >= MAX_FAILURES {
                    return Err(format!(
                        "{MAX_FAILURES} synthesis runs in a row gave no batch; the last one: {error}"
                    ));
                }
            }
            self.world.rest(&self.runtime, pause);
        }
        Ok(())
    }

    /// Hands a batch over, of which `most` images are still wanted; how many it had.
    fn finish(&mut self, batch: DreamBatch, most: Option<u64>) -> Result<u64, String> {
        count_run("finished");
        self.keeper.save_if_due(&self.synthesizer);
        let batch = match most {
            Some(most) => batch.truncated(usize::try_from(most).unwrap_or(usize::MAX)),
            None => batch,
        };
        let count = batch.count() as u64;
        report_batch(&batch);
        self.world.report_staleness();
        match self.world.hand_over(&self.runtime, &self.output, batch) {
            Handed::Over | Handed::Stopped => Ok(count),
            Handed::NobodyThere => {
                Err("nobody takes finished batches any more: the log's append task has ended".into())
            }
        }
    }
}

/// Runs in a row that gave no batch.
#[derive(Default)]
struct Vain {
    /// With a student.
    blamed: u32,
    /// Without.
    failures: u32,
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
