//! A safetensors header, held against its limits before anything is made of it: reading it needs memory for one name.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::{CheckpointError, HeaderLimits, MAX_NAME_BYTES, MAX_RANK};

/// Bytes of a name that an error tells.
const TOLD_BYTES: usize = 60;

/// Checks the length of the header of a file, how many tensors and metadata it has, how long their names are, and how many
/// dimensions a tensor has. What is not a header at all is left to the parser, which says so.
pub(super) fn check(limits: HeaderLimits, file: &[u8]) -> Result<(), CheckpointError> {
    let Some((length, rest)) = file.split_first_chunk() else { return Ok(()) };
    let length = u64::from_le_bytes(*length);
    if length > rest.len() as u64 {
        return Ok(());
    }
    let header = &rest[..length as usize];
    if header.len() > limits.bytes {
        return Err(CheckpointError::TooLarge(format!(
            "its header has {} bytes, and at most {} are read; leave out what is not needed in __metadata__",
            header.len(),
            limits.bytes
        )));
    }
    let mut problem = None;
    let mut deserializer = serde_json::Deserializer::from_slice(header);
    let entries = Entries { limits, what: "tensors", problem: &mut problem };
    let read = deserializer.deserialize_map(entries);
    match problem {
        Some(problem) => Err(CheckpointError::TooLarge(problem)),
        // Malformed in another way: the parser says it in its own words.
        None => {
            drop(read);
            Ok(())
        }
    }
}

/// The entries of the header, or of its `__metadata__`.
struct Entries<'a> {
    limits: HeaderLimits,
    what: &'static str,
    problem: &'a mut Option<String>,
}

impl<'de> Visitor<'de> for Entries<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let Self { limits, what, problem } = self;
        let mut refuse = |text: String| {
            *problem = Some(text);
            A::Error::custom("over a limit")
        };
        let mut count = 0usize;
        while let Some(name) = map.next_key::<String>()? {
            count += 1;
            if count > limits.entries {
                return Err(refuse(format!("it has more than {} {what}, the most that are read", limits.entries)));
            }
            if name.len() > MAX_NAME_BYTES {
                let told: String = name.chars().take(TOLD_BYTES).collect();
                return Err(refuse(format!(
                    "the name that begins with {told:?} has {} bytes, and at most {MAX_NAME_BYTES} are read",
                    name.len()
                )));
            }
            if what == "tensors" && name == "__metadata__" {
                let mut inner = None;
                let entries = Entries { limits, what: "entries in __metadata__", problem: &mut inner };
                let read = map.next_value_seed(Object(entries));
                if let Some(text) = inner {
                    return Err(refuse(text));
                }
                read?;
            } else if what == "tensors" {
                let mut rank = 0;
                let read = map.next_value_seed(Tensor(&mut rank));
                if rank > MAX_RANK {
                    return Err(refuse(format!(
                        "tensor {name:?} has more than {MAX_RANK} dimensions, the most that are read"
                    )));
                }
                read?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }
}

struct Object<'a>(Entries<'a>);

impl<'de> DeserializeSeed<'de> for Object<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self.0)
    }
}

/// The description of one tensor: how many dimensions its shape has, at most one more than are read.
struct Tensor<'a>(&'a mut usize);

impl<'de> DeserializeSeed<'de> for Tensor<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Tensor<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a tensor's description")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(key) = map.next_key::<String>()? {
            if key == "shape" {
                map.next_value_seed(Shape(self.0))?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(())
    }
}

struct Shape<'a>(&'a mut usize);

impl<'de> DeserializeSeed<'de> for Shape<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for Shape<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a shape")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut dimensions: A) -> Result<(), A::Error> {
        while dimensions.next_element::<IgnoredAny>()?.is_some() {
            *self.0 += 1;
            if *self.0 > MAX_RANK {
                return Err(A::Error::custom("over a limit"));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const LIMITS: HeaderLimits = HeaderLimits { bytes: 4096, entries: 3 };

    fn refused(header: &str) -> Option<String> {
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(header.as_bytes());
        check(LIMITS, &file).err().map(|error| error.to_string())
    }

    fn tensors(count: usize) -> String {
        let tensor = |at| format!(r#""t{at}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}"#);
        format!("{{{}}}", (0..count).map(tensor).collect::<Vec<_>>().join(","))
    }

    #[test]
    fn what_is_over_a_limit_is_named_with_it() {
        assert_eq!(refused(&tensors(3)), None);
        assert!(refused(&tensors(4)).unwrap().contains("more than 3 tensors"));
        let keys: Vec<String> = (0..4).map(|key| format!(r#""{key}":"""#)).collect();
        let many = format!(r#"{{"__metadata__":{{{}}}}}"#, keys.join(","));
        assert!(refused(&many).unwrap().contains("more than 3 entries in __metadata__"));
        let long = "n".repeat(513);
        assert!(refused(&format!(r#"{{"{long}":{{}}}}"#)).unwrap().contains("513 bytes, and at most 512"));
        assert!(refused(&format!(r#"{{"__metadata__":{{"{long}":""}}}}"#)).unwrap().contains("at most 512"));
        let ranks = ["1"; 9].join(",");
        assert!(refused(&format!(r#"{{"t":{{"shape":[{ranks}]}}}}"#)).unwrap().contains("more than 8 dimensions"));
        assert!(refused(&" ".repeat(4097)).unwrap().contains("4097 bytes, and at most 4096"));
    }

    #[test]
    fn what_is_malformed_is_left_to_the_parser() {
        for header in ["", "{", "[]", r#"{"t":3}"#, r#"{"t":{"shape":{}}}"#, &"[".repeat(2000)] {
            assert_eq!(refused(header), None, "{header}");
        }
        assert!(check(LIMITS, &u64::MAX.to_le_bytes()).is_ok());
    }
}
