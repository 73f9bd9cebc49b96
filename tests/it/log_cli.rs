//! `dreamfeed log` from outside: the real binary on stores that the library made, sound ones and spoiled ones.

use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use dreamfeed::log::{Log, LogOptions, Maker, Retention};
use dreamfeed::model::checkpoint::hex;
use dreamfeed::model::source::Geometry;
use dreamfeed::storage::Storage;
use dreamfeed::students::{PushHeader, Requirements, StudentLimits, StudentStore};
use dreamfeed::synthesis::batch::DreamBatch;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

const GEOMETRY: Geometry = Geometry { channels: 1, height: 2, width: 4 };
const CLASSES: usize = 12;

/// Every image of the log differs from every other: its pixels spell its sequence.
fn batch(first: u64, count: usize) -> DreamBatch {
    let sequences = first..first + count as u64;
    DreamBatch {
        images: sequences.clone().flat_map(u64::to_le_bytes).collect(),
        labels: sequences.clone().map(|s| s as i64 % CLASSES as i64).collect(),
        teacher_logits: sequences
            .clone()
            .flat_map(|s| (0..CLASSES).map(move |k| s as f32 + 0.1 * k as f32))
            .collect(),
        student_version: sequences.clone().map(|s| s as i64 / 3).collect(),
        competition: sequences.map(|s| s as f32 / 100.0).collect(),
        geometry: GEOMETRY,
        num_classes: CLASSES,
        synthesizer: "noise",
        settings: "{}".into(),
        created_at: SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123),
    }
}

/// A store on disk.
struct Store {
    folder: TempDir,
}

impl Store {
    /// With chunks of four images each.
    fn made(chunks: usize, retention: Retention) -> Self {
        let this = Self { folder: tempfile::tempdir().unwrap() };
        this.append(chunks, retention);
        this
    }

    fn whole(chunks: usize) -> Self {
        Self::made(chunks, Retention::default())
    }

    fn append(&self, chunks: usize, retention: Retention) {
        run(async {
            let options = LogOptions { retention, cache_bytes: 1 << 20 };
            let maker = Maker { teacher_sha256: "ab".repeat(32), geometry: GEOMETRY, num_classes: CLASSES };
            let log = Log::open(self.storage(), options, maker).await.unwrap();
            for _ in 0..chunks {
                let next = log.extent().next_sequence;
                log.append(&Arc::new(batch(next, 4))).await.unwrap();
                log.retain().await.unwrap();
            }
        });
    }

    fn push_student(&self) {
        run(async {
            let requirements =
                Requirements { num_classes: crate::support::CLASSES, in_channels: crate::support::CHANNELS };
            let limits = StudentLimits {
                max_bytes: 1 << 24,
                max_classes: 100,
                max_pushes: 1,
                kept_versions: 4,
                idle_timeout: crate::support::LONG,
                push_timeout: crate::support::LONG,
            };
            let store = StudentStore::open(self.storage(), requirements, limits).await.unwrap();
            let file = crate::support::student(1);
            let header = PushHeader {
                arch: crate::support::ARCH.into(),
                byte_length: file.len() as u64,
                sha256: Sha256::digest(&file).into(),
                trainer_step: 1,
                replaces_version: None,
            };
            let mut push = store.slot().unwrap().begin(header).unwrap();
            push.write(&file).unwrap();
            assert_eq!(push.finish().await.unwrap().student.version, 1);
        });
    }

    fn storage(&self) -> Storage {
        Storage::open(self.path().to_str().unwrap()).unwrap()
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("store")
    }

    fn chunk(&self, first: u64) -> PathBuf {
        self.path().join(format!("log/chunks/{first:020}.safetensors"))
    }

    /// Flips a bit of a file, counted from its end where `at` is negative.
    fn spoil(&self, path: &Path, at: isize) {
        let mut bytes = std::fs::read(path).unwrap();
        let at = if at < 0 { bytes.len() - at.unsigned_abs() } else { at as usize };
        bytes[at] ^= 1;
        std::fs::write(path, bytes).unwrap();
    }

