//! The command line: one file a subcommand, each with `Args` and `run`.

/// Prints a line to standard output; returns early where that fails.
macro_rules! say {
    ($($text:tt)*) => {
        crate::cli::print(&(format!($($text)*) + "\n"))?
    };
}

mod arguments;
pub mod bench;
pub mod continual;
pub mod distill;
pub mod dream;
pub mod evaluate;
pub mod log;
pub mod prune;
pub mod serve;
pub mod synthesizer;
mod trainer;

use std::io::{self, Write};

use clap::{Parser, Subcommand};

use crate::config::Problems;

/// Dreams training data out of a pretrained network, and streams it to those who train another.
#[derive(Debug, Parser)]
#[command(name = "dreamfeed", version, about, propagate_version = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Serve(Box<serve::Args>),
    Distill(Box<distill::Args>),
    Evaluate(Box<evaluate::Args>),
    Prune(Box<prune::Args>),
    Continual(Box<continual::Args>),
    Dream(Box<dream::Args>),
    Bench(Box<bench::Args>),
    Log(Box<log::Args>),
    Synthesizer(synthesizer::Args),
}

/// Parses the process's arguments and does what they say. Usage errors end the process with code 2.
pub fn run() -> anyhow::Result<()> {
    crate::native::keep_freed_memory();
    let (cli, problems) = arguments::parse::<Cli>(std::env::args_os().collect()).unwrap_or_else(|error| error.exit());
    match cli.command {
        Command::Serve(args) => serve::run(*args, problems),
        _ if !problems.is_empty() => {
            eprintln!("error: {}", Problems(problems));
            std::process::exit(2);
        }
        Command::Distill(args) => distill::run(*args),
        Command::Evaluate(args) => evaluate::run(*args),
        Command::Prune(args) => prune::run(*args),
        Command::Continual(args) => continual::run(*args),
        Command::Dream(args) => dream::run(*args),
        Command::Bench(args) => bench::run(*args),
        Command::Log(args) => log::run(*args),
        Command::Synthesizer(args) => synthesizer::run(args),
    }
}

/// Prints to standard output. Whoever closed it (`| head`) has read enough, which is not an error.
fn print(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        printed => printed,
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        let command = super::Cli::command();
        command.clone().debug_assert();
        check(&command);
    }

    /// debug_assert does nothing in a release build, and two fields of one name would silently share one value.
    fn check(command: &clap::Command) {
        let mut ids: Vec<&str> = command.get_arguments().map(|argument| argument.get_id().as_str()).collect();
        let all = ids.len();
        ids.sort_unstable();
        ids.dedup();
        assert_eq!(ids.len(), all, "{}: {ids:?}", command.get_name());
        command.get_subcommands().for_each(check);
    }
}
