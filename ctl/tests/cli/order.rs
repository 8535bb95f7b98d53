//! Keeping order: holds that keep snapshots, `prune` that lets the others go, and `tree` that shows who came from what.

use crate::kit::{Machine, restate_slots, slot_name};
use crate::nbd::Serving;
use serde_json::{Value, json};

/// The pool `p0` with the volume `v` of 8 MiB and these snapshots of it.
fn machine(snapshots: &[&str]) -> Machine {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "8M"]);
    for name in snapshots {
        machine.ok(&["snapshot", &format!("p0/v@{name}")]);
    }
    machine
}

fn holds(machine: &Machine) -> String {
    machine.ok(&["list", "-H", "-o", "name,holds", "p0"])
}

#[test]
fn a_held_snapshot_stays_and_can_be_used() {
    let machine = machine(&["a", "b", "c"]);
    machine.ok(&["hold", "backup", "p0/v@a", "p0/v@b"]);
    machine.ok(&["hold", "audit", "p0/v@a"]);
    assert_eq!(
        holds(&machine),
        "p0/v\t-\np0/v@a\taudit,backup\np0/v@b\tbackup\np0/v@c\t-\n"
    );
    let rows = machine.json(&["list", "--json", "p0"]);
    assert_eq!(rows[0]["holds"], json!([]));
    assert_eq!(rows[1]["holds"], json!(["audit", "backup"]));
    let status = machine.json(&["pool", "status", "--json", "p0"]);
    assert_eq!(
        (&status["volumes"], &status["snapshots"]),
        (&json!(1), &json!(3))
    );

    // Every hold is named, and nothing goes, whatever else is named.
    let of_a = ["p0/v@a is held by audit", "p0/v@a is held by backup"];
    let of_both = [of_a[0], of_a[1], "p0/v@b is held by backup"];
    for (words, named) in [
        (&["rm", "p0/v@a"][..], &of_a[..]),
        (&["rm", "p0/v@c", "p0/v@a"], &of_a),
        (&["rm", "-n", "p0/v@a"], &of_a),
        (&["rm", "-r", "p0/v"], &of_both),
        (
            &["rm", "--wait", "p0/v", "p0/v@a", "p0/v@b", "p0/v@c"],
            &of_both,
        ),
        (&["pool", "destroy", "p0", "--force"], &of_both),
    ] {
        let line = machine.refused_untouched(1, words);
        for hold in named {
            assert!(line.contains(hold), "{words:?}: {line}");
        }
        assert!(
            line.ends_with("`ublkctl release` takes a hold away"),
            "{line}"
        );
    }
    let said = machine.ok(&["pool", "destroy", "-n", "p0"]);
    for hold in of_both {
        assert!(
            said.contains(&format!("would be refused: {hold}\n")),
            "{said}"
        );
    }

    machine.ok(&["clone", "p0/v@a", "p0/c"]);
    machine.ok(&["rollback", "p0/v@a"]);
    machine.ok(&["rename", "p0/v@a", "p0/v@z"]);
    machine.ok(&["rename", "p0/v", "p0/w"]);
    machine.ok(&["rm", "p0/w@c"]);
    machine.ok(&["pool", "check", "p0"]);
    assert_eq!(
        holds(&machine),
        "p0/c\t-\np0/w\t-\np0/w@z\taudit,backup\np0/w@b\tbackup\n"
    );

    machine.ok(&["release", "backup", "p0/w@b", "p0/w@z"]);
    let line = machine.refused_untouched(1, &["rm", "-r", "p0/w"]);
    assert!(line.contains("p0/w@z is held by audit;"), "{line}");
    machine.ok(&["rm", "p0/w@b"]);
    machine.ok(&["release", "audit", "p0/w@z"]);
    machine.ok(&["rm", "-r", "p0/w"]);
    assert_eq!(machine.names(), ["p0/c"]);
    machine.ok(&["pool", "check", "p0"]);
    machine.ok(&["pool", "destroy", "p0", "--force"]);
}

