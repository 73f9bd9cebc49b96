//! Whether the generator still makes what the teacher knows, and the last good state of one that does not.
//!
//! A generator outlives the student that it was made against: what a ruined student made of it stays. So the teacher's
//! judgement of each batch is held against what is usual, and where it collapses the generator goes back to a state that
//! was good, and stayed good for a while after it was put aside.

use std::collections::VecDeque;

use super::Learned;
use crate::synthesis::objective::LossReport;

/// The weight of the newest batch in what is recent: about three batches.
const RECENT: f64 = 0.3;
/// The weight of the newest batch in what is usual: about forty batches.
const USUAL: f64 = 0.025;
/// Nothing is judged before this many batches were seen.
const SETTLED: u64 = 8;
/// The share of recognized images has collapsed where it is this much below what is usual, and less than this part of it.
const TOP1_DROP: f64 = 0.12;
const TOP1_PART: f64 = 0.85;
/// R_feature has collapsed where it is this many times what is usual.
const R_FEATURE_RISE: f64 = 2.0;
/// A state is put aside each time this many batches have passed, and is good once as many more have passed without a collapse.
const ASIDE_EVERY: u64 = 8;

/// What the teacher thinks of a generator's batches.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Level {
    /// The share of images in which it sees the target, 0..1.
    pub teacher_top1: f64,
    /// R_feature, unweighted; 0 where it has no weight.
    pub r_feature: f64,
}

impl Level {
    /// Of the last step of a batch.
    pub(super) fn of(report: &LossReport) -> Self {
        let r_feature = report.terms.iter().find(|(name, _)| *name == "r_feature").map_or(0.0, |(_, value)| *value);
        Self { teacher_top1: report.teacher_top1, r_feature }
    }

    fn towards(self, other: Self, weight: f64) -> Self {
        let mix = |a: f64, b: f64| a + weight * (b - a);
        Self {
            teacher_top1: mix(self.teacher_top1, other.teacher_top1),
            r_feature: mix(self.r_feature, other.r_feature),
        }
    }

    fn has_collapsed_from(self, usual: Self) -> bool {
        let lost =
            usual.teacher_top1 - self.teacher_top1 > TOP1_DROP && self.teacher_top1 < TOP1_PART * usual.teacher_top1;
        lost || usual.r_feature > 0.0 && self.r_feature > R_FEATURE_RISE * usual.r_feature
    }
}

/// A generator went back to its last good state.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Restored {
    /// What is usual.
    pub usual: Level,
    /// What the last batches were like.
    pub recent: Level,
    /// Batches that the generator had made, and has made now.
    pub batches: [u64; 2],
}

/// Watches over a generator.
#[derive(Debug, Default)]
pub(super) struct Health {
    usual: Option<Level>,
    recent: Option<Level>,
    /// Batches seen since the beginning, or since the last time it went back.
    seen: u64,
    /// Put aside, oldest first; the first is good once there are two.
    aside: VecDeque<Learned>,
    /// Whether the first of `aside` was good before this process began.
    proven: bool,
}

impl Health {
    /// One that knows a good state and what is usual of it.
    pub fn resume(good: Learned, usual: Level) -> Self {
        Self { usual: Some(usual), aside: VecDeque::from([good]), proven: true, ..Self::default() }
    }

    /// The last good state, and what was usual of it.
    pub fn good(&self) -> Option<(&Learned, Level)> {
        let good = self.aside.front().filter(|_| self.proven || self.aside.len() > 1)?;
        Some((good, self.usual?))
    }

    /// Forgets what is usual: the generator was changed on purpose, and will make worse images for a while.
    pub fn begin_anew(&mut self) {
        *self = Self { aside: std::mem::take(&mut self.aside), proven: self.proven, ..Self::default() };
    }

    /// Takes what the teacher thinks of a batch that `learned` made. Where the batches have collapsed, `learned` becomes the
    /// last good state again.
    pub fn judge(&mut self, batch: Level, learned: &mut Learned) -> Option<Restored> {
        let recent = self.recent.map_or(batch, |recent| recent.towards(batch, RECENT));
        let usual = self.usual.unwrap_or(recent);
        self.recent = Some(recent);
        self.seen += 1;
        if self.seen <= SETTLED && !self.proven {
            self.usual = Some(recent);
            return None;
        }
        if self.seen >= 3 && recent.has_collapsed_from(usual) {
            let restored = self.go_back(learned).map(|batches| Restored { usual, recent, batches });
            if restored.is_none() {
                // Nothing to go back to: what there is must do.
                self.begin_anew();
            }
            return restored;
        }
        self.usual = Some(usual.towards(batch, USUAL));
        if self.seen.is_multiple_of(ASIDE_EVERY) && recent.teacher_top1 >= usual.teacher_top1 - TOP1_DROP / 2.0 {
            self.aside.push_back(learned.copy());
            while self.aside.len() > 2 {
                self.aside.pop_front();
                self.proven = false;
            }
        }
        None
    }

    /// Makes `learned` the last good state; the batches that it had made, and has made now.
    pub fn go_back(&mut self, learned: &mut Learned) -> Option<[u64; 2]> {
        let good = self.good()?.0.copy();
        // What was put aside later may be what went wrong.
        self.aside.truncate(1);
        self.proven = true;
        self.recent = None;
        self.seen = 0;
        let before = learned.batches;
        *learned = good;
        Some([before, learned.batches])
    }
}
