//! Names that users type: pools, volumes, snapshots and the `POOL/VOLUME@SNAPSHOT` that joins them.
//! A `Name` is valid by construction, so it can stand in a path, a table and a message as it is.

use crate::error::{Error, ErrorKind, Result};
use crate::limits::NAME_BYTES_MAX;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// The name of a pool, a volume or a snapshot: letters, digits, `_`, `-`, `.` and `:`, starting with a letter or a digit.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(String);

/// A volume or a snapshot of it, within a pool.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct VolumePath {
    /// The volume.
    pub volume: Name,
    /// Its snapshot, if that is meant.
    pub snapshot: Option<Name>,
}

/// What a command names: `POOL`, `POOL/VOLUME` or `POOL/VOLUME@SNAPSHOT`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target {
    /// The pool.
    pub pool: Name,
    /// The volume or snapshot in it; none for the pool itself.
    pub path: Option<VolumePath>,
}

impl Name {
    /// The name as typed.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Before every other name: where a range of names begins.
    pub(crate) fn first() -> Self {
        Self(String::new())
    }
}

impl FromStr for Name {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let refuse = |fact: String| {
            Err(Error::with(
                ErrorKind::Invalid,
                format!("name {:?}: {fact}", shorten(text)),
            ))
        };
        if text.is_empty() {
            return refuse("is empty".into());
        }
        if text.len() > NAME_BYTES_MAX {
            return refuse(format!(
                "is {} bytes long, at most {NAME_BYTES_MAX} are allowed",
                text.len()
            ));
        }
        let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | ':');
        if let Some(bad) = text.chars().find(|&c| !allowed(c)) {
            return refuse(format!(
                "{bad:?} is not allowed; use letters, digits, '_', '-', '.' and ':'"
            ));
        }
        if !text.starts_with(|c: char| c.is_ascii_alphanumeric()) {
            return refuse("must start with a letter or a digit".into());
        }
        if text.contains("..") {
            return refuse("\"..\" is not allowed".into());
        }
        Ok(Self(text.to_owned()))
    }
}

/// The beginning of a hostile text, short enough for one line of an error.
fn shorten(text: &str) -> String {
    const SHOWN: usize = 40;
    if text.chars().count() <= SHOWN {
        return text.to_owned();
    }
    text.chars().take(SHOWN).chain("...".chars()).collect()
}

impl TryFrom<String> for Name {
    type Error = Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Name> for String {
    fn from(name: Name) -> Self {
        name.0
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

impl VolumePath {
    /// The volume itself, also where this names a snapshot of it.
    #[must_use]
    pub fn origin(&self) -> Self {
        Self {
            volume: self.volume.clone(),
            snapshot: None,
        }
    }
}

impl FromStr for VolumePath {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (volume, snapshot) = match text.split_once('@') {
            Some((volume, snapshot)) => (volume, Some(snapshot.parse()?)),
            None => (text, None),
        };
        Ok(Self {
            volume: volume.parse()?,
            snapshot,
        })
    }
}

impl fmt::Display for VolumePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.snapshot {
            Some(snapshot) => write!(f, "{}@{snapshot}", self.volume),
            None => write!(f, "{}", self.volume),
        }
    }
}

impl FromStr for Target {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (pool, path) = match text.split_once('/') {
            Some((pool, path)) => (pool, Some(path.parse()?)),
            None => (text, None),
        };
        Ok(Self {
            pool: pool.parse()?,
            path,
        })
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.path {
            Some(path) => write!(f, "{}/{path}", self.pool),
            None => write!(f, "{}", self.pool),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_round_trips() {
        for text in ["p0", "p0/v", "p0/v@s-1.2:3"] {
            assert_eq!(text.parse::<Target>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn hostile_names_are_refused() {
        let long = "x".repeat(NAME_BYTES_MAX + 1);
        for text in [
            "", "/", "a/b/c", "a@b@c", "a b", "..", "a..b", "-a", ".a", "a\n", "a\0", "\u{e9}",
            &long,
        ] {
            let error = text.parse::<Name>().unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Invalid, "{text:?}");
            assert!(!error.to_string().contains('\n'), "{text:?}");
        }
        assert!("x".repeat(NAME_BYTES_MAX).parse::<Name>().is_ok());
    }
}
