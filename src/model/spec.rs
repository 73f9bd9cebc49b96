//! What a network looks like, told from an architecture's name and the shapes of its tensors.
//!
//! Nothing here touches a device: the server checks pushed students with it, the engine builds them from it. Widths are
//! read from the shapes, so a pruned network needs no registration.

use std::collections::BTreeSet;
use std::fmt;

use safetensors::Dtype;

use super::checkpoint::Checkpoint;
use super::graph::RESERVED;

/// How a residual block's input reaches its output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shortcut {
    /// Unchanged.
    Identity,
    /// Option A of He et al. 2015: every second pixel, new channels zero-padded on both sides.
    Pad,
    /// Option B: a strided 1×1 convolution and a batch norm.
    Projection,
}

/// One residual block: conv 3×3, batch norm, ReLU, conv 3×3, batch norm, plus the shortcut, ReLU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockSpec {
    /// The prefix of its tensors, for example `layer2.0`.
    pub prefix: String,
    /// Channels in.
    pub in_width: usize,
    /// Channels between the two convolutions.
    pub mid_width: usize,
    /// Channels out.
    pub out_width: usize,
    /// The stride of the first convolution and of the shortcut.
    pub stride: usize,
    /// The shortcut.
    pub shortcut: Shortcut,
}

/// The names of public checkpoints differ in two places; everything else is common.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Naming {
    /// `shortcut` or `downsample`.
    pub shortcut: &'static str,
    /// `linear` or `fc`.
    pub head: &'static str,
}

/// A residual network for small images: a 3×3 stem, stages of [`BlockSpec`]s, global average pooling, a linear head.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkSpec {
    arch: String,
    /// The names of its tensors.
    pub naming: Naming,
    /// Channels of the image.
    pub in_channels: usize,
    /// Channels after the stem.
    pub stem_width: usize,
    /// All blocks in order.
    pub blocks: Vec<BlockSpec>,
    /// Outputs.
    pub num_classes: usize,
}

impl BlockSpec {
    /// The stage that it belongs to, as its tensors name it, for example `layer2`.
    pub fn stage(&self) -> &str {
        self.prefix.split('.').next().unwrap_or_default()
    }
}

/// The name and shape of a tensor that a network must have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExpectedTensor {
    /// Its name in the checkpoint.
    pub name: String,
    /// Its shape.
    pub shape: Vec<usize>,
    /// Whether it is trained (weights, biases), or kept by batch norm (running statistics).
    pub trainable: bool,
}

/// Why a network cannot be built.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// No family has this name.
    #[error(
        "unknown architecture {0:?}: known are the CIFAR ResNets resnet20, resnet32, resnet44, resnet56, resnet110 (and \
         any other resnet of depth 6n+2 that is not listed next, or with the suffix -projection), resnet18 and resnet34"
    )]
    UnknownArch(String),
    /// The tensors are not those of the architecture.
    #[error("{0}")]
    Mismatch(Box<Mismatch>),
}

/// Every way in which a file's tensors differ from an architecture's, all of them at once.
#[derive(Debug, Default)]
pub struct Mismatch {
    /// The architecture.
    pub arch: String,
    /// Expected, but not in the file.
    pub missing: Vec<String>,
    /// In the file, but not expected.
    pub extra: Vec<String>,
    /// Name, shape in the file, expected shape.
    pub misshapen: Vec<(String, Vec<usize>, Vec<usize>)>,
    /// Names of tensors without a single element.
    pub empty: Vec<String>,
    /// Name and element type, where it is not a floating-point type.
    pub wrong_dtype: Vec<(String, String)>,
}

impl Mismatch {
    fn is_empty(&self) -> bool {
        self.missing.is_empty()
            && self.extra.is_empty()
            && self.misshapen.is_empty()
            && self.empty.is_empty()
            && self.wrong_dtype.is_empty()
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the tensors are not those of {}", self.arch)?;
        if !self.missing.is_empty() {
            write!(f, "; missing: {}", self.missing.join(", "))?;
        }
        if !self.extra.is_empty() {
            write!(f, "; extra: {}", self.extra.join(", "))?;
        }
        for (name, found, expected) in &self.misshapen {
            write!(f, "; misshapen: {name} is {found:?}, expected {expected:?}")?;
        }
        if !self.empty.is_empty() {
            write!(f, "; without a single element: {}", self.empty.join(", "))?;
        }
        for (name, dtype) in &self.wrong_dtype {
            write!(f, "; wrong dtype: {name} is {dtype}, expected F32, F16, BF16 or F64")?;
        }
        Ok(())
    }
}

/// A family: blocks per stage, channels per stage. The first stage keeps the size, each further one halves it.
struct Family {
    blocks: Vec<usize>,
    widths: Vec<usize>,
    projection: bool,
}

