//! Distillation: a student learns the teacher's logits on streamed dreams, and pushes its weights back.

mod options;
mod saved;
mod teacher;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::bail;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use tch::{Kind, Tensor};

use crate::files::{check_writable, write_whole};
use crate::grid;
use crate::model::labelled::LabelledImages;
use crate::model::pixels::Pixels;
use crate::model::spec::NetworkSpec;
use crate::model::trainable::TrainableNetwork;
use crate::synthesis::Teacher;
use crate::trainers::average::Average;
use crate::trainers::feed::{Feed, From, Snapshot};
use crate::trainers::hints::Hints;
use crate::trainers::outputs::Outputs;
use crate::trainers::progress::{Progress, State};
use crate::trainers::replay::ReplayBuffer;
use crate::trainers::sgd::{Sgd, half_cosine};

use saved::Saved;
use teacher::TeacherFacts;

pub use options::{Budget, Measurement, Options, Summary};

/// The share of a training over which the learning rate rises to its peak.
const WARMUP: f64 = 0.02;
/// Losses are averaged over this many steps, and read from the device as often.
const REPORT_EVERY: u64 = 10;
/// Of the blockwise loss, whose parts are below one: with it, the learning rate that suits the whole network suits its
/// segments.
const BLOCKWISE_WEIGHT: f64 = 10.0;
/// Images of a step on which the whole network is measured while its segments learn.
const AGREEMENT_IMAGES: i64 = 16;
/// How long to wait for a batch before looking around again.
const WAIT: Duration = Duration::from_millis(200);
/// Images in the PNG grid.
const GRID_IMAGES: usize = 60;

/// The learning rate's factor when a part `done` (0..1) of the training is over: linear warm-up, then half a cosine.
fn rate_factor(done: f64) -> f64 {
    if done < WARMUP {
        return done / WARMUP + 0.01;
    }
    half_cosine(((done - WARMUP) / (1.0 - WARMUP)).min(1.0))
}

/// Trains a student. Ends when the budget is used up, or, with everything saved, once `stop` is set.
/// `listen` is called once the daemon was found and gives the flag: until then a signal may simply end the process.
pub fn run(options: &Options, listen: impl FnOnce() -> anyhow::Result<Arc<AtomicBool>>) -> anyhow::Result<Summary> {
    // Now, and not after hours of training.
    for path in [&options.out, &options.checkpoint, &options.summary, &options.grid].into_iter().flatten() {
        check_writable(path)?;
    }
    let saved = options.checkpoint.as_deref().map(Saved::open).transpose()?.flatten();
    let held = options.buffer_images as u64;
    let from = saved.as_ref().map_or(From::Newest(held), |saved| saved.from(held));
    let feed = Feed::connect(&options.connect, options.patience, from)?;
    let facts = TeacherFacts::from(&feed)?;
    let test = match &options.test_data {
        Some(path) => Some(LabelledImages::open(path, facts.geometry, &facts.class_names, facts.num_classes)?),
        None => None,
    };
    let mut training = Training::start(options, saved, feed, facts, test)?;
    let stop = listen()?;
    let trained = training.go_on(&stop);
    // Whatever ended the training, what was learned is kept; then the error is told.
    let summary = training.finish(trained.is_ok() && !stop.load(Ordering::Relaxed));
    if let (Err(_), Ok(summary)) = (&trained, &summary) {
        summary.outputs.tell("distill");
    }
    trained.and(summary)
}

