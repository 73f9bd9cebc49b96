//! File, environment and flags as TOML tables of one shape, laid over each other.

use std::ffi::OsString;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value as Json;
use toml::{Table, Value};

use super::{OTHER_VARIABLES, ServeOptions};
use crate::files;
use crate::overlay::overlay;

/// A setting's place, for example `["synthesis", "batch_size"]`.
type Key = Vec<String>;

pub(super) fn merge(
    flags: &ServeOptions,
    file: Option<&Path>,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
    problems: &mut Vec<String>,
) -> ServeOptions {
    let keys = keys();
    let mut merged = Table::new();
    if let Some(path) = file {
        overlay_file(&mut merged, path, &keys, problems);
    }
    overlay_environment(&mut merged, environment, &keys, problems);
    match Table::try_from(flags) {
        Ok(flags) => overlay(&mut merged, flags),
        Err(error) => problems.push(format!("a flag's value cannot be used: {}", one_line(&error.to_string()))),
    }
    // Each value was accepted alone, so together they are.
    ServeOptions::deserialize(Value::Table(merged)).unwrap_or_else(|error| {
        problems.push(one_line(error.message()));
        ServeOptions::default()
    })
}

/// Every setting, read off the schema itself.
fn keys() -> Vec<Key> {
    fn walk(value: &Json, path: &Key, keys: &mut Vec<Key>) {
        match value {
            Json::Object(fields) => {
                for (name, value) in fields {
                    walk(value, &[path.as_slice(), std::slice::from_ref(name)].concat(), keys);
                }
            }
            _ => keys.push(path.clone()),
        }
    }
    let mut keys = Vec::new();
    let schema = serde_json::to_value(ServeOptions::default()).unwrap_or_default();
    walk(&schema, &Vec::new(), &mut keys);
    keys
}

fn overlay_file(merged: &mut Table, path: &Path, keys: &[Key], problems: &mut Vec<String>) {
    let shown = path.display();
    let text = match files::open(path).and_then(std::io::read_to_string) {
        Ok(text) => text,
        Err(error) => return problems.push(format!("cannot read the configuration file {shown}: {error}")),
    };
    let table: Table = match text.parse() {
        Ok(table) => table,
        Err(error) => {
            let error: toml::de::Error = error;
            let line =
                error.span().and_then(|span| text.get(..span.start)).map_or(1, |head| head.lines().count().max(1));
            return problems.push(format!("{shown}, line {line}: {}", one_line(error.message())));
        }
    };
    overlay_table(merged, table, &Vec::new(), keys, &mut |problem| problems.push(format!("{shown}: {problem}")));
}

fn overlay_table(merged: &mut Table, table: Table, path: &Key, keys: &[Key], problem: &mut impl FnMut(String)) {
    for (name, value) in table {
        let key = [path.as_slice(), &[name]].concat();
        let dotted = key.join(".");
        if keys.contains(&key) {
            match accept(&key, vec![value]) {
                Ok(leaf) => overlay(merged, leaf),
                Err(error) => problem(format!("{dotted}: {error}")),
            }
        } else if keys.iter().any(|known| known.starts_with(&key)) {
            match value {
                Value::Table(inner) => overlay_table(merged, inner, &key, keys, problem),
                _ => problem(format!("{dotted}: it is a section; write [{dotted}] with its keys below")),
            }
        } else {
            let siblings: Vec<&str> = keys
                .iter()
                .filter(|known| known.len() == key.len() && known.starts_with(path))
                .filter_map(|known| known.last().map(String::as_str))
                .collect();
            problem(format!("{dotted}: unknown key; known here are {}", siblings.join(", ")));
        }
    }
}

fn overlay_environment(
    merged: &mut Table,
    environment: impl IntoIterator<Item = (OsString, OsString)>,
    keys: &[Key],
    problems: &mut Vec<String>,
) {
    let mut variables: Vec<(String, OsString)> = environment
        .into_iter()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
        .filter(|(name, _)| name.starts_with("DREAMFEED_"))
        .filter(|(name, _)| !OTHER_VARIABLES.contains(&name.as_str()) && !is_service_link(name))
        .collect();
    variables.sort();
    for (name, value) in variables {
        let variable = |key: &&Key| format!("DREAMFEED_{}", key.join("_").to_uppercase()) == name;
        let Some(key) = keys.iter().find(variable) else {
            problems.push(format!(
                "{name}: unknown variable; take DREAMFEED_ and the key in capitals, for example \
                 DREAMFEED_SYNTHESIS_BATCH_SIZE"
            ));
            continue;
        };
        let Ok(text) = value.into_string() else {
            problems.push(format!("{name}: its value is not UTF-8"));
            continue;
        };
        // The environment knows only text: what is not a string may be a TOML literal, or a list without its brackets.
        let literal =
            |text: &str| format!("x = {text}").parse::<Table>().ok().and_then(|mut table| table.remove("x"));
        let mut readings = vec![Value::String(text.clone())];
        readings.extend(literal(&text));
        readings.extend(literal(&format!("[{text}]")));
        match accept(key, readings) {
            Ok(leaf) => overlay(merged, leaf),
            Err(error) => problems.push(format!("{name}={text:?}: {error}")),
        }
    }
}

/// Kubernetes sets such variables for every Service in the namespace; one named "dreamfeed" would collide with us.
fn is_service_link(name: &str) -> bool {
    ["_SERVICE_HOST", "_SERVICE_PORT", "_PORT"].iter().any(|suffix| name.ends_with(suffix))
        || name.contains("_SERVICE_PORT_")
        || (name.contains("_PORT_") && (name.contains("_TCP") || name.contains("_UDP")))
}

/// The first reading that the schema takes at this place; otherwise the error of the last but bracketed one.
fn accept(key: &Key, readings: Vec<Value>) -> Result<Table, String> {
    let mut errors = Vec::new();
    for reading in readings {
        let mut value = reading;
        for name in key.iter().rev() {
            value = Value::Table(Table::from_iter([(name.clone(), value)]));
        }
        match ServeOptions::deserialize(value.clone()) {
            Ok(_) => {
                if let Value::Table(table) = value {
                    return Ok(table);
                }
            }
            Err(error) => errors.push(one_line(error.message())),
        }
    }
    errors.truncate(2);
    Err(errors.pop().unwrap_or_else(|| "it cannot be read".into()))
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
