//! What a request may bring, over all connections: bytes while it is read, and time until it is answered. Around every
//! service of the gRPC port.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as Task, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body::Frame;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;
use tonic::body::Body;
use tonic::codegen::{BoxFuture, Service};
use tonic::server::NamedService;
use tonic::{Code, Status};

use super::connections::Greeting;
use super::limits::Limit;
use super::status;
use crate::telemetry;

/// Bytes are counted in these.
const UNIT: u64 = 1 << 10;

/// The bytes of requests in flight.
#[derive(Debug)]
pub(super) struct Requests {
    room: Arc<Semaphore>,
    /// As many bytes.
    capacity: u64,
    call_timeout: Duration,
}

impl Requests {
    /// At most `capacity` bytes at one time; every call but a push is answered within `call_timeout`.
    pub fn new(capacity: u64, call_timeout: Duration) -> Arc<Self> {
        for reason in ["room", "size", "late"] {
            metrics::counter!(telemetry::REQUESTS_REFUSED, "reason" => reason).increment(0);
        }
        let room = Arc::new(Semaphore::new(usize::try_from(capacity / UNIT).unwrap_or(Semaphore::MAX_PERMITS)));
        Arc::new(Self { room, capacity, call_timeout })
    }

    /// Bytes that are reserved now.
    pub fn in_flight(&self) -> u64 {
        self.capacity.saturating_sub(self.room.available_permits() as u64 * UNIT)
    }

    /// The bound on those.
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// The service with these bounds.
    pub fn around<S>(self: &Arc<Self>, inner: S) -> Bounded<S> {
        Bounded { inner, requests: self.clone() }
    }

    fn reserve(&self, limit: &Limit) -> Result<OwnedSemaphorePermit, Status> {
        let units = u32::try_from(limit.reserved.div_ceil(UNIT)).unwrap_or(u32::MAX);
        self.room.clone().try_acquire_many_owned(units).map_err(|_| {
            refused("room");
            let message = format!(
                "{} bytes are held for requests that are still being read, as many as this daemon takes (its setting \
                 limits.request_bytes); retry with back-off",
                self.in_flight()
            );
            status::of(Code::ResourceExhausted, &message)
        })
    }
}

fn refused(reason: &'static str) {
    metrics::counter!(telemetry::REQUESTS_REFUSED, "reason" => reason).increment(1);
}

/// A service whose requests are bounded.
#[derive(Clone, Debug)]
pub(super) struct Bounded<S> {
    inner: S,
    requests: Arc<Requests>,
}

impl<S: NamedService> NamedService for Bounded<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<http::Request<Body>> for Bounded<S>
where
    S: Service<http::Request<Body>, Response = http::Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Infallible>;

    fn poll_ready(&mut self, task: &mut Task<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(task)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        if let Some(greeting) = request.extensions().get::<Greeting>() {
            greeting.came();
        }
        let started = Instant::now();
        let limit = Limit::of(request.uri().path());
        let refuse = move |refusal: Status| {
            status::record(limit.method, started, &Err::<(), _>(refusal.clone()));
            Ok(refusal.into_http())
        };
        let held = match self.requests.reserve(limit) {
            Ok(held) => held,
            Err(status) => return Box::pin(std::future::ready(refuse(status))),
        };
        let (head, body) = request.into_parts();
        let patience = limit.is_timed.then_some(self.requests.call_timeout);
        let patience = patience.map(|patience| (patience, Box::pin(tokio::time::sleep(patience))));
        let body = Body::new(Limited { body, left: limit.most, begun: false, limit, patience, _held: held });
        let (call, answer) = (Call::begun(), self.inner.call(http::Request::from_parts(head, body)));
        let answer =
            async move { answer.await.map(|answer| answer.map(|body| Body::new(Answer { body, _call: call }))) };
        if !limit.is_timed {
            return Box::pin(answer);
        }
        let patience = self.requests.call_timeout;
        Box::pin(async move {
            match tokio::time::timeout(patience, answer).await {
                Ok(answer) => answer,
                Err(_) => {
                    refused("late");
                    let message = format!(
                        "the call was not answered within {} (its setting limits.call_timeout)",
                        humantime::format_duration(patience)
                    );
                    refuse(status::of(Code::DeadlineExceeded, &message))
                }
            }
        })
    }
}

/// Counts a call for as long as it is under way.
#[derive(Debug)]
struct Call;

impl Call {
    fn begun() -> Self {
        metrics::gauge!(telemetry::CALLS_UNDER_WAY).increment(1.0);
        Self
    }
}

impl Drop for Call {
    fn drop(&mut self) {
        metrics::gauge!(telemetry::CALLS_UNDER_WAY).decrement(1.0);
    }
}

/// The body of an answer, with which its call ends.
struct Answer {
    body: Body,
    _call: Call,
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, task: &mut Task<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Pin::new(&mut self.body).poll_frame(task)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}

/// A request's body that ends with an error once it is larger than its method's may be. Holds its room until it has been
/// read, or is given up.
struct Limited {
    body: Body,
    left: Option<u64>,
    /// Whether its first bytes were seen.
    begun: bool,
    limit: &'static Limit,
    /// How long nothing may come, and until when; None where the method looks after that itself.
    patience: Option<(Duration, Pin<Box<Sleep>>)>,
    _held: OwnedSemaphorePermit,
}

/// What the frame of a message says that still comes after these first bytes of a body, so that a message that is too large
/// is refused before it is sent.
fn announced(first: &[u8]) -> u64 {
    match first {
        [_, a, b, c, d, rest @ ..] => {
            u64::from(u32::from_be_bytes([*a, *b, *c, *d])).saturating_sub(rest.len() as u64)
        }
        _ => 0,
    }
}

impl http_body::Body for Limited {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, task: &mut Task<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let frame = match (Pin::new(&mut this.body).poll_frame(task), &mut this.patience) {
            (Poll::Ready(frame), Some((patience, end))) => {
                end.as_mut().reset(tokio::time::Instant::now() + *patience);
                frame
            }
            (Poll::Ready(frame), None) => frame,
            (Poll::Pending, Some((_, end))) => {
                // A call of many messages, too, holds room only while it has something to say.
                ready!(end.as_mut().poll(task));
                refused("late");
                let message = "nothing came for longer than a call may take (its setting limits.call_timeout)";
                return Poll::Ready(Some(Err(status::of(Code::DeadlineExceeded, message))));
            }
            (Poll::Pending, None) => return Poll::Pending,
        };
        let Some(Ok(data)) = &frame else { return Poll::Ready(frame) };
        let data = data.data_ref().map_or(&[][..], |data| data);
        let announced = if std::mem::replace(&mut self.begun, true) { 0 } else { announced(data) };
        if let Some(left) = &mut self.left {
            match left.checked_sub(data.len() as u64) {
                Some(rest) if announced <= rest => *left = rest,
                _ => {
                    refused("size");
                    let (method, most) = (self.limit.method, self.limit.most.unwrap_or(0));
                    let message = format!("a request of {method} has more than {most} bytes; give a smaller one");
                    return Poll::Ready(Some(Err(status::of(Code::ResourceExhausted, &message))));
                }
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}
