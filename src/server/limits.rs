//! What clients may send, and for how long they may be silent.

use std::time::Duration;

/// The largest message of a push: a piece of a student of 4 MiB is advised, more is tolerated.
pub(super) const MAX_REQUEST_BYTES: usize = 16 << 20;
/// The largest request of every other method.
const SMALL_REQUEST_BYTES: u64 = 64 << 10;
/// The largest message that a stream's batch_size may ask for.
pub(super) const MAX_BATCH_BYTES: u64 = 64 << 20;
/// What a client may send ahead: the server's windows bound the rate of pushes over long distances.
pub(super) const STREAM_WINDOW: u32 = 4 << 20;
/// The same over all streams of a connection.
pub(super) const CONNECTION_WINDOW: u32 = 16 << 20;
/// A peer that answers no ping for this long after as long a silence is gone.
pub(super) const KEEPALIVE: Duration = Duration::from_secs(20);
/// This few replaying streams get their messages made early: with more, the others' turns fill every core anyway, and each
/// costs a message of memory.
pub(super) const EARLY_STREAMS: usize = 8;

/// What a method's requests may cost.
#[derive(Debug)]
pub(super) struct Limit {
    path: &'static str,
    /// Its name in metrics.
    pub method: &'static str,
    /// Bytes that are reserved while a request is being read.
    pub reserved: u64,
    /// The most bytes that all messages of one call may have, with their frames; None where the method counts for itself.
    pub most: Option<u64>,
    /// Whether it is answered at once, so that a bound on the time makes sense.
    pub is_timed: bool,
}

const fn small(path: &'static str, method: &'static str) -> Limit {
    Limit { path, method, reserved: SMALL_REQUEST_BYTES, most: Some(SMALL_REQUEST_BYTES), is_timed: true }
}

/// Every method of every service on the gRPC port.
const LIMITS: [Limit; 8] = [
    small("/dreamfeed.v1.DreamfeedService/Describe", "Describe"),
    small("/dreamfeed.v1.DreamfeedService/Stream", "Stream"),
    Limit {
        path: "/dreamfeed.v1.DreamfeedService/PushStudent",
        method: "PushStudent",
        // One message. The file that they make is bounded by its slot, and counted there.
        reserved: MAX_REQUEST_BYTES as u64,
        most: None,
        is_timed: false,
    },
    small("/dreamfeed.v1.DreamfeedService/FetchStudent", "FetchStudent"),
    small("/dreamfeed.v1.DreamfeedService/SetSynthesizer", "SetSynthesizer"),
    small("/grpc.health.v1.Health/Check", "Check"),
    small("/grpc.health.v1.Health/Watch", "Watch"),
    small("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", "ServerReflectionInfo"),
];

/// Of a method that does not exist, which is refused at once.
const UNKNOWN: Limit = small("", "unknown");

impl Limit {
    /// The limit of the method at a path.
    pub fn of(path: &str) -> &'static Self {
        LIMITS.iter().find(|limit| limit.path == path).unwrap_or(&UNKNOWN)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use prost::Message;

    use super::*;

    /// Health has a Watch, and lists more methods from version to version; ours are those of the contracts themselves.
    #[test]
    fn every_method_has_its_limit() {
        let sets = [
            crate::proto::FILE_DESCRIPTOR_SET,
            tonic_health::pb::FILE_DESCRIPTOR_SET,
            tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
        ];
        let mut missing = Vec::new();
        for set in sets {
            for file in prost_types::FileDescriptorSet::decode(set).unwrap().file {
                for service in &file.service {
                    for method in &service.method {
                        let path = format!("/{}.{}/{}", file.package(), service.name(), method.name());
                        if !LIMITS.iter().any(|limit| limit.path == path) {
                            missing.push(path);
                        }
                    }
                }
            }
        }
        assert!(missing.is_empty(), "{missing:?}");
    }
}
