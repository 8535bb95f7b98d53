//! A volume that holds a pool, and a clone of that volume: two pools of one origin, both in use on one machine.

use blockfork_tests::guest::{Device, MIB, Pool, shell, try_shell};

/// A pool that another one's registry knows too; given up when dropped, also by a test that failed.
struct Twin<'a>(&'a Pool);

impl Drop for Twin<'_> {
    fn drop(&mut self) {
        drop(self.0.try_ctl(&["detach", "--all", "twin"]));
        drop(self.0.try_ctl(&["pool", "export", "twin"]));
    }
}

fn attach(pool: &Pool, target: &str) -> Device {
    let path = pool.ctl(&["attach", target]);
    Device { path }
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_clone_of_a_volume_that_holds_a_pool_is_a_pool_of_its_own() {
    let outer = Pool::on_ram_disk("outer");
    let below = outer.volume("v", "256M");
    let inner = Pool::on_device("inner", &below.path);
    let device = inner.volume("w", "64M");
    device.fill(0, 8 * MIB, 1);
    // The pool is open, and its daemon has a ring: the copy is what a power cut would have left.
    outer.snapshot("v@s");
    outer.ctl(&["clone", &outer.target("v@s"), &outer.target("c")]);
    let copy = outer.attach("c");
    device.fill(0, 8 * MIB, 2);

    let line = inner.refused(1, &["pool", "import", &copy.path]);
    assert!(line.contains("inner"), "{line}");
    let _twin = Twin(&inner);
    let import = ["pool", "import", &copy.path, "--name", "twin", "--new-id"];
    assert_eq!(inner.ctl(&import), "twin");
    let other = attach(&inner, "twin/w");
    assert!(other.holds(0, 8 * MIB, 1), "the clone is of before");
    other.fill(0, 8 * MIB, 3);
    assert!(device.holds(0, 8 * MIB, 2), "the original goes on");
    for (pool, device) in [("inner", &device), ("twin", &other)] {
        let link = shell(&format!("readlink /dev/blockfork/{pool}/w"));
        assert_eq!(link, device.path);
    }

    // Killed, each is recovered from its own ring.
    for pid in ["inner", "twin"].map(|pool| {
        let pid = inner.daemon_of(pool).expect("a daemon");
        shell(&format!("kill -9 {pid}"));
        pid
    }) {
        inner.await_end(&pid);
    }
    inner.ctl(&["recover", "inner"]);
    inner.ctl(&["recover", "twin"]);
    assert!(device.holds(0, 8 * MIB, 2) && other.holds(0, 8 * MIB, 3));

    // What is attached keeps the name of its pool. Detached, the pool is renamed, and so are its links.
    let line = inner.refused(1, &["pool", "rename", "twin", "triplet"]);
    assert!(line.contains(&other.path), "{line}");
    inner.ctl(&["detach", "--all", "twin"]);
    inner.ctl(&["pool", "check", "twin"]);
    inner.ctl(&["pool", "rename", "twin", "triplet"]);
    let other = attach(&inner, "triplet/w");
    assert!(other.holds(0, 8 * MIB, 3));
    assert_eq!(shell("readlink /dev/blockfork/triplet/w"), other.path);
    assert!(!try_shell("ls /dev/blockfork/twin").status.success());
    inner.ctl(&["detach", "--all", "triplet"]);
    inner.ctl(&["pool", "check", "triplet"]);
    inner.ctl(&["pool", "rename", "triplet", "twin"]);
    inner.ctl(&["pool", "export", "twin"]);
    inner.check();
    inner.ctl(&["pool", "export", "inner"]);
    outer.check();
}
