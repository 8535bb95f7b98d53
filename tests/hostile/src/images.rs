//! Pools that are cut off, of other versions and sizes, and with changed metadata under checksums that hold.

use super::Case;
use super::machine::{POOL_BYTES, SUPERBLOCKS, seal};
use std::fs::File;

const BLOCK: usize = 4096;
/// The places at which a pool is cut off: every block but its end.
pub(crate) const BOUNDARIES: u64 = POOL_BYTES / BLOCK as u64;

/// Commands that read and that change.
const COMMANDS: [&[&str]; 8] = [
    &["pool", "status", "p0"],
    &["create", "p0/x", "--size", "1M"],
    &["pool", "check", "p0"],
    &["list", "p0"],
    &["snapshot", "p0/v@x"],
    &["rm", "-r", "p0/v"],
    &["rollback", "p0/v@s"],
    &["pool", "grow", "p0", "32M"],
];

/// A pool that is shorter than it says is corrupt, for every command.
pub(crate) fn truncated(case: Case<'_>) -> Result<(), String> {
    let Case {
        machine, number, ..
    } = case;
    machine.restore();
    machine.spoil();
    let file = File::options()
        .write(true)
        .open(machine.pool_path())
        .unwrap();
    file.set_len(number * BLOCK as u64).unwrap();
    let command = COMMANDS[usize::try_from(number).unwrap() % COMMANDS.len()];
    refused(machine, command, &[4])
}

fn refused(machine: &super::Machine, words: &[&str], codes: &[i32]) -> Result<(), String> {
    let before = machine.sight();
    let said = machine.run(words);
    said.is_documented(codes)
        .map_err(|fact| format!("{words:?}: {fact}"))?;
    if machine.sight() != before {
        return Err(format!("{words:?}: refused, and something changed"));
    }
    Ok(())
}

/// A field of both superblocks changed, or bytes of any metadata block.
pub(crate) fn changed(case: Case<'_>) -> Result<(), String> {
    let Case {
        machine,
        mut rng,
        number,
    } = case;
    machine.restore();
    machine.spoil();
    let mut image = machine.image();
    let command = COMMANDS[rng.usize(0..COMMANDS.len())];
    let mut restate = |at: usize, value: &[u8]| {
        for copy in SUPERBLOCKS {
            let block = &mut image[copy..copy + BLOCK];
            block[at..at + value.len()].copy_from_slice(value);
            seal(block);
        }
        machine.put(&image);
    };
    match number {
        // Another version.
        0..64 => {
            let version = [0, 2, u32::MAX][rng.usize(0..3)];
            restate(8, &version.to_le_bytes());
            return refused(machine, command, &[1]);
        }
        // A feature that a reader, or a writer, must know.
        64..192 => {
            let bit = number - 64;
            restate(
                16 + usize::try_from(bit / 64).unwrap() * 8,
                &(1_u64 << (bit % 64)).to_le_bytes(),
            );
            return refused(machine, command, &[1]);
        }
        // Another size.
        192..256 => {
            let sizes = [0, 1, 4095, 4097, 1 << 41, 1 << 62, u64::MAX, 1 << 20];
            restate(72, &sizes[rng.usize(0..sizes.len())].to_le_bytes());
            return refused(machine, command, &[4]);
        }
        // Any field of the superblock.
        256..600 => {
            let at = rng.usize(72..1200);
            let length = rng.usize(1..9);
            let mut byte = || [0, 1, 0x7f, 0xff, rng.u8(..)][rng.usize(0..5)];
            let value: Vec<u8> = (0..length).map(|_| byte()).collect();
            restate(at, &value);
        }
        // Any metadata block.
        _ => {
            let used = machine.used();
            for _ in 0..rng.usize(1..4) {
                let start = usize::try_from(used[rng.usize(0..used.len())]).unwrap() * BLOCK;
                let block = &mut image[start..start + BLOCK];
                let at = rng.usize(8..BLOCK - 8);
                let at = if rng.bool() { 40 + at % 300 } else { at };
                block[at..at + 8].fill(rng.u8(..));
                if rng.u8(0..8) > 0 {
                    seal(block);
                }
            }
            machine.put(&image);
        }
    }
    for words in [command, COMMANDS[rng.usize(0..COMMANDS.len())], COMMANDS[2]] {
        let said = machine.run(words);
        let codes: &[i32] = if words.contains(&"check") {
            &[0, 1, 4, 5]
        } else {
            &[0, 1, 2, 3, 4]
        };
        said.is_documented(codes)
            .map_err(|fact| format!("{words:?}: {fact}"))?;
    }
    Ok(())
}
