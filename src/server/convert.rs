//! All conversion between the wire and the domain, and nothing else.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tonic::{Code, Status};

use super::context::Context;
use super::limits::MAX_BATCH_BYTES;
use super::status;
use crate::delivery::{PixelFormat, Policy, Replay, Sampling, Shard, Staleness};
use crate::log::{Extent, Located, Log};
use crate::model::source::NetworkSource;
use crate::proto::stream_start::Position;
use crate::proto::{self, ReplaySampling};
use crate::students::{PushError, PushHeader, Student};

pub(super) fn teacher(source: &NetworkSource) -> proto::Teacher {
    proto::Teacher {
        arch: source.spec.arch().to_owned(),
        sha256: source.identity.clone(),
        num_classes: saturate(source.spec.num_classes),
        class_names: source.class_names.clone(),
        geometry: Some(proto::Geometry {
            channels: saturate(source.geometry.channels),
            height: saturate(source.geometry.height),
            width: saturate(source.geometry.width),
        }),
        normalization: Some(proto::Normalization {
            mean: source.normalization.mean.clone(),
            std: source.normalization.std.clone(),
        }),
        num_parameters: source.spec.num_parameters(),
    }
}

pub(super) fn student(student: &Student) -> proto::Student {
    proto::Student {
        version: student.version,
        arch: student.arch.clone(),
        byte_length: student.checkpoint.bytes().len() as u64,
        sha256: student.sha256.to_vec().into(),
        trainer_step: student.trainer_step,
        accepted_at: Some(student.accepted_at.into()),
        num_classes: saturate(student.spec.num_classes),
    }
}

pub(super) fn log(log: &Log) -> proto::Log {
    let Extent { first_sequence, next_sequence, images, chunks, bytes, lost_images, .. } = log.extent();
    let log_id = log.identity().log_id.to_string();
    proto::Log { log_id, first_sequence, next_sequence, chunks, bytes, images, lost_images }
}

pub(super) fn synthesizer(context: &Context) -> proto::Synthesizer {
    let settings = context.settings();
    proto::Synthesizer {
        name: settings.synthesizer.name().to_owned(),
        settings_json: settings.json().to_string(),
        preset: settings.preset,
        batch_size: saturate(settings.batch_size),
    }
}

pub(super) fn duration(duration: Duration) -> prost_types::Duration {
    prost_types::Duration {
        seconds: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(duration.subsec_nanos()).unwrap_or(0),
    }
}

/// The header of a push.
pub(super) fn push_header(header: proto::PushStudentHeader) -> Result<PushHeader, PushError> {
    let sha256 = header.sha256.as_ref().try_into().map_err(|_| {
        PushError::Header(format!("sha256 has {} bytes; give the 32 bytes of the digest", header.sha256.len()))
    })?;
    if header.byte_length == 0 {
        return Err(PushError::Header("byte_length is 0; give the length of the file".into()));
    }
    Ok(PushHeader {
        arch: header.arch,
        byte_length: header.byte_length,
        sha256,
        trainer_step: header.trainer_step,
        replaces_version: header.replaces_version,
    })
}

