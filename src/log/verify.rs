//! Whether a log is sound: every checksum, and whether sequences follow each other without holes or overlaps.
//!
//! What can be told from outside, and what cannot: before retention deletes, it puts on record what goes. So a hole that
//! a record covers was evicted, wherever it lies (before the tail, or between a protected seed set and the tail), and
//! any other hole is a loss, be it made by a hand, a rule of the bucket, or the storage. What lies behind the newest
//! chunk that is left cannot be missed: nothing says how far the log once went. A chunk's checksum covers its tensors;
//! its metadata is held against its name, its tensors' shapes and the log's identity.

use futures_util::{StreamExt, pin_mut};
use serde::Serialize;

use super::evicted::merged;
use super::inspect::{self, InspectError, Inspection};
use crate::storage::{Lying, Storage, StorageError, staged_for};
use crate::store::{FOLDERS, Object};

/// What can be found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A chunk whose bytes are not those that were written.
    Checksum,
    /// A chunk whose beginning cannot be read, or tells of images that are impossible.
    Header,
    /// An intact chunk of another log.
    Foreign,
    /// Images that no chunk holds, and that retention did not evict.
    Gap,
    /// Images that two chunks hold.
    Overlap,
    /// Images whose chunk was damaged and lies in quarantine.
    Quarantined,
    /// An object that has no business where it lies.
    Strange,
    /// A stored student that is damaged.
    Student,
    /// A stored generator that is damaged.
    Generator,
    /// Images that retention evicted: a note, nothing is wrong.
    Evicted,
    /// What a put left that was broken off, or is under way: a note, too.
    Remains,
}

impl Kind {
    /// Whether something is wrong; otherwise it is a note.
    pub fn is_problem(self) -> bool {
        !matches!(self, Self::Evicted | Self::Remains)
    }

    /// Its name in text and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Checksum => "checksum",
            Self::Header => "header",
            Self::Foreign => "foreign",
            Self::Gap => "gap",
            Self::Overlap => "overlap",
            Self::Quarantined => "quarantined",
            Self::Strange => "strange",
            Self::Student => "student",
            Self::Generator => "generator",
            Self::Evicted => "evicted",
            Self::Remains => "remains",
        }
    }
}

/// One thing that was found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Finding {
    /// What it is.
    pub kind: Kind,
    /// The object, where it is one object's matter.
    pub object: Option<String>,
    /// The first image concerned, where it is known.
    pub first_sequence: Option<u64>,
    /// The sequence behind the last one.
    pub end: Option<u64>,
    /// One sentence.
    pub message: String,
}

impl Finding {
    /// Something about an object.
    pub fn object(kind: Kind, name: String, message: impl Into<String>) -> Self {
        Self { kind, object: Some(name), first_sequence: None, end: None, message: message.into() }
    }

    fn images(kind: Kind, (first, end): (u64, u64), message: impl Into<String>) -> Self {
        Self { kind, object: None, first_sequence: Some(first), end: Some(end), message: message.into() }
    }

    fn at(self, (first, end): (u64, u64)) -> Self {
        Self { first_sequence: Some(first), end: Some(end), ..self }
    }
}

/// All that can be found without reading whole chunks. Pure.
pub fn layout(log: &Inspection) -> Vec<Finding> {
    let mut findings = Vec::new();
    for name in &log.strange {
        findings.push(Finding::object(
            Kind::Strange,
            name.clone(),
            "its sequences are beyond those that a log has; it is left alone",
        ));
    }
    for head in &log.damaged {
        let kind = if head.foreign { Kind::Foreign } else { Kind::Header };
        let finding = Finding::object(kind, head.name.clone(), &head.problem);
        findings.push(finding.at((head.first_sequence, head.end)));
    }
    for lost in &log.quarantined {
        let message = "their chunk was damaged, and lies in log/quarantine";
        findings.push(Finding::images(Kind::Quarantined, *lost, message));
    }
    let mut held: Vec<(u64, u64)> = Vec::new();
    for entry in &log.entries {
        let (first, end) = (entry.summary.first_sequence, entry.summary.end());
        if let Some(before) = held.last().filter(|before| before.1 > first) {
            let message = format!("the chunk before, which begins with {}, holds them too", before.0);
            let finding = Finding::object(Kind::Overlap, inspect::object_name(first), message);
            findings.push(finding.at((first, before.1.min(end))));
        }
        // The one that reaches furthest is what the next is held against.
        held.push(held.last().filter(|before| before.1 > end).copied().unwrap_or((first, end)));
    }
    let damaged = log.damaged.iter().map(|head| (head.first_sequence, head.end));
    let known = merged(held.into_iter().chain(log.quarantined.iter().copied()).chain(damaged));
    let evicted = merged(log.evicted.iter().copied());
    let mut reached = 0;
    for (first, end) in known {
        findings.extend(hole((reached, first), &evicted));
        reached = end;
    }
    findings
}

