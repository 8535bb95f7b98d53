//! A private apt: other suites of this machine's own mirror, none of its state.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::command;

/// Used where this machine's configuration names no mirror.
const PUBLIC_MIRROR: &str = "http://deb.debian.org";
const KEYRINGS: [&str; 2] = [
    "/usr/share/keyrings/debian-archive-keyring.gpg",
    "/usr/share/keyrings/debian-archive-keyring.pgp",
];

#[derive(Debug)]
pub(super) struct Apt {
    folder: PathBuf,
}

impl Apt {
    /// Reads the package lists of the suites that have kernels into `folder`.
    pub(super) fn open(folder: &Path) -> Result<Self> {
        let suites = [
            ("debian", "trixie-backports"),
            ("debian-security", "trixie-security"),
            ("debian-security", "bookworm-security"),
        ];
        Self::with(
            folder,
            &suites.map(|(archive, suite)| (archive, suite.to_owned())),
        )
    }

    /// Reads the package lists of one release into `folder`.
    pub(super) fn of_release(folder: &Path, release: &str) -> Result<Self> {
        let security = format!("{release}-security");
        Self::with(
            folder,
            &[
                ("debian", release.to_owned()),
                ("debian-security", security),
            ],
        )
    }

    fn with(folder: &Path, suites: &[(&str, String)]) -> Result<Self> {
        for part in ["state/lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(folder.join(part))
                .with_context(|| format!("cannot make {}", folder.display()))?;
        }
        fs::write(folder.join("status"), "").context("cannot write apt's status file")?;
        fs::write(folder.join("sources.list"), sources(suites))
            .context("cannot write apt's sources.list")?;
        let apt = Self {
            folder: folder.to_owned(),
        };
        // One suite that is gone must not stop the others: what is missing shows when a package is looked up.
        if let Err(error) = command::run(
            apt.command("apt-get")
                .args(["-q", "update"])
                .stdout(std::io::stderr()),
        ) {
            eprintln!("x: {error:#}; going on with what there is");
        }
        Ok(apt)
    }

    /// The names of all packages that begin so.
    pub(super) fn names(&self, prefix: &str) -> Result<Vec<String>> {
        let names = command::output(self.command("apt-cache").args(["pkgnames", prefix]))?;
        Ok(names.lines().map(str::to_owned).collect())
    }

    /// Downloads packages, checked against the signed lists, into a folder.
    pub(super) fn download(&self, packages: &[String], into: &Path) -> Result<()> {
        eprintln!("x: downloading {}", packages.join(" "));
        let mut download = self.command("apt-get");
        download
            .args(["-q", "download"])
            .args(packages)
            .current_dir(into)
            .stdout(std::io::stderr());
        command::run(&mut download)
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let paths = [
            ("Dir::State", "state"),
            ("Dir::State::status", "status"),
            ("Dir::Cache", "cache"),
            ("Dir::Etc::sourcelist", "sources.list"),
        ];
        for (option, path) in paths {
            command
                .arg("-o")
                .arg(format!("{option}={}", self.folder.join(path).display()));
        }
        for option in [
            "Dir::Etc::sourceparts=/dev/null",
            "APT::Architecture=amd64",
            "APT::Architectures=amd64",
            "APT::Sandbox::User=root",
            "Acquire::Languages=none",
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false",
        ] {
            command.args(["-o", option]);
        }
        command
    }
}

fn sources(suites: &[(&str, String)]) -> String {
    let keyring = KEYRINGS.into_iter().find(|path| Path::new(path).exists());
    let signed_by = keyring
        .map(|path| format!("[signed-by={path}] "))
        .unwrap_or_default();
    let line = |(archive, suite): &(&str, String)| {
        format!("deb {signed_by}{} {suite} main\n", mirror(archive))
    };
    suites.iter().map(line).collect()
}

/// The address under which this machine finds an archive of this name.
fn mirror(name: &str) -> String {
    // Lines like: 'http://host/debian/dists/trixie/InRelease' host_debian_dists_trixie_InRelease 0
    let listed = command::output(Command::new("apt-get").args(["update", "--print-uris"]))
        .unwrap_or_default();
    listed
        .lines()
        .filter_map(|line| Some(line.trim_start_matches('\'').split_once("/dists/")?.0))
        .find(|base| base.rsplit('/').next() == Some(name))
        .map_or_else(|| format!("{PUBLIC_MIRROR}/{name}"), str::to_owned)
}
