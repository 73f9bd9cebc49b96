//! What a student can do to the daemon, seen in the images: it is adopted, also after a restart; one that cannot be used is
//! set aside; one that costs too much, or could not be read back, is refused; and a teacher that gives nothing finite is told.

use crate::support::{ARCH, CHANNELS, CLASSES, Daemon, file, network, student, take, wait_for, within};
use dreamfeed::client::{Batch, Client, ClientError, Pushed, Start};
use safetensors::Dtype;
use tonic::Code;

/// Two steps a batch.
const QUICK: [&str; 14] = [
    "--preset",
    "digits",
    "--iterations",
    "2",
    "--warm-iterations",
    "2",
    "--hybrid-iterations",
    "2",
    "--fast-steps",
    "2",
    "--fast-width",
    "4",
    "--fast-warmup",
    "3",
];

fn flags<'a>(batch_size: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    [&QUICK[..], &["--batch-size", batch_size], more].concat()
}

/// The student versions and the competition that the images of a batch tell of.
fn provenance(batch: &Batch) -> (Vec<i64>, Vec<f32>) {
    let (versions, _) = batch.payload.get("student_version").unwrap().data.as_chunks::<8>();
    let (competition, _) = batch.payload.get("competition").unwrap().data.as_chunks::<4>();
    (
        versions.iter().map(|bytes| i64::from_le_bytes(*bytes)).collect(),
        competition.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
    )
}

/// Waits until a fresh image was optimized against this version.
async fn until_dreamed_against(client: &Client, version: i64) {
    let mut stream = within(client.stream(Start::Latest)).await.unwrap();
    loop {
        let batch = take(&mut stream, 1).await.remove(0);
        let (versions, competition) = provenance(&batch);
        if versions.iter().all(|seen| *seen == version) {
            assert!(competition.iter().all(|js| (*js > 0.0) == (version > 0)), "{competition:?}");
            return;
        }
    }
}

