//! The kernel modules that the guest may need, with the tables by which `modprobe` finds them.
//!
//! The guest loads what it uses: a file system when it is mounted, not at every boot.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

/// What is wanted; what these depend on comes along. Some are built into some kernels, or don't exist there.
pub(super) const WANTED: [&str; 17] = [
    "ublk_drv",
    "brd",
    "loop",
    "nbd",
    "null_blk",
    "virtio_blk",
    "ext4",
    "xfs",
    "btrfs",
    "blake2b_generic",
    "xxhash_generic",
    "dm_thin_pool",
    "dm_snapshot",
    "dm_log_writes",
    "dm_flakey",
    "dm_delay",
    "zram",
];

/// Unpacks the wanted modules of a kernel's tree into a folder that becomes the guest's /lib/modules/RELEASE.
pub(super) fn collect(tree: &Path, into: &Path) -> Result<()> {
    fs::create_dir_all(into).context("cannot make the modules' folder")?;
    let mut packed = BTreeMap::new();
    find(&tree.join("kernel"), &mut packed)?;
    let mut wanted: Vec<String> = WANTED.map(str::to_owned).into();
    let mut seen = BTreeSet::new();
    let (mut dependencies, mut aliases) = (String::new(), String::new());
    let mut direct = BTreeMap::new();
    while let Some(name) = wanted.pop() {
        if !seen.insert(name.clone()) {
            continue;
        }
        let Some(file) = packed.get(&name) else {
            continue;
        };
        let content = unpack(file)?;
        let info = Information::read(&content);
        for alias in &info.aliases {
            writeln!(aliases, "alias {alias} {name}")?;
        }
        wanted.extend(info.depends.iter().cloned());
        direct.insert(name.clone(), info.depends);
        fs::write(into.join(format!("{name}.ko")), content).context("cannot write a module")?;
    }
    if !direct.contains_key("ublk_drv") {
        bail!("this kernel has no ublk_drv");
    }
    for name in direct.keys() {
        let files: Vec<_> = closure(name, &direct)
            .into_iter()
            .map(|name| format!("{name}.ko"))
            .collect();
        writeln!(dependencies, "{name}.ko: {}", files.join(" "))?;
    }
    fs::write(into.join("modules.dep"), dependencies).context("cannot write modules.dep")?;
    fs::write(into.join("modules.alias"), aliases).context("cannot write modules.alias")?;
    Ok(())
}

/// All that must be loaded before a module, the last one first, as modules.dep has it.
fn closure(name: &str, direct: &BTreeMap<String, Vec<String>>) -> Vec<String> {
    let mut found = Vec::new();
    for next in direct
        .get(name)
        .into_iter()
        .flatten()
        .filter(|next| direct.contains_key(*next))
    {
        for module in std::iter::once(next.clone()).chain(closure(next, direct)) {
            found.retain(|known| *known != module);
            found.push(module);
        }
    }
    found
}

/// All packed modules below a folder, by the name that the kernel gives them.
fn find(folder: &Path, found: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in
        fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?
    {
        let path = entry.context("cannot list the modules")?.path();
        if path.is_dir() {
            find(&path, found)?;
        } else if let Some(name) = path
            .file_name()
            .and_then(|name| name.to_str()?.split_once(".ko"))
        {
            found.insert(name.0.replace('-', "_"), path.clone());
        }
    }
    Ok(())
}

fn unpack(file: &Path) -> Result<Vec<u8>> {
    let program = match file.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return fs::read(file).with_context(|| format!("cannot read {}", file.display())),
    };
    let output = Command::new(program).arg("-dc").arg(file).output();
    let output = output.with_context(|| format!("cannot start {program}"))?;
    if !output.status.success() {
        bail!("{program} cannot unpack {}", file.display());
    }
    Ok(output.stdout)
}

/// The parts of a module's own description that the tables need.
#[derive(Debug, Default)]
struct Information {
    depends: Vec<String>,
    aliases: Vec<String>,
}

impl Information {
    fn read(module: &[u8]) -> Self {
        let mut information = Self::default();
        // The section .modinfo is a run of NUL-terminated KEY=VALUE; nothing else in a module looks like these two.
        for text in module.split(|byte| *byte == 0) {
            if let Some(names) = text.strip_prefix(b"depends=") {
                let names = String::from_utf8_lossy(names).replace('-', "_");
                information.depends = names
                    .split(',')
                    .filter(|name| !name.is_empty())
                    .map(str::to_owned)
                    .collect();
            } else if let Some(alias) = text.strip_prefix(b"alias=") {
                information
                    .aliases
                    .push(String::from_utf8_lossy(alias).into_owned());
            }
        }
        information
    }
}
