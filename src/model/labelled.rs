//! Labelled pictures, from a file in CIFAR binary format or from a folder of images, and a network's accuracy on them.

use std::fs;
use std::io::BufReader;
use std::path::{Path, PathBuf};

use image::DynamicImage;
use image::imageops::FilterType;
use tch::{Device, Kind, Tensor};

use super::source::Geometry;
use crate::files;

/// Extensions of the files in an image folder that are read; others are passed over.
const EXTENSIONS: [&str; 3] = ["png", "jpg", "jpeg"];

/// Why labelled pictures cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LabelledError {
    /// A file or folder could not be read.
    #[error("cannot read {path}: {cause}", path = path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the operating system said. Told in the message, so not a source of its own, which would be printed again.
        cause: std::io::Error,
    },
    /// The length is not a multiple of the record.
    #[error(
        "{path} is not CIFAR binary for this network: {length} bytes are not a whole number of records of {record} bytes \
         (1 byte of class and {geometry} of pixels)",
        path = path.display()
    )]
    Length {
        /// The file.
        path: PathBuf,
        /// Its length.
        length: usize,
        /// The length of one record.
        record: usize,
        /// The network's geometry.
        geometry: Geometry,
    },
    /// A label names no output of the network.
    #[error("{path}: record {record} has class {class}, but the network has {num_classes} outputs", path = path.display())]
    Class {
        /// The file.
        path: PathBuf,
        /// The record's index.
        record: usize,
        /// Its class.
        class: i64,
        /// The outputs of the network.
        num_classes: usize,
    },
    /// A folder is not what it should be.
    #[error("{path}: {problem}", path = path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What is wrong with it, and what would be right.
        problem: String,
    },
    /// A file in an image folder is not an image.
    #[error("cannot read {path} as an image: {cause}", path = path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// What the decoder said.
        cause: String,
    },
}

/// Pictures and their classes, on the host.
#[derive(Debug)]
pub struct LabelledImages {
    /// u8 pixels, `[N, C, H, W]`.
    pub images: Tensor,
    /// Classes, `[N]`.
    pub labels: Tensor,
}

/// Pictures whose labels are still the source's own.
#[derive(Debug)]
pub struct Pictures {
    /// u8 pixels, `[N, C, H, W]`.
    pub images: Tensor,
    /// For each picture: the byte before it in a CIFAR file, or the index of its folder.
    pub labels: Vec<i64>,
    /// The names of the classes, where the source has names: an image folder's subfolders in alphabetical order.
    pub names: Option<Vec<String>>,
}

impl Pictures {
    /// Reads a file in CIFAR binary format (each record is 1 byte of class and C·H·W bytes of pixels, plane by plane, row by
    /// row), or a folder with one subfolder of PNG and JPEG files for each class. Images of another size are scaled until
    /// they cover the network's, and cut at the centre.
    pub fn open(path: &Path, geometry: Geometry) -> Result<Self, LabelledError> {
        if path.is_dir() { Self::from_folder(path, geometry) } else { Self::from_cifar(path, geometry) }
    }

    /// Only the pixels, of a folder without subfolders, too.
    pub fn unlabelled(path: &Path, geometry: Geometry) -> Result<Tensor, LabelledError> {
        let files: Vec<PathBuf> = if path.is_dir() { sorted(path)? } else { Vec::new() };
        let mut pixels = Vec::new();
        let files: Vec<PathBuf> = files.into_iter().filter(|file| file.is_file() && is_image(file)).collect();
        if files.is_empty() {
            return Ok(Self::open(path, geometry)?.images);
        }
        for file in &files {
            pixels.extend(decode(file, geometry)?);
        }
        Ok(tensor(&pixels, files.len(), geometry))
    }

    /// What the source calls the class of a label.
    pub fn class(&self, label: i64) -> String {
        let name = self.names.as_ref().and_then(|names| names.get(label as usize));
        name.cloned().unwrap_or_else(|| label.to_string())
    }

    fn from_cifar(path: &Path, geometry: Geometry) -> Result<Self, LabelledError> {
        let bytes = files::read(path).map_err(|cause| LabelledError::Read { path: path.to_owned(), cause })?;
        let record = 1 + geometry.pixels();
        if bytes.is_empty() || bytes.len() % record != 0 {
            return Err(LabelledError::Length { path: path.to_owned(), length: bytes.len(), record, geometry });
        }
        let mut labels = Vec::with_capacity(bytes.len() / record);
        let mut pixels = Vec::with_capacity(bytes.len());
        for record in bytes.chunks_exact(record) {
            if let [class, image @ ..] = record {
                labels.push(i64::from(*class));
                pixels.extend_from_slice(image);
            }
        }
        Ok(Self { images: tensor(&pixels, labels.len(), geometry), labels, names: None })
    }

