//! Parquet, with the schema metadata from which Hugging Face `datasets` knows that `image` is an image and `label` a
//! class. Written column by column, without Arrow, which would cost minutes of compilation.

use std::io;
use std::sync::Arc;

use ::parquet::basic::Compression;
use ::parquet::data_type::{ByteArray, ByteArrayType, DataType, FloatType, Int64Type};
use ::parquet::errors::ParquetError;
use ::parquet::file::metadata::KeyValue;
use ::parquet::file::properties::{EnabledStatistics, WriterProperties};
use ::parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use ::parquet::schema::parser::parse_message_type;
use serde_json::json;

use super::Sample;
use super::shards::Shard;
use crate::files::NewFile;

/// Everything is optional although nothing is ever missing: `datasets` takes the features of the metadata only where its
/// own, nullable, types are in the file.
const SCHEMA: &str = "message dreams {
  optional group image { optional binary bytes; optional binary path (UTF8); }
  optional int64 label;
  optional group teacher_logits (LIST) { repeated group list { optional float element; } }
  optional int64 sequence;
  optional int64 student_version;
  optional float competition;
}";
/// A row group is written when it has this many images, or bytes.
const GROUP_IMAGES: usize = 1024;
const GROUP_BYTES: usize = 32 << 20;

/// One Parquet file.
pub(super) struct ParquetFile {
    writer: SerializedFileWriter<NewFile>,
    rows: Rows,
}

/// The columns of the row group to come.
#[derive(Default)]
struct Rows {
    png: Vec<ByteArray>,
    path: Vec<ByteArray>,
    label: Vec<i64>,
    logits: Vec<f32>,
    /// 0 where a row's list begins, 1 where it goes on.
    logits_repetition: Vec<i16>,
    sequence: Vec<i64>,
    student_version: Vec<i64>,
    competition: Vec<f32>,
    bytes: usize,
}

impl Shard for ParquetFile {
    const EXTENSION: &'static str = "parquet";

    fn begin(file: NewFile, num_classes: usize) -> io::Result<Self> {
        let features = KeyValue::new("huggingface".to_owned(), features(num_classes));
        // PNG and logits do not get smaller, and their smallest and largest values tell nobody anything.
        let properties = WriterProperties::builder()
            .set_compression(Compression::UNCOMPRESSED)
            .set_dictionary_enabled(false)
            .set_statistics_enabled(EnabledStatistics::None)
            .set_key_value_metadata(Some(vec![features]))
            .build();
        let schema = parse_message_type(SCHEMA).map_err(plain)?;
        let writer = SerializedFileWriter::new(file, Arc::new(schema), Arc::new(properties)).map_err(plain)?;
        Ok(Self { writer, rows: Rows::default() })
    }

    fn write(&mut self, sample: &Sample<'_>) -> io::Result<()> {
        let (rows, record) = (&mut self.rows, &sample.record);
        rows.bytes += sample.png.len() + 4 * record.teacher_logits.len();
        rows.png.push(sample.png.clone().into());
        rows.path.push(ByteArray::from(format!("{}.png", sample.key).into_bytes()));
        rows.label.push(record.label);
        rows.logits_repetition.extend((0..record.teacher_logits.len()).map(|i| i16::from(i > 0)));
        rows.logits.extend(&record.teacher_logits);
        rows.sequence.push(record.sequence as i64);
        rows.student_version.push(record.student_version);
        rows.competition.push(record.competition);
        if rows.label.len() >= GROUP_IMAGES || rows.bytes >= GROUP_BYTES {
            self.write_group()?;
        }
        Ok(())
    }

    fn finish(mut self) -> io::Result<()> {
        self.write_group()?;
        self.writer.into_inner().map_err(plain)?.complete()
    }
}

impl ParquetFile {
    fn write_group(&mut self) -> io::Result<()> {
        let rows = std::mem::take(&mut self.rows);
        if rows.label.is_empty() {
            return Ok(());
        }
        let mut group = self.writer.next_row_group().map_err(plain)?;
        // In the schema's order. The level counts the optional and repeated fields on a value's way, all of them there.
        column::<ByteArrayType>(&mut group, &rows.png, 2, None)?;
        column::<ByteArrayType>(&mut group, &rows.path, 2, None)?;
        column::<Int64Type>(&mut group, &rows.label, 1, None)?;
        column::<FloatType>(&mut group, &rows.logits, 3, Some(&rows.logits_repetition))?;
        column::<Int64Type>(&mut group, &rows.sequence, 1, None)?;
        column::<Int64Type>(&mut group, &rows.student_version, 1, None)?;
        column::<FloatType>(&mut group, &rows.competition, 1, None)?;
        group.close().map_err(plain)?;
        Ok(())
    }
}

fn column<T: DataType>(
    group: &mut SerializedRowGroupWriter<'_, NewFile>,
    values: &[T::T],
    level: i16,
    repetition: Option<&[i16]>,
) -> io::Result<()> {
    let writer = group.next_column().map_err(plain)?;
    let mut writer = writer.ok_or_else(|| io::Error::other("the Parquet schema has too few columns"))?;
    let definition = vec![level; values.len()];
    writer.typed::<T>().write_batch(values, Some(&definition), repetition).map_err(plain)?;
    writer.close().map_err(plain)
}

/// The features as `datasets` writes them. Classes have no names in a log: their indices stand for them.
fn features(num_classes: usize) -> String {
    let value = |dtype: &str| json!({ "dtype": dtype, "_type": "Value" });
    let names: Vec<String> = (0..num_classes).map(|class| class.to_string()).collect();
    let features = json!({
        "image": { "_type": "Image" },
        "label": { "names": names, "_type": "ClassLabel" },
        // What newer versions call List; they read this too.
        "teacher_logits": { "feature": value("float32"), "_type": "Sequence" },
        "sequence": value("int64"),
        "student_version": value("int64"),
        "competition": value("float32"),
    });
    json!({ "info": { "features": features } }).to_string()
}

/// The error of the file where it is one: it names the file already.
fn plain(error: ParquetError) -> io::Error {
    match error {
        ParquetError::External(error) => io::Error::other(error),
        other => io::Error::other(other.to_string()),
    }
}
