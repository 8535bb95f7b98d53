//! What runs in the guest: looks at what the last cut left, then makes load until the next one comes.
//!
//! It talks to the host over the serial line, in lines that begin with `@`:
//!
//! | line | says |
//! |---|---|
//! | `@bad WHAT` | something is not as it has to be |
//! | `@files PLACE ROUND WRITER COUNT` | so many files of this round and writer are whole, counted from 0 on |
//! | `@there SNAPSHOT` | it was found after the boot |
//! | `@load` | all was looked at; load begins |
//! | `@synced ROUND WRITER NUMBER` | fsync of this file and of its folder returned |
//! | `@snapshot NAME COUNT COUNT` | it was taken; so many files of each writer were synced before the command began |
//! | `@gone SNAPSHOT` | its removal was answered |

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::WRITERS;

const DISK: &str = "/dev/vda";
const MOUNT: &str = "/mnt";
/// Snapshots of earlier rounds that are kept, to be looked at after each further cut.
const KEPT: usize = 2;

/// Looks, and unless it is the `last` time, makes load until the power goes.
pub(super) fn run(round: u64, last: bool) -> Result<()> {
    if round == 0 {
        shell("ublkctl pool create cut /dev/vda --force && ublkctl create cut/v --size 96M")?;
        let device = shell("ublkctl attach cut/v")?;
        shell(&format!("mkfs.ext4 -q {device} && mount {device} {MOUNT}"))?;
    } else {
        look(round)?;
    }
    if last {
        shell(&format!("umount {MOUNT} && ublkctl detach cut/v"))?;
        return Ok(());
    }
    load(round)
}

fn say(line: &str) {
    println!("@{line}");
}

fn shell(line: &str) -> Result<String> {
    let output = Command::new("/bin/sh").args(["-c", line]).output();
    let output = output.context("cannot start sh")?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        let said = String::from_utf8_lossy(&output.stdout);
        bail!("{line}: {}: {said} {complaint}", output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout)
        .trim_end()
        .to_owned())
}

/// Something that has to succeed, and is reported where it does not.
fn must(line: &str) -> Option<String> {
    match shell(line) {
        Ok(output) => Some(output),
        Err(error) => {
            say(&format!(
                "bad {}",
                format!("{error:#}").replace('\n', " / ")
            ));
            None
        }
    }
}

/// After a boot: the pool, the volume and every snapshot.
fn look(round: u64) -> Result<()> {
    // Before anything is written: the checker replays in memory.
    must(&format!("ublkctl pool check {DISK}"));
    shell(&format!("ublkctl pool import {DISK}"))?;
    let device = shell("ublkctl attach cut/v")?;
    must("ublkctl pool check cut");
    file_system("volume", &device, round);
    let listed = shell("ublkctl list cut -H -o name")?;
    let snapshots: Vec<&str> = listed
        .lines()
        .filter_map(|line| line.strip_prefix("cut/v@"))
        .collect();
    for name in &snapshots {
        say(&format!("there {name}"));
        // A snapshot of a mounted file system has a journal to replay, which a clone of it can.
        if must(&format!("ublkctl clone cut/v@{name} cut/clone")).is_some() {
            if let Some(clone) = must("ublkctl attach cut/clone") {
                file_system(name, &clone, round);
                must(&format!("umount {MOUNT}; ublkctl detach cut/clone"));
            }
            must("ublkctl rm cut/clone");
        }
    }
    let old = snapshots.len().saturating_sub(KEPT);
    for name in snapshots.iter().take(old) {
        shell(&format!("ublkctl rm cut/v@{name}"))?;
        say(&format!("gone {name}"));
    }
    must("! dmesg | grep -E 'EXT4-fs error|I/O error'");
    shell(&format!("mount {device} {MOUNT}"))?;
    // The files stay for one round more in the snapshots alone.
    shell(&format!("rm -rf {MOUNT}/r*"))?;
    Ok(())
}

