//! A network that is trained: the same architectures as [`super::network`], through libtorch's autograd, with batch norm
//! on the batch's own statistics.

use std::collections::BTreeMap;
use std::ops::Range;

use safetensors::Dtype;
use tch::{Device, Kind, Tensor};

use super::channels::Kept;
use super::checkpoint::{Checkpoint, TensorToWrite, encode};
use super::network::{BN_EPSILON, channels_last, pad_shortcut, to_device};
use super::source::NetworkSource;
use super::spec::{BlockSpec, Naming, NetworkSpec, Shortcut};

/// PyTorch's default momentum of batch-norm statistics.
const BN_MOMENTUM: f64 = 0.1;

/// A network whose parameters require gradients.
#[derive(Debug)]
pub struct TrainableNetwork {
    spec: NetworkSpec,
    tensors: BTreeMap<String, Tensor>,
    /// Names of the trainable tensors, in the order of [`NetworkSpec::tensors`].
    trainable: Vec<String>,
    /// What convolutions compute in; weights, batch norm and the head stay f32.
    kind: Kind,
}

/// Which statistics batch norm normalizes with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Statistics {
    /// The batch's, which move the running ones.
    Batch,
    /// The running ones, which stay.
    Running,
}

impl TrainableNetwork {
    /// Random weights: He et al. 2015 (normal, fan-out) for convolutions, PyTorch's default for the head, batch norm at
    /// one and zero. libtorch's generator decides.
    pub fn fresh(spec: &NetworkSpec, device: Device) -> Self {
        Self::build(spec, |name, shape| {
            let size: Vec<i64> = shape.iter().map(|d| *d as i64).collect();
            let float = (Kind::Float, Device::Cpu);
            let tensor = match (size.len(), name.rsplit('.').next()) {
                (4, _) => Tensor::randn(&size, float) * (2.0 / (size[0] * size[2] * size[3]) as f64).sqrt(),
                (2, _) => Tensor::empty(&size, float).uniform(-1.0, 1.0) / (size[1] as f64).sqrt(),
                (_, Some("weight" | "running_var")) => Tensor::ones(&size, float),
                _ => Tensor::zeros(&size, float),
            };
            tensor.to_device(device)
        })
    }

    /// Weights of a checkpoint from which `spec` was made.
    pub fn load(spec: &NetworkSpec, checkpoint: &Checkpoint, device: Device) -> Self {
        Self::build(spec, |name, _| {
            checkpoint.get(name).and_then(|raw| to_device(&raw, Kind::Float, device)).unwrap_or_default()
        })
    }

    fn build(spec: &NetworkSpec, mut make: impl FnMut(&str, &[usize]) -> Tensor) -> Self {
        let _guard = tch::no_grad_guard();
        let mut tensors = BTreeMap::new();
        let mut trainable = Vec::new();
        for tensor in spec.tensors() {
            let value = make(&tensor.name, &tensor.shape);
            let value = if tensor.shape.len() == 4 { channels_last(&value) } else { value };
            if tensor.trainable {
                trainable.push(tensor.name.clone());
            }
            tensors.insert(tensor.name, value.detach().set_requires_grad(tensor.trainable));
        }
        Self { spec: spec.clone(), tensors, trainable, kind: Kind::Float }
    }

    /// The same network, whose convolutions compute in this element type: mixed precision, where it is not f32.
    pub fn in_precision(mut self, kind: Kind) -> Self {
        self.kind = kind;
        self
    }

    /// The network with more outputs, whose weights are random (PyTorch's default) and whose biases are zero.
    pub fn widened(&self, num_classes: usize) -> Self {
        let _guard = tch::no_grad_guard();
        let head = self.spec.naming.head;
        let mut spec = self.spec.clone();
        spec.num_classes = num_classes;
        let fresh = Self::fresh(&spec, self.device());
        for (name, tensor) in &self.tensors {
            let into = fresh.tensor(name);
            if name.strip_prefix(head).is_some_and(|rest| rest.starts_with('.')) {
                if name.ends_with(".bias") {
                    let _ = into.shallow_clone().zero_();
                }
                let kept = tensor.size()[0].min(num_classes as i64);
                into.narrow(0, 0, kept).copy_(&tensor.narrow(0, 0, kept));
            } else {
                into.shallow_clone().copy_(tensor);
            }
        }
        fresh.in_precision(self.kind)
    }

    /// Whether every element is finite.
    pub fn is_finite(&self) -> bool {
        self.tensors.values().all(|tensor| tch::no_grad(|| tensor.isfinite().all().int64_value(&[]) != 0))
    }

    /// Where it lives.
    pub fn device(&self) -> Device {
        self.tensor("conv1.weight").device()
    }

    /// The architecture.
    pub fn spec(&self) -> &NetworkSpec {
        &self.spec
    }

    /// The parameters and their names.
    pub fn parameters(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.trainable.iter().map(|name| (name.as_str(), self.tensor(name)))
    }

