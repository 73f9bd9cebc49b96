//! Class-incremental learning without the old data: the old network is the teacher, and its copy with a wider head learns
//! new classes from real pictures while dreams keep the old ones. Each task's result is the next one's teacher.

mod classes;
mod daemon;
mod options;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::bail;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tch::{Kind, Reduction, Tensor};

use crate::files::check_writable;
use crate::model::labelled::{Pictures, predict};
use crate::model::source::{NetworkSource, SourceOptions};
use crate::model::trainable::{Metadata, TrainableNetwork};
use crate::synthesis::Teacher;
use crate::trainers::dreams::Dreams;
use crate::trainers::feed::Snapshot;
use crate::trainers::loss::divergence;
use crate::trainers::outputs::Outputs;
use crate::trainers::sgd::{Sgd, half_cosine};
use classes::Classes;
use daemon::Daemon;

pub use options::{Method, Options, Source, Summary, Task};

/// Steps between two lines of progress.
const REPORT_EVERY: u64 = 50;
/// How long the own daemon may take until it answers.
const PATIENCE: Duration = Duration::from_secs(60);

/// Learns all tasks. Ends early, with the network of the task under way saved, once the flag is set that `listen` gives: it
/// is called when the first daemon was found, and until then a signal may simply end the process.
pub fn run(options: &Options, listen: impl FnOnce() -> anyhow::Result<Arc<AtomicBool>>) -> anyhow::Result<Summary> {
    let summary_path = options.out_dir.join("continual.json");
    check_writable(&summary_path)?;
    let mut model = Model { path: options.model.clone(), options: options.source.clone() };
    let mut source = model.open()?;
    let data = Pictures::open(&options.data, source.geometry)?;
    let test = options.test_data.as_ref().map(|path| Pictures::open(path, source.geometry)).transpose()?;
    check_names(options, &source, &data, test.as_ref())?;
    let mut classes = Classes::of(&source, &data);
    let tasks = classes.tasks(&options.tasks, &data, &options.data)?;
    if tasks.len() > 1 && options.method.dreams() && matches!(options.dreams, Source::Connect(..)) {
        bail!(
            "a daemon keeps to one teacher, and the second task has another; leave --connect out, and each task gets a \
             daemon of its own"
        );
    }
    for number in 1..=tasks.len() {
        let path = options.result(number);
        if path.exists() && path.canonicalize()? == options.model.canonicalize()? {
            bail!("{} is the model itself, and the result would replace it; give another --out-dir", path.display());
        }
    }
    tch::manual_seed(options.seed as i64);
    let mut rng = ChaCha8Rng::seed_from_u64(options.seed);
    let known = source.spec.num_classes;
    let before = test.as_ref().map(|test| {
        let teacher = Teacher::load(&source, options.device, Kind::Float);
        let (images, outputs) = classes.select(test, 0);
        let predicted = predict(&images, |pixels| teacher.network.logits(&teacher.pixels.normalize(pixels)));
        accuracy(&predicted, &outputs, 0, known)
    });
    let mut summary = Summary {
        method: options.method,
        before: before.flatten(),
        tasks: Vec::new(),
        complete: true,
        outputs: Outputs::default(),
    };
    let (mut listen, mut stop) = (Some(listen), Arc::new(AtomicBool::new(false)));
    for (number, task) in (1..).zip(&tasks) {
        let wider = classes.with(task);
        let first = source.spec.num_classes;
        let mut learning = Learning::begin(options, &model, &source, (number, &wider))?;
        if let Some(listen) = listen.take() {
            stop = listen()?;
        }
        let began = Instant::now();
        let (images, outputs) = wider.select(&data, first);
        // Whatever ends it early, what was learned is kept; then the error is told.
        let learned = learning.learn(&images, &outputs, &mut rng, &stop);
        learning.check()?;
        summary.complete = *learned.as_ref().unwrap_or(&false);
        if learning.step == 0 && !summary.complete {
            learned?;
            break;
        }
        let path = options.result(number);
        let snapshot = learning.snapshot();
        summary.outputs.write(Some(&path), || Ok(snapshot.file.to_vec()));
        let received = learning.end(snapshot);
        let measured = test.as_ref().map(|test| {
            let (images, outputs) = wider.select(test, 0);
            let predicted =
                predict(&images, |pixels| learning.network.logits(&learning.teacher.pixels.normalize(pixels)));
            let part = |from, to| accuracy(&predicted, &outputs, from, to);
            let all = wider.outputs.len();
            [part(0, first), part(first, all), part(0, all)]
        });
        let [old, new, all] = measured.unwrap_or_default();
        let task = Task {
            classes: task.clone(),
            old,
            new,
            all,
            steps: learning.step,
            images_received: received,
            wall_seconds: began.elapsed().as_secs_f64(),
            network: path.clone(),
        };
        eprintln!("continual: task {number}  {task}");
        summary.tasks.push(task);
        // The next task would need the network.
        summary.complete &= summary.outputs.check().is_ok();
        let text = serde_json::to_vec_pretty(&summary)?;
        summary.outputs.write(Some(&summary_path), || Ok(text));
        if let Err(error) = learned {
            summary.outputs.tell("continual");
            return Err(error);
        }
        if !summary.complete {
            break;
        }
        model = Model { path, options: SourceOptions::default() };
        source = model.open()?;
        classes = wider;
    }
    Ok(summary)
}

