//! The files that users name: outputs that are whole or not there and never take the place of a device, a pipe or a link;
//! inputs that nobody waits for; and how long a daemon that says nothing is waited for.

use std::fs;
use std::io::Read;
use std::net::TcpListener;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::support::{Daemon, LONG, serve_command, wait_for, write_teacher};

fn dreamfeed(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dreamfeed"));
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Its output, or a failure where it does not end.
fn ended(command: &mut Command) -> Output {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let began = std::time::Instant::now();
    while child.try_wait().unwrap().is_none() {
        if began.elapsed() > LONG {
            child.kill().unwrap();
            panic!("{command:?} never ended");
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    child.wait_with_output().unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// It failed, and its last line is an error with these words.
fn assert_fails(output: &Output, words: &[&str]) {
    let error = text(&output.stderr);
    let last = error.lines().last().unwrap_or_default();
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(last.starts_with("error: ") && words.iter().all(|word| last.contains(word)), "{words:?} in {error}");
}

/// `dream` with its teacher in the folder, as short as can be.
fn dream(folder: &Path, grid: &Path) -> Output {
    let teacher = write_teacher(folder);
    let mut command = dreamfeed(&["dream", "--json", "--device", "cpu", "--threads", "1", "--iterations", "1"]);
    command.args(["--preset", "digits", "--batch-size", "2", "--teacher"]).arg(teacher).arg("--grid").arg(grid);
    ended(&mut command)
}

fn distill(daemon: &Daemon, more: &[&str]) -> Output {
    let mut command =
        dreamfeed(&["distill", "--connect", &daemon.grpc, "--threads", "1", "--device", "cpu", "--json"]);
    ended(command.args(["--batch-size", "8", "--min-images", "8", "--augment", "none", "--steps", "2"]).args(more))
}

/// The program, whose files have at most so many blocks of 512 bytes: what a full disk is like.
fn limited(blocks: &str) -> Command {
    let mut command = Command::new("sh");
    let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$@\"");
    command.args(["-c", &script, "sh", env!("CARGO_BIN_EXE_dreamfeed")]);
    command
}

fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn fifo(folder: &Path, name: &str) -> PathBuf {
    let path = folder.join(name);
    assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
    path
}

#[test]
fn an_output_replaces_a_file_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let outputs = folder.path().join("outputs");
    fs::create_dir_all(outputs.join("elsewhere")).unwrap();
    let file = outputs.join("elsewhere/file.png");
    fs::write(&file, "old").unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600)).unwrap();
    let (link, dangling, null) = (outputs.join("link"), outputs.join("dangling"), outputs.join("null"));
    symlink("elsewhere/file.png", &link).unwrap();
    symlink("elsewhere/new.png", &dangling).unwrap();
    symlink("/dev/null", &null).unwrap();
    for path in [&link, &dangling, &null] {
        let output = dream(folder.path(), path);
        assert!(output.status.success(), "{}", text(&output.stderr));
        assert!(path.is_symlink(), "{path:?} was replaced");
    }
    assert!(fs::metadata("/dev/null").unwrap().file_type().is_char_device());
    for name in ["file.png", "new.png"] {
        assert!(fs::read(outputs.join("elsewhere").join(name)).unwrap().starts_with(b"\x89PNG"), "{name}");
    }
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(names(&outputs), ["dangling", "elsewhere", "link", "null"]);
    assert_eq!(names(&outputs.join("elsewhere")), ["file.png", "new.png"]);
    assert_fails(&dream(folder.path(), &outputs), &["cannot write", "it is a folder; name a file"]);
}