    /// The network without channels, as [`channels::without`](super::channels::without) says it.
    pub fn shrunk(&self, spec: &NetworkSpec, kept: &[(String, Kept)]) -> Self {
        let _guard = tch::no_grad_guard();
        let mut tensors = BTreeMap::new();
        for (name, tensor) in &self.tensors {
            let kept = kept.iter().find(|(kept, _)| kept == name).map(|(_, kept)| kept);
            let smaller = kept.map_or_else(|| tensor.detach().copy(), |kept| shrink(tensor, kept));
            let smaller = if smaller.dim() == 4 { channels_last(&smaller) } else { smaller };
            tensors.insert(name.clone(), smaller.set_requires_grad(tensor.requires_grad()));
        }
        Self { spec: spec.clone(), tensors, trainable: self.trainable.clone(), kind: self.kind }
    }

    /// Every tensor and its name, in order of name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// The same network, of which nothing requires a gradient.
    pub fn frozen_copy(&self) -> Self {
        let copy = |(name, tensor): (&String, &Tensor)| (name.clone(), tensor.detach().copy());
        Self {
            spec: self.spec.clone(),
            tensors: self.tensors.iter().map(copy).collect(),
            trainable: self.trainable.clone(),
            kind: self.kind,
        }
    }

    /// The parameter of this name.
    pub fn parameter(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    fn tensor(&self, name: &str) -> &Tensor {
        // Names come from the same spec that the map was built from.
        &self.tensors[name]
    }

    /// Logits `[N, K]` of normalized images, with the batch's statistics, which move the running ones. For training.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        self.classify(&self.features(x, Statistics::Batch))
    }

    /// The same, and the feature map `[N, C, H, W]` that each block gives, after its ReLU.
    pub fn forward_with_maps(&self, x: &Tensor) -> (Tensor, Vec<Tensor>) {
        let mut maps = Vec::with_capacity(self.spec.blocks.len());
        let mut h = self.stem(x);
        for index in 0..self.spec.blocks.len() {
            h = self.segment(&h, index..index + 1);
            maps.push(h.shallow_clone());
        }
        (self.classify(&pool(&h).to_kind(Kind::Float)), maps)
    }

    /// What the first block gets of normalized images, with the batch's statistics.
    pub fn stem(&self, x: &Tensor) -> Tensor {
        stem(&channels_last(x), &mut self.unit(Statistics::Batch))
    }

    /// The map that some consecutive blocks make of the map before them, with the batch's statistics.
    pub fn segment(&self, x: &Tensor, blocks: Range<usize>) -> Tensor {
        let mut unit = self.unit(Statistics::Batch);
        self.spec.blocks[blocks].iter().fold(channels_last(x), |h, spec| block(spec, self.spec.naming, &h, &mut unit))
    }

    /// The logits `[N, K]` of features `[N, C]`.
    pub fn classify(&self, features: &Tensor) -> Tensor {
        let head = self.spec.naming.head;
        features.linear(self.tensor(&format!("{head}.weight")), Some(self.tensor(&format!("{head}.bias"))))
    }

    /// Logits `[N, K]` of normalized images in evaluation mode.
    pub fn logits(&self, x: &Tensor) -> Tensor {
        tch::no_grad(|| self.classify(&self.features(x, Statistics::Running)))
    }

    /// The features `[N, C]` of normalized images: what the head sees.
    pub fn features(&self, x: &Tensor, statistics: Statistics) -> Tensor {
        features(&self.spec, &channels_last(x), &mut self.unit(statistics)).to_kind(Kind::Float)
    }

    /// A convolution and its batch norm, as [`features`] asks for it.
    fn unit(&self, statistics: Statistics) -> impl Fn(&Tensor, &str, &str, usize, i64) -> Tensor {
        move |x, conv, bn, stride, padding| {
            let weight = self.tensor(&format!("{conv}.weight"));
            let norm = |part: &str| Some(self.tensor(&format!("{bn}.{part}")));
            let stride = [stride as i64; 2];
            x.to_kind(self.kind)
                .conv2d(&weight.to_kind(self.kind), None::<&Tensor>, stride, [padding; 2], [1, 1], 1)
                .batch_norm(
                    norm("weight"),
                    norm("bias"),
                    norm("running_mean"),
                    norm("running_var"),
                    statistics == Statistics::Batch,
                    BN_MOMENTUM,
                    BN_EPSILON,
                    true,
                )
        }
    }

    /// The network as safetensors, with metadata from which [`NetworkSource::open`] reads it back without flags. The same
    /// weights and metadata are always the same bytes.
    pub fn to_safetensors(&self, like: &Metadata) -> Vec<u8> {
        self.to_safetensors_with(like, &[])
    }

