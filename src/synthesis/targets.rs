//! Which class the next image is made for.

use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::settings::Targets;

/// An endless sequence of classes whose proportions are right at every length, not only on average.
#[derive(Debug)]
pub struct TargetSequence {
    shares: Vec<(u32, f64)>,
    made: Vec<f64>,
    total: f64,
}

impl TargetSequence {
    /// For a teacher of `num_classes` outputs.
    pub fn new(targets: &Targets, num_classes: usize) -> Self {
        let listed: Vec<(u32, f64)> = match targets {
            Targets::Balanced => (0..num_classes as u32).map(|class| (class, 1.0)).collect(),
            Targets::List(classes) => classes.iter().map(|class| (*class, 1.0)).collect(),
            Targets::Mix(mix) => mix.clone(),
        };
        let whole: f64 = listed.iter().map(|(_, share)| share).sum();
        let shares: Vec<(u32, f64)> = listed.into_iter().map(|(class, share)| (class, share / whole)).collect();
        Self { made: vec![0.0; shares.len()], shares, total: 0.0 }
    }

    /// The classes of the next batch, in random order. Every prefix of the whole sequence, taken in batches, is within
    /// one image of its exact proportions.
    pub fn next_batch(&mut self, batch_size: usize, rng: &mut ChaCha8Rng) -> Vec<i64> {
        let mut batch: Vec<i64> = (0..batch_size).map(|_| self.next()).collect();
        batch.shuffle(rng);
        batch
    }

    /// The class that is furthest behind its share.
    fn next(&mut self) -> i64 {
        self.total += 1.0;
        let behind = |index: usize| self.shares[index].1 * self.total - self.made[index];
        let mut chosen = 0;
        for index in 1..self.shares.len() {
            if behind(index) > behind(chosen) + 1e-9 {
                chosen = index;
            }
        }
        self.made[chosen] += 1.0;
        i64::from(self.shares[chosen].0)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    fn counts(targets: &Targets, classes: usize, batches: &[usize]) -> Vec<usize> {
        let mut sequence = TargetSequence::new(targets, classes);
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut counts = vec![0; classes];
        for batch in batches {
            for class in sequence.next_batch(*batch, &mut rng) {
                counts[class as usize] += 1;
            }
        }
        counts
    }

    #[test]
    fn balanced_targets_stay_balanced_at_any_batch_size() {
        for batches in [[7, 7, 7], [256, 1, 3], [10, 10, 10]] {
            let counts = counts(&Targets::Balanced, 10, &batches);
            let (low, high) = (counts.iter().min().unwrap(), counts.iter().max().unwrap());
            assert!(high - low <= 1, "{counts:?}");
        }
    }

    #[test]
    fn a_list_repeats_and_a_mix_keeps_its_shares() {
        let list: Targets = "3,5,5".parse().unwrap();
        assert_eq!(counts(&list, 6, &[30]), [0, 0, 0, 10, 0, 20]);
        let mix: Targets = "0:1,2:3".parse().unwrap();
        assert_eq!(counts(&mix, 3, &[16, 24]), [10, 0, 30]);
    }
}
