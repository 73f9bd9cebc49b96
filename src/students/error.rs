//! Why a push is refused. Every message is one sentence that a trainer's author can act on, and of bounded length
//! although names in it come from the network: gRPC carries it in a header that clients cap at a few KiB.

use crate::model::checkpoint::CheckpointError;
use crate::model::spec::{Mismatch, SpecError};
use crate::storage::StorageError;

/// Names listed of each kind of mismatch.
const LISTED: usize = 6;
/// Bytes kept of one name.
const NAME_BYTES: usize = 80;

/// Why a push is refused. The current student stays.
#[derive(Debug, thiserror::Error)]
pub enum PushError {
    /// The header is malformed.
    #[error("the push's header is malformed: {0}")]
    Header(String),
    /// The file is larger than the daemon accepts.
    #[error(
        "the student has {bytes} bytes, but this daemon accepts at most {limit} (its setting students.max_bytes)"
    )]
    TooLarge {
        /// What the header announces.
        bytes: u64,
        /// What is accepted.
        limit: u64,
    },
    /// The network costs more than the daemon takes.
    #[error("the student is more than this daemon takes: {0}")]
    Cost(String),
    /// What would be stored cannot be read back.
    #[error(
        "the student would be stored in a form that cannot be read back ({0}), so it is refused; push it without \
         __metadata__ and with plain names"
    )]
    Unreadable(String),
    /// Every slot is taken.
    #[error("{limit} pushes are already under way, as many as this daemon takes at a time; retry with back-off")]
    Busy {
        /// The number of slots.
        limit: usize,
    },
    /// The stream ended early.
    #[error(
        "the push ended after {received} of the {announced} bytes that its header announces; send the whole file"
    )]
    Truncated {
        /// Bytes that came.
        received: u64,
        /// Bytes that the header announces.
        announced: u64,
    },
    /// The stream goes on too long.
    #[error(
        "the push brought {received} bytes, more than the {announced} that its header announces; set byte_length to \
         the length of the file"
    )]
    TooLong {
        /// Bytes that came, so far.
        received: u64,
        /// Bytes that the header announces.
        announced: u64,
    },
    /// The bytes are not those that the header announces.
    #[error(
        "the file's SHA-256 is {found}, but the header announces {announced}: it was damaged on the way, push it again"
    )]
    Digest {
        /// Of the bytes that came.
        found: String,
        /// Of the header.
        announced: String,
    },
    /// Not safetensors.
    #[error("the file is {0}")]
    Format(String),
    /// No such architecture, or too long a name.
    #[error("{0}")]
    Arch(String),
    /// The tensors are not those of the architecture.
    #[error("{}", describe(.0))]
    Tensors(Box<Mismatch>),
    /// A value is NaN or infinite.
    #[error("tensor {tensor} is not finite as f32: element {index} is {value}; push only weights that are finite")]
    NotFinite {
        /// Its name.
        tensor: String,
        /// The flat index of the first such element.
        index: usize,
        /// The element.
        value: f64,
    },
    /// A variance is negative.
    #[error("tensor {tensor} is a variance, but element {index} is {value}; a running_var is never negative")]
    NegativeVariance {
        /// Its name.
        tensor: String,
        /// The flat index of the first such element.
        index: usize,
        /// The element.
        value: f64,
    },
    /// The student does not take the teacher's images.
    #[error("tensor conv1.weight takes {found} input channels, but the teacher's images have {expected}")]
    Channels {
        /// The student's.
        found: usize,
        /// The teacher's.
        expected: usize,
    },
    /// The student cannot tell all of the teacher's classes apart.
    #[error(
        "tensor {head}.weight has {found} outputs, but the teacher has {expected} classes; give at least as many"
    )]
    Classes {
        /// The name of the head, `linear` or `fc`.
        head: &'static str,
        /// The student's.
        found: usize,
        /// The teacher's.
        expected: usize,
    },
    /// Another version is current than the one that the push wants to replace.
    #[error(
        "the push replaces version {replaces}, but the current version is {current}; fetch that one, or push without \
         replaces_version"
    )]
    Conflict {
        /// What the header names.
        replaces: u64,
        /// What is current; 0 = none.
        current: u64,
    },
    /// The storage failed. Whether the version was written is open.
    #[error("the student could not be stored, push it again: {0}")]
    Storage(StorageError),
    /// The daemon itself failed.
    #[error("the push could not be checked: {0}")]
    Internal(String),
}

