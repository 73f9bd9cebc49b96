//! What clients may cost, each limit a setting.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::{ByteCount, Span};

/// Descriptors that are kept for the storage, the daemon's own files, and the runtime.
const KEPT_DESCRIPTORS: u64 = 128;

/// What clients may cost.
#[derive(Clone, Debug, Default, Serialize, Deserialize, clap::Args)]
#[serde(default, deny_unknown_fields)]
pub struct LimitOptions {
    /// Memory for requests that are still being read, over all connections; at least 16MiB for each of --max-pushes and 16MiB
    /// more [default: 128MiB, or that].
    #[arg(id = "limits_request_bytes", long = "max-request-bytes", value_name = "BYTES")]
    pub request_bytes: Option<ByteCount>,
    /// Memory for messages on their way to readers, over all streams. Readers beyond it wait; who waits for longer than 30s
    /// is ended, and can resume [default: 1GiB].
    #[arg(id = "limits_message_bytes", long = "max-message-bytes", value_name = "BYTES")]
    pub message_bytes: Option<ByteCount>,
    /// Open connections to the gRPC port. Fewer where the process may not open so many files [default: 1024].
    #[arg(id = "limits_connections", long = "max-connections", value_name = "N")]
    pub connections: Option<usize>,
    /// Open connections to the admin port [default: 64].
    #[arg(id = "limits_admin_connections", long = "max-admin-connections", value_name = "N")]
    pub admin_connections: Option<usize>,
    /// Open calls of one connection, streams and all others [default: 256].
    #[arg(id = "limits_streams_per_connection", long = "max-streams-per-connection", value_name = "N")]
    pub streams_per_connection: Option<usize>,
    /// Close a connection that brought no header of a request for this long: to the gRPC port the first one, to the admin
    /// port each [default: 20s].
    #[arg(id = "limits_header_timeout", long = "header-timeout", value_name = "DURATION")]
    pub header_timeout: Option<Span>,
    /// End every call but a push that is not answered after this long; a stream is answered when it is open [default: 30s].
    #[arg(id = "limits_call_timeout", long = "call-timeout", value_name = "DURATION")]
    pub call_timeout: Option<Span>,
}

/// What clients may cost, checked.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Memory for requests.
    pub request_bytes: u64,
    /// Memory for messages.
    pub message_bytes: u64,
    /// Connections to the gRPC port.
    pub connections: usize,
    /// Connections to the admin port.
    pub admin_connections: usize,
    /// Calls of one connection.
    pub streams_per_connection: u32,
    /// Until a header comes.
    pub header_timeout: Duration,
    /// Until an answer goes.
    pub call_timeout: Duration,
}

impl LimitOptions {
    pub(super) fn resolve(&self, max_pushes: usize, problems: &mut Vec<String>) -> Limits {
        let mut bytes = |key: &str, value: Option<ByteCount>, default: u64, least: u64| {
            let value = value.map_or(default, |bytes| bytes.0);
            if !(least..=1 << 40).contains(&value) {
                problems.push(format!("limits.{key} is {value}; give {}MiB to 1TiB", least >> 20));
            }
            value
        };
        // Each push reserves 16 MiB, and beside all of them others must find room.
        let least = (max_pushes as u64).saturating_add(1) << 24;
        let request_bytes = bytes("request_bytes", self.request_bytes, least.max(128 << 20), least);
        let message_bytes = bytes("message_bytes", self.message_bytes, 1 << 30, 1 << 20);
        let mut count = |key: &str, value: Option<usize>, default: usize| {
            let value = value.unwrap_or(default);
            if !(1..=100_000).contains(&value) {
                problems.push(format!("limits.{key} is {value}; give 1 to 100000"));
            }
            value
        };
        let connections = count("connections", self.connections, 1024);
        let admin_connections = count("admin_connections", self.admin_connections, 64);
        let streams = count("streams_per_connection", self.streams_per_connection, 256);
        let mut span = |key: &str, value: Option<Span>, default: u64| {
            let value = value.map_or(Duration::from_secs(default), |span| span.0);
            if value.is_zero() || value > Duration::from_secs(3600) {
                problems.push(format!("limits.{key} is {}; give more than 0s and at most 1h", Span(value)));
            }
            value
        };
        Limits {
            request_bytes,
            message_bytes,
            connections,
            admin_connections,
            streams_per_connection: u32::try_from(streams).unwrap_or(u32::MAX),
            header_timeout: span("header_timeout", self.header_timeout, 20),
            call_timeout: span("call_timeout", self.call_timeout, 30),
        }
    }
}

impl Limits {
    /// The limits of a process that may open this many files: the storage and the admin port keep theirs.
    pub fn within(self, descriptors: u64) -> Self {
        let kept = KEPT_DESCRIPTORS + self.admin_connections as u64;
        let left = usize::try_from(descriptors.saturating_sub(kept)).unwrap_or(usize::MAX).max(1);
        if left < self.connections {
            tracing::warn!(
                descriptors,
                connections = left,
                "the process may open few files, so it takes fewer connections than limits.connections says; raise its \
                 limit (ulimit -n)"
            );
        }
        Self { connections: self.connections.min(left), ..self }
    }
}
