//! A stored student: a safetensors file with the pushed file's tensors, and in its `__metadata__` what else is known of
//! the push, so that one create-only put decides everything. The pushed file's own header stands there too: with it the
//! very bytes that were pushed come back, and their SHA-256 proves the whole object.

use std::collections::BTreeMap;
use std::time::{Instant, SystemTime};

use bytes::Bytes;
use sha2::{Digest, Sha256};

use super::Student;
use super::candidate::Candidate;
use crate::model::checkpoint::{Checkpoint, HeaderLimits, TensorToWrite, encode, hex};
use crate::model::spec::NetworkSpec;

const FORMAT: &str = "dreamfeed.student.v1";

/// The object for a checked student.
pub(super) fn write(candidate: &Candidate) -> Result<Bytes, String> {
    let file = candidate.checkpoint.bytes();
    let (header, _) = split(file)?;
    let mut metadata: BTreeMap<String, String> = candidate.checkpoint.metadata().clone().into_iter().collect();
    metadata.extend([
        ("dreamfeed.format".to_owned(), FORMAT.to_owned()),
        ("dreamfeed.arch".to_owned(), candidate.arch.clone()),
        ("dreamfeed.trainer_step".to_owned(), candidate.trainer_step.to_string()),
        ("dreamfeed.accepted_at".to_owned(), humantime::format_rfc3339_nanos(candidate.accepted_at).to_string()),
        ("dreamfeed.sha256".to_owned(), hex(&candidate.sha256)),
        ("dreamfeed.header".to_owned(), header.to_owned()),
    ]);
    let mut tensors: Vec<TensorToWrite<'_>> = candidate
        .checkpoint
        .tensors()
        .map(|(name, tensor)| (name, tensor.dtype, tensor.shape, tensor.data))
        .collect();
    // In the pushed file's order, so that the data section stays what it was.
    tensors.sort_by_key(|(_, _, _, data)| (data.as_ptr() as usize, data.len()));
    Ok(encode(&tensors, &metadata).into())
}

/// The student in an object, its bytes as they were pushed.
pub(super) fn read(version: u64, object: Bytes) -> Result<Student, String> {
    let stored = Checkpoint::parse_within(HeaderLimits::OBJECT, object.clone()).map_err(|e| e.to_string())?;
    let get = |key: &str| {
        let value = stored.metadata().get(&format!("dreamfeed.{key}"));
        value.cloned().ok_or_else(|| format!("its metadata has no dreamfeed.{key}"))
    };
    let format = get("format")?;
    if format != FORMAT {
        return Err(format!("its format is {format:?}, and this version of dreamfeed reads {FORMAT}"));
    }
    let header = get("header")?;
    let (_, data) = split(&object)?;
    let mut file = Vec::with_capacity(8 + header.len() + data.len());
    file.extend_from_slice(&(header.len() as u64).to_le_bytes());
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(data);
    let sha256: [u8; 32] = Sha256::digest(&file).into();
    let expected = get("sha256")?;
    if hex(&sha256) != expected {
        return Err(format!("its bytes have the SHA-256 {}, pushed was {expected}", hex(&sha256)));
    }
    let arch = get("arch")?;
    let checkpoint = Checkpoint::parse(file.into()).map_err(|e| e.to_string())?;
    let spec = NetworkSpec::from_checkpoint(&arch, &checkpoint).map_err(|e| e.to_string())?;
    Ok(Student {
        version,
        arch,
        spec,
        checkpoint,
        sha256,
        trainer_step: get("trainer_step")?.parse().unwrap_or(0),
        accepted_at: humantime::parse_rfc3339(&get("accepted_at")?).unwrap_or(SystemTime::UNIX_EPOCH),
        received_at: Instant::now(),
    })
}

/// Header and data section of a safetensors file.
fn split(file: &Bytes) -> Result<(&str, &[u8]), String> {
    let malformed = || "it is no safetensors file".to_owned();
    let (length, rest) = file.split_first_chunk().ok_or_else(malformed)?;
    let length = usize::try_from(u64::from_le_bytes(*length)).map_err(|_| malformed())?;
    let (header, data) = rest.split_at_checked(length).ok_or_else(malformed)?;
    Ok((std::str::from_utf8(header).map_err(|_| malformed())?, data))
}
