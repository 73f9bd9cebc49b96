//! `Stream`: what a subscription brings, as messages.
//!
//! A stream is pulled: the transport asks for the next message when it has room for it, so a slow reader holds one
//! message at most, or two where replayed ones are made early, and its position is all the state there is.

use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt};
use tokio::sync::OwnedSemaphorePermit;
use tonic::{Code, Status};

use super::context::Context;
use super::convert;
use super::status;
use crate::client::NEXT_SEQUENCE;
use crate::delivery::{End, Message, Subscription};
use crate::proto::{StreamRequest, StreamResponse};
use crate::telemetry;

/// A message: everything but the payload, and the payload.
pub(super) type Outgoing = (StreamResponse, Bytes);

pub(super) async fn open(
    context: &Arc<Context>,
    request: &StreamRequest,
) -> Result<BoxStream<'static, Result<Outgoing, Status>>, Status> {
    context.accept()?;
    let policy = convert::policy(request, context)?;
    let position = start(context, request).await?;
    let permit = context.streams.clone().try_acquire_owned().map_err(|_| {
        let message = format!(
            "{} streams are open, as many as this daemon takes (its setting max_streams); retry with back-off",
            context.max_streams
        );
        status::of(Code::ResourceExhausted, &message)
    })?;
    let subscriber = Subscriber::new(permit);
    // Staleness is checked again when a message is sent, so such a message is not made before it is asked for.
    let may_be_early = policy.replay.share > 0.0 && !policy.staleness.is_bounded();
    let subscription = context.delivery.subscribe(position, policy);
    let reader = Reader { context: context.clone(), subscription, subscriber };
    let responses = stream::unfold(Some(reader), |reader| async {
        let mut reader = reader?;
        match reader.next().await {
            Ok(response) => Some((Ok(response), Some(reader))),
            Err(status) => Some((Err(status), None)),
        }
    });
    match context.early.clone().try_acquire_owned() {
        Ok(permit) if may_be_early => Ok(made_early(responses.boxed(), permit)),
        _ => Ok(responses.boxed()),
    }
}

/// Puts each message together while the one before it is on its way: replayed images are copied into their message, and
/// a single reader would wait for that. Holds one message more.
fn made_early(
    mut responses: BoxStream<'static, Result<Outgoing, Status>>,
    permit: OwnedSemaphorePermit,
) -> BoxStream<'static, Result<Outgoing, Status>> {
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    tokio::spawn(async move {
        let _permit = permit;
        while let Ok(place) = sender.reserve().await {
            tokio::select! {
                () = sender.closed() => break,
                response = responses.next() => match response {
                    Some(response) => place.send(response),
                    None => break,
                },
            }
        }
    });
    let receive =
        |mut receiver: tokio::sync::mpsc::Receiver<_>| async move { Some((receiver.recv().await?, receiver)) };
    stream::unfold(receiver, receive).boxed()
}

/// The sequence at which a stream starts. A position beyond the end may come from another replica, which is ahead of what
/// this daemon has seen: it looks before it refuses.
async fn start(context: &Arc<Context>, request: &StreamRequest) -> Result<u64, Status> {
    let log = context.delivery.log();
    let (start, before) = (request.start.as_ref(), log.extent().next_sequence);
    match convert::start_position(start, log) {
        Err(refused) if refused.code() == Code::OutOfRange && !refused.metadata().contains_key(NEXT_SEQUENCE) => {
            match log.refresh().await {
                Ok(()) if log.extent().next_sequence > before => convert::start_position(start, log),
                _ => Err(refused),
            }
        }
        found => found,
    }
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
    subscription: Subscription,
    subscriber: Subscriber,
}

impl Reader {
    async fn next(&mut self) -> Result<Outgoing, Status> {
        let closing = self.context.closing.clone();
        tokio::select! {
            biased;
            () = closing.cancelled() => Err(self.close()),
            next = self.subscription.next() => match next {
                Ok(message) => Ok(self.send(message)),
                Err(end) => {
                    self.subscriber.end = match end {
                        End::Overtaken { .. } => "overtaken",
                        End::Lost { .. } => "lost",
                        End::Ahead { .. } => "error",
                        End::Storage(_) => "storage",
                        End::NoRoom(_) => "room",
                    };
                    Err(status::of_end(&end))
                }
            },
        }
    }

    fn close(&mut self) -> Status {
        self.subscriber.end = if self.context.draining.is_cancelled() { "draining" } else { "failed" };
        self.context.closing_status()
    }

    fn send(&mut self, message: Message) -> Outgoing {
        let replayed = message.count.saturating_sub(message.fresh_count);
        let age = SystemTime::now().duration_since(message.oldest).unwrap_or_default();
        metrics::counter!(telemetry::IMAGES_SENT, "kind" => "fresh").increment(u64::from(message.fresh_count));
        metrics::counter!(telemetry::IMAGES_SENT, "kind" => "replayed").increment(u64::from(replayed));
        metrics::counter!(telemetry::BYTES_SENT).increment(message.payload.len() as u64);
        let kind = if replayed == 0 { "fresh" } else { "replayed" };
        metrics::histogram!(telemetry::SENT_AGE_SECONDS, "kind" => kind).record(age.as_secs_f64());
        let log = self.context.delivery.log();
        let response = StreamResponse {
            payload: Default::default(),
            cursor: log.cursor(message.position),
            first_sequence: message.first_sequence,
            count: message.count,
            current_student_version: self.context.delivery.current_version(),
            lag: log.extent().next_sequence.saturating_sub(message.position),
            age: Some(convert::duration(age)),
            realized_replay_ratio: message.replay_ratio as f32,
            fresh_count: message.fresh_count,
            stale_images: message.stale_images,
        };
        (response, message.payload)
    }
}
