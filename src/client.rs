//! The Rust client that the trainers and the tests use: the wire's types turned into what a trainer works with.

use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, BoxStream, StreamExt};
use rand::RngExt;
use safetensors::Dtype;
use sha2::{Digest, Sha256};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::model::checkpoint::{Checkpoint, CheckpointError, hex};
use crate::proto;
use crate::proto::dreamfeed_service_client::DreamfeedServiceClient;
use crate::proto::stream_start::Position;
use crate::proto::{fetch_student_response, push_student_request};

/// The trailer that carries [`ClientError::next_sequence`].
pub(crate) const NEXT_SEQUENCE: &str = "dreamfeed-next-sequence";
/// Bytes of one piece of a pushed file.
const PIECE_BYTES: usize = 2 << 20;
/// What the daemon may send ahead: the receiver's windows rule.
const STREAM_WINDOW: u32 = 8 << 20;
const CONNECTION_WINDOW: u32 = 16 << 20;
/// A daemon that answers no ping for this long after as long a silence is gone.
const KEEPALIVE: Duration = Duration::from_secs(20);
/// How long a connection may take to come up.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a call failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The address is not a URL.
    #[error("{url:?} is not the address of a daemon: {cause}; give for example http://127.0.0.1:7461")]
    Address {
        /// What was given.
        url: String,
        /// What is wrong with it.
        cause: tonic::transport::Error,
    },
    /// No connection.
    #[error("cannot connect to the daemon at {url}: {}", root_cause(.cause))]
    Connect {
        /// The address.
        url: String,
        /// Why. Told in the message, so not a source of its own: whoever prints the chain would print it twice.
        cause: tonic::transport::Error,
    },
    /// The daemon takes connections, or its name is being looked up, and nothing comes.
    #[error("the daemon at {url} did not answer within {}; see whether it is stopped or very busy", humantime::format_duration(*.within))]
    Unanswered {
        /// The address.
        url: String,
        /// How long was waited.
        within: Duration,
    },
    /// The daemon answered with an error, or the connection broke.
    #[error("{method}: {} ({:?})", .status.message(), .status.code())]
    Status {
        /// The method called.
        method: &'static str,
        /// The answer.
        status: Box<Status>,
    },
    /// The daemon answered with something that the contract does not allow.
    #[error("{method}: the daemon broke the contract: {problem}")]
    Contract {
        /// The method called.
        method: &'static str,
        /// What is wrong.
        problem: String,
    },
}

impl ClientError {
    /// The gRPC code of the daemon's answer.
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Status { status, .. } => Some(status.code()),
            _ => None,
        }
    }

    /// Where a stream can go on that was overtaken by retention, or met an image that is lost to damage.
    pub fn next_sequence(&self) -> Option<u64> {
        match self {
            Self::Status { status, .. } => status.metadata().get(NEXT_SEQUENCE)?.to_str().ok()?.parse().ok(),
            _ => None,
        }
    }

    /// Whether the same call can succeed later: the daemon is away, starting or draining, or the connection broke. A
    /// trainer that sees one of these reconnects with [`Backoff`]; every other error will come again.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Connect { .. } | Self::Unanswered { .. } => true,
            Self::Status { status, .. } => match status.code() {
                Code::Unavailable | Code::Cancelled | Code::Aborted | Code::DeadlineExceeded => true,
                // How tonic reports a connection that broke in the middle of a call. A status that came over the wire
                // has no source.
                Code::Unknown | Code::Internal => std::error::Error::source(&**status).is_some(),
                _ => false,
            },
            Self::Address { .. } | Self::Contract { .. } => false,
        }
    }
}

fn root_cause(error: &tonic::transport::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// Where a stream starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Start {
    /// The oldest image that can still be read.
    Earliest,
    /// The next image to be made.
    Latest,
    /// The image with this sequence.
    Sequence(u64),
    /// After the message that this [`Batch::cursor`] came with.
    Cursor(Bytes),
}

impl From<Start> for proto::StreamStart {
    fn from(start: Start) -> Self {
        Self {
            position: Some(match start {
                Start::Earliest => Position::Earliest(proto::Earliest {}),
                Start::Latest => Position::Latest(proto::Latest {}),
                Start::Sequence(sequence) => Position::Sequence(sequence),
                Start::Cursor(cursor) => Position::Cursor(cursor),
            }),
        }
    }
}

