//! libFuzzer around the target that `$FUZZ_TARGET` names: one program for all, so that one build serves all.

#![no_main]

use blockfork_tests::fuzz::{Counting, Target, find};
use libfuzzer_sys::fuzz_target;
use std::sync::OnceLock;

#[global_allocator]
static COUNTING: Counting = Counting;

fn target() -> &'static Target {
    static TARGET: OnceLock<&Target> = OnceLock::new();
    TARGET.get_or_init(|| {
        let name = std::env::var("FUZZ_TARGET").expect("FUZZ_TARGET names the target");
        let target = find(&name).unwrap_or_else(|| panic!("there is no fuzz target {name:?}"));
        // What it keeps for all its runs is made by the first one.
        (target.run)(&[]);
        target
    })
}

fuzz_target!(|bytes: &[u8]| target().hold(bytes));