struct Training<'a> {
    options: &'a Options,
    feed: Feed,
    facts: TeacherFacts,
    test: Option<LabelledImages>,
    /// Where the teacher's own file was given: asked about exactly the pixels that the student sees.
    teacher: Option<Teacher>,
    /// Where feature maps are learned, too.
    hints: Option<Hints>,
    student: TrainableNetwork,
    average: Option<Average>,
    sgd: Sgd,
    pixels: Pixels,
    buffer: ReplayBuffer,
    rng: ChaCha8Rng,
    progress: Progress,
    began: Instant,
    /// Wall time of earlier parts of a resumed training.
    before: Duration,
    /// Wall time before the first step, which schedules do not count: nothing is trained while the daemon warms up.
    waited: Option<Duration>,
    /// Batches of this process, without those that only filled the buffer again.
    batches: u64,
    /// The sequence behind the last batch that was taken.
    position: u64,
    /// Steps made by this process, for pacing.
    own_steps: u64,
    state: State,
    accuracies: Vec<Measurement>,
    /// When to measure by the clock, soonest first.
    marks: VecDeque<Duration>,
    /// Sums since the last report: loss, agreement, steps.
    sums: (Tensor, Tensor, u64),
    shown: Vec<u8>,
}

impl<'a> Training<'a> {
    fn start(
        options: &'a Options,
        saved: Option<Saved>,
        feed: Feed,
        facts: TeacherFacts,
        test: Option<LabelledImages>,
    ) -> anyhow::Result<Self> {
        let device = options.device;
        tch::manual_seed(options.seed as i64);
        let arch = options.arch.as_ref().unwrap_or(&facts.arch);
        let spec = NetworkSpec::fresh(arch, facts.geometry.channels, facts.num_classes)?;
        let mut sgd = Sgd::new(options.momentum, options.weight_decay);
        let mut state = saved.as_ref().map(Saved::state).unwrap_or_default();
        let before = saved.as_ref().map(Saved::elapsed).unwrap_or_default();
        let fetched = if options.fetch && saved.is_none() { feed.fetch_student(options.patience)? } else { None };
        let student = if let Some(saved) = &saved {
            let (network, spec) = saved.network(options.arch.as_deref(), &facts)?;
            let student = TrainableNetwork::load(&spec, &network, device);
            sgd.load(&student, &saved.checkpoint);
            student
        } else if let Some(fetched) = &fetched {
            let arch = &fetched.header.arch;
            if options.arch.as_ref().is_some_and(|wanted| wanted != arch) {
                bail!(
                    "the daemon's newest student is a {arch}; leave --arch out to go on with it, or --fetch to start anew"
                );
            }
            let spec = NetworkSpec::from_checkpoint(arch, &fetched.checkpoint)?;
            eprintln!("distill: starting from student version {}", fetched.header.version);
            TrainableNetwork::load(&spec, &fetched.checkpoint, device)
        } else {
            TrainableNetwork::fresh(&spec, device)
        }
        .in_precision(options.precision);
        let teacher = options.teacher.as_deref().map(|path| facts.load(path, device)).transpose()?;
        let hints = |teacher: &Teacher| -> anyhow::Result<Hints> {
            let (student, teacher) = (student.spec(), teacher.network.spec());
            let hints = Hints::between(student, teacher)?;
            if options.blockwise > 0.0 {
                hints.check_apart(student, teacher)?;
            }
            Ok(hints)
        };
        // A student that has learned to be a network must not learn blocks again, whatever the new budget.
        let learns_blocks = if saved.is_some() { state.blockwise } else { fetched.is_none() };
        state.blockwise = learns_blocks && options.blockwise > 0.0;
        let hinted = options.hint_weight > 0.0 || options.blockwise > 0.0;
        let mut average = (options.ema > 0.0).then(|| Average::new(options.ema, &student));
        if let (Some(average), Some(saved)) = (&mut average, &saved) {
            average.load(&saved.checkpoint, state.step);
        }
        let mut marks: Vec<Duration> = options.eval_at.iter().copied().filter(|mark| *mark >= before).collect();
        marks.sort();
        let marks = marks.into();
        let g = facts.geometry;
        Ok(Self {
            pixels: Pixels::new(&facts.normalization, device, Kind::Float),
            buffer: ReplayBuffer::new(
                options.buffer_images,
                [g.channels, g.height, g.width],
                facts.num_classes,
                device,
            ),
            rng: ChaCha8Rng::seed_from_u64(options.seed),
            progress: Progress::new(state.consumed),
            began: Instant::now(),
            batches: 0,
            own_steps: 0,
            accuracies: Vec::new(),
            marks,
            sums: (Tensor::from(0f32).to_device(device), Tensor::from(0f32).to_device(device), 0),
            shown: Vec::new(),
            hints: teacher.as_ref().filter(|_| hinted).map(hints).transpose()?,
            teacher,
            position: feed.unseen_from(),
            options,
            feed,
            facts,
            test,
            student,
            average,
            sgd,
            before,
            waited: saved.as_ref().and_then(Saved::waited),
            state,
        })
    }

