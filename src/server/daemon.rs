//! A daemon's life: [`Daemon::open`] starts everything, [`Daemon::serve`] waits for a signal or for a task that ended
//! although none should, [`Daemon::drain`] ends everything within a deadline.

use std::future::IntoFuture;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use tonic::transport::Server;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use super::admin::{self, Opened, Pages};
use super::connections::{Connections, Port};
use super::context::Context;
use super::frames::Framed;
use super::limits::{CONNECTION_WINDOW, EARLY_STREAMS, KEEPALIVE, MAX_REQUEST_BYTES, STREAM_WINDOW};
use super::requests::Requests;
use super::service::{DreamfeedServer, Service};
use super::signals::{ReadyFile, Signals};
use super::tasks::{Ended, Tasks};
use super::{Listeners, ServeError, health};
use crate::config::Config;
use crate::delivery::{Delivery, Demand, Flight, Reason};
use crate::engine::{self, Engines, Recall};
use crate::generators;
use crate::log::{Faults, Log, Maker};
use crate::proto::FILE_DESCRIPTOR_SET;
use crate::storage::Storage;
use crate::students::{Requirements, StudentStore};
use crate::synthesis::batch::DreamBatch;
use crate::telemetry;

/// How long open connections get to close by themselves before health watches are ended, too.
const GOODBYE: Duration = Duration::from_millis(300);
/// How often histograms drop what they need not keep.
const METRICS_UPKEEP: Duration = Duration::from_secs(5);

/// Names of the tasks that a drain waits for.
const ADMIN: &str = "the server of the admin pages";
const GRPC: &str = "the gRPC server";
const HEALTH: &str = "the task that reports health";
const INTAKE: &str = "the task that appends batches to the log";
const GENERATORS: &str = "the task that stores the generator";

/// Serves until SIGTERM or SIGINT, then drains: health NOT_SERVING, streams end with UNAVAILABLE, the engines stop. A
/// second signal ends the process at once.
pub async fn run(config: Config, listeners: Listeners) -> Result<(), ServeError> {
    let Some(mut daemon) = Daemon::open(config, listeners).await? else { return Ok(()) };
    let served = daemon.serve().await;
    daemon.drain().await;
    served
}

/// A running daemon.
struct Daemon {
    signals: Signals,
    ready_file: ReadyFile,
    context: Arc<Context>,
    /// One a device.
    engines: Engines,
    /// Cancelled when they must end.
    stop: CancellationToken,
    tasks: Tasks,
    /// What the tasks behind the engines read. Held here too, so that they do not end when an engine fails.
    sources: (async_channel::Sender<DreamBatch>, watch::Sender<Option<Bytes>>),
    reporter: HealthReporter,
    /// Cancelled when the gRPC server takes no more connections.
    closed: CancellationToken,
    drain_timeout: Duration,
}

/// What a storage holds.
struct Stored {
    storage: Storage,
    log: Arc<Log>,
    students: Arc<StudentStore>,
    generator: Option<Bytes>,
}

impl Stored {
    async fn open(config: &Config) -> Result<Self, ServeError> {
        let spec = &config.teacher.spec;
        let storage = Storage::open(&config.store)?;
        let maker = Maker {
            teacher_sha256: config.teacher.identity.clone(),
            geometry: config.teacher.geometry,
            num_classes: spec.num_classes,
        };
        let log = Log::open(storage, config.log, maker).await?;
        // Students and generators change nothing either where the store is not this log's any more.
        let storage = log.storage().clone();
        let requirements = Requirements { num_classes: spec.num_classes, in_channels: spec.in_channels };
        let students = StudentStore::open(storage.clone(), requirements, config.students).await?;
        let generator = generators::newest(&storage).await?;
        Ok(Self { storage, log, students, generator })
    }
}

