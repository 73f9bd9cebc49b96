//! Every metric's name, unit and help in one place, the recorder that renders them, and the daemon's own log lines.
//!
//! Labels are bounded: each label's values are listed in the metric's help, and none ever carries a name that a client
//! chose.

use metrics::Unit;
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use serde::{Deserialize, Serialize};
use tracing_subscriber::EnvFilter;

/// What kind of metric it is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// Only goes up.
    Counter,
    /// Goes up and down.
    Gauge,
    /// A distribution with these upper bounds of its buckets.
    Histogram(&'static [f64]),
}

/// One metric.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// Its name.
    pub name: &'static str,
    /// What kind it is.
    pub kind: Kind,
    /// Its unit.
    pub unit: Unit,
    /// What it means, and the values of its labels.
    pub help: &'static str,
}

/// From a tenth of a millisecond to ten seconds: calls over the wire.
const RPC_BUCKETS: &[f64] = &[1e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0];
/// From a millisecond (a small teacher on a GPU) to a minute (a large one on a busy CPU): work on the device.
const DEVICE_BUCKETS: &[f64] =
    &[1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0];

/// From the tail of the log to what is left of last week.
const AGE_BUCKETS: &[f64] = &[0.1, 1.0, 10.0, 60.0, 600.0, 3600.0, 21_600.0, 86_400.0, 604_800.0];

