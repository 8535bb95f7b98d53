//! What a daemon serves over NBD. It lives as long as the control connection that asked for it, so nothing of it is
//! kept on disk.

use crate::endpoint::Endpoint;
use blockfork::device::FileDevice;
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::name::{Name, VolumePath};
use blockfork::nbd::Export;
use std::sync::Arc;

/// A volume or snapshot that is served over NBD.
#[derive(Debug)]
pub(crate) struct Exported {
    /// What it serves.
    pub(crate) path: VolumePath,
    /// Where clients find it.
    pub(crate) uri: String,
    /// The clients.
    pub(crate) export: Arc<Export<FileDevice>>,
    /// The socket.
    pub(crate) endpoint: Endpoint,
}

/// All that a pool's daemon serves over NBD.
#[derive(Debug, Default)]
pub(crate) struct Exports(Vec<Exported>);

impl Exports {
    /// Whether there is none.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many there are.
    pub(crate) fn count(&self) -> u64 {
        self.0.len() as u64
    }

    /// That of this volume or snapshot.
    pub(crate) fn find(&self, path: &VolumePath) -> Option<&Exported> {
        self.0.iter().find(|exported| exported.path == *path)
    }

    /// Adds one.
    pub(crate) fn add(&mut self, exported: Exported) {
        self.0.push(exported);
    }

    /// Takes one out.
    pub(crate) fn take(&mut self, path: &VolumePath) -> Option<Exported> {
        let is_meant = |exported: &Exported| exported.path == *path;
        let index = self.0.iter().position(is_meant)?;
        Some(self.0.remove(index))
    }

    /// Takes any one out.
    pub(crate) fn take_any(&mut self) -> Option<Exported> {
        self.0.pop()
    }

    /// An error if anything that is meant is served: all of that, and the way out.
    pub(crate) fn refuse(
        &self,
        pool: &Name,
        action: &str,
        is_meant: impl Fn(&VolumePath) -> bool,
    ) -> Result<()> {
        let blockers = self.0.iter().filter(|exported| is_meant(&exported.path));
        let shown: Vec<String> = blockers
            .map(|Exported { path, uri, .. }| format!("{pool}/{path} as {uri}"))
            .collect();
        if shown.is_empty() {
            return Ok(());
        }
        Err(Error::with(
            ErrorKind::Busy,
            format!(
                "{pool}: cannot {action} while served over NBD: {}; end its `ublkctl serve-nbd` first",
                shown.join(", ")
            ),
        ))
    }
}