impl Daemon {
    /// Starts everything. Signals are heard and the admin pages answer from the first line on, however long the storage
    /// takes; None where a signal came before all was open.
    async fn open(config: Config, listeners: Listeners) -> Result<Option<Self>, ServeError> {
        let mut signals = Signals::install(config.ready_file.clone())?;
        let metrics = telemetry::install()?;
        let ready_file = ReadyFile::write(config.ready_file.clone(), &listeners)?;
        let Listeners { grpc, admin, grpc_address, admin_address } = listeners;
        let mut tasks = Tasks::default();
        let pages = Arc::new(Pages::new(metrics.clone()));
        let limits = config.limits;
        let admin = Connections::new(admin, Port::Admin, limits.admin_connections, limits.header_timeout)?;
        let grpc = Connections::new(grpc, Port::Grpc, limits.connections, limits.header_timeout)?;
        tasks.spawn(ADMIN, axum::serve(admin, admin::router(pages.clone())).into_future());
        let stored = tokio::select! {
            stored = Stored::open(&config) => stored?,
            ended = tasks.next_end() => return Err(ended.into()),
            name = signals.first() => {
                tracing::info!("{name} while the store was being opened: ending");
                return Ok(None);
            }
        };

        let Stored { storage, log, students, generator } = stored;
        // Each stream has a message on its way, and some have one more.
        let flight = Flight::new(limits.message_bytes, config.max_streams + EARLY_STREAMS);
        let delivery = Delivery::new(log.clone(), &config.teacher.normalization, students.watch(), flight);
        let demand = Demand::new(config.demand_mode, config.demand_max_lag, log.clone(), delivery.audience().clone());
        let reason = reason(demand, log.faults());
        let settings = config.engine.settings.clone();
        let synthesizer = watch::Sender::new(settings.synthesizer);
        let (output, batches) = async_channel::bounded(config.queue_chunks);
        let (saved, generators) = watch::channel(None);
        let stop = CancellationToken::new();
        let asked = reason.clone();
        let recalling = delivery.clone();
        let connections = engine::Connections {
            students: students.watch(),
            wanted: Arc::new(move || asked().is_demand()),
            recall: Recall::new(move |count| {
                let delivery = recalling.clone();
                Box::pin(async move { delivery.recall(count).await })
            }),
            synthesizer: synthesizer.subscribe(),
            generator,
            saved: saved.clone(),
            output: output.clone(),
            stop: stop.clone(),
        };
        let engine =
            engine::spawn(config.teacher.clone(), config.engine.clone(), connections).map_err(ServeError::Engine)?;
        let engines = Engines::new(vec![engine]);
        let context = Arc::new(Context {
            teacher: config.teacher.clone(),
            settings,
            synthesizer,
            engines: engines.statuses(),
            delivery,
            storage_faults: log.faults(),
            requests: Requests::new(limits.request_bytes, limits.call_timeout),
            students: students.clone(),
            fetches: Arc::new(Semaphore::new(config.max_fetches)),
            max_fetches: config.max_fetches,
            streams: Arc::new(Semaphore::new(config.max_streams)),
            max_streams: config.max_streams,
            early: Arc::new(Semaphore::new(EARLY_STREAMS)),
            closing: CancellationToken::new(),
            draining: CancellationToken::new(),
        });
        let opened = Opened {
            context: context.clone(),
            reason,
            queue: batches.downgrade(),
            queue_capacity: config.queue_chunks,
            liveness_timeout: config.liveness_timeout,
        };
        opened.measure().await;
        pages.open(opened);

        let (reporter, health_service) = tonic_health::server::health_reporter();
        // The reporter begins with SERVING.
        health::report(&reporter, ServingStatus::NotServing).await;
        let closed = CancellationToken::new();
        tasks
            .spawn(GRPC, grpc_server(&context, grpc, limits.streams_per_connection, health_service, closed.clone())?);
        tasks.spawn(HEALTH, health::follow(context.clone(), reporter.clone()));
        tasks.spawn(INTAKE, log.clone().take_in(batches));
        tasks.spawn(GENERATORS, generators::keep(storage, generators));
        tasks.spawn("the log's upkeep", log.upkeep());
        tasks.spawn("the task that follows other daemons' students", students.follow());
        tasks.spawn("the metrics' upkeep", metrics_upkeep(metrics));
        tracing::info!(%grpc_address, %admin_address, teacher = %config.teacher.identity, "listening");
        let (sources, drain_timeout) = ((output, saved), config.drain_timeout);
        Ok(Some(Self {
            signals,
            ready_file,
            context,
            engines,
            stop,
            tasks,
            sources,
            reporter,
            closed,
            drain_timeout,
        }))
    }

