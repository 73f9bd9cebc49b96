//! All conversion between the wire and the domain, and nothing else.

use std::time::{Duration, SystemTime};

use tonic::{Code, Status};

use super::context::Context;
use crate::log::{CursorError, Extent, Log};
use crate::model::source::NetworkSource;
use crate::proto;
use crate::proto::stream_start::Position;
use crate::students::{PushError, PushHeader, Student, beginning};

/// Bytes of a status message. It travels percent-encoded in an HTTP/2 header, which grpcio caps at 8 KiB.
const MESSAGE_BYTES: usize = 2000;

/// A status whose message is one line of bounded length, whatever went into it.
pub(super) fn status(code: Code, message: &str) -> Status {
    let line: String = message.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    if line.len() <= MESSAGE_BYTES {
        return Status::new(code, line);
    }
    let kept = beginning(&line, MESSAGE_BYTES);
    Status::new(code, format!("{kept}... ({} bytes more)", line.len() - kept.len()))
}

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
    let Extent { first_sequence, next_sequence, chunks, bytes, .. } = log.extent();
    proto::Log { log_id: log.identity().log_id.to_string(), first_sequence, next_sequence, chunks, bytes }
}

pub(super) fn synthesizer(context: &Context) -> proto::Synthesizer {
    proto::Synthesizer {
        name: context.settings.synthesizer.name().to_owned(),
        preset: context.settings.preset.clone(),
        settings_json: context.log.identity().settings_json.clone(),
        batch_size: saturate(context.settings.batch_size),
    }
}

/// The age of something made at `created_at`; 0 where the clock went back.
pub(super) fn age(created_at: SystemTime) -> prost_types::Duration {
    let age = SystemTime::now().duration_since(created_at).unwrap_or(Duration::ZERO);
    prost_types::Duration {
        seconds: i64::try_from(age.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(age.subsec_nanos()).unwrap_or(0),
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

pub(super) fn push_status(error: &PushError) -> Status {
    let code = match error {
        PushError::TooLarge { .. } | PushError::Busy { .. } => Code::ResourceExhausted,
        PushError::Conflict { .. } => Code::FailedPrecondition,
        PushError::Internal(_) => Code::Internal,
        PushError::Header(_)
        | PushError::Truncated { .. }
        | PushError::TooLong { .. }
        | PushError::Digest { .. }
        | PushError::Format(_)
        | PushError::Arch(_)
        | PushError::Tensors(_)
        | PushError::NotFinite { .. }
        | PushError::NegativeVariance { .. }
        | PushError::Channels { .. }
        | PushError::Classes { .. } => Code::InvalidArgument,
    };
    status(code, &error.to_string())
}

/// Checks everything in a stream's request but its start: first whether it makes sense, then whether this version of the
/// daemon can do it.
pub(super) fn check_stream_options(request: &proto::StreamRequest, num_classes: usize) -> Result<(), Status> {
    let malformed = |problem: String| Err(status(Code::InvalidArgument, &problem));
    let shard = request.shard.unwrap_or_default();
    if shard.index >= shard.count.max(1) {
        return malformed(format!("shard.index is {} of {}; give 0 to count - 1", shard.index, shard.count));
    }
    let replay = request.replay.unwrap_or_default();
    if !(0.0..=1.0).contains(&replay.share) {
        return malformed(format!("replay.share is {}; give a number from 0 to 1", replay.share));
    }
    if proto::ReplaySampling::try_from(replay.sampling).is_err() {
        return malformed(format!("replay.sampling is {}, which is no ReplaySampling", replay.sampling));
    }
    let bound = request.staleness_bound.unwrap_or_default();
    if bound.max_age.is_some_and(|age| Duration::try_from(age).is_err()) {
        return malformed("staleness_bound.max_age is not a duration from 0".into());
    }
    let Ok(pixel_format) = proto::PixelFormat::try_from(request.pixel_format) else {
        return malformed(format!("pixel_format is {}, which is no PixelFormat", request.pixel_format));
    };
    if let Some(class) = request.classes.iter().find(|class| **class as usize >= num_classes) {
        return malformed(format!(
            "classes names {class}; the teacher has the classes 0 to {}",
            num_classes.saturating_sub(1)
        ));
    }

    let missing = |option: &str, instead: &str| {
        Err(status(Code::Unimplemented, &format!("this version of the daemon does not have {option} yet; {instead}")))
    };
    if shard.count > 1 {
        return missing("shard with a count above 1", "leave shard out to get everything");
    }
    if replay.share > 0.0 {
        return missing("replay with a share above 0", "leave replay out and keep your own replay buffer");
    }
    if bound.max_student_versions.is_some() || bound.max_age.is_some() {
        return missing("staleness_bound", "leave it out and compare student_version in each batch yourself");
    }
    if request.batch_size > 0 {
        return missing("batch_size above 0", "leave it at 0 to get whole chunks");
    }
    if !matches!(pixel_format, proto::PixelFormat::Unspecified | proto::PixelFormat::U8) {
        return missing("pixel_format other than PIXEL_FORMAT_U8", "normalize as Describe says");
    }
    if !request.classes.is_empty() {
        return missing("classes", "leave it empty and select by the labels in each batch");
    }
    Ok(())
}

/// The sequence at which a stream starts. Whether the log still holds it is for the first read to say.
pub(super) fn start_position(start: Option<&proto::StreamStart>, log: &Log) -> Result<u64, Status> {
    let extent = log.extent();
    let sequence = match start.and_then(|start| start.position.as_ref()) {
        None | Some(Position::Latest(_)) => extent.next_sequence,
        Some(Position::Earliest(_)) => extent.first_sequence,
        Some(Position::Sequence(sequence)) => *sequence,
        Some(Position::Cursor(cursor)) => log.position(cursor).map_err(|error| cursor_status(&error, &extent))?,
    };
    if sequence < extent.first_sequence {
        return Err(overtaken(sequence, extent.first_sequence));
    }
    if sequence > extent.next_sequence {
        return Err(ahead(sequence, extent.next_sequence));
    }
    Ok(sequence)
}

fn cursor_status(error: &CursorError, extent: &Extent) -> Status {
    match error {
        CursorError::Malformed(_) => status(Code::InvalidArgument, &format!("start.cursor: {error}")),
        CursorError::OtherLog(_) => status(
            Code::OutOfRange,
            &format!(
                "start.cursor: {error}; start from earliest: the first sequence that this log holds is {}",
                extent.first_sequence
            ),
        ),
    }
}

/// The reader's next image is gone.
pub(super) fn overtaken(position: u64, first_sequence: u64) -> Status {
    status(
        Code::OutOfRange,
        &format!(
            "sequence {position} is not in the log any more; the first sequence that is still there is {first_sequence}"
        ),
    )
}

/// The reader asks for an image that will not be the next.
pub(super) fn ahead(position: u64, next_sequence: u64) -> Status {
    status(
        Code::OutOfRange,
        &format!(
            "sequence {position} lies beyond the next image to be made, which is {next_sequence}; start at most there"
        ),
    )
}

/// Nothing here is ever near 2^32; a wrapped number would be worse than a capped one.
pub(super) fn saturate(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