    fn go_on(&mut self, stop: &AtomicBool) -> anyhow::Result<()> {
        while !stop.load(Ordering::Relaxed) && self.done() < 1.0 {
            self.take_batches()?;
            if self.may_step() {
                self.step()?;
            } else {
                self.wait()?;
            }
            if self.marks.front().is_some_and(|mark| *mark <= self.elapsed()) {
                self.marks.pop_front();
                self.measure();
            }
        }
        Ok(())
    }

    fn elapsed(&self) -> Duration {
        self.before + self.began.elapsed()
    }

    /// The part of the budget that is used up, 0..1.
    fn done(&self) -> f64 {
        match self.options.budget {
            Budget::Steps(steps) => self.state.step as f64 / steps.max(1) as f64,
            Budget::Time(time) => self.elapsed().as_secs_f64() / time.as_secs_f64().max(1e-9),
        }
        .min(1.0)
    }

    /// The part of the training that is done, 0..1, as learning rate and blockwise phase count it: from the first step.
    fn trained(&self) -> f64 {
        match (self.options.budget, self.waited) {
            (Budget::Time(time), Some(waited)) => {
                let (elapsed, time) = (self.elapsed().saturating_sub(waited), time.saturating_sub(waited));
                (elapsed.as_secs_f64() / time.as_secs_f64().max(1e-9)).min(1.0)
            }
            (Budget::Time(_), None) => 0.0,
            (Budget::Steps(_), _) => self.done(),
        }
    }

    fn take(&mut self, batch: crate::client::Batch) -> anyhow::Result<()> {
        self.buffer.push(&batch)?;
        let end = batch.first_sequence + batch.count as u64;
        self.batches += u64::from(end > self.feed.unseen_from());
        // Batches that only fill the buffer again lie before it.
        self.position = self.position.max(end);
        let wanted = GRID_IMAGES * self.facts.geometry.pixels();
        if self.options.grid.is_some() {
            // The newest images: what the method makes against a student that has learned.
            let (pixels, _) = batch.images()?;
            self.shown.extend_from_slice(&pixels[..pixels.len().min(wanted)]);
            let surplus = self.shown.len().saturating_sub(wanted);
            self.shown.drain(..surplus);
        }
        Ok(())
    }

    fn take_batches(&mut self) -> anyhow::Result<()> {
        // Paced, what comes next waits until the steps for what is there are made, and the daemon may rest.
        while self.options.steps_per_batch.is_none() || !self.may_step() {
            let Some(batch) = self.feed.try_next()? else { break };
            self.take(batch)?;
        }
        Ok(())
    }

    fn may_step(&self) -> bool {
        let paced =
            self.options.steps_per_batch.is_none_or(|most| self.own_steps < most.saturating_mul(self.batches));
        self.buffer.len() >= self.options.min_images.max(1) && paced
    }

    fn wait(&mut self) -> anyhow::Result<()> {
        if let Some(batch) = self.feed.next(WAIT)? {
            self.take(batch)?;
        }
        self.show();
        Ok(())
    }

