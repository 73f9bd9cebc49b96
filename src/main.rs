//! The `dreamfeed` binary: parses, calls, prints.

use std::process::ExitCode;

fn main() -> ExitCode {
    match dreamfeed::cli::run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
