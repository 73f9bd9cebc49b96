//! A trainer's side of the wire: batches in, students out, both in the background and through restarts of the daemon.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use tokio::runtime::{self, Runtime};
use tokio::sync::{Mutex, mpsc, watch};
use tonic::Code;

use crate::client::{Backoff, Batch, Client, ClientError, Start, retry};
use crate::proto;

/// Batches that may wait for the training loop; what waits here was made against an older student.
const WAITING_BATCHES: usize = 1;

/// What the feed has seen so far.
#[derive(Debug, Default)]
pub struct FeedStats {
    /// Images received.
    pub images: AtomicU64,
    /// Students that became a new version.
    pub students: AtomicU64,
    /// Connections that were lost.
    pub reconnects: AtomicU64,
    /// The newest version that was pushed.
    pub version: AtomicU64,
}

/// Weights to push.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// The architecture.
    pub arch: String,
    /// A safetensors file.
    pub file: Bytes,
    /// The trainer's step.
    pub step: u64,
}

/// Where a feed begins.
#[derive(Clone, Debug)]
pub enum From {
    /// With the newest images of the log, this many.
    Newest(u64),
    /// At the image with this sequence of a log, and with `before` images before it, for a buffer that was lost. Of another log:
    /// with as many of its newest.
    Position {
        /// The log.
        log_id: String,
        /// The sequence of the first image that was not seen yet.
        sequence: u64,
        /// Images before it.
        before: u64,
    },
}

/// A connection that heals itself.
#[derive(Debug)]
pub struct Feed {
    batches: mpsc::Receiver<Result<Batch, ClientError>>,
    unseen_from: u64,
    snapshots: watch::Sender<Option<Snapshot>>,
    push_errors: mpsc::Receiver<ClientError>,
    stats: Arc<FeedStats>,
    description: proto::DescribeResponse,
    client: Client,
    /// Held during a push, so that an older student can never arrive after a newer one.
    pushing: Arc<Mutex<()>>,
    runtime: Runtime,
}

impl Feed {
    /// Connects, waiting up to `patience` for a daemon that is away or still loads its teacher, and streams what the log
    /// holds from there on and then what is made.
    pub fn connect(url: &str, patience: Duration, from: From) -> anyhow::Result<Self> {
        // One thread is enough to move bytes, and leaves the cores to training.
        let runtime = runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let (client, description) = match runtime.block_on(Client::connect_within(url, patience)) {
            Ok(connected) => connected,
            Err(error) => {
                // Not waiting for a name that is still being looked up.
                runtime.shutdown_background();
                return Err(error.into());
            }
        };
        let stats = Arc::new(FeedStats::default());
        let (batch_sender, batches) = mpsc::channel(WAITING_BATCHES);
        let (snapshots, newest) = watch::channel(None);
        let (error_sender, push_errors) = mpsc::channel(1);
        let teacher = description.teacher.as_ref().map(|teacher| teacher.sha256.clone()).unwrap_or_default();
        // A log may hold far more than a buffer; what would only be pushed out again need not come.
        let log = description.log.clone().unwrap_or_default();
        let (start, unseen_from) = match from {
            From::Newest(images) => (log.next_sequence.saturating_sub(images), 0),
            From::Position { log_id, sequence, before } if log_id == log.log_id && sequence <= log.next_sequence => {
                (sequence.saturating_sub(before), sequence)
            }
            From::Position { before, .. } => {
                tracing::warn!("the daemon's log is not the one that was read before; reading its newest images");
                (log.next_sequence.saturating_sub(before), 0)
            }
        };
        let start = Start::Sequence(start.max(log.first_sequence));
        let reading = receive(client.clone(), start, unseen_from, teacher, batch_sender, stats.clone());
        runtime.spawn(reading);
        let pushing = Arc::new(Mutex::new(()));
        let most = description.max_student_bytes;
        runtime.spawn(push(client.clone(), newest, error_sender, stats.clone(), pushing.clone(), most));
        Ok(Self { batches, unseen_from, snapshots, push_errors, stats, description, client, pushing, runtime })
    }

    /// What the daemon said of itself at the start.
    pub fn description(&self) -> &proto::DescribeResponse {
        &self.description
    }

    /// Images before this sequence are only sent to fill a buffer again. 0: there are none.
    pub fn unseen_from(&self) -> u64 {
        self.unseen_from
    }

    /// What the feed has seen so far.
    pub fn stats(&self) -> &FeedStats {
        &self.stats
    }

    /// The next batch if one is there.
    pub fn try_next(&mut self) -> Result<Option<Batch>, ClientError> {
        if let Ok(error) = self.push_errors.try_recv() {
            return Err(error);
        }
        self.batches.try_recv().ok().transpose()
    }

    /// The next batch, waiting up to `within`.
    pub fn next(&mut self, within: Duration) -> Result<Option<Batch>, ClientError> {
        if let Ok(error) = self.push_errors.try_recv() {
            return Err(error);
        }
        let batches = &mut self.batches;
        let received = self.runtime.block_on(async { tokio::time::timeout(within, batches.recv()).await });
        received.ok().flatten().transpose()
    }

