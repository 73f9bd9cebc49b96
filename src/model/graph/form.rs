//! Fields of operations, told once ([`Op::visit`](super::Op::visit)) and both read and written by it.

use std::ops::RangeInclusive;

use serde_json::{Map, Number, Value, json};

use super::mistakes::{Mistakes, quoted, shortened};
use super::{Extent, MAX_NAME, MAX_RANK, MAX_SIZE};

/// Which real numbers are right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reals {
    /// Every finite one.
    Any,
    /// Those above 0.
    Positive,
    /// Those from 0 on and below 1.
    Chance,
}

/// What reads or writes the fields of an operation.
pub trait Form {
    /// The name of a tensor that must be there.
    fn tensor(&mut self, key: &'static str, name: &mut String);
    /// The name of a tensor that may be missing.
    fn optional_tensor(&mut self, key: &'static str, name: &mut Option<String>);
    /// An integer in a range.
    fn size(&mut self, key: &'static str, value: &mut usize, range: RangeInclusive<usize>);
    /// Two of them, vertical and horizontal.
    fn pair(&mut self, key: &'static str, value: &mut [usize; 2], range: RangeInclusive<usize>);
    /// One to [`MAX_RANK`] of them.
    fn sizes(&mut self, key: &'static str, value: &mut Vec<usize>, range: RangeInclusive<usize>);
    /// As many integers with a sign.
    fn integers(&mut self, key: &'static str, value: &mut Vec<i64>);
    /// As many pairs of integers with a sign.
    fn widths(&mut self, key: &'static str, value: &mut Vec<[i64; 2]>);
    /// A shape.
    fn shape(&mut self, key: &'static str, value: &mut Vec<Extent>);
    /// A real number.
    fn real(&mut self, key: &'static str, value: &mut f64, right: Reals);
    /// A real number or an infinite one.
    fn real_or_infinite(&mut self, key: &'static str, value: &mut f64);
    /// A real number or nothing.
    fn limit(&mut self, key: &'static str, value: &mut Option<f64>);
    /// Yes or no.
    fn flag(&mut self, key: &'static str, value: &mut bool);
    /// One of some words.
    fn word<T: Copy + PartialEq>(&mut self, key: &'static str, value: &mut T, words: &[(&'static str, T)]);
}

/// Takes the fields of one JSON object and tells what is wrong with them.
pub struct Reader<'a> {
    place: &'a str,
    fields: Map<String, Value>,
    mistakes: &'a mut Mistakes,
}

impl<'a> Reader<'a> {
    pub fn new(place: &'a str, fields: Map<String, Value>, mistakes: &'a mut Mistakes) -> Self {
        Self { place, fields, mistakes }
    }

    /// The field, if `read` takes it; else a mistake and a value to go on with.
    fn take<T: Default>(&mut self, key: &str, right: &str, read: impl FnOnce(&Value) -> Option<T>) -> T {
        let value = self.fields.remove(key);
        if let Some(read) = value.as_ref().and_then(read) {
            return read;
        }
        let found = value.as_ref().map_or_else(|| "missing".to_owned(), shortened);
        self.mistakes.add(format!("{}: {key} is {found}; {right} is right", self.place));
        T::default()
    }

    pub fn size(&mut self, key: &str, range: RangeInclusive<usize>) -> usize {
        let right = format!("an integer from {} to {}", range.start(), range.end());
        self.take(key, &right, |value| within(value, &range))
    }

    pub fn sizes(&mut self, key: &str, count: RangeInclusive<usize>, range: RangeInclusive<usize>) -> Vec<usize> {
        let right = format!(
            "a list of {} to {} integers from {} to {}",
            count.start(),
            count.end(),
            range.start(),
            range.end()
        );
        self.take(key, &right, |value| items(value, &count, |item| within(item, &range)))
    }

    pub fn list(&mut self, key: &str) -> Vec<Value> {
        match self.fields.remove(key) {
            Some(Value::Array(list)) => list,
            _ => {
                self.mistakes.add(format!("{}: {key} must be a list", self.place));
                Vec::new()
            }
        }
    }

    pub fn object(&mut self, key: &str) -> Map<String, Value> {
        match self.fields.remove(key) {
            Some(Value::Object(fields)) => fields,
            _ => {
                self.mistakes.add(format!("{}: {key} must be an object", self.place));
                Map::new()
            }
        }
    }

    pub fn optional_object(&mut self, key: &str) -> Map<String, Value> {
        if self.fields.contains_key(key) { self.object(key) } else { Map::new() }
    }

    /// Everything that was not taken is a mistake.
    pub fn finish(self) {
        for key in self.fields.keys() {
            self.mistakes.add(format!("{}: there is no field {}", self.place, quoted(key)));
        }
    }
}

/// Reads the attributes and tensors of an operation.
pub struct OpReader<'a> {
    attributes: Reader<'a>,
    tensors: Map<String, Value>,
}

impl<'a> OpReader<'a> {
    pub fn new(
        place: &'a str,
        attributes: Map<String, Value>,
        tensors: Map<String, Value>,
        mistakes: &'a mut Mistakes,
    ) -> Self {
        Self { attributes: Reader::new(place, attributes, mistakes), tensors }
    }

    pub fn finish(self) {
        for key in self.tensors.keys() {
            let place = self.attributes.place;
            self.attributes.mistakes.add(format!("{place}: the operation takes no tensor {}", quoted(key)));
        }
        self.attributes.finish();
    }
}

fn within(value: &Value, range: &RangeInclusive<usize>) -> Option<usize> {
    value.as_u64().and_then(|value| usize::try_from(value).ok()).filter(|value| range.contains(value))
}

fn integer(value: &Value) -> Option<i64> {
    value.as_i64().filter(|value| value.unsigned_abs() <= MAX_SIZE as u64)
}

fn items<T>(value: &Value, count: &RangeInclusive<usize>, read: impl Fn(&Value) -> Option<T>) -> Option<Vec<T>> {
    let list = value.as_array().filter(|list| count.contains(&list.len()))?;
    list.iter().map(read).collect()
}

fn extent(value: &Value) -> Option<Extent> {
    let range = 1..=MAX_SIZE;
    match value {
        Value::Object(fields) if fields.len() == 1 => within(fields.get("batch")?, &range).map(Extent::Batch),
        other => within(other, &range).map(Extent::Fixed),
    }
}

/// Whether it is a name of a tensor of the network: letters, digits, `_` and `-`, with dots between.
fn is_tensor_name(name: &str) -> bool {
    let word =
        |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
    name.len() <= MAX_NAME && name.split('.').all(word) && !name.starts_with(super::RESERVED)
}

const RANKS: RangeInclusive<usize> = 1..=MAX_RANK;

impl Form for OpReader<'_> {
    fn tensor(&mut self, key: &'static str, name: &mut String) {
        let mut read = None;
        if self.tensors.contains_key(key) {
            self.optional_tensor(key, &mut read);
        } else {
            self.attributes.mistakes.add(format!("{}: it names no tensor {key:?}", self.attributes.place));
        }
        *name = read.unwrap_or_default();
    }

    fn optional_tensor(&mut self, key: &'static str, name: &mut Option<String>) {
        *name = match self.tensors.remove(key) {
            None => None,
            Some(Value::String(read)) if is_tensor_name(&read) => Some(read),
            Some(other) => {
                self.attributes.mistakes.add(format!(
                    "{}: {key} is {}; the name of a tensor of the network is right: letters, digits, _ and - with dots \
                     between, at most {MAX_NAME} bytes",
                    self.attributes.place,
                    quoted(other.as_str().unwrap_or("no text")),
                ));
                None
            }
        };
    }

    fn size(&mut self, key: &'static str, value: &mut usize, range: RangeInclusive<usize>) {
        *value = self.attributes.size(key, range);
    }

    fn pair(&mut self, key: &'static str, value: &mut [usize; 2], range: RangeInclusive<usize>) {
        let right = format!("a pair of integers from {} to {}", range.start(), range.end());
        let read = |v: &Value| items(v, &(2..=2), |item| within(item, &range))?.try_into().ok();
        *value = self.attributes.take(key, &right, read);
    }

    fn sizes(&mut self, key: &'static str, value: &mut Vec<usize>, range: RangeInclusive<usize>) {
        *value = self.attributes.sizes(key, RANKS, range);
    }

    fn integers(&mut self, key: &'static str, value: &mut Vec<i64>) {
        *value = self.attributes.take(key, "a list of integers", |v| items(v, &RANKS, integer));
    }

    fn widths(&mut self, key: &'static str, value: &mut Vec<[i64; 2]>) {
        let pair = |v: &Value| items(v, &(2..=2), integer)?.try_into().ok();
        *value = self.attributes.take(key, "a list of pairs of integers", |v| items(v, &RANKS, pair));
    }

    fn shape(&mut self, key: &'static str, value: &mut Vec<Extent>) {
        let right = "a list of sizes, each an integer above 0 or {\"batch\":k}";
        *value = self.attributes.take(key, right, |v| items(v, &RANKS, extent));
    }

    fn real(&mut self, key: &'static str, value: &mut f64, right: Reals) {
        let (text, fits): (_, fn(f64) -> bool) = match right {
            Reals::Any => ("a number", |_| true),
            Reals::Positive => ("a number above 0", |value| value > 0.0),
            Reals::Chance => ("a number from 0 on and below 1", |value| (0.0..1.0).contains(&value)),
        };
        *value = self.attributes.take(key, text, |v| v.as_f64().filter(|value| fits(*value)));
    }

    fn real_or_infinite(&mut self, key: &'static str, value: &mut f64) {
        *value = self.attributes.take(key, "a number, \"inf\" or \"-inf\"", |v| match v.as_str() {
            Some("inf") => Some(f64::INFINITY),
            Some("-inf") => Some(f64::NEG_INFINITY),
            _ => v.as_f64(),
        });
    }

    fn limit(&mut self, key: &'static str, value: &mut Option<f64>) {
        let read = |v: &Value| if v.is_null() { Some(None) } else { v.as_f64().map(Some) };
        *value = self.attributes.take(key, "a number or null", read);
    }

    fn flag(&mut self, key: &'static str, value: &mut bool) {
        *value = self.attributes.take(key, "true or false", Value::as_bool);
    }

    fn word<T: Copy + PartialEq>(&mut self, key: &'static str, value: &mut T, words: &[(&'static str, T)]) {
        let right = words.iter().map(|(word, _)| *word).collect::<Vec<_>>().join(", ");
        let read = |v: &Value| words.iter().find(|(word, _)| v.as_str() == Some(word)).map(|(_, value)| Some(*value));
        if let Some(read) = self.attributes.take(key, &format!("one of {right}"), read) {
            *value = read;
        }
    }
}

/// Makes JSON of the fields.
#[derive(Default)]
pub struct Writer {
    pub attributes: Map<String, Value>,
    pub tensors: Map<String, Value>,
}

impl Writer {
    fn put(&mut self, key: &str, value: Value) {
        self.attributes.insert(key.to_owned(), value);
    }
}

fn number(value: f64) -> Value {
    // Only finite numbers are read, and builders write no others.
    Number::from_f64(value).map_or(Value::Null, Value::Number)
}

impl Form for Writer {
    fn tensor(&mut self, key: &'static str, name: &mut String) {
        self.tensors.insert(key.to_owned(), json!(name));
    }

    fn optional_tensor(&mut self, key: &'static str, name: &mut Option<String>) {
        if let Some(name) = name {
            self.tensor(key, name);
        }
    }

    fn size(&mut self, key: &'static str, value: &mut usize, _: RangeInclusive<usize>) {
        self.put(key, json!(value));
    }

    fn pair(&mut self, key: &'static str, value: &mut [usize; 2], _: RangeInclusive<usize>) {
        self.put(key, json!(value));
    }

    fn sizes(&mut self, key: &'static str, value: &mut Vec<usize>, _: RangeInclusive<usize>) {
        self.put(key, json!(value));
    }

    fn integers(&mut self, key: &'static str, value: &mut Vec<i64>) {
        self.put(key, json!(value));
    }

    fn widths(&mut self, key: &'static str, value: &mut Vec<[i64; 2]>) {
        self.put(key, json!(value));
    }

    fn shape(&mut self, key: &'static str, value: &mut Vec<Extent>) {
        let extent = |extent: &Extent| match extent {
            Extent::Fixed(size) => json!(size),
            Extent::Batch(factor) => json!({ "batch": factor }),
        };
        self.put(key, value.iter().map(extent).collect());
    }

    fn real(&mut self, key: &'static str, value: &mut f64, _: Reals) {
        self.put(key, number(*value));
    }

    fn real_or_infinite(&mut self, key: &'static str, value: &mut f64) {
        let infinite = |value: f64| json!(if value > 0.0 { "inf" } else { "-inf" });
        self.put(key, if value.is_finite() { number(*value) } else { infinite(*value) });
    }

    fn limit(&mut self, key: &'static str, value: &mut Option<f64>) {
        self.put(key, value.map_or(Value::Null, number));
    }

    fn flag(&mut self, key: &'static str, value: &mut bool) {
        self.put(key, json!(value));
    }

    fn word<T: Copy + PartialEq>(&mut self, key: &'static str, value: &mut T, words: &[(&'static str, T)]) {
        let word = words.iter().find(|(_, each)| each == value).map(|(word, _)| *word);
        self.put(key, json!(word));
    }
}
