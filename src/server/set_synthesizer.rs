//! `SetSynthesizer`: another tier makes the images from the next batch on.

use tonic::{Code, Status};

use super::context::Context;
use super::{convert, status};
use crate::proto::{SetSynthesizerRequest, SetSynthesizerResponse};
use crate::synthesis::settings::SynthesizerKind;

pub(super) fn set_synthesizer(
    context: &Context,
    request: &SetSynthesizerRequest,
) -> Result<SetSynthesizerResponse, Status> {
    context.accept()?;
    let kind = SynthesizerKind::named(&request.name).ok_or_else(|| {
        let known = SynthesizerKind::ALL.map(SynthesizerKind::name).join(", ");
        let name: String = request.name.chars().take(64).collect();
        status::of(Code::InvalidArgument, &format!("name is {name:?}; give one of {known}"))
    })?;
    context.synthesizer.send_replace(kind);
    Ok(SetSynthesizerResponse { synthesizer: Some(convert::synthesizer(context)) })
}
