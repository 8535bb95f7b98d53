//! docs/cli.md, written from the command line itself. `BLESS=1 cargo test -p ublkctl` renews it.

#![cfg(test)]

use crate::cli::Cli;
use clap::{Arg, ArgAction, Command, CommandFactory};
use std::fmt::Write;
use std::fs;
use std::path::Path;

fn page() -> String {
    let mut command = Cli::command();
    command.build();
    let mut out = String::from(
        "# The command line\n\nGenerated from `ctl/src/cli.rs`; `BLESS=1 cargo test -p ublkctl` renews it.\n\n",
    );
    if let Some(about) = command.get_long_about() {
        writeln!(out, "{about}").unwrap();
    }
    for sub in visible(&command) {
        section(&mut out, "ublkctl", sub);
    }
    out
}

fn visible(command: &Command) -> impl Iterator<Item = &Command> {
    command
        .get_subcommands()
        .filter(|sub| !sub.is_hide_set() && sub.get_name() != "help")
}

fn section(out: &mut String, above: &str, command: &Command) {
    let name = format!("{above} {}", command.get_name());
    let below: Vec<&Command> = visible(command).collect();
    if !below.is_empty() {
        for sub in below {
            section(out, &name, sub);
        }
        return;
    }
    let usage = command.clone().render_usage().to_string();
    writeln!(
        out,
        "\n## {name}\n\n```text\n{}\n```\n",
        usage.trim_start_matches("Usage: ")
    )
    .unwrap();
    let about = command.get_long_about().or(command.get_about()).unwrap();
    writeln!(out, "{about}").unwrap();
    let aliases: Vec<String> = command
        .get_all_aliases()
        .map(|alias| format!("`{alias}`"))
        .collect();
    if !aliases.is_empty() {
        writeln!(out, "\nAlso: {}.", aliases.join(", ")).unwrap();
    }
    let arguments: Vec<&Arg> = command
        .get_arguments()
        .filter(|argument| !argument.is_hide_set() && argument.get_id() != "help")
        .collect();
    if !arguments.is_empty() {
        out.push('\n');
    }
    for argument in arguments {
        let help = argument
            .get_help()
            .map(ToString::to_string)
            .unwrap_or_default();
        write!(out, "- `{}` {help}", spelled(argument)).unwrap();
        let values: Vec<String> = argument
            .get_possible_values()
            .iter()
            .filter(|value| !value.is_hide_set())
            .map(|value| {
                value.get_help().map_or_else(
                    || format!("`{}`", value.get_name()),
                    |help| format!("`{}` {help}", value.get_name()),
                )
            })
            .collect();
        if !values.is_empty() && argument.get_action().takes_values() {
            write!(out, ". One of: {}", values.join("; ")).unwrap();
        }
        let defaults: Vec<_> = argument
            .get_default_values()
            .iter()
            .map(|value| value.to_string_lossy())
            .collect();
        if !defaults.is_empty() && argument.get_action().takes_values() {
            write!(out, ". Default: `{}`", defaults.join(",")).unwrap();
        }
        out.push('\n');
    }
}

/// An argument as it is typed: `-s, --size SIZE`, or `--freeze[=SECONDS]` where the value may be left out.
fn spelled(argument: &Arg) -> String {
    let names: Vec<String> = argument
        .get_value_names()
        .unwrap_or_default()
        .iter()
        .map(ToString::to_string)
        .collect();
    if argument.is_positional() {
        return names.join(" ");
    }
    let short = argument.get_short().map(|short| format!("-{short}"));
    let long = argument.get_long().map(|long| format!("--{long}"));
    let mut text = short.into_iter().chain(long).collect::<Vec<_>>().join(", ");
    let is_optional = argument
        .get_num_args()
        .is_some_and(|values| values.min_values() == 0);
    if matches!(argument.get_action(), ArgAction::Set | ArgAction::Append) {
        let names = names.join(" ");
        if is_optional {
            write!(text, "[={names}]").unwrap();
        } else {
            write!(text, " {names}").unwrap();
        }
    }
    text
}

#[test]
fn the_page_is_what_the_command_line_says() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/cli.md");
    let page = page();
    if std::env::var_os("BLESS").is_some() {
        fs::write(&path, &page).unwrap();
    }
    let written = fs::read_to_string(&path).unwrap_or_default();
    assert!(
        written == page,
        "docs/cli.md is not what the command line says; run `BLESS=1 cargo test -p ublkctl`"
    );
}
