//! What clients may cost: every limit is hit here, from outside, and whoever keeps to them is served meanwhile.

use std::fs::File;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::pin::Pin;
use std::process::{Command, Stdio};

use bytes::Bytes;
use dreamfeed::client::Start;
use dreamfeed::proto::dreamfeed_service_client::DreamfeedServiceClient;
use dreamfeed::proto::push_student_request::Part;
use dreamfeed::proto::{DescribeRequest, DescribeResponse, PixelFormat, PushStudentRequest, Replay, StreamRequest};
use futures_util::stream::{self, Stream, StreamExt};
use http::uri::PathAndQuery;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_prost::ProstCodec;

use crate::support::{ARCH, Daemon, LONG, assert_consecutive, student, take, wait_for, within};

const DESCRIBE: &str = "/dreamfeed.v1.DreamfeedService/Describe";
const PUSH: &str = "/dreamfeed.v1.DreamfeedService/PushStudent";

async fn channel(daemon: &Daemon) -> Channel {
    Channel::from_shared(format!("http://{}", daemon.grpc)).unwrap().connect().await.unwrap()
}

type Messages = Pin<Box<dyn Stream<Item = PushStudentRequest> + Send>>;

/// A call of any method whose request is these messages, whatever the method takes.
async fn call(channel: Channel, path: &'static str, messages: Messages) -> Result<(), Status> {
    let mut client = tonic::client::Grpc::new(channel);
    client.ready().await.unwrap();
    let codec = ProstCodec::<PushStudentRequest, DescribeResponse>::default();
    let path = PathAndQuery::from_static(path);
    client.client_streaming(Request::new(messages), path, codec).await.map(drop)
}

/// A request that never comes.
fn nothing() -> Messages {
    Box::pin(stream::pending())
}

fn large(bytes: usize) -> Messages {
    let part = Some(Part::Data(Bytes::from(vec![7u8; bytes])));
    Box::pin(stream::iter([PushStudentRequest { part }]))
}

