//! From an error to the one line on stderr and the exit code that scripts see.
//! An error is one line whatever text it carries, so a hostile name or path cannot forge a second one.

use blockfork::error::{Error, ErrorKind};
use std::error::Error as _;
use std::path::Path;
use std::process::ExitCode;

/// Everything went well.
pub(crate) const OK: u8 = 0;
/// It did not go well.
pub(crate) const FAILED: u8 = 1;
/// The command line cannot be understood.
pub(crate) const USAGE: u8 = 2;

/// The error and its causes, in one line without control characters.
pub(crate) fn one_line(error: &Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(source) = cause {
        text.push_str(": ");
        text.push_str(&source.to_string());
        cause = source.source();
    }
    printable(&text)
}

/// The error with its subject, where the engine knows only the bytes: `PATH: FACT`.
pub(crate) fn about(path: &Path, error: &Error) -> Error {
    let (shown, line) = (path.display().to_string(), one_line(error));
    let line = if line.contains(&shown) {
        line
    } else {
        format!("{shown}: {line}")
    };
    Error::with(error.kind(), line)
}

/// The text with control characters escaped.
pub(crate) fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if c.is_control() {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// An error that came from a child process's exit code.
pub(crate) fn from_code(code: Option<i32>, message: String) -> Error {
    let kind = match code {
        Some(2) => ErrorKind::Invalid,
        Some(3) => ErrorKind::OutOfSpace,
        Some(4) => ErrorKind::Corrupt,
        _ => ErrorKind::Io,
    };
    Error::with(kind, message)
}

/// The exit code as the standard library wants it.
pub(crate) fn code(code: u8) -> ExitCode {
    ExitCode::from(code)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_follow_their_effect_in_one_line() {
        let error = Error::io(
            std::io::Error::from_raw_os_error(libc::EACCES),
            "/srv/p\n0: cannot be opened",
        );
        let line = one_line(&error);
        assert!(
            line.starts_with("/srv/p\\n0: cannot be opened: Permission denied"),
            "{line}"
        );
        assert!(!line.contains('\n'));
    }
}
