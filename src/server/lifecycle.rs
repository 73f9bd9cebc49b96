//! From bound ports to exit: start the engine, serve, wait for a signal, drain within a deadline.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic_health::ServingStatus;

use super::admin::{self, Pages};
use super::context::Context;
use super::frames::Framed;
use super::service::{DreamfeedServer, Service};
use super::{Listeners, ServeError, health};
use crate::config::Config;
use crate::delivery::{Delivery, Demand, Reason};
use crate::engine;
use crate::generators;
use crate::log::{AppendError, Log, Maker};
use crate::proto::FILE_DESCRIPTOR_SET;
use crate::storage::Storage;
use crate::students::{Requirements, StudentStore};
use crate::synthesis::batch::DreamBatch;
use crate::telemetry;

/// The largest message a client may send: a piece of a student of 4 MiB is advised, more is tolerated.
pub(super) const MAX_REQUEST_BYTES: usize = 16 << 20;
/// What a client may send ahead: the server's windows bound the rate of pushes over long distances.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;
/// A peer that answers no ping for this long after as long a silence is gone.
const KEEPALIVE: Duration = Duration::from_secs(20);
/// So few replaying streams get their messages made early: with more, the others' turns fill every core anyway, and each
/// costs a message of memory.
const EARLY_STREAMS: usize = 8;
/// The pauses between two attempts to store a batch.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// How long open connections get to close by themselves before health watches are ended, too.
const GOODBYE: Duration = Duration::from_millis(300);

/// Serves until SIGTERM or SIGINT, then drains: health NOT_SERVING, streams end with UNAVAILABLE, the engine stops. A
/// second signal ends the process at once.
pub async fn run(config: Config, listeners: Listeners) -> Result<(), ServeError> {
    let mut signals = Signals::install()?;
    let handle = telemetry::install()?;
    let ready_file = ReadyFile::write(config.ready_file.clone(), &listeners)?;
    let settings = config.engine.settings.clone();
    let spec = &config.teacher.spec;
    let storage = Storage::open(&config.store)?;
    let maker = Maker {
        teacher_sha256: config.teacher.identity.clone(),
        geometry: config.teacher.geometry,
        num_classes: spec.num_classes,
    };
    let log = Log::open(storage.clone(), config.log, maker).await?;
    let requirements = Requirements { num_classes: spec.num_classes, in_channels: spec.in_channels };
    let students = StudentStore::open(storage.clone(), requirements, config.students).await?;
    let generator = generators::newest(&storage).await?;
    let delivery = Delivery::new(log.clone(), &config.teacher.normalization, students.watch());
    let (fault_sender, storage_fault) = watch::channel(None);

    let stop = CancellationToken::new();
    let (output, batches) = async_channel::bounded(config.queue_chunks);
    let demand = Demand::new(config.demand_mode, config.demand_max_lag, log.clone(), delivery.audience().clone());
    let reason = reason(demand, storage_fault.clone());
    let asked = reason.clone();
    let wanted: engine::Wanted = Arc::new(move || asked().is_demand());
    let (runtime, recalling) = (tokio::runtime::Handle::current(), delivery.clone());
    let recall: engine::Recall = Arc::new(move |count| runtime.block_on(recalling.recall(count)));
    let synthesizer = watch::Sender::new(settings.synthesizer);
    let (saved, generators) = watch::channel(None);
    let connections = engine::Connections {
        students: students.watch(),
        wanted,
        recall,
        synthesizer: synthesizer.subscribe(),
        generator,
        saved,
        output,
        stop: stop.clone(),
    };
    let engine =
        engine::spawn(config.teacher.clone(), config.engine.clone(), connections).map_err(ServeError::Engine)?;
    let keeping = tokio::spawn(generators::keep(storage, generators));
    let draining = CancellationToken::new();
    let context = Arc::new(Context {
        teacher: config.teacher.clone(),
        settings,
        synthesizer,
        engine: engine.status.clone(),
        delivery,
        storage_fault,
        students: students.clone(),
        streams: Arc::new(Semaphore::new(config.max_streams)),
        max_streams: config.max_streams,
        early: Arc::new(Semaphore::new(EARLY_STREAMS)),
        closing: CancellationToken::new(),
        draining: draining.clone(),
    });
    let pages = Arc::new(Pages {
        context: context.clone(),
        reason,
        metrics: handle.clone(),
        queue: batches.downgrade(),
        queue_capacity: config.queue_chunks,
        liveness_timeout: config.liveness_timeout,
    });
    pages.measure().await;
    let appending = tokio::spawn(append(batches, log.clone(), fault_sender));
    let mut upkeep = JoinSet::new();
    upkeep.spawn(log.upkeep());
    upkeep.spawn(students.follow());
    upkeep.spawn(async move {
        loop {
            tokio::time::sleep(Duration::from_secs(5)).await;
            handle.run_upkeep();
        }
    });

    let (mut reporter, health_service) = tonic_health::server::health_reporter();
    // The reporter begins with SERVING.
    health::report(&reporter, ServingStatus::NotServing).await;
    let following = tokio::spawn(health::follow(context.clone(), reporter.clone()));
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .map_err(|e| ServeError::Internal(format!("the contract cannot be reflected: {e}")))?;

    let Listeners { grpc, admin, grpc_address, admin_address } = listeners;
    let admin = tokio::net::TcpListener::from_std(admin)?;
    let admin_task = tokio::spawn(axum::serve(admin, admin::router(pages)).into_future());
    let incoming = TcpIncoming::from(tokio::net::TcpListener::from_std(grpc)?)
        .with_nodelay(Some(true))
        .with_keepalive(Some(KEEPALIVE));
    let inner = DreamfeedServer::new(Service(context.clone())).max_decoding_message_size(MAX_REQUEST_BYTES);
    let service = Framed { inner, context: context.clone() };
    let closed = CancellationToken::new();
    let shutdown = closed.clone();
    let mut grpc_task = tokio::spawn(
        Server::builder()
            .http2_keepalive_interval(Some(KEEPALIVE))
            .http2_keepalive_timeout(Some(KEEPALIVE))
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .add_service(health_service)
            .add_service(reflection)
            .add_service(service)
            .serve_with_incoming_shutdown(incoming, async move { shutdown.cancelled().await }),
    );
    tracing::info!(%grpc_address, %admin_address, teacher = %config.teacher.identity, "listening");

    let ended = tokio::select! {
        name = signals.next() => {
            tracing::info!("{name}: draining");
            Ok(())
        }
        ended = &mut grpc_task => Err(ServeError::Grpc(match ended {
            Ok(Ok(())) => "without a reason".into(),
            Ok(Err(error)) => error.to_string(),
            Err(error) => error.to_string(),
        })),
    };

    let deadline = Instant::now() + config.drain_timeout;
    draining.cancel();
    context.closing.cancel();
    stop.cancel();
    // From here on a supervisor that does not want to wait gets its way.
    let impatient = ready_file.path.clone();
    tokio::spawn(async move {
        let name = signals.next().await;
        eprintln!("error: {name} again: exiting at once");
        remove(impatient.as_deref());
        crate::native::exit_now(1);
    });
    // The follower first: it must not report again once the names are cleared.
    let _ = following.await;
    health::report(&reporter, ServingStatus::NotServing).await;
    closed.cancel();
    let remaining = deadline.saturating_duration_since(Instant::now());
    let engine = tokio::task::spawn_blocking(move || engine.join(remaining));
    if ended.is_ok() && timeout(GOODBYE, &mut grpc_task).await.is_err() {
        health::clear(&mut reporter).await;
        if timeout_at(deadline, &mut grpc_task).await.is_err() {
            tracing::warn!("connections were still open at the drain's deadline");
            grpc_task.abort();
        }
    }
    let stopped = engine.await.unwrap_or(false);
    if timeout_at(deadline, appending).await.is_err() {
        tracing::warn!(
            "the storage took no images until the drain's deadline; those that still waited for it are lost"
        );
    }
    if timeout_at(deadline, keeping).await.is_err() {
        tracing::warn!("the generator was not stored until the drain's deadline; its newest learning is lost");
    }
    admin_task.abort();
    upkeep.abort_all();
    drop(ready_file);
    ended?;
    if !stopped {
        // One optimizer step can take longer than a drain may. Everything else is cleanly closed, and ending the process
        // in the ordinary way would tear libtorch down under the running step.
        tracing::warn!("the engine is still in its last optimizer step; leaving it");
        crate::native::exit_now(0);
    }
    tracing::info!("drained");
    Ok(())
}