fn metric(daemon: &Daemon, series: &str) -> f64 {
    daemon.metric(series).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_as_large_as_its_method_takes() {
    let daemon = Daemon::start(&["--max-images", "64"]);
    let channel = channel(&daemon).await;
    let paths = [
        DESCRIBE,
        "/dreamfeed.v1.DreamfeedService/Stream",
        "/dreamfeed.v1.DreamfeedService/FetchStudent",
        "/dreamfeed.v1.DreamfeedService/SetSynthesizer",
        "/grpc.health.v1.Health/Check",
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    ];
    for path in paths {
        for bytes in [70 << 10, 12 << 20] {
            let status = within(call(channel.clone(), path, large(bytes))).await.unwrap_err();
            // Reflection's library ends the call without the status that its request ended with.
            if path.contains("reflection") {
                continue;
            }
            assert_eq!(status.code(), Code::ResourceExhausted, "{path} {bytes}: {status:?}");
            assert!(status.message().contains("more than 65536 bytes"), "{path} {bytes}: {status:?}");
        }
    }
    assert!(metric(&daemon, "dreamfeed_requests_refused_total{reason=\"size\"}") >= 12.0);
    // The largest that a request of the contract can sensibly be still passes: every class by name.
    let request = StreamRequest { classes: (0..10).cycle().take(40_000).collect(), ..StreamRequest::default() };
    within(DreamfeedServiceClient::new(channel).stream(request)).await.unwrap();
    wait_for("the room of requests", || metric(&daemon, "dreamfeed_request_bytes") == 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_do_not_end_have_so_much_room_and_no_more() {
    let daemon = Daemon::start(&[
        "--max-images",
        "64",
        "--max-pushes",
        "1",
        "--max-request-bytes",
        "32MiB",
        "--call-timeout",
        "10min",
    ]);
    let mut calls = Vec::new();
    // 64 KiB each, over several connections.
    for _ in 0..4 {
        let channel = channel(&daemon).await;
        calls.extend((0..128).map(|_| tokio::spawn(call(channel.clone(), DESCRIBE, nothing()))));
    }
    wait_for("the room to be used up", || metric(&daemon, "dreamfeed_request_bytes") == f64::from(32 << 20));
    assert_eq!(daemon.metric("dreamfeed_request_capacity_bytes"), Some(f64::from(32 << 20)));
    let mut client = DreamfeedServiceClient::new(channel(&daemon).await);
    let status = within(client.describe(DescribeRequest {})).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.message().contains("limits.request_bytes"), "{status:?}");
    assert_eq!(daemon.get("/livez").0, 200);
    assert_eq!(metric(&daemon, "dreamfeed_requests_refused_total{reason=\"room\"}"), 1.0);
    for call in &calls {
        call.abort();
    }
    wait_for("the room of requests", || metric(&daemon, "dreamfeed_request_bytes") == 0.0);
    within(client.describe(DescribeRequest {})).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_is_not_complete_in_time_is_ended() {
    let daemon = Daemon::start(&["--max-images", "64", "--call-timeout", "300ms", "--push-idle-timeout", "10min"]);
    let channel = channel(&daemon).await;
    let push = tokio::spawn(call(channel.clone(), PUSH, nothing()));
    for path in [DESCRIBE, "/dreamfeed.v1.DreamfeedService/Stream", "/grpc.health.v1.Health/Check"] {
        let status = within(call(channel.clone(), path, nothing())).await.unwrap_err();
        assert_eq!(status.code(), Code::DeadlineExceeded, "{path}: {status:?}");
        assert!(status.message().contains("limits.call_timeout"), "{path}: {status:?}");
    }
    assert_eq!(metric(&daemon, "dreamfeed_requests_refused_total{reason=\"late\"}"), 3.0);
    // A push has time-outs of its own, and an open stream none.
    assert!(!push.is_finished());
    let mut stream = daemon.client().await.stream(Start::Earliest).await.unwrap();
    assert_consecutive(&take(&mut stream, 64).await, 0);
    let idle = tokio::time::timeout(std::time::Duration::from_millis(900), stream.next()).await;
    assert!(idle.is_err(), "the stream ended");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_push_has_its_slot_before_its_first_byte() {
    let daemon = Daemon::start(&["--max-images", "64", "--max-pushes", "1"]);
    let push = tokio::spawn(call(channel(&daemon).await, PUSH, nothing()));
    wait_for("the push", || metric(&daemon, "dreamfeed_pushes_under_way") == 1.0);
    let client = daemon.client().await;
    let refused = within(client.push_student(ARCH, student(1), 1, None)).await.unwrap_err();
    assert_eq!(refused.code(), Some(Code::ResourceExhausted), "{refused}");
    push.abort();
    wait_for("the slot", || metric(&daemon, "dreamfeed_pushes_under_way") == 0.0);
    within(client.push_student(ARCH, student(1), 1, None)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_has_so_many_streams() {
    let daemon = Daemon::start(&["--max-images", "64", "--max-streams-per-connection", "3"]);
    let channel = channel(&daemon).await;
    let mut streams = Vec::new();
    for _ in 0..3 {
        let mut client = DreamfeedServiceClient::new(channel.clone());
        streams.push(within(client.stream(StreamRequest::default())).await.unwrap());
    }
    // The client's transport keeps the fourth call back until a place is free.
    let mut client = DreamfeedServiceClient::new(channel);
    let mut fourth = Box::pin(client.describe(DescribeRequest {}));
    assert!(tokio::time::timeout(std::time::Duration::from_millis(300), &mut fourth).await.is_err());
    within(daemon.client().await.describe()).await.unwrap();
    wait_for("three calls", || metric(&daemon, "dreamfeed_calls_under_way") == 3.0);
    streams.pop();
    within(fourth).await.unwrap();
    drop(streams);
    wait_for("no call", || metric(&daemon, "dreamfeed_calls_under_way") == 0.0);
}

/// A connection that says this and no more.
fn silent(address: &str, says: &[u8]) -> TcpStream {
    let mut socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(LONG)).unwrap();
    socket.write_all(says).unwrap();
    socket
}

/// Waits until the other side closes it.
fn is_closed(socket: &mut TcpStream) -> bool {
    let mut buffer = [0; 1024];
    loop {
        match socket.read(&mut buffer) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_counted_and_one_too_many_is_closed() {
    let arguments = ["--max-images", "64", "--max-connections", "3", "--max-admin-connections", "2"];
    let daemon = Daemon::start(&[&arguments[..], &["--header-timeout", "10min"]].concat());
    let refused = |port: &str| {
        metric(&daemon, &format!("dreamfeed_connections_refused_total{{port=\"{port}\",reason=\"limit\"}}"))
    };
    // Connections in use keep their places.
    let mut clients = Vec::new();
    for _ in 0..3 {
        clients.push(channel(&daemon).await);
        let mut client = DreamfeedServiceClient::new(clients.last().unwrap().clone());
        within(client.describe(DescribeRequest {})).await.unwrap();
    }
    assert_eq!(metric(&daemon, "dreamfeed_connections{port=\"grpc\"}"), 3.0);
    assert_eq!(daemon.metric("dreamfeed_connections_capacity{port=\"grpc\"}"), Some(3.0));
    assert!(is_closed(&mut silent(&daemon.grpc, b"")));
    assert_eq!(refused("grpc"), 1.0);
    // Those that ask for nothing give theirs to whoever comes: the longest silent one first.
    clients.truncate(1);
    wait_for("places", || metric(&daemon, "dreamfeed_connections{port=\"grpc\"}") == 1.0);
    let mut held: Vec<TcpStream> = (0..2).map(|_| silent(&daemon.grpc, PREFACE)).collect();
    wait_for("connections", || metric(&daemon, "dreamfeed_connections{port=\"grpc\"}") == 3.0);
    within(daemon.client().await.describe()).await.unwrap();
    assert!(is_closed(&mut held[0]));
    within(DreamfeedServiceClient::new(clients[0].clone()).describe(DescribeRequest {})).await.unwrap();
    // The other port's places are its own.
    let mut idle: Vec<TcpStream> = (0..50).map(|_| silent(&daemon.admin, b"GET /livez HT")).collect();
    assert_eq!(daemon.get("/livez").0, 200);
    assert!(is_closed(&mut idle[0]));
    assert!(refused("admin") >= 48.0);
    within(daemon.client().await.describe()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_asks_for_nothing_is_closed_on_both_ports() {
    let daemon = Daemon::start(&["--max-images", "64", "--header-timeout", "500ms"]);
    let mut stream = daemon.client().await.stream(Start::Earliest).await.unwrap();
    assert_consecutive(&take(&mut stream, 64).await, 0);
    // The header of a request that does not end: HEADERS without END_HEADERS.
    let unfinished = [PREFACE, b"\0\0\x01\x01\0\0\0\0\x01\x83"].concat();
    // Answers that nobody takes: many pings, and many requests in a row.
    let pings = [PREFACE, &b"\0\0\x08\x06\0\0\0\0\0ABCDEFGH".repeat(500_000)].concat();
    let requests = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n".repeat(20_000);
    for (address, says) in [(&daemon.grpc, pings), (&daemon.admin, requests)] {
        let mut socket = TcpStream::connect(address).unwrap();
        // It fails once the daemon has closed the connection.
        let written = socket.write_all(&says);
        assert!(written.is_err() || is_closed(&mut socket), "{address}");
    }
    for says in [b"".as_slice(), &PREFACE[..10], PREFACE, &unfinished] {
        assert!(is_closed(&mut silent(&daemon.grpc, says)), "{says:?}");
    }
    for says in ["", "GET /livez HTTP/1.1\r\nHost:", "GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"] {
        assert!(is_closed(&mut silent(&daemon.admin, says.as_bytes())), "{says:?}");
    }
    // What trickles in puts off nothing.
    let mut slow = silent(&daemon.admin, b"GET / HTTP/1.1\r\n");
    wait_for("the end of a slow request", || {
        slow.write_all(b"x").is_err() || {
            std::thread::sleep(std::time::Duration::from_millis(20));
            false
        }
    });
    let silent = |port: &str| {
        metric(&daemon, &format!("dreamfeed_connections_refused_total{{port=\"{port}\",reason=\"silent\"}}"))
    };
    assert!(silent("grpc") >= 4.0 && silent("admin") >= 3.0);
    // Whoever asked for something once stays.
    let idle = tokio::time::timeout(std::time::Duration::from_millis(1200), stream.next()).await;
    assert!(idle.is_err(), "the stream ended");
}

/// The daemon with a limit on open files, as systemd and containers often set one.
fn start_with_descriptors(most: u32, arguments: &[&str]) -> Daemon {
    let folder = tempfile::tempdir().unwrap();
    let log = File::create(folder.path().join("daemon.log")).unwrap();
    let daemon = Daemon::launch_with(folder, arguments, |command| {
        let mut limited = Command::new("sh");
        limited.args(["-c", &format!("ulimit -n {most} && exec \"$0\" \"$@\"")]);
        limited.arg(command.get_program()).args(command.get_args()).stdout(Stdio::null()).stderr(log);
        *command = limited;
    });
    daemon.wait_ready();
    daemon
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_take_no_descriptor_from_the_storage_or_the_admin_port() {
    let daemon = start_with_descriptors(256, &["--batch-size", "8", "--log-max-images", "64"]);
    let mut held = Vec::new();
    for _ in 0..300 {
        held.push(silent(&daemon.grpc, PREFACE));
    }
    wait_for("connections", || {
        metric(&daemon, "dreamfeed_connections_refused_total{port=\"grpc\",reason=\"limit\"}") > 200.0
    });
    assert_eq!(daemon.get("/livez").0, 200);
    let next = metric(&daemon, "dreamfeed_log_next_sequence");
    wait_for("images", || metric(&daemon, "dreamfeed_log_next_sequence") > next + 80.0);
    assert_eq!(metric(&daemon, "dreamfeed_connections_refused_total{port=\"grpc\",reason=\"descriptors\"}"), 0.0);
    drop(held);
    wait_for("places", || metric(&daemon, "dreamfeed_connections{port=\"grpc\"}") == 0.0);
    within(daemon.client().await.push_student(ARCH, student(1), 1, None)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_without_descriptors_accepts_again_when_it_has_some() {
    let daemon = Daemon::start(&["--batch-size", "8", "--max-images", "64"]);
    daemon.wait_metric("dreamfeed_log_next_sequence", 64.0);
    let set = |soft: &str| {
        let status = Command::new("prlimit")
            .args(["--pid", &daemon.child.id().to_string(), &format!("--nofile={soft}:")])
            .status()
            .unwrap();
        assert!(status.success());
    };
    // Below the first number that could be free.
    set("3");
    // Known to the kernel, and not yet to the daemon.
    let waiting = silent(&daemon.grpc, PREFACE);
    wait_for("the warning", || daemon.log().contains("no connection can be accepted for now"));
    set("1024");
    wait_for("an answer", || daemon.get("/livez").0 == 200);
    assert!(metric(&daemon, "dreamfeed_connections_refused_total{port=\"grpc\",reason=\"descriptors\"}") >= 1.0);
    drop(waiting);
    assert_consecutive(&take(&mut daemon.client().await.stream(Start::Earliest).await.unwrap(), 64).await, 0);
}

/// Readers that take nothing, each with a large message on its way, hold no more than the setting; others are served.
#[tokio::test(flavor = "multi_thread")]
async fn messages_on_their_way_have_so_much_room_and_no_more() {
    let arguments = ["--batch-size", "8", "--max-images", "64", "--max-message-bytes", "8MiB"];
    let daemon = Daemon::start(&arguments);
    daemon.wait_metric("dreamfeed_log_next_sequence", 64.0);
    let request = StreamRequest {
        // About 1 MiB a message.
        batch_size: 3000,
        pixel_format: PixelFormat::F32Normalized.into(),
        replay: Some(Replay { share: 1.0, ..Replay::default() }),
        ..StreamRequest::default()
    };
    let mut streams = Vec::new();
    for _ in 0..20 {
        let mut client = DreamfeedServiceClient::new(channel(&daemon).await).max_decoding_message_size(64 << 20);
        streams.push(within(client.stream(request.clone())).await.unwrap().into_inner());
    }
    let held = || metric(&daemon, "dreamfeed_message_bytes");
    wait_for("messages", || held() > f64::from(5 << 20));
    for _ in 0..20 {
        assert!(held() <= f64::from(8 << 20), "{}", held());
        let read = take(&mut daemon.client().await.stream(Start::Earliest).await.unwrap(), 64).await;
        assert_consecutive(&read, 0);
    }
    // Whoever reads makes room for the next.
    let reads = streams.into_iter().map(|mut stream| async move { stream.message().await.unwrap().unwrap().count });
    assert_eq!(within(futures_util::future::join_all(reads)).await, [3000; 20]);
    assert_eq!(daemon.metric("dreamfeed_message_capacity_bytes"), Some(f64::from(8 << 20)));
    wait_for("room", || held() == 0.0);
}
