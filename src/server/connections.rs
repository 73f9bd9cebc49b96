//! Connections on both ports: a bounded number at one time, and none that is held without asking for anything. Where all
//! places are taken, a new connection gets the place of the one that has been silent for longest.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::stream::{self, Stream};
use metrics::{counter, gauge};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};
use tokio_util::sync::{CancellationToken, WaitForCancellationFutureOwned};
use tonic::transport::server::Connected;

use crate::telemetry;

/// How long nothing is accepted once the process has no descriptor left.
const PAUSE: Duration = Duration::from_millis(100);
/// How long the place of a silent connection is waited for.
const VACATING: Duration = Duration::from_secs(1);

/// Which port it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Port {
    /// HTTP/2, whose connections serve many calls and live long.
    Grpc,
    /// HTTP/1, one request after the other.
    Admin,
}

impl Port {
    /// The value of the metrics' label.
    pub fn name(self) -> &'static str {
        match self {
            Self::Grpc => "grpc",
            Self::Admin => "admin",
        }
    }
}

/// Whether a request came over a connection; in the extensions of each.
#[derive(Clone, Debug, Default)]
pub(super) struct Greeting(Arc<AtomicBool>);

impl Greeting {
    /// One came.
    pub fn came(&self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Connections that have not asked for anything yet, or not since their last answer; the longest silent first.
#[derive(Debug, Default)]
struct Silent {
    next: u64,
    tokens: BTreeMap<u64, CancellationToken>,
}

fn lock(silent: &Mutex<Silent>) -> MutexGuard<'_, Silent> {
    silent.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Silent {
    fn add(&mut self, token: CancellationToken) -> u64 {
        self.next += 1;
        self.tokens.insert(self.next, token);
        self.next
    }
}

/// A port that takes connections.
#[derive(Debug)]
pub(super) struct Connections {
    listener: TcpListener,
    port: Port,
    places: Arc<Semaphore>,
    silent: Arc<Mutex<Silent>>,
    header_timeout: Duration,
}

impl Connections {
    /// At most `most` at one time; each must bring the header of a request within `header_timeout`.
    pub fn new(
        listener: std::net::TcpListener,
        port: Port,
        most: usize,
        header_timeout: Duration,
    ) -> io::Result<Self> {
        let listener = TcpListener::from_std(listener)?;
        gauge!(telemetry::CONNECTIONS, "port" => port.name()).set(0.0);
        gauge!(telemetry::CONNECTIONS_CAPACITY, "port" => port.name()).set(most as f64);
        for reason in ["limit", "descriptors", "silent"] {
            counter!(telemetry::CONNECTIONS_REFUSED, "port" => port.name(), "reason" => reason).increment(0);
        }
        Ok(Self { listener, port, places: Arc::new(Semaphore::new(most)), silent: Arc::default(), header_timeout })
    }

    fn refused(&self, reason: &'static str) {
        counter!(telemetry::CONNECTIONS_REFUSED, "port" => self.port.name(), "reason" => reason).increment(1);
    }

    /// A place for one more; None where all are taken by connections that are in use.
    async fn place(&self) -> Option<OwnedSemaphorePermit> {
        if let Ok(place) = self.places.clone().try_acquire_owned() {
            return Some(place);
        }
        let (_, longest) = lock(&self.silent).tokens.pop_first()?;
        longest.cancel();
        tokio::time::timeout(VACATING, self.places.clone().acquire_owned()).await.ok()?.ok()
    }

    /// The next one that there is a place for; one beyond is closed at once, so that its client tries elsewhere.
    async fn next(&mut self) -> Connection {
        let mut told = false;
        loop {
            match self.listener.accept().await {
                Ok((io, _)) => match self.place().await {
                    Some(place) => {
                        // Without it a small message waits for the acknowledgement of the one before.
                        let _ = io.set_nodelay(true);
                        return Connection::new(io, self, place);
                    }
                    None => self.refused("limit"),
                },
                // The client's own business.
                Err(error) if is_of_one_connection(&error) => {}
                Err(error) => {
                    self.refused("descriptors");
                    if !std::mem::replace(&mut told, true) {
                        tracing::warn!(port = self.port.name(), %error, "no connection can be accepted for now");
                    }
                    tokio::time::sleep(PAUSE).await;
                }
            }
        }
    }

    /// Connections as they come, for ever.
    pub fn incoming(self) -> impl Stream<Item = io::Result<Connection>> {
        stream::unfold(self, |mut this| async move { Some((Ok(this.next().await), this)) })
    }
}

fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset)
}