impl PushError {
    /// The reason in the metric `dreamfeed_pushes_total`.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Header(_) => "header",
            Self::TooLarge { .. } | Self::Cost(_) => "too_large",
            Self::Unreadable(_) => "unreadable",
            Self::Busy { .. } => "busy",
            Self::Truncated { .. } | Self::TooLong { .. } => "length",
            Self::Digest { .. } => "digest",
            Self::Format(_) => "format",
            Self::NegativeVariance { .. } => "negative_variance",
            Self::Arch(_) => "arch",
            Self::Tensors(mismatch) if !mismatch.missing.is_empty() => "missing",
            Self::Tensors(mismatch) if !mismatch.extra.is_empty() => "extra",
            Self::Tensors(mismatch) if !mismatch.misshapen.is_empty() => "misshapen",
            Self::Tensors(_) => "dtype",
            Self::NotFinite { .. } => "not_finite",
            Self::Channels { .. } => "channels",
            Self::Classes { .. } => "classes",
            Self::Conflict { .. } => "conflict",
            Self::Storage(_) => "storage",
            Self::Internal(_) => "internal",
        }
    }
}

impl From<StorageError> for PushError {
    fn from(error: StorageError) -> Self {
        Self::Storage(error)
    }
}

impl From<CheckpointError> for PushError {
    fn from(error: CheckpointError) -> Self {
        match error {
            CheckpointError::NotFinite { name, index, value } => {
                Self::NotFinite { tensor: clip(&name), index, value }
            }
            CheckpointError::NegativeVariance { name, index, value } => {
                Self::NegativeVariance { tensor: clip(&name), index, value }
            }
            CheckpointError::TooLarge(problem) => Self::Cost(problem),
            other => Self::Format(other.to_string()),
        }
    }
}

impl From<SpecError> for PushError {
    fn from(error: SpecError) -> Self {
        match error {
            SpecError::Mismatch(mismatch) => Self::Tensors(mismatch),
            unknown => Self::Arch(unknown.to_string()),
        }
    }
}

/// The longest beginning of a text that has at most `bytes` bytes and cuts no character.
pub(crate) fn beginning(text: &str, bytes: usize) -> &str {
    let end = (0..=bytes.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or(0);
    &text[..end]
}

/// At most [`NAME_BYTES`] of a name.
fn clip(name: &str) -> String {
    match beginning(name, NAME_BYTES) {
        whole if whole.len() == name.len() => whole.to_owned(),
        beginning => format!("{beginning}..."),
    }
}

fn describe(mismatch: &Mismatch) -> String {
    fn list<T>(title: &str, items: &[T], show: impl Fn(&T) -> String) -> String {
        if items.is_empty() {
            return String::new();
        }
        let listed: Vec<String> = items.iter().take(LISTED).map(show).collect();
        let more = match items.len().saturating_sub(LISTED) {
            0 => String::new(),
            more => format!(" and {more} more"),
        };
        format!("; {title}: {}{more}", listed.join(", "))
    }
    format!(
        "the tensors are not those of {}{}{}{}{}{}",
        clip(&mismatch.arch),
        list("missing", &mismatch.missing, |name| clip(name)),
        list("extra", &mismatch.extra, |name| clip(name)),
        list("misshapen", &mismatch.misshapen, |(name, found, expected)| {
            format!("{} is {}, expected {expected:?}", clip(name), clip(&format!("{found:?}")))
        }),
        list("without a single element", &mismatch.empty, |name| clip(name)),
        list("wrong dtype", &mismatch.wrong_dtype, |(name, dtype)| {
            format!("{} is {dtype}, expected F32, F16, BF16 or F64", clip(name))
        }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sentence_stays_short_whatever_the_file_holds() {
        let mismatch = Mismatch {
            arch: "resnet20".into(),
            missing: vec!["m".repeat(5000); 900],
            extra: vec!["ä".repeat(5000); 900],
            misshapen: vec![("x".repeat(5000), vec![7; 500], vec![1, 2]); 900],
            empty: vec!["z".repeat(5000); 900],
            wrong_dtype: vec![("y".repeat(5000), "I64".into()); 900],
        };
        let sentence = PushError::Tensors(Box::new(mismatch)).to_string();
        assert!(sentence.len() < 4096, "{}", sentence.len());
        assert!(sentence.contains("and 894 more"));
    }
}
