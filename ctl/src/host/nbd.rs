//! Exports over NBD.

use super::Host;
use crate::endpoint::{Bound, Endpoint};
use crate::events::Event;
use crate::exports::Exported;
use crate::protocol::{NbdAddress, Reply};
use crate::state::Runtime;
use blockfork::error::Result;
use blockfork::name::VolumePath;
use blockfork::nbd::Export;
use blockfork::pool::OnFull;
use futures_lite::future::block_on;
use std::sync::Arc;
use tracing::info;

impl Host {
    pub(super) fn serve_nbd(
        &self,
        path: &VolumePath,
        read_only: bool,
        address: &NbdAddress,
        on_full: OnFull,
    ) -> Result<Reply> {
        self.refuse_second(path)?;
        self.refuse_write(path, read_only)?;
        let attached = self
            .pool
            .attach(path, read_only || path.snapshot.is_some())?;
        attached.set_on_full(on_full);
        let read_only = attached.is_read_only();
        // It is given back when the last owner drops it, so also where something fails from here on.
        let name = format!("{}/{path}", self.name);
        let bound = Bound::new(address, &Runtime::of(&self.name)?, path)?;
        let uri = bound.uri(&name)?;
        let export = Arc::new(Export::new(name, attached, self.device.clone()));
        let endpoint = Endpoint::start(bound, export.clone())?;
        info!(volume = %path, uri, "serving over NBD");
        self.tell(&Event::ExportAdded {
            name: format!("{}/{path}", self.name),
            uri: uri.clone(),
        });
        self.devices().exports_mut().add(Exported {
            path: path.clone(),
            uri: uri.clone(),
            export,
            endpoint,
        });
        Ok(Reply::ServingNbd { uri, read_only })
    }

    /// Ends what is served over NBD of this volume or snapshot; on return everything is durable.
    pub(crate) fn end_nbd(&self, path: &VolumePath) -> Result<()> {
        let exported = self.devices().exports_mut().take(path);
        match exported {
            Some(exported) => self.end_export(exported),
            None => Ok(()),
        }
    }

    /// Ends everything that is served over NBD.
    pub(crate) fn end_all_nbd(&self) -> Result<()> {
        let mut ended = Ok(());
        loop {
            let exported = self.devices().exports_mut().take_any();
            let Some(exported) = exported else {
                return ended;
            };
            ended = ended.and(self.end_export(exported));
        }
    }

    pub(super) fn end_export(&self, exported: Exported) -> Result<()> {
        exported.endpoint.close();
        exported.export.close();
        let attached = exported.export.attached();
        let flushed = block_on(attached.flush(&self.device));
        attached.detach();
        info!(volume = %exported.path, "no longer served over NBD");
        self.tell(&Event::ExportGone {
            name: format!("{}/{}", self.name, exported.path),
            uri: exported.uri,
        });
        flushed
    }
}
