//! `watch`: what happens to a pool, as JSON lines.

use crate::client;
use crate::output;
use blockfork::error::{Error, Result};
use blockfork::name::Name;

pub(super) fn watch(pool: &Name) -> Result<()> {
    client::watch(pool, |told| {
        let mut line =
            serde_json::to_string(&told).map_err(|e| Error::io(e.into(), "an event as JSON"))?;
        line.push('\n');
        output::text_if_read(&line)
    })
}
