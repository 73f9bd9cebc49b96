//! The service as tonic sees it: each method in a file of its own, the time of each call measured here.

use std::sync::Arc;
use std::time::Instant;

use tonic::{Request, Response, Status, Streaming};

use super::context::Context;
use super::{describe, fetch_student, push_student, stream};
use crate::proto::dreamfeed_service_server::DreamfeedService;
use crate::proto::{
    DescribeRequest, DescribeResponse, FetchStudentRequest, PushStudentRequest, PushStudentResponse, StreamRequest,
};
use crate::telemetry;

/// The implementation of `dreamfeed.v1.DreamfeedService`.
pub(super) struct Service(pub Arc<Context>);

#[tonic::async_trait]
impl DreamfeedService for Service {
    type StreamStream = stream::Responses;
    type FetchStudentStream = fetch_student::Responses;

    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<DescribeResponse>, Status> {
        let started = Instant::now();
        answer("Describe", started, describe::describe(&self.0))
    }

    async fn stream(&self, request: Request<StreamRequest>) -> Result<Response<Self::StreamStream>, Status> {
        let started = Instant::now();
        answer("Stream", started, stream::open(&self.0, request.get_ref()))
    }

    async fn push_student(
        &self,
        request: Request<Streaming<PushStudentRequest>>,
    ) -> Result<Response<PushStudentResponse>, Status> {
        let started = Instant::now();
        answer("PushStudent", started, push_student::push_student(&self.0, request.into_inner()).await)
    }

    async fn fetch_student(
        &self,
        request: Request<FetchStudentRequest>,
    ) -> Result<Response<Self::FetchStudentStream>, Status> {
        let started = Instant::now();
        answer("FetchStudent", started, fetch_student::open(&self.0, request.into_inner()).await)
    }
}

fn answer<T>(method: &'static str, started: Instant, result: Result<T, Status>) -> Result<Response<T>, Status> {
    let code = match &result {
        Ok(_) => "OK",
        Err(status) => code_name(status.code()),
    };
    metrics::histogram!(telemetry::RPC_SECONDS, "method" => method, "code" => code)
        .record(started.elapsed().as_secs_f64());
    result.map(Response::new)
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
        tonic::Code::Unimplemented => "UNIMPLEMENTED",
        tonic::Code::Unavailable => "UNAVAILABLE",
        tonic::Code::Internal => "INTERNAL",
        _ => "OTHER",
    }
}
