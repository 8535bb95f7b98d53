//! What a file or device holds already, by the magic numbers that its owner left.
//!
//! Offsets are in bytes, from the start or back from the end. `create` refuses whatever is found here; `--force`
//! wipes the blocks that were found, so that no other tool takes the pool for what was there before.
//! The list is short on purpose: partition tables, file systems, volume managers, encryption, RAID, swap, disk images.

use blockfork::units::BLOCK_BYTES;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

/// Something recognised.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    /// Its name for people.
    pub(crate) name: &'static str,
    /// Where its magic number stands.
    pub(crate) offset: u64,
}

/// A magic number at a fixed place from the start.
struct Magic(&'static str, u64, &'static [u8]);

/// Order matters only where one holds another: a FAT or NTFS boot sector also ends like an MBR.
const MAGICS: &[Magic] = &[
    Magic("a blockfork pool", 0, b"BLKFORK\0"),
    Magic("a blockfork pool", 32_768, b"BLKFORK\0"),
    Magic("a GPT partition table", 512, b"EFI PART"),
    Magic("a GPT partition table", 4096, b"EFI PART"),
    Magic("an ext2/3/4 file system", 1080, &[0x53, 0xef]),
    Magic("an XFS file system", 0, b"XFSB"),
    Magic("a btrfs file system", 65_536 + 64, b"_BHRfS_M"),
    Magic("a bcachefs file system", 4096 + 24, BCACHEFS),
    Magic("a bcache device", 4096 + 24, BCACHE),
    Magic("an F2FS file system", 1024, &[0x10, 0x20, 0xf5, 0xf2]),
    Magic("an EROFS image", 1024, &[0xe2, 0xe1, 0xf5, 0xe0]),
    Magic("a squashfs image", 0, b"hsqs"),
    Magic("an NTFS file system", 3, b"NTFS    "),
    Magic("an exFAT file system", 3, b"EXFAT   "),
    Magic("a FAT file system", 54, b"FAT1"),
    Magic("a FAT file system", 82, b"FAT32"),
    Magic("a reiserfs file system", 65_536 + 52, b"ReIsEr"),
    Magic("a JFS file system", 32_768, b"JFS1"),
    Magic("an HFS+ file system", 1024, b"H+\0"),
    Magic("an APFS container", 32, b"NXSB"),
    Magic("an ISO 9660 image", 32_769, b"CD001"),
    Magic("a UDF file system", 32_769, b"BEA01"),
    Magic("LUKS encryption", 0, b"LUKS\xba\xbe"),
    Magic("LUKS encryption", 16_384, b"SKUL\xba\xbe"),
    Magic("a Linux RAID member", 0, MD_RAID),
    Magic("a Linux RAID member", 4096, MD_RAID),
    Magic("a VDO volume", 0, b"dmvdo001"),
    Magic("a Stratis pool", 512 + 4, b"!Stra0tis"),
    Magic("a Stratis pool", 4608 + 4, b"!Stra0tis"),
    Magic("swap space", 4096 - 10, b"SWAPSPACE2"),
    Magic("swap space", 8192 - 10, b"SWAPSPACE2"),
    Magic("swap space", 16_384 - 10, b"SWAPSPACE2"),
    Magic("swap space", 65_536 - 10, b"SWAPSPACE2"),
    Magic("swap space", 4096 - 10, b"SWAP-SPACE"),
    Magic("a hibernation image", 4096 - 10, b"S1SUSPEND"),
    Magic("a qcow image", 0, b"QFI\xfb"),
    Magic("a VMDK image", 0, b"KDMV"),
    Magic("a VHDX image", 0, b"vhdxfile"),
    Magic("a VDI image", 64, &[0x7f, 0x10, 0xda, 0xbe]),
    Magic("a gzip archive", 0, &[0x1f, 0x8b, 0x08]),
    Magic("an xz archive", 0, b"\xfd7zXZ\0"),
    Magic("a zstd archive", 0, &[0x28, 0xb5, 0x2f, 0xfd]),
    Magic("a tar archive", 257, b"ustar"),
    Magic("a zip archive", 0, b"PK\x03\x04"),
    Magic("a program", 0, b"\x7fELF"),
    Magic(
        "an MBR partition table or a boot sector",
        510,
        &[0x55, 0xaa],
    ),
];

const BCACHEFS: &[u8] = b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef";
const BCACHE: &[u8] = b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81";
/// `MD_SB_MAGIC`, little endian.
const MD_RAID: &[u8] = &[0xfc, 0x4e, 0x2b, 0xa9];
/// `UBERBLOCK_MAGIC` of ZFS in both byte orders.
const ZFS: [&[u8]; 2] = [
    &[0x0c, 0xb1, 0xba, 0, 0, 0, 0, 0],
    &[0, 0, 0, 0, 0, 0xba, 0xb1, 0x0c],
];

/// Bytes read from the start and from the end: the farthest magic (ZFS's second label) stands within.
const HEAD_BYTES: u64 = 512 << 10;
/// A ZFS label, of which there are two at each end.
const ZFS_LABEL_BYTES: u64 = 256 << 10;

/// A stretch of the file in memory.
struct Window {
    start: u64,
    bytes: Vec<u8>,
}

impl Window {
    fn read(file: &impl FileExt, start: u64, end: u64) -> io::Result<Self> {
        let length = usize::try_from(end.saturating_sub(start)).map_err(io::Error::other)?;
        let mut bytes = vec![0; length];
        file.read_exact_at(&mut bytes, start)?;
        Ok(Self { start, bytes })
    }

    fn holds(&self, offset: u64, magic: &[u8]) -> bool {
        let Some(from) = offset
            .checked_sub(self.start)
            .and_then(|from| usize::try_from(from).ok())
        else {
            return false;
        };
        self.bytes
            .get(from..)
            .is_some_and(|rest| rest.starts_with(magic))
    }
}

