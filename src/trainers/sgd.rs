//! Stochastic gradient descent whose state can be saved, which libtorch's own optimizer does not offer from Rust.

use std::collections::HashMap;

use tch::Tensor;

use crate::model::channels::Kept;
use crate::model::checkpoint::Checkpoint;
use crate::model::network::to_device;
use crate::model::trainable::{TrainableNetwork, shrink};

/// The prefix of momentum buffers in a training checkpoint.
pub const PREFIX: &str = "momentum.";

/// The learning rate's factor when a part `done` (0..1) of the training is over: half a cosine, from 1 to 0.
pub fn half_cosine(done: f64) -> f64 {
    0.5 * (1.0 + (std::f64::consts::PI * done).cos())
}

/// SGD with Nesterov momentum and weight decay, as `torch.optim.SGD`.
#[derive(Debug)]
pub struct Sgd {
    momentum: f64,
    weight_decay: f64,
    buffers: HashMap<String, Tensor>,
}

impl Sgd {
    /// Without a history.
    pub fn new(momentum: f64, weight_decay: f64) -> Self {
        Self { momentum, weight_decay, buffers: HashMap::new() }
    }

    /// Takes the history out of a training checkpoint.
    pub fn load(&mut self, network: &TrainableNetwork, checkpoint: &Checkpoint) {
        for (name, parameter) in network.parameters() {
            let raw = checkpoint.get(&format!("{PREFIX}{name}"));
            if let Some(buffer) = raw.and_then(|raw| to_device(&raw, parameter.kind(), parameter.device()))
                && buffer.size() == parameter.size()
            {
                self.buffers.insert(name.to_owned(), buffer);
            }
        }
    }

    /// The history, for a training checkpoint.
    pub fn state(&self) -> Vec<(String, &Tensor)> {
        self.buffers.iter().map(|(name, buffer)| (format!("{PREFIX}{name}"), buffer)).collect()
    }

    /// Goes on with a network that lost channels.
    pub fn shrink(&mut self, kept: &[(String, Kept)]) {
        for (name, kept) in kept {
            if let Some(buffer) = self.buffers.get_mut(name) {
                *buffer = shrink(buffer, kept);
            }
        }
    }

    /// Changes the parameters by their gradients and clears these.
    pub fn step(&mut self, network: &TrainableNetwork, learning_rate: f64) {
        let _guard = tch::no_grad_guard();
        for (name, parameter) in network.parameters() {
            let mut gradient = parameter.grad();
            if !gradient.defined() {
                continue;
            }
            let decayed = &gradient + parameter * self.weight_decay;
            let buffer = match self.buffers.get_mut(name) {
                Some(buffer) => {
                    *buffer *= self.momentum;
                    *buffer += &decayed;
                    buffer
                }
                None => self.buffers.entry(name.to_owned()).or_insert_with(|| decayed.copy()),
            };
            let change = (decayed + &*buffer * self.momentum) * learning_rate;
            let mut parameter = parameter.shallow_clone();
            parameter -= change;
            let _ = gradient.zero_();
        }
    }
}
