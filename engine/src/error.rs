//! The engine's error: a kind to match on, the place it happened, the cause below it.
//! `Display` says the subject and the fact in the user's words and never repeats the source.

use crate::units::{Lba, Pba};
use std::fmt;

/// The result of everything in the engine that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong, coarse enough to act on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ErrorKind {
    /// A pool, volume, snapshot or device that is not there.
    NotFound,
    /// A name that is taken.
    AlreadyExists,
    /// Something holds the subject: a mount, another process, a device that serves it.
    Busy,
    /// A name, size or option that can't be.
    Invalid,
    /// No free block, outside the reserve where that applies.
    OutOfSpace,
    /// Bytes on the device that are not what was written there.
    Corrupt,
    /// A format version, feature bit or kernel feature that is not there.
    Unsupported,
    /// A flush failed earlier; the pool takes no more writes, because the kernel may have dropped what was unwritten.
    Poisoned,
    /// A change asked of something opened or attached read-only.
    ReadOnly,
    /// The operating system refused for lack of rights.
    Permission,
    /// A read, a write or a system call failed.
    Io,
    /// A volume's own quota, which room in the pool does not help.
    OverQuota,
}

impl ErrorKind {
    /// The errno that a block device's client sees.
    pub fn errno(self) -> i32 {
        match self {
            Self::OutOfSpace | Self::OverQuota => libc::ENOSPC,
            Self::ReadOnly => libc::EROFS,
            Self::Invalid => libc::EINVAL,
            Self::Unsupported => libc::EOPNOTSUPP,
            Self::NotFound
            | Self::AlreadyExists
            | Self::Busy
            | Self::Corrupt
            | Self::Poisoned
            | Self::Permission
            | Self::Io => libc::EIO,
        }
    }

    /// The exit code of a command that fails with this: 1 failed, 2 usage, 3 out of space, 4 corrupt.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Invalid => 2,
            Self::OutOfSpace | Self::OverQuota => 3,
            Self::Corrupt => 4,
            Self::NotFound
            | Self::AlreadyExists
            | Self::Busy
            | Self::Unsupported
            | Self::Poisoned
            | Self::ReadOnly
            | Self::Permission
            | Self::Io => 1,
        }
    }

    /// A stable word for JSON.
    pub fn word(self) -> &'static str {
        match self {
            Self::NotFound => "not-found",
            Self::AlreadyExists => "already-exists",
            Self::Busy => "busy",
            Self::Invalid => "invalid",
            Self::OutOfSpace => "out-of-space",
            Self::Corrupt => "corrupt",
            Self::Unsupported => "unsupported",
            Self::Poisoned => "poisoned",
            Self::ReadOnly => "read-only",
            Self::Permission => "permission",
            Self::Io => "io",
            Self::OverQuota => "over-quota",
        }
    }

    /// The kind that [`ErrorKind::word`] names.
    pub fn from_word(word: &str) -> Option<Self> {
        [
            Self::NotFound,
            Self::AlreadyExists,
            Self::Busy,
            Self::Invalid,
            Self::OutOfSpace,
            Self::Corrupt,
            Self::Unsupported,
            Self::Poisoned,
            Self::ReadOnly,
            Self::Permission,
            Self::Io,
            Self::OverQuota,
        ]
        .into_iter()
        .find(|kind| kind.word() == word)
    }

    /// The fact alone, for an error that nobody gave a message.
    fn phrase(self) -> &'static str {
        match self {
            Self::NotFound => "not found",
            Self::AlreadyExists => "exists already",
            Self::Busy => "in use",
            Self::Invalid => "invalid",
            Self::OutOfSpace => "no space left in the pool",
            Self::Corrupt => "damaged",
            Self::Unsupported => "not supported",
            Self::Poisoned => "an earlier flush failed, the pool takes no more writes",
            Self::ReadOnly => "read-only",
            Self::Permission => "permission denied",
            Self::Io => "input/output error",
            Self::OverQuota => "the volume's quota is used up",
        }
    }
}

/// An error of the engine.
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    message: Option<String>,
    pba: Option<Pba>,
    lba: Option<Lba>,
    source: Option<std::io::Error>,
}

impl Error {
    /// An error of this kind, without more.
    pub fn new(kind: ErrorKind) -> Self {
        Self(Box::new(Inner {
            kind,
            message: None,
            pba: None,
            lba: None,
            source: None,
        }))
    }

    /// An error that says `message`: the subject, the fact, the way out.
    pub fn with(kind: ErrorKind, message: impl Into<String>) -> Self {
        let mut error = Self::new(kind);
        error.0.message = Some(message.into());
        error
    }

    /// An operating-system error, its kind taken from the errno. It names the way out where the errno alone does not.
    pub fn io(source: std::io::Error, message: impl Into<String>) -> Self {
        let kind = match source.raw_os_error() {
            Some(libc::ENOSPC | libc::EDQUOT) => ErrorKind::OutOfSpace,
            Some(libc::EACCES | libc::EPERM) => ErrorKind::Permission,
            Some(libc::EROFS) => ErrorKind::ReadOnly,
            Some(libc::ENOENT) => ErrorKind::NotFound,
            Some(libc::EBUSY) => ErrorKind::Busy,
            _ => ErrorKind::Io,
        };
        let mut message = message.into();
        // Not a lack of space: nothing that is removed from the pool or from the file system helps.
        if source.raw_os_error() == Some(libc::EFBIG) {
            message.push_str(
                "; the file may not be so large: see the process's limit (`ulimit -f`, `prlimit --fsize`) and that of the file system",
            );
        }
        let mut error = Self::with(kind, message);
        error.0.source = Some(source);
        error
    }

    /// A damage report.
    pub fn corrupt(message: impl Into<String>) -> Self {
        Self::with(ErrorKind::Corrupt, message)
    }

    /// The same error at a pool block.
    #[must_use]
    pub fn at_pba(mut self, pba: Pba) -> Self {
        self.0.pba.get_or_insert(pba);
        self
    }

    /// The same error at a volume's block.
    #[must_use]
    pub fn at_lba(mut self, lba: Lba) -> Self {
        self.0.lba.get_or_insert(lba);
        self
    }

    /// What went wrong.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The errno that a block device's client sees.
    pub fn errno(&self) -> i32 {
        self.0.kind.errno()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0.message {
            Some(message) => f.write_str(message)?,
            None => f.write_str(self.0.kind.phrase())?,
        }
        if let Some(lba) = self.0.lba {
            write!(f, " at {lba}")?;
        }
        if let Some(pba) = self.0.pba {
            write!(f, " at {pba}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0
            .source
            .as_ref()
            .map(|source| source as &(dyn std::error::Error + 'static))
    }
}
