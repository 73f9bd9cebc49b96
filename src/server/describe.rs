//! `Describe`: what this daemon dreams from, and what it holds.

use tonic::Status;

use super::context::Context;
use super::convert;
use crate::proto::DescribeResponse;

pub(super) fn describe(context: &Context) -> Result<DescribeResponse, Status> {
    context.accept()?;
    Ok(DescribeResponse {
        teacher: Some(convert::teacher(&context.teacher)),
        student: context.students.current().map(|student| convert::student(&student)),
        log: Some(convert::log(&context.log)),
        synthesizer: Some(convert::synthesizer(context)),
        daemon_version: env!("CARGO_PKG_VERSION").to_owned(),
        max_message_bytes: max_message_bytes(context),
        max_student_bytes: context.students.limits().max_bytes,
    })
}

/// A bound on one StreamResponse: the data of a full batch, and room for the header and the other fields.
fn max_message_bytes(context: &Context) -> u64 {
    let (pixels, classes) = (context.teacher.geometry.pixels() as u64, context.teacher.spec.num_classes as u64);
    let image = pixels + 8 + 8 + 4 + 4 * classes;
    // Settings stand in the header as a JSON string inside JSON, where each quote is escaped.
    let header = 8192 + 2 * context.log.identity().settings_json.len() as u64;
    context.settings.batch_size as u64 * image + header
}