/// Whether classes can be told from what data, test data and model call them.
fn check_names(
    options: &Options,
    source: &NetworkSource,
    data: &Pictures,
    test: Option<&Pictures>,
) -> anyhow::Result<()> {
    if test.is_some_and(|test| test.names.is_some() != data.names.is_some()) {
        bail!("--data and --test-data name classes in different ways; give two CIFAR files or two image folders");
    }
    if data.names.is_some() && source.class_names.is_empty() && (test.is_some() || options.tasks.is_empty()) {
        bail!(
            "{} has no class_names in its metadata, so nobody can tell which folders are its classes; give it some, or name \
             the new classes with --task and leave --test-data out",
            options.model.display()
        );
    }
    Ok(())
}

/// A network's file, and how to read it.
struct Model {
    path: PathBuf,
    options: SourceOptions,
}

impl Model {
    fn open(&self) -> anyhow::Result<NetworkSource> {
        Ok(NetworkSource::open(&self.path, &self.options)?)
    }
}

/// The share of the pictures of the outputs `from..to` that were recognized; None where there are none.
fn accuracy(predicted: &Tensor, outputs: &Tensor, from: usize, to: usize) -> Option<f64> {
    let counted = outputs.ge(from as i64).logical_and(&outputs.lt(to as i64));
    let count = counted.sum(Kind::Int64).int64_value(&[]);
    let right = predicted.eq_tensor(outputs).logical_and(&counted).sum(Kind::Int64).int64_value(&[]);
    (count > 0).then(|| right as f64 / count as f64)
}

/// Dreams, and the daemon that makes them where it is our own.
struct Supply {
    dreams: Dreams,
    daemon: Option<Daemon>,
}

/// One task.
struct Learning<'a> {
    options: &'a Options,
    teacher: Teacher,
    /// The teacher's head, which ABD looks at features through.
    old: TrainableNetwork,
    /// Outputs of the teacher.
    known: i64,
    network: TrainableNetwork,
    metadata: Metadata,
    sgd: Sgd,
    supply: Option<Supply>,
    step: u64,
}

impl<'a> Learning<'a> {
    fn begin(
        options: &'a Options,
        model: &Model,
        source: &NetworkSource,
        (number, classes): (usize, &Classes),
    ) -> anyhow::Result<Self> {
        let supply = match (&options.dreams, options.method.dreams()) {
            (_, false) => None,
            (Source::Connect(url, patience), true) => Some((url.clone(), *patience, None)),
            (Source::Own(flags), true) => {
                // A store belongs to one teacher: another run's may lie beside it.
                let teacher: String = source.identity.chars().take(12).collect();
                let folder: &Path = &options.out_dir.join(format!("task-{number}-{teacher}"));
                let daemon = Daemon::start(&model.path, &model.options, folder, flags)?;
                Some((daemon.url.clone(), PATIENCE, Some(daemon)))
            }
        };
        let held = (options.min_images, options.buffer_images);
        let open = |(url, patience, daemon): (String, _, _)| {
            let dreams = Dreams::open("continual", &url, patience, (&model.path, source), held, options.device)?;
            Ok::<_, anyhow::Error>(Supply { dreams, daemon })
        };
        let supply = supply.map(open).transpose()?;
        let old = TrainableNetwork::load(&source.spec, &source.checkpoint, options.device);
        let (g, n) = (source.geometry, &source.normalization);
        let names = classes.names(source);
        Ok(Self {
            teacher: Teacher::load(source, options.device, Kind::Float),
            known: source.spec.num_classes as i64,
            network: old.widened(classes.outputs.len()),
            metadata: Metadata::new(source.spec.arch(), &n.mean, &n.std, [g.height, g.width], &names),
            old: old.frozen_copy(),
            sgd: Sgd::new(options.momentum, options.weight_decay),
            supply,
            step: 0,
            options,
        })
    }

