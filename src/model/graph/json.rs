//! JSON as the format has it: read in any spelling but with each key once, written in the one canonical spelling.

use std::fmt;

use serde::de::{self, DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

/// The most brackets and braces around a value.
const MAX_DEPTH: usize = 8;
/// Integers beyond this are not the same in every reader of JSON.
pub const MAX_INTEGER: i64 = (1 << 53) - 1;

/// Reads JSON; numbers that are integers become integers, however they are spelled.
pub fn parse(text: &str) -> Result<Value, String> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let value = Nested(0).deserialize(&mut deserializer).map_err(|e| e.to_string())?;
    deserializer.end().map_err(|e| e.to_string())?;
    Ok(value)
}

/// A value within this many brackets and braces.
struct Nested(usize);

impl Nested {
    fn deeper<E: de::Error>(&self) -> Result<Self, E> {
        let depth = self.0 + 1;
        if depth > MAX_DEPTH {
            Err(E::custom(format!("it is nested more than {MAX_DEPTH} deep")))
        } else {
            Ok(Self(depth))
        }
    }
}

impl<'de> DeserializeSeed<'de> for Nested {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Nested {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Value, E> {
        if value.abs_diff(0) <= MAX_INTEGER as u64 {
            Ok(Value::Number(value.into()))
        } else {
            self.visit_f64(value as f64)
        }
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Value, E> {
        if value <= MAX_INTEGER as u64 { Ok(Value::Number(value.into())) } else { self.visit_f64(value as f64) }
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Value, E> {
        let number = if value.fract() == 0.0 && value.abs() <= MAX_INTEGER as f64 {
            Some(Number::from(value as i64))
        } else {
            Number::from_f64(value)
        };
        number.map(Value::Number).ok_or_else(|| E::custom("a number is too large"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::String(value.to_owned()))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(self.deeper()?)? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            let value = entries.next_value_seed(self.deeper()?)?;
            if map.contains_key(&key) {
                return Err(de::Error::custom(format!("the key {} comes twice", super::mistakes::quoted(&key))));
            }
            map.insert(key, value);
        }
        Ok(Value::Object(map))
    }
}

/// The canonical spelling, RFC 8785.
pub fn canonical(value: &Value) -> String {
    let mut text = String::new();
    write(value, &mut text);
    text
}

fn write(value: &Value, text: &mut String) {
    match value {
        Value::Object(map) => {
            let mut entries: Vec<_> = map.iter().collect();
            // RFC 8785 sorts by UTF-16 units.
            entries.sort_by(|a, b| a.0.encode_utf16().cmp(b.0.encode_utf16()));
            text.push('{');
            for (index, (key, value)) in entries.into_iter().enumerate() {
                if index > 0 {
                    text.push(',');
                }
                text.push_str(&Value::String(key.clone()).to_string());
                text.push(':');
                write(value, text);
            }
            text.push('}');
        }
        Value::Array(list) => {
            text.push('[');
            for (index, value) in list.iter().enumerate() {
                if index > 0 {
                    text.push(',');
                }
                write(value, text);
            }
            text.push(']');
        }
        Value::Number(number) => match number.as_f64() {
            Some(real) if number.is_f64() => text.push_str(&real_as_text(real)),
            _ => text.push_str(&number.to_string()),
        },
        // Escapes only what it must, in the short forms: as RFC 8785 wants it.
        other => text.push_str(&other.to_string()),
    }
}

/// A finite number as ECMAScript spells it.
pub fn real_as_text(value: f64) -> String {
    if value == 0.0 {
        return "0".to_owned();
    }
    let sign = if value < 0.0 { "-" } else { "" };
    // The fewest digits that say this number, as d.ddde±x.
    let scientific = format!("{:e}", value.abs());
    let (mantissa, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let digits = mantissa.replace('.', "");
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let (count, point) = (digits.len() as i32, exponent + 1);
    let zeros = |count: i32| "0".repeat(count.max(0) as usize);
    match point {
        _ if count <= point && point <= 21 => format!("{sign}{digits}{}", zeros(point - count)),
        1..=21 => {
            let (whole, fraction) = digits.split_at(point as usize);
            format!("{sign}{whole}.{fraction}")
        }
        -5..=0 => format!("{sign}0.{}{digits}", zeros(-point)),
        _ => {
            let (first, rest) = digits.split_at(1);
            let dot = if rest.is_empty() { "" } else { "." };
            format!("{sign}{first}{dot}{rest}e{exponent:+}")
        }
    }
}