#[test]
fn all_snapshots_that_are_named_are_held_or_none() {
    let machine = machine(&["a", "b"]);
    machine.ok(&["hold", "x", "p0/v@a"]);
    for (code, words, named) in [
        (
            1,
            &["hold", "x", "p0/v@b", "p0/v@a"][..],
            "p0/v@a: has a hold x already",
        ),
        (1, &["hold", "y", "p0/v@a", "p0/v@c"], "v@c"),
        (1, &["hold", "y", "p0/w@a"], "p0/w"),
        (1, &["hold", "y", "p9/v@a"], "p9"),
        (
            1,
            &["release", "x", "p0/v@a", "p0/v@b"],
            "p0/v@b: has no hold x",
        ),
        (1, &["release", "y", "p0/v@a"], "p0/v@a: has no hold y"),
        (1, &["release", "x", "p0/v@c"], "v@c"),
        (2, &["hold", "y", "p0/v@a", "p0/v@a"], "named twice"),
        (2, &["release", "x", "p0/v@a", "p0/v@a"], "named twice"),
        (2, &["hold", "y", "p0/v@a", "p1/v@a"], "two pools"),
        (2, &["hold", "y", "p0/v"], "names no snapshot"),
        (2, &["hold", "y"], "POOL/VOLUME@SNAPSHOT"),
        (2, &["hold", "a,b", "p0/v@a"], "a,b"),
        (2, &["hold", "", "p0/v@a"], "is empty"),
    ] {
        let line = machine.refused_untouched(code, words);
        assert!(line.contains(named), "{words:?}: {line}");
    }
    assert_eq!(holds(&machine), "p0/v\t-\np0/v@a\tx\np0/v@b\t-\n");
    let many: Vec<String> = (0..257).map(|number| format!("p0/v@{number}")).collect();
    let mut words = vec!["hold", "y"];
    words.extend(many.iter().map(String::as_str));
    let line = machine.refused_untouched(2, &words);
    assert!(line.contains("1 to 256 snapshots"), "{line}");
}

#[test]
fn holds_survive_a_killed_daemon() {
    let machine = machine(&["a", "b"]);
    let daemon = machine.serve();
    machine.ok(&["hold", "x", "p0/v@a", "p0/v@b"]);
    machine.ok(&["hold", "y", "p0/v@b"]);
    machine.ok(&["release", "x", "p0/v@a"]);
    let line = machine.refused(1, &["pool", "destroy", "p0", "--force"]);
    assert!(
        line.contains("p0/v@b is held by x, p0/v@b is held by y"),
        "{line}"
    );
    daemon.kill();
    assert_eq!(holds(&machine), "p0/v\t-\np0/v@a\t-\np0/v@b\tx,y\n");
    machine.refused(1, &["rm", "p0/v@b"]);
    machine.ok(&["rm", "p0/v@a"]);
    machine.ok(&["pool", "check", "p0"]);
    let daemon = machine.serve();
    assert_eq!(holds(&machine), "p0/v\t-\np0/v@b\tx,y\n");
    machine.ok(&["release", "x", "p0/v@b"]);
    machine.ok(&["release", "y", "p0/v@b"]);
    machine.ok(&["rm", "p0/v@b"]);
    assert_eq!(daemon.terminate(), Some(0));
    assert_eq!(machine.names(), ["p0/v"]);
    machine.ok(&["pool", "check", "p0"]);
}

