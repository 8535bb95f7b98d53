//! What a volume may take of its pool: quotas, as commands set them and as clients meet them.

use crate::kit::Machine;
use crate::nbd::Serving;
use blockfork_tests::nbd::{self, Ask};
use serde_json::json;
use std::thread;
use std::time::{Duration, Instant};

#[test]
fn a_quota_is_shown_changed_and_taken_away() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "16M", "--quota", "4M"]);
    machine.ok(&["create", "p0/w", "--size", "16M"]);
    machine.ok(&["snapshot", "p0/v@s"]);
    machine.ok(&["clone", "p0/v@s", "p0/c"]);
    let quotas = || machine.ok(&["list", "-Hp", "-o", "name,quota", "p0"]);
    assert_eq!(quotas(), "p0/c\t-\np0/v\t4194304\np0/v@s\t-\np0/w\t-\n");
    machine.ok(&["set", "p0/v", "quota=8M"]);
    machine.ok(&["set", "p0/w", "quota=1.5M"]);
    assert_eq!(
        quotas(),
        "p0/c\t-\np0/v\t8388608\np0/v@s\t-\np0/w\t1572864\n"
    );
    machine.ok(&["set", "p0/v", "quota=none"]);
    let rows = machine.json(&["list", "--json", "p0"]);
    assert_eq!(rows[1]["quota_bytes"], json!(null));
    assert_eq!(rows[3]["quota_bytes"], json!(1_572_864));
    machine.ok(&["pool", "check", "p0"]);
}

#[test]
fn a_limit_that_cannot_be_is_refused_and_touches_nothing() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "4M"]);
    machine.ok(&["snapshot", "p0/v@s"]);
    for words in [
        ["set", "p0/v", "quota"],
        ["set", "p0/v", "quota="],
        ["set", "p0/v", "quota=0"],
        ["set", "p0/v", "quota=4097"],
        ["set", "p0/v", "quota=2P"],
        ["set", "p0/v", "size=1G"],
        ["set", "p0/v@s", "quota=1G"],
    ] {
        machine.refused_untouched(2, &words);
    }
    machine.refused_untouched(2, &["create", "p0/w", "--size", "4M", "--quota", "100"]);
    machine.refused_untouched(1, &["set", "p0/w", "quota=1M"]);
}

#[test]
fn a_client_beyond_the_quota_hears_no_space_and_overwrites_go_on() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "8M", "--quota", "2M"]);
    let serving = Serving::start(&machine, &["p0/v"]);
    let mut client = serving.client();
    client.write(0, &vec![1; 2 << 20]).unwrap();
    let refused = client.call(nbd::WRITE, 0, 4 << 20, 4096, &[2; 4096]);
    assert_eq!(refused.unwrap().errno, 28);
    client.write(1 << 20, &[3; 4096]).unwrap();
    let line = machine.refused(2, &["set", "p0/v", "quota=1M"]);
    assert!(
        line.contains("p0/v") && line.contains("2097152 bytes"),
        "{line}"
    );
    client.change(nbd::TRIM, 0, 4096).unwrap();
    client.write(4 << 20, &[2; 4096]).unwrap();
    machine.ok(&["set", "p0/v", "quota=3M"]);
    client.write(5 << 20, &[2; 4096]).unwrap();
    drop(client);
    assert_eq!(serving.end().0, Some(0));
    let used = machine.ok(&["list", "-Hp", "-o", "used", "p0/v"]);
    assert_eq!(used.trim_end(), ((2 << 20) + 4096).to_string());
}

/// `p0/v`, whose quota is used up, served with writes that wait.
fn full(machine: &Machine, on_full: &str) -> Serving {
    machine.ok(&["create", "p0/v", "--size", "8M", "--quota", "1M"]);
    let serving = Serving::start(machine, &["p0/v", "--on-full", on_full]);
    let filled = serving.client().write(0, &vec![1; 1 << 20]);
    assert!(filled.is_ok(), "{filled:?}");
    serving
}

/// A write of a block that finds no space.
fn ask(cookie: u64) -> Ask {
    Ask {
        cookie,
        command: nbd::WRITE,
        flags: 0,
        offset: (2 << 20) + cookie * 4096,
        bytes: 4096,
    }
}

#[test]
fn queued_writes_wait_for_space_while_other_requests_go_on() {
    let machine = Machine::with_pool();
    let serving = full(&machine, "queue");
    let mut client = serving.client();
    // More than there are threads for a connection.
    for cookie in 0..40 {
        client.send(ask(cookie), &[7; 4096]).unwrap();
    }
    let read = Ask {
        cookie: 99,
        command: nbd::READ,
        offset: 0,
        ..ask(0)
    };
    client.send(read, &[]).unwrap();
    let first = client.receive().unwrap();
    assert_eq!((first.cookie, first.errno), (99, 0), "a write did not wait");
    // Room for some of them only.
    machine.ok(&["set", "p0/v", "quota=1060864"]);
    for _ in 0..3 {
        assert_eq!(client.receive().unwrap().errno, 0);
    }
    machine.ok(&["set", "p0/v", "quota=none"]);
    for _ in 0..37 {
        assert_eq!(client.receive().unwrap().errno, 0);
    }
    assert_eq!(client.read(2 << 20, 4096).unwrap(), [7; 4096]);
    drop(client);
    assert_eq!(serving.end().0, Some(0));
    machine.ok(&["pool", "check", "p0"]);
}

