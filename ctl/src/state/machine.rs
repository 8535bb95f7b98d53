//! What the kernel tells about this machine: which boot it is, and how much memory there is.

use blockfork::error::{Error, ErrorKind, Result};
use blockfork::limits::METADATA_CACHE_BYTES_DEFAULT;
use std::fs;

/// The kernel's boot id: what belongs to another boot is stale.
pub(crate) fn boot_id() -> Result<[u8; 16]> {
    const PATH: &str = "/proc/sys/kernel/random/boot_id";
    let text =
        fs::read_to_string(PATH).map_err(|e| Error::io(e, format!("{PATH}: cannot be read")))?;
    let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
    match u128::from_str_radix(&digits, 16) {
        Ok(id) if digits.len() == 32 => Ok(in_written_order(id)),
        _ => Err(Error::with(
            ErrorKind::Unsupported,
            format!("{PATH}: not a boot id"),
        )),
    }
}

/// Memory for a pool's metadata unless somebody says how much, in bytes: an eighth of the machine's.
pub(crate) fn metadata_cache() -> u64 {
    let told = fs::read_to_string("/proc/meminfo").ok();
    let total = told.as_deref().and_then(memory_bytes);
    total.map_or(METADATA_CACHE_BYTES_DEFAULT, |bytes| bytes / 8)
}

/// The machine's memory, as `/proc/meminfo` tells it.
fn memory_bytes(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// A UUID's bytes in the order in which it is written.
fn in_written_order(id: u128) -> [u8; 16] {
    let mut bytes = id.to_le_bytes();
    bytes.reverse();
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_tells_its_memory() {
        let text = "MemTotal:       16384 kB\nMemFree:         1 kB\n";
        assert_eq!(memory_bytes(text), Some(16 << 20));
        for text in [
            "",
            "MemTotal: 1 GB",
            "MemTotal: kB",
            "MemTotal: 18446744073709551615 kB",
        ] {
            assert_eq!(memory_bytes(text), None, "{text}");
        }
        assert!(metadata_cache() > 0);
    }

    #[test]
    fn the_boot_id_has_sixteen_bytes_in_written_order() {
        let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
        let first = u8::from_str_radix(&text[..2], 16).unwrap();
        assert_eq!(boot_id().unwrap()[0], first);
    }
}
