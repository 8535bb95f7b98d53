//! The project's own virtual machine: a stock Debian kernel, a file system in memory, one command.

mod accel;
mod apt;
mod cpio;
mod initramfs;
mod kernel;
mod modules;
mod qemu;
mod udev;

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

pub use kernel::Kernel;
pub use qemu::{Go, MEMORY_GIB, Outcome};

/// One boot: the kernel, what lies in the guest's file system, and the command.
#[derive(Debug)]
pub struct Job {
    kernel: Kernel,
    /// A script for the guest's `sh`.
    script: String,
    /// After this time the guest is killed and the job has failed.
    limit: Duration,
    /// Time follows the instructions that ran: what the guest measures repeats on a busy machine.
    pub instruction_clock: bool,
    /// Processors of the guest.
    pub processors: u8,
    /// Image files, or what else qemu takes for one, attached as /dev/vda and so on.
    pub disks: Vec<PathBuf>,
    /// Programs and files to put into the guest: from here, to there.
    files: Vec<(PathBuf, String)>,
    /// Folders to put into the guest, with all that is in them: from here, to there.
    trees: Vec<(PathBuf, String)>,
    /// Don't relay the guest's output.
    pub silent: bool,
}

impl Job {
    /// A boot of this kernel that runs a shell script.
    pub fn new(kernel: Kernel, script: &str, limit: Duration) -> Self {
        Self {
            kernel,
            script: script.to_owned(),
            limit,
            instruction_clock: false,
            processors: 2,
            disks: Vec::new(),
            files: Vec::new(),
            trees: Vec::new(),
            silent: false,
        }
    }

    /// Puts a program into the guest's search path, together with the libraries that it needs.
    pub fn add_program(&mut self, program: &Path, name: &str) {
        self.files
            .push((program.to_owned(), format!("/usr/bin/{name}")));
    }

    /// Puts an installed program into the guest's search path, together with the libraries that it needs.
    pub fn add_installed(&mut self, name: &str) -> Result<()> {
        self.add_program(&initramfs::find(name)?, name);
        Ok(())
    }

    /// Puts a file or program into the guest's home folder, under its own name.
    pub fn add_to_root(&mut self, file: &Path) -> Result<()> {
        let name = file
            .file_name()
            .with_context(|| format!("{}: not a file", file.display()))?;
        self.files
            .push((file.to_owned(), format!("/root/{}", name.to_string_lossy())));
        Ok(())
    }

    /// Puts udev of Debian's releases into the guest, each in a tree of its own below this folder.
    pub fn add_udev(&mut self, folder: &str) -> Result<()> {
        let from = udev::ensure()?;
        self.trees.push((from, folder.to_owned()));
        Ok(())
    }

    /// Boots, relays what the guest prints, and returns the command's exit status.
    pub fn run(&self) -> Result<Outcome> {
        self.run_watched(&mut |_| Go::On)
    }

    /// The same with somebody who hears each line that the guest prints, and nothing from time to time, and may end it.
    pub fn run_watched(&self, watch: &mut dyn FnMut(Option<&str>) -> Go) -> Result<Outcome> {
        let accel = if self.instruction_clock {
            accel::Accel::Instructions
        } else {
            accel::best()?
        };
        self.run_with(accel, watch)
    }

    fn run_with(
        &self,
        accel: accel::Accel,
        watch: &mut dyn FnMut(Option<&str>) -> Go,
    ) -> Result<Outcome> {
        if !cfg!(target_arch = "x86_64") {
            bail!("the guest is an x86-64 machine: this is not one");
        }
        let kernel = kernel::ensure(self.kernel)?;
        let image = initramfs::build(&kernel, &self.script, &self.files, &self.trees)?;
        let machine = qemu::Machine {
            accel,
            processors: self.processors,
            kernel: &kernel.image,
            initramfs: image.path(),
            disks: &self.disks,
            limit: self.limit,
            silent: self.silent,
        };
        qemu::boot(&machine, watch)
    }
}
