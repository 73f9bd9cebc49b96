//! A real server of the S3 protocol on loopback (moto's, from `.venv`), and a proxy that makes it fail.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

/// The server; one for a whole test binary, a bucket for each that asks.
pub struct S3 {
    pub address: String,
    buckets: AtomicU64,
    _process: Mutex<Child>,
}

impl S3 {
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<S3> = OnceLock::new();
        SHARED.get_or_init(Self::start)
    }

    fn start() -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        // It ends when its stdin does, so that it does not outlive the tests.
        let mut child = Command::new(root.join(".venv/bin/python"))
            .arg(root.join("tests/it/support/s3_server.py"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect(".venv/bin/python runs (make setup)");
        let mut port = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut port).unwrap();
        assert!(!port.is_empty(), "moto's server does not start; make setup installs it");
        let address = format!("127.0.0.1:{}", port.trim());
        Self { address, buckets: AtomicU64::new(0), _process: Mutex::new(child) }
    }

    /// A new bucket's name.
    pub fn bucket(&self) -> String {
        let name = format!("bucket-{}-{}", std::process::id(), self.buckets.fetch_add(1, Ordering::SeqCst));
        let mut socket = TcpStream::connect(&self.address).unwrap();
        write!(
            socket,
            "PUT /{name} HTTP/1.1\r\nHost: {}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
            self.address
        )
        .unwrap();
        let mut answer = String::new();
        socket.read_to_string(&mut answer).unwrap();
        assert!(answer.split(' ').nth(1) == Some("200"), "{answer}");
        name
    }

    /// What a process needs in its environment to use the server at an address: this one's, or a proxy's.
    pub fn environment(address: &str) -> [(&'static str, String); 5] {
        [
            ("AWS_ENDPOINT", format!("http://{address}")),
            ("AWS_ALLOW_HTTP", "true".into()),
            ("AWS_ACCESS_KEY_ID", "test".into()),
            ("AWS_SECRET_ACCESS_KEY", "test".into()),
            ("AWS_REGION", "us-east-1".into()),
        ]
    }
}

/// What the proxy does with requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Passes them on.
    Pass,
    /// Answers each with 503.
    Refuse,
    /// Closes the connection.
    Drop,
    /// Passes each on after a while.
    Slow(Duration),
    /// Takes them, and never answers.
    Hang,
    /// Passes them on, and keeps the answer to every other put to itself.
    Forget,
    /// Passes them on without their conditions, as a server does that knows none.
    Unconditional,
}

/// Stands before a server; one request a connection.
pub struct Proxy {
    pub address: String,
    mode: Arc<Mutex<Mode>>,
    /// Answers that were kept back.
    pub forgotten: Arc<AtomicU64>,
    /// Requests that asked for a list of what lies in the log.
    pub listings: Arc<AtomicU64>,
}

/// What the proxy counts.
#[derive(Clone, Default)]
struct Counters {
    puts: Arc<AtomicU64>,
    forgotten: Arc<AtomicU64>,
    listings: Arc<AtomicU64>,
}

impl Proxy {
    pub fn before(server: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (mode, counters) = (Arc::new(Mutex::new(Mode::Pass)), Counters::default());
        let (forgotten, listings) = (counters.forgotten.clone(), counters.listings.clone());
        let (server, current) = (server.to_owned(), mode.clone());
        std::thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                let (server, current, counters) = (server.clone(), current.clone(), counters.clone());
                // Errors here are connections that a test's daemon or a test's end broke.
                std::thread::spawn(move || serve(socket, &server, &current, &counters));
            }
        });
        Self { address, mode, forgotten, listings }
    }

    pub fn set(&self, mode: Mode) {
        *self.mode.lock().unwrap() = mode;
    }
}

fn serve(mut socket: TcpStream, server: &str, mode: &Mutex<Mode>, counters: &Counters) -> std::io::Result<()> {
    let mut reader = BufReader::new(socket.try_clone()?);
    let (mut head, mut length) = (String::new(), 0);
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Ok(());
        }
        let lower = line.to_ascii_lowercase();
        if let Some(value) = lower.strip_prefix("content-length:") {
            length = value.trim().parse().unwrap();
        }
        if line == "\r\n" {
            break;
        }
        let condition = lower.starts_with("if-none-match:") && *mode.lock().unwrap() == Mode::Unconditional;
        if !lower.starts_with("connection:") && !condition {
            head.push_str(&line);
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    // Asked when the request is there: what was sent before a fault began may still pass.
    let now = *mode.lock().unwrap();
    match now {
        Mode::Refuse => {
            let answer = "HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
            return socket.write_all(answer.as_bytes());
        }
        Mode::Drop => return Ok(()),
        Mode::Hang => {
            // Until the daemon gives up.
            let _ = reader.read(&mut [0]);
            return Ok(());
        }
        Mode::Slow(pause) => std::thread::sleep(pause),
        Mode::Pass | Mode::Forget | Mode::Unconditional => {}
    }
    if head.contains("list-type=2") && head.contains("log") {
        counters.listings.fetch_add(1, Ordering::SeqCst);
    }
    let mut upstream = TcpStream::connect(server)?;
    upstream.write_all(format!("{head}Connection: close\r\n\r\n").as_bytes())?;
    upstream.write_all(&body)?;
    let mut answer = Vec::new();
    upstream.read_to_end(&mut answer)?;
    if now == Mode::Forget
        && head.starts_with("PUT ")
        && counters.puts.fetch_add(1, Ordering::SeqCst).is_multiple_of(2)
    {
        counters.forgotten.fetch_add(1, Ordering::SeqCst);
        return Ok(());
    }
    socket.write_all(&answer)
}
