//! A daemon of the training's own: the teacher changes with each task, and a daemon keeps to the one that it began with.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde::Deserialize;

use crate::model::source::{NumberList, SourceOptions};

/// How long a daemon may take until it listens.
const START: Duration = Duration::from_secs(60);
/// How long it may take to drain.
const DRAIN: Duration = Duration::from_secs(15);

/// A `dreamfeed serve` of this same program; drained when this is dropped.
#[derive(Debug)]
pub(super) struct Daemon {
    child: Child,
    /// Its address.
    pub url: String,
    /// What it says.
    log: PathBuf,
}

#[derive(Deserialize)]
struct Ready {
    grpc: String,
}

impl Daemon {
    /// Starts it for a teacher, with its store and its log in `folder`.
    pub fn start(teacher: &Path, source: &SourceOptions, folder: &Path, flags: &[String]) -> anyhow::Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
        let (log, ready) = (folder.join("serve.log"), folder.join("serve.ready.json"));
        let _ = fs::remove_file(&ready);
        let output = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("serve").arg("--teacher").arg(teacher).arg("--store").arg(folder.join("store"));
        command.args(["--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--ready-file"]).arg(&ready);
        if let Some(arch) = &source.arch {
            command.args(["--arch", arch]);
        }
        for (flag, list) in [("--mean", &source.mean), ("--std", &source.std), ("--image-size", &source.image_size)] {
            if let Some(NumberList(values)) = list {
                let values: Vec<String> = values.iter().map(f32::to_string).collect();
                command.arg(flag).arg(values.join(","));
            }
        }
        command.args(flags).arg("--end-with-parent").stdout(output.try_clone()?).stderr(output);
        let child = command.spawn().context("cannot start the daemon")?;
        let mut daemon = Self { child, url: String::new(), log };
        let began = Instant::now();
        loop {
            daemon.check()?;
            let found = fs::read(&ready).ok().and_then(|text| serde_json::from_slice::<Ready>(&text).ok());
            if let Some(found) = found {
                daemon.url = format!("http://{}", found.grpc);
                return Ok(daemon);
            }
            if began.elapsed() > START {
                bail!("the daemon did not listen within {} s; {}", START.as_secs(), daemon.end_of_log());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// An error where it is not running any more.
    pub fn check(&mut self) -> anyhow::Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("the daemon ended ({status}); {}", self.end_of_log()),
        }
    }

    fn end_of_log(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let last = lines.get(lines.len().saturating_sub(5)..).unwrap_or_default();
        format!("{} ends: {}", self.log.display(), last.join(" / "))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let pid = i32::try_from(self.child.id()).ok().and_then(rustix::process::Pid::from_raw);
        let _ = pid.map(|pid| rustix::process::kill_process(pid, rustix::process::Signal::TERM));
        let began = Instant::now();
        while began.elapsed() < DRAIN {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