    /// Every file in it.
    fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        files(&self.path())
    }

    /// Runs `dreamfeed log WHAT --store HERE`, which changes nothing.
    fn log(&self, arguments: &[&str]) -> Output {
        let before = self.files();
        let output = dreamfeed_log(arguments, &self.path()).output().unwrap();
        assert_eq!(self.files(), before, "the store was changed");
        output
    }

    /// The exit code and the report of `verify --json`.
    fn verify(&self) -> (i32, Value) {
        let output = self.log(&["verify", "--json"]);
        (output.status.code().unwrap(), serde_json::from_slice(&output.stdout).unwrap())
    }

    /// Kind, first sequence and end of everything that `verify` finds.
    fn findings(&self) -> (i32, Vec<Value>) {
        let (code, report) = self.verify();
        assert_eq!(report["sound"], code == 0, "{report}");
        let findings = report["findings"].as_array().unwrap();
        let short = |f: &Value| json!([f["kind"], f["first_sequence"], f["end"]]);
        (code, findings.iter().map(short).collect())
    }

    fn export(&self, format: &str, arguments: &[&str]) -> (Output, PathBuf) {
        self.export_to(format, format, arguments)
    }

    fn export_to(&self, name: &str, format: &str, arguments: &[&str]) -> (Output, PathBuf) {
        let out = self.folder.path().join(name);
        let fixed = ["export", "--format", format, "--out", out.to_str().unwrap()];
        (self.log(&[&fixed, arguments].concat()), out)
    }
}

fn dreamfeed_log(arguments: &[&str], store: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dreamfeed"));
    command.arg("log").args(arguments).arg("--store").arg(store);
    command
}

fn files(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut all = BTreeMap::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            all.extend(files(&path));
        } else {
            all.insert(path.clone(), std::fs::read(path).unwrap());
        }
    }
    all
}

fn run<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// It failed with one sentence, which holds these words.
fn assert_fails(output: &Output, code: i32, words: &[&str]) {
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{error}");
    assert!(words.iter().all(|word| error.contains(word)), "{words:?} in {error}");
    assert!(error.starts_with("error: ") && error.trim_end().lines().count() == 1, "{error}");
}

fn pixels(png: &[u8]) -> u64 {
    let mut reader = png::Decoder::new(std::io::Cursor::new(png)).read_info().unwrap();
    let mut pixels = vec![0; reader.output_buffer_size().unwrap()];
    let info = reader.next_frame(&mut pixels).unwrap();
    assert_eq!((info.width, info.height, info.color_type), (4, 2, png::ColorType::Grayscale));
    u64::from_le_bytes(pixels.try_into().unwrap())
}

#[test]
fn ls_lists_the_chunks() {
    let store = Store::whole(3);
    let output = store.log(&["ls", "--json"]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["images"], &report["log"]["num_classes"]), (&json!(12), &json!(CLASSES)));
    let chunks = report["chunks"].as_array().unwrap();
    let firsts: Vec<_> = chunks.iter().map(|chunk| chunk["first_sequence"].as_u64().unwrap()).collect();
    assert_eq!(firsts, [0, 4, 8]);
    assert_eq!(chunks[1]["bytes"], std::fs::metadata(store.chunk(4)).unwrap().len());
    assert_eq!(chunks[1]["student_versions"], json!([1, 2]));
    assert_eq!(chunks[1]["created_at"], "2023-11-14T22:13:20.123Z");
    let lines = text(&store.log(&["ls"]).stdout);
    assert_eq!(lines.lines().count(), 6, "{lines}");
    assert!(lines.contains("3 chunks with 12 images, of images 0 to 11"), "{lines}");
}

#[test]
fn a_whole_store_is_sound() {
    let store = Store::whole(4);
    store.push_student();
    let (code, report) = store.verify();
    assert_eq!((code, &report["findings"], &report["sound_students"]), (0, &json!([]), &json!([1])), "{report}");
    let output = store.log(&["verify"]);
    assert!(output.status.success() && text(&output.stdout).contains("nothing is wrong"), "{output:?}");
}