fn family(arch: &str) -> Result<Family, SpecError> {
    let unknown = || SpecError::UnknownArch(arch.to_owned());
    let (base, projection) = match arch.strip_suffix("-projection") {
        Some(base) => (base, true),
        None => (arch, false),
    };
    // Only as people write it: parse alone would take "+8" and "008" too, and one network would have several names.
    let written = |d: &&str| !d.starts_with(['0', '+']);
    let depth = base.strip_prefix("resnet").filter(written).and_then(|d| d.parse::<usize>().ok());
    let depth = depth.ok_or_else(unknown)?;
    let wide =
        |blocks: [usize; 4]| Family { blocks: blocks.to_vec(), widths: vec![64, 128, 256, 512], projection: true };
    match depth {
        18 => Ok(wide([2, 2, 2, 2])),
        34 => Ok(wide([3, 4, 6, 3])),
        // resnet50 is of the form 6n+2, but everybody means the bottleneck network by it; depth is bounded because it
        // comes from the network.
        8..=1202 if depth % 6 == 2 && depth != 50 => {
            Ok(Family { blocks: vec![(depth - 2) / 6; 3], widths: vec![16, 32, 64], projection })
        }
        _ => Err(unknown()),
    }
}

/// The commonest value; the earliest among equally common ones.
fn majority(votes: &[Option<usize>]) -> Option<usize> {
    let votes: Vec<usize> = votes.iter().flatten().copied().collect();
    let count = |value: usize| votes.iter().filter(|vote| **vote == value).count();
    votes.iter().copied().rev().max_by_key(|value| count(*value))
}

impl NetworkSpec {
    /// The published network of this name, for images of `in_channels` and `num_classes` outputs.
    pub fn fresh(arch: &str, in_channels: usize, num_classes: usize) -> Result<Self, SpecError> {
        let family = family(arch)?;
        let mut width = family.widths[0];
        let mut blocks = Vec::new();
        for (stage, (count, out)) in family.blocks.iter().zip(&family.widths).enumerate() {
            for index in 0..*count {
                let stride = if stage > 0 && index == 0 { 2 } else { 1 };
                let shortcut = match (stride == 1 && width == *out, family.projection) {
                    (true, _) => Shortcut::Identity,
                    (false, true) => Shortcut::Projection,
                    (false, false) => Shortcut::Pad,
                };
                let prefix = format!("layer{}.{index}", stage + 1);
                blocks.push(BlockSpec {
                    prefix,
                    in_width: width,
                    mid_width: *out,
                    out_width: *out,
                    stride,
                    shortcut,
                });
                width = *out;
            }
        }
        Ok(Self {
            arch: arch.to_owned(),
            naming: Naming { shortcut: "shortcut", head: "linear" },
            in_channels,
            stem_width: family.widths[0],
            blocks,
            num_classes,
        })
    }

    /// The network whose tensors these are. Widths, classes and the kind of each shortcut come from the file; every
    /// missing, extra and misshapen tensor is reported at once. A width on which a file contradicts itself is decided by
    /// majority, so that the report names the tensor that is wrong rather than its neighbours.
    pub fn from_checkpoint(arch: &str, checkpoint: &Checkpoint) -> Result<Self, SpecError> {
        let mut spec = Self::fresh(arch, 3, 10)?;
        let has = |name: &str| checkpoint.get(name).is_some();
        if has("fc.weight") && !has("linear.weight") {
            spec.naming.head = "fc";
        }
        if spec.blocks.iter().any(|block| has(&format!("{}.downsample.0.weight", block.prefix))) {
            spec.naming.shortcut = "downsample";
        }
        let dim = |name: &str, axis: usize| checkpoint.get(name).and_then(|t| t.shape.get(axis).copied());
        let norm_votes = |bn: &str| {
            ["weight", "bias", "running_mean", "running_var"].map(|part| dim(&format!("{bn}.{part}"), 0)).to_vec()
        };
        let vote = |defaults: usize, mut votes: Vec<Option<usize>>, more: &[Option<usize>]| {
            votes.extend_from_slice(more);
            majority(&votes).unwrap_or(defaults)
        };

        spec.in_channels = dim("conv1.weight", 1).unwrap_or(spec.in_channels);
        let first_in = dim("layer1.0.conv1.weight", 1);
        spec.stem_width =
            vote(spec.stem_width, vec![dim("conv1.weight", 0)], &[norm_votes("bn1"), vec![first_in]].concat());
        let mut width = spec.stem_width;
        for block in &mut spec.blocks {
            let p = &block.prefix;
            block.in_width = width;
            block.mid_width = vote(
                block.mid_width,
                vec![dim(&format!("{p}.conv1.weight"), 0)],
                &[norm_votes(&format!("{p}.bn1")), vec![dim(&format!("{p}.conv2.weight"), 1)]].concat(),
            );
            block.out_width =
                vote(block.out_width, vec![dim(&format!("{p}.conv2.weight"), 0)], &norm_votes(&format!("{p}.bn2")));
            let projected = has(&format!("{p}.{}.0.weight", spec.naming.shortcut));
            block.shortcut = if projected {
                Shortcut::Projection
            } else if block.stride == 1 && block.in_width == block.out_width {
                Shortcut::Identity
            } else if block.shortcut == Shortcut::Projection || block.out_width < block.in_width {
                Shortcut::Projection // expected by the family, or the only kind that could fit: reported as missing
            } else {
                Shortcut::Pad
            };
            width = block.out_width;
        }
        let head = spec.naming.head;
        spec.num_classes = dim(&format!("{head}.weight"), 0).unwrap_or(spec.num_classes);

        let mismatch = spec.compare(checkpoint);
        if mismatch.is_empty() { Ok(spec) } else { Err(SpecError::Mismatch(Box::new(mismatch))) }
    }

