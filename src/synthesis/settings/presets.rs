//! Presets: TOML files of the same keys as the daemon's configuration, complete or built on another one. They lie below
//! file, environment and flags, and are laid under them by the same overlay.

use toml::{Table, Value};

use crate::overlay::overlay;

/// Name and text of each preset.
const FILES: [(&str, &str); 4] = [
    ("cifar10", include_str!("../presets/cifar10.toml")),
    ("cifar10-live", include_str!("../presets/cifar10-live.toml")),
    ("cifar10-paper", include_str!("../presets/cifar10-paper.toml")),
    ("digits", include_str!("../presets/digits.toml")),
];

/// The names of the presets.
pub const PRESETS: [&str; FILES.len()] = [FILES[0].0, FILES[1].0, FILES[2].0, FILES[3].0];

/// The key that names the preset that another one is built on.
const BASE: &str = "preset";

/// Every setting of the preset of this name, its own name among them.
pub(super) fn table(name: &str) -> Option<Table> {
    let mut table = built(name)?;
    table.insert(BASE.to_owned(), Value::String(name.to_owned()));
    Some(table)
}

fn built(name: &str) -> Option<Table> {
    let (_, text) = FILES.iter().find(|(known, _)| *known == name)?;
    let own: Table = text.parse().ok()?;
    let base = own.get(BASE).and_then(Value::as_str).map(built);
    let mut table = base.unwrap_or_else(|| Some(Table::new()))?;
    overlay(&mut table, own);
    Some(table)
}
