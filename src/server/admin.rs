//! The admin pages over HTTP/1: metrics for Prometheus, liveness and readiness for whoever supervises the process.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;

use super::context::{Context, Readiness};
use crate::delivery::{Lag, Reason};
use crate::engine::EngineState;
use crate::synthesis::batch::DreamBatch;
use crate::synthesis::settings::SynthesizerKind;
use crate::telemetry;

/// What the pages show. They answer from the daemon's first moment on.
pub(super) struct Pages {
    metrics: PrometheusHandle,
    opened: OnceLock<Opened>,
}

/// What there is to show once the store is open.
pub(super) struct Opened {
    pub context: Arc<Context>,
    /// Why images are made, or not.
    pub reason: Arc<dyn Fn() -> Reason + Send + Sync>,
    pub queue: async_channel::WeakReceiver<DreamBatch>,
    pub queue_capacity: usize,
    pub liveness_timeout: Duration,
}

pub(super) fn router(pages: Arc<Pages>) -> Router {
    Router::new()
        .route("/", get(index))
        .route("/metrics", get(metrics))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .with_state(pages)
}

async fn index() -> &'static str {
    concat!(
        "dreamfeed ",
        env!("CARGO_PKG_VERSION"),
        "\n\n/metrics  Prometheus\n/livez    the engine's heart beats\n/readyz   work is accepted\n"
    )
}

/// Reads one atomic: it must answer while everything else is stuck.
async fn livez(State(pages): State<Arc<Pages>>) -> Response {
    // Until then the storage is waited for, whose every call has a bound.
    let Some(opened) = pages.opened.get() else { return "ok\n".into_response() };
    let (age, bound) = (opened.context.engines.heartbeat_age(), opened.liveness_timeout);
    if age < bound {
        return "ok\n".into_response();
    }
    let message = format!(
        "the engine showed no sign of life for {:.1} s; the bound is {:.1} s\n",
        age.as_secs_f64(),
        bound.as_secs_f64()
    );
    (StatusCode::SERVICE_UNAVAILABLE, message).into_response()
}

async fn readyz(State(pages): State<Arc<Pages>>) -> Response {
    let reason = match pages.opened.get().map(|opened| opened.context.readiness()) {
        None => "loading: the store is being opened\n".to_owned(),
        Some(Readiness::Ready) => return "ok\n".into_response(),
        Some(Readiness::Storage(reason)) => format!("storage: synthesis waits, the log is served: {reason}\n"),
        Some(Readiness::Loading) => "loading: the teacher is not on the device yet\n".to_owned(),
        Some(Readiness::Draining) => "draining\n".to_owned(),
        Some(Readiness::Failed(reason)) => format!("failed: {reason}\n"),
    };
    (StatusCode::SERVICE_UNAVAILABLE, reason).into_response()
}

async fn metrics(State(pages): State<Arc<Pages>>) -> Response {
    if let Some(opened) = pages.opened.get() {
        opened.measure().await;
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], pages.metrics.render()).into_response()
}

impl Pages {
    /// Pages of a daemon that is still opening its store.
    pub fn new(metrics: PrometheusHandle) -> Self {
        Self { metrics, opened: OnceLock::new() }
    }

    /// From now on they tell of all there is.
    pub fn open(&self, opened: Opened) {
        let _ = self.opened.set(opened);
    }
}