#[test]
fn a_hold_on_nothing_is_found_and_mended() {
    let machine = machine(&["a", "b"]);
    machine.ok(&["hold", "x", "p0/v@a"]);
    machine.ok(&["hold", "y", "p0/v@b"]);
    // The first hold is on the volume, which is number 1.
    let slots = restate_slots(&machine, |slot| {
        if slot[0] == 4 && slot_name(slot) == "x" {
            slot[16..24].copy_from_slice(&1_u64.to_le_bytes());
        }
    });
    assert_eq!(slots, 5);
    let fact = "hold x: is on number 1, which is no snapshot";
    let found = machine.run(&["pool", "check", "--json", "p0"]);
    assert_eq!(found.code, 4, "{found:?}");
    let report: Value = serde_json::from_str(&found.stdout).expect("JSON");
    assert_eq!(report["damage"], json!([fact]));
    assert_eq!(report["unreadable"], json!([]));
    // What is whole of it can be looked at; the other hold still counts.
    assert_eq!(machine.names().len(), 3);
    machine.refused(4, &["snapshot", "p0/v@c"]);
    let line = machine.refused_untouched(1, &["pool", "destroy", "p0", "--force"]);
    assert!(line.contains("p0/v@b is held by y;"), "{line}");
    let planned = machine.run(&["pool", "check", "--repair", "-n", "p0"]);
    assert_eq!(planned.code, 4, "{planned:?}");
    assert!(planned.stdout.contains(fact), "{planned:?}");
    let done = machine.ok(&["pool", "check", "--repair", "-y", "p0"]);
    assert!(
        done.contains("forget the hold") && done.contains("clean"),
        "{done}"
    );
    assert_eq!(holds(&machine), "p0/v\t-\np0/v@a\t-\np0/v@b\ty\n");
    machine.ok(&["rm", "p0/v@a"]);
    machine.refused(1, &["rm", "p0/v@b"]);
    machine.ok(&["pool", "check", "p0"]);
}

/// Says of snapshots when they were made, in days since 1970 and hours.
fn redate(machine: &Machine, moments: &[(&str, u64, u64)]) {
    let mut found = 0;
    restate_slots(machine, |slot| {
        let is_named = |moment: &&(&str, u64, u64)| slot[0] == 2 && moment.0 == slot_name(slot);
        if let Some((_, days, hours)) = moments.iter().find(is_named) {
            let created = (days * 24 + hours) * 3600 * 1_000_000_000;
            slot[56..64].copy_from_slice(&created.to_le_bytes());
            found += 1;
        }
    });
    assert_eq!(found, moments.len());
}

/// Two snapshots on 2026-03-01, a Sunday, one on the 2nd, two on the 3rd.
fn dated() -> Machine {
    let machine = machine(&["a", "b", "c", "d", "e"]);
    let sunday = 20_513;
    redate(
        &machine,
        &[
            ("a", sunday, 10),
            ("b", sunday, 22),
            ("c", sunday + 1, 9),
            ("d", sunday + 2, 9),
            ("e", sunday + 2, 10),
        ],
    );
    machine
}