    fn from_folder(path: &Path, geometry: Geometry) -> Result<Self, LabelledError> {
        let bad = |problem: String| LabelledError::Folder { path: path.to_owned(), problem };
        if geometry.channels != 1 && geometry.channels != 3 {
            let channels = geometry.channels;
            return Err(bad(format!(
                "the network takes images of {channels} channels, and image files have 1 or 3; give a file in CIFAR binary format"
            )));
        }
        let (mut names, mut labels, mut pixels) = (Vec::new(), Vec::new(), Vec::new());
        for folder in sorted(path)?.into_iter().filter(|entry| entry.is_dir()) {
            let Some(name) = folder.file_name().map(|name| name.to_string_lossy().into_owned()) else { continue };
            for file in sorted(&folder)?.into_iter().filter(|file| is_image(file)) {
                pixels.extend(decode(&file, geometry)?);
                labels.push(names.len() as i64);
            }
            names.push(name);
        }
        if labels.is_empty() {
            let problem =
                "it has no pictures; give one subfolder for each class with .png, .jpg or .jpeg files in it";
            return Err(bad(problem.into()));
        }
        Ok(Self { images: tensor(&pixels, labels.len(), geometry), labels, names: Some(names) })
    }
}

/// The classes of a network's outputs as pictures name them: by the network's own names, or, where pictures have only
/// numbers, by the numbers among those names and else the outputs' own.
pub fn output_classes(class_names: &[String], num_classes: usize, named: bool) -> Vec<String> {
    let class = |output: usize| match class_names.get(output) {
        Some(name) if named || name.parse::<u8>().is_ok() => name.clone(),
        _ => output.to_string(),
    };
    (0..num_classes).map(class).collect()
}

fn tensor(pixels: &[u8], count: usize, geometry: Geometry) -> Tensor {
    let size = [count, geometry.channels, geometry.height, geometry.width].map(|d| d as i64);
    Tensor::from_slice(pixels).view(size)
}

/// What lies in a folder, hidden entries left out, by name.
fn sorted(folder: &Path) -> Result<Vec<PathBuf>, LabelledError> {
    let failed = |cause| LabelledError::Read { path: folder.to_owned(), cause };
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if !entry.file_name().to_string_lossy().starts_with('.') {
            paths.push(entry.path());
        }
    }
    paths.sort();
    Ok(paths)
}

fn is_image(path: &Path) -> bool {
    let extension = path.extension().map(|extension| extension.to_string_lossy().to_lowercase());
    extension.is_some_and(|extension| EXTENSIONS.contains(&extension.as_str()))
}

/// One image file as u8 pixels `[C, H, W]`.
fn decode(path: &Path, geometry: Geometry) -> Result<Vec<u8>, LabelledError> {
    let read = |cause| LabelledError::Read { path: path.to_owned(), cause };
    let file = BufReader::new(files::open(path).map_err(read)?);
    let reader = image::ImageReader::new(file).with_guessed_format().map_err(read)?;
    let image =
        reader.decode().map_err(|error| LabelledError::Image { path: path.to_owned(), cause: error.to_string() })?;
    let (width, height) = (geometry.width as u32, geometry.height as u32);
    let image = if (image.width(), image.height()) == (width, height) {
        image
    } else {
        image.resize_to_fill(width, height, FilterType::Triangle)
    };
    let interleaved = match (geometry.channels, image) {
        (1, image) => image.into_luma8().into_raw(),
        (_, DynamicImage::ImageRgb8(image)) => image.into_raw(),
        (_, image) => image.into_rgb8().into_raw(),
    };
    let channels = geometry.channels;
    Ok((0..channels).flat_map(|channel| interleaved.iter().skip(channel).step_by(channels)).copied().collect())
}

impl LabelledImages {
    /// Reads [`Pictures`] for a network with these outputs. A folder's subfolders are the network's classes by name; of a
    /// network without names they are its outputs in alphabetical order, as torchvision's `ImageFolder` has it.
    pub fn open(
        path: &Path,
        geometry: Geometry,
        class_names: &[String],
        num_classes: usize,
    ) -> Result<Self, LabelledError> {
        let pictures = Pictures::open(path, geometry)?;
        let bad = |problem: String| LabelledError::Folder { path: path.to_owned(), problem };
        let known = output_classes(class_names, num_classes, pictures.names.is_some());
        let labels: Vec<i64> = match &pictures.names {
            Some(names) if class_names.is_empty() && names.len() == num_classes => pictures.labels.clone(),
            Some(names) if class_names.is_empty() => {
                return Err(bad(format!(
                    "it has {} subfolders, but the network has {num_classes} outputs without names; give a subfolder for \
                     each, or a network whose metadata has class_names",
                    names.len()
                )));
            }
            names => {
                let output = |label: i64| {
                    let class = pictures.class(label);
                    known.iter().position(|name| *name == class).map_or(-1 - label, |output| output as i64)
                };
                let labels: Vec<i64> = pictures.labels.iter().map(|label| output(*label)).collect();
                if let (Some(_), Some(missing)) = (names, labels.iter().find(|label| **label < 0)) {
                    let class = pictures.class(-1 - missing);
                    return Err(bad(format!("the network has no class {class:?}; it knows {}", known.join(", "))));
                }
                labels
            }
        };
        if let Some((record, class)) = labels.iter().enumerate().find(|(_, label)| **label < 0) {
            return Err(LabelledError::Class { path: path.to_owned(), record, class: -1 - class, num_classes });
        }
        Ok(Self { images: pictures.images, labels: Tensor::from_slice(&labels) })
    }

