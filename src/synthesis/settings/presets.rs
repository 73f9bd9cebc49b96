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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::synthesis::settings::{Settings, SynthesisOptions};

    #[test]
    fn every_preset_is_complete_and_says_only_what_differs_from_what_it_is_built_on() {
        for (name, text) in FILES {
            let settings = Settings::preset(name).unwrap();
            assert_eq!(settings.preset, name);
            assert_eq!(settings.problems(10), Vec::<String>::new());
            let chosen = SynthesisOptions { preset: Some(name.to_owned()), ..SynthesisOptions::default() };
            assert_eq!(chosen.resolve(10).unwrap(), settings);
            let own: Table = text.parse().unwrap();
            let Some(base) = own.get(BASE).and_then(Value::as_str) else { continue };
            let base = table(base).unwrap();
            for (key, value) in own.iter().filter(|(key, value)| *key != BASE && !value.is_table()) {
                assert_ne!(base.get(key), Some(value), "{name} repeats {key}");
            }
        }
        assert!(Settings::preset("cifar100").is_none());
    }
}