#[test]
fn a_prune_says_what_it_would_do_and_does_that() {
    let machine = dated();
    machine.ok(&["hold", "audit", "p0/v@a"]);
    let rules = ["prune", "p0/v", "--keep-last", "1", "--keep-weekly", "2"];
    let dry = |more: &[&'static str]| [&rules[..], &["-n"], more].concat();
    let before = machine.pool_bytes();
    let expected = "\
SNAPSHOT  CREATED                  ACTION  WHY
p0/v@a    2026-03-01 10:00:00 UTC  keep    held by audit
p0/v@b    2026-03-01 22:00:00 UTC  keep    weekly
p0/v@c    2026-03-02 09:00:00 UTC  remove  -
p0/v@d    2026-03-03 09:00:00 UTC  remove  -
p0/v@e    2026-03-03 10:00:00 UTC  keep    last, weekly
would remove 2 of 5 snapshots and free 0B
";
    assert_eq!(machine.ok(&dry(&[])), expected);
    let lines = machine.ok(&dry(&["-H", "-p"]));
    assert_eq!(lines.lines().count(), 5);
    assert!(
        lines.starts_with("p0/v@a\t1772359200\tkeep\theld by audit\n"),
        "{lines}"
    );
    let shown = machine.json(&dry(&["--json"]));
    assert_eq!(
        (&shown["removed"], &shown["freed_bytes"], &shown["dry_run"]),
        (&json!(2), &json!(0), &json!(true))
    );
    let (a, c, e) = (
        &shown["snapshots"][0],
        &shown["snapshots"][2],
        &shown["snapshots"][4],
    );
    assert_eq!((&a["kept"], &a["holds"]), (&json!(true), &json!(["audit"])));
    assert_eq!((&c["name"], &c["kept"]), (&json!("p0/v@c"), &json!(false)));
    assert_eq!(e["rules"], json!(["last", "weekly"]));
    assert!(before == machine.pool_bytes(), "a dry run changed the pool");

    let said = machine.ok(&rules);
    assert_eq!(said, "p0/v: removed 2 of 5 snapshots\n");
    assert_eq!(machine.names(), ["p0/v", "p0/v@a", "p0/v@b", "p0/v@e"]);
    machine.ok(&["pool", "check", "p0"]);
    // The same again finds nothing that goes.
    let again = machine.json(&[&rules[..], &["--json"]].concat());
    assert_eq!(
        (&again["removed"], &again["dry_run"]),
        (&json!(0), &json!(false))
    );
    machine.ok(&["release", "audit", "p0/v@a"]);
    machine.ok(&["prune", "p0/v", "--keep-daily", "1"]);
    assert_eq!(machine.names(), ["p0/v", "p0/v@e"]);
    machine.ok(&["pool", "check", "p0"]);
}

#[test]
fn each_rule_looks_at_its_own_calendar() {
    let machine = dated();
    let kept = |rule: &str, count: &str| -> Vec<String> {
        let shown = machine.json(&["prune", "p0/v", rule, count, "-n", "--json"]);
        let snapshots = shown["snapshots"].as_array().expect("snapshots");
        let kept = snapshots.iter().filter(|row| row["kept"] == json!(true));
        let name = |row: &Value| row["path"]["snapshot"].as_str().expect("a name").to_owned();
        kept.map(name).collect()
    };
    assert_eq!(kept("--keep-last", "2"), ["d", "e"]);
    assert_eq!(kept("--keep-hourly", "4"), ["b", "c", "d", "e"]);
    assert_eq!(kept("--keep-daily", "2"), ["c", "e"]);
    assert_eq!(kept("--keep-weekly", "5"), ["b", "e"]);
    assert_eq!(kept("--keep-monthly", "1"), ["e"]);
    assert_eq!(kept("--keep-yearly", "9"), ["e"]);
}

#[test]
fn a_clock_that_stood_in_the_future_makes_no_correct_snapshot_go() {
    let machine = machine(&["a", "x", "y", "b", "c"]);
    let (sunday, in_2043) = (20_513, 26_700);
    redate(
        &machine,
        &[
            ("a", sunday, 10),
            ("x", in_2043, 10),
            ("y", in_2043 + 1, 10),
            // The clock was set back by an hour, too.
            ("b", sunday + 1, 11),
            ("c", sunday + 1, 10),
        ],
    );
    let names = "p0/v@x (2043-02-07 10:00:00 UTC), p0/v@y (2043-02-08 10:00:00 UTC)";
    let warned = |words: &[&str]| {
        let said = machine.run(words);
        assert_eq!(said.code, 0, "{said:?}");
        assert_eq!(said.stderr.lines().count(), 1, "{said:?}");
        assert!(said.stderr.contains(names), "{said:?}");
        said.stdout
    };
    let rules = ["prune", "p0/v", "--keep-last", "2", "--keep-daily", "1"];
    let table = warned(&[&rules[..], &["-n", "-H"]].concat());
    let whys: Vec<&str> = table
        .lines()
        .filter_map(|line| line.rsplit('\t').next())
        .collect();
    let future = "dated in the future";
    assert_eq!(whys, ["-", future, future, "last", "last, daily"]);
    let shown = warned(&[&rules[..], &["-n", "--json"]].concat());
    let shown: Value = serde_json::from_str(&shown).expect("JSON");
    let of_x = &shown["snapshots"][1];
    assert_eq!(
        (&of_x["kept"], &of_x["in_future"], &of_x["rules"]),
        (&json!(true), &json!(true), &json!([]))
    );
    assert_eq!(warned(&rules), "p0/v: removed 1 of 5 snapshots\n");
    // In the order of creation, whatever the dates.
    assert_eq!(
        machine.names(),
        ["p0/v", "p0/v@x", "p0/v@y", "p0/v@b", "p0/v@c"]
    );
    let ages = machine.ok(&["list", "-H", "-o", "name,created", "p0"]);
    let age = |name: &str| {
        let line = ages.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split('\t').nth(1))
    };
    let in_years = |age: &str| age.starts_with("in ") && age.ends_with('y');
    assert!(age("p0/v@x").is_some_and(in_years), "{ages}");
    assert!(
        age("p0/v@b").is_some_and(|age| !age.starts_with("in")),
        "{ages}"
    );
    machine.ok(&["rm", "p0/v@x", "p0/v@y"]);
    let said = machine.run(&rules);
    assert_eq!((said.code, said.stderr.as_str()), (0, ""), "{said:?}");
}