    /// Until a signal comes, or a task ends: no task does while the daemon serves, so that is an error, with the task's
    /// name and the cause.
    async fn serve(&mut self) -> Result<(), ServeError> {
        tokio::select! {
            name = self.signals.first() => {
                tracing::info!("{name}: draining");
                Ok(())
            }
            ended = self.tasks.next_end() => {
                tracing::error!("{} ended: {}; draining", ended.task, ended.cause);
                Err(ended.into())
            }
        }
    }

    /// Ends everything, at the latest at the deadline.
    async fn drain(self) {
        let Self { ready_file, context, engines, stop, mut tasks, sources, mut reporter, closed, .. } = self;
        let deadline = Instant::now() + self.drain_timeout;
        context.draining.cancel();
        context.closing.cancel();
        stop.cancel();
        // Whoever reports health first: nothing must be reported again once the names are cleared.
        tasks.until_ended(HEALTH).await;
        health::report(&reporter, ServingStatus::NotServing).await;
        closed.cancel();
        drop(sources);
        let remaining = deadline.saturating_duration_since(Instant::now());
        let engines = tokio::task::spawn_blocking(move || engines.join(remaining));
        if timeout(GOODBYE, tasks.until_ended(GRPC)).await.is_err() {
            health::clear(&mut reporter).await;
            if timeout_at(deadline, tasks.until_ended(GRPC)).await.is_err() {
                tracing::warn!("connections were still open at the drain's deadline");
                tasks.abort(GRPC);
            }
        }
        let stopped = engines.await.unwrap_or(false);
        if timeout_at(deadline, tasks.until_ended(INTAKE)).await.is_err() {
            tracing::warn!(
                "the storage took no images until the drain's deadline; those that still waited for it are lost"
            );
        }
        if timeout_at(deadline, tasks.until_ended(GENERATORS)).await.is_err() {
            tracing::warn!("the generator was not stored until the drain's deadline; its newest learning is lost");
        }
        drop(tasks);
        drop(ready_file);
        if !stopped {
            // One optimizer step can take longer than a drain may. Everything else is cleanly closed, and ending the
            // process in the ordinary way would tear libtorch down under the running step.
            tracing::warn!("an engine is still in its last optimizer step; leaving it");
            crate::native::exit_now(0);
        }
        tracing::info!("drained");
    }
}

impl From<Ended> for ServeError {
    fn from(Ended { task, cause }: Ended) -> Self {
        Self::Ended { task, cause }
    }
}

/// Whether the engine should make images, and why.
fn reason(demand: Demand, faults: watch::Receiver<Faults>) -> Arc<dyn Fn() -> Reason + Send + Sync> {
    Arc::new(move || if faults.borrow().reason().is_some() { Reason::Storage } else { demand.reason() })
}

/// The gRPC server; it ends once `closed` is cancelled and the open connections have closed.
fn grpc_server(
    context: &Arc<Context>,
    connections: Connections,
    streams_per_connection: u32,
    health: tonic_health::pb::health_server::HealthServer<impl tonic_health::pb::health_server::Health>,
    closed: CancellationToken,
) -> Result<impl Future<Output = Result<(), tonic::transport::Error>> + Send + 'static, ServeError> {
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1()
        .map_err(|e| ServeError::Internal(format!("the contract cannot be reflected: {e}")))?;
    let inner = DreamfeedServer::new(Service(context.clone())).max_decoding_message_size(MAX_REQUEST_BYTES);
    let service = Framed { inner, context: context.clone() };
    let requests = &context.requests;
    Ok(Server::builder()
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_concurrent_streams(streams_per_connection)
        .add_service(requests.around(health))
        .add_service(requests.around(reflection))
        .add_service(requests.around(service))
        .serve_with_incoming_shutdown(connections.incoming(), async move { closed.cancelled().await }))
}

async fn metrics_upkeep(metrics: PrometheusHandle) {
    loop {
        tokio::time::sleep(METRICS_UPKEEP).await;
        metrics.run_upkeep();
    }
}