macro_rules! metrics {
    ($($id:ident = $name:literal, $kind:expr, $unit:ident, $help:literal;)*) => {
        $(#[doc = $help] pub const $id: &str = $name;)*
        /// Every metric of the daemon.
        pub const ALL: &[Metric] = &[$(Metric { name: $name, kind: $kind, unit: Unit::$unit, help: $help }),*];
    };
}

metrics! {
    IMAGES_SYNTHESIZED = "dreamfeed_images_synthesized_total", Kind::Counter, Count,
        "Images finished. synthesizer: adi, warm-adi, fast, hybrid, noise.";
    SYNTHESIS_RUNS = "dreamfeed_synthesis_runs_total", Kind::Counter, Count,
        "Synthesis runs ended. outcome: finished, non_finite (the loss, the images or the teacher's logits), error (of libtorch).";
    LOSS = "dreamfeed_loss", Kind::Gauge, Count,
        "Each loss term, unweighted, and the weighted total at the last measured optimizer step. term: the terms of the objective.";
    OPTIMIZER_STEP_SECONDS = "dreamfeed_optimizer_step_seconds", Kind::Histogram(DEVICE_BUCKETS), Seconds,
        "Time of one optimizer step.";
    STUDENT_VERSION_ACCEPTED = "dreamfeed_student_version_accepted", Kind::Gauge, Count,
        "The newest accepted student version, 0 before the first push.";
    STUDENT_VERSION_ADOPTED = "dreamfeed_student_version_adopted", Kind::Gauge, Count,
        "The student version that the running synthesis competes against, 0 = none.";
    STUDENT_STALENESS_VERSIONS = "dreamfeed_student_staleness_versions", Kind::Gauge, Count,
        "Versions that the adopted student is behind the newest accepted one.";
    STUDENT_ADOPTION_SECONDS = "dreamfeed_student_adoption_seconds", Kind::Histogram(DEVICE_BUCKETS), Seconds,
        "Time from the last byte of a push to the first optimizer step against it.";
    STUDENTS_SET_ASIDE = "dreamfeed_students_set_aside_total", Kind::Counter, Count,
        "Students that were adopted and are not used any more, because no run against them succeeded or the generator collapsed.";
    STUDENT_BOUNDED_IMAGES = "dreamfeed_student_bounded_images_total", Kind::Counter, Count,
        "How often the student's part of an image's gradient was bounded, because it was above the teacher's.";
    GENERATOR_RESTORES = "dreamfeed_generator_restores_total", Kind::Counter, Count,
        "How often the generator went back to its last good state, because the teacher did not recognize its images any more.";
    TEACHER_TOP1 = "dreamfeed_teacher_top1_ratio", Kind::Gauge, Count,
        "Share of the last batch's images that the teacher classifies as the class they were made for, 0..1.";
    COMPETITION_JS = "dreamfeed_competition_js_nats", Kind::Gauge, Count,
        "Mean Jensen-Shannon divergence of teacher and student on the last batch, in nats.";
    ENGINE_STATE = "dreamfeed_engine_state", Kind::Gauge, Count,
        "1 for the state that the engine is in, 0 for the others. state: loading, synthesizing, resting (see dreamfeed_demand), \
         blocked (the log is slower), finished, failed.";
    SYNTHESIZER = "dreamfeed_synthesizer", Kind::Gauge, Count,
        "1 for the synthesizer that makes the next batch, 0 for the others. synthesizer: adi, warm-adi, fast, hybrid, noise.";
    DEMAND = "dreamfeed_demand", Kind::Gauge, Count,
        "1 for the reason why images are made or not, 0 for the others. reason: always, wanted (a subscriber is nearly done with \
         what there is); and, not made: no_subscriber, lag (every subscriber has enough ahead of it), storage (it takes none).";
    ENGINE_HEARTBEAT_AGE_SECONDS = "dreamfeed_engine_heartbeat_age_seconds", Kind::Gauge, Seconds,
        "Time since the engine last showed that it lives.";
    QUEUE_CHUNKS = "dreamfeed_queue_chunks", Kind::Gauge, Count,
        "Batches that wait between the engine and the log.";
    QUEUE_CAPACITY_CHUNKS = "dreamfeed_queue_capacity_chunks", Kind::Gauge, Count,
        "The bound of that queue.";
    BATCHES_REFUSED = "dreamfeed_batches_refused_total", Kind::Counter, Count,
        "Batches of the engine that the log could not take because they contradict themselves: a bug.";
    LOG_FIRST_SEQUENCE = "dreamfeed_log_first_sequence", Kind::Gauge, Count,
        "The sequence of the oldest image that can still be read.";
    LOG_NEXT_SEQUENCE = "dreamfeed_log_next_sequence", Kind::Gauge, Count,
        "The sequence that the next image will get.";
    LOG_CHUNKS = "dreamfeed_log_chunks", Kind::Gauge, Count, "Chunks in the log.";
    LOG_IMAGES = "dreamfeed_log_images", Kind::Gauge, Count, "Images in the log, a seed set's included.";
    LOG_LOST_IMAGES = "dreamfeed_log_lost_images", Kind::Gauge, Count, "Images of the log that are lost to damage.";
    LOG_QUARANTINED_CHUNKS = "dreamfeed_log_quarantined_chunks_total", Kind::Counter, Count,
        "Chunks that turned out to be damaged, and were moved aside.";
    LOG_CACHE_BYTES = "dreamfeed_log_cache_bytes", Kind::Gauge, Bytes, "Memory that the cache of recent chunks holds.";
    LOG_CACHE_CAPACITY_BYTES = "dreamfeed_log_cache_capacity_bytes", Kind::Gauge, Bytes, "The bound on that memory.";
    LOG_APPEND_SECONDS = "dreamfeed_log_append_seconds", Kind::Histogram(DEVICE_BUCKETS), Seconds,
        "Time from a finished batch to its durable chunk: encoding, hashing, writing.";
    STORAGE_FAULT = "dreamfeed_storage_fault", Kind::Gauge, Count,
        "1 while the storage takes no images and synthesis waits for it, otherwise 0.";
    STORAGE_ERRORS = "dreamfeed_storage_errors_total", Kind::Counter, Count,
        "Calls to the storage that failed. operation: append, read, upkeep, generator.";
    LOG_BYTES = "dreamfeed_log_bytes", Kind::Gauge, Bytes, "Bytes in the log.";
    LOG_CAPACITY_BYTES = "dreamfeed_log_capacity_bytes", Kind::Gauge, Bytes, "The bound on those bytes, 0 = none.";
    LOG_EVICTED_CHUNKS = "dreamfeed_log_evicted_chunks_total", Kind::Counter, Count,
        "Chunks that left the log to keep it within its bound.";
    SUBSCRIBERS = "dreamfeed_subscribers", Kind::Gauge, Count, "Open streams.";
    SUBSCRIBERS_CAPACITY = "dreamfeed_subscribers_capacity", Kind::Gauge, Count, "The bound on open streams.";
    STREAM_ENDS = "dreamfeed_stream_ends_total", Kind::Counter, Count,
        "Streams ended. reason: client (it left), draining, failed (the engine), overtaken (by retention), lost (a damaged chunk), \
         storage (it does not answer), room (slow readers hold all memory of messages), error.";
    SUBSCRIBERS_FRESH = "dreamfeed_subscribers_fresh", Kind::Gauge, Count, "Open streams that want fresh images.";
    LAG_IMAGES = "dreamfeed_lag_images", Kind::Gauge, Count,
        "Images in the log that streams of fresh images have not been sent yet. bound: min (the foremost stream), max (the hindmost).";
    SENT_AGE_SECONDS = "dreamfeed_sent_age_seconds", Kind::Histogram(AGE_BUCKETS), Seconds,
        "Age of the oldest image of each message when it was sent. kind: fresh (every image is), replayed (at least one is).";
    REPLAY_RATIO = "dreamfeed_replay_ratio", Kind::Gauge, Count,
        "Share of all images sent by this process that were replayed, 0..1.";
    IMAGES_SENT = "dreamfeed_images_sent_total", Kind::Counter, Count, "Images sent, over all streams. kind: fresh, replayed.";
    BYTES_SENT = "dreamfeed_bytes_sent_total", Kind::Counter, Bytes, "Payload bytes sent, over all streams.";
    PUSHES = "dreamfeed_pushes_total", Kind::Counter, Count,
        "Pushes ended. outcome: accepted, already_current, header, length (also most clients that vanish), digest, format, arch, missing, extra, \
         misshapen, dtype, unreadable, not_finite, negative_variance, channels, classes, too_large, conflict, idle, busy, cancelled, unavailable, \
         storage, internal.";
    STUDENTS_DAMAGED = "dreamfeed_students_damaged_total", Kind::Counter, Count,
        "Stored students that turned out to be damaged, and are not used.";
    PUSHES_UNDER_WAY = "dreamfeed_pushes_under_way", Kind::Gauge, Count, "Pushes that hold a slot.";
    PUSHES_CAPACITY = "dreamfeed_pushes_capacity", Kind::Gauge, Count, "The bound on pushes under way.";
    FETCHES_UNDER_WAY = "dreamfeed_fetches_under_way", Kind::Gauge, Count, "Students that are being sent to whoever fetches them.";
    FETCHES_CAPACITY = "dreamfeed_fetches_capacity", Kind::Gauge, Count, "The bound on those.";
    CONNECTIONS = "dreamfeed_connections", Kind::Gauge, Count, "Open connections. port: grpc, admin.";
    CONNECTIONS_CAPACITY = "dreamfeed_connections_capacity", Kind::Gauge, Count,
        "The bound on open connections. port: grpc, admin.";
    CONNECTIONS_REFUSED = "dreamfeed_connections_refused_total", Kind::Counter, Count,
        "Connections closed, or not accepted. port: grpc, admin. reason: limit (as many are open as may be; the longest silent one makes place), descriptors (the process \
         has none left), silent (no header of a request came in time).";
    CALLS_UNDER_WAY = "dreamfeed_calls_under_way", Kind::Gauge, Count,
        "Calls under way on the gRPC port, over all connections, open streams among them.";
    REQUEST_BYTES = "dreamfeed_request_bytes", Kind::Gauge, Bytes,
        "Memory that is reserved for requests that are still being read.";
    REQUEST_CAPACITY_BYTES = "dreamfeed_request_capacity_bytes", Kind::Gauge, Bytes, "The bound on that memory.";
    REQUESTS_REFUSED = "dreamfeed_requests_refused_total", Kind::Counter, Count,
        "Requests refused by a limit. reason: room (that memory is used up), size (of the request), late (no answer in time).";
    MESSAGE_BYTES = "dreamfeed_message_bytes", Kind::Gauge, Bytes, "Messages on their way to readers, over all streams.";
    MESSAGE_CAPACITY_BYTES = "dreamfeed_message_capacity_bytes", Kind::Gauge, Bytes, "The bound on those bytes.";
    FETCHES_REFUSED = "dreamfeed_fetches_refused_total", Kind::Counter, Count, "Fetches refused because of that bound.";
    RPC_SECONDS = "dreamfeed_rpc_seconds", Kind::Histogram(RPC_BUCKETS), Seconds,
        "Time until a call was answered; for server streams until they opened. method: the service's methods; code: \
         the gRPC status.";
}

/// Gives every metric its unit and help. Called by [`install`].
pub fn describe_all() {
    for metric in ALL {
        match metric.kind {
            Kind::Counter => metrics::describe_counter!(metric.name, metric.unit, metric.help),
            Kind::Gauge => metrics::describe_gauge!(metric.name, metric.unit, metric.help),
            Kind::Histogram(_) => metrics::describe_histogram!(metric.name, metric.unit, metric.help),
        }
    }
}

/// Why metrics cannot be recorded.
#[derive(Debug, thiserror::Error)]
pub enum InstallError {
    /// A histogram's buckets are malformed.
    #[error("cannot build the metrics recorder: {0}")]
    Build(BuildError),
    /// Another recorder came first.
    #[error("a metrics recorder is already installed in this process")]
    AlreadyInstalled,
}

impl From<BuildError> for InstallError {
    fn from(error: BuildError) -> Self {
        Self::Build(error)
    }
}

/// Installs the process's metrics recorder; the handle renders it as Prometheus text.
pub fn install() -> Result<PrometheusHandle, InstallError> {
    let mut builder = PrometheusBuilder::new();
    for metric in ALL {
        if let Kind::Histogram(buckets) = metric.kind {
            builder = builder.set_buckets_for_metric(Matcher::Full(metric.name.to_owned()), buckets)?;
        }
    }
    let recorder = builder.build_recorder();
    let handle = recorder.handle();
    metrics::set_global_recorder(recorder).map_err(|_| InstallError::AlreadyInstalled)?;
    describe_all();
    Ok(handle)
}

/// How log lines look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

/// Starts writing log lines to standard error. A second call in one process changes nothing.
pub fn install_logs(format: LogFormat, filter: EnvFilter) {
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let terminal = std::io::IsTerminal::is_terminal(&std::io::stderr());
    let _ = match format {
        LogFormat::Text => builder.with_ansi(terminal).try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_unique_and_follow_the_conventions() {
        let names: BTreeSet<&str> = ALL.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), ALL.len());
        for metric in ALL {
            assert!(metric.name.starts_with("dreamfeed_"), "{}", metric.name);
            assert_eq!(metric.kind == Kind::Counter, metric.name.ends_with("_total"), "{}", metric.name);
        }
    }
}
