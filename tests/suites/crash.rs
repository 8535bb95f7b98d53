//! A sample of what `prove crash` and `prove faults` visit whole: in each workload some crash points, and some calls to
//! the device that fail.

use blockfork_tests::crash::record;
use blockfork_tests::faults::{self, KINDS};
use blockfork_tests::parallel;
use blockfork_tests::script;
use blockfork_tests::sim_device::Fault;

/// One crash point in so many is visited.
const POINT_STRIDE: usize = 29;
/// One case in so many is run: a prime that shares nothing with the number of ways to fail, so that all come up.
const FAULT_STRIDE: usize = 211;

fn assert_all<T>(results: Vec<Result<T, String>>, panics: Vec<parallel::Failure>) {
    let failed = results.into_iter().filter_map(Result::err);
    let panicked = panics.into_iter().map(|panic| panic.message);
    let failures: Vec<String> = failed.chain(panicked).collect();
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn a_crash_loses_nothing_durable_and_invents_nothing() {
    let recordings: Vec<_> = script::all(0)
        .iter()
        .map(|script| record(script, 0))
        .collect();
    let cases: Vec<_> = recordings
        .iter()
        .flat_map(|recording| {
            recording
                .points()
                .into_iter()
                .map(move |point| (recording, point))
        })
        .step_by(POINT_STRIDE)
        .collect();
    let (results, panics) = parallel::each(0..cases.len() as u64, |number| {
        let (recording, point) = cases[number as usize];
        recording.visit(point, 0)
    });
    assert_all(results, panics);
}

#[test]
fn a_device_that_fails_costs_errors_and_no_data() {
    let mut cases = Vec::new();
    for script in script::all(0) {
        for call in faults::calls(&script, 0) {
            for kind in KINDS {
                for is_sticky in [false, true] {
                    let fault = Fault {
                        call,
                        kind,
                        is_sticky,
                    };
                    cases.push((script.clone(), fault));
                }
            }
        }
    }
    let cases: Vec<_> = cases.into_iter().step_by(FAULT_STRIDE).collect();
    let (results, panics) = parallel::each(0..cases.len() as u64, |number| {
        let (script, fault) = &cases[number as usize];
        faults::run(script, 0, *fault)
            .map_err(|reason| format!("{}, {fault:?}: {reason}", script.name))
    });
    assert_all(results, panics);
}
