//! `dreamfeed continual`, from outside: every method, tasks one after another, and mistakes.

use std::path::Path;
use std::process::{Command, Output, Stdio};

use crate::support::{ARCH, CHANNELS, Daemon, file, network, write_teacher};
use dreamfeed::model::checkpoint::Checkpoint;
use dreamfeed::model::spec::NetworkSpec;

const PIXELS: usize = 64;

/// A teacher of four classes.
fn write_old(folder: &Path, names: &str) {
    let mut metadata = vec![("arch", ARCH), ("mean", "0.5"), ("std", "0.25"), ("image_size", "8,8")];
    if !names.is_empty() {
        metadata.push(("class_names", names));
    }
    std::fs::write(folder.join("old.safetensors"), file(&network(ARCH, CHANNELS, 4, 3), &metadata)).unwrap();
}

/// Pictures that can be told apart: each class has its own brightness. Eight of each.
fn write_pictures(folder: &Path, classes: u8) -> String {
    let record = |class: u8| std::iter::once(class).chain([class * 25 + 10; PIXELS]);
    let records: Vec<u8> = (0..8).flat_map(|_| (0..classes).flat_map(record)).collect();
    let path = folder.join("pictures.bin");
    std::fs::write(&path, records).unwrap();
    path.to_str().unwrap().to_owned()
}

fn command(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dreamfeed"));
    command.args(["continual", "--device", "cpu", "--threads", "1", "--json", "--augment", "none"]);
    command.args(["--batch-size", "8", "--dream-batch-size", "8", "--min-images", "8", "--push-every", "2"]);
    command.arg("--model").arg(folder.join("old.safetensors")).arg("--out-dir").arg(folder.join("out"));
    command
}

fn continual(folder: &Path, arguments: &[&str]) -> Output {
    command(folder).args(arguments).output().unwrap()
}

fn summary(output: Output) -> serde_json::Value {
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{errors}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn refused(output: Output, parts: &[&str]) {
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{errors}");
    assert!(parts.iter().all(|part| errors.contains(part)), "{parts:?} in {errors}");
}

#[test]
fn each_task_has_a_daemon_of_its_own_that_dreams_from_the_result_of_the_one_before() {
    let folder = tempfile::tempdir().unwrap();
    write_old(folder.path(), "");
    let data = write_pictures(folder.path(), 8);
    let serve = "--synthesizer noise --batch-size 8 --max-images 32 --threads 1 --device cpu";
    // Out of the data's order, so that outputs are not the data's numbers.
    let tasks = ["--task", "6,7", "--task", "4", "--steps", "6", "--serve", serve];
    let given = ["--data", &data, "--test-data", &data];
    let found = summary(continual(folder.path(), &[&tasks[..], &given].concat()));
    assert_eq!((&found["complete"], &found["method"]), (&true.into(), &"deepinversion".into()));
    let tasks = found["tasks"].as_array().unwrap();
    assert_eq!(tasks.len(), 2);
    for (task, outputs) in tasks.iter().zip([6, 7]) {
        let parts = ["old", "new", "all"].map(|part| task[part].as_f64().unwrap());
        assert!(parts.iter().all(|part| (0.0..=1.0).contains(part)), "{parts:?}");
        assert_eq!(task["steps"], 6);
        assert!(task["images_received"].as_u64().unwrap() >= 8);
        let network = Checkpoint::open(Path::new(task["network"].as_str().unwrap())).unwrap();
        assert_eq!(NetworkSpec::from_checkpoint(ARCH, &network).unwrap().num_classes, outputs);
    }
    // The second daemon's teacher is the first task's network, and the student that it holds is the second's.
    let first = Checkpoint::open(&folder.path().join("out/task-1.safetensors")).unwrap().identity();
    let own = folder.path().join(format!("out/task-2-{}", &first[..12]));
    let store = own.join("store");
    let chunks = std::fs::read_dir(store.join("log/chunks")).unwrap().map(|entry| entry.unwrap().path());
    for chunk in chunks {
        assert_eq!(Checkpoint::open(&chunk).unwrap().metadata()["teacher_sha256"], first);
    }
    assert!(std::fs::read_dir(store.join("students")).unwrap().count() > 0);
    // Both daemons are gone.
    assert!(!own.join("serve.ready.json").exists());

    // The network says which of the data's classes its outputs are.
    let evaluate = |data: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_dreamfeed"));
        command.args(["evaluate", "--json", "--device", "cpu", "--threads", "1", "--data", data, "--model"]);
        let output = command.arg(folder.path().join("out/task-2.safetensors")).output().unwrap();
        summary(output)["accuracy"].as_f64().unwrap()
    };
    // As it was measured in training: on the seven classes of eight that it knows.
    let known: Vec<u8> =
        std::fs::read(&data).unwrap().chunks(1 + PIXELS).filter(|r| r[0] != 5).flatten().copied().collect();
    let seven = folder.path().join("seven.bin");
    std::fs::write(&seven, known).unwrap();
    assert_eq!(evaluate(seven.to_str().unwrap()), tasks[1]["all"].as_f64().unwrap());

    // Another run in the same folder has other teachers, and so other stores.
    let again = [&["--task", "6,7", "--task", "4", "--steps", "7", "--serve", serve], &given[..]].concat();
    assert_eq!(summary(continual(folder.path(), &again))["complete"], true);

    // A later task goes on from the file.
    std::fs::rename(folder.path().join("out/task-2.safetensors"), folder.path().join("old.safetensors")).unwrap();
    let more = ["--method", "finetune", "--steps", "1", "--data", &data];
    assert_eq!(summary(continual(folder.path(), &more))["tasks"][0]["classes"], serde_json::json!(["5"]));
    refused(continual(folder.path(), &[&more[..], &["--task", "6"]].concat()), &["class \"6\" is known already"]);
    let twice = ["--task", "5", "--task", "5"];
    refused(continual(folder.path(), &[&more[..], &twice].concat()), &["class \"5\" is asked for twice"]);

    // What would replace the model itself is refused.
    std::fs::copy(folder.path().join("old.safetensors"), folder.path().join("out/task-1.safetensors")).unwrap();
    let result = folder.path().join("out/task-1.safetensors");
    std::fs::remove_file(folder.path().join("old.safetensors")).unwrap();
    std::os::unix::fs::symlink(&result, folder.path().join("old.safetensors")).unwrap();
    refused(continual(folder.path(), &more), &["is the model itself", "--out-dir"]);
}

