//! The machine that has a pool open, as its superblock and its claim name it.

use super::bytes::{Reader, Writer};
use crate::error::{Error, Result};
use std::fmt;

/// Bytes in the longest host name that Linux knows.
const NAME_BYTES_MAX: usize = 64;
/// Bytes that a host takes on disk.
pub(crate) const HOST_BYTES: usize = 16 + 16 + 1 + NAME_BYTES_MAX;

/// A machine, and one boot of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// What tells this machine from every other; zeros if that is not known.
    pub id: [u8; 16],
    /// Which boot of its kernel; zeros if that is not known.
    pub boot_id: [u8; 16],
    /// Its name, for messages.
    pub name: HostName,
}

/// The name of a machine: printable ASCII without spaces, so that it can stand in a message as it is. May be empty.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostName(String);

impl HostName {
    /// The name that a machine has given itself. Characters that no host name should have become `?`.
    pub fn new(name: &str) -> Self {
        let printable = |c: char| if c.is_ascii_graphic() { c } else { '?' };
        Self(name.chars().take(NAME_BYTES_MAX).map(printable).collect())
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() {
            "(without a name)"
        } else {
            &self.0
        })
    }
}

impl Host {
    pub(crate) fn encode(&self, writer: &mut Writer<'_>) {
        let mut name = [0; NAME_BYTES_MAX];
        let bytes = self.name.0.as_bytes();
        if let Some(place) = name.get_mut(..bytes.len()) {
            place.copy_from_slice(bytes);
        }
        writer.bytes(&self.id);
        writer.bytes(&self.boot_id);
        writer.u8(u8::try_from(bytes.len()).unwrap_or(u8::MAX));
        writer.bytes(&name);
    }

    pub(crate) fn decode(reader: &mut Reader<'_>) -> Result<Self> {
        let (id, boot_id) = (reader.array()?, reader.array()?);
        let length = usize::from(reader.u8()?);
        let name = reader.array::<NAME_BYTES_MAX>()?;
        let name = name
            .get(..length)
            .and_then(|bytes| std::str::from_utf8(bytes).ok())
            .filter(|name| name.bytes().all(|byte| byte.is_ascii_graphic()))
            .ok_or_else(|| Error::corrupt("the name of a host that cannot be"))?;
        Ok(Self {
            id,
            boot_id,
            name: HostName(name.to_owned()),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(id: u8, boot: u8) -> Host {
        Host {
            id: [id; 16],
            boot_id: [boot; 16],
            name: HostName::new("web1"),
        }
    }

    #[test]
    fn a_host_round_trips_and_hostile_names_are_refused() {
        let mut longest = host(1, 2);
        longest.name = HostName::new(&"x".repeat(80));
        for host in [Host::default(), host(1, 2), longest] {
            let mut bytes = [0; HOST_BYTES];
            host.encode(&mut Writer::new(&mut bytes));
            assert_eq!(Host::decode(&mut Reader::new(&bytes)).unwrap(), host);
        }
        let mut bytes = [0; HOST_BYTES];
        host(1, 2).encode(&mut Writer::new(&mut bytes));
        for (at, byte) in [(32, 65), (33, 0x1b), (34, b' '), (35, 0xff)] {
            let mut hostile = bytes;
            hostile[at] = byte;
            assert!(Host::decode(&mut Reader::new(&hostile)).is_err());
        }
        assert_eq!(HostName::new("a\x1b[2Jb").to_string(), "a?[2Jb");
    }
}