#[test]
fn every_kind_of_damage_is_found_and_named() {
    let store = Store::whole(6);
    store.push_student();
    store.spoil(&store.chunk(4), -1);
    store.spoil(&store.chunk(12), 9);
    let student = store.path().join("students/00000000000000000001.safetensors");
    store.spoil(&student, -1);
    std::fs::write(store.path().join("log/chunks/notes.txt"), "hello").unwrap();
    let (code, report) = store.verify();
    assert_eq!((code, &report["sound"], &report["problems"]), (1, &json!(false), &json!(4)), "{report}");
    let find = |kind: &str| {
        let found = report["findings"].as_array().unwrap().iter().find(|finding| finding["kind"] == kind);
        found.unwrap_or_else(|| panic!("no {kind} in {report}")).clone()
    };
    let checksum = find("checksum");
    assert_eq!((&checksum["first_sequence"], &checksum["end"]), (&json!(4), &json!(8)));
    assert!(checksum["message"].as_str().unwrap().contains("SHA-256"), "{checksum}");
    assert_eq!(find("header")["object"], "log/chunks/00000000000000000012.safetensors");
    assert_eq!(find("student")["object"], "students/00000000000000000001.safetensors");
    assert_eq!(find("strange")["object"], "log/chunks/notes.txt");
    let output = store.log(&["verify"]);
    let lines = text(&output.stdout);
    for word in ["checksum ", "header ", "student ", "strange ", "(images 4 to 7)", "4 problems"] {
        assert!(lines.contains(word), "{word} in {lines}");
    }
    assert_fails(&output, 1, &["is not sound: 4 problems"]);
    // What a daemon moves aside stays on the list.
    store.append(1, Retention::default());
    let (code, findings) = store.findings();
    assert!(code == 1 && findings.contains(&json!(["quarantined", 12, 16])), "{findings:?}");
}

#[test]
fn what_has_no_business_in_a_store_is_named_wherever_it_lies() {
    let store = Store::whole(2);
    store.push_student();
    let names = ["x/y", "notes.txt", "log/chunks/notes.txt#1", "log/other/z", "students.bak/1"];
    // Of a folder that is nobody's its name says all.
    let named = ["x/", "notes.txt", "log/chunks/notes.txt#1", "log/other/", "students.bak/"];
    let remains = "log/chunks/00000000000000000024.safetensors#1";
    for name in names.iter().chain(&[remains]) {
        let path = store.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, "hello").unwrap();
    }
    let (code, report) = store.verify();
    let of_kind = |kind: &str| -> Vec<String> {
        let findings = report["findings"].as_array().unwrap().iter().filter(|finding| finding["kind"] == kind);
        findings.map(|finding| finding["object"].as_str().unwrap().to_owned()).collect()
    };
    let mut strange = of_kind("strange");
    strange.sort();
    let mut expected = named.map(str::to_owned);
    expected.sort();
    assert_eq!((code, strange, &report["problems"]), (1, expected.to_vec(), &json!(5)));
    // Nothing is wrong with a put that was broken off.
    assert_eq!(of_kind("remains"), [remains]);
    for name in named {
        let path = store.path().join(name);
        if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) }.unwrap();
    }
    assert_eq!(store.verify().0, 0);
}

#[test]
fn a_newer_chunk_hides_nothing_else() {
    let store = Store::whole(4);
    let format = b"dreamfeed.chunk.v1";
    let bytes = std::fs::read(store.chunk(4)).unwrap();
    let at = bytes.windows(format.len()).position(|window| window == format).unwrap();
    store.spoil(&store.chunk(4), (at + format.len() - 1) as isize);
    store.spoil(&store.chunk(8), -1);
    assert_eq!(store.findings(), (1, vec![json!(["header", 4, 8]), json!(["checksum", 8, 12])]));
}

