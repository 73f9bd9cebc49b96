//! `FetchStudent`: a header, then the file in pieces that share its memory.

use std::sync::Arc;

use futures_util::stream::{self, BoxStream, StreamExt};
use tonic::{Code, Status};

use super::context::Context;
use super::{convert, status};
use crate::proto::fetch_student_response::Part;
use crate::proto::{FetchStudentRequest, FetchStudentResponse};
use crate::telemetry;

/// Bytes of one piece: well below every gRPC library's default limit on a message.
const PIECE_BYTES: usize = 1 << 20;

/// What a call to `FetchStudent` answers with.
pub(super) type Responses = BoxStream<'static, Result<FetchStudentResponse, Status>>;

pub(super) async fn open(context: &Arc<Context>, request: FetchStudentRequest) -> Result<Responses, Status> {
    context.accept()?;
    let permit = context.fetches.clone().try_acquire_owned().map_err(|_| {
        metrics::counter!(telemetry::FETCHES_REFUSED).increment(1);
        let message = format!(
            "{} students are being fetched, as many as this daemon sends at one time (its setting students.max_fetches); \
             retry with back-off",
            context.max_fetches
        );
        status::of(Code::ResourceExhausted, &message)
    })?;
    let current = context.students.current();
    let student = match (request.version, current) {
        (_, None) => return Err(status::of(Code::NotFound, "no student was pushed yet")),
        (0, Some(newest)) => newest,
        (version, Some(newest)) => {
            let stored = context.students.get(version).await;
            let stored = stored.map_err(|error| status::of(Code::Unavailable, &error.to_string()))?;
            stored.ok_or_else(|| {
                let message =
                    format!("version {version} is not held; the newest is {}, version 0 fetches it", newest.version);
                status::of(Code::NotFound, &message)
            })?
        }
    };
    let header = Part::Header(convert::student(&student));
    let file = student.checkpoint.bytes().clone();
    let pieces = (0..file.len())
        .step_by(PIECE_BYTES)
        .map(move |start| Part::Data(file.slice(start..file.len().min(start + PIECE_BYTES))));
    // For as long as this reader takes: the copy that others who fetch this version share, and its place among them.
    let held = (student, permit);
    let parts = std::iter::once(header).chain(pieces);
    let closing = context.clone();
    let responses = stream::unfold(Some(parts), move |parts| {
        let _held = &held;
        let next = parts.and_then(|mut parts| match parts.next() {
            // A file cut short must not look like a whole one.
            Some(_) if closing.closing.is_cancelled() => Some((Err(closing.closing_status()), None)),
            Some(part) => Some((Ok(FetchStudentResponse { part: Some(part) }), Some(parts))),
            None => None,
        });
        std::future::ready(next)
    });
    Ok(responses.boxed())
}