#[test]
fn what_diverges_is_told_and_replaces_nothing() {
    let folder = tempfile::tempdir().unwrap();
    write_old(folder.path(), "");
    let data = write_pictures(folder.path(), 6);
    let given = ["--data", &data, "--method", "finetune", "--learning-rate"];
    summary(continual(folder.path(), &[&given[..], &["0.01", "--steps", "2"]].concat()));
    let good = std::fs::read(folder.path().join("out/task-1.safetensors")).unwrap();
    refused(continual(folder.path(), &[&given[..], &["1e30", "--steps", "8"]].concat()), &["--learning-rate"]);
    assert_eq!(std::fs::read(folder.path().join("out/task-1.safetensors")).unwrap(), good);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_dies_costs_nothing_that_was_learned() {
    let folder = tempfile::tempdir().unwrap();
    write_old(folder.path(), "");
    let data = write_pictures(folder.path(), 6);
    let serve = "--synthesizer noise --batch-size 8 --max-images 32 --threads 1 --device cpu";
    let given = ["--data", &data, "--steps", "1000000", "--serve", serve];
    let mut command = command(folder.path());
    command.args(given).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut trainer = command.spawn().unwrap();
    // Its own daemon has had a push: steps were made.
    let pushed = || {
        let own = std::fs::read_dir(folder.path().join("out")).ok()?.flatten();
        let own = own.map(|entry| entry.path()).find(|path| path.is_dir())?;
        std::fs::read_dir(own.join("store/students")).ok()?.next()?.ok()?;
        serde_json::from_slice::<serde_json::Value>(&std::fs::read(own.join("serve.ready.json")).ok()?).ok()
    };
    crate::support::wait_for("a push", || pushed().is_some());
    let pid = pushed().unwrap()["pid"].to_string();
    Command::new("kill").args(["-9", &pid]).status().unwrap();
    let status = trainer.wait().unwrap();
    assert_eq!(status.code(), Some(1));
    let written: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.path().join("out/continual.json")).unwrap()).unwrap();
    assert_eq!(written["complete"], false);
    assert!(written["tasks"][0]["steps"].as_u64().unwrap() > 0);
    assert!(folder.path().join("out/task-1.safetensors").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn with_a_daemon_that_is_there_the_wider_network_is_its_student() {
    let daemon = Daemon::start(&["--batch-size", "16", "--max-images", "32"]);
    let folder = tempfile::tempdir().unwrap();
    std::fs::rename(write_teacher(folder.path()), folder.path().join("old.safetensors")).unwrap();
    let data = write_pictures(folder.path(), 10);
    let mut bytes = std::fs::read(&data).unwrap();
    // Two classes more than the ten that the teacher knows.
    bytes.chunks_mut(1 + PIXELS).for_each(|record| record[0] += 2);
    std::fs::write(&data, bytes).unwrap();
    let grpc = format!("http://{}", daemon.grpc);
    let given = ["--connect", &grpc, "--data", &data, "--steps", "4"];
    for method in ["deepinversion", "abd"] {
        let found = summary(continual(folder.path(), &[&given[..], &["--method", method]].concat()));
        assert_eq!(found["tasks"][0]["classes"], serde_json::json!(["10", "11"]));
        let student = daemon.client().await.fetch_student(0).await.unwrap().unwrap();
        let written = Checkpoint::open(&folder.path().join("out/task-1.safetensors")).unwrap();
        assert_eq!(student.checkpoint.identity(), written.identity());
        assert_eq!(NetworkSpec::from_checkpoint(ARCH, &written).unwrap().num_classes, 12);
    }
    let tasks = ["--task", "10", "--task", "11"];
    refused(continual(folder.path(), &[&given[..], &tasks].concat()), &["leave --connect out"]);
}

#[test]
fn what_needs_no_dreams_needs_no_daemon_and_learns_only_the_new_classes() {
    let folder = tempfile::tempdir().unwrap();
    write_old(folder.path(), "");
    let data = write_pictures(folder.path(), 6);
    let given = ["--data", &data, "--test-data", &data, "--steps", "60", "--learning-rate", "0.05"];
    for method in ["finetune", "lwf-mc"] {
        let found = summary(continual(folder.path(), &[&given[..], &["--method", method]].concat()));
        let task = &found["tasks"][0];
        assert_eq!((&task["new"], &task["images_received"]), (&1.0.into(), &0.into()), "{method}: {task}");
    }
}

#[test]
fn image_folders_name_their_classes() {
    let folder = tempfile::tempdir().unwrap();
    write_old(folder.path(), r#"["ant","bee","cow","dog"]"#);
    let pictures = folder.path().join("pictures");
    for (index, class) in ["bee", "elk", "fox"].iter().enumerate() {
        std::fs::create_dir_all(pictures.join(class)).unwrap();
        for at in 0..4 {
            let image = image::GrayImage::from_pixel(10, 12, image::Luma([80 * index as u8 + 10]));
            image.save(pictures.join(class).join(format!("{at}.png"))).unwrap();
        }
    }
    let pictures = pictures.to_str().unwrap();
    let given = ["--data", pictures, "--test-data", pictures, "--method", "finetune", "--steps", "2"];
    let found = summary(continual(folder.path(), &given));
    assert_eq!(found["tasks"][0]["classes"], serde_json::json!(["elk", "fox"]));
    let network = Checkpoint::open(&folder.path().join("out/task-1.safetensors")).unwrap();
    assert_eq!(network.metadata()["class_names"], r#"["ant","bee","cow","dog","elk","fox"]"#);
    assert_eq!(found["tasks"][0]["old"].as_f64().map(|old| (0.0..=1.0).contains(&old)), Some(true));
    refused(continual(folder.path(), &[&given[..], &["--task", "gnu"]].concat()), &["no pictures of class \"gnu\""]);
    let data = write_pictures(folder.path(), 6);
    refused(
        continual(folder.path(), &["--data", pictures, "--test-data", &data, "--method", "finetune"]),
        &["name classes in different ways"],
    );
    write_old(folder.path(), "");
    refused(continual(folder.path(), &given), &["no class_names", "--task"]);
}

#[test]
fn a_daemon_that_does_not_start_is_told_with_what_it_said() {
    let folder = tempfile::tempdir().unwrap();
    write_old(folder.path(), "");
    let data = write_pictures(folder.path(), 6);
    let output = continual(folder.path(), &["--data", &data, "--serve", "--preset nonsense"]);
    refused(output, &["the daemon ended", "serve.log", "nonsense"]);
}