#[test]
fn one_lost_chunk_is_a_gap_wherever_it_was() {
    for lost in [0, 8] {
        let store = Store::whole(4);
        std::fs::remove_file(store.chunk(lost)).unwrap();
        assert_eq!(store.findings(), (1, vec![json!(["gap", lost, lost + 4])]));
    }
}

#[test]
fn what_retention_evicted_is_a_note_and_a_loss_beside_it_is_not() {
    // Images 0 to 7 are the seed set in whole chunks; three chunks more fit.
    let retention = Retention { max_images: Some(20), seed_images: 5, ..Retention::default() };
    let store = Store::made(8, retention);
    assert_eq!(store.findings(), (0, vec![json!(["evicted", 8, 20])]));
    store.append(1, retention);
    assert_eq!(store.findings(), (0, vec![json!(["evicted", 8, 24])]));
    let evicted = store.path().join("log/evicted");
    assert_eq!(std::fs::read_dir(&evicted).unwrap().count(), 1, "records that touch are one");
    std::fs::remove_file(store.chunk(28)).unwrap();
    assert_eq!(store.findings(), (1, vec![json!(["evicted", 8, 24]), json!(["gap", 28, 32])]));
    std::fs::remove_file(store.chunk(24)).unwrap();
    std::fs::remove_file(store.chunk(4)).unwrap();
    let expected = vec![json!(["gap", 4, 8]), json!(["evicted", 8, 24]), json!(["gap", 24, 32])];
    assert_eq!(store.findings(), (1, expected));

    let store = Store::made(5, Retention { max_images: Some(8), ..Retention::default() });
    assert_eq!(store.findings(), (0, vec![json!(["evicted", 0, 12])]));
}

#[test]
fn an_overlap_and_a_chunk_of_another_log_are_found() {
    // Of a log in which chunks begin elsewhere.
    let (store, other) = (Store::whole(4), Store::made(1, Retention::default()));
    let id = |store: &Store| {
        let json: Value = serde_json::from_slice(&std::fs::read(store.path().join("log/log.json")).unwrap()).unwrap();
        json["log_id"].as_str().unwrap().to_owned()
    };
    let (ours, theirs) = (id(&store), id(&other));
    let bytes = std::fs::read(store.chunk(4)).unwrap();
    let replaced = |from: &str, to: &str| {
        assert_eq!(from.len(), to.len());
        let at = bytes.windows(from.len()).position(|window| window == from.as_bytes()).unwrap();
        let mut bytes = bytes.clone();
        bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
        bytes
    };
    std::fs::write(store.chunk(6), replaced(r#""first_sequence":"4""#, r#""first_sequence":"6""#)).unwrap();
    assert_eq!(store.findings(), (1, vec![json!(["overlap", 6, 8]), json!(["overlap", 8, 10])]));
    assert!(text(&store.export("folder", &[]).0.stdout).starts_with("16 images"), "each sequence once");
    std::fs::remove_file(store.chunk(6)).unwrap();
    std::fs::write(store.chunk(4), replaced(&ours, &theirs)).unwrap();
    assert_eq!(store.findings(), (1, vec![json!(["foreign", 4, 8])]));
}

/// An image of a class that the teacher does not have, in a chunk whose checksum is right.
fn misclassify(path: &Path) {
    let mut bytes = std::fs::read(path).unwrap();
    let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let digest = |bytes: &[u8]| hex(&Sha256::digest(&bytes[data..]));
    let old = digest(&bytes);
    // Labels come first.
    bytes[data..data + 8].copy_from_slice(&(CLASSES as i64).to_le_bytes());
    let new = digest(&bytes);
    let at = bytes.windows(old.len()).position(|window| window == old.as_bytes()).unwrap();
    bytes[at..at + new.len()].copy_from_slice(new.as_bytes());
    std::fs::write(path, bytes).unwrap();
}

#[test]
fn an_image_of_an_impossible_class_is_damage() {
    let store = Store::whole(4);
    misclassify(&store.chunk(8));
    assert_eq!(store.findings(), (1, vec![json!(["header", 8, 12])]));
    for format in ["folder", "webdataset", "parquet"] {
        let (output, out) = store.export(format, &[]);
        assert_eq!(output.status.code(), Some(1));
        let error = text(&output.stderr);
        assert!(error.contains("left out log/chunks/00000000000000000008") && error.contains("class 12"), "{error}");
        assert!(text(&output.stdout).starts_with("12 images"), "{output:?}");
        assert!(files(&out).keys().all(|path| !path.to_str().unwrap().ends_with(".partial")));
    }
}

#[test]
fn show_prints_a_chunk_and_draws_it() {
    let store = Store::whole(3);
    let grid = store.folder.path().join("made/grid.png");
    let output = store.log(&["show", "6", "--json", "--grid", grid.to_str().unwrap()]);
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&report["first_sequence"], &report["count"]), (&json!(4), &json!(4)));
    assert_eq!(report["metadata"]["format"], "dreamfeed.chunk.v1");
    assert_eq!((&report["image"]["label"], &report["image"]["student_version"]), (&json!(6), &json!(2)));
    assert_eq!(report["classes"], json!({ "4": 1, "5": 1, "6": 1, "7": 1 }));
    assert!(std::fs::read(&grid).unwrap().starts_with(b"\x89PNG"));
    let lines = text(&store.log(&["show", "6"]).stdout);
    assert!(lines.contains("images 4 to 7") && lines.contains("data_sha256"), "{lines}");

    assert_fails(&store.log(&["show", "12"]), 1, &["no chunk holds image 12", "verify"]);
    store.spoil(&store.chunk(4), -1);
    assert_fails(&store.log(&["show", "6"]), 1, &["00000000000000000004", "SHA-256"]);
}