async fn push(client: &Client, file: bytes::Bytes) -> Result<Pushed, (Code, String)> {
    match within(client.push_student(ARCH, file, 1, None)).await {
        Ok(pushed) => Ok(pushed),
        Err(ClientError::Status { status, .. }) => Err((status.code(), status.message().to_owned())),
        Err(other) => panic!("{other}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn images_are_made_against_the_stored_student_after_a_restart_in_every_tier() {
    for tier in ["adi", "warm-adi", "hybrid", "fast"] {
        let arguments = flags("8", &["--synthesizer", tier]);
        let mut daemon = Daemon::start(&arguments);
        push(&daemon.client().await, student(2)).await.unwrap();
        until_dreamed_against(&daemon.client().await, 1).await;
        daemon.restart(&arguments);
        until_dreamed_against(&daemon.client().await, 1).await;
        // Another daemon of the same store, and a push to the first one.
        let folder = tempfile::tempdir().unwrap();
        let store = daemon.folder.path().join("store");
        let teacher = daemon.folder.path().join("teacher.safetensors");
        let shared = ["--store", store.to_str().unwrap(), "--teacher", teacher.to_str().unwrap()];
        let other = Daemon::launch_in(folder, &[&arguments[..], &shared].concat());
        other.wait_ready();
        push(&daemon.client().await, student(3)).await.unwrap();
        wait_for("the other daemon's adoption", || other.metric("dreamfeed_student_version_adopted") == Some(2.0));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_student_that_fails_on_the_device_is_set_aside_and_the_engine_lives() {
    let arguments = flags("8192", &["--synthesizer", "adi", "--kept-students", "1"]);
    // Maps of 63 GB, where 12 GiB may be had.
    let limit = |folder: tempfile::TempDir| {
        let log = folder.path().join("daemon.log");
        Daemon::launch_with(folder, &arguments, |command| {
            let program = command.get_program().to_owned();
            let given: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
            let mut limited = std::process::Command::new("prlimit");
            limited.arg(format!("--as={}", 12u64 << 30)).arg(program).args(given);
            for (name, value) in command.get_envs() {
                match value {
                    Some(value) => limited.env(name, value),
                    None => limited.env_remove(name),
                };
            }
            let log = std::fs::OpenOptions::new().append(true).open(log).unwrap();
            limited.stdout(std::process::Stdio::null()).stderr(log);
            *command = limited;
        })
    };
    let mut wide = network(ARCH, CHANNELS, CLASSES, 4);
    let channels = 30_000;
    for (name, shape) in [
        ("layer1.0.conv1.weight", vec![channels, 16, 3, 3]),
        ("layer1.0.conv2.weight", vec![16, channels, 3, 3]),
        ("layer1.0.bn1.weight", vec![channels]),
        ("layer1.0.bn1.bias", vec![channels]),
        ("layer1.0.bn1.running_mean", vec![channels]),
        ("layer1.0.bn1.running_var", vec![channels]),
    ] {
        let size = 4 * shape.iter().product::<usize>();
        let values = if name.ends_with("var") { 1f32.to_le_bytes().repeat(channels) } else { vec![0; size] };
        wide.insert(name.to_owned(), (Dtype::F32, shape, values));
    }
    let mut daemon = limit(tempfile::tempdir().unwrap());
    daemon.wait_ready();
    let client = daemon.client().await;
    assert_eq!(push(&client, file(&wide, &[])).await.unwrap().version, 1);
    daemon.wait_metric("dreamfeed_students_set_aside_total", 1.0);
    until_dreamed_against(&client, 0).await;
    assert_eq!(daemon.get("/readyz").0, 200);

    // The same after a restart: it is adopted, fails, and is set aside again.
    daemon.signal("TERM");
    daemon.wait_exit();
    let folder = std::mem::replace(&mut daemon.folder, tempfile::tempdir().unwrap());
    let daemon = limit(folder);
    daemon.wait_metric("dreamfeed_students_set_aside_total", 1.0);
    let client = daemon.client().await;
    until_dreamed_against(&client, 0).await;
    assert_eq!(push(&client, student(3)).await.unwrap().version, 2);
    until_dreamed_against(&client, 2).await;
}

/// A student of one feature and many classes, and of a value of its own: a small file whose logits alone fill the memory.
fn many_classes(classes: usize, value: f32) -> bytes::Bytes {
    let mut tensors = network(ARCH, CHANNELS, CLASSES, 9);
    let inner = tensors["layer3.0.conv1.weight"].1.clone();
    let mut set = |name: &str, shape: Vec<usize>| {
        let elements: usize = shape.iter().product();
        tensors.insert(name.into(), (Dtype::F16, shape, half::f16::from_f32(value).to_le_bytes().repeat(elements)));
    };
    set("layer3.0.conv2.weight", vec![1, inner[0], 3, 3]);
    set("layer3.0.shortcut.0.weight", vec![1, inner[1], 1, 1]);
    for part in ["weight", "bias", "running_mean", "running_var"] {
        set(&format!("layer3.0.bn2.{part}"), vec![1]);
        set(&format!("layer3.0.shortcut.1.{part}"), vec![1]);
    }
    set("linear.weight", vec![classes, 1]);
    set("linear.bias", vec![classes]);
    file(&tensors, &[])
}

#[tokio::test(flavor = "multi_thread")]
async fn students_that_fail_and_come_all_the_time_do_not_keep_images_away() {
    const CLASSES_IN_VAIN: usize = 1_000_000;
    let most = CLASSES_IN_VAIN.to_string();
    let arguments = ["--batch-size", "2048", "--log-max-bytes", "64MiB", "--max-student-classes", &most];
    let daemon = Daemon::start(&arguments);
    // 8 GB of logits find no place.
    let status = std::fs::read_to_string(format!("/proc/{}/status", daemon.child.id())).unwrap();
    let mapped =
        status.lines().find_map(|line| line.strip_prefix("VmSize:")?.trim().strip_suffix(" kB")?.parse().ok());
    let limit = mapped.map(|kib: u64| (kib << 10) + (4 << 30));
    let pid = rustix::process::Pid::from_raw(daemon.child.id() as i32);
    let limits = rustix::process::Rlimit { current: limit, maximum: limit };
    rustix::process::prlimit(pid, rustix::process::Resource::As, limits).unwrap();

    let client = daemon.client().await;
    let pushing = tokio::spawn(async move {
        for version in 1.. {
            // Weights that differ, so that each is a new version.
            let file = many_classes(CLASSES_IN_VAIN, 1.0 + (version % 500) as f32 / 512.0);
            push(&client, file).await.unwrap();
        }
    });
    tokio::task::block_in_place(|| {
        let runs = |outcome: &str| {
            let series = format!("dreamfeed_synthesis_runs_total{{outcome=\"{outcome}\"}}");
            daemon.metric(&series).unwrap_or_default()
        };
        wait_for("runs that fail", || runs("error") >= 1.0);
        for _ in 0..2 {
            let before = (runs("finished"), daemon.metric("dreamfeed_student_version_accepted"));
            wait_for("a batch in spite of them", || runs("finished") > before.0);
            wait_for("further pushes", || daemon.metric("dreamfeed_student_version_accepted") > before.1);
        }
    });
    assert_eq!(daemon.get("/readyz").0, 200);
    assert!(!pushing.is_finished());
    pushing.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_student_that_costs_too_much_is_refused_with_figure_and_limit() {
    let mut daemon = Daemon::start(&["--batch-size", "8", "--max-images", "8", "--max-student-classes", "12"]);
    let client = daemon.client().await;
    let classes = file(&network(ARCH, CHANNELS, 13, 3), &[]);
    let header = file(&network(ARCH, CHANNELS, CLASSES, 3), &[("note", &"x".repeat(5 << 20))]);
    let mut many = network(ARCH, CHANNELS, CLASSES, 3);
    many.extend((0..20_001).map(|at| (format!("t{at}"), (Dtype::F32, vec![0], Vec::new()))));
    let mut long = network(ARCH, CHANNELS, CLASSES, 3);
    long.insert("n".repeat(513), (Dtype::F32, vec![0], Vec::new()));
    for (file, figures) in [
        (classes, ["13 outputs", "at most 12"]),
        (header, ["header has 52", "at most 4194304"]),
        (file(&many, &[]), ["more than 20000 tensors", "most that are read"]),
        (file(&long, &[]), ["513 bytes", "at most 512"]),
    ] {
        let (code, message) = push(&client, file).await.unwrap_err();
        assert_eq!(code, Code::ResourceExhausted, "{message}");
        assert!(figures.iter().all(|figure| message.contains(figure)), "{message}");
    }
    daemon.wait_metric("dreamfeed_pushes_total{outcome=\"too_large\"}", 4.0);

    // What is within the limits is acknowledged, and can be read for ever.
    let odd = "\"\\\n\0".repeat(200_000);
    let odd = file(&network(ARCH, CHANNELS, 12, 3), &[("note", &odd)]);
    assert_eq!(push(&client, odd.clone()).await.unwrap().version, 1);
    daemon.restart(&["--batch-size", "8", "--max-images", "8"]);
    let fetched = within(daemon.client().await.fetch_student(0)).await.unwrap();
    assert_eq!(fetched.unwrap().checkpoint.bytes(), &odd);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_teacher_that_is_never_finite_is_a_failure_and_no_image_of_it_is_kept() {
    for tier in ["noise", "adi", "warm-adi", "hybrid", "fast"] {
        let folder = tempfile::tempdir().unwrap();
        let mut tensors = network(ARCH, CHANNELS, CLASSES, 1);
        for name in ["linear.weight", "linear.bias"] {
            let tensor = tensors.get_mut(name).unwrap();
            tensor.2 = 3e38f32.to_le_bytes().repeat(tensor.2.len() / 4);
        }
        let teacher = folder.path().join("overflowing.safetensors");
        let metadata = [("arch", ARCH), ("mean", "0.5"), ("std", "0.25"), ("image_size", "8,8")];
        std::fs::write(&teacher, file(&tensors, &metadata)).unwrap();
        let arguments = flags("8", &["--synthesizer", tier, "--teacher", teacher.to_str().unwrap()]);
        let daemon = Daemon::launch_in(folder, &arguments);
        wait_for("the failure", || daemon.metric("dreamfeed_engine_state{state=\"failed\"}") == Some(1.0));
        let (status, reason) = daemon.get("/readyz");
        assert!(status == 503 && reason.contains("10 synthesis runs in a row"), "{tier}: {reason}");
        assert_eq!(daemon.metric("dreamfeed_log_images"), Some(0.0));
        let told = daemon.log().lines().filter(|line| line.contains("WARN") || line.contains("ERROR")).count();
        assert!(told <= 2, "{}", daemon.log());
    }
}