#[test]
#[expect(clippy::disallowed_methods, reason = "the time is what is tested")]
fn queued_writes_fail_when_their_time_is_up() {
    let machine = Machine::with_pool();
    let serving = full(&machine, "queue=2");
    let mut client = serving.client();
    let began = Instant::now();
    client.send(ask(0), &[7; 4096]).unwrap();
    assert_eq!(client.receive().unwrap().errno, 28);
    assert!((1900..20_000).contains(&began.elapsed().as_millis()));
}

#[test]
#[expect(clippy::disallowed_methods, reason = "the time is what is tested")]
fn no_queued_write_outlives_its_client_or_its_export() {
    let machine = Machine::with_pool();
    let serving = full(&machine, "queue=3600");
    let mut gone = serving.client();
    gone.send(ask(0), &[7; 4096]).unwrap();
    drop(gone);
    let mut client = serving.client();
    client.send(ask(1), &[7; 4096]).unwrap();
    thread::sleep(Duration::from_millis(300));
    let began = Instant::now();
    assert_eq!(serving.end().0, Some(0));
    assert!(began.elapsed().as_secs() < 20);
    machine.is_left_alone("p0");
    // What nobody was told to be written is not.
    let used = machine.ok(&["list", "-Hp", "-o", "used", "p0/v"]);
    assert_eq!(used.trim_end(), (1 << 20).to_string());
}

#[test]
fn what_to_do_on_full_is_one_of_two_words() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "1M"]);
    for word in ["", "fail", "queue=0", "queue=x", "queue=86401"] {
        machine.refused_untouched(2, &["attach", "p0/v", "--on-full", word]);
        machine.refused_untouched(2, &["serve-nbd", "p0/v", "--on-full", word]);
    }
}

#[test]
fn a_reserve_is_shown_changed_and_held_against_what_is_free() {
    let machine = Machine::with_pool();
    machine.ok(&["create", "p0/v", "--size", "32M", "--reserve", "16M"]);
    let set_aside = || {
        let status = machine.json(&["pool", "status", "p0", "--json"]);
        status["set_aside_bytes"].as_u64().unwrap()
    };
    let shown = machine.ok(&["list", "-Hp", "-o", "reserve,quota", "p0"]);
    assert_eq!(shown, "16777216\t-\n");
    assert!((16 << 20..17 << 20).contains(&set_aside()));
    let line =
        machine.refused_untouched(3, &["create", "p0/w", "--size", "60M", "--reserve", "56M"]);
    assert!(line.contains("set aside"), "{line}");
    machine.refused_untouched(2, &["set", "p0/v", "reserve=33M"]);
    machine.ok(&["set", "p0/v", "reserve=32M", "quota=32M"]);
    machine.ok(&["snapshot", "p0/v@s"]);
    machine.ok(&["set", "p0/v", "reserve=none"]);
    assert_eq!(set_aside(), 0);
    machine.refused_untouched(2, &["set", "p0/v", "quota=1M", "quota=2M"]);
}

#[test]
fn a_pool_without_overcommit_refuses_what_it_has_no_room_for() {
    let machine = Machine::new();
    let pool = machine.pool_path();
    machine.ok(&[
        "pool",
        "create",
        "p0",
        &pool,
        "--size",
        "64M",
        "--no-overcommit",
    ]);
    machine.ok(&["create", "p0/v", "--size", "40M"]);
    machine.ok(&["snapshot", "p0/v@s"]);
    for words in [
        &["create", "p0/w", "--size", "40M"][..],
        &["clone", "p0/v@s", "p0/c"],
        &["resize", "p0/v", "80M"],
    ] {
        let line = machine.refused_untouched(3, words);
        assert!(line.contains("--no-overcommit"), "{line}");
    }
    let status = machine.json(&["pool", "status", "p0", "--json"]);
    assert_eq!(status["overcommit"], json!(false));
    machine.ok(&["pool", "grow", "p0", "128M"]);
    machine.ok(&["clone", "p0/v@s", "p0/c"]);
    let plain = Machine::with_pool();
    plain.ok(&["create", "p0/v", "--size", "1T"]);
    assert_eq!(
        plain.json(&["pool", "status", "p0", "--json"])["overcommit"],
        json!(true)
    );
}
