//! `doctor` says that volumes can be attached if and only if they can.

use blockfork_tests::guest::{Pool, shell, try_shell};

/// What `doctor` prints on its line about a trial device.
fn trial(text: &str) -> &str {
    let line = text.lines().find(|line| line.starts_with("trial device"));
    line.unwrap_or_else(|| panic!("no trial in: {text}"))
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_private_dev_is_named_with_the_way_out() {
    let pool = Pool::in_file("doctor", "64M");
    pool.create("v", "8M");
    let devices = "ls /sys/class/ublk-char";
    let before = shell(devices);
    let said = pool.ctl(&["doctor"]);
    assert!(trial(&said).contains("added, read and removed"), "{said}");
    assert_eq!(shell(devices), before, "the trial left a device");

    // As in a container: /dev is a tmpfs with the nodes that were asked for.
    let private = format!("/run/doctor-{}", std::process::id());
    let enter = format!(
        "mkdir -p {private} && mount -t tmpfs tmpfs {private} && cd /dev && \
         cp -a ublk-control null zero full random urandom {private} && mount --move {private} /dev"
    );
    let inside = |words: &[&str]| pool.in_mounts_of_its_own(&enter, words);
    let said = inside(&["doctor"]);
    let text = String::from_utf8_lossy(&said.stdout).into_owned();
    assert_eq!(said.status.code(), Some(1), "{text}");
    let line = trial(&text);
    assert!(
        line.contains("/dev/ublkc") && line.contains("-v /dev:/dev"),
        "{line}"
    );
    // The other lines say that all is well.
    assert_eq!(text.matches(" NO ").count(), 1, "{text}");
    let said = inside(&["attach", &pool.target("v")]);
    let text = String::from_utf8_lossy(&said.stderr).into_owned();
    assert_eq!(said.status.code(), Some(1), "{text}");
    assert!(text.contains("do not appear in this /dev"), "{text}");
    // The daemon that this attach started lives in that /dev, and waits a while for another request.
    let daemon = pool.daemon().expect("a daemon");
    shell(&format!("kill {daemon}"));
    pool.await_end(&daemon);
    drop(try_shell(&format!("rmdir {private}")));
    // Nothing of either stays behind.
    assert_eq!(shell(devices), before);
    let device = pool.attach("v");
    assert!(device.is_zero(0, 8 << 20));
    pool.check();
}