/// One message of a stream, its payload parsed.
#[derive(Clone, Debug)]
pub struct Batch {
    /// The tensors and the metadata.
    pub payload: Checkpoint,
    /// Start from it to continue with the next image.
    pub cursor: Bytes,
    /// The sequence of the first image.
    pub first_sequence: u64,
    /// The number of images N.
    pub count: usize,
    /// The newest accepted student version when this was sent, 0 = none.
    pub current_student_version: u64,
    /// How many of them are fresh; those come first.
    pub fresh_count: usize,
    /// Images in the log after this message's cursor when it was sent.
    pub lag: u64,
    /// The age of the oldest image in it when it was sent.
    pub age: Duration,
    /// The share of the images sent on this stream so far that were replayed, 0..1.
    pub realized_replay_ratio: f32,
    /// Images that this stream passed over so far because they were too stale.
    pub stale_images: u64,
}

impl Batch {
    /// Pixels 0..255, `[N, C, H, W]` row-major; and C, H, W.
    pub fn images(&self) -> Result<(&[u8], [usize; 3]), ClientError> {
        let tensor = self.tensor("images", Dtype::U8)?;
        match tensor.shape {
            [n, c, h, w] if *n == self.count => Ok((tensor.data, [*c, *h, *w])),
            shape => {
                Err(broken("Stream", format!("images has the shape {shape:?}, expected [{}, C, H, W]", self.count)))
            }
        }
    }

    /// The class each image was made for, `[N]`.
    pub fn labels(&self) -> Result<Vec<i64>, ClientError> {
        self.vector("labels", Dtype::I64, i64::from_le_bytes)
    }

    /// The newest student each image was optimized against, `[N]`; 0 = none.
    pub fn student_version(&self) -> Result<Vec<i64>, ClientError> {
        self.vector("student_version", Dtype::I64, i64::from_le_bytes)
    }

    /// JS divergence of teacher and student at birth, `[N]`, in nats.
    pub fn competition(&self) -> Result<Vec<f32>, ClientError> {
        self.vector("competition", Dtype::F32, f32::from_le_bytes)
    }

    /// Each image's sequence, `[N]`.
    pub fn sequences(&self) -> Result<Vec<u64>, ClientError> {
        if self.payload.get("sequence").is_none() {
            // A whole chunk: its images are consecutive.
            return Ok((self.first_sequence..).take(self.count).collect());
        }
        self.vector("sequence", Dtype::I64, u64::from_le_bytes)
    }

    /// The teacher's logits, `[N, K]` row-major; and K.
    pub fn teacher_logits(&self) -> Result<(Vec<f32>, usize), ClientError> {
        let tensor = self.tensor("teacher_logits", Dtype::F32)?;
        match tensor.shape {
            [n, k] if *n == self.count => Ok((elements(tensor.data, f32::from_le_bytes), *k)),
            shape => {
                Err(broken("Stream", format!("teacher_logits has the shape {shape:?}, expected [{}, K]", self.count)))
            }
        }
    }

    fn tensor(&self, name: &str, dtype: Dtype) -> Result<crate::model::checkpoint::RawTensor<'_>, ClientError> {
        match self.payload.get(name) {
            Some(tensor) if tensor.dtype == dtype => Ok(tensor),
            Some(tensor) => Err(broken("Stream", format!("{name} is {:?}, expected {dtype:?}", tensor.dtype))),
            None => Err(broken("Stream", format!("the batch has no tensor {name}"))),
        }
    }

    fn vector<T, const B: usize>(
        &self,
        name: &str,
        dtype: Dtype,
        read: impl Fn([u8; B]) -> T,
    ) -> Result<Vec<T>, ClientError> {
        let tensor = self.tensor(name, dtype)?;
        if tensor.shape != [self.count] {
            let problem = format!("{name} has the shape {:?}, expected [{}]", tensor.shape, self.count);
            return Err(broken("Stream", problem));
        }
        Ok(elements(tensor.data, read))
    }
}

fn elements<T, const B: usize>(data: &[u8], read: impl Fn([u8; B]) -> T) -> Vec<T> {
    data.as_chunks::<B>().0.iter().map(|bytes| read(*bytes)).collect()
}

fn broken(method: &'static str, problem: String) -> ClientError {
    ClientError::Contract { method, problem }
}

impl TryFrom<proto::StreamResponse> for Batch {
    type Error = ClientError;

    fn try_from(response: proto::StreamResponse) -> Result<Self, ClientError> {
        let unreadable = |e: CheckpointError| broken("Stream", format!("the payload: {e}"));
        Ok(Self {
            payload: Checkpoint::parse(response.payload).map_err(unreadable)?,
            cursor: response.cursor,
            first_sequence: response.first_sequence,
            count: response.count as usize,
            current_student_version: response.current_student_version,
            fresh_count: response.fresh_count as usize,
            lag: response.lag,
            realized_replay_ratio: response.realized_replay_ratio,
            stale_images: response.stale_images,
            age: response.age.and_then(|age| age.try_into().ok()).unwrap_or_default(),
        })
    }
}

