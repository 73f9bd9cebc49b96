//! `PushStudent`: a header, the bytes, one answer. Every wait on the client has a bound.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, timeout_at};
use tonic::{Code, Status, Streaming};

use super::context::Context;
use super::convert;
use super::limits::MAX_REQUEST_BYTES;
use super::status;
use crate::proto::push_student_request::Part;
use crate::proto::{PushStudentRequest, PushStudentResponse};
use crate::students::{Push, PushError};
use crate::telemetry;

/// Pieces above this many bytes are hashed away from the runtime's threads; below, moving them would cost more.
const INLINE_BYTES: usize = 64 << 10;

/// Counts a push's outcome, also that of one whose client vanished.
struct Outcome(&'static str);

impl Drop for Outcome {
    fn drop(&mut self) {
        metrics::counter!(telemetry::PUSHES, "outcome" => self.0).increment(1);
    }
}

/// Why a push ended without a student.
enum Failure {
    /// The store refused it.
    Refused(PushError),
    /// No message came, or not all of them, in time.
    Late(String),
    /// One message is too large.
    LargeMessage,
    /// The client broke off, or what it sent could not be read.
    Broken(Status),
    /// The daemon is going.
    Closing,
}

impl From<PushError> for Failure {
    fn from(error: PushError) -> Self {
        Self::Refused(error)
    }
}

pub(super) async fn push_student(
    context: &Arc<Context>,
    messages: Streaming<PushStudentRequest>,
) -> Result<PushStudentResponse, Status> {
    let mut outcome = Outcome("cancelled");
    if let Err(status) = context.accept() {
        outcome.0 = "unavailable";
        return Err(status);
    }
    let result = tokio::select! {
        result = receive(context, messages) => result,
        () = context.closing.cancelled() => Err(Failure::Closing),
    };
    let (reason, answer) = match result {
        Ok(response) if response.already_current => ("already_current", Ok(response)),
        Ok(response) => ("accepted", Ok(response)),
        Err(Failure::Refused(error)) => (error.reason(), Err(status::of_push(&error))),
        Err(Failure::Late(message)) => ("idle", Err(status::of(Code::DeadlineExceeded, &message))),
        Err(Failure::LargeMessage) => {
            let limit = MAX_REQUEST_BYTES >> 20;
            let message = format!("a message is larger than {limit} MiB; send the file in pieces of at most 4 MiB");
            ("too_large", Err(status::of(Code::ResourceExhausted, &message)))
        }
        Err(Failure::Broken(status)) => ("cancelled", Err(status)),
        Err(Failure::Closing) => ("unavailable", Err(context.closing_status())),
    };
    outcome.0 = reason;
    match &answer {
        Ok(response) => tracing::info!(version = response.version, outcome = reason, "student pushed"),
        Err(status) => tracing::warn!(outcome = reason, "push refused: {}", status.message()),
    }
    answer
}

async fn receive(
    context: &Arc<Context>,
    messages: Streaming<PushStudentRequest>,
) -> Result<PushStudentResponse, Failure> {
    let slot = context.students.slot()?;
    let limits = *context.students.limits();
    let mut incoming = Incoming {
        messages,
        idle: limits.idle_timeout,
        total: limits.push_timeout,
        end: Instant::now() + limits.push_timeout,
    };
    let header = match incoming.next().await? {
        Some(Part::Header(header)) => convert::push_header(header)?,
        Some(Part::Data(_)) => return Err(PushError::Header("data came first; send the header first".into()).into()),
        None => return Err(PushError::Header("the stream ended before the header".into()).into()),
    };
    let mut push = slot.begin(header)?;
    while let Some(part) = incoming.next().await? {
        match part {
            Part::Data(piece) => push = write(push, piece).await?,
            Part::Header(_) => {
                return Err(PushError::Header("a second header came; send data after the first".into()).into());
            }
        }
    }
    let accepted = push.finish().await?;
    Ok(PushStudentResponse { version: accepted.student.version, already_current: accepted.already_current })
}

async fn write(mut push: Push, piece: Bytes) -> Result<Push, PushError> {
    if piece.len() <= INLINE_BYTES {
        return push.write(&piece).map(|()| push);
    }
    let write = move || push.write(&piece).map(|()| push);
    tokio::task::spawn_blocking(write).await.map_err(|e| PushError::Internal(e.to_string()))?
}

/// The client's messages, each awaited for a bounded time.
struct Incoming {
    messages: Streaming<PushStudentRequest>,
    idle: Duration,
    total: Duration,
    end: Instant,
}

impl Incoming {
    /// The next message that holds something; None at the end of the stream.
    async fn next(&mut self) -> Result<Option<Part>, Failure> {
        let idle_end = Instant::now() + self.idle;
        loop {
            match timeout_at(idle_end.min(self.end), self.messages.message()).await {
                Ok(Ok(Some(message))) => match message.part {
                    Some(Part::Data(piece)) if piece.is_empty() => {}
                    Some(part) => return Ok(Some(part)),
                    None => {}
                },
                Ok(Ok(None)) => return Ok(None),
                // tonic's word for a message above our limit.
                Ok(Err(status)) if status.code() == Code::OutOfRange => return Err(Failure::LargeMessage),
                Ok(Err(status)) => return Err(Failure::Broken(status)),
                Err(_) if Instant::now() >= self.end => {
                    return Err(Failure::Late(format!(
                        "the push was not complete after {}, and is abandoned",
                        humantime::format_duration(self.total)
                    )));
                }
                Err(_) => {
                    return Err(Failure::Late(format!(
                        "no message arrived for {}, and the push is abandoned",
                        humantime::format_duration(self.idle)
                    )));
                }
            }
        }
    }
}
