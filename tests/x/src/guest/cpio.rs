//! Writes the archive that the kernel unpacks into its first file system (cpio, format "newc").

use std::collections::BTreeSet;
use std::io::{Result, Write};

#[derive(Debug)]
pub(super) struct Archive<W> {
    out: W,
    written: u64,
    inode: u32,
    folders: BTreeSet<String>,
}

const FOLDER: u32 = 0o040_755;
const FILE: u32 = 0o100_755;
const LINK: u32 = 0o120_777;

impl<W: Write> Archive<W> {
    pub(super) fn new(out: W) -> Self {
        Self {
            out,
            written: 0,
            inode: 0,
            folders: BTreeSet::new(),
        }
    }

    /// Adds a folder, and those above it, once.
    pub(super) fn folder(&mut self, path: &str) -> Result<()> {
        let path = path.trim_matches('/');
        if path.is_empty() || self.folders.contains(path) {
            return Ok(());
        }
        self.parents(path)?;
        self.folders.insert(path.to_owned());
        self.entry(path, FOLDER, &[])
    }

    /// Adds a file that everybody may run.
    pub(super) fn file(&mut self, path: &str, content: &[u8]) -> Result<()> {
        self.parents(path)?;
        self.entry(path, FILE, content)
    }

    /// Adds a symbolic link.
    pub(super) fn link(&mut self, path: &str, target: &str) -> Result<()> {
        self.parents(path)?;
        self.entry(path, LINK, target.as_bytes())
    }

    pub(super) fn finish(mut self) -> Result<W> {
        self.entry("TRAILER!!!", 0, &[])?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn parents(&mut self, path: &str) -> Result<()> {
        match path.trim_matches('/').rsplit_once('/') {
            Some((parent, _)) => self.folder(parent),
            None => Ok(()),
        }
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) -> Result<()> {
        let path = path.trim_matches('/');
        self.inode += 1;
        let name_bytes = path.len() + 1;
        let (inode, content_bytes) = (self.inode, content.len());
        // Magic, inode, mode, uid, gid, links, mtime, file size, device x2, special device x2, name size, check.
        let header = format!(
            "070701{inode:08x}{mode:08x}{z}{z}{one}{z}{content_bytes:08x}{z}{z}{z}{z}{name_bytes:08x}{z}",
            z = "00000000",
            one = "00000001"
        );
        self.put(header.as_bytes())?;
        self.put(path.as_bytes())?;
        self.put(&[0])?;
        self.align()?;
        self.put(content)?;
        self.align()
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.written += bytes.len() as u64;
        self.out.write_all(bytes)
    }

    fn align(&mut self) -> Result<()> {
        while !self.written.is_multiple_of(4) {
            self.put(&[0])?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Archive;

    #[test]
    fn an_archive_is_aligned_and_names_every_folder_once() {
        let mut archive = Archive::new(Vec::new());
        archive.file("/a/b/c", b"12345").unwrap();
        archive.link("/a/b/d", "c").unwrap();
        let bytes = archive.finish().unwrap();
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        assert_eq!(
            text.matches("070701").count(),
            5,
            "a, a/b, c, d and the trailer"
        );
    }
}