/// What a push came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pushed {
    /// The version that now holds these weights.
    pub version: u64,
    /// True where they already were the current version.
    pub already_current: bool,
}

/// A student that was fetched back, its digest checked.
#[derive(Clone, Debug)]
pub struct FetchedStudent {
    /// The version and what is known of it.
    pub header: proto::Student,
    /// The weights.
    pub checkpoint: Checkpoint,
}

/// A connection to a daemon. Cloning shares it.
#[derive(Clone, Debug)]
pub struct Client {
    service: DreamfeedServiceClient<Channel>,
}

impl Client {
    /// Connects to a daemon, for example `http://127.0.0.1:7461`. The scheme may be left out.
    pub async fn connect(url: &str) -> Result<Self, ClientError> {
        let full = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
        let address = |cause| ClientError::Address { url: url.to_owned(), cause };
        let channel = Endpoint::from_shared(full)
            .map_err(address)?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE)
            .keep_alive_while_idle(true)
            .connect()
            .await
            .map_err(|cause| ClientError::Connect { url: url.to_owned(), cause })?;
        // A batch may be far larger than gRPC's default of 4 MiB; the daemon says how large in Describe.
        let service = DreamfeedServiceClient::new(channel).max_decoding_message_size(usize::MAX);
        Ok(Self { service })
    }

    /// Connects to a daemon that may be away or still loading its teacher, and asks what it is. All of it takes `within` at
    /// most, also where the daemon takes the connection and then says nothing.
    pub async fn connect_within(url: &str, within: Duration) -> Result<(Self, proto::DescribeResponse), ClientError> {
        let attempt = || async {
            let client = Self::connect(url).await?;
            let description = client.describe().await?;
            Ok((client, description))
        };
        let unanswered = |_| ClientError::Unanswered { url: url.to_owned(), within };
        tokio::time::timeout(within, retry(within, attempt)).await.map_err(unanswered)?
    }

    /// The generated client beneath, for what this one does not wrap.
    pub fn service(&self) -> DreamfeedServiceClient<Channel> {
        self.service.clone()
    }

    /// What the daemon dreams from, and what it holds.
    pub async fn describe(&self) -> Result<proto::DescribeResponse, ClientError> {
        let answer = self.service().describe(proto::DescribeRequest {}).await;
        Ok(answer.map_err(failed("Describe"))?.into_inner())
    }

    /// Lets another synthesizer make the images from the next batch on; its name as in the contract.
    pub async fn set_synthesizer(&self, name: &str) -> Result<proto::Synthesizer, ClientError> {
        let answer = self.service().set_synthesizer(proto::SetSynthesizerRequest { name: name.to_owned() }).await;
        let answer = answer.map_err(failed("SetSynthesizer"))?.into_inner();
        answer.synthesizer.ok_or_else(|| broken("SetSynthesizer", "the answer names no synthesizer".into()))
    }

    /// Whole chunks from a start on, then live. Ends only with an error.
    pub async fn stream(&self, start: Start) -> Result<BatchStream, ClientError> {
        self.stream_with(proto::StreamRequest { start: Some(start.into()), ..Default::default() }).await
    }

    /// As [`Self::stream`], with every option of the contract.
    pub async fn stream_with(&self, request: proto::StreamRequest) -> Result<BatchStream, ClientError> {
        let responses = self.service().stream(request).await.map_err(failed("Stream"))?.into_inner();
        Ok(responses.map(|response| response.map_err(failed("Stream"))?.try_into()).boxed())
    }

    /// Replaces the student that new images compete against. `replaces`: accept only while this version is current.
    pub async fn push_student(
        &self,
        arch: &str,
        file: Bytes,
        trainer_step: u64,
        replaces: Option<u64>,
    ) -> Result<Pushed, ClientError> {
        let header = proto::PushStudentHeader {
            arch: arch.to_owned(),
            byte_length: file.len() as u64,
            sha256: Sha256::digest(&file).to_vec().into(),
            trainer_step,
            replaces_version: replaces,
        };
        self.push_raw(header, file).await
    }

    /// As [`Self::push_student`], with a header of the caller's own.
    pub async fn push_raw(&self, header: proto::PushStudentHeader, file: Bytes) -> Result<Pushed, ClientError> {
        let message = |part| proto::PushStudentRequest { part: Some(part) };
        let pieces = (0..file.len()).step_by(PIECE_BYTES).map(move |start| {
            message(push_student_request::Part::Data(file.slice(start..file.len().min(start + PIECE_BYTES))))
        });
        let messages = std::iter::once(message(push_student_request::Part::Header(header))).chain(pieces);
        let answer = self.service().push_student(stream::iter(messages.collect::<Vec<_>>())).await;
        let answer = answer.map_err(failed("PushStudent"))?.into_inner();
        Ok(Pushed { version: answer.version, already_current: answer.already_current })
    }

    /// A student back; version 0 is the newest. None where there is none, or where that version is not held any more.
    pub async fn fetch_student(&self, version: u64) -> Result<Option<FetchedStudent>, ClientError> {
        const METHOD: &str = "FetchStudent";
        let answer = self.service().fetch_student(proto::FetchStudentRequest { version }).await;
        let mut responses = match answer {
            Err(status) if status.code() == Code::NotFound => return Ok(None),
            answer => answer.map_err(failed(METHOD))?.into_inner(),
        };
        let mut header = None;
        let mut file = Vec::new();
        while let Some(response) = responses.message().await.map_err(failed(METHOD))? {
            match (response.part, &header) {
                (Some(fetch_student_response::Part::Header(first)), None) => header = Some(first),
                (Some(fetch_student_response::Part::Data(piece)), Some(_)) => file.extend_from_slice(&piece),
                _ => return Err(broken(METHOD, "the messages are not one header and then data".into())),
            }
        }
        let header = header.ok_or_else(|| broken(METHOD, "no header came".into()))?;
        let (found, announced) = (Sha256::digest(&file), &header.sha256);
        if found.as_slice() != announced.as_ref() {
            return Err(ClientError::Status {
                method: METHOD,
                status: Box::new(Status::aborted(format!(
                    "{} of {} bytes came, with SHA-256 {} instead of {}",
                    file.len(),
                    header.byte_length,
                    hex(&found),
                    hex(announced)
                ))),
            });
        }
        let checkpoint = Checkpoint::parse(file.into()).map_err(|e| broken(METHOD, e.to_string()))?;
        Ok(Some(FetchedStudent { header, checkpoint }))
    }
}

