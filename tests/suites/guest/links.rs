//! The links by name under /dev/blockfork: each leads to its own device, and everybody can follow them.

use blockfork_tests::guest::{Pool, shell};
use std::fs;
use std::path::{Path, PathBuf};

fn link(pool: &Pool, name: &str) -> PathBuf {
    Path::new("/dev/blockfork").join(pool.target(name))
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_volume_called_like_a_temporary_file_keeps_its_link() {
    let pool = Pool::in_file("links", "64M");
    let names = ["db.new", "db.tmp", "db.new.new", "db"];
    let devices: Vec<_> = names.map(|name| pool.volume(name, "4M")).to_vec();
    // Once more: the link of `db` is made over and over, and its siblings stay.
    pool.detach("db");
    let again = pool.attach("db");
    for (name, device) in names.iter().zip(&devices).take(3) {
        let target = fs::read_link(link(&pool, name)).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(target, Path::new(&device.path), "{name}");
    }
    assert_eq!(
        fs::read_link(link(&pool, "db")).expect("the link of db"),
        Path::new(&again.path)
    );
    let held = fs::read_dir("/dev/blockfork/links").expect("the folder of the links");
    assert_eq!(held.count(), names.len(), "nothing else is left there");
    pool.check();
    assert!(!Path::new("/dev/blockfork/links").exists());
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn names_of_any_length_have_their_links() {
    let pool = Pool::in_file("long", "64M");
    let name = "x".repeat(127);
    pool.create(&name, "4M");
    let snapshot = format!("{name}@{name}");
    pool.snapshot(&snapshot);
    let device = pool.attach(&snapshot);
    assert_eq!(
        fs::read_link(link(&pool, &snapshot)).expect("the link"),
        Path::new(&device.path)
    );
    pool.check();
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn everybody_can_follow_a_link() {
    let pool = Pool::in_file("open", "64M");
    let device = pool.volume("v", "4M");
    for folder in ["/dev/blockfork", "/dev/blockfork/open"] {
        assert_eq!(shell(&format!("stat -c %a {folder}")), "755", "{folder}");
    }
    // The folders are what kept others from the link. The node has the rights that the kernel or udev gave it.
    let found = shell("readlink /dev/blockfork/open/v");
    assert_eq!(found, device.path);
    pool.check();
}