#[test]
fn a_prune_wants_a_rule_and_a_volume() {
    let machine = machine(&["a"]);
    for (code, words, named) in [
        (2, &["prune", "p0/v"][..], "--keep-last"),
        (2, &["prune", "p0/v", "-n"], "--keep-last"),
        (2, &["prune", "p0/v", "--keep-last", "0"], "0"),
        (2, &["prune", "p0/v", "--keep-daily", "-1"], "-1"),
        (
            2,
            &["prune", "p0/v", "--keep-daily", "4294967296"],
            "4294967296",
        ),
        (
            2,
            &["prune", "p0/v@a", "--keep-last", "1"],
            "names a snapshot",
        ),
        (2, &["prune", "p0", "--keep-last", "1"], "names a pool"),
        (
            1,
            &["prune", "p0/w", "--keep-last", "1"],
            "p0/w: no such volume",
        ),
        (
            1,
            &["prune", "p0/w", "--keep-last", "1", "-n"],
            "p0/w: no such volume",
        ),
        (1, &["prune", "p9/v", "--keep-last", "1"], "p9"),
    ] {
        let line = machine.refused_untouched(code, words);
        assert!(line.contains(named), "{words:?}: {line}");
    }
    machine.ok(&["create", "p0/none", "--size", "1M"]);
    let said = machine.ok(&["prune", "p0/none", "--keep-last", "1"]);
    assert_eq!(said, "p0/none: removed 0 of 0 snapshots\n");
}

#[test]
fn what_is_attached_is_not_pruned() {
    let machine = machine(&["a", "b", "c"]);
    let serving = Serving::start(&machine, &["p0/v@a"]);
    let dry = machine.ok(&["prune", "p0/v", "--keep-last", "1", "-n", "-H", "-p"]);
    let why = |line: &str| line.rsplit('\t').next().map(str::to_owned);
    let whys: Vec<String> = dry.lines().filter_map(why).collect();
    assert_eq!(whys, ["attached", "-", "last"]);
    machine.ok(&["prune", "p0/v", "--keep-last", "1"]);
    assert_eq!(machine.names(), ["p0/v", "p0/v@a", "p0/v@c"]);
    // Whatever is in the way is named at once.
    machine.ok(&["hold", "x", "p0/v@a", "p0/v@c"]);
    let line = machine.refused(1, &["rm", "-r", "p0/v"]);
    for blocker in [
        "p0/v@a as nbd",
        "p0/v@a is held by x",
        "p0/v@c is held by x",
    ] {
        assert!(line.contains(blocker), "{line}");
    }
    machine.ok(&["release", "x", "p0/v@a", "p0/v@c"]);
    assert_eq!(serving.end().0, Some(0));
    machine.is_left_alone("p0");
    machine.ok(&["prune", "p0/v", "--keep-last", "1"]);
    assert_eq!(machine.names(), ["p0/v", "p0/v@c"]);
}