    /// Pushes weights in the background. Newest wins: while one push is under way, only the last snapshot waits.
    pub fn push(&self, snapshot: Snapshot) {
        self.snapshots.send_replace(Some(snapshot));
    }

    /// Pushes weights and waits until the daemon has them, for up to `within`.
    pub fn push_and_wait(&self, snapshot: Snapshot, within: Duration) -> Result<(), ClientError> {
        let Snapshot { arch, file, step } = snapshot;
        self.snapshots.send_replace(None);
        let pushed = self.runtime.block_on(async {
            let _turn = self.pushing.lock().await;
            retry(within, || self.client.push_student(&arch, file.clone(), step, None)).await
        })?;
        if !pushed.already_current {
            self.stats.students.fetch_add(1, Ordering::Relaxed);
        }
        self.stats.version.store(pushed.version, Ordering::Relaxed);
        Ok(())
    }

    /// The newest student that the daemon holds.
    pub fn fetch_student(&self, within: Duration) -> Result<Option<crate::client::FetchedStudent>, ClientError> {
        self.runtime.block_on(retry(within, || self.client.fetch_student(0)))
    }

    /// What the daemon says of itself now.
    pub fn describe(&self) -> Result<proto::DescribeResponse, ClientError> {
        self.runtime.block_on(self.client.describe())
    }
}

async fn receive(
    client: Client,
    mut start: Start,
    unseen_from: u64,
    teacher: String,
    batches: mpsc::Sender<Result<Batch, ClientError>>,
    stats: Arc<FeedStats>,
) {
    let mut backoff = Backoff::default();
    loop {
        let stream = client.stream(start.clone()).await;
        let connected = stream.is_ok();
        let error = match stream {
            Err(error) => error,
            Ok(mut stream) => loop {
                match stream.next().await {
                    Some(Ok(batch)) => {
                        backoff.reset();
                        start = Start::Cursor(batch.cursor.clone());
                        let from = batch.payload.metadata().get("teacher_sha256");
                        if from.is_some_and(|from| *from != teacher) {
                            let problem =
                                "its images come from another teacher than at the start of this training".to_owned();
                            let _ = batches.send(Err(ClientError::Contract { method: "Stream", problem })).await;
                            return;
                        }
                        let seen = unseen_from.saturating_sub(batch.first_sequence).min(batch.count as u64);
                        stats.images.fetch_add(batch.count as u64 - seen, Ordering::Relaxed);
                        if batches.send(Ok(batch)).await.is_err() {
                            return;
                        }
                    }
                    Some(Err(error)) => break error,
                    None => {
                        let problem = "the stream ended without a status".to_owned();
                        break ClientError::Contract { method: "Stream", problem };
                    }
                }
            },
        };
        if error.code() == Some(Code::OutOfRange) {
            // Another log, or retention was faster: go on with the oldest that is there.
            tracing::warn!("{error}; going on from the oldest image");
            start = error.next_sequence().map_or(Start::Earliest, Start::Sequence);
        } else if let (Some(Code::DataLoss), Some(next)) = (error.code(), error.next_sequence()) {
            tracing::warn!("{error}; going on behind the damage");
            start = Start::Sequence(next);
        } else if !error.is_transient() && error.code() != Some(Code::ResourceExhausted) {
            let _ = batches.send(Err(error)).await;
            return;
        } else {
            // The old connection's place may still be taken for a while: then the daemon asks for patience.
            stats.reconnects.fetch_add(u64::from(connected), Ordering::Relaxed);
            tracing::warn!("{error}; reconnecting");
        }
        tokio::select! {
            () = backoff.pause() => {}
            () = batches.closed() => return,
        }
    }
}

async fn push(
    client: Client,
    mut newest: watch::Receiver<Option<Snapshot>>,
    errors: mpsc::Sender<ClientError>,
    stats: Arc<FeedStats>,
    pushing: Arc<Mutex<()>>,
    max_student_bytes: u64,
) {
    let mut backoff = Backoff::default();
    while newest.changed().await.is_ok() {
        loop {
            let Some(Snapshot { arch, file, step }) = newest.borrow_and_update().clone() else { break };
            let fits = file.len() as u64 <= max_student_bytes;
            let pushed = {
                let _turn = pushing.lock().await;
                client.push_student(&arch, file, step, None).await
            };
            match pushed {
                Ok(pushed) => {
                    backoff.reset();
                    if !pushed.already_current {
                        stats.students.fetch_add(1, Ordering::Relaxed);
                    }
                    stats.version.store(pushed.version, Ordering::Relaxed);
                    tracing::debug!(version = pushed.version, step, "pushed the student");
                    break;
                }
                Err(error) if error.is_transient() || fits && error.code() == Some(Code::ResourceExhausted) => {
                    tracing::warn!("{error}; pushing again");
                    backoff.pause().await;
                }
                Err(error) => {
                    // Every later push would be refused too, and images would silently stop being adaptive.
                    let _ = errors.send(error).await;
                    return;
                }
            }
        }
    }
}
