//! `Stream`: the log from a position on, then live.
//!
//! A stream is pulled: the transport asks for the next message when it has room for it, so a slow reader holds one
//! chunk at most, and its position is all the state there is.

use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, BoxStream, StreamExt};
use tokio::sync::{OwnedSemaphorePermit, watch};
use tonic::{Code, Status};

use super::context::Context;
use super::convert;
use crate::log::{Chunk, Read};
use crate::proto::{StreamRequest, StreamResponse};
use crate::telemetry;

/// What a call to `Stream` answers with.
pub(super) type Responses = BoxStream<'static, Result<StreamResponse, Status>>;

pub(super) fn open(context: &Arc<Context>, request: &StreamRequest) -> Result<Responses, Status> {
    context.accept()?;
    convert::check_stream_options(request, context.teacher.spec.num_classes)?;
    let position = convert::start_position(request.start.as_ref(), &context.log)?;
    let permit = context.streams.clone().try_acquire_owned().map_err(|_| {
        let message = format!(
            "{} streams are open, as many as this daemon takes (its setting max_streams); retry with back-off",
            context.max_streams
        );
        convert::status(Code::ResourceExhausted, &message)
    })?;
    let subscriber = Subscriber::new(permit);
    let news = context.log.watch();
    let reader = Reader { context: context.clone(), news, position, begun: false, subscriber };
    let responses = stream::unfold(Some(reader), |reader| async {
        let mut reader = reader?;
        match reader.next().await {
            Ok(response) => Some((Ok(response), Some(reader))),
            Err(status) => Some((Err(status), None)),
        }
    });
    Ok(responses.boxed())
}

/// Counts an open stream for as long as it lives, and says in the end why it ended.
struct Subscriber {
    _permit: OwnedSemaphorePermit,
    end: &'static str,
}

impl Subscriber {
    fn new(permit: OwnedSemaphorePermit) -> Self {
        metrics::gauge!(telemetry::SUBSCRIBERS).increment(1.0);
        // A stream that is dropped before it ended by itself was left by its client.
        Self { _permit: permit, end: "client" }
    }
}

impl Drop for Subscriber {
    fn drop(&mut self) {
        metrics::gauge!(telemetry::SUBSCRIBERS).decrement(1.0);
        metrics::counter!(telemetry::STREAM_ENDS, "reason" => self.end).increment(1);
    }
}

struct Reader {
    context: Arc<Context>,
    news: watch::Receiver<u64>,
    position: u64,
    begun: bool,
    subscriber: Subscriber,
}

impl Reader {
    async fn next(&mut self) -> Result<StreamResponse, Status> {
        loop {
            if self.context.closing.is_cancelled() {
                return Err(self.close());
            }
            // Seen before the read: what is appended after it wakes the wait below.
            self.news.borrow_and_update();
            match self.read().await {
                Read::Chunk(chunk) => return Ok(self.send(&chunk)),
                Read::Overtaken { first_sequence } => {
                    self.subscriber.end = "overtaken";
                    return Err(convert::overtaken(self.position, first_sequence));
                }
                Read::Ahead { next_sequence } => {
                    self.subscriber.end = "error";
                    return Err(convert::ahead(self.position, next_sequence));
                }
                Read::Wait => {}
            }
            tokio::select! {
                () = self.context.closing.cancelled() => {}
                // The bound is only a safety net: a missed wake-up would cost a minute, not the stream.
                _ = tokio::time::timeout(Duration::from_secs(60), self.news.changed()) => {}
            }
        }
    }

    /// Only the first read can begin inside a chunk, whose rest is then encoded anew: work for another thread.
    async fn read(&mut self) -> Read {
        let (log, position) = (self.context.log.clone(), self.position);
        if std::mem::replace(&mut self.begun, true) {
            return log.read(position);
        }
        let wait = |_| Read::Wait;
        tokio::task::spawn_blocking(move || log.read(position)).await.unwrap_or_else(wait)
    }

    fn close(&mut self) -> Status {
        self.subscriber.end = if self.context.draining.is_cancelled() { "draining" } else { "failed" };
        self.context.closing_status()
    }

    fn send(&mut self, chunk: &Chunk) -> StreamResponse {
        self.position = chunk.end();
        metrics::counter!(telemetry::IMAGES_SENT).increment(u64::from(chunk.count));
        metrics::counter!(telemetry::BYTES_SENT).increment(chunk.payload.len() as u64);
        StreamResponse {
            payload: chunk.payload.clone(),
            cursor: self.context.log.cursor(self.position),
            first_sequence: chunk.first_sequence,
            count: chunk.count,
            current_student_version: self.context.students.current_version(),
            lag: self.context.log.extent().next_sequence.saturating_sub(self.position),
            age: Some(convert::age(chunk.created_at)),
            realized_replay_ratio: 0.0,
        }
    }
}
