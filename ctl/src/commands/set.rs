//! `set`: properties of a volume, and of a pool as this machine knows it.

use super::change;
use crate::cli::{Property, Set};
use crate::client;
use crate::marks::Marks;
use crate::protocol::Request;
use crate::state::Registry;
use blockfork::error::{Error, ErrorKind, Result};
use blockfork::name::{Name, VolumePath};
use blockfork::pool::LimitChange;

pub(super) fn set(options: &Set) -> Result<()> {
    let pool = &options.target.pool;
    match &options.target.path {
        None => set_pool(pool, &options.properties),
        Some(path) => set_volume(pool, path, &options.properties),
    }
}

fn refuse<T>(subject: &str, fact: &str) -> Result<T> {
    Err(Error::with(
        ErrorKind::Invalid,
        format!("{subject}: {fact}"),
    ))
}

fn set_volume(pool: &Name, path: &VolumePath, properties: &[Property]) -> Result<()> {
    let shown = format!("{pool}/{path}");
    if path.snapshot.is_some() {
        return refuse(
            &shown,
            "is a snapshot, which has no properties to set; name its volume",
        );
    }
    let mut changes: Vec<LimitChange> = Vec::new();
    for property in properties {
        match property {
            Property::Limit(change) if changes.iter().any(|other| other.limit == change.limit) => {
                return refuse(&shown, "a property is set twice");
            }
            Property::Limit(change) => changes.push(*change),
            Property::Marks(_) => {
                return refuse(
                    &shown,
                    "marks are a pool's; write `ublkctl set POOL marks=...`",
                );
            }
        }
    }
    let volume = path.volume.clone();
    change(pool, &Request::SetLimits { volume, changes })
}

fn set_pool(pool: &Name, properties: &[Property]) -> Result<()> {
    let mut marks: Option<&Marks> = None;
    for property in properties {
        match property {
            Property::Marks(_) if marks.is_some() => {
                return refuse(pool.as_str(), "a property is set twice");
            }
            Property::Marks(wanted) => marks = Some(wanted),
            Property::Limit(_) => {
                return refuse(
                    pool.as_str(),
                    "is a pool; quota and reserve are a volume's, POOL/VOLUME",
                );
            }
        }
    }
    let Some(marks) = marks else {
        return Ok(());
    };
    let registry = Registry::from_env()?;
    registry.find(pool)?;
    registry.lock()?.set_marks(pool, marks)?;
    // A daemon that starts reads them; one that runs is told.
    if client::is_served(pool)? {
        let marks = marks.clone();
        change(pool, &Request::SetMarks { marks })?;
    }
    Ok(())
}