/// Whether the engine should make images, and why.
fn reason(demand: Demand, storage_fault: watch::Receiver<Option<String>>) -> Arc<dyn Fn() -> Reason + Send + Sync> {
    Arc::new(move || if storage_fault.borrow().is_some() { Reason::Storage } else { demand.reason() })
}

/// Moves batches from the engine's queue into the log. While the storage fails, the batch waits here, the queue fills and
/// the engine rests: nothing that cost device time is dropped.
async fn append(batches: async_channel::Receiver<DreamBatch>, log: Arc<Log>, fault: watch::Sender<Option<String>>) {
    while let Ok(batch) = batches.recv().await {
        let batch = Arc::new(batch);
        let mut pause = FIRST_PAUSE;
        loop {
            match log.append(&batch).await {
                Ok(sequence) => {
                    tracing::debug!(sequence, "chunk appended");
                    if fault.send_replace(None).is_some() {
                        tracing::info!("the storage takes images again");
                    }
                    break;
                }
                Err(AppendError::Chunk(error)) => {
                    metrics::counter!(telemetry::BATCHES_REFUSED).increment(1);
                    tracing::error!("a batch was dropped: {error}");
                    break;
                }
                Err(AppendError::Storage(error)) => {
                    metrics::counter!(telemetry::STORAGE_ERRORS, "operation" => "append").increment(1);
                    fault.send_replace(Some(error.to_string()));
                    tokio::time::sleep(pause).await;
                    pause = (pause * 2).min(LONGEST_PAUSE);
                }
            }
        }
        if let Err(error) = log.retain().await {
            metrics::counter!(telemetry::STORAGE_ERRORS, "operation" => "upkeep").increment(1);
            tracing::warn!(%error, "an evicted chunk could not be deleted yet");
        }
    }
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn install() -> std::io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

/// The file that tells which ports were bound; removed when this is dropped.
struct ReadyFile {
    path: Option<PathBuf>,
}

impl ReadyFile {
    /// Writes it whole or not at all: whoever waits for it may read it the instant it appears.
    fn write(path: Option<PathBuf>, listeners: &Listeners) -> Result<Self, ServeError> {
        if let Some(path) = &path {
            let pid = std::process::id();
            let text = serde_json::json!({
                "grpc": listeners.grpc_address.to_string(),
                "admin": listeners.admin_address.to_string(),
                "pid": pid,
            });
            let failed = |cause| ServeError::ReadyFile { path: path.clone(), cause };
            let mut partial = path.clone().into_os_string();
            partial.push(format!(".{pid}.tmp"));
            std::fs::write(&partial, format!("{text}\n")).map_err(failed)?;
            std::fs::rename(&partial, path).map_err(failed)?;
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
        let _ = std::fs::remove_file(path);
    }
}
