//! The teacher as a trainer knows it: what the daemon says of it, and the network itself where its file is at hand.

use std::path::Path;

use anyhow::{Context, bail};
use tch::{Device, Kind};

use crate::model::source::{Geometry, NetworkSource, Normalization, NumberList, SourceError, SourceOptions};
use crate::model::spec::NetworkSpec;
use crate::model::trainable::Metadata;
use crate::synthesis::Teacher;
use crate::trainers::feed::Feed;

/// What the daemon says of its teacher, as a trainer needs it.
pub(super) struct TeacherFacts {
    pub arch: String,
    pub num_classes: usize,
    pub class_names: Vec<String>,
    pub geometry: Geometry,
    pub normalization: Normalization,
    identity: String,
}

impl TeacherFacts {
    pub fn from(feed: &Feed) -> anyhow::Result<Self> {
        let teacher = feed.description().teacher.clone().context("Describe names no teacher")?;
        let geometry = teacher.geometry.context("Describe gives no geometry")?;
        let normalization = teacher.normalization.context("Describe gives no normalization")?;
        Ok(Self {
            arch: teacher.arch,
            num_classes: teacher.num_classes as usize,
            class_names: teacher.class_names,
            geometry: Geometry {
                channels: geometry.channels as usize,
                height: geometry.height as usize,
                width: geometry.width as usize,
            },
            normalization: Normalization { mean: normalization.mean, std: normalization.std },
            identity: teacher.sha256,
        })
    }

    /// For a network that takes the teacher's images.
    pub fn metadata(&self, spec: &NetworkSpec) -> Metadata {
        let (g, n) = (self.geometry, &self.normalization);
        let names = if spec.num_classes == self.num_classes { self.class_names.as_slice() } else { &[] };
        Metadata::new(spec.arch(), &n.mean, &n.std, [g.height, g.width], names)
    }

    /// The teacher's own file, which must be of the network that the daemon dreams from.
    pub fn load(&self, path: &Path, device: Device) -> anyhow::Result<Teacher> {
        let other =
            || format!("{} is not the network that the daemon dreams from; give --teacher that file", path.display());
        let source = NetworkSource::open(
            path,
            &SourceOptions {
                arch: Some(self.arch.clone()),
                mean: Some(NumberList(self.normalization.mean.clone())),
                std: Some(NumberList(self.normalization.std.clone())),
                image_size: Some(NumberList(vec![self.geometry.height as f32, self.geometry.width as f32])),
            },
        );
        let source = match source {
            Err(SourceError::Spec { .. }) => bail!(other()),
            opened => opened?,
        };
        if source.identity != self.identity {
            bail!(other());
        }
        Ok(Teacher::load(&source, device, Kind::Float))
    }
}
