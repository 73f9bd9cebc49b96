//! Structured filter pruning without data: the channels that matter least to the loss on streamed dreams are removed, a few
//! at a time, while what is left learns from the whole network; then it goes on learning.
//!
//! What is left is really smaller: its tensors have fewer rows and columns, and it loads anywhere by its shapes.

mod importance;
mod options;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use anyhow::bail;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tch::{Kind, Tensor};

use crate::files::check_writable;
use crate::model::channels::{Place, stages, without};
use crate::model::labelled::{LabelledImages, Pictures};
use crate::model::network::FrozenNetwork;
use crate::model::source::NetworkSource;
use crate::model::spec::{NetworkSpec, Shortcut};
use crate::model::trainable::{Metadata, TrainableNetwork};
use crate::synthesis::Teacher;
use crate::trainers::dreams::Dreams;
use crate::trainers::feed::Snapshot;
use crate::trainers::loss::distillation_loss;
use crate::trainers::outputs::Outputs;
use crate::trainers::sgd::{Sgd, half_cosine};
use importance::Importance;

pub use options::{Condition, Images, Measure, Options, Summary};

/// Steps between two lines of progress.
const REPORT_EVERY: u64 = 50;

/// Prunes and fine-tunes. Ends early, with everything saved, once the flag is set that `listen` gives: it is called when the
/// daemon was found, and until then a signal may simply end the process.
pub fn run(options: &Options, listen: impl FnOnce() -> anyhow::Result<Arc<AtomicBool>>) -> anyhow::Result<Summary> {
    for path in [&options.out, &options.summary].into_iter().flatten() {
        check_writable(path)?;
    }
    let source = NetworkSource::open(&options.model, &options.source)?;
    let test = match &options.test_data {
        Some(path) => {
            let classes = (&source.class_names, source.spec.num_classes);
            Some(LabelledImages::open(path, source.geometry, classes.0, classes.1)?)
        }
        None => None,
    };
    tch::manual_seed(options.seed as i64);
    let supply = Supply::open(options, &source)?;
    let stop = listen()?;
    let network = TrainableNetwork::load(&source.spec, &source.checkpoint, options.device);
    let mut pruning = Pruning {
        teacher: Teacher::load(&source, options.device, Kind::Float),
        whole: Size::of(&source.spec, &source),
        importance: Importance::new(&source.spec),
        sgd: Sgd::new(options.momentum, options.weight_decay),
        rng: ChaCha8Rng::seed_from_u64(options.seed),
        step: 0,
        source,
        network,
        supply,
        options,
        test,
        stop: &stop,
    };
    let before = pruning.condition();
    eprintln!("prune: before  {before}");
    // Whatever ends it early, what was done is kept; then the error is told.
    let worked = pruning.remove();
    let pruned = pruning.condition();
    eprintln!("prune: pruned  {pruned}");
    let worked = worked.and_then(|()| pruning.fine_tune());
    let tuned = pruning.condition();
    eprintln!("prune: tuned   {tuned}");
    let summary = pruning.finish(before, pruned, tuned, worked.is_ok());
    if let (Err(_), Ok(summary)) = (&worked, &summary) {
        summary.outputs.tell("prune");
    }
    worked.and(summary)
}

/// What a target is measured in.
#[derive(Clone, Copy, Debug)]
struct Size {
    flops: u64,
    parameters: u64,
    filters: u64,
}

impl Size {
    fn of(spec: &NetworkSpec, source: &NetworkSource) -> Self {
        // A filter is one output channel of a convolution.
        let blocks = spec.blocks.iter().map(|block| {
            let projected = if block.shortcut == Shortcut::Projection { block.out_width } else { 0 };
            block.mid_width + block.out_width + projected
        });
        Self {
            flops: 2 * spec.multiply_adds(source.geometry.height, source.geometry.width),
            parameters: spec.num_parameters(),
            filters: (spec.stem_width + blocks.sum::<usize>()) as u64,
        }
    }

    fn by(self, measure: Measure) -> f64 {
        match measure {
            Measure::Flops => self.flops as f64,
            Measure::Parameters => self.parameters as f64,
            Measure::Filters => self.filters as f64,
        }
    }
}

/// Where images come from.
enum Supply {
    /// A daemon's stream.
    Stream(Box<Dreams>),
    /// Pictures in a file or a folder.
    File(Tensor),
}

