//! A network as it lies in a file: weights, architecture, geometry and normalization, read on the host.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::checkpoint::{Checkpoint, CheckpointError};
use super::golden::{self, Proof};
use super::spec::{NetworkSpec, SpecError};

/// The size of one image, `[channels, height, width]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Geometry {
    /// Colour channels.
    pub channels: usize,
    /// Pixels from top to bottom.
    pub height: usize,
    /// Pixels from left to right.
    pub width: usize,
}

impl Geometry {
    /// Pixels of one image, all channels.
    pub fn pixels(&self) -> usize {
        self.channels * self.height * self.width
    }
}

impl fmt::Display for Geometry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}x{}", self.channels, self.height, self.width)
    }
}

/// `network_input[c] = (pixel[c] / 255 - mean[c]) / std[c]`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Normalization {
    /// One mean a channel, in units of pixel / 255.
    pub mean: Vec<f32>,
    /// One standard deviation a channel, in units of pixel / 255.
    pub std: Vec<f32>,
}

/// Numbers as they stand in flags and in metadata: `0.485,0.456,0.406`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NumberList(pub Vec<f32>);

impl FromStr for NumberList {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parse = |part: &str| {
            part.trim().parse::<f32>().map_err(|_| format!("{part:?} is not a number in the list {text:?}"))
        };
        text.split(',').map(parse).collect::<Result<_, _>>().map(NumberList)
    }
}

/// How to read a network's file where its metadata does not tell, or is wrong. The same flags everywhere.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, clap::Args)]
#[serde(default, deny_unknown_fields)]
pub struct SourceOptions {
    /// The architecture, for example resnet20; default: the file's metadata.
    #[arg(long)]
    pub arch: Option<String>,
    /// Mean of each channel in units of pixel/255, for example 0.485,0.456,0.406; default: the file's metadata.
    #[arg(long, value_name = "LIST")]
    pub mean: Option<NumberList>,
    /// Standard deviation of each channel in units of pixel/255; default: the file's metadata.
    #[arg(long, value_name = "LIST")]
    pub std: Option<NumberList>,
    /// Height and width of an image, for example 32,32; default: the file's metadata, or 32,32.
    #[arg(long, value_name = "H,W")]
    pub image_size: Option<NumberList>,
}

/// Why a network's file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The file is not readable safetensors, or not finite.
    #[error("{path}: {cause}", path = path.display())]
    Checkpoint {
        /// The file.
        path: PathBuf,
        /// What is wrong with it. Told in the message, so not a source of its own, which would be printed again.
        cause: CheckpointError,
    },
    /// The tensors are not those of the architecture.
    #[error("{path}: {cause}", path = path.display())]
    Spec {
        /// The file.
        path: PathBuf,
        /// What does not fit. Told in the message too.
        cause: Box<SpecError>,
    },
    /// Neither metadata nor flags tell the architecture.
    #[error("{0}: the file does not name its architecture in its metadata; pass --arch, for example --arch resnet20")]
    NoArch(PathBuf),
    /// Neither metadata nor flags tell the normalization.
    #[error(
        "{0}: the file does not tell its normalization in its metadata; pass --mean and --std, for example --mean \
         0.485,0.456,0.406 --std 0.229,0.224,0.225"
    )]
    NoNormalization(PathBuf),
    /// A value is malformed.
    #[error("{path}: {problem}", path = path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong and what would be right.
        problem: String,
    },
}

/// A network read from a file, checked in full, on the host.
#[derive(Clone, Debug)]
pub struct NetworkSource {
    /// The weights.
    pub checkpoint: Checkpoint,
    /// The architecture.
    pub spec: NetworkSpec,
    /// The size of its input.
    pub geometry: Geometry,
    /// The normalization of its input.
    pub normalization: Normalization,
    /// Names of the classes, or empty.
    pub class_names: Vec<String>,
    /// [`Checkpoint::identity`].
    pub identity: String,
    /// Of a file that brings a graph: what its golden sample says.
    pub proof: Option<Proof>,
}

