//! A message's payload out of rows of chunks: one allocation, each row copied once. The layout is documented at
//! `StreamResponse.payload` in the contract.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use half::f16;
use serde_json::json;

use super::policy::PixelFormat;
use crate::log::{Chunk, LogIdentity};
use crate::model::source::{Geometry, Normalization};
use crate::synthesis::settings::SynthesizerKind;

/// The `format` in the metadata of a batch that was put together for one policy.
pub const FORMAT: &str = "dreamfeed.batch.v1";

/// What every pixel value becomes, per channel.
#[derive(Clone, Debug)]
pub struct PixelTables {
    f32s: Vec<[[u8; 4]; 256]>,
    f16s: Vec<[[u8; 2]; 256]>,
}

impl PixelTables {
    /// (pixel / 255 - mean) / std, as the contract says.
    pub fn new(normalization: &Normalization) -> Self {
        let channels = || normalization.mean.iter().zip(&normalization.std);
        let value = |pixel: usize, mean: f32, std: f32| (pixel as f32 / 255.0 - mean) / std;
        Self {
            f32s: channels().map(|(m, s)| std::array::from_fn(|p| value(p, *m, *s).to_le_bytes())).collect(),
            f16s: channels()
                .map(|(m, s)| std::array::from_fn(|p| f16::from_f32(value(p, *m, *s)).to_le_bytes()))
                .collect(),
        }
    }
}

/// How the payload of a message is laid out: the same for all messages of a stream that have as many images.
#[derive(Debug)]
pub struct Layout {
    count: usize,
    fresh: usize,
    pixels: PixelFormat,
    /// The file up to its first tensor.
    head: Vec<u8>,
    columns: Columns,
}

/// The payload under construction. It owns what it needs, so that it can be put together on any thread.
pub struct Assembly {
    file: Vec<u8>,
    geometry: Geometry,
    num_classes: usize,
    tables: Arc<PixelTables>,
    layout: Arc<Layout>,
    /// Rows so far.
    pushed: usize,
}

/// Where each tensor lies in the file.
#[derive(Debug)]
struct Columns {
    labels: Range<usize>,
    sequence: Range<usize>,
    student_version: Range<usize>,
    synthesizer: Range<usize>,
    competition: Range<usize>,
    teacher_logits: Range<usize>,
    images: Range<usize>,
}

impl Layout {
    /// Of `count` images, the first `fresh` of which are fresh.
    pub fn new(log: &LogIdentity, pixels: PixelFormat, count: usize, fresh: usize) -> Self {
        let geometry = log.geometry;
        let (dtype, width) = match pixels {
            PixelFormat::U8 => ("U8", 1),
            PixelFormat::F32Normalized => ("F32", 4),
            PixelFormat::F16Normalized => ("F16", 2),
        };
        let metadata = BTreeMap::from([
            ("format", FORMAT.to_owned()),
            ("log_id", log.log_id.to_string()),
            ("teacher_sha256", log.teacher_sha256.clone()),
            ("count", count.to_string()),
            ("fresh_count", fresh.to_string()),
            ("pixels", pixels.name().to_owned()),
            ("synthesizers", SynthesizerKind::ALL.map(SynthesizerKind::name).join(",")),
        ]);
        let mut header = serde_json::Map::from_iter([("__metadata__".to_owned(), json!(metadata))]);
        let mut end = 0;
        let mut column = |name: &str, dtype: &str, shape: &[usize], bytes: usize| {
            let start = end;
            end += bytes;
            header.insert(name.into(), json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, end] }));
            start..end
        };
        let image_shape = [count, geometry.channels, geometry.height, geometry.width];
        let (n, k) = (count, log.num_classes);
        let mut columns = Columns {
            labels: column("labels", "I64", &[n], 8 * n),
            sequence: column("sequence", "I64", &[n], 8 * n),
            student_version: column("student_version", "I64", &[n], 8 * n),
            synthesizer: column("synthesizer", "I64", &[n], 8 * n),
            competition: column("competition", "F32", &[n], 4 * n),
            teacher_logits: column("teacher_logits", "F32", &[n, k], 4 * n * k),
            images: column("images", dtype, &image_shape, n * geometry.pixels() * width),
        };
        let mut header = serde_json::Value::Object(header).to_string().into_bytes();
        header.resize(header.len().next_multiple_of(8), b' ');
        let start = 8 + header.len();
        for range in [
            &mut columns.labels,
            &mut columns.sequence,
            &mut columns.student_version,
            &mut columns.synthesizer,
            &mut columns.competition,
            &mut columns.teacher_logits,
            &mut columns.images,
        ] {
            *range = range.start + start..range.end + start;
        }
        let mut head = (header.len() as u64).to_le_bytes().to_vec();
        head.append(&mut header);
        Self { count, fresh, pixels, head, columns }
    }

    /// The length of the file in bytes.
    pub fn bytes(&self) -> usize {
        self.columns.images.end
    }

    /// Whether it is the one for this many images.
    pub fn fits(&self, count: usize, fresh: usize) -> bool {
        (self.count, self.fresh) == (count, fresh)
    }
}

