//! ublkctl: the command line of blockfork. A library only so that tests and fuzzers reach what reads foreign bytes.

mod claim;
mod cli;
mod client;
mod commands;
mod daemon;
mod devices;
mod endpoint;
mod events;
mod exit_code;
mod exports;
#[cfg(feature = "fuzz")]
pub mod fuzz;
mod host;
mod inherited;
mod lineage;
mod marks;
mod output;
mod progress;
mod protocol;
mod quiesce;
mod reference;
mod retention;
mod signature;
mod size;
mod state;
mod udev;

use clap::Parser;
use clap::error::ErrorKind as UsageKind;
use std::error::Error as _;
use std::io::{self, Write as _};
use std::process::ExitCode;

/// Runs the command that the process was started with.
pub fn main() -> ExitCode {
    inherited::put_right();
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return usage(&e),
    };
    match commands::run(cli.command) {
        Ok(code) => exit_code::code(code),
        Err(e) => {
            output::say(&exit_code::one_line(&e));
            exit_code::code(e.kind().exit_code())
        }
    }
}

/// Help goes out as it is; a mistake is one line.
fn usage(error: &clap::Error) -> ExitCode {
    let is_help = matches!(
        error.kind(),
        UsageKind::DisplayHelp
            | UsageKind::DisplayVersion
            | UsageKind::DisplayHelpOnMissingArgumentOrSubcommand
    );
    if !is_help {
        output::say(&mistake(error));
        return exit_code::code(exit_code::USAGE);
    }
    let printed = error.print().and_then(|()| io::stdout().flush());
    if error.use_stderr() {
        return exit_code::code(exit_code::USAGE);
    }
    match output::written(printed) {
        Ok(_) => exit_code::code(exit_code::OK),
        Err(e) => {
            output::say(&exit_code::one_line(&e));
            exit_code::code(exit_code::FAILED)
        }
    }
}

/// The longest line about a command line, which repeats what was typed.
const MISTAKE_CHARS_MAX: usize = 1000;

/// What is wrong with the command line, in one line that can be read.
fn mistake(error: &clap::Error) -> String {
    let said = whole_mistake(error);
    if said.chars().count() <= MISTAKE_CHARS_MAX {
        return said;
    }
    said.chars()
        .take(MISTAKE_CHARS_MAX)
        .chain("...".chars())
        .collect()
}

fn whole_mistake(error: &clap::Error) -> String {
    // Names and sizes know best what is wrong with them.
    if let Some(source) = error.source() {
        return source.to_string();
    }
    let text = error.to_string();
    let said: Vec<&str> = text
        .lines()
        .take_while(|line| !line.trim().is_empty())
        .map(str::trim)
        .collect();
    let said = said.join(" ");
    format!(
        "{}; see `ublkctl --help`",
        said.strip_prefix("error: ").unwrap_or(&said)
    )
}