impl NetworkSource {
    /// Reads a checkpoint. Metadata keys: `arch`; `mean` and `std` (comma-separated, one number a channel);
    /// `image_size` (`height,width`); `class_names` (a JSON array of strings). Options win over metadata. Where the file brings a
    /// `graph`, it is checked, and what it computes has to be what the architecture computes.
    pub fn open(path: &Path, options: &SourceOptions) -> Result<Self, SourceError> {
        let unusable = |cause| SourceError::Checkpoint { path: path.to_owned(), cause };
        let checkpoint = Checkpoint::open(path).map_err(unusable)?;
        let invalid = |problem: String| SourceError::Invalid { path: path.to_owned(), problem };
        let meta = |key: &str| checkpoint.metadata().get(key);
        let list = |option: &Option<NumberList>, key: &str| match (option, meta(key)) {
            (Some(list), _) => Ok(Some(list.0.clone())),
            (None, Some(text)) => text
                .parse::<NumberList>()
                .map(|list| Some(list.0))
                .map_err(|e| invalid(format!("metadata {key}: {e}"))),
            (None, None) => Ok(None),
        };

        let arch =
            options.arch.as_ref().or(meta("arch")).ok_or_else(|| SourceError::NoArch(path.to_owned()))?.clone();
        let spec = NetworkSpec::from_checkpoint(&arch, &checkpoint)
            .map_err(|error| SourceError::Spec { path: path.to_owned(), cause: Box::new(error) })?;
        checkpoint.check_finite().map_err(unusable)?;
        checkpoint.check_statistics().map_err(unusable)?;

        let (Some(mean), Some(std)) = (list(&options.mean, "mean")?, list(&options.std, "std")?) else {
            return Err(SourceError::NoNormalization(path.to_owned()));
        };
        let mut problems = Vec::new();
        if mean.len() != spec.in_channels || std.len() != spec.in_channels {
            problems.push(format!(
                "mean has {} and std has {} values, but the network takes {} channels; give one value a channel",
                mean.len(),
                std.len(),
                spec.in_channels
            ));
        }
        if mean.iter().any(|m| !m.is_finite()) || std.iter().any(|s| !s.is_finite() || *s <= 0.0) {
            problems.push(format!("mean is {mean:?} and std is {std:?}; mean must be finite and std positive"));
        } else if mean.iter().any(|m| m.abs() > 1.0) || std.iter().any(|s| *s > 1.0) {
            problems.push(format!(
                "mean is {mean:?} and std is {std:?}; give them in units of pixel / 255, for example 0.485"
            ));
        }
        let size = list(&options.image_size, "image_size")?.unwrap_or_else(|| vec![32.0, 32.0]);
        let whole = |v: &f32| (1.0..=4096.0).contains(v) && v.fract() == 0.0;
        let (height, width) = match size.as_slice() {
            [height, width] if size.iter().all(whole) => (*height as usize, *width as usize),
            _ => {
                problems.push(format!("image_size must be height,width, for example 32,32, not {size:?}"));
                (1, 1)
            }
        };
        let class_names: Vec<String> = match meta("class_names") {
            Some(text) => serde_json::from_str(text)
                .map_err(|e| invalid(format!("metadata class_names must be a JSON array of strings: {e}")))?,
            None => Vec::new(),
        };
        if !class_names.is_empty() && class_names.len() != spec.num_classes {
            problems.push(format!(
                "metadata class_names has {} names, but the network has {} outputs",
                class_names.len(),
                spec.num_classes
            ));
        }
        if !problems.is_empty() {
            return Err(invalid(problems.join("; ")));
        }
        let geometry = Geometry { channels: spec.in_channels, height, width };
        Ok(Self {
            proof: golden::check_file(&checkpoint, &spec, geometry).map_err(|error| invalid(error.to_string()))?,
            geometry,
            normalization: Normalization { mean, std },
            identity: checkpoint.identity(),
            checkpoint,
            spec,
            class_names,
        })
    }
}
