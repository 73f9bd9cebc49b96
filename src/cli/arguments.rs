//! Arguments, with every malformed value reported and not only the first.

use std::ffi::OsString;

use clap::Parser;
use clap::error::{ContextKind, ContextValue, ErrorKind};

/// Parses as clap does. A flag whose value is malformed is taken out, and what is wrong with it returned beside what the
/// others say; any other mistake is clap's to tell.
pub(super) fn parse<T: Parser>(mut arguments: Vec<OsString>) -> Result<(T, Vec<String>), clap::Error> {
    let mut problems = Vec::new();
    let mut first = None;
    loop {
        match T::try_parse_from(&arguments) {
            Ok(parsed) => return Ok((parsed, problems)),
            Err(error) => {
                let problem = malformed(&error).filter(|(flag, value, _)| take_out(&mut arguments, flag, value));
                // A flag that is required and malformed is missing once it is taken out: then the first mistake counts.
                let Some((_, _, problem)) = problem else { return Err(first.unwrap_or(error)) };
                problems.push(problem);
                first.get_or_insert(error);
            }
        }
    }
}

/// The flag, its value, and a sentence.
fn malformed(error: &clap::Error) -> Option<(String, String, String)> {
    if !matches!(error.kind(), ErrorKind::ValueValidation | ErrorKind::InvalidValue) {
        return None;
    }
    let text = |kind| match error.get(kind) {
        Some(ContextValue::String(text)) => Some(text.clone()),
        _ => None,
    };
    let (argument, value) = (text(ContextKind::InvalidArg)?, text(ContextKind::InvalidValue)?);
    let flag = argument.split([' ', '=', '[']).next().filter(|flag| flag.starts_with("--"))?.to_owned();
    let why = match error.get(ContextKind::ValidValue) {
        Some(ContextValue::Strings(valid)) if !valid.is_empty() => format!("give one of {}", valid.join(", ")),
        _ => std::error::Error::source(error).map(ToString::to_string)?,
    };
    Some((flag.clone(), value.clone(), format!("{flag} {value:?}: {why}")))
}

/// Whether the flag was there with that value, and now is not.
fn take_out(arguments: &mut Vec<OsString>, flag: &str, value: &str) -> bool {
    let joined = OsString::from(format!("{flag}={value}"));
    if let Some(at) = arguments.iter().position(|argument| *argument == joined) {
        arguments.remove(at);
        return true;
    }
    let pair = arguments.windows(2).position(|pair| pair.iter().eq([flag, value].iter()));
    if let Some(at) = pair {
        arguments.drain(at..at + 2);
    }
    pair.is_some()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Parser)]
    struct Flags {
        #[arg(long)]
        count: Option<u32>,
        #[arg(long)]
        share: Option<f32>,
        #[arg(long, value_parser = ["a", "b"])]
        kind: Option<String>,
        #[arg(long)]
        needed: u8,
    }

    fn parse_words(words: &str) -> Result<(Flags, Vec<String>), clap::Error> {
        parse(std::iter::once("flags").chain(words.split(' ')).map(OsString::from).collect())
    }

    #[test]
    fn every_malformed_value_is_told() -> Result<(), clap::Error> {
        let (flags, problems) = parse_words("--count many --share=x --kind c --needed 3")?;
        assert_eq!((flags.count, flags.share, flags.kind, flags.needed), (None, None, None, 3));
        assert_eq!(problems.len(), 3, "{problems:?}");
        assert!(problems[0].starts_with("--count \"many\": invalid digit"), "{problems:?}");
        assert!(problems[1].starts_with("--share \"x\": "), "{problems:?}");
        assert_eq!(problems[2], "--kind \"c\": give one of a, b");
        Ok(())
    }

    #[test]
    fn what_is_no_malformed_value_is_told_as_ever() {
        assert_eq!(
            parse_words("--needed 3 --cuont 3").map(drop).map_err(|e| e.kind()),
            Err(ErrorKind::UnknownArgument)
        );
        assert_eq!(parse_words("--needed x").map(drop).map_err(|e| e.kind()), Err(ErrorKind::ValueValidation));
    }
}
