//! The service as tonic sees it: each method in a file of its own, the time of each call measured here.

use std::sync::Arc;
use std::time::Instant;

use futures_util::stream::Empty;
use tonic::{Request, Response, Status, Streaming};

use super::context::Context;
use super::{describe, fetch_student, push_student, set_synthesizer, status};
use crate::proto::dreamfeed_service_server::{DreamfeedService, DreamfeedServiceServer};
use crate::proto::{
    DescribeRequest, DescribeResponse, FetchStudentRequest, PushStudentRequest, PushStudentResponse,
    SetSynthesizerRequest, SetSynthesizerResponse, StreamRequest, StreamResponse,
};

/// The generated server around the implementation.
pub(super) type DreamfeedServer = DreamfeedServiceServer<Service>;

/// The implementation of `dreamfeed.v1.DreamfeedService`.
pub(super) struct Service(pub Arc<Context>);

#[tonic::async_trait]
impl DreamfeedService for Service {
    type StreamStream = Empty<Result<StreamResponse, Status>>;
    type FetchStudentStream = fetch_student::Responses;

    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<DescribeResponse>, Status> {
        let started = Instant::now();
        answer("Describe", started, describe::describe(&self.0))
    }

    /// Never called: [`super::frames`] answers this method before it comes here.
    async fn stream(&self, _: Request<StreamRequest>) -> Result<Response<Self::StreamStream>, Status> {
        Err(Status::internal("Stream is answered elsewhere in this daemon"))
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

    async fn set_synthesizer(
        &self,
        request: Request<SetSynthesizerRequest>,
    ) -> Result<Response<SetSynthesizerResponse>, Status> {
        let started = Instant::now();
        answer("SetSynthesizer", started, set_synthesizer::set_synthesizer(&self.0, &request.into_inner()))
    }
}

fn answer<T>(method: &'static str, started: Instant, result: Result<T, Status>) -> Result<Response<T>, Status> {
    status::record(method, started, &result);
    result.map(Response::new)
}