    /// N.
    pub fn count(&self) -> usize {
        self.labels.size()[0] as usize
    }

    /// The fraction of pictures whose highest logit is that of their class. `logits` maps u8 pixels `[n, C, H, W]` to
    /// `[n, K]`.
    pub fn accuracy(&self, logits: impl Fn(&Tensor) -> Tensor) -> f64 {
        accuracy(&self.images, &self.labels, logits)
    }
}

/// The fraction of `images` (u8 pixels `[N, C, H, W]`) whose highest logit is that of their label (`[N]`).
pub fn accuracy(images: &Tensor, labels: &Tensor, logits: impl Fn(&Tensor) -> Tensor) -> f64 {
    let correct: i64 = predict(images, logits).eq_tensor(labels).sum(Kind::Int64).int64_value(&[]);
    correct as f64 / labels.size()[0].max(1) as f64
}

/// The output with the highest logit for each of `images` (u8 pixels `[N, C, H, W]`): `[N]`, on the host.
pub fn predict(images: &Tensor, logits: impl Fn(&Tensor) -> Tensor) -> Tensor {
    const BATCH: i64 = 250;
    let _guard = tch::no_grad_guard();
    let count = images.size()[0];
    let mut predicted = vec![Tensor::zeros([0], (Kind::Int64, Device::Cpu))];
    let mut at = 0;
    while at < count {
        let length = BATCH.min(count - at);
        predicted.push(logits(&images.narrow(0, at, length)).argmax(1, false).to_device(Device::Cpu));
        at += length;
    }
    Tensor::cat(&predicted, 0)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    const GEOMETRY: Geometry = Geometry { channels: 3, height: 2, width: 4 };

    fn folder(classes: &[&str], size: (u32, u32)) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (index, class) in classes.iter().enumerate() {
            fs::create_dir(folder.path().join(class)).unwrap();
            let colour = image::Rgb([index as u8, 10, 20]);
            let image = image::RgbImage::from_pixel(size.0, size.1, colour);
            image.save(folder.path().join(class).join("a.png")).unwrap();
        }
        folder
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn subfolders_are_the_networks_classes_by_name_and_images_come_in_its_size() {
        let folder = folder(&["ant", "bee"], (9, 6));
        fs::write(folder.path().join("ant/notes.txt"), "not an image").unwrap();
        let open = |names: &[String], n| LabelledImages::open(folder.path(), GEOMETRY, names, n);
        let found = open(&names(&["bee", "cat", "ant"]), 3).unwrap();
        assert_eq!(Vec::<i64>::try_from(&found.labels).unwrap(), [2, 0]);
        assert_eq!(found.images.size(), [2, 3, 2, 4]);
        let first = Vec::<u8>::try_from(found.images.get(1).reshape([-1])).unwrap();
        assert_eq!(first, [[1u8; 8], [10; 8], [20; 8]].concat());
        assert_eq!(Vec::<i64>::try_from(&open(&[], 2).unwrap().labels).unwrap(), [0, 1]);
        let refused = open(&names(&["bee", "cat"]), 2).unwrap_err().to_string();
        assert!(refused.contains("no class \"ant\"; it knows bee, cat"), "{refused}");
        let refused = open(&[], 3).unwrap_err().to_string();
        assert!(refused.contains("2 subfolders, but the network has 3 outputs"), "{refused}");
    }

    #[test]
    fn numbers_in_a_file_are_outputs_unless_the_network_calls_others_so() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("two.bin");
        fs::write(&path, [[vec![4], vec![0; 24]].concat(), [vec![1], vec![0; 24]].concat()].concat()).unwrap();
        let open = |known: &[&str], n| LabelledImages::open(&path, GEOMETRY, &names(known), n);
        let labels = |found: LabelledImages| Vec::<i64>::try_from(&found.labels).unwrap();
        assert_eq!(labels(open(&[], 5).unwrap()), [4, 1]);
        assert_eq!(labels(open(&["ant", "bee", "6", "4"], 4).unwrap()), [3, 1]);
        let refused = open(&["ant", "bee", "cat"], 3).unwrap_err().to_string();
        assert!(refused.contains("record 0 has class 4, but the network has 3 outputs"), "{refused}");
    }

    #[test]
    fn folders_without_images_and_images_that_are_none_are_told() {
        let empty = tempfile::tempdir().unwrap();
        let refused = Pictures::open(empty.path(), GEOMETRY).unwrap_err().to_string();
        assert!(refused.contains("has no pictures"), "{refused}");
        let folder = folder(&["ant"], (4, 2));
        fs::write(folder.path().join("ant/b.jpg"), "no image").unwrap();
        let refused = Pictures::open(folder.path(), GEOMETRY).unwrap_err().to_string();
        assert!(refused.contains("b.jpg as an image"), "{refused}");
    }
}