/// The policy that a stream's request asks for.
pub(super) fn policy(request: &proto::StreamRequest, context: &Context) -> Result<Policy, Status> {
    let malformed = |problem: String| status::of(Code::InvalidArgument, &problem);
    let shard = request.shard.unwrap_or_default();
    let (index, count) = (shard.index, shard.count);
    let shard = Shard { index, count: count.max(1) };
    if index >= shard.count {
        return Err(malformed(format!("shard.index is {index} of {count}; give 0 to count - 1")));
    }
    let replay = request.replay.unwrap_or_default();
    let share = f64::from(replay.share);
    if !(0.0..=1.0).contains(&share) {
        return Err(malformed(format!("replay.share is {share}; give a number from 0 to 1")));
    }
    let sampling = match ReplaySampling::try_from(replay.sampling) {
        Ok(ReplaySampling::Unspecified | ReplaySampling::Uniform) => Sampling::Uniform,
        Ok(ReplaySampling::Recency) => Sampling::Recency,
        Ok(ReplaySampling::Competition) => Sampling::Competition,
        Err(_) => {
            return Err(malformed(format!("replay.sampling is {}, which is no ReplaySampling", replay.sampling)));
        }
    };
    let bound = request.staleness_bound.unwrap_or_default();
    let signs = bound.max_age.is_none_or(|age| age.seconds >= 0 && age.nanos >= 0);
    let max_age = bound.max_age.map(Duration::try_from).transpose().ok().filter(|_| signs);
    let max_age = max_age.ok_or_else(|| malformed("staleness_bound.max_age is not a duration from 0".into()))?;
    let (pixels, pixel_bytes) = match proto::PixelFormat::try_from(request.pixel_format) {
        Ok(proto::PixelFormat::Unspecified | proto::PixelFormat::U8) => (PixelFormat::U8, 1),
        Ok(proto::PixelFormat::F32Normalized) => (PixelFormat::F32Normalized, 4),
        Ok(proto::PixelFormat::F16Normalized) => (PixelFormat::F16Normalized, 2),
        Err(_) => {
            return Err(malformed(format!("pixel_format is {}, which is no PixelFormat", request.pixel_format)));
        }
    };
    let num_classes = context.teacher.spec.num_classes;
    if let Some(class) = request.classes.iter().find(|class| **class as usize >= num_classes) {
        return Err(malformed(format!(
            "classes names {class}; the teacher has the classes 0 to {}",
            num_classes.saturating_sub(1)
        )));
    }
    let image = context.image_bytes(pixel_bytes);
    let most = MAX_BATCH_BYTES.saturating_sub(8192) / image.max(1);
    if u64::from(request.batch_size) > most {
        return Err(malformed(format!(
            "batch_size is {}, and at most {most} images of this format fit into one message",
            request.batch_size
        )));
    }
    let batch_size = match request.batch_size {
        // A mix of fresh and replayed images needs a size.
        0 if share > 0.0 => Some(context.settings.batch_size.min(most as usize)),
        0 => None,
        size => Some(size as usize),
    };
    let classes: BTreeSet<u32> = request.classes.iter().copied().collect();
    Ok(Policy {
        shard,
        replay: if share > 0.0 { Replay { share, sampling } } else { Replay::default() },
        staleness: Staleness { max_student_versions: bound.max_student_versions, max_age },
        batch_size,
        pixels,
        classes: (!classes.is_empty() && classes.len() < num_classes).then(|| Arc::new(classes)),
    })
}

/// The sequence at which a stream starts.
pub(super) fn start_position(start: Option<&proto::StreamStart>, log: &Log) -> Result<u64, Status> {
    let extent = log.extent();
    let sequence = match start.and_then(|start| start.position.as_ref()) {
        None | Some(Position::Latest(_)) => extent.next_sequence,
        Some(Position::Earliest(_)) => extent.first_sequence,
        Some(Position::Sequence(sequence)) => *sequence,
        Some(Position::Cursor(cursor)) => log.position(cursor).map_err(|error| status::of_cursor(&error, &extent))?,
    };
    // A position is judged by what lies there: the seed set can be read although it lies before the log's beginning.
    match log.locate(sequence) {
        Located::Chunk(_) | Located::Wait => Ok(sequence),
        Located::Overtaken { first_sequence } => Err(status::overtaken(sequence, first_sequence)),
        Located::Lost { next_sequence } => Err(status::lost(sequence, next_sequence)),
        Located::Ahead { next_sequence } => Err(status::ahead(sequence, next_sequence)),
    }
}

/// Nothing here is ever near 2^32; a wrapped number would be worse than a capped one.
pub(super) fn saturate(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
