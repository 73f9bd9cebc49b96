//! Batch-norm statistics of earlier batches (the "momentum" of Fang et al. 2022): a small batch alone cannot have the
//! statistics of a whole data set, but together with the batches before it, it can.

use tch::Tensor;

use crate::model::network::BatchStatistics;

/// Exponential moving averages of mean and variance at every batch norm of the teacher.
#[derive(Debug)]
pub struct StatisticsMemory {
    /// The part that earlier batches have in what is held against the teacher's statistics, 0 to below 1.
    momentum: f64,
    /// Mean and variance, `[C]` each; empty before the first batch.
    averages: Vec<[Tensor; 2]>,
    /// Those of the batch seen last.
    latest: Vec<[Tensor; 2]>,
}

impl StatisticsMemory {
    /// One that has seen nothing.
    pub fn new(momentum: f64) -> Self {
        Self::resume(momentum, Vec::new())
    }

    /// One that goes on from [`Self::averages`].
    pub fn resume(momentum: f64, averages: Vec<[Tensor; 2]>) -> Self {
        Self { momentum, averages, latest: Vec::new() }
    }

    /// Mean and variance at each batch norm, `[C]` each.
    pub fn averages(&self) -> &[[Tensor; 2]] {
        &self.averages
    }

    /// What the weight of R_feature must be multiplied by after [`Self::mix`].
    pub fn weight(&self) -> f64 {
        if self.averages.is_empty() { 1.0 } else { 1.0 - self.momentum }
    }

    /// Makes R_feature of these statistics, times [`Self::weight`], that of `(1 - m) batch + m average`: since
    /// `|r - m a - (1 - m) s| = (1 - m) |(r - m a) / (1 - m) - s|`, it is enough to move what they are held against.
    pub fn mix(&mut self, statistics: &mut [BatchStatistics]) {
        let m = self.momentum;
        for (s, [mean, var]) in statistics.iter_mut().zip(&self.averages) {
            s.running_mean = (&s.running_mean - mean * m) / (1.0 - m);
            s.running_var = (&s.running_var - var * m) / (1.0 - m);
        }
        self.latest = statistics.iter().map(|s| [s.mean.shallow_clone(), s.var.shallow_clone()]).collect();
    }

    /// Adds the batch that was seen last.
    pub fn remember(&mut self) {
        let latest = std::mem::take(&mut self.latest);
        if self.averages.is_empty() {
            self.averages = latest;
            return;
        }
        for (averages, latest) in self.averages.iter_mut().zip(latest) {
            for (average, value) in averages.iter_mut().zip(latest) {
                let _ = average.lerp_(&value, 1.0 - self.momentum);
            }
        }
    }
}
