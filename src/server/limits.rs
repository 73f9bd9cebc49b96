//! What clients may send, and for how long they may be silent.

use std::time::Duration;

/// The largest message a client may send: a piece of a student of 4 MiB is advised, more is tolerated.
pub(super) const MAX_REQUEST_BYTES: usize = 16 << 20;
/// What a client may send ahead: the server's windows bound the rate of pushes over long distances.
pub(super) const STREAM_WINDOW: u32 = 4 << 20;
/// The same over all streams of a connection.
pub(super) const CONNECTION_WINDOW: u32 = 16 << 20;
/// A peer that answers no ping for this long after as long a silence is gone.
pub(super) const KEEPALIVE: Duration = Duration::from_secs(20);
/// This few replaying streams get their messages made early: with more, the others' turns fill every core anyway, and each
/// costs a message of memory.
pub(super) const EARLY_STREAMS: usize = 8;
