//! Whether the pool's file is still where it was opened, and what to do if it is not.

use super::Host;
use blockfork::device::Place;
use std::os::fd::AsRawFd;
use std::path::Path;

impl Host {
    /// What happened to the pool's file and the way out, if the file is not where it was opened.
    pub(crate) fn misplaced(&self) -> Option<String> {
        let file = self.device.file();
        let path = file.path();
        let shown = path.display();
        let other = if path.exists() {
            " Another file is there now: move that away first."
        } else {
            ""
        };
        match self.place() {
            Place::Kept => None,
            Place::Deleted => Some(format!(
                "{shown}: the pool's file was deleted while it is served, and all that the pool holds is gone when this \
                 daemon ends.{other} Copy the file while the daemon is stopped, and go on from the copy: `{}`",
                self.rescue(path)
            )),
            Place::Moved(to) => Some(format!(
                "{shown}: the pool's file was moved while it is served, and the next daemon will not find it.{other} Move \
                 it back: `mv {} {}`",
                quoted(&to),
                quoted(path)
            )),
            Place::Removed => Some(format!(
                "{shown}: this machine has no such device any more; reads and writes of the pool fail until it is back"
            )),
            Place::Renamed => Some(format!(
                "{shown}: is not the node of the pool's device any more; I/O goes on, but the next daemon will not find it"
            )),
        }
    }

    /// Whether what the pool holds is gone when this process ends.
    pub(crate) fn is_deleted(&self) -> bool {
        self.place() == Place::Deleted
    }

    /// What [`Self::misplaced`] says, if what the pool holds is gone when this process ends.
    pub(crate) fn deleted(&self) -> Option<String> {
        self.misplaced().filter(|_| self.is_deleted())
    }

    fn place(&self) -> Place {
        // What cannot be seen is not said to be wrong: an alarm that is false is not heeded when it is right.
        self.device.file().place().unwrap_or_else(|e| {
            tracing::debug!("where the pool's file is cannot be seen: {e}");
            Place::Kept
        })
    }

    /// The shell line that saves a deleted file and loses nothing, not even what was acknowledged and not flushed.
    ///
    /// A stopped daemon changes nothing, so the copy is what a daemon leaves that is killed in that moment. The records of
    /// what was not flushed stand in the ring, which outlives the daemon, and its devices wait for the next one.
    fn rescue(&self, path: &Path) -> String {
        let (pid, pool) = (std::process::id(), &self.name);
        let descriptor = self.device.file().as_raw_fd();
        let folder = path.parent().unwrap_or(Path::new("/"));
        let prepare = if folder.exists() {
            String::new()
        } else {
            format!("mkdir -p {}; ", quoted(folder))
        };
        let path = quoted(path);
        format!(
            "{prepare}kill -STOP {pid}; if cp --sparse=always /proc/{pid}/fd/{descriptor} {path} && sync {path}; \
             then kill -KILL {pid}; ublkctl recover {pool}; else kill -CONT {pid}; fi"
        )
    }
}

/// A path as a shell reads it.
fn quoted(path: &Path) -> String {
    let text = path.display().to_string();
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "/._-+:@,".contains(c);
    if text.chars().all(is_plain) {
        return text;
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_reads_the_path_that_was_meant() {
        assert_eq!(quoted(Path::new("/srv/tank.pool")), "/srv/tank.pool");
        assert_eq!(quoted(Path::new("/srv/my pool")), "'/srv/my pool'");
        assert_eq!(quoted(Path::new("/a'b; rm")), r"'/a'\''b; rm'");
    }
}
