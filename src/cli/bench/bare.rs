//! `dreamfeed bench bare`: a gRPC server as tonic makes it, with nothing of the daemon's. It streams a chunk of a store
//! as StreamResponse again and again, encoded by tonic for each subscriber.

use std::net::SocketAddr;

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, Empty, StreamExt};
use tokio::io::{AsyncWriteExt, stdout};
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status, Streaming};

use crate::log::inspect;
use crate::proto::dreamfeed_service_server::{DreamfeedService, DreamfeedServiceServer};
use crate::proto::{
    DescribeRequest, DescribeResponse, FetchStudentRequest, FetchStudentResponse, PushStudentRequest,
    PushStudentResponse, SetSynthesizerRequest, SetSynthesizerResponse, StreamRequest, StreamResponse,
};
use crate::storage::Storage;

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The store whose chunks are streamed.
    #[arg(long, value_name = "LOCATION")]
    store: String,
}

struct Bare(Vec<Bytes>);

/// Serves until it is killed; prints the address.
pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let storage = Storage::open_existing(&args.store)?;
        let log = inspect::inspect(&storage).await?;
        let log = log.ok_or_else(|| anyhow::anyhow!("there is no log in {}; let a daemon make one", args.store))?;
        let mut payloads = Vec::new();
        for entry in log.entries {
            let first_sequence = entry.summary.first_sequence;
            payloads.push(inspect::load(&storage, &log.identity, first_sequence).await?.payload().clone());
        }
        let incoming = TcpIncoming::bind(SocketAddr::from(([127, 0, 0, 1], 0)))?.with_nodelay(Some(true));
        let mut out = stdout();
        out.write_all(format!("{}\n", incoming.local_addr()?).as_bytes()).await?;
        out.flush().await?;
        let server = tonic::transport::Server::builder().add_service(DreamfeedServiceServer::new(Bare(payloads)));
        server.serve_with_incoming(incoming).await?;
        Ok(())
    })
}

fn not_here<T>() -> Result<T, Status> {
    Err(Status::unimplemented("this server only streams"))
}

#[tonic::async_trait]
impl DreamfeedService for Bare {
    type StreamStream = BoxStream<'static, Result<StreamResponse, Status>>;
    type FetchStudentStream = Empty<Result<FetchStudentResponse, Status>>;

    async fn stream(&self, _: Request<StreamRequest>) -> Result<Response<Self::StreamStream>, Status> {
        let payloads = self.0.clone();
        let messages = stream::iter(0u64..).map(move |at| {
            let index = at as usize % payloads.len().max(1);
            let payload = payloads.get(index).cloned().unwrap_or_default();
            Ok(StreamResponse { payload, first_sequence: at, count: 1, ..Default::default() })
        });
        Ok(Response::new(messages.boxed()))
    }

    async fn describe(&self, _: Request<DescribeRequest>) -> Result<Response<DescribeResponse>, Status> {
        not_here()
    }

    async fn push_student(
        &self,
        _: Request<Streaming<PushStudentRequest>>,
    ) -> Result<Response<PushStudentResponse>, Status> {
        not_here()
    }

    async fn fetch_student(
        &self,
        _: Request<FetchStudentRequest>,
    ) -> Result<Response<Self::FetchStudentStream>, Status> {
        not_here()
    }

    async fn set_synthesizer(
        &self,
        _: Request<SetSynthesizerRequest>,
    ) -> Result<Response<SetSynthesizerResponse>, Status> {
        not_here()
    }
}