    /// The same with further tensors, saved as f32.
    pub fn to_safetensors_with(&self, like: &Metadata, more: &[(String, &Tensor)]) -> Vec<u8> {
        let tensors = self.tensors.iter().map(|(name, tensor)| (name.clone(), tensor)).chain(more.iter().cloned());
        write(tensors, &like.0)
    }
}

/// The features `[N, C]` of images, where `unit` is a convolution and its batch norm: it gets the input, the names of both,
/// the stride and the padding.
pub fn features(
    spec: &NetworkSpec,
    x: &Tensor,
    unit: &mut impl FnMut(&Tensor, &str, &str, usize, i64) -> Tensor,
) -> Tensor {
    let stem = stem(x, unit);
    pool(&spec.blocks.iter().fold(stem, |h, of| block(of, spec.naming, &h, unit)))
}

fn stem(x: &Tensor, unit: &mut impl FnMut(&Tensor, &str, &str, usize, i64) -> Tensor) -> Tensor {
    unit(x, "conv1", "bn1", 1, 1).relu()
}

fn block(
    block: &BlockSpec,
    naming: Naming,
    h: &Tensor,
    unit: &mut impl FnMut(&Tensor, &str, &str, usize, i64) -> Tensor,
) -> Tensor {
    let p = &block.prefix;
    let inner = unit(h, &format!("{p}.conv1"), &format!("{p}.bn1"), block.stride, 1).relu();
    let out = unit(&inner, &format!("{p}.conv2"), &format!("{p}.bn2"), 1, 1);
    let shortcut = if block.shortcut == Shortcut::Projection {
        let s = format!("{p}.{}", naming.shortcut);
        unit(h, &format!("{s}.0"), &format!("{s}.1"), block.stride, 0)
    } else {
        pad_shortcut(h, block)
    };
    (out + shortcut).relu()
}

/// The features `[N, C]` of the last map: its mean over the pixels.
pub fn pool(map: &Tensor) -> Tensor {
    map.mean_dim([2i64, 3].as_slice(), false, None)
}

/// The parts of a tensor that stay.
pub fn shrink(tensor: &Tensor, kept: &Kept) -> Tensor {
    let mut smaller = tensor.detach().copy();
    for (dimension, indices) in [(0, &kept.rows), (1, &kept.columns)] {
        if let Some(indices) = indices {
            smaller = smaller.index_select(dimension, &Tensor::from_slice(indices).to_device(tensor.device()));
        }
    }
    smaller
}

/// Tensors as safetensors, in order of name, as f32.
pub fn write<'a>(
    tensors: impl Iterator<Item = (String, &'a Tensor)>,
    metadata: &BTreeMap<String, String>,
) -> Vec<u8> {
    let mut hosts: Vec<(String, Vec<usize>, Vec<u8>)> = tensors.map(|(name, tensor)| host(name, tensor)).collect();
    hosts.sort_by(|a, b| a.0.cmp(&b.0));
    let tensors: Vec<TensorToWrite<'_>> = hosts
        .iter()
        .map(|(name, shape, data)| (name.as_str(), Dtype::F32, shape.as_slice(), data.as_slice()))
        .collect();
    encode(&tensors, metadata)
}

fn host(name: String, tensor: &Tensor) -> (String, Vec<usize>, Vec<u8>) {
    let tensor = tensor.detach().to_device(Device::Cpu).to_kind(Kind::Float).contiguous();
    let shape = tensor.size().iter().map(|d| *d as usize).collect();
    let mut values = vec![0f32; tensor.numel()];
    let count = values.len();
    tensor.copy_data(&mut values, count);
    (name, shape, values.iter().flat_map(|value| value.to_le_bytes()).collect())
}

/// The `__metadata__` of a network's file; see [`NetworkSource::open`] for the keys.
#[derive(Clone, Debug)]
pub struct Metadata(pub BTreeMap<String, String>);

impl Metadata {
    /// For a network that takes the same images as another.
    pub fn new(arch: &str, mean: &[f32], std: &[f32], image_size: [usize; 2], class_names: &[String]) -> Self {
        let list = |values: &[f32]| values.iter().map(f32::to_string).collect::<Vec<_>>().join(",");
        let mut map = BTreeMap::from([
            ("arch".to_owned(), arch.to_owned()),
            ("mean".to_owned(), list(mean)),
            ("std".to_owned(), list(std)),
            ("image_size".to_owned(), format!("{},{}", image_size[0], image_size[1])),
        ]);
        if !class_names.is_empty() {
            map.insert("class_names".to_owned(), serde_json::json!(class_names).to_string());
        }
        Self(map)
    }

    /// For a network that takes the same images as `source`.
    pub fn like(source: &NetworkSource) -> Self {
        let (g, n) = (source.geometry, &source.normalization);
        Self::new(source.spec.arch(), &n.mean, &n.std, [g.height, g.width], &source.class_names)
    }

    /// With one more entry.
    pub fn with(mut self, key: &str, value: impl ToString) -> Self {
        self.0.insert(key.to_owned(), value.to_string());
        self
    }
}