impl Supply {
    fn open(options: &Options, source: &NetworkSource) -> anyhow::Result<Self> {
        let (url, patience) = match &options.images {
            Images::Stream { connect, patience } => (connect, *patience),
            Images::File(path) => {
                return Ok(Self::File(Pictures::unlabelled(path, source.geometry)?));
            }
        };
        let held = (options.min_images, options.buffer_images);
        let dreams = Dreams::open("prune", url, patience, (&options.model, source), held, options.device)?;
        Ok(Self::Stream(Box::new(dreams)))
    }
    /// u8 pixels for a step; None where there are not enough yet.
    fn draw(&mut self, options: &Options, rng: &mut ChaCha8Rng) -> anyhow::Result<Option<Tensor>> {
        match self {
            Self::File(pictures) => {
                let count = pictures.size()[0] as usize;
                let most = options.batch_size.min(count);
                let indices: Vec<i64> = rand::seq::index::sample(rng, count, most).iter().map(|i| i as i64).collect();
                Ok(Some(pictures.index_select(0, &Tensor::from_slice(&indices)).to_device(options.device)))
            }
            Self::Stream(dreams) => Ok(dreams.draw(options.batch_size, rng)?.map(|drawn| drawn.images)),
        }
    }
}

struct Pruning<'a> {
    options: &'a Options,
    source: NetworkSource,
    teacher: Teacher,
    network: TrainableNetwork,
    supply: Supply,
    test: Option<LabelledImages>,
    whole: Size,
    importance: Importance,
    sgd: Sgd,
    rng: ChaCha8Rng,
    step: u64,
    stop: &'a AtomicBool,
}