    fn step(&mut self) -> anyhow::Result<()> {
        self.waited = self.waited.or_else(|| Some(self.elapsed()));
        self.state.blockwise &= self.trained() < self.options.blockwise;
        let drawn = self.buffer.draw(self.options.batch_size, &mut self.rng);
        let images = self.options.augmentation.apply(&drawn.images, &mut self.rng);
        let seen = self.pixels.normalize(&images);
        let (loss, agrees) = self.loss(&seen, drawn.logits);
        loss.backward();
        let rate = self.options.learning_rate * rate_factor(self.trained());
        self.sgd.step(&self.student, rate);
        if let Some(average) = &mut self.average {
            average.update(&self.student);
        }
        {
            let _guard = tch::no_grad_guard();
            self.sums.0 += loss.detach();
            self.sums.1 += agrees;
            self.sums.2 += 1;
        }
        self.state.step += 1;
        self.own_steps += 1;
        self.state.consumed += self.options.batch_size as u64;
        let step = self.state.step;
        if step.is_multiple_of(REPORT_EVERY) {
            self.report()?;
        }
        if step.is_multiple_of(self.options.push_every.max(1)) {
            self.check()?;
            let snapshot = self.snapshot();
            self.feed.push(snapshot);
        }
        if step.is_multiple_of(self.options.eval_every) {
            self.measure();
        }
        if step.is_multiple_of(self.options.checkpoint_every) {
            self.check()?;
            self.save_checkpoint();
        }
        Ok(())
    }

    /// The loss of normalized images, with its gradient, and the part (0..1) of them on which the student agrees with the
    /// teacher. `came` are the teacher's logits as they came with the images.
    fn loss(&self, seen: &Tensor, came: Tensor) -> (Tensor, Tensor) {
        let options = self.options;
        // A student may know more classes than the teacher: it learns the teacher's from it.
        let known = |logits: Tensor| logits.narrow(1, 0, self.facts.num_classes as i64);
        let agrees = |logits: &Tensor, wanted: &Tensor| {
            tch::no_grad(|| logits.argmax(1, false).eq_tensor(&wanted.argmax(1, false)).mean(Kind::Float))
        };
        let between = |logits: &Tensor, wanted: &Tensor| options.loss.between(logits, wanted, options.temperature);
        let Some(teacher) = &self.teacher else {
            let logits = known(self.student.forward(seen));
            return (between(&logits, &came), agrees(&logits, &came));
        };
        let Some(hints) = &self.hints else {
            let (logits, wanted) = (known(self.student.forward(seen)), teacher.network.logits(seen));
            return (between(&logits, &wanted), agrees(&logits, &wanted));
        };
        let shown = teacher.network.forward(seen, false);
        if self.state.blockwise {
            let loss = hints.apart(&self.student, &shown, seen) * BLOCKWISE_WEIGHT;
            // The whole network has not been run; a part of the batch tells how far it is.
            let few = seen.narrow(0, 0, seen.size()[0].min(AGREEMENT_IMAGES));
            let wanted = shown.logits.narrow(0, 0, few.size()[0]);
            return (loss, agrees(&known(self.student.logits(&few)), &wanted));
        }
        let (logits, maps) = self.student.forward_with_maps(seen);
        let logits = known(logits);
        let loss = between(&logits, &shown.logits);
        let agrees = agrees(&logits, &shown.logits);
        if options.hint_weight == 0.0 {
            return (loss, agrees);
        }
        (loss + hints.together(&maps, &shown) * options.hint_weight, agrees)
    }

    /// An error where the weights are not finite any more.
    fn check(&self) -> anyhow::Result<()> {
        if !self.state.loss.is_finite() || !self.student.is_finite() {
            bail!(
                "the training loss is not finite at step {}; a smaller --learning-rate than {} would help",
                self.state.step,
                self.options.learning_rate
            );
        }
        Ok(())
    }

    fn report(&mut self) -> anyhow::Result<()> {
        let steps = self.sums.2.max(1) as f64;
        self.state.loss = self.sums.0.double_value(&[]) / steps;
        self.state.agreement = self.sums.1.double_value(&[]) / steps;
        let _ = (self.sums.0.zero_(), self.sums.1.zero_());
        self.sums.2 = 0;
        if !self.state.loss.is_finite() {
            self.check()?;
        }
        self.show();
        Ok(())
    }

    fn show(&mut self) {
        self.state.done = self.done();
        self.state.received = self.feed.stats().images.load(Ordering::Relaxed);
        self.state.pushed = self.feed.stats().students.load(Ordering::Relaxed);
        self.progress.show(self.state);
    }