#[test]
fn a_folder_has_every_image_in_its_class() {
    let store = Store::whole(4);
    let (output, out) = store.export("folder", &[]);
    assert!(output.status.success() && text(&output.stdout).starts_with("16 images in 17 files"), "{output:?}");
    let files = files(&out);
    assert_eq!(files.len(), 17);
    let metadata = text(&files[&out.join("metadata.jsonl")]);
    for (sequence, line) in metadata.lines().enumerate() {
        let line: Value = serde_json::from_str(line).unwrap();
        let name = format!("{:02}/{sequence:020}.png", sequence % CLASSES);
        assert_eq!((&line["file_name"], &line["sequence"]), (&json!(name), &json!(sequence)));
        assert_eq!(pixels(&files[&out.join(&name)]), sequence as u64);
        let logits: Vec<f32> = serde_json::from_value(line["teacher_logits"].clone()).unwrap();
        assert_eq!(logits, batch(sequence as u64, 1).teacher_logits);
    }
    assert_eq!(metadata.lines().count(), 16);
    // A reader that numbers the folders has the classes right, also where some are empty.
    let (_, some) = store.export_to("some", "folder", &["--classes", "3"]);
    let mut folders: Vec<_> = std::fs::read_dir(&some).unwrap().map(|entry| entry.unwrap().path()).collect();
    folders.retain(|path| path.is_dir());
    folders.sort();
    assert_eq!(folders, (0..CLASSES).map(|class| some.join(format!("{class:02}"))).collect::<Vec<_>>());
}

#[test]
fn an_export_takes_what_is_asked_for_in_shards() {
    let store = Store::whole(6);
    let flags = ["--from", "2", "--to", "23", "--classes", "1,2,10,11", "--shard-images", "3"];
    let (output, out) = store.export("webdataset", &flags);
    // 2, 10, 11, 13, 14, 22: 1 lies before, 23 is the end.
    assert!(text(&output.stdout).starts_with("6 images in 2 files"), "{output:?}");
    let mut samples = Vec::new();
    for shard in ["dreams-000000.tar", "dreams-000001.tar"] {
        let mut archive = tar::Archive::new(std::fs::File::open(out.join(shard)).unwrap());
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            let name = entry.path().unwrap().to_str().unwrap().to_owned();
            let mut bytes = Vec::new();
            entry.read_to_end(&mut bytes).unwrap();
            samples.push((name, bytes));
        }
    }
    assert_eq!(files(&out).len(), 2);
    let samples: Vec<_> = samples.chunks(3).collect();
    assert_eq!(samples.len(), 6);
    for (sample, sequence) in samples.iter().zip([2u64, 10, 11, 13, 14, 22]) {
        let names: Vec<_> = sample.iter().map(|(name, _)| name.clone()).collect();
        assert_eq!(names, ["png", "cls", "json"].map(|kind| format!("{sequence:020}.{kind}")));
        assert_eq!(pixels(&sample[0].1), sequence);
        assert_eq!(text(&sample[1].1), (sequence % CLASSES as u64).to_string());
        let record: Value = serde_json::from_slice(&sample[2].1).unwrap();
        assert_eq!(record["sequence"], sequence);
    }
}

