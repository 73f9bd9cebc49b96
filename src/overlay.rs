//! Settings laid over each other.

use toml::{Table, Value};

/// Lays a table over another: its values replace those of the same place, and everything else stays.
pub(crate) fn overlay(under: &mut Table, over: Table) {
    for (name, value) in over {
        match (under.get_mut(&name), value) {
            (Some(Value::Table(inner)), Value::Table(value)) => overlay(inner, value),
            (_, value) => {
                under.insert(name, value);
            }
        }
    }
}
