//! `dreamfeed bench load`: many subscribers at one time, as they are in other processes.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context;
use tokio::task::JoinSet;

use super::quantile;
use crate::client::{Client, Start};
use crate::proto::{Replay, StreamRequest};

#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The server's address.
    #[arg(long, value_name = "URL", default_value = "http://127.0.0.1:7461")]
    connect: String,
    /// Streams open at one time.
    #[arg(long, default_value_t = 1)]
    streams: usize,
    /// Connections that they share, at most one a stream.
    #[arg(long, default_value_t = 100)]
    connections: usize,
    /// What each asks for.
    #[arg(long, value_enum, default_value = "log")]
    mode: Mode,
    /// How long to count.
    #[arg(long, default_value = "5s", value_parser = humantime::parse_duration)]
    duration: Duration,
    /// How long to read before the counting begins: the first messages meet memory that was never touched.
    #[arg(long, default_value = "2s", value_parser = humantime::parse_duration)]
    warmup: Duration,
    /// The server's process, to report its CPU time during the counting.
    #[arg(long, value_name = "PID")]
    server_pid: Option<u32>,
    /// The daemon's store, a folder: with --mode live, gives the time when a chunk became durable.
    #[arg(long, value_name = "FOLDER")]
    store: Option<PathBuf>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Mode {
    /// The whole log, again and again.
    Log,
    /// What is made from now on.
    Live,
    /// Replayed batches of 256 only.
    Replay,
}

#[derive(Debug, Default)]
struct Counts {
    counting: AtomicBool,
    bytes: AtomicU64,
    messages: AtomicU64,
}

/// Opens the streams, counts, and prints.
pub(super) fn run(args: &Args) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(measure(args))
}

async fn measure(args: &Args) -> anyhow::Result<()> {
    let counts = Arc::new(Counts::default());
    let mut clients = Vec::new();
    for _ in 0..args.connections.clamp(1, args.streams.max(1)) {
        clients.push(Client::connect(&args.connect).await?);
    }
    let mut readers = JoinSet::new();
    for (_, client) in (0..args.streams).zip(clients.iter().cycle()) {
        readers.spawn(read(client.clone(), args.mode, args.store.clone(), counts.clone()));
    }
    tokio::time::sleep(args.warmup).await;
    let cpu_before = args.server_pid.and_then(cpu_seconds);
    counts.counting.store(true, Ordering::Relaxed);
    let began = Instant::now();
    tokio::select! {
        () = tokio::time::sleep(args.duration) => {}
        ended = readers.join_next() => {
            ended.context("no stream was opened")??.context("a stream ended")?;
        }
    }
    counts.counting.store(false, Ordering::Relaxed);
    let seconds = began.elapsed().as_secs_f64();
    let cpu = args.server_pid.and_then(cpu_seconds).zip(cpu_before).map(|(after, before)| after - before);
    let (bytes, messages) = (counts.bytes.load(Ordering::Relaxed), counts.messages.load(Ordering::Relaxed));
    // Readers give their latencies when they see that the counting is over.
    let mut latencies = Vec::new();
    if args.mode == Mode::Live {
        while let Ok(Some(reader)) = tokio::time::timeout(Duration::from_secs(5), readers.join_next()).await {
            latencies.extend(reader??);
        }
        latencies.sort_by(f64::total_cmp);
    }
    let copied = copy_speed();
    let (p50, p99) = (1e3 * quantile(&latencies, 0.5), 1e3 * quantile(&latencies, 0.99));
    let speed = bytes as f64 / seconds;
    if args.json {
        let report = serde_json::json!({
            "streams": args.streams, "seconds": seconds, "bytes": bytes, "messages": messages,
            "bytes_per_second": speed, "p50_milliseconds": p50, "p99_milliseconds": p99,
            "latencies": latencies.len(), "server_cpu_seconds": cpu, "copy_bytes_per_second": copied,
        });
        say!("{report}");
    } else {
        say!("{} streams: {:.2} GB/s in {messages} messages", args.streams, speed / 1e9);
        if args.mode == Mode::Live {
            say!("from durable to received: p50 {p50:.1} ms, p99 {p99:.1} ms of {} messages", latencies.len());
        }
        say!("plain memory copy, one thread: {:.2} GB/s", copied / 1e9);
    }
    Ok(())
}

/// One subscriber; ends after the counting, with the latencies that it saw.
async fn read(client: Client, mode: Mode, store: Option<PathBuf>, counts: Arc<Counts>) -> anyhow::Result<Vec<f64>> {
    let start = if mode == Mode::Log { Start::Earliest } else { Start::Latest };
    let replay = (mode == Mode::Replay).then_some(Replay { share: 1.0, sampling: 0 });
    let batch_size = if mode == Mode::Replay { 256 } else { 0 };
    let request = StreamRequest { start: Some(start.into()), replay, batch_size, ..Default::default() };
    let mut latencies = Vec::new();
    let mut seen = false;
    loop {
        let mut messages = client.service().stream(request.clone()).await?.into_inner();
        while let Some(message) = messages.message().await? {
            let counting = counts.counting.load(Ordering::Relaxed);
            if counting {
                seen = true;
                counts.bytes.fetch_add(message.payload.len() as u64, Ordering::Relaxed);
                counts.messages.fetch_add(1, Ordering::Relaxed);
                if let (Mode::Live, Some(store)) = (mode, &store) {
                    latencies.extend(age_of_chunk(store, message.first_sequence));
                }
            } else if seen {
                return Ok(latencies);
            }
            if mode == Mode::Log && message.lag == 0 && message.fresh_count > 0 {
                break;
            }
        }
    }
}

/// Seconds since the chunk's file got its name, which is after its bytes were synced.
fn age_of_chunk(store: &Path, first_sequence: u64) -> Option<f64> {
    use std::os::unix::fs::MetadataExt;
    let file = store.join(format!("log/chunks/{first_sequence:020}.safetensors"));
    let meta = std::fs::metadata(file).ok()?;
    let named = Duration::new(u64::try_from(meta.ctime()).ok()?, u32::try_from(meta.ctime_nsec()).ok()?);
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).ok()?;
    Some(now.saturating_sub(named).as_secs_f64())
}

/// The CPU time that a process has used, in seconds.
fn cpu_seconds(pid: u32) -> Option<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in parentheses may hold anything; utime and stime are the 12th and 13th field after it.
    let (_, rest) = stat.rsplit_once(')')?;
    let ticks: Vec<u64> = rest.split_whitespace().skip(11).take(2).filter_map(|field| field.parse().ok()).collect();
    Some(ticks.iter().sum::<u64>() as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// Bytes a second that one thread copies in pieces of the size of a chunk.
fn copy_speed() -> f64 {
    const PIECE: usize = 1 << 20;
    let source = vec![7u8; 64 * PIECE];
    let mut target = vec![0u8; 64 * PIECE];
    let began = Instant::now();
    let mut copied = 0;
    while began.elapsed() < Duration::from_millis(300) {
        for (to, from) in target.chunks_mut(PIECE).zip(source.chunks(PIECE)) {
            to.copy_from_slice(std::hint::black_box(from));
            copied += from.len();
        }
        std::hint::black_box(&target);
    }
    copied as f64 / began.elapsed().as_secs_f64()
}