    fn compare(&self, checkpoint: &Checkpoint) -> Mismatch {
        let mut mismatch = Mismatch { arch: self.arch.clone(), ..Mismatch::default() };
        let expected = self.tensors();
        for tensor in &expected {
            let Some(found) = checkpoint.get(&tensor.name) else {
                mismatch.missing.push(tensor.name.clone());
                continue;
            };
            if found.shape != tensor.shape {
                mismatch.misshapen.push((tensor.name.clone(), found.shape.to_vec(), tensor.shape.clone()));
            }
            if tensor.shape.contains(&0) {
                mismatch.empty.push(tensor.name.clone());
            }
            if !matches!(found.dtype, Dtype::F16 | Dtype::BF16 | Dtype::F32 | Dtype::F64) {
                mismatch.wrong_dtype.push((tensor.name.clone(), format!("{:?}", found.dtype)));
            }
        }
        let names: BTreeSet<&str> = expected.iter().map(|tensor| tensor.name.as_str()).collect();
        for (name, _) in checkpoint.tensors() {
            // PyTorch's step counter of a batch norm does not affect the outputs, and a golden sample is none of the weights.
            let ignored = name.ends_with(".num_batches_tracked") || name.starts_with(RESERVED);
            if !names.contains(name) && !ignored {
                mismatch.extra.push(name.to_owned());
            }
        }
        mismatch
    }

    /// The architecture's name.
    pub fn arch(&self) -> &str {
        &self.arch
    }

    /// The width of the features before the head.
    pub fn feature_width(&self) -> usize {
        self.blocks.last().map_or(self.stem_width, |block| block.out_width)
    }

    /// Every tensor of the network, in the order in which PyTorch registers them.
    pub fn tensors(&self) -> Vec<ExpectedTensor> {
        let mut list = Vec::new();
        let mut push = |name: String, shape: Vec<usize>, trainable| {
            list.push(ExpectedTensor { name, shape, trainable });
        };
        let mut conv_norm = |conv: String, bn: String, out: usize, inp: usize, kernel: usize| {
            push(format!("{conv}.weight"), vec![out, inp, kernel, kernel], true);
            push(format!("{bn}.weight"), vec![out], true);
            push(format!("{bn}.bias"), vec![out], true);
            push(format!("{bn}.running_mean"), vec![out], false);
            push(format!("{bn}.running_var"), vec![out], false);
        };
        conv_norm("conv1".into(), "bn1".into(), self.stem_width, self.in_channels, 3);
        for block in &self.blocks {
            let p = &block.prefix;
            conv_norm(format!("{p}.conv1"), format!("{p}.bn1"), block.mid_width, block.in_width, 3);
            conv_norm(format!("{p}.conv2"), format!("{p}.bn2"), block.out_width, block.mid_width, 3);
            if block.shortcut == Shortcut::Projection {
                let s = self.naming.shortcut;
                conv_norm(format!("{p}.{s}.0"), format!("{p}.{s}.1"), block.out_width, block.in_width, 1);
            }
        }
        let head = self.naming.head;
        push(format!("{head}.weight"), vec![self.num_classes, self.feature_width()], true);
        push(format!("{head}.bias"), vec![self.num_classes], true);
        list
    }

    /// The channels of every batch norm, in the order in which PyTorch registers them.
    pub fn batch_norm_widths(&self) -> Vec<usize> {
        let tensors = self.tensors().into_iter().filter(|tensor| tensor.name.ends_with(".running_mean"));
        tensors.filter_map(|tensor| tensor.shape.first().copied()).collect()
    }

    /// Multiply-adds of one forward pass of one image, convolutions and head.
    pub fn multiply_adds(&self, height: usize, width: usize) -> u64 {
        let conv = |inp: usize, out: usize, kernel: usize, h: usize, w: usize| inp * out * kernel * kernel * h * w;
        let (mut h, mut w) = (height, width);
        let mut sum = conv(self.in_channels, self.stem_width, 3, h, w);
        for block in &self.blocks {
            (h, w) = (h.div_ceil(block.stride), w.div_ceil(block.stride));
            sum += conv(block.in_width, block.mid_width, 3, h, w) + conv(block.mid_width, block.out_width, 3, h, w);
            if block.shortcut == Shortcut::Projection {
                sum += conv(block.in_width, block.out_width, 1, h, w);
            }
        }
        (sum + self.feature_width() * self.num_classes) as u64
    }

    /// The number of trainable parameters.
    pub fn num_parameters(&self) -> u64 {
        let size = |tensor: &ExpectedTensor| tensor.shape.iter().product::<usize>() as u64;
        self.tensors().iter().filter(|tensor| tensor.trainable).map(size).sum()
    }
}
