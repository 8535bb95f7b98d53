//! The face of `blockfork::ublk` until the frontend is there: every device is refused.

#![expect(clippy::unused_self, reason = "these are the frontend's signatures")]

use blockfork::device::PoolFile;
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::pool::Attached;
use serde::{Deserialize, Serialize};
use std::path::PathBuf;
use std::sync::Arc;

pub(crate) struct DeviceOptions {
    pub(crate) dev_id: Option<u32>,
    pub(crate) queues: u16,
    pub(crate) depth: u16,
    pub(crate) read_only: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct DeviceState {
    pub(crate) dev_id: u32,
    pub(crate) queues: u16,
    pub(crate) depth: u16,
    pub(crate) io_buffer_bytes: u32,
    pub(crate) flags: u64,
}

#[derive(Debug)]
pub(crate) struct Served(Arc<Attached>);

fn refuse<T>() -> Result<T> {
    Err(Error::with(
        ErrorKind::Unsupported,
        "ublk: this build has no frontend",
    ))
}

impl Served {
    pub(crate) fn add(
        _file: Arc<PoolFile>,
        _attached: Arc<Attached>,
        options: &DeviceOptions,
    ) -> Result<Self> {
        let options = (options.dev_id, options.queues, options.depth);
        tracing::debug!(?options, "refused");
        refuse()
    }
    pub(crate) fn recover(
        _file: Arc<PoolFile>,
        _attached: Arc<Attached>,
        _state: &DeviceState,
    ) -> Result<Self> {
        refuse()
    }
    pub(crate) fn state(&self) -> DeviceState {
        DeviceState {
            dev_id: 0,
            queues: 0,
            depth: 0,
            io_buffer_bytes: 0,
            flags: 0,
        }
    }
    pub(crate) fn path(&self) -> PathBuf {
        "/dev/ublkb0".into()
    }
    pub(crate) fn attached(&self) -> &Arc<Attached> {
        &self.0
    }
    pub(crate) fn update_size(&self, _bytes: u64) -> Result<bool> {
        refuse()
    }
    pub(crate) fn has_failed(&self) -> Option<Error> {
        None
    }
    pub(crate) fn remove(self) -> Result<()> {
        refuse()
    }
    pub(crate) fn abandon(self) {}
}

pub(crate) fn drop_cached_pages(_dev_id: u32) -> Result<()> {
    refuse()
}
pub(crate) fn holders(_dev_id: u32) -> Vec<String> {
    Vec::new()
}
pub(crate) fn forget(_dev_id: u32) -> Result<()> {
    refuse()
}

pub(crate) struct Check {
    pub(crate) name: String,
    pub(crate) ok: bool,
    pub(crate) fact: String,
    pub(crate) way_out: String,
}
pub(crate) struct Driver {
    pub(crate) checks: Vec<Check>,
}
pub(crate) fn driver() -> Driver {
    let ok = std::path::Path::new("/dev/ublk-control").exists();
    let fact = if ok { "there" } else { "not there" };
    Driver {
        checks: vec![Check {
            name: "/dev/ublk-control".into(),
            ok,
            fact: fact.into(),
            way_out: "load the module with `modprobe ublk_drv`".into(),
        }],
    }
}