impl axum::serve::Listener for Connections {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        let connection = self.next().await;
        let peer = connection.io.peer_addr().unwrap_or_else(|_| SocketAddr::from(([0, 0, 0, 0], 0)));
        (connection, peer)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// One connection. Reading from it fails once the header of a request has been waited for too long.
#[derive(Debug)]
pub(super) struct Connection {
    io: TcpStream,
    port: Port,
    header_timeout: Duration,
    greeting: Greeting,
    /// Until when a request must have come; None once one did.
    patience: Option<Patience>,
    silent: Arc<Mutex<Silent>>,
    _place: OwnedSemaphorePermit,
}

/// How long a silent connection stays.
#[derive(Debug)]
struct Patience {
    time: Pin<Box<Sleep>>,
    /// Its place among the silent ones, and the end that comes when another needs its place.
    id: u64,
    vacated: Pin<Box<WaitForCancellationFutureOwned>>,
}

impl Patience {
    fn begin(silent: &Mutex<Silent>, time: Duration) -> Self {
        let token = CancellationToken::new();
        let id = lock(silent).add(token.clone());
        Self { time: Box::pin(tokio::time::sleep(time)), id, vacated: Box::pin(token.cancelled_owned()) }
    }

    /// The same patience from its beginning; whoever waits for its end waits on.
    fn begin_again(&mut self, silent: &Mutex<Silent>, time: Duration) {
        self.time.as_mut().reset(Instant::now() + time);
        let mut silent = lock(silent);
        if let Some(token) = silent.tokens.remove(&self.id) {
            self.id = silent.add(token);
        }
    }

    /// Why it has come to an end.
    fn poll_end(&mut self, task: &mut Context<'_>) -> Poll<&'static str> {
        if self.time.as_mut().poll(task).is_ready() {
            return Poll::Ready("silent");
        }
        self.vacated.as_mut().poll(task).map(|()| "limit")
    }
}

impl Connection {
    fn new(io: TcpStream, of: &Connections, place: OwnedSemaphorePermit) -> Self {
        let (port, header_timeout, silent) = (of.port, of.header_timeout, of.silent.clone());
        gauge!(telemetry::CONNECTIONS, "port" => port.name()).increment(1.0);
        let patience = Some(Patience::begin(&silent, header_timeout));
        Self { io, port, header_timeout, greeting: Greeting::default(), patience, silent, _place: place }
    }

    /// It is not silent any more.
    fn end_patience(&mut self) {
        if let Some(patience) = self.patience.take() {
            lock(&self.silent).tokens.remove(&patience.id);
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.end_patience();
        gauge!(telemetry::CONNECTIONS, "port" => self.port.name()).decrement(1.0);
    }
}

impl Connected for Connection {
    type ConnectInfo = Greeting;

    fn connect_info(&self) -> Greeting {
        self.greeting.clone()
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, task: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.greeting.0.load(Ordering::Relaxed) {
            self.end_patience();
        }
        // Asked first: what trickles in does not put off the end.
        self.poll_patience(task)?;
        Pin::new(&mut self.io).poll_read(task, buffer)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, task: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_patience(task)?;
        let written = Pin::new(&mut self.io).poll_write(task, bytes);
        self.answered(&written);
        written
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        task: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_patience(task)?;
        let written = Pin::new(&mut self.io).poll_write_vectored(task, pieces);
        self.answered(&written);
        written
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(task)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, task: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(task)
    }
}

impl Connection {
    /// An error once the connection has been silent for too long, also where it is not read because the other side takes no
    /// answer.
    fn poll_patience(&mut self, task: &mut Context<'_>) -> io::Result<()> {
        if let Some(patience) = &mut self.patience
            && let Poll::Ready(reason) = patience.poll_end(task)
        {
            counter!(telemetry::CONNECTIONS_REFUSED, "port" => self.port.name(), "reason" => reason).increment(1);
            return Err(io::ErrorKind::TimedOut.into());
        }
        Ok(())
    }

    /// Over HTTP/1 an answer is followed by the wait for the next request.
    fn answered(&mut self, written: &Poll<io::Result<usize>>) {
        if let (Port::Admin, Poll::Ready(Ok(_))) = (self.port, written) {
            let (silent, header_timeout) = (self.silent.clone(), self.header_timeout);
            if let Some(patience) = &mut self.patience {
                patience.begin_again(&silent, header_timeout);
            }
        }
    }
}
