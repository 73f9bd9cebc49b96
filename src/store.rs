//! The one room that knows everything that lies in a store: its folders, and what may have which name in them. Whatever
//! has none of these names is nobody's: it is named, and left alone.
//!
//! ```text
//! log/log.json                                      what the log is: its id, its teacher, its format
//! log/chunks/FIRST_SEQUENCE.safetensors             a chunk, 20 digits
//! log/quarantine/FIRST_SEQUENCE-COUNT.safetensors   a chunk that turned out to be damaged
//! log/evicted/FIRST_SEQUENCE-COUNT                  on record: retention evicted these images
//! log/probe-UUID                                    for a moment, when a daemon starts: whether a name has one winner
//! students/VERSION.safetensors                      a version of the student, 20 digits
//! generators/NUMBER.safetensors                     a save of the fast tier's generator, 20 digits
//! ```

use std::ops::Range;

use uuid::Uuid;

/// What the log is; written once.
pub(crate) const IDENTITY: &str = "log/log.json";
/// Where chunks lie.
pub(crate) const CHUNKS: &str = "log/chunks/";
/// Where damaged chunks lie.
pub(crate) const QUARANTINE: &str = "log/quarantine/";
/// Where it is on record what retention evicted.
pub(crate) const EVICTED: &str = "log/evicted/";
/// Where students lie.
pub(crate) const STUDENTS: &str = "students/";
/// Where generators lie.
pub(crate) const GENERATORS: &str = "generators/";
/// Every folder of a store, the store's own first.
pub(crate) const FOLDERS: [&str; 7] = ["", "log/", CHUNKS, QUARANTINE, EVICTED, STUDENTS, GENERATORS];

const PROBE: &str = "log/probe-";
const SUFFIX: &str = ".safetensors";

/// No sequence reaches this: the contract's `sequence` is an i64, and nothing that counts on from a chunk may overflow.
pub(crate) const SEQUENCES: u64 = i64::MAX as u64;

/// What an object is, by its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Object {
    /// What the log is.
    Identity,
    /// The chunk that begins with this sequence.
    Chunk(u64),
    /// A damaged chunk, and the images that were in it.
    Quarantined(Range<u64>),
    /// A record that retention evicted these images.
    Evicted(Range<u64>),
    /// A version of the student.
    Student(u64),
    /// A save of the generator.
    Generator(u64),
    /// What a daemon proved at its start that a name has one winner with, and did not delete.
    Probe(Uuid),
}

impl Object {
    /// The object that can have this name; None where the name is nobody's.
    pub fn named(name: &str) -> Option<Self> {
        if name == IDENTITY {
            return Some(Self::Identity);
        }
        if let Some(id) = name.strip_prefix(PROBE) {
            return Uuid::parse_str(id).ok().map(Self::Probe).filter(|probe| probe.name() == name);
        }
        let (folder, file) = name.split_at(name.rfind('/')? + 1);
        let object = match folder {
            CHUNKS => Self::Chunk(number(file.strip_suffix(SUFFIX)?).filter(|first| *first < SEQUENCES)?),
            QUARANTINE => Self::Quarantined(segment(file.strip_suffix(SUFFIX)?)?),
            EVICTED => Self::Evicted(segment(file)?),
            // A number after which none can come would be the last.
            STUDENTS => Self::Student(number(file.strip_suffix(SUFFIX)?).filter(|version| *version < SEQUENCES)?),
            GENERATORS => Self::Generator(number(file.strip_suffix(SUFFIX)?).filter(|number| *number < SEQUENCES)?),
            _ => return None,
        };
        Some(object)
    }

    /// Its name. Within a folder the order of names is the order of numbers.
    pub fn name(&self) -> String {
        let count = |range: &Range<u64>| range.end.saturating_sub(range.start);
        match self {
            Self::Identity => IDENTITY.to_owned(),
            Self::Chunk(first) => format!("{CHUNKS}{first:020}{SUFFIX}"),
            Self::Quarantined(range) => format!("{QUARANTINE}{:020}-{}{SUFFIX}", range.start, count(range)),
            Self::Evicted(range) => format!("{EVICTED}{:020}-{}", range.start, count(range)),
            Self::Student(version) => format!("{STUDENTS}{version:020}{SUFFIX}"),
            Self::Generator(number) => format!("{GENERATORS}{number:020}{SUFFIX}"),
            Self::Probe(id) => format!("{PROBE}{id}"),
        }
    }
}

/// Exactly 20 digits.
fn number(digits: &str) -> Option<u64> {
    let digits = Some(digits).filter(|text| text.len() == 20 && text.bytes().all(|b| b.is_ascii_digit()))?;
    digits.parse().ok()
}

/// A first sequence and a count.
fn segment(text: &str) -> Option<Range<u64>> {
    let (first, count) = text.split_once('-')?;
    let first = number(first)?;
    let end = first.checked_add(count.parse().ok()?).filter(|end| *end <= SEQUENCES)?;
    Some(first..end)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_object_has_one_name_and_no_other_name_is_an_objects() {
        let objects = [
            Object::Identity,
            Object::Chunk(0),
            Object::Chunk(SEQUENCES - 1),
            Object::Quarantined(4..7),
            Object::Evicted(0..1 << 40),
            Object::Student(1),
            Object::Generator(9),
            Object::Probe(Uuid::from_u128(7)),
        ];
        for object in objects {
            assert_eq!(Object::named(&object.name()), Some(object));
        }
        let none = [
            "",
            "log",
            "log/",
            "log.json",
            "log/log.json/x",
            "log/chunks/1.safetensors",
            "log/chunks/+0000000000000000001.safetensors",
            "log/chunks/00000000000000000001.safetensors#1",
            "log/chunks/x/00000000000000000001.safetensors",
            "log/chunks/09223372036854775807.safetensors",
            "log/quarantine/00000000000000000001.safetensors",
            "log/quarantine/00000000000000000001-4",
            "log/evicted/09223372036854775807-1",
            "log/probe-1",
            "students/notes.txt",
            "generators/00000000000000000001",
            "chunks/00000000000000000001.safetensors",
        ];
        for name in none {
            assert_eq!(Object::named(name), None, "{name}");
        }
    }
}
