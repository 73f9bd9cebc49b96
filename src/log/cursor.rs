//! Cursors: opaque to clients, checked in full by us.
//!
//! Layout, 29 bytes: a version byte (1), the log's id (16 bytes), the sequence (8 bytes, big-endian), and the first four
//! bytes of the SHA-256 over all that. The checksum is against mistakes (a cut string, a cursor of other software), not
//! against malice: a forged cursor can only name a position that its author could have asked for anyway.

use bytes::Bytes;
use sha2::{Digest, Sha256};
use uuid::Uuid;

use crate::store::SEQUENCES;

const VERSION: u8 = 1;
const BODY: usize = 25;
const LENGTH: usize = 29;

/// Why a cursor is not a position in this log.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum CursorError {
    /// Not a cursor at all.
    #[error("the cursor is malformed ({0}); give the bytes of a StreamResponse.cursor unchanged")]
    Malformed(&'static str),
    /// A cursor of another log.
    #[error("the cursor belongs to log {0}, not to this one")]
    OtherLog(Uuid),
}

pub(super) fn encode(log_id: Uuid, sequence: u64) -> Bytes {
    let mut cursor = Vec::with_capacity(LENGTH);
    cursor.push(VERSION);
    cursor.extend_from_slice(log_id.as_bytes());
    cursor.extend_from_slice(&sequence.to_be_bytes());
    let checksum = Sha256::digest(&cursor);
    cursor.extend(checksum.iter().take(LENGTH - BODY));
    cursor.into()
}

pub(super) fn decode(log_id: Uuid, cursor: &[u8]) -> Result<u64, CursorError> {
    let cursor: &[u8; LENGTH] = cursor.try_into().map_err(|_| CursorError::Malformed("it must have 29 bytes"))?;
    let (body, checksum) = cursor.split_at(BODY);
    if !Sha256::digest(body).starts_with(checksum) {
        return Err(CursorError::Malformed("its checksum does not match"));
    }
    let (Some((&version, rest)), true) = (body.split_first(), body.len() == BODY) else {
        return Err(CursorError::Malformed("it is too short"));
    };
    if version != VERSION {
        return Err(CursorError::Malformed("its version is not known to this daemon"));
    }
    let (id, sequence) = rest.split_at(16);
    let id = Uuid::from_slice(id).map_err(|_| CursorError::Malformed("its log id is malformed"))?;
    let sequence = sequence.try_into().map_err(|_| CursorError::Malformed("its sequence is malformed"))?;
    let sequence = u64::from_be_bytes(sequence);
    if sequence > SEQUENCES {
        return Err(CursorError::Malformed("its sequence is larger than any that a log has"));
    }
    if id == log_id { Ok(sequence) } else { Err(CursorError::OtherLog(id)) }
}