/// The batches of a stream. It ends after the first error.
pub type BatchStream = BoxStream<'static, Result<Batch, ClientError>>;

fn failed(method: &'static str) -> impl Fn(Status) -> ClientError {
    move |status| ClientError::Status { method, status: Box::new(status) }
}

/// Growing pauses between attempts: exponential, each drawn at random from its upper half (so that trainers that lost
/// the same daemon do not come back in step), never above a bound.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    longest: Duration,
    attempt: u32,
}

impl Default for Backoff {
    fn default() -> Self {
        Self::new(Duration::from_millis(100), Duration::from_secs(10))
    }
}

impl Backoff {
    /// Pauses from about `first` to at most `longest`.
    pub fn new(first: Duration, longest: Duration) -> Self {
        Self { first, longest, attempt: 0 }
    }

    /// The next pause.
    pub fn next_pause(&mut self) -> Duration {
        let full = self.first.saturating_mul(1 << self.attempt.min(20)).min(self.longest);
        self.attempt = self.attempt.saturating_add(1);
        full.mul_f64(rand::rng().random_range(0.5..=1.0))
    }

    /// After a success: the next pause is a short one again.
    pub fn reset(&mut self) {
        self.attempt = 0;
    }

    /// Waits for the next pause.
    pub async fn pause(&mut self) {
        tokio::time::sleep(self.next_pause()).await;
    }
}

/// Calls until it succeeds, fails for good ([`ClientError::is_transient`] is false), or `within` has passed; between the
/// attempts it waits as [`Backoff::default`] says. The last error is returned.
pub async fn retry<T, F, Fut>(within: Duration, mut call: F) -> Result<T, ClientError>
where
    F: FnMut() -> Fut,
    Fut: Future<Output = Result<T, ClientError>>,
{
    let deadline = tokio::time::Instant::now() + within;
    let mut backoff = Backoff::default();
    loop {
        match call().await {
            Err(error) if error.is_transient() => {
                let pause = backoff.next_pause();
                if tokio::time::Instant::now() + pause >= deadline {
                    return Err(error);
                }
                tracing::debug!("{error}; trying again in {pause:?}");
                tokio::time::sleep(pause).await;
            }
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_up_to_their_bound() {
        let mut backoff = Backoff::new(Duration::from_millis(100), Duration::from_secs(2));
        for attempt in 0..200u32 {
            let full = Duration::from_millis(100 * (1 << attempt.min(10))).min(Duration::from_secs(2));
            let pause = backoff.next_pause();
            assert!(pause >= full / 2 && pause <= full, "{attempt}: {pause:?}");
        }
        backoff.reset();
        assert!(backoff.next_pause() <= Duration::from_millis(100));
    }
}
