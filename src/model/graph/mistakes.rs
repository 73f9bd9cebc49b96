//! Every mistake of a graph at once, and never more text than somebody would read.

use std::fmt;

use serde_json::Value;

/// The most mistakes that are told in words.
const TOLD: usize = 16;
/// The most characters of somebody else's text in a message.
const MAX_QUOTED: usize = 80;

/// Why a graph cannot be used: all that was found, up to a bound.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct GraphError(Mistakes);

impl GraphError {
    /// The mistakes that are told in words, one a sentence.
    pub fn mistakes(&self) -> &[String] {
        &self.0.told
    }
}

/// Mistakes as they are found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Mistakes {
    told: Vec<String>,
    more: usize,
}

impl Mistakes {
    pub fn add(&mut self, mistake: String) {
        if self.told.len() < TOLD {
            self.told.push(mistake);
        } else {
            self.more += 1;
        }
    }

    pub fn is_empty(&self) -> bool {
        self.told.is_empty()
    }

    pub fn into_error(self) -> GraphError {
        GraphError(self)
    }

    pub fn into_result<T>(self, value: T) -> Result<T, GraphError> {
        if self.is_empty() { Ok(value) } else { Err(GraphError(self)) }
    }
}

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the graph is wrong: {}", self.told.join("; "))?;
        if self.more > 0 { write!(f, "; and {} mistakes more", self.more) } else { Ok(()) }
    }
}

/// Somebody else's text, quoted, with nothing unprintable in it, and cut.
pub(super) fn quoted(text: &str) -> String {
    let cut: String = text.chars().take(MAX_QUOTED).collect();
    let dots = if cut.len() < text.len() { "…" } else { "" };
    format!("{cut:?}{dots}")
}

/// The same of JSON, which has its own quotes.
pub(super) fn shortened(value: &Value) -> String {
    let text = value.to_string();
    let cut = text.chars().take(MAX_QUOTED).flat_map(|c| match c {
        '"' | '\\' | '\'' => c.to_string().chars().collect::<Vec<_>>(),
        c => c.escape_debug().collect(),
    });
    let dots = if text.chars().nth(MAX_QUOTED).is_some() { "…" } else { "" };
    cut.collect::<String>() + dots
}