/// Replays the file system's journal, has it checked, and looks for whole files.
fn file_system(place: &str, device: &str, round: u64) {
    // Unmounting leaves nothing to replay: from there on e2fsck has to find nothing at all.
    must(&format!(
        "mount {device} {MOUNT} && umount {MOUNT} && e2fsck -fn {device} 2>&1"
    ));
    if must(&format!("mount {device} {MOUNT}")).is_none() {
        return;
    }
    for round in round.saturating_sub(4)..round {
        for writer in 0..WRITERS {
            let whole = (0..).take_while(|&number| {
                let path = path(round, writer, number);
                fs::read(path).is_ok_and(|found| found == content(round, writer, number))
            });
            say(&format!("files {place} {round} {writer} {}", whole.count()));
        }
    }
    if place == "volume" {
        must(&format!("umount {MOUNT}"));
    }
}

fn path(round: u64, writer: u64, number: u64) -> String {
    format!("{MOUNT}/r{round}-w{writer}/{number}")
}

/// What a file holds follows from its name: some 1 to 24 KiB that no other file has.
fn content(round: u64, writer: u64, number: u64) -> Vec<u8> {
    let mut rng = fastrand::Rng::with_seed(round << 40 | writer << 32 | number);
    let mut bytes = vec![0; rng.usize(1 << 10..24 << 10)];
    rng.fill(&mut bytes);
    bytes
}

fn load(round: u64) -> Result<()> {
    let synced: [AtomicU64; WRITERS as usize] = Default::default();
    say("load");
    thread::scope(|scope| {
        let mut threads = Vec::new();
        for (writer, count) in (0..).zip(&synced) {
            threads.push(scope.spawn(move || write(round, writer, count)));
        }
        threads.push(scope.spawn(move || noise(round)));
        threads.push(scope.spawn(|| snapshots(round, &synced)));
        // Nobody comes back but with an error.
        threads
            .into_iter()
            .filter_map(|thread| thread.join().ok())
            .collect::<Result<()>>()
    })
}

/// Files one after the other, each synced.
fn write(round: u64, writer: u64, synced: &AtomicU64) -> Result<()> {
    let folder = format!("{MOUNT}/r{round}-w{writer}");
    fs::create_dir(&folder).context("cannot make a folder")?;
    let parent = File::open(MOUNT).context("cannot open the top folder")?;
    parent.sync_all().context("cannot sync the top folder")?;
    for number in 0.. {
        let mut file = File::create(path(round, writer, number)).context("cannot make a file")?;
        file.write_all(&content(round, writer, number))
            .and_then(|()| file.sync_all())
            .and_then(|()| File::open(&folder)?.sync_all())
            .context("cannot write a file")?;
        synced.store(number + 1, Ordering::SeqCst);
        say(&format!("synced {round} {writer} {number}"));
        // Room for all of a round: the oldest need not stay.
        thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Changes that nobody waits for, so that the cache below is never empty.
fn noise(round: u64) -> Result<()> {
    let mut rng = fastrand::Rng::with_seed(round);
    loop {
        let path = format!("{MOUNT}/noise-{}", rng.u8(..8));
        if rng.u8(..4) == 0 && Path::new(&path).exists() {
            fs::remove_file(&path).context("cannot remove a file")?;
        } else {
            fs::write(&path, vec![rng.u8(..); rng.usize(..400_000)]).context("cannot write")?;
        }
        if rng.u8(..8) == 0 {
            shell("sync -d /mnt 2>/dev/null || sync")?;
        }
        thread::sleep(Duration::from_millis(rng.u64(..40)));
    }
}

/// Snapshots all the while; one of three goes again.
fn snapshots(round: u64, synced: &[AtomicU64]) -> Result<()> {
    for number in 0.. {
        let name = format!("r{round}-{number}");
        let before: Vec<String> = synced
            .iter()
            .map(|count| count.load(Ordering::SeqCst).to_string())
            .collect();
        shell(&format!("ublkctl snapshot cut/v@{name}"))?;
        say(&format!("snapshot {name} {}", before.join(" ")));
        if super::is_removed_again(number) {
            shell(&format!("ublkctl rm cut/v@{name}"))?;
            say(&format!("gone {name}"));
        }
        thread::sleep(Duration::from_millis(400));
    }
    Ok(())
}
