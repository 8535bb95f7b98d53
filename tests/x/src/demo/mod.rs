//! `x demo`: the main job on real data, on this kernel where that is possible, otherwise in the guest.

mod session;
mod steps;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;
use std::{env, fs};

use anyhow::{Context, Result};

use crate::{command, guest, paths, setup};

/// A pool of 512 MiB and the files around it fit into the guest's RAM disk.
const IN_GUEST: &str = "mkfs.ext4 -q -m 0 /dev/ram0 && mount /dev/ram0 /srv && \
                        x demo --here --folder /srv --files /root/files.tar";
const LIMIT: Duration = Duration::from_secs(15 * 60);

/// How much of this machine's file system goes through the demo.
const FILES_MAX: usize = 1200;
const BYTES_MAX: u64 = 24 << 20;

/// Where the demo works and with which files.
#[derive(Debug, clap::Args)]
pub struct Options {
    /// On this kernel, with the ublkctl in PATH, whatever is missing
    #[arg(long)]
    here: bool,
    /// In the guest, even if this kernel has ublk
    #[arg(long, conflicts_with = "here")]
    guest: bool,
    /// The guest's kernel: "new" or "6.12"
    #[arg(long, default_value = "new")]
    kernel: guest::Kernel,
    /// Work in a new folder below this one
    #[arg(long, value_name = "FOLDER")]
    folder: Option<PathBuf>,
    /// Unpack this tar archive instead of some of this machine's own files
    #[arg(long, value_name = "FILE")]
    files: Option<PathBuf>,
}

/// Runs the demo; its last line says whether all of it held.
pub fn run(options: &Options) -> Result<ExitCode> {
    if options.here {
        return here(options);
    }
    setup::install_missing()?;
    let ublkctl = command::build_ublkctl()?;
    if !options.guest && setup::is_root() && has_ublk() {
        add_to_path(ublkctl.parent().unwrap_or(Path::new("/")))?;
        return here(options);
    }
    eprintln!("x: this machine's kernel has no ublk, or we are not root: the demo runs in a guest");
    let archive = paths::guest_cache().join("files.tar");
    fs::create_dir_all(paths::guest_cache()).context("cannot make the guest's folder")?;
    match &options.files {
        Some(file) => drop(
            fs::copy(file, &archive).with_context(|| format!("cannot copy {}", file.display()))?,
        ),
        None => pack_files(&archive)?,
    }
    let mut job = guest::Job::new(options.kernel, IN_GUEST, LIMIT);
    job.add_program(&ublkctl, "ublkctl");
    job.add_to_root(&archive)?;
    Ok(ExitCode::from(job.run()?.status))
}

fn here(options: &Options) -> Result<ExitCode> {
    let base = options.folder.clone().unwrap_or_else(env::temp_dir);
    let folder = base.join(format!("blockfork-demo-{}", std::process::id()));
    fs::create_dir_all(&folder).with_context(|| format!("cannot make {}", folder.display()))?;
    let mut session = session::Session::new(&folder)?;
    let archive = session.folder().join("files.tar");
    match &options.files {
        Some(file) => drop(
            fs::copy(file, &archive).with_context(|| format!("cannot copy {}", file.display()))?,
        ),
        None => pack_files(&archive)?,
    }
    let result = steps::all(&mut session);
    session.clean_up();
    match result {
        Ok(()) => println!("\ndemo: all of it held ({} checks)", session.held()),
        Err(error) => {
            println!(
                "\ndemo: FAILED after {} checks that held: {error:#}",
                session.held()
            );
            return Ok(ExitCode::FAILURE);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// Whether this kernel offers ublk, after trying to load it.
pub fn has_ublk() -> bool {
    let control = Path::new("/dev/ublk-control");
    if !control.exists() {
        // Success shows in the file.
        drop(
            Command::new("modprobe")
                .arg("ublk_drv")
                .stdin(Stdio::null())
                .stderr(Stdio::null())
                .status(),
        );
    }
    control.exists()
}

fn add_to_path(folder: &Path) -> Result<()> {
    let old = env::var_os("PATH").unwrap_or_default();
    let path = env::join_paths(std::iter::once(folder.to_owned()).chain(env::split_paths(&old)))?;
    session::set_path(path);
    Ok(())
}

/// Packs real files, of all sizes and in real folders, into an archive.
fn pack_files(archive: &Path) -> Result<()> {
    let mut packed = Vec::new();
    let mut bytes = 0;
    for folder in [
        "/usr/share/common-licenses",
        "/usr/include",
        "/usr/lib/gcc",
        "/usr/share/doc",
    ] {
        collect(Path::new(folder), &mut packed, &mut bytes);
    }
    let list = archive.with_extension("list");
    fs::write(&list, packed.join("\n")).context("cannot write the list of files")?;
    let mut tar = Command::new("tar");
    tar.args(["--no-recursion", "-C", "/", "-cf"])
        .arg(archive)
        .arg("-T")
        .arg(&list);
    command::run(&mut tar)?;
    fs::remove_file(&list).context("cannot remove the list of files")
}

fn collect(folder: &Path, packed: &mut Vec<String>, bytes: &mut u64) {
    let Ok(entries) = fs::read_dir(folder) else {
        return;
    };
    let mut entries: Vec<_> = entries.filter_map(|entry| entry.ok()).collect();
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let Ok(metadata) = entry.path().symlink_metadata() else {
            continue;
        };
        if metadata.is_dir() {
            collect(&entry.path(), packed, bytes);
        } else if metadata.is_file()
            && metadata.len() < BYTES_MAX / 4
            && *bytes + metadata.len() < BYTES_MAX
            && packed.len() < FILES_MAX
            && let Some(path) = entry.path().to_str()
        {
            *bytes += metadata.len();
            packed.push(path.trim_start_matches('/').to_owned());
        }
    }
}