#[test]
fn a_prune_tells_what_comes_back_together() {
    let machine = machine(&[]);
    let stamp = |byte: u8| {
        let serving = Serving::start(&machine, &["p0/v"]);
        let mut client = serving.client();
        let block = vec![byte; 1 << 20];
        client.write(0, &block).expect("a write");
        assert_eq!(serving.end().0, Some(0));
        machine.is_left_alone("p0");
    };
    // Two snapshots share a MiB that nobody else has.
    stamp(1);
    machine.ok(&["snapshot", "p0/v@a"]);
    machine.ok(&["snapshot", "p0/v@b"]);
    stamp(2);
    machine.ok(&["snapshot", "p0/v@c"]);
    let shown = machine.json(&["prune", "p0/v", "--keep-last", "1", "-n", "--json"]);
    let freed = shown["freed_bytes"].as_u64().expect("bytes");
    assert!((1 << 20..1 << 21).contains(&freed), "{freed}");
    let one = machine.json(&["prune", "p0/v", "--keep-last", "2", "-n", "--json"]);
    assert!(one["freed_bytes"].as_u64().expect("bytes") < 1 << 20);
    let free = |machine: &Machine| {
        let status = machine.json(&["pool", "status", "--json", "p0"]);
        status["free_bytes"].as_u64().expect("bytes")
    };
    let before = free(&machine);
    machine.ok(&["prune", "p0/v", "--keep-last", "1"]);
    assert_eq!(free(&machine), before + freed);
}

#[test]
fn a_tree_shows_who_was_cloned_from_what() {
    let machine = machine(&["a", "b"]);
    machine.ok(&["clone", "p0/v@a", "p0/c"]);
    machine.ok(&["snapshot", "p0/c@x"]);
    machine.ok(&["clone", "p0/c@x", "p0/d"]);
    machine.ok(&["clone", "p0/v@b", "p0/e"]);
    machine.ok(&["hold", "backup", "p0/c@x"]);
    let expected = "\
p0/v
|- p0/v@a
|  `- p0/c
|     `- p0/c@x
|        `- p0/d
`- p0/v@b
   `- p0/e
";
    assert_eq!(machine.ok(&["tree", "p0"]), expected);
    let part = "p0/c (clone of p0/v@a)\n`- p0/c@x\n   `- p0/d\n";
    assert_eq!(machine.ok(&["tree", "p0/c"]), part);
    let roots = machine.json(&["tree", "p0", "--json"]);
    assert_eq!(roots.as_array().map(Vec::len), Some(1));
    let c = &roots[0]["snapshots"][0]["clones"][0];
    assert_eq!(
        (&c["name"], &c["origin"]),
        (&json!("p0/c"), &json!("p0/v@a"))
    );
    assert_eq!(c["snapshots"][0]["holds"], json!(["backup"]));
    assert_eq!(c["snapshots"][0]["clones"][0]["name"], "p0/d");
    let alone = machine.json(&["tree", "p0/d", "--json"]);
    assert_eq!(
        (&alone[0]["name"], &alone[0]["snapshots"]),
        (&json!("p0/d"), &json!([]))
    );

    // Who loses its origin stands at the left side, and so does who is rolled back.
    machine.ok(&["rm", "p0/v@b"]);
    machine.ok(&["rollback", "p0/v@a"]);
    let expected = "\
p0/e
p0/v
`- p0/v@a
   `- p0/c
      `- p0/c@x
         `- p0/d
";
    assert_eq!(machine.ok(&["tree", "p0"]), expected);
    machine.refused_untouched(1, &["tree", "p0/nobody"]);
    machine.refused_untouched(1, &["tree", "p9"]);
    machine.refused_untouched(2, &["tree", "p0/v@a"]);
    machine.refused_untouched(2, &["tree"]);
}