#[test]
fn a_pipe_gets_the_bytes_and_stays_one() {
    let folder = tempfile::tempdir().unwrap();
    let pipe = fifo(folder.path(), "pipe");
    assert_fails(&dream(folder.path(), &pipe), &["cannot write", "nobody reads this pipe"]);
    let reader = std::thread::spawn({
        let pipe = pipe.clone();
        move || {
            let mut bytes = Vec::new();
            fs::File::open(pipe).unwrap().read_to_end(&mut bytes).unwrap();
            bytes
        }
    });
    let output = dream(folder.path(), &pipe);
    // Whatever came of it, the reader ends.
    drop(fs::OpenOptions::new().read(true).write(true).open(&pipe));
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(reader.join().unwrap().starts_with(b"\x89PNG"));
    assert!(fs::symlink_metadata(&pipe).unwrap().file_type().is_fifo());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_under_one_output_costs_no_other() {
    let daemon = Daemon::start(&["--batch-size", "8", "--max-images", "16"]);
    let folder = tempfile::tempdir().unwrap();
    let full = folder.path().join("full");
    symlink("/dev/full", &full).unwrap();
    let [out, summary, grid, checkpoint, full] =
        ["out", "summary", "grid", "checkpoint", "full"].map(|name| folder.path().join(name).display().to_string());
    let output =
        distill(&daemon, &["--out", &full, "--grid", &full, "--summary", &summary, "--checkpoint", &checkpoint]);
    assert_fails(&output, &["cannot write", "full: ", "; cannot write"]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["steps"], 2);
    assert_eq!(names(folder.path()), ["checkpoint", "full", "summary"]);

    let output = distill(&daemon, &["--out", &out, "--grid", &grid, "--summary", &full]);
    assert_fails(&output, &["cannot write", "full: "]);
    assert_eq!(names(folder.path()), ["checkpoint", "full", "grid", "out", "summary"]);

    let teacher = daemon.folder.path().join("teacher.safetensors");
    let mut command = dreamfeed(&["prune", "--flops", "0.3", "--device", "cpu", "--threads", "1", "--connect"]);
    command.arg(&daemon.grpc).args(["--batch-size", "8", "--min-images", "8", "--rounds", "1", "--steps-per-round"]);
    command.args(["1", "--fine-tune-steps", "1", "--model"]).arg(teacher);
    let output = ended(command.args(["--out", &full, "--summary", &summary]));
    assert_fails(&output, &["cannot write", "full: "]);
    let report: serde_json::Value = serde_json::from_slice(&fs::read(&summary).unwrap()).unwrap();
    assert_eq!(report["complete"], true);

    let printed = text(&dream(folder.path(), Path::new(&full)).stdout);
    assert!(printed.contains("teacher_accuracy"), "what was asked of standard output comes all the same: {printed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_that_the_disk_refuses_ends_no_training() {
    let daemon = Daemon::start(&["--batch-size", "8", "--max-images", "16"]);
    let folder = tempfile::tempdir().unwrap();
    let [checkpoint, summary] = ["checkpoint", "summary"].map(|name| folder.path().join(name));
    // Room for a summary, and for no network.
    let mut command = limited("20");
    command.args(["distill", "--connect", &daemon.grpc, "--threads", "1", "--device", "cpu", "--batch-size", "8"]);
    command.args(["--min-images", "8", "--augment", "none", "--steps", "3", "--checkpoint-every", "1"]);
    let output = ended(command.arg("--checkpoint").arg(checkpoint).arg("--summary").arg(&summary));
    assert_fails(&output, &["cannot write", "checkpoint: "]);
    assert!(text(&output.stderr).contains("the training goes on and tries again in 1 steps"), "{output:?}");
    let report: serde_json::Value = serde_json::from_slice(&fs::read(&summary).unwrap()).unwrap();
    assert_eq!(report["steps"], 3);
    assert_eq!(names(folder.path()), ["summary"]);
}

#[test]
fn a_ready_file_that_is_a_device_or_a_link_stays_one() {
    let folder = tempfile::tempdir().unwrap();
    let null = folder.path().join("null");
    symlink("/dev/null", &null).unwrap();
    let link = folder.path().join("link");
    symlink("ready", &link).unwrap();
    for path in [&null, &link] {
        let mut command = serve_command(folder.path(), &["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"]);
        let log = folder.path().join("log");
        command.arg("--ready-file").arg(path).stderr(fs::File::create(&log).unwrap());
        let mut child = command.spawn().unwrap();
        wait_for("a daemon that serves", || {
            fs::read_to_string(&log).unwrap().contains("listening") || child.try_wait().unwrap().is_some()
        });
        assert_eq!(folder.path().join("ready").exists(), path == &link);
        Command::new("kill").arg(child.id().to_string()).status().unwrap();
        assert!(child.wait().unwrap().success());
        assert!(path.is_symlink(), "{path:?} is gone");
        assert!(!folder.path().join("ready").exists());
    }
    assert!(fs::metadata("/dev/null").unwrap().file_type().is_char_device());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_that_the_disk_refuses_leaves_no_half_of_a_file() {
    let daemon = Daemon::start(&["--batch-size", "8", "--max-images", "16"]);
    daemon.wait_metric("dreamfeed_log_next_sequence", 16.0);
    for format in ["folder", "webdataset", "parquet"] {
        let out = daemon.folder.path().join(format);
        let mut command = limited("0");
        command.args(["log", "export", "--format", format, "--out"]).arg(&out);
        let output = ended(command.arg("--store").arg(daemon.folder.path().join("store")));
        assert_fails(&output, &["cannot write", out.to_str().unwrap()]);
        let left: Vec<_> = names(&out).into_iter().filter(|name| !out.join(name).is_dir()).collect();
        assert!(left.is_empty(), "{left:?}");
        let in_classes = names(&out).into_iter().flat_map(|class| names(&out.join(class)));
        assert_eq!(in_classes.collect::<Vec<_>>(), Vec::<String>::new());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_checkpoint_is_refused_by_name() {
    let daemon = Daemon::start(&["--batch-size", "8", "--max-images", "16"]);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.safetensors");
    let state = path.to_str().unwrap();
    let run = || distill(&daemon, &["--checkpoint", state]);
    assert!(run().status.success());
    let good = fs::read(&path).unwrap();

    let last = good.len() - 1;
    for at in [last, last / 2] {
        let mut spoiled = good.clone();
        spoiled[at] ^= 1;
        fs::write(&path, &spoiled).unwrap();
        assert_fails(&run(), &["cannot resume from", state, "its checksum does not match"]);
        assert!(fs::read(&path).unwrap() == spoiled, "it was replaced");
    }
    let exchanged = |file: &[u8], from: &str, to: &str| {
        assert_eq!(from.len(), to.len(), "offsets stay");
        let at = file.windows(from.len()).position(|part| part == from.as_bytes()).unwrap();
        [&file[..at], to.as_bytes(), &file[at + from.len()..]].concat()
    };
    let step = "\"step\":\"2\"";
    fs::write(&path, exchanged(&good, step, "\"step\":\"9\"")).unwrap();
    assert_fails(&run(), &[state, "its checksum does not match"]);
    // One of before, which has no checksum.
    let old = exchanged(&good, "\"file_sha256\"", "\"file_000000\"");
    fs::write(&path, exchanged(&old, step, "\"step\":\"?\"")).unwrap();
    assert_fails(&run(), &[state, "its step is \"?\", which makes no sense"]);
    fs::write(&path, good).unwrap();
    assert!(run().status.success());

    fs::copy(daemon.folder.path().join("teacher.safetensors"), &path).unwrap();
    assert_fails(&run(), &[state, "it is not the checkpoint of a training"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_tool_waits_for_what_a_pipe_or_a_device_never_sends() {
    let folder = tempfile::tempdir().unwrap();
    let teacher = write_teacher(folder.path());
    let data = folder.path().join("data.bin");
    fs::write(&data, [0; 65]).unwrap();
    let (pipe, refused) = (fifo(folder.path(), "pipe"), "it is a pipe; give a regular file");
    let pictures = folder.path().join("pictures/ant");
    fs::create_dir_all(&pictures).unwrap();
    fifo(&pictures, "a.png");
    let evaluate = |model: &Path, data: &Path| {
        let mut command = dreamfeed(&["evaluate", "--device", "cpu", "--model"]);
        command.arg(model).arg("--data").arg(data);
        command
    };
    let serve = |flag: &str| serve_command(folder.path(), &[flag, pipe.to_str().unwrap()]);
    for mut command in [
        evaluate(&pipe, &data),
        evaluate(&teacher, &pipe),
        evaluate(&teacher, &folder.path().join("pictures")),
        serve("--teacher"),
        serve("--config"),
    ] {
        let output = ended(&mut command);
        assert!(!output.status.success() && text(&output.stderr).contains(refused), "{}", text(&output.stderr));
    }
    assert_fails(&ended(&mut evaluate(Path::new("/dev/zero"), &data)), &["/dev/zero", "it is a device"]);
    let daemon = Daemon::start(&["--batch-size", "8", "--max-images", "16"]);
    assert_fails(&distill(&daemon, &["--checkpoint", pipe.to_str().unwrap()]), &["cannot resume from", refused]);
}

#[test]
fn a_daemon_that_takes_connections_and_says_nothing_is_given_up() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let folder = tempfile::tempdir().unwrap();
    let teacher = write_teacher(folder.path());
    let data = folder.path().join("data.bin");
    fs::write(&data, [10; 65]).unwrap();
    let (teacher, data) = (teacher.to_str().unwrap(), data.to_str().unwrap());
    let out = folder.path().join("out");
    for command in [
        &["distill"][..],
        &["prune", "--flops", "0.3", "--model", teacher],
        &["continual", "--model", teacher, "--data", data, "--task", "10", "--out-dir", out.to_str().unwrap()],
        &["synthesizer", "noise"],
    ] {
        let mut command = dreamfeed(command);
        let output = ended(command.args(["--connect", &address, "--connect-timeout", "1s"]));
        assert_fails(&output, &[&address, "did not answer within 1s"]);
    }
}
