//! Starting, being supervised, and ending: configuration, ports, health, admin pages, signals.

use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use crate::support::s3::S3;
use crate::support::{Daemon, LONG, serve_command, student, within};
use dreamfeed::client::{Client, ClientError, Start, retry};
use dreamfeed::proto;
use dreamfeed::proto::dreamfeed_service_client::DreamfeedServiceClient;
use futures_util::{StreamExt, stream};
use tonic::Code;
use tonic::transport::{Channel, Endpoint};
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse, health_check_response::ServingStatus};
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_reflection::pb::v1::{ListServiceResponse, ServerReflectionRequest};

const SERVICE: &str = "dreamfeed.v1.DreamfeedService";

fn check(service: &str) -> HealthCheckRequest {
    HealthCheckRequest { service: service.into() }
}

async fn channel(daemon: &Daemon) -> Channel {
    Endpoint::from_shared(format!("http://{}", daemon.grpc)).unwrap().connect().await.unwrap()
}

/// Until health says so: it follows readiness within milliseconds, but it follows.
async fn serving(watch: &mut tonic::Streaming<HealthCheckResponse>) {
    while within(watch.message()).await.unwrap().unwrap().status() != ServingStatus::Serving {}
}

fn run_to_end(arguments: &[&str], variables: &[(&str, &str)]) -> (Output, String) {
    let folder = tempfile::tempdir().unwrap();
    let mut command = serve_command(folder.path(), arguments);
    let output = command.envs(variables.iter().copied()).stdin(Stdio::null()).output().unwrap();
    let errors = String::from_utf8(output.stderr.clone()).unwrap();
    (output, errors)
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_ends_streams_and_pushes_cleanly_and_exits_zero() {
    let mut daemon = Daemon::start(&["--batch-size", "8", "--max-images", "64"]);
    let client = daemon.client().await;
    let mut reading = client.stream(Start::Earliest).await.unwrap();
    let mut waiting = client.stream(Start::Latest).await.unwrap();
    within(reading.next()).await.unwrap().unwrap();
    let pusher = daemon.client().await;
    let push = tokio::spawn(async move { pusher.service().push_student(stream::pending()).await });
    let mut watch = HealthClient::new(channel(&daemon).await).watch(check(SERVICE)).await.unwrap().into_inner();
    serving(&mut watch).await;
    daemon.wait_metric("dreamfeed_subscribers", 2.0);

    let told = Instant::now();
    daemon.signal("TERM");
    for stream in [&mut reading, &mut waiting] {
        let error = loop {
            if let Err(error) = within(stream.next()).await.expect("a status, not just an end") {
                break error;
            }
        };
        assert_eq!(error.code(), Some(Code::Unavailable), "{error}");
        assert!(error.to_string().contains("draining; resume elsewhere from the last cursor"), "{error}");
        assert!(error.is_transient());
    }
    assert_eq!(within(push).await.unwrap().unwrap_err().code(), Code::Unavailable);
    assert_eq!(within(watch.message()).await.unwrap().unwrap().status(), ServingStatus::NotServing);
    let status = daemon.wait_exit();
    assert!(status.success(), "{status}: {}", daemon.log());
    assert!(told.elapsed() < Duration::from_secs(10), "{:?}", told.elapsed());
    assert!(!daemon.folder.path().join("ready.json").exists());
    assert!(matches!(Client::connect(&daemon.grpc).await, Err(ClientError::Connect { .. })));
}

/// A stream whose client reads nothing, and whose window is full: not even its end can be sent.
async fn stuck_stream(daemon: &Daemon) -> tonic::Streaming<proto::StreamResponse> {
    const WINDOW: u32 = 65_535;
    let endpoint = Endpoint::from_shared(format!("http://{}", daemon.grpc)).unwrap();
    let channel = endpoint.initial_stream_window_size(WINDOW).connect().await.unwrap();
    let start = Some(Start::Earliest.into());
    let request = proto::StreamRequest { start, ..Default::default() };
    let stream = DreamfeedServiceClient::new(channel).stream(request).await.unwrap().into_inner();
    let sent = || daemon.metric("dreamfeed_bytes_sent_total").unwrap_or_default();
    crate::support::wait_for("a full window", || sent() > f64::from(WINDOW));
    stream
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_does_not_read_cannot_hold_up_a_drain() {
    let mut daemon = Daemon::start(&["--batch-size", "1024", "--max-images", "2048", "--drain-timeout", "1s"]);
    let _stream = stuck_stream(&daemon).await;
    daemon.signal("INT");
    let status = daemon.wait_exit();
    assert!(status.success(), "{status}: {}", daemon.log());
    assert!(daemon.log().contains("still open at the drain's deadline"), "{}", daemon.log());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_exits_at_once() {
    // The stuck stream keeps the drain waiting for its deadline, so that there is time for the second signal.
    let mut daemon = Daemon::start(&["--batch-size", "1024", "--max-images", "2048", "--drain-timeout", "9s"]);
    let _stream = stuck_stream(&daemon).await;
    daemon.signal("TERM");
    // Readiness goes only after the first signal was taken; the second must not merge with it.
    crate::support::wait_for("the drain", || daemon.get("/readyz").0 != 200);
    daemon.signal("TERM");
    let status = daemon.wait_exit();
    assert!(
        status.code() == Some(1) || daemon.log().contains("still open at the drain's deadline"),
        "{status}: {}",
        daemon.log()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trainer_survives_a_restart_by_backing_off() {
    let first = Daemon::start(&["--batch-size", "8", "--max-images", "8"]);
    let address = first.grpc.clone();
    drop(first);
    let trainer = tokio::spawn({
        let address = address.clone();
        async move { retry(LONG, || async { Client::connect(&address).await?.describe().await }).await }
    });
    let folder = tempfile::tempdir().unwrap();
    let mut command = serve_command(folder.path(), &["--listen", &address, "--admin-listen", "127.0.0.1:0"]);
    let mut child = command.stderr(Stdio::null()).spawn().unwrap();
    let answer = trainer.await.unwrap();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(answer.unwrap().teacher.unwrap().arch, "resnet8");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_daemon_on_the_same_port_fails_at_once() {
    let daemon = Daemon::start(&["--batch-size", "8", "--max-images", "8"]);
    for arguments in [
        ["--listen", &daemon.grpc, "--admin-listen", "127.0.0.1:0"],
        ["--listen", "127.0.0.1:0", "--admin-listen", &daemon.admin],
    ] {
        let (output, errors) = run_to_end(&arguments, &[]);
        assert_eq!(output.status.code(), Some(1));
        assert!(errors.contains("error: cannot listen on") && errors.contains("another"), "{errors}");
        assert_eq!(errors.matches("in use").count(), 1, "{errors}");
    }
    // The first one never noticed.
    daemon.client().await.describe().await.unwrap();
}

#[test]
fn admin_pages_answer_and_signals_are_heard_while_the_store_is_being_opened() {
    // A bucket that takes connections and never answers.
    let bucket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let variables = S3::environment(&bucket.local_addr().unwrap().to_string());
    let folder = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::launch_with(folder, &["--store", "s3://bucket/dreams"], |command| {
        command.envs(variables);
    });
    assert_eq!(daemon.get("/readyz"), (503, "loading: the store is being opened\n".into()));
    assert_eq!(daemon.get("/livez"), (200, "ok\n".into()));
    assert_eq!(daemon.get("/metrics").0, 200);
    daemon.signal("TERM");
    let status = daemon.wait_exit();
    assert!(status.success(), "{status}: {}", daemon.log());
    assert!(daemon.log().contains("SIGTERM while the store was being opened"), "{}", daemon.log());
    assert!(!daemon.folder.path().join("ready.json").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_reflection_are_the_standard_services() {
    let daemon = Daemon::start(&["--batch-size", "8", "--max-images", "8"]);
    let mut health = HealthClient::new(channel(&daemon).await);
    for service in ["", SERVICE] {
        serving(&mut health.watch(check(service)).await.unwrap().into_inner()).await;
        let answer = health.check(check(service)).await.unwrap().into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving, "{service:?}");
    }
    assert_eq!(health.check(check("elsewhere")).await.unwrap_err().code(), Code::NotFound);

    let mut reflection = ServerReflectionClient::new(channel(&daemon).await);
    let ask = |message| ServerReflectionRequest { host: String::new(), message_request: Some(message) };
    let questions =
        [ask(MessageRequest::ListServices(String::new())), ask(MessageRequest::FileContainingSymbol(SERVICE.into()))];
    let mut answers = reflection.server_reflection_info(stream::iter(questions)).await.unwrap().into_inner();
    let listed = answers.message().await.unwrap().unwrap().message_response.unwrap();
    let MessageResponse::ListServicesResponse(ListServiceResponse { service }) = listed else { panic!("{listed:?}") };
    let names: Vec<&str> = service.iter().map(|service| service.name.as_str()).collect();
    assert!(names.contains(&SERVICE) && names.contains(&"grpc.health.v1.Health"), "{names:?}");
    let file = answers.message().await.unwrap().unwrap().message_response.unwrap();
    assert!(matches!(file, MessageResponse::FileDescriptorResponse(_)), "{file:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn admin_pages_tell_how_it_goes() {
    let daemon = Daemon::start(&["--batch-size", "8", "--max-images", "64", "--seed", "5"]);
    let client = daemon.client().await;
    assert_eq!(daemon.get("/livez"), (200, "ok\n".into()));
    assert_eq!(daemon.get("/readyz"), (200, "ok\n".into()));
    assert!(daemon.get("/").1.contains("/metrics"));
    assert_eq!(daemon.get("/elsewhere").0, 404);
    within(client.push_student(crate::support::ARCH, student(2), 0, None)).await.unwrap();
    daemon.wait_metric("dreamfeed_log_next_sequence", 64.0);
    daemon.wait_metric("dreamfeed_log_chunks", 8.0);
    daemon.wait_metric("dreamfeed_student_version_accepted", 1.0);
    daemon.wait_metric("dreamfeed_pushes_total{outcome=\"accepted\"}", 1.0);
    daemon.wait_metric("dreamfeed_engine_state{state=\"finished\"}", 1.0);
    let text = daemon.get("/metrics").1;
    assert!(text.contains("# HELP dreamfeed_subscribers Open streams."), "{text}");
    assert!(text.contains("# TYPE dreamfeed_rpc_seconds histogram"), "{text}");
    assert!(text.contains("dreamfeed_rpc_seconds_bucket{method=\"PushStudent\",code=\"OK\",le=\"0.05\"}"), "{text}");
    for name in
        ["queue_capacity_chunks 2", "subscribers 0", "images_sent_total{kind=\"fresh\"} 0", "pushes_capacity 4"]
    {
        assert!(text.contains(&format!("\ndreamfeed_{name}\n")), "{name}: {text}");
    }
}

#[test]
fn configuration_errors_come_all_together() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dreamfeed.toml");
    std::fs::write(&path, "max_stream = 3\n[synthesis]\niterations = \"many\"\n").unwrap();
    let path = path.to_str().unwrap();
    let (output, errors) = run_to_end(
        &[
            "--config",
            path,
            "--listen",
            "0.0.0.0:0",
            "--targets",
            "3,11",
            "--learning-rate=-1",
            "--seed",
            "x",
            "--demand=often",
        ],
        &[("DREAMFEED_QUEUE_CHUNKS", "0"), ("DREAMFEED_NO_SUCH_THING", "1")],
    );
    assert_eq!(output.status.code(), Some(1));
    assert!(errors.starts_with("error: the configuration has 9 problems:"), "{errors}");
    for part in [
        "dreamfeed.toml: max_stream: unknown key",
        "dreamfeed.toml: synthesis.iterations: ",
        "DREAMFEED_NO_SUCH_THING: unknown variable",
        "--insecure-listen",
        "queue_chunks is 0",
        "class 11",
        "learning_rate is -1",
        "--seed \"x\": ",
        "--demand \"often\": give one of always, subscribers",
    ] {
        assert!(errors.contains(part), "{part}: {errors}");
    }
    let (output, errors) = run_to_end(&["--no-such-flag"], &[]);
    assert_eq!(output.status.code(), Some(2), "{errors}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_loopback_address_is_the_default_and_beyond_it_takes_a_flag() {
    let daemon = Daemon::start(&["--batch-size", "8", "--max-images", "8"]);
    assert!(daemon.grpc.starts_with("127.0.0.1:"));
    let folder = tempfile::tempdir().unwrap();
    let ready = folder.path().join("ready");
    let mut command = serve_command(folder.path(), &["--listen", "0.0.0.0:0", "--admin-listen", "127.0.0.1:0"]);
    let mut child =
        command.arg("--insecure-listen").arg("--ready-file").arg(&ready).stderr(Stdio::null()).spawn().unwrap();
    crate::support::wait_for("the ready file", || ready.exists() || child.try_wait().unwrap().is_some());
    let started = child.try_wait().unwrap().is_none();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(started);
}