/// What lies in a store and is no object of it: strays, and what puts left that were broken off.
pub async fn elsewhere(storage: &Storage) -> Result<Vec<Finding>, StorageError> {
    let remains = "a put is under way, or was broken off; a daemon removes what is older than ten minutes";
    let probe = "a daemon is starting, or was ended while it did; it can be deleted";
    let finding = |Lying { name, is_object }: Lying| {
        if let Some(object) = staged_for(&name).filter(|_| is_object)
            && Object::named(object).is_some()
        {
            return Some(Finding::object(Kind::Remains, name, remains));
        }
        match Object::named(&name).filter(|_| is_object) {
            Some(Object::Probe(_)) => Some(Finding::object(Kind::Remains, name, probe)),
            Some(_) => None,
            None => Some(Finding::object(Kind::Strange, name, "nothing in a store has this name; it is left alone")),
        }
    };
    Ok(storage.everything(&FOLDERS).await?.into_iter().filter_map(finding).collect())
}

/// The names of strays.
pub(super) async fn strays(storage: &Storage) -> Result<Vec<String>, StorageError> {
    let strange = elsewhere(storage).await?.into_iter().filter(|finding| finding.kind == Kind::Strange);
    Ok(strange.filter_map(|finding| finding.object).collect())
}

/// What a hole in the log consists of: segments that are on record as evicted, and segments that are not.
fn hole((mut from, to): (u64, u64), evicted: &[(u64, u64)]) -> Vec<Finding> {
    let gap = |range| Finding::images(Kind::Gap, range, "no chunk holds them, and retention did not evict them");
    let mut findings = Vec::new();
    for (first, end) in evicted {
        let (first, end) = (from.max(*first), to.min(*end));
        if first >= end {
            continue;
        }
        if from < first {
            findings.push(gap((from, first)));
        }
        findings.push(Finding::images(Kind::Evicted, (first, end), "retention evicted them"));
        from = end;
    }
    if from < to {
        findings.push(gap((from, to)));
    }
    findings
}

/// Everything that is wrong with a log, its layout and every chunk's checksum; notes too. Reads the whole log, a few
/// chunks at a time.
pub async fn verify(storage: &Storage, log: &Inspection) -> Result<Vec<Finding>, StorageError> {
    let mut findings = layout(log);
    let firsts = log.entries.iter().map(|entry| entry.summary.first_sequence);
    let chunks = inspect::load_all(storage, &log.identity, firsts).zip(futures_util::stream::iter(&log.entries));
    pin_mut!(chunks);
    while let Some((chunk, entry)) = chunks.next().await {
        let finding = match chunk {
            Ok(_) => continue,
            Err(InspectError::Storage(error)) => return Err(error),
            Err(InspectError::Damaged { name, problem }) => Finding::object(Kind::Checksum, name, problem),
            Err(InspectError::Foreign { name, problem }) => Finding::object(Kind::Foreign, name, problem),
            // It was listed: a daemon at work evicted it since.
            Err(InspectError::Missing(_) | InspectError::NotHeld(_)) => {
                let name = inspect::object_name(entry.summary.first_sequence);
                Finding::object(Kind::Evicted, name, "it went away while the log was being read")
            }
        };
        findings.push(finding.at((entry.summary.first_sequence, entry.summary.end())));
    }
    // By place, and what has none first.
    findings.sort_by_key(|finding| (finding.first_sequence, finding.end));
    Ok(findings)
}
