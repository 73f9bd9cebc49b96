//! The moving average of a network in training: what is measured and saved, while training goes on with the network itself.

use tch::Tensor;

use crate::model::checkpoint::Checkpoint;
use crate::model::network::to_device;
use crate::model::trainable::TrainableNetwork;

/// The prefix of its tensors in a training checkpoint.
pub const PREFIX: &str = "average.";

/// An exponential moving average of all tensors, batch-norm statistics among them.
#[derive(Debug)]
pub struct Average {
    decay: f64,
    network: TrainableNetwork,
    updates: u64,
}

impl Average {
    /// Begins with the network as it is. `decay` is the part that stays at each update, 0 to below 1.
    pub fn new(decay: f64, network: &TrainableNetwork) -> Self {
        Self { decay, network: network.frozen_copy(), updates: 0 }
    }

    /// Goes on with what a training checkpoint of `updates` steps holds of it.
    pub fn load(&mut self, checkpoint: &Checkpoint, updates: u64) {
        for (name, tensor) in self.network.tensors() {
            let raw = checkpoint.get(&format!("{PREFIX}{name}"));
            if let Some(saved) = raw.and_then(|raw| to_device(&raw, tensor.kind(), tensor.device()))
                && saved.size() == tensor.size()
            {
                tch::no_grad(|| tensor.shallow_clone().copy_(&saved));
                self.updates = updates;
            }
        }
    }

    /// Takes in the network after a step. The first steps count more: the average forgets its beginning.
    pub fn update(&mut self, network: &TrainableNetwork) {
        let _guard = tch::no_grad_guard();
        self.updates += 1;
        let decay = self.decay.min(self.updates as f64 / (self.updates as f64 + 10.0));
        for ((_, average), (_, value)) in self.network.tensors().zip(network.tensors()) {
            let _ = average.shallow_clone().lerp_(value, 1.0 - decay);
        }
    }

    /// The average.
    pub fn network(&self) -> &TrainableNetwork {
        &self.network
    }

    /// For a training checkpoint.
    pub fn state(&self) -> Vec<(String, &Tensor)> {
        self.network.tensors().map(|(name, tensor)| (format!("{PREFIX}{name}"), tensor)).collect()
    }
}