impl Opened {
    /// Sets the gauges that are read off when somebody looks.
    pub(super) async fn measure(&self) {
        let set = |name: &'static str, value: f64| metrics::gauge!(name).set(value);
        let log = self.context.delivery.log();
        let extent = log.extent();
        set(telemetry::LOG_FIRST_SEQUENCE, extent.first_sequence as f64);
        set(telemetry::LOG_NEXT_SEQUENCE, extent.next_sequence as f64);
        set(telemetry::LOG_CHUNKS, extent.chunks as f64);
        set(telemetry::LOG_BYTES, extent.bytes as f64);
        set(telemetry::LOG_CAPACITY_BYTES, log.options().retention.max_bytes.unwrap_or(0) as f64);
        set(telemetry::LOG_IMAGES, extent.images as f64);
        set(telemetry::LOG_LOST_IMAGES, extent.lost_images as f64);
        set(telemetry::LOG_CACHE_BYTES, log.cached_bytes().await as f64);
        set(telemetry::LOG_CACHE_CAPACITY_BYTES, log.options().cache_bytes as f64);
        let fault = self.context.storage_faults.borrow().reason().is_some();
        set(telemetry::STORAGE_FAULT, f64::from(u8::from(fault)));
        let Lag { readers, min, max } = self.context.delivery.audience().lag(extent.next_sequence);
        set(telemetry::SUBSCRIBERS_FRESH, readers as f64);
        metrics::gauge!(telemetry::LAG_IMAGES, "bound" => "min").set(min as f64);
        metrics::gauge!(telemetry::LAG_IMAGES, "bound" => "max").set(max as f64);
        set(telemetry::REPLAY_RATIO, self.context.delivery.replay_ratio());
        let waiting = self.queue.upgrade().map_or(0, |queue| queue.len());
        set(telemetry::QUEUE_CHUNKS, waiting as f64);
        set(telemetry::QUEUE_CAPACITY_CHUNKS, self.queue_capacity as f64);
        let (requests, flight) = (&self.context.requests, self.context.delivery.flight());
        set(telemetry::REQUEST_BYTES, requests.in_flight() as f64);
        set(telemetry::REQUEST_CAPACITY_BYTES, requests.capacity() as f64);
        set(telemetry::MESSAGE_BYTES, flight.bytes() as f64);
        set(telemetry::MESSAGE_CAPACITY_BYTES, flight.capacity() as f64);
        set(telemetry::SUBSCRIBERS_CAPACITY, self.context.max_streams as f64);
        set(telemetry::PUSHES_UNDER_WAY, self.context.students.pushes_under_way() as f64);
        set(telemetry::PUSHES_CAPACITY, self.context.students.limits().max_pushes as f64);
        let fetches = self.context.max_fetches.saturating_sub(self.context.fetches.available_permits());
        set(telemetry::FETCHES_UNDER_WAY, fetches as f64);
        set(telemetry::FETCHES_CAPACITY, self.context.max_fetches as f64);
        set(telemetry::STUDENT_VERSION_ACCEPTED, self.context.students.current_version() as f64);
        set(telemetry::ENGINE_HEARTBEAT_AGE_SECONDS, self.context.engines.heartbeat_age().as_secs_f64());
        // Not when the engine asks: it does not while it waits for the log.
        let reason = (self.reason)();
        for other in Reason::ALL {
            metrics::gauge!(telemetry::DEMAND, "reason" => other.name()).set(f64::from(u8::from(other == reason)));
        }
        let synthesizer = *self.context.synthesizer.borrow();
        for kind in SynthesizerKind::ALL {
            metrics::gauge!(telemetry::SYNTHESIZER, "synthesizer" => kind.name())
                .set(f64::from(u8::from(kind == synthesizer)));
        }
        let state = self.context.engines.state();
        for value in EngineState::ALL {
            metrics::gauge!(telemetry::ENGINE_STATE, "state" => value.name())
                .set(f64::from(u8::from(state == value)));
        }
        // Shown from the first day, also before the first one.
        metrics::gauge!(telemetry::SUBSCRIBERS).increment(0.0);
        metrics::counter!(telemetry::LOG_EVICTED_CHUNKS).increment(0);
        metrics::counter!(telemetry::LOG_QUARANTINED_CHUNKS).increment(0);
        metrics::counter!(telemetry::STUDENTS_DAMAGED).increment(0);
        metrics::counter!(telemetry::FETCHES_REFUSED).increment(0);
        metrics::counter!(telemetry::IMAGES_SENT, "kind" => "fresh").increment(0);
        metrics::counter!(telemetry::IMAGES_SENT, "kind" => "replayed").increment(0);
        metrics::counter!(telemetry::BYTES_SENT).increment(0);
    }
}
