//! Bytes to structs and back: pure, no I/O, little endian, field by field; one file per structure on disk.
//! `docs/format.md` says the same in tables. Everything decoded here is hostile until its checks passed.

#![deny(clippy::indexing_slicing)]

pub(crate) mod bytes;
pub(crate) mod catalog;
pub(crate) mod counts;
pub(crate) mod host;
pub(crate) mod journal;
pub(crate) mod layout;
pub(crate) mod map_page;
pub(crate) mod one_bit;
pub(crate) mod page;
pub(crate) mod record;
pub(crate) mod superblock;
