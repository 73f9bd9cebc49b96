//! The loop itself, from outside: images that come to know the student, trainers that live through restarts, and the
//! local tools.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use crate::support::{
    ARCH, CHANNELS, CLASSES, Daemon, file, network, serve_command, student, wait_for, within, write_teacher,
};
use dreamfeed::client::{Client, Start};
use futures_util::StreamExt;

const ADI: [&str; 8] = ["--synthesizer", "adi", "--preset", "digits", "--batch-size", "8", "--iterations", "4"];

fn dreamfeed(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dreamfeed"));
    command.args(arguments).stdin(Stdio::null());
    command
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn succeeded(output: Output) -> String {
    assert!(output.status.success(), "{}\n{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

fn adaptive(arguments: &[&str]) -> Daemon {
    Daemon::start(&[&ADI, arguments].concat())
}

#[tokio::test(flavor = "multi_thread")]
async fn images_become_adaptive_with_the_first_push_and_say_so() {
    let daemon = adaptive(&[]);
    let client = daemon.client().await;
    let mut stream = client.stream(Start::Earliest).await.unwrap();
    let first = within(stream.next()).await.unwrap().unwrap();
    assert_eq!(first.student_version().unwrap(), [0; 8]);
    assert_eq!(first.competition().unwrap(), [0.0; 8]);
    let mut labels = first.labels().unwrap();
    labels.sort_unstable();
    labels.dedup();
    assert_eq!(labels.len(), 8, "eight images of ten balanced classes are of eight classes");

    assert_eq!(client.push_student(ARCH, student(2), 7, None).await.unwrap().version, 1);
    loop {
        let batch = within(stream.next()).await.unwrap().unwrap();
        if batch.student_version().unwrap() == [1; 8] {
            let competition = batch.competition().unwrap();
            assert!(competition.iter().all(|js| *js > 0.0 && *js <= std::f32::consts::LN_2), "{competition:?}");
            break;
        }
    }
    daemon.wait_metric("dreamfeed_student_version_adopted", 1.0);
    daemon.wait_metric("dreamfeed_student_adoption_seconds_count", 1.0);
    assert!(daemon.metric("dreamfeed_loss{term=\"compete\"}").is_some());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_turns_non_finite_is_dropped_and_the_daemon_goes_on() {
    let daemon = adaptive(&["--learning-rate", "1e38", "--clip", "false"]);
    let series = "dreamfeed_synthesis_runs_total{outcome=\"non_finite\"}";
    wait_for("dropped runs", || daemon.metric(series).is_some_and(|runs| runs >= 2.0));
    let description = daemon.client().await.describe().await.unwrap();
    assert_eq!(description.log.unwrap().next_sequence, 0);
    assert_eq!(daemon.get("/readyz").0, 200);
    assert!(daemon.log().contains("not finite"));
}

#[tokio::test(flavor = "multi_thread")]
async fn max_images_is_exact() {
    let daemon = adaptive(&["--max-images", "20"]);
    let mut stream = daemon.client().await.stream(Start::Earliest).await.unwrap();
    let mut counts = Vec::new();
    while counts.iter().sum::<usize>() < 20 {
        counts.push(within(stream.next()).await.unwrap().unwrap().count);
    }
    assert_eq!(counts, [8, 8, 4]);
    daemon.wait_metric("dreamfeed_engine_state{state=\"finished\"}", 1.0);
}

fn distill(connect: &str, folder: &Path, arguments: &[&str]) -> Child {
    let mut command = dreamfeed(&["distill", "--connect", connect, "--threads", "1", "--device", "cpu"]);
    command.args(["--batch-size", "8", "--min-images", "8", "--augment", "shift:1", "--push-every", "2", "--json"]);
    command.arg("--out").arg(folder.join("student.safetensors"));
    command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

fn summary(trainer: Child) -> serde_json::Value {
    serde_json::from_str(&succeeded(trainer.wait_with_output().unwrap())).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trainer_lives_through_a_restart_of_the_daemon() {
    // Paced to one step a batch, the first daemon's 8 batches are not enough for 12 steps.
    let flags = ["--batch-size", "8", "--max-images", "64"];
    let mut first = Daemon::start(&flags);
    let folder = tempfile::tempdir().unwrap();
    let trainer = distill(&first.grpc, folder.path(), &["--steps", "12", "--steps-per-batch", "1"]);
    let client = first.client().await;
    // Not so many pushes: where one takes long, the next snapshots become one.
    let eighth = async {
        while client.describe().await.unwrap().student.is_none_or(|student| student.trainer_step < 8) {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    within(eighth).await;
    first.signal("KILL");
    first.wait_exit();

    let again = tempfile::tempdir().unwrap();
    let mut command = serve_command(again.path(), &flags);
    command.args(["--listen", &first.grpc, "--admin-listen", "127.0.0.1:0"]).stderr(Stdio::null());
    let mut second = command.spawn().unwrap();
    let summary = summary(trainer);
    assert_eq!(summary["steps"], 12);
    assert!(summary["reconnects"].as_u64().unwrap() >= 1, "{summary}");
    let student = Client::connect(&first.grpc).await.unwrap().describe().await.unwrap().student.unwrap();
    assert_eq!(student.trainer_step, 12, "the new daemon has the final student");
    second.kill().unwrap();
    second.wait().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_training_resumes_from_its_checkpoint() {
    let daemon = Daemon::start(&["--batch-size", "8", "--max-images", "32"]);
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state.safetensors");
    let run = |steps: &str| {
        summary(distill(&daemon.grpc, folder.path(), &["--steps", steps, "--checkpoint", state.to_str().unwrap()]))
    };
    assert_eq!(run("5")["images_consumed"], 40);
    let resumed = run("9");
    assert_eq!((&resumed["steps"], &resumed["images_consumed"]), (&9.into(), &72.into()));
    // The student loads anywhere without flags, and the daemon holds the same weights.
    let fetched = daemon.client().await.fetch_student(0).await.unwrap().unwrap();
    let written = dreamfeed::model::checkpoint::Checkpoint::open(&folder.path().join("student.safetensors")).unwrap();
    assert_eq!(fetched.checkpoint.identity(), written.identity());
    assert_eq!(written.metadata()["image_size"], "8,8");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_moving_average_is_saved_and_resumed_and_the_weights_are_pushed() {
    use dreamfeed::model::checkpoint::Checkpoint;
    let daemon = Daemon::start(&["--batch-size", "8", "--max-images", "32"]);
    let folder = tempfile::tempdir().unwrap();
    let (state, student) = (folder.path().join("state.safetensors"), folder.path().join("student.safetensors"));
    let run = |steps: &str| {
        let more = ["--ema", "0.9", "--steps", steps, "--checkpoint", state.to_str().unwrap()];
        summary(distill(&daemon.grpc, folder.path(), &more))
    };
    run("5");
    let first = Checkpoint::open(&student).unwrap();
    assert_eq!(run("9")["steps"], 9);
    let (written, state) = (Checkpoint::open(&student).unwrap(), Checkpoint::open(&state).unwrap());
    assert_ne!(written.identity(), first.identity());
    for (name, tensor) in written.tensors() {
        assert_eq!(state.get(&format!("average.{name}")).unwrap().data, tensor.data, "{name}");
    }
    let fetched = daemon.client().await.fetch_student(0).await.unwrap().unwrap().checkpoint;
    assert_ne!(fetched.identity(), written.identity());
    assert_eq!(fetched.get("conv1.weight").unwrap().data, state.get("conv1.weight").unwrap().data);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resumed_training_goes_on_with_the_very_next_image() {
    use dreamfeed::model::checkpoint::Checkpoint;

    let daemon = Daemon::start(&["--batch-size", "8", "--max-images", "96"]);
    daemon.wait_metric("dreamfeed_log_next_sequence", 96.0);
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state.safetensors");
    let run = |daemon: &Daemon, steps: &str| {
        let paced = ["--steps", steps, "--steps-per-batch", "1", "--checkpoint", state.to_str().unwrap()];
        let summary = summary(distill(&daemon.grpc, folder.path(), &paced));
        assert_eq!(summary["steps"].to_string(), steps);
        let position = Checkpoint::open(&state).unwrap().metadata()["position"].clone();
        (position, summary["images_received"].as_u64().unwrap())
    };
    // One step for each batch of eight; of what came beyond, one batch waits for the trainer and one on the wire.
    assert_eq!(run(&daemon, "3").0, "24");
    let (position, received) = run(&daemon, "6");
    assert_eq!(position, "48");
    assert!((24..=40).contains(&received), "{received}: images that only fill the buffer again do not count");

    // Interrupted while the buffer fills again, it still stands where it stood.
    assert_eq!(run(&daemon, "6").0, "48");

    // Of another log the position says nothing.
    let other = Daemon::start(&["--batch-size", "8", "--max-images", "16"]);
    assert_eq!(run(&other, "8").0, "16");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_diverges_replaces_nothing_that_was_good() {
    let daemon = Daemon::start(&["--batch-size", "8", "--max-images", "16"]);
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state.safetensors");
    let run = |more: &[&str]| {
        let given = ["--checkpoint", state.to_str().unwrap()];
        distill(&daemon.grpc, folder.path(), &[&given, more].concat()).wait_with_output().unwrap()
    };
    succeeded(run(&["--steps", "3"]));
    let read = || [&state, &folder.path().join("student.safetensors")].map(|path| std::fs::read(path).unwrap());
    let good = read();
    let output = run(&["--steps", "9", "--learning-rate", "1e30"]);
    assert!(!output.status.success());
    assert!(text(&output.stderr).contains("a smaller --learning-rate"), "{}", text(&output.stderr));
    assert!(read() == good, "a network that is not finite replaced one that was");
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_are_learned_first_and_never_again() {
    let daemon = Daemon::start(&["--batch-size", "8", "--max-images", "16"]);
    let folder = tempfile::tempdir().unwrap();
    let teacher = write_teacher(folder.path());
    let state = folder.path().join("state.safetensors");
    // Whether the last step was one of blocks.
    let run = |steps: &str, blockwise: &str, more: &[&str]| {
        let flags = ["--teacher", teacher.to_str().unwrap(), "--steps", steps, "--blockwise", blockwise];
        let output = distill(&daemon.grpc, folder.path(), &[&flags, more].concat()).wait_with_output().unwrap();
        let last = text(&output.stderr).lines().last().unwrap().to_owned();
        succeeded(output);
        assert!(last.contains("done"), "{last}");
        last.contains("block by block")
    };
    let resumed = ["--checkpoint", state.to_str().unwrap()];
    assert!(run("2", "0.9", &resumed));
    assert!(run("4", "0.9", &resumed), "it was not over");
    assert!(!run("6", "0.7", &resumed), "five of six are more");
    assert!(!run("60", "0.7", &resumed), "what is over stays over, whatever the new budget");
    assert!(!run("2", "0.9", &["--fetch"]), "a student that somebody trained is a network");
}

#[tokio::test(flavor = "multi_thread")]
async fn losses_precision_and_a_teacher_at_hand_are_choices() {
    let daemon = Daemon::start(&["--batch-size", "8", "--max-images", "16"]);
    let folder = tempfile::tempdir().unwrap();
    let teacher = write_teacher(folder.path());
    let teacher = teacher.to_str().unwrap();
    let mut losses = Vec::new();
    for choice in [
        &["--loss", "kl"][..],
        &["--loss", "l1"],
        &["--loss", "hard"],
        &["--precision", "bf16"],
        &["--teacher", teacher],
        &["--teacher", teacher, "--hint-weight", "2"],
        &["--teacher", teacher, "--hint-weight", "2", "--blockwise", "0.5"],
        &["--teacher", teacher, "--hint-weight", "2", "--blockwise", "0.5", "--precision", "bf16"],
    ] {
        let summary = summary(distill(&daemon.grpc, folder.path(), &[&["--steps", "3"], choice].concat()));
        assert_eq!(summary["steps"], 3, "{choice:?}");
        losses.push(summary["loss"].as_f64().unwrap());
    }
    assert!(losses.iter().all(|loss| loss.is_finite() && *loss > 0.0), "{losses:?}");

    let other = folder.path().join("other.safetensors");
    std::fs::write(&other, file(&network(ARCH, CHANNELS, CLASSES, 9), &[])).unwrap();
    let more = ["--steps", "3", "--teacher", other.to_str().unwrap()];
    let output = distill(&daemon.grpc, folder.path(), &more).wait_with_output().unwrap();
    let error = text(&output.stderr);
    assert!(error.contains("is not the network that the daemon dreams from"), "{error}");

    for (flags, problem) in [
        (&["--hint-weight", "1"][..], "give --teacher"),
        (&["--blockwise", "0.5"], "give --teacher"),
        (
            &["--teacher", teacher, "--blockwise", "1.5"],
            "--blockwise is 1.5; give a part of the training, from 0 up to, not including, 1",
        ),
        (&["--teacher", teacher, "--blockwise", "0.5", "--arch", "resnet18"], "has other stages than the teacher"),
    ] {
        let output = distill(&daemon.grpc, folder.path(), flags).wait_with_output().unwrap();
        assert!(!output.status.success(), "{flags:?}");
        assert!(text(&output.stderr).contains(problem), "{flags:?}: {}", text(&output.stderr));
    }
}

#[test]
fn bench_synth_prints_what_a_step_costs() {
    let folder = tempfile::tempdir().unwrap();
    let teacher = write_teacher(folder.path());
    let precision = "f32"; // bf16 takes minutes on a processor without it
    let mut command = dreamfeed(&["bench", "synth", "--device", "cpu", "--threads", "1", "--batch", "2", "--json"]);
    command.args(["--steps", "2", "--warmup", "1", "--profile", "--precision", precision, "--teacher"]).arg(&teacher);
    let report: serde_json::Value = serde_json::from_str(&succeeded(command.output().unwrap())).unwrap();
    for key in ["step_seconds", "bare_seconds", "pytorch_seconds", "fraction_of_peak", "peak_memory_bytes"] {
        assert!(report[key].as_f64().unwrap() > 0.0, "{key}: {report}");
    }
    assert_eq!(report["precision"], precision);
    for error in ["loss_error", "gradient_error"] {
        assert!(report[error].as_f64().unwrap() < 1e-3, "{error}: {report}");
    }
    let parts: f64 = report["profile"].as_object().unwrap().values().map(|seconds| seconds.as_f64().unwrap()).sum();
    assert!((parts - report["step_seconds"].as_f64().unwrap()).abs() < 1e-6, "{report}");

    let mut command = dreamfeed(&["bench", "synth", "--batch-size", "2", "--teacher"]);
    let output = command.arg(&teacher).output().unwrap();
    assert!(!output.status.success());
    assert!(text(&output.stderr).contains("give --batch"), "{}", text(&output.stderr));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_ends_a_training_with_everything_saved() {
    let daemon = Daemon::start(&["--batch-size", "8", "--max-images", "16"]);
    let folder = tempfile::tempdir().unwrap();
    let trainer = distill(&daemon.grpc, folder.path(), &["--steps", "1000000"]);
    wait_for("a push", || daemon.metric("dreamfeed_pushes_total{outcome=\"accepted\"}").is_some());
    Command::new("kill").arg(trainer.id().to_string()).status().unwrap();
    let summary = summary(trainer);
    assert_eq!(summary["complete"], false);
    assert!(folder.path().join("student.safetensors").exists());
}

#[test]
fn evaluate_counts_what_the_network_gets_right() {
    let folder = tempfile::tempdir().unwrap();
    let model = write_teacher(folder.path());
    let data = folder.path().join("data.bin");
    // The network answers with one class for black pictures; labelled 0..9 exactly one of ten is right.
    let records: Vec<u8> = (0..10u8).flat_map(|class| std::iter::once(class).chain([0; 64])).collect();
    std::fs::write(&data, &records).unwrap();
    let run = |more: &[&str]| {
        let mut command = dreamfeed(&["evaluate", "--json", "--device", "cpu", "--model"]);
        command.arg(&model).arg("--data").arg(&data).args(more).output().unwrap()
    };
    let result: serde_json::Value = serde_json::from_str(&succeeded(run(&[]))).unwrap();
    assert_eq!(result, serde_json::json!({ "accuracy": 0.1, "count": 10 }));

    std::fs::write(&data, &records[1..]).unwrap();
    let error = text(&run(&[]).stderr);
    assert!(error.contains("649 bytes") && error.contains("65 bytes"), "{error}");
    let error = text(&run(&["--arch", "resnet9000"]).stderr);
    assert!(error.contains("resnet9000") && error.contains("resnet20"), "{error}");
}

#[test]
fn a_teacher_that_does_not_fit_is_refused_with_every_tensor_named() {
    let folder = tempfile::tempdir().unwrap();
    let mut tensors = network(ARCH, CHANNELS, CLASSES, 1);
    tensors.remove("layer1.0.bn2.running_var").unwrap();
    let extra = tensors["bn1.weight"].clone();
    tensors.insert("layer9.stray".into(), extra);
    let head = tensors.get_mut("linear.bias").unwrap();
    head.1 = vec![1, 10];
    let path = folder.path().join("teacher.safetensors");
    std::fs::write(&path, file(&tensors, &[("arch", ARCH), ("mean", "0.5"), ("std", "0.25")])).unwrap();
    let output = dreamfeed(&["dream", "--teacher", path.to_str().unwrap()]).output().unwrap();
    let error = text(&output.stderr);
    assert!(!output.status.success());
    for part in ["missing: layer1.0.bn2.running_var", "extra: layer9.stray", "linear.bias is [1, 10], expected [10]"]
    {
        assert!(error.contains(part), "{part:?} is not in {error}");
    }
}

#[test]
fn an_odd_teacher_is_refused_at_the_start_wherever_it_is_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("odd.safetensors");
    let write = |statistic: Option<(&str, f32)>, mean: &str, std: &str| {
        let mut tensors = network(ARCH, CHANNELS, CLASSES, 1);
        if let Some((name, value)) = statistic {
            tensors.get_mut(name).unwrap().2[4..8].copy_from_slice(&value.to_le_bytes());
        }
        std::fs::write(&path, file(&tensors, &[("arch", ARCH), ("mean", mean), ("std", std), ("image_size", "8,8")]))
            .unwrap();
    };
    let dream = |more: &[&str]| {
        let mut command = dreamfeed(&["dream", "--device", "cpu", "--threads", "1", "--targets", "3"]);
        command.args(ADI).arg("--teacher").arg(&path).args(more).output().unwrap()
    };
    let refused = |parts: &[&str]| {
        let data = folder.path().join("data.bin");
        std::fs::write(&data, [0; 65]).unwrap();
        let mut evaluate = dreamfeed(&["evaluate", "--device", "cpu", "--model"]);
        let evaluate = evaluate.arg(&path).arg("--data").arg(&data).output().unwrap();
        let mut serve = serve_command(folder.path(), &["--teacher", path.to_str().unwrap()]);
        for (tool, output) in [("dream", dream(&[])), ("evaluate", evaluate), ("serve", serve.output().unwrap())] {
            let error = text(&output.stderr);
            assert!(!output.status.success(), "{tool}: {error}");
            assert!(parts.iter().all(|part| error.contains(part)), "{tool}: {parts:?} are not all in {error}");
        }
    };
    for (name, value, parts) in [
        ("bn1.running_var", -1.0, ["element 1 is -1", "never negative"]),
        ("layer1.0.bn2.running_var", 2e12, ["element 1 is 1999999991808", "at most 1000000000000"]),
        ("layer3.0.bn1.running_mean", -2e6, ["element 1 is -2000000", "at most 1000000"]),
    ] {
        write(Some((name, value)), "0.5", "0.25");
        refused(&[name, parts[0], parts[1]]);
    }
    for (mean, std) in [("123.675", "0.25"), ("-2", "0.25"), ("0.5", "58.4")] {
        write(None, mean, std);
        refused(&[mean, std, "units of pixel / 255"]);
    }
    // What is wrong in the file is put right by flags, and the largest plausible numbers are taken.
    succeeded(dream(&["--mean", "0.5", "--std", "0.25"]));
    write(Some(("layer1.0.bn2.running_var", 1e12)), "-1", "1");
    succeeded(dream(&[]));
}

#[test]
fn dream_makes_images_and_a_grid_that_a_seed_decides() {
    let folder = tempfile::tempdir().unwrap();
    let teacher = write_teacher(folder.path());
    let run = |seed: &str, grid: &Path| {
        let mut command = dreamfeed(&["dream", "--json", "--device", "cpu", "--threads", "1", "--teacher"]);
        command.arg(&teacher).args(ADI).args(["--seed", seed, "--targets", "3,4", "--grid"]).arg(grid);
        let report: serde_json::Value = serde_json::from_str(&succeeded(command.output().unwrap())).unwrap();
        assert_eq!(report["images"], 8);
        std::fs::read(grid).unwrap()
    };
    let path = |name: &str| folder.path().join(name);
    let (one, same, other) = (run("1", &path("a.png")), run("1", &path("b.png")), run("2", &path("c.png")));
    assert!(one.starts_with(b"\x89PNG"));
    assert_eq!(one, same);
    assert_ne!(one, other);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trainer_that_is_refused_keeps_what_it_learned_and_says_why() {
    let daemon = Daemon::start(&["--batch-size", "8", "--max-images", "16", "--max-student-bytes", "1KiB"]);
    let folder = tempfile::tempdir().unwrap();
    let output = distill(&daemon.grpc, folder.path(), &["--steps", "1000000"]).wait_with_output().unwrap();
    assert!(!output.status.success());
    assert!(text(&output.stderr).contains("1024"), "{}", text(&output.stderr));
    assert!(folder.path().join("student.safetensors").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trainer_goes_on_with_a_fetched_student_that_knows_more_classes() {
    let daemon = Daemon::start(&["--batch-size", "8", "--max-images", "16"]);
    let wide = file(&network(ARCH, CHANNELS, CLASSES + 2, 5), &[]);
    daemon.client().await.push_student(ARCH, wide, 0, None).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let summary = summary(distill(&daemon.grpc, folder.path(), &["--steps", "3", "--fetch"]));
    assert_eq!(summary["steps"], 3);
    let student = daemon.client().await.fetch_student(0).await.unwrap().unwrap();
    assert_eq!(student.header.num_classes as usize, CLASSES + 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_push_and_the_final_one_are_one_version() {
    let daemon = Daemon::start(&["--batch-size", "8", "--max-images", "16"]);
    let folder = tempfile::tempdir().unwrap();
    distill(&daemon.grpc, folder.path(), &["--steps", "2"]).wait_with_output().unwrap();
    assert_eq!(daemon.client().await.describe().await.unwrap().student.unwrap().version, 1);
}

#[test]
fn a_device_that_is_not_there_ends_the_daemon_at_the_start() {
    let folder = tempfile::tempdir().unwrap();
    let teacher = write_teacher(folder.path());
    let mut command = dreamfeed(&["serve", "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--teacher"]);
    let output = command.arg(teacher).args(["--device", "cuda:97"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(text(&output.stderr).contains("cuda:97"), "{}", text(&output.stderr));
}
