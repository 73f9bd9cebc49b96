//! `Stream` on the wire without a copy of its payload.
//!
//! tonic's encoder writes every message into a buffer of its own, which for a thousand readers of one chunk is a
//! thousand copies. So this method's answer is a body of our own: a few bytes of gRPC framing, the payload by reference,
//! a few bytes more. HTTP/2 stays hyper's business, and so do requests, decoded by tonic as ever.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as Task, Poll, ready};
use std::time::Instant;

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::stream::{BoxStream, Stream};
use http::{HeaderMap, HeaderValue, header};
use http_body::Frame;
use prost::Message;
use tonic::Status;
use tonic::body::Body;
use tonic::codec::{Codec, Streaming};
use tonic::codegen::{BoxFuture, Service};
use tonic::server::NamedService;
use tonic_prost::ProstCodec;

use super::context::Context;
use super::limits::MAX_REQUEST_BYTES;
use super::service::DreamfeedServer;
use super::status;
use super::stream::{self, Outgoing};
use crate::proto::{StreamRequest, StreamResponse};

const PATH: &str = "/dreamfeed.v1.DreamfeedService/Stream";
/// The payload is field 1, of wire type "length-delimited".
const PAYLOAD_TAG: u8 = 1 << 3 | 2;

/// The service with `Stream` answered here.
#[derive(Clone)]
pub(super) struct Framed {
    pub inner: DreamfeedServer,
    pub context: Arc<Context>,
}

impl NamedService for Framed {
    const NAME: &'static str = DreamfeedServer::NAME;
}

impl Service<http::Request<Body>> for Framed {
    type Response = http::Response<Body>;
    type Error = std::convert::Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Task<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        if request.uri().path() != PATH {
            return self.inner.call(request);
        }
        let context = self.context.clone();
        Box::pin(async move {
            let started = Instant::now();
            let opened = match decode(request.into_body()).await {
                Ok(request) => stream::open(&context, &request).await,
                Err(status) => Err(status),
            };
            status::record("Stream", started, &opened);
            Ok(match opened {
                Ok(messages) => respond(messages),
                Err(status) => status.into_http(),
            })
        })
    }
}

async fn decode(body: Body) -> Result<StreamRequest, Status> {
    let decoder = ProstCodec::<StreamResponse, StreamRequest>::default().decoder();
    let mut messages = Streaming::new_request(decoder, body, None, Some(MAX_REQUEST_BYTES));
    let request = messages.message().await?;
    request.ok_or_else(|| Status::invalid_argument("the call ended before its request; send one StreamRequest"))
}

fn respond(messages: BoxStream<'static, Result<Outgoing, Status>>) -> http::Response<Body> {
    let mut response = http::Response::new(Body::new(Frames { messages, waiting: VecDeque::new(), ended: false }));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

/// Messages as HTTP frames. Pulled: the transport asks for the next frame when it has room for it.
struct Frames {
    messages: BoxStream<'static, Result<Outgoing, Status>>,
    waiting: VecDeque<Bytes>,
    ended: bool,
}

impl http_body::Body for Frames {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, task: &mut Task<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        if let Some(bytes) = self.waiting.pop_front() {
            return Poll::Ready(Some(Ok(Frame::data(bytes))));
        }
        if self.ended {
            return Poll::Ready(None);
        }
        let status = match ready!(Pin::new(&mut self.messages).poll_next(task)) {
            Some(Ok((rest, payload))) => match frame(&rest, payload) {
                Ok([head, payload, tail]) => {
                    self.waiting.extend([payload, tail].into_iter().filter(|bytes| !bytes.is_empty()));
                    return Poll::Ready(Some(Ok(Frame::data(head))));
                }
                Err(status) => status,
            },
            Some(Err(status)) => status,
            None => Status::ok(""),
        };
        self.ended = true;
        let mut trailers = HeaderMap::new();
        Poll::Ready(Some(status.add_header(&mut trailers).map(|()| Frame::trailers(trailers))))
    }
}

/// One gRPC message in three pieces; the middle one is the payload itself.
fn frame(rest: &StreamResponse, payload: Bytes) -> Result<[Bytes; 3], Status> {
    let tail = rest.encode_to_vec();
    let mut field = BytesMut::with_capacity(16);
    if !payload.is_empty() {
        field.put_u8(PAYLOAD_TAG);
        prost::encode_length_delimiter(payload.len(), &mut field)
            .map_err(|e| Status::internal(format!("the payload's length cannot be written: {e}")))?;
    }
    let length = u32::try_from(field.len() + payload.len() + tail.len())
        .map_err(|_| Status::internal("a message of 4 GiB or more cannot be sent over gRPC"))?;
    let mut head = BytesMut::with_capacity(5 + field.len());
    head.put_u8(0); // not compressed
    head.put_u32(length);
    head.put(field);
    Ok([head.freeze(), payload, tail.into()])
}

#[cfg(test)]
mod tests {
    use futures_util::stream::StreamExt;

    use super::*;

    #[test]
    fn three_pieces_are_the_message_and_share_the_payload() -> Result<(), Box<dyn std::error::Error>> {
        let rest =
            StreamResponse { first_sequence: 7, count: 3, cursor: Bytes::from_static(b"c"), ..Default::default() };
        for length in [0, 1, 127, 128, 70_000] {
            let payload = Bytes::from(vec![9u8; length]);
            let pieces = frame(&rest, payload.clone())?;
            if length > 0 {
                assert_eq!(pieces[1].as_ptr(), payload.as_ptr());
            }
            let whole = pieces.concat();
            let announced = u32::from_be_bytes(whole[1..5].try_into()?) as usize;
            assert_eq!((whole[0], announced), (0, whole.len() - 5));
            let decoded = StreamResponse::decode(&whole[5..])?;
            assert_eq!(decoded, StreamResponse { payload, ..rest.clone() });
        }
        Ok(())
    }

    #[test]
    fn the_payload_is_field_one_of_the_contract() {
        let message = StreamResponse { payload: Bytes::from_static(b"x"), ..Default::default() };
        assert_eq!(message.encode_to_vec(), [PAYLOAD_TAG, 1, b'x']);
    }

    #[tokio::test]
    async fn a_stream_ends_with_its_status() {
        let messages = futures_util::stream::iter([Err(Status::out_of_range("gone"))]).boxed();
        let mut frames = Frames { messages, waiting: VecDeque::new(), ended: false };
        let frame = std::future::poll_fn(|task| http_body::Body::poll_frame(Pin::new(&mut frames), task)).await;
        let trailers = frame.and_then(Result::ok).and_then(|frame| frame.into_trailers().ok());
        assert_eq!(trailers.as_ref().map(|map| map["grpc-status"].as_bytes()), Some(&b"11"[..]));
        let end = std::future::poll_fn(|task| http_body::Body::poll_frame(Pin::new(&mut frames), task)).await;
        assert!(end.is_none());
    }
}