    fn measure(&mut self) {
        let Some(test) = &self.test else { return };
        let classes = self.facts.num_classes as i64;
        let learned = self.learned();
        let logits = |pixels: &Tensor| learned.logits(&self.pixels.normalize(pixels)).narrow(1, 0, classes);
        let accuracy = test.accuracy(logits);
        self.state.accuracy = Some(accuracy);
        let seconds = self.elapsed().as_secs_f64();
        self.accuracies.push(Measurement { step: self.state.step, seconds, accuracy });
    }

    fn snapshot(&self) -> Snapshot {
        let arch = self.student.spec().arch().to_owned();
        let file = self.student.to_safetensors(&self.facts.metadata(self.student.spec()));
        Snapshot { arch, file: file.into(), step: self.state.step }
    }

    /// What the training has come to: the average, where there is one.
    fn learned(&self) -> &TrainableNetwork {
        self.average.as_ref().map_or(&self.student, Average::network)
    }

    /// A disk that is full now costs no training: there is a next time, and an end.
    fn save_checkpoint(&self) {
        let Some(path) = &self.options.checkpoint else { return };
        if let Err(error) = write_whole(path, &self.checkpoint_file()) {
            eprintln!(
                "distill: {error}; the training goes on and tries again in {} steps",
                self.options.checkpoint_every
            );
        }
    }

    fn checkpoint_file(&self) -> Vec<u8> {
        let network = self.facts.metadata(self.student.spec());
        let log_id = self.feed.description().log.as_ref().map(|log| log.log_id.as_str()).unwrap_or_default();
        let metadata = saved::metadata(network, &self.state, (self.elapsed(), self.waited), log_id, self.position);
        let mut more = self.sgd.state();
        more.extend(self.average.iter().flat_map(Average::state));
        saved::sealed(self.student.to_safetensors_with(&metadata, &more))
    }

    fn finish(mut self, complete: bool) -> anyhow::Result<Summary> {
        if self.sums.2 > 0 {
            let _ = self.report(); // a loss that is not finite has been told already, or is in the summary
        }
        self.measure();
        // What is not finite must not replace what was good, and nobody could go on from it.
        let sound = self.check();
        let mut outputs = Outputs::default();
        if sound.is_ok() {
            outputs.write(self.options.checkpoint.as_deref(), || Ok(self.checkpoint_file()));
        }
        if sound.is_ok() && self.state.step > 0 {
            let learned = self.learned();
            let file = || Ok(learned.to_safetensors(&self.facts.metadata(learned.spec())));
            outputs.write(self.options.out.as_deref(), file);
        }
        // The daemon ends with the final weights, so that a next trainer can start from them.
        let snapshot = self.snapshot();
        if self.state.step > 0
            && sound.is_ok()
            && let Err(error) = self.feed.push_and_wait(snapshot, WAIT * 10)
        {
            eprintln!("distill: the final student was not pushed: {error}");
        }
        self.show();
        self.progress.finish(self.state);
        outputs.write(self.options.grid.as_deref(), || grid::png_of_all(&self.shown, self.facts.geometry, 10));
        let stats = self.feed.stats();
        let mut summary = Summary {
            accuracy: self.state.accuracy,
            steps: self.state.step,
            loss: self.state.loss,
            agreement: self.state.agreement,
            images_received: stats.images.load(Ordering::Relaxed),
            images_consumed: self.state.consumed,
            student_versions_pushed: stats.students.load(Ordering::Relaxed),
            reconnects: stats.reconnects.load(Ordering::Relaxed),
            wall_seconds: self.elapsed().as_secs_f64(),
            accuracies: self.accuracies,
            complete,
            outputs: Outputs::default(),
        };
        outputs.write(self.options.summary.as_deref(), || Ok(serde_json::to_vec_pretty(&summary)?));
        if sound.is_err() {
            outputs.tell("distill");
        }
        summary.outputs = outputs;
        sound.map(|()| summary)
    }
}
