//! What shells and `man` read.

use crate::cli::Cli;
use crate::output;
use blockfork::error::{Error, ErrorKind, Result};
use clap::CommandFactory;
use std::path::Path;

pub(super) fn completions(shell: clap_complete::Shell) -> Result<()> {
    let mut out = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "ublkctl", &mut out);
    output::text(&String::from_utf8_lossy(&out))
}

pub(super) fn man(directory: &Path) -> Result<()> {
    let written = clap_mangen::generate_to(Cli::command(), directory);
    // A directory without room for them is not a pool without space.
    written.map_err(|e| {
        Error::with(
            ErrorKind::Io,
            format!("{}: the pages cannot be written: {e}", directory.display()),
        )
    })
}