    /// All steps; false where `stop` ended them.
    fn learn(
        &mut self,
        images: &Tensor,
        outputs: &Tensor,
        rng: &mut ChaCha8Rng,
        stop: &AtomicBool,
    ) -> anyhow::Result<bool> {
        let count = images.size()[0];
        let steps = self.options.steps;
        while self.step < steps {
            let dreams = loop {
                if stop.load(Ordering::Relaxed) {
                    return Ok(false);
                }
                let Some(supply) = &mut self.supply else { break None };
                if let Some(daemon) = &mut supply.daemon {
                    daemon.check()?;
                }
                if let Some(drawn) = supply.dreams.draw(self.options.dream_batch_size, rng)? {
                    break Some(self.options.augmentation.apply(&drawn.images, rng));
                }
            };
            let drawn: Vec<i64> = (0..self.options.batch_size).map(|_| rng.random_range(0..count)).collect();
            let drawn = Tensor::from_slice(&drawn);
            let device = self.options.device;
            let real = self.options.augmentation.apply(&images.index_select(0, &drawn).to_device(device), rng);
            let labels = outputs.index_select(0, &drawn).to_device(device);
            let loss = self.loss(&real, &labels, dreams.as_ref());
            loss.backward();
            let done = self.step as f64 / steps as f64;
            let rate = self.options.learning_rate * half_cosine(done);
            self.sgd.step(&self.network, rate);
            self.step += 1;
            if let Some(supply) = &self.supply
                && self.step.is_multiple_of(self.options.push_every.max(1))
            {
                self.check()?;
                supply.dreams.push(self.snapshot());
            }
            if self.step.is_multiple_of(REPORT_EVERY) {
                self.check()?;
                let loss = loss.double_value(&[]);
                eprintln!("continual: step {} of {steps}  loss {loss:.3}", self.step);
            }
        }
        Ok(true)
    }

    /// An error where the weights are not finite any more.
    fn check(&self) -> anyhow::Result<()> {
        if !self.network.is_finite() {
            bail!("the weights are not finite at step {}; a smaller --learning-rate would help", self.step);
        }
        Ok(())
    }

    /// The loss on u8 pixels: real ones with their outputs, and dreams where the method takes any.
    fn loss(&self, real: &Tensor, labels: &Tensor, dreams: Option<&Tensor>) -> Tensor {
        // One batch, so that batch norm sees old and new classes together.
        let both = dreams.map_or_else(|| real.shallow_clone(), |dreams| Tensor::cat(&[real, dreams], 0));
        let seen = self.teacher.pixels.normalize(&both);
        let features = self.network.features(&seen, self.options.statistics);
        let logits = self.network.classify(&features);
        let (n, all) = (real.size()[0], both.size()[0]);
        let known = self.known;
        let on_real = logits.narrow(0, 0, n);
        let teacher = || self.teacher.network.logits(&seen);
        let weight = self.options.teacher_weight;
        match self.options.method {
            Method::Finetune => on_real.cross_entropy_for_logits(labels),
            Method::LwfMc => {
                let new = on_real.size()[1] - known;
                let one_hot = (labels - known).one_hot(new).to_kind(Kind::Float);
                let wanted = Tensor::cat(&[teacher().sigmoid(), one_hot], 1);
                let none = None::<&Tensor>;
                on_real.binary_cross_entropy_with_logits(&wanted, none, none, Reduction::Sum) / n as f64
            }
            Method::Deepinversion => {
                let wanted = teacher();
                let t = self.options.temperature;
                let softened = |logits: &Tensor| (logits / t).log_softmax(1, None);
                // The teacher gives the new outputs no probability at all, so their terms are zero.
                let dreamed = softened(&logits.narrow(0, n, all - n)).narrow(1, 0, known);
                let on_dreams = divergence(&dreamed, &softened(&wanted.narrow(0, n, all - n)));
                let old = softened(&on_real.narrow(1, 0, known));
                let on_old = divergence(&old, &softened(&wanted.narrow(0, 0, n)));
                on_real.cross_entropy_for_logits(labels) + (on_dreams + on_old) * (weight * t * t)
            }
            Method::Abd => {
                let wanted = teacher();
                let local =
                    on_real.narrow(1, known, on_real.size()[1] - known).cross_entropy_for_logits(&(labels - known));
                let dreamed = wanted.narrow(0, n, all - n).argmax(1, false);
                let head = self.network.classify(&features.detach());
                let whole = head.cross_entropy_for_logits(&Tensor::cat(&[labels, &dreamed], 0));
                let kept = self.old.classify(&features).mse_loss(&wanted, Reduction::Mean);
                local + whole + kept * weight
            }
        }
    }

    fn snapshot(&self) -> Snapshot {
        let file = self.network.to_safetensors(&self.metadata);
        Snapshot { arch: self.network.spec().arch().to_owned(), file: file.into(), step: self.step }
    }

    /// Pushes the final network and ends the own daemon; how many dreams were received.
    fn end(&mut self, last: Snapshot) -> u64 {
        let Some(supply) = self.supply.take() else { return 0 };
        if self.step > 0 {
            supply.dreams.push_last(last);
        }
        supply.dreams.feed().stats().images.load(Ordering::Relaxed)
    }
}
