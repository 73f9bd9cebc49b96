//! Every status that a call can end with, and how long it took until then.

use std::time::Instant;

use tonic::{Code, Status};

use crate::client::NEXT_SEQUENCE;
use crate::delivery::{End, NoRoom};
use crate::log::{CursorError, Extent};
use crate::students::{PushError, beginning};
use crate::telemetry;

/// Bytes of a status message. It travels percent-encoded in an HTTP/2 header, which grpcio caps at 8 KiB.
const MESSAGE_BYTES: usize = 2000;

/// A status whose message is one line of bounded length, whatever went into it.
pub(super) fn of(code: Code, message: &str) -> Status {
    let line: String = message.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if line.len() <= MESSAGE_BYTES {
        return Status::new(code, line);
    }
    let kept = beginning(&line, MESSAGE_BYTES);
    Status::new(code, format!("{kept}... ({} bytes more)", line.len() - kept.len()))
}

/// Measures a call that was answered.
pub(super) fn record<T>(method: &'static str, started: Instant, result: &Result<T, Status>) {
    let code = match result {
        Ok(_) => "OK",
        Err(status) => code_name(status.code()),
    };
    metrics::histogram!(telemetry::RPC_SECONDS, "method" => method, "code" => code)
        .record(started.elapsed().as_secs_f64());
}

/// The codes that the contract names; the rest is one label.
fn code_name(code: tonic::Code) -> &'static str {
    match code {
        tonic::Code::Ok => "OK",
        tonic::Code::Cancelled => "CANCELLED",
        tonic::Code::InvalidArgument => "INVALID_ARGUMENT",
        tonic::Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        tonic::Code::NotFound => "NOT_FOUND",
        tonic::Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        tonic::Code::FailedPrecondition => "FAILED_PRECONDITION",
        tonic::Code::OutOfRange => "OUT_OF_RANGE",
        tonic::Code::DataLoss => "DATA_LOSS",
        tonic::Code::Unimplemented => "UNIMPLEMENTED",
        tonic::Code::Unavailable => "UNAVAILABLE",
        tonic::Code::Internal => "INTERNAL",
        _ => "OTHER",
    }
}

pub(super) fn of_push(error: &PushError) -> Status {
    let code = match error {
        PushError::TooLarge { .. } | PushError::Cost(_) | PushError::Busy { .. } => Code::ResourceExhausted,
        PushError::Conflict { .. } => Code::FailedPrecondition,
        PushError::Storage(_) => Code::Unavailable,
        PushError::Internal(_) => Code::Internal,
        PushError::Header(_)
        | PushError::Truncated { .. }
        | PushError::TooLong { .. }
        | PushError::Digest { .. }
        | PushError::Format(_)
        | PushError::Unreadable(_)
        | PushError::Arch(_)
        | PushError::Tensors(_)
        | PushError::NotFinite { .. }
        | PushError::NegativeVariance { .. }
        | PushError::Channels { .. }
        | PushError::Classes { .. } => Code::InvalidArgument,
    };
    of(code, &error.to_string())
}

pub(super) fn of_cursor(error: &CursorError, extent: &Extent) -> Status {
    match error {
        CursorError::Malformed(_) => of(Code::InvalidArgument, &format!("start.cursor: {error}")),
        CursorError::OtherLog(_) => of(
            Code::OutOfRange,
            &format!(
                "start.cursor: {error}; start from earliest: the first sequence that this log holds is {}",
                extent.first_sequence
            ),
        ),
    }
}

/// Why a subscription ended.
pub(super) fn of_end(end: &End) -> Status {
    match end {
        End::Overtaken { position, first_sequence } => overtaken(*position, *first_sequence),
        End::Lost { position, next_sequence } => lost(*position, *next_sequence),
        End::Ahead { position, next_sequence } => ahead(*position, *next_sequence),
        End::Storage(problem) => {
            let message = format!("the log cannot be read at present: {problem}; resume from the last cursor");
            of(Code::Unavailable, &message)
        }
        End::NoRoom(NoRoom { bytes, capacity }) => {
            let message = format!(
                "no room came free for a message of {bytes} bytes: slow readers hold the {capacity} that all messages may \
                 have together (its setting limits.message_bytes); resume from the last cursor, with back-off or with a \
                 smaller batch_size"
            );
            of(Code::ResourceExhausted, &message)
        }
    }
}

/// The reader's next image is lost.
pub(super) fn lost(position: u64, next_sequence: u64) -> Status {
    going_on(
        next_sequence,
        of(
            Code::DataLoss,
            &format!(
                "sequence {position} is lost: its chunk is damaged or missing; the next sequence that is there is \
             {next_sequence}, start from it to go on without what is lost"
            ),
        ),
    )
}

/// For programs: the sequence from which a new stream can go on.
fn going_on(next_sequence: u64, mut status: Status) -> Status {
    status.metadata_mut().insert(NEXT_SEQUENCE, next_sequence.into());
    status
}

/// The reader's next image is gone.
pub(super) fn overtaken(position: u64, first_sequence: u64) -> Status {
    going_on(
        first_sequence,
        of(
            Code::OutOfRange,
            &format!(
                "sequence {position} is not in the log any more; the first sequence that is still there is {first_sequence}"
            ),
        ),
    )
}

/// The reader asks for an image that will not be the next.
pub(super) fn ahead(position: u64, next_sequence: u64) -> Status {
    of(
        Code::OutOfRange,
        &format!(
            "sequence {position} lies beyond the next image to be made, which is {next_sequence}; start at most there"
        ),
    )
}