/// Everything recognised in the `bytes` of `file`.
pub(crate) fn probe(file: &impl FileExt, bytes: u64) -> io::Result<Vec<Found>> {
    let head = Window::read(file, 0, bytes.min(HEAD_BYTES))?;
    let tail = Window::read(
        file,
        bytes.saturating_sub(HEAD_BYTES + ZFS_LABEL_BYTES),
        bytes,
    )?;
    let mut found = Vec::new();
    let mut note = |name, offset| found.push(Found { name, offset });
    for Magic(name, offset, magic) in MAGICS {
        if head.holds(*offset, magic) {
            note(*name, *offset);
        }
    }
    for sector in 0..4 {
        if head.holds(sector * 512, b"LABELONE") {
            note("an LVM physical volume", sector * 512);
        }
    }
    for sector_bytes in [512, 4096] {
        if bytes >= sector_bytes && tail.holds(bytes - sector_bytes, b"EFI PART") {
            note("a GPT partition table (its backup)", bytes - sector_bytes);
        }
    }
    // md 1.0 stands 8 KiB before the end, down to a multiple of 4 KiB; md 0.90 in the last whole 64 KiB but one.
    for (back, multiple) in [(8 << 10, 4 << 10), (64 << 10, 64 << 10)] {
        if let Some(place) = (bytes & !511)
            .checked_sub(back)
            .map(|place| place - place % multiple)
            && tail.holds(place, MD_RAID)
        {
            note("a Linux RAID member", place);
        }
    }
    let zfs_end = bytes - bytes % ZFS_LABEL_BYTES;
    for label in [0, ZFS_LABEL_BYTES].into_iter().chain(
        [2, 1]
            .into_iter()
            .filter_map(|back| zfs_end.checked_sub(back * ZFS_LABEL_BYTES)),
    ) {
        // The second half of a label is its array of uberblocks, at least 1 KiB each.
        let places = (ZFS_LABEL_BYTES / 2..ZFS_LABEL_BYTES)
            .step_by(1024)
            .map(|place| label + place);
        for place in places {
            if ZFS
                .iter()
                .any(|magic| head.holds(place, magic) || tail.holds(place, magic))
            {
                note("a ZFS pool member", place);
            }
        }
    }
    Ok(found)
}

/// Whether the start of `file` holds anything but zeros: data of a kind that [`probe`] does not know.
pub(crate) fn has_data(file: &impl FileExt, bytes: u64) -> io::Result<bool> {
    let head = Window::read(file, 0, bytes.min(HEAD_BYTES))?;
    Ok(head.bytes.iter().any(|&byte| byte != 0))
}

/// Overwrites the blocks in which something was found, durably.
pub(crate) fn wipe(file: &File, bytes: u64, found: &[Found]) -> io::Result<()> {
    overwrite(file, bytes, found)?;
    file.sync_all()
}

pub(crate) fn overwrite(file: &impl FileExt, bytes: u64, found: &[Found]) -> io::Result<()> {
    for Found { offset, .. } in found {
        let start = offset - offset % BLOCK_BYTES;
        let end = (start + BLOCK_BYTES).min(bytes);
        let zeros = vec![0; usize::try_from(end - start).map_err(io::Error::other)?];
        file.write_all_at(&zeros, start)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const BYTES: u64 = 16 << 20;

    fn image(writes: &[(u64, &[u8])]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(BYTES).unwrap();
        for (offset, bytes) in writes {
            file.write_all_at(bytes, *offset).unwrap();
        }
        file
    }

    fn names(writes: &[(u64, &[u8])]) -> Vec<&'static str> {
        probe(&image(writes), BYTES)
            .unwrap()
            .into_iter()
            .map(|found| found.name)
            .collect()
    }

    #[test]
    fn zeros_hold_nothing() {
        assert!(names(&[]).is_empty());
        assert!(!has_data(&image(&[]), BYTES).unwrap());
    }

    #[test]
    fn each_magic_is_found_at_its_place() {
        for Magic(name, offset, magic) in MAGICS {
            assert!(names(&[(*offset, magic)]).contains(name), "{name}");
        }
    }

    #[test]
    fn what_stands_at_the_end_is_found() {
        assert_eq!(
            names(&[(BYTES - 512, b"EFI PART")]),
            ["a GPT partition table (its backup)"]
        );
        assert_eq!(names(&[(BYTES - 8192, MD_RAID)]), ["a Linux RAID member"]);
        assert_eq!(names(&[(BYTES - 65_536, MD_RAID)]), ["a Linux RAID member"]);
        assert_eq!(
            names(&[(BYTES - (128 << 10), ZFS[0])]),
            ["a ZFS pool member"]
        );
        assert_eq!(
            names(&[((128 << 10) + 4096, ZFS[1])]),
            ["a ZFS pool member"]
        );
        assert_eq!(names(&[(512, b"LABELONE")]), ["an LVM physical volume"]);
    }

    #[test]
    fn a_wiped_image_is_empty() {
        let file = image(&[(1080, &[0x53, 0xef]), (BYTES - 512, b"EFI PART")]);
        let found = probe(&file, BYTES).unwrap();
        assert_eq!(found.len(), 2);
        wipe(&file, BYTES, &found).unwrap();
        assert!(probe(&file, BYTES).unwrap().is_empty());
    }

    #[test]
    fn short_files_are_read_to_their_end() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(b"hello", 0).unwrap();
        assert!(probe(&file, 5).unwrap().is_empty());
        assert!(has_data(&file, 5).unwrap());
        assert!(probe(&file, 0).unwrap().is_empty());
    }
}