impl Assembly {
    /// Room for the images of the layout.
    pub fn new(log: &LogIdentity, tables: Arc<PixelTables>, layout: Arc<Layout>) -> Self {
        let columns = &layout.columns;
        let mut file = Vec::with_capacity(columns.images.end);
        file.extend_from_slice(&layout.head);
        // The pixels are nearly all of it: they are appended and never written twice.
        file.resize(columns.images.start, 0);
        Self { file, geometry: log.geometry, num_classes: log.num_classes, tables, layout, pushed: 0 }
    }

    /// Appends neighbouring rows of a chunk; false where there are no such rows or no room for them, which is a bug of the
    /// caller's.
    pub fn extend(&mut self, chunk: &Chunk, rows: Range<usize>) -> bool {
        let (k, pixels) = (4 * self.num_classes, self.geometry.pixels());
        let (Some(labels), Some(versions), Some(competition), Some(logits), Some(images)) = (
            chunk.labels().get(rows.clone()),
            chunk.student_versions().get(rows.clone()),
            chunk.competition().get(rows.clone()),
            chunk.teacher_logits().get(rows.start * k..rows.end * k),
            chunk.images().get(rows.start * pixels..rows.end * pixels),
        ) else {
            return false;
        };
        let to = self.pushed;
        self.pushed += rows.len();
        if self.pushed > self.layout.count {
            return false;
        }
        let sequences = rows.clone().map(|row| (chunk.first_sequence() + row as u64).to_le_bytes());
        let sequences: Vec<[u8; 8]> = sequences.collect();
        let synthesizers = vec![code(chunk.synthesizer).to_le_bytes(); rows.len()];
        let columns = &self.layout.columns;
        let small: [(&Range<usize>, usize, &[u8]); 6] = [
            (&columns.labels, 8, labels.as_flattened()),
            (&columns.sequence, 8, sequences.as_flattened()),
            (&columns.student_version, 8, versions.as_flattened()),
            (&columns.synthesizer, 8, synthesizers.as_flattened()),
            (&columns.competition, 4, competition.as_flattened()),
            (&columns.teacher_logits, k, logits),
        ];
        for (range, width, data) in small {
            let start = range.start + to * width;
            match self.file.get_mut(start..start + data.len()) {
                Some(row) => row.copy_from_slice(data),
                None => return false,
            }
        }
        let plane = (self.geometry.height * self.geometry.width).max(1);
        match self.layout.pixels {
            PixelFormat::U8 => self.file.extend_from_slice(images),
            PixelFormat::F32Normalized => convert(&mut self.file, images, plane, &self.tables.f32s),
            PixelFormat::F16Normalized => convert(&mut self.file, images, plane, &self.tables.f16s),
        }
        true
    }

    /// The safetensors file; None where rows are missing.
    pub fn finish(self) -> Option<Bytes> {
        (self.file.len() == self.layout.columns.images.end).then(|| self.file.into())
    }
}

/// The chunk's synthesizer as an index into the metadata's list; -1 where a newer daemon made it by one unknown here.
fn code(synthesizer: Option<SynthesizerKind>) -> i64 {
    let index = SynthesizerKind::ALL.iter().position(|kind| Some(*kind) == synthesizer);
    index.and_then(|index| i64::try_from(index).ok()).unwrap_or(-1)
}

fn convert<const B: usize>(file: &mut Vec<u8>, images: &[u8], plane: usize, tables: &[[[u8; B]; 256]]) {
    for (pixels, table) in images.chunks(plane).zip(tables.iter().cycle()) {
        file.extend(pixels.iter().flat_map(|pixel| table[usize::from(*pixel)]));
    }
}
