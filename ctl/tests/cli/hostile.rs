//! A sample of `cargo x hostile`.

use std::path::Path;

#[test]
fn a_sample_of_hostile_input_ends_as_documented() {
    let plan = hostile::Plan {
        seed: 0,
        quick: true,
        only: None,
    };
    let outcome = hostile::run(Path::new(env!("CARGO_BIN_EXE_ublkctl")), &plan);
    assert_eq!(outcome.failures, Vec::<String>::new());
    assert!(outcome.total() >= 400, "{:?}", outcome.cases);
}
