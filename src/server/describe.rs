//! `Describe`: what this daemon dreams from, and what it holds.

use tonic::Status;

use super::context::Context;
use super::convert;
use super::limits::MAX_BATCH_BYTES;
use crate::proto::DescribeResponse;

pub(super) fn describe(context: &Context) -> Result<DescribeResponse, Status> {
    context.accept()?;
    Ok(DescribeResponse {
        teacher: Some(convert::teacher(&context.teacher)),
        student: context.students.current().map(|student| convert::student(&student)),
        log: Some(convert::log(context.delivery.log())),
        synthesizer: Some(convert::synthesizer(context)),
        daemon_version: env!("CARGO_PKG_VERSION").to_owned(),
        max_message_bytes: max_message_bytes(context),
        max_student_bytes: context.students.limits().max_bytes,
    })
}

/// A bound on one StreamResponse: the largest chunk there is or will be, or the largest batch that may be asked for.
fn max_message_bytes(context: &Context) -> u64 {
    let log = context.delivery.log();
    // Settings stand in the header as a JSON string inside JSON, where each quote is escaped.
    let header = 8192 + 2 * context.settings.json().len() as u64;
    let chunk = context.settings.batch_size as u64 * context.image_bytes(1) + header;
    chunk.max(log.extent().largest_chunk_bytes + 1024).max(MAX_BATCH_BYTES)
}