#[test]
fn an_export_leaves_damage_out_and_says_so() {
    let store = Store::whole(4);
    store.spoil(&store.chunk(8), -1);
    for format in ["folder", "webdataset", "parquet"] {
        let (output, out) = store.export(format, &[]);
        assert_eq!(output.status.code(), Some(1));
        assert!(text(&output.stdout).starts_with("12 images"), "{output:?}");
        let error = text(&output.stderr);
        assert!(error.contains("left out log/chunks/00000000000000000008"), "{error}");
        assert!(error.contains("error: 1 damaged chunk could not be exported"), "{error}");
        assert!(files(&out).keys().all(|path| !path.to_str().unwrap().ends_with(".partial")));
    }
}

#[test]
fn an_export_overwrites_nothing() {
    let store = Store::whole(1);
    let out = store.folder.path().join("parquet");
    std::fs::create_dir(&out).unwrap();
    std::fs::write(out.join("mine"), "precious").unwrap();
    let (output, _) = store.export("parquet", &[]);
    assert_fails(&output, 1, &["is not empty", "--out"]);
    assert_eq!(files(&out).len(), 1);
}

#[test]
fn mistakes_are_told_in_one_sentence() {
    let store = Store::whole(1);
    let nowhere = store.folder.path().join("nowhere");
    let output = dreamfeed_log(&["ls"], &nowhere).output().unwrap();
    assert_fails(&output, 1, &["nowhere", "there is no such folder"]);
    assert!(!nowhere.exists());
    let output = dreamfeed_log(&["verify"], store.folder.path()).output().unwrap();
    assert_fails(&output, 1, &["there is no log in", "--store"]);
    assert_fails(&store.export("folder", &["--classes", "3,12"]).0, 1, &["there is no class 12", "0 to 11"]);
    let (output, out) = store.export("folder", &["--from", "4"]);
    assert_fails(&output, 1, &["no image that was asked for"]);
    assert!(output.stdout.is_empty(), "{output:?}");
    assert!(!out.exists());
    assert_fails(&store.export("folder", &["--shard-images", "4"]).0, 2, &["--shard-images"]);
    assert_fails(&store.export("parquet", &["--from", "4", "--to", "4"]).0, 2, &["--from 4", "--to 4"]);
    assert_eq!(store.log(&["show", "first"]).status.code(), Some(2));
    // Of a version to come: what it calls its fields is its business.
    std::fs::write(store.path().join("log/log.json"), r#"{"format":"dreamfeed.log.v9","id":"x"}"#).unwrap();
    assert_fails(&store.log(&["ls"]), 1, &["dreamfeed.log.v9", "use the version that wrote it"]);
    std::fs::write(store.path().join("log/log.json"), r#"{"format":"dreamfeed.log.v1","id":"x"}"#).unwrap();
    assert_fails(&store.log(&["ls"]), 1, &["log/log.json is damaged", "restore that file"]);
    assert_eq!(store.export("zip", &[]).0.status.code(), Some(2));
}

#[test]
fn a_closed_pipe_is_no_error() {
    let store = Store::whole(2);
    for what in [&["ls"][..], &["verify"], &["show", "0"]] {
        let mut child =
            dreamfeed_log(what, &store.path()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        drop(child.stdout.take());
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    }
}
