//! Whether an open pool file is still where it was opened: somebody may delete, move or replace it while it is served.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Where an open pool file or block device is, compared with the path at which it was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// Where it was.
    Kept,
    /// The file has no name any more: it is gone when it is closed.
    Deleted,
    /// The file has another name, this one as far as the kernel knows it.
    Moved(PathBuf),
    /// The machine has no such block device any more.
    Removed,
    /// The block device is there, but its node is not at the path.
    Renamed,
}

/// What is the same for two paths to one file, or to one device.
fn identity(metadata: &Metadata) -> (u64, u64) {
    if metadata.file_type().is_block_device() {
        return (metadata.rdev(), 0);
    }
    (metadata.dev(), metadata.ino())
}

/// Where `file`, which was opened at `path`, is now. An error says that it cannot be seen.
pub(super) fn find(file: &File, path: &Path) -> io::Result<Place> {
    let open = file.metadata()?;
    match fs::metadata(path) {
        Ok(found) => {
            let is_same = found.file_type().is_block_device() == open.file_type().is_block_device()
                && identity(&found) == identity(&open);
            if is_same && (open.nlink() > 0 || open.file_type().is_block_device()) {
                return Ok(Place::Kept);
            }
        }
        Err(e) if is_absent(&e) => {}
        Err(e) => return Err(e),
    }
    if open.file_type().is_block_device() {
        let (major, minor) = (libc::major(open.rdev()), libc::minor(open.rdev()));
        let is_there = Path::new("/sys/dev/block")
            .join(format!("{major}:{minor}"))
            .exists();
        return Ok(if is_there {
            Place::Renamed
        } else {
            Place::Removed
        });
    }
    if open.nlink() == 0 {
        return Ok(Place::Deleted);
    }
    fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).map(Place::Moved)
}

fn is_absent(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_kept_moved_or_deleted() {
        let folder = std::env::temp_dir().join(format!("blockfork-place-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let (path, other) = (folder.join("pool"), folder.join("other"));
        fs::write(&path, "pool").unwrap();
        let file = File::open(&path).unwrap();
        assert_eq!(find(&file, &path).unwrap(), Place::Kept);
        fs::rename(&path, &other).unwrap();
        assert_eq!(find(&file, &path).unwrap(), Place::Moved(other.clone()));
        // Something else in its place makes no difference.
        fs::write(&path, "another").unwrap();
        assert_eq!(find(&file, &path).unwrap(), Place::Moved(other.clone()));
        fs::rename(&other, &path).unwrap();
        assert_eq!(find(&file, &path).unwrap(), Place::Kept);
        fs::hard_link(&path, &other).unwrap();
        fs::remove_file(&path).unwrap();
        fs::remove_file(&other).unwrap();
        assert_eq!(find(&file, &path).unwrap(), Place::Deleted);
        fs::write(&path, "another").unwrap();
        assert_eq!(find(&file, &path).unwrap(), Place::Deleted);
        fs::remove_dir_all(&folder).unwrap();
        assert_eq!(find(&file, &path).unwrap(), Place::Deleted);
    }
}