impl Pruning<'_> {
    /// One training step: KL to the teacher's logits on exactly the pixels that the network sees. The gradients that
    /// importance is made of are those of this step. False where the training must end.
    fn learn(&mut self, rate: f64, scored: bool) -> anyhow::Result<bool> {
        let images = loop {
            if self.stop.load(Ordering::Relaxed) {
                return Ok(false);
            }
            if let Some(images) = self.supply.draw(self.options, &mut self.rng)? {
                break images;
            }
        };
        let images = self.options.augmentation.apply(&images, &mut self.rng);
        let seen = self.teacher.pixels.normalize(&images);
        let wanted = self.teacher.network.logits(&seen);
        let loss = distillation_loss(&self.network.forward(&seen), &wanted, self.options.temperature);
        loss.backward();
        if scored {
            self.importance.accumulate(&self.network);
        }
        self.sgd.step(&self.network, rate);
        self.step += 1;
        if self.step.is_multiple_of(self.options.push_every.max(1)) {
            self.push();
        }
        if self.step.is_multiple_of(REPORT_EVERY) {
            let loss = loss.double_value(&[]);
            if !loss.is_finite() {
                bail!("the loss is not finite at step {}; a smaller --learning-rate would help", self.step);
            }
            let left = Size::of(self.network.spec(), &self.source).by(self.options.measure)
                / self.whole.by(self.options.measure);
            eprintln!(
                "prune: step {}  loss {loss:.3}  {:.1} % of the {} left",
                self.step,
                100.0 * left,
                self.options.measure.name()
            );
        }
        Ok(true)
    }

    /// Removes channels round by round until the target is reached.
    fn remove(&mut self) -> anyhow::Result<()> {
        let rounds = self.options.rounds.max(1);
        for round in 1..=rounds {
            for _ in 0..self.options.steps_per_round {
                if !self.learn(self.options.learning_rate, true)? {
                    return Ok(());
                }
            }
            // The same part of what was there at each round, so that the last rounds do not take the most.
            let left = (1.0 - self.options.remove).powf(f64::from(round) / f64::from(rounds));
            let most = left * self.whole.by(self.options.measure);
            let (source, measure) = (&self.source, self.options.measure);
            let costs = (self.options.latency_weight > 0.0).then(|| self.channel_times());
            let latency = costs.as_ref().map(|costs| (self.options.latency_weight, costs));
            let spec = self.network.spec().clone();
            let removed = self.importance.choose(&spec, latency, |left| Size::of(left, source).by(measure) <= most);
            let (smaller, kept) = without(&spec, &removed);
            self.network = self.network.shrunk(&smaller, &kept);
            self.sgd.shrink(&kept);
            self.importance.shrink(&smaller, &removed);
            self.push();
        }
        let left = Size::of(self.network.spec(), &self.source).by(self.options.measure);
        if left > (1.0 - self.options.remove) * self.whole.by(self.options.measure) * 1.01 {
            bail!(
                "only {:.1} % of the {} could be removed: every place keeps a tenth of its channels; give less to --{}",
                100.0 * (1.0 - left / self.whole.by(self.options.measure)),
                self.options.measure.name(),
                self.options.measure.name()
            );
        }
        Ok(())
    }

    fn fine_tune(&mut self) -> anyhow::Result<()> {
        let steps = self.options.fine_tune_steps;
        for step in 0..steps {
            let done = step as f64 / steps.max(1) as f64;
            let rate = self.options.learning_rate * half_cosine(done);
            if !self.learn(rate, false)? {
                break;
            }
        }
        Ok(())
    }

    fn snapshot(&self) -> Snapshot {
        let file = self.network.to_safetensors(&Metadata::like(&self.source));
        Snapshot { arch: self.network.spec().arch().to_owned(), file: file.into(), step: self.step }
    }

    fn push(&self) {
        if let Supply::Stream(dreams) = &self.supply {
            dreams.push(self.snapshot());
        }
    }

    /// The time of one channel at each place: that of the convolutions which make it and which read it, by their width.
    fn channel_times(&self) -> BTreeMap<Place, f64> {
        let _guard = tch::no_grad_guard();
        let spec = self.network.spec();
        let (mut height, mut width) = (self.source.geometry.height, self.source.geometry.width);
        let mut times: BTreeMap<Place, f64> = BTreeMap::new();
        let mut stage = 0;
        let batch = self.options.batch_size as i64;
        let mut convolution =
            |weight: &str, stride: usize, padding: i64, size: (usize, usize), from: Option<Place>, to: Place| {
                let Some(weight) = self.network.parameter(weight) else { return };
                let shape = weight.size();
                let x = Tensor::zeros(
                    [batch, shape[1], size.0 as i64, size.1 as i64],
                    (Kind::Float, self.options.device),
                );
                let work = || _ = x.conv2d(weight, None::<&Tensor>, [stride as i64; 2], [padding; 2], [1, 1], 1);
                let seconds = median_seconds(work, self.options.device);
                *times.entry(to).or_default() += seconds / shape[0] as f64;
                if let Some(from) = from {
                    *times.entry(from).or_default() += seconds / shape[1] as f64;
                }
            };
        convolution("conv1.weight", 1, 1, (height, width), None, Place::Stream(0));
        for (index, (block, next)) in spec.blocks.iter().zip(stages(spec)).enumerate() {
            let p = &block.prefix;
            let small = (height.div_ceil(block.stride), width.div_ceil(block.stride));
            let (from, inner, to) = (Place::Stream(stage), Place::Inner(index), Place::Stream(next));
            convolution(&format!("{p}.conv1.weight"), block.stride, 1, (height, width), Some(from), inner);
            convolution(&format!("{p}.conv2.weight"), 1, 1, small, Some(inner), to);
            if block.shortcut == Shortcut::Projection {
                let s = format!("{p}.{}.0.weight", spec.naming.shortcut);
                convolution(&s, block.stride, 0, (height, width), Some(from), to);
            }
            (height, width) = small;
            stage = next;
        }
        times
    }

    /// How large, fast and right the network is now.
    fn condition(&self) -> Condition {
        let size = Size::of(self.network.spec(), &self.source);
        let file = self.network.to_safetensors(&Metadata::like(&self.source));
        let frozen = crate::model::checkpoint::Checkpoint::parse(file.into()).ok().map(|checkpoint| {
            FrozenNetwork::load(self.network.spec(), &checkpoint, self.options.device, Kind::Float)
        });
        let g = self.source.geometry;
        let shape = [self.options.batch_size, g.channels, g.height, g.width].map(|d| d as i64);
        let x = Tensor::zeros(shape, (Kind::Float, self.options.device));
        let latency = frozen.as_ref().map(|frozen| median_seconds(|| _ = frozen.logits(&x), self.options.device));
        let accuracy = self.test.as_ref().map(|test| {
            test.accuracy(|pixels| {
                let pixels = pixels.to_device(self.options.device);
                self.network.logits(&self.teacher.pixels.normalize(&pixels))
            })
        });
        Condition {
            flops: size.flops,
            parameters: size.parameters,
            filters: size.filters,
            batch_seconds: latency.unwrap_or(f64::NAN),
            accuracy,
        }
    }

    fn finish(self, before: Condition, pruned: Condition, tuned: Condition, worked: bool) -> anyhow::Result<Summary> {
        if !self.network.is_finite() {
            bail!("the weights are not finite at step {}; a smaller --learning-rate would help", self.step);
        }
        let snapshot = self.snapshot();
        let mut outputs = Outputs::default();
        outputs.write(self.options.out.as_deref(), || Ok(snapshot.file.to_vec()));
        if let Supply::Stream(dreams) = &self.supply
            && self.step > 0
        {
            dreams.push_last(snapshot);
        }
        let complete = worked && !self.stop.load(Ordering::Relaxed);
        let mut summary = Summary { before, pruned, tuned, steps: self.step, complete, outputs: Outputs::default() };
        outputs.write(self.options.summary.as_deref(), || Ok(serde_json::to_vec_pretty(&summary)?));
        summary.outputs = outputs;
        Ok(summary)
    }
}

fn median_seconds(mut work: impl FnMut(), device: tch::Device) -> f64 {
    let mut seconds: Vec<f64> = (0..7)
        .map(|_| {
            let began = Instant::now();
            work();
            if let tch::Device::Cuda(index) = device {
                tch::Cuda::synchronize(index as i64);
            }
            began.elapsed().as_secs_f64()
        })
        .skip(2)
        .collect();
    seconds.sort_by(f64::total_cmp);
    seconds.get(seconds.len() / 2).copied().unwrap_or(f64::NAN)
}
