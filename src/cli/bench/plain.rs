//! One synthesis step as an engineer would write it in PyTorch from the paper: a module, a look at every batch norm's
//! input, autograd through everything. The yardstick for our own step; the same libtorch, the same loss terms.

use std::collections::HashMap;

use tch::{Device, Kind, Tensor};

use crate::model::checkpoint::Checkpoint;
use crate::model::network::{BN_EPSILON, BatchStatistics, to_device};
use crate::model::spec::NetworkSpec;
use crate::model::trainable::features;
use crate::synthesis::adam::Adam;
use crate::synthesis::objective;
use crate::synthesis::settings::Settings;

/// A network in evaluation mode whose parameters ask for gradients that nobody uses, as PyTorch's do.
pub(super) struct PlainNetwork {
    spec: NetworkSpec,
    tensors: HashMap<String, Tensor>,
}

impl PlainNetwork {
    pub fn load(spec: &NetworkSpec, checkpoint: &Checkpoint, device: Device, kind: Kind) -> Self {
        let tensors = spec.tensors().into_iter().filter_map(|expected| {
            let raw = checkpoint.get(&expected.name)?;
            let tensor = to_device(&raw, kind, device)?;
            Some((expected.name, tensor.set_requires_grad(expected.trainable)))
        });
        Self { spec: spec.clone(), tensors: tensors.collect() }
    }

    /// Logits, and the statistics of every batch norm's input.
    fn forward(&self, x: &Tensor) -> (Tensor, Vec<BatchStatistics>) {
        let mut statistics = Vec::new();
        let mut unit = |x: &Tensor, conv: &str, bn: &str, stride: usize, padding: i64| {
            let norm = |part: &str| &self.tensors[&format!("{bn}.{part}")];
            let weight = &self.tensors[&format!("{conv}.weight")];
            let y = x.conv2d(weight, None::<&Tensor>, [stride as i64; 2], [padding; 2], [1, 1], 1);
            statistics.push(BatchStatistics {
                mean: y.mean_dim([0i64, 2, 3].as_slice(), false, None),
                var: y.permute([1, 0, 2, 3]).reshape([y.size()[1], -1]).var_dim([1i64].as_slice(), false, false),
                running_mean: norm("running_mean").shallow_clone(),
                running_var: norm("running_var").shallow_clone(),
            });
            let (weight, bias, mean, var) = (norm("weight"), norm("bias"), norm("running_mean"), norm("running_var"));
            y.batch_norm(Some(weight), Some(bias), Some(mean), Some(var), false, 0.1, BN_EPSILON, true)
        };
        let features = features(&self.spec, x, &mut unit);
        let head = self.spec.naming.head;
        let (weight, bias) = (&self.tensors[&format!("{head}.weight")], &self.tensors[&format!("{head}.bias")]);
        (features.linear(weight, Some(bias)), statistics)
    }

    fn zero_grad(&mut self) {
        for tensor in self.tensors.values_mut().filter(|tensor| tensor.requires_grad()) {
            tensor.zero_grad();
        }
    }
}

/// Teacher, student where there is competition, pixels and their Adam.
pub(super) struct PlainStep {
    pub teacher: PlainNetwork,
    pub student: Option<PlainNetwork>,
    pub settings: Settings,
    images: Tensor,
    /// The class of each image.
    pub targets: Tensor,
    adam: Adam,
}

impl PlainStep {
    pub fn new(teacher: PlainNetwork, student: Option<PlainNetwork>, settings: Settings, images: &Tensor) -> Self {
        let images = images.contiguous().detach().set_requires_grad(true);
        let classes = teacher.spec.num_classes as i64;
        let targets = Tensor::arange(images.size()[0], (Kind::Int64, images.device())).remainder(classes);
        let adam = Adam::new(&images, settings.betas);
        Self { teacher, student, settings, images, targets, adam }
    }

    /// Every term, weighted.
    fn loss(&mut self, x: &Tensor) -> Tensor {
        self.teacher.zero_grad();
        let (logits, statistics) = self.teacher.forward(x);
        let seen = self.student.as_mut().map(|student| {
            student.zero_grad();
            student.forward(x).0
        });
        let terms = objective::terms(&self.settings, x, &self.targets, &logits, &statistics, seen.as_ref());
        objective::total(&terms).unwrap_or_else(|| logits.sum(None) * 0.0)
    }

    /// The loss of images `[N, C, H, W]`, and its gradient.
    pub fn gradient(&mut self, images: &Tensor) -> (f64, Tensor) {
        let x = images.detach().set_requires_grad(true);
        let loss = self.loss(&x);
        loss.backward();
        (loss.double_value(&[]), x.grad())
    }

    /// One step with jitter, every term, backward, Adam.
    pub fn step(&mut self) {
        self.images.zero_grad();
        let x = self.images.roll([1, -1], [2, 3]);
        self.loss(&x).backward();
        let (gradient, rate) = (self.images.grad(), self.settings.learning_rate);
        tch::no_grad(|| self.adam.step(&mut self.images, &gradient, rate));
    }
}
