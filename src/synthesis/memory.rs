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

    /// One that goes on from here, with memory of its own.
    pub fn copy(&self) -> Self {
        Self::resume(self.momentum, self.averages.iter().map(|pair| pair.each_ref().map(Tensor::copy)).collect())
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::synthesis::objective::r_feature;

    fn vector(values: [f64; 3]) -> Tensor {
        Tensor::from_slice(&values)
    }

    fn statistics(mean: [f64; 3], var: [f64; 3]) -> BatchStatistics {
        BatchStatistics {
            mean: vector(mean),
            var: vector(var),
            running_mean: vector([1.0, -2.0, 0.5]),
            running_var: vector([0.5, 2.0, 1.0]),
        }
    }

    #[test]
    fn r_feature_is_that_of_the_mixture() {
        let (a, b) = (([0.0, 1.0, 2.0], [1.0, 1.5, 0.2]), ([2.0, -1.0, 0.0], [0.1, 3.0, 0.7]));
        let mut memory = StatisticsMemory::new(0.9);
        let mut first = [statistics(a.0, a.1)];
        memory.mix(&mut first);
        let plain = r_feature(&[statistics(a.0, a.1)], 1.0).unwrap();
        assert_eq!((memory.weight(), r_feature(&first, 1.0).unwrap()), (1.0, plain));
        memory.remember();

        let mut second = [statistics(b.0, b.1)];
        memory.mix(&mut second);
        let mixed = |i: usize| (0.1 * b.0[i] + 0.9 * a.0[i], 0.1 * b.1[i] + 0.9 * a.1[i]);
        let mixture = [mixed(0), mixed(1), mixed(2)];
        let wanted = r_feature(&[statistics(mixture.map(|m| m.0), mixture.map(|m| m.1))], 1.0).unwrap();
        let got = r_feature(&second, 1.0).unwrap() * memory.weight();
        assert!((got - wanted).abs().double_value(&[]) < 1e-12);
        memory.remember();
        let [mean, _] = &memory.averages()[0];
        assert!((mean.double_value(&[0]) - mixture[0].0).abs() < 1e-12);
    }
}
