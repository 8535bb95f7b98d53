//! `serve-nbd`: a volume over NBD, for as long as the command runs.

use super::{unexpected, warn_read_only};
use crate::cli::ServeNbd;
use crate::client;
use crate::output;
use crate::protocol::{NbdAddress, Reply, Request};
use crate::state::{self, Registry};
use blockfork::error::Result;

pub(super) fn serve(options: &ServeNbd) -> Result<()> {
    let (pool, path) = (&options.target.pool, &options.target.path);
    Registry::from_env()?.find(pool)?;
    let address = match (&options.socket, options.listen) {
        (Some(socket), _) => NbdAddress::Unix(state::absolute(socket)?),
        (None, Some(address)) => NbdAddress::Tcp(address),
        (None, None) => NbdAddress::Runtime,
    };
    let request = Request::ServeNbd {
        path: path.clone(),
        read_only: options.read_only,
        address,
        on_full: options.on_full,
    };
    client::hold(pool, &request, |reply| {
        let Reply::ServingNbd { uri, read_only } = reply else {
            return Err(unexpected());
        };
        if read_only && !options.read_only && path.snapshot.is_none() {
            warn_read_only(pool, path);
        }
        output::text(&format!("{uri}\n"))
    })
}
