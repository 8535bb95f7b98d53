//! The kernels that the tests run on: which ones, and how they come to this machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::str::FromStr;

use anyhow::{Context, Result, anyhow, bail};

use super::apt::Apt;
use super::modules;
use crate::{command, paths};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// The newest cloud kernel of Debian's backports.
    New,
    /// The long-term series of Debian's stable release.
    LongTerm,
}

impl Kernel {
    pub const ALL: [Self; 2] = [Self::New, Self::LongTerm];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::LongTerm => "6.12",
        }
    }

    fn accepts(self, release: &Release) -> bool {
        match self {
            Self::New => true,
            Self::LongTerm => release.numbers[..2] == [6, 12],
        }
    }
}

impl FromStr for Kernel {
    type Err = anyhow::Error;

    fn from_str(name: &str) -> Result<Self> {
        let found = Self::ALL.into_iter().find(|kernel| kernel.name() == name);
        found.ok_or_else(|| anyhow!("no such kernel: there are \"new\" and \"6.12\""))
    }
}

/// A kernel on this machine, ready to boot.
#[derive(Debug)]
pub(super) struct Installed {
    /// As `uname -r` says it.
    pub(super) release: String,
    /// The compressed kernel.
    pub(super) image: PathBuf,
    /// The content of the guest's /lib/modules/RELEASE.
    pub(super) modules: PathBuf,
}

/// Finds the kernel in the cache, or fetches it.
pub(super) fn ensure(kernel: Kernel) -> Result<Installed> {
    let kernels = paths::guest_cache().join("kernels");
    let folder = kernels.join(kernel.name());
    let wanted = modules::WANTED.join(" ");
    let cached = fs::read_to_string(folder.join("wanted")).is_ok_and(|cached| cached == wanted);
    if !cached {
        // Built beside and then renamed: the folder is there only as a whole.
        let unfinished = kernels.join(format!("{}.new", kernel.name()));
        if unfinished.exists() {
            fs::remove_dir_all(&unfinished).context("cannot clear the kernel's folder")?;
        }
        fs::create_dir_all(&unfinished).context("cannot make the kernel's folder")?;
        fetch(kernel, &unfinished)
            .with_context(|| format!("cannot fetch kernel {}", kernel.name()))?;
        fs::write(unfinished.join("wanted"), wanted).context("cannot write the list of modules")?;
        if folder.exists() {
            fs::remove_dir_all(&folder).context("cannot remove the older kernel")?;
        }
        fs::rename(&unfinished, &folder).context("cannot name the kernel's folder")?;
    }
    let release =
        fs::read_to_string(folder.join("release")).context("cannot read the kernel's release")?;
    Ok(Installed {
        release: release.trim().to_owned(),
        image: folder.join("vmlinuz"),
        modules: folder.join("modules"),
    })
}

fn fetch(kernel: Kernel, folder: &Path) -> Result<()> {
    let apt = Apt::open(&paths::guest_cache().join("apt"))?;
    let names = apt.names("linux-")?;
    let newest = names
        .iter()
        .filter_map(|name| Release::of_image(name))
        .filter(|release| kernel.accepts(release))
        .max();
    let Some(release) = newest.map(|release| release.text) else {
        bail!("the mirror has no linux-image-*-cloud-amd64 of it");
    };
    // One package up to 7.0; later its parts are packages of their own.
    let parts = ["image", "binary", "modules"].map(|part| format!("linux-{part}-{release}"));
    let parts: Vec<_> = parts
        .into_iter()
        .filter(|part| names.contains(part))
        .collect();
    let unpacked = folder.join("unpacked");
    fs::create_dir_all(&unpacked).context("cannot make a folder")?;
    apt.download(&parts, folder)?;
    for file in fs::read_dir(folder).context("cannot list the downloads")? {
        let file = file.context("cannot list the downloads")?.path();
        if file.extension().is_some_and(|extension| extension == "deb") {
            command::run(Command::new("dpkg-deb").arg("-x").arg(&file).arg(&unpacked))?;
            fs::remove_file(&file).context("cannot remove a download")?;
        }
    }
    let tree = unpacked.join("usr/lib/modules").join(&release);
    let image = [
        unpacked.join("boot").join(format!("vmlinuz-{release}")),
        tree.join("vmlinuz"),
    ];
    let image = image
        .into_iter()
        .find(|path| path.exists())
        .context("the packages hold no vmlinuz")?;
    fs::copy(image, folder.join("vmlinuz")).context("cannot copy the kernel")?;
    modules::collect(&tree, &folder.join("modules"))?;
    fs::write(folder.join("release"), &release).context("cannot write the release")?;
    fs::remove_dir_all(&unpacked).context("cannot remove the unpacked packages")
}

/// A kernel release, ordered as versions are.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Release {
    numbers: [u32; 3],
    text: String,
}

impl Release {
    /// Reads `linux-image-7.3.4+deb13-cloud-amd64`; none for debug symbols, unsigned and other flavours.
    fn of_image(package: &str) -> Option<Self> {
        let text = package.strip_prefix("linux-image-")?;
        let version = text.strip_suffix("-cloud-amd64")?;
        let numbers: Vec<u32> = version
            .split(['+', '-'])
            .next()?
            .split('.')
            .map(|number| number.parse().ok())
            .collect::<Option<_>>()?;
        Some(Self {
            numbers: numbers.try_into().ok()?,
            text: text.to_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::{Kernel, Release};

    #[test]
    fn only_signed_cloud_images_count_and_they_are_ordered_by_number() {
        let names = [
            "linux-image-7.3.4+deb13-cloud-amd64-dbg",
            "linux-image-7.2.12+deb13-cloud-amd64",
            "linux-image-7.2.9+deb13-cloud-amd64",
            "linux-image-6.12.95+deb12-cloud-amd64-unsigned",
            "linux-image-6.12.117+deb13-cloud-amd64",
            "linux-image-cloud-amd64",
            "linux-image-7.9.9+deb13-amd64",
        ];
        let newest = |kernel: Kernel| {
            let releases = names.into_iter().filter_map(Release::of_image);
            releases
                .filter(|release| kernel.accepts(release))
                .max()
                .map(|release| release.text)
        };
        assert_eq!(
            newest(Kernel::New).as_deref(),
            Some("7.2.12+deb13-cloud-amd64")
        );
        assert_eq!(
            newest(Kernel::LongTerm).as_deref(),
            Some("6.12.117+deb13-cloud-amd64")
        );
    }
}
