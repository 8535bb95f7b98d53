//! What udev makes of a device: links by UUID, by label and by partition, and nothing for copies. With a real udevd of two
//! Debian releases, one that knows ublk's devices and one that does not.

use blockfork_tests::guest::{Device, MIB, Mount, Pool, shell};
use blockfork_tests::udev::{Release, Udev, link};

const UUID: &str = "6a3f1c70-5b1e-4c55-9d0e-2f6f0a7b9c11";
const OTHER_UUID: &str = "0d3d6c1e-9a57-4c39-8d1b-51c6b0a4e722";
const PART_UUID: &str = "3f9b8a52-1b7c-4c0a-9f1e-7f1f6f0b6d33";

fn by_uuid(uuid: &str) -> Option<String> {
    link(&format!("/dev/disk/by-uuid/{uuid}"))
}

/// A new ext4 with this label and UUID. udev has seen what was before, and sees it: a write while it looks can be missed.
fn make_fs(udev: &Udev, node: &str, label: &str, uuid: &str) {
    udev.settle();
    shell(&format!("mkfs.ext4 -q -F -L {label} -U {uuid} {node}"));
    udev.settle();
}

/// A GPT with one partition of a given name and UUID; the partition's node.
fn partition(udev: &Udev, device: &Device) -> String {
    udev.settle();
    shell(&format!(
        "echo 'label: gpt\nstart=1MiB, size=32MiB, name=first, uuid={PART_UUID}' | sfdisk -q --no-tell-kernel --lock=no {0} \
         && blockdev --rereadpt {0}",
        device.path
    ));
    format!("{}p1", device.path)
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn without_the_rule_debian_12_finds_no_file_system_by_uuid() {
    let Some(udev) = Udev::with_rules(Release::Bookworm, &[]) else {
        return;
    };
    let pool = Pool::on_ram_disk("norule");
    let device = pool.volume("v", "64M");
    make_fs(&udev, &device.path, "data", UUID);
    pool.detach("v");
    let device = pool.attach("v");
    udev.settle();
    assert_eq!(
        udev.properties(&device.path).matches("DEVNAME=").count(),
        1,
        "udev does not know the device at all"
    );
    assert_eq!(by_uuid(UUID), None, "the rule is not needed any more");
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_file_system_is_found_by_uuid_and_label_from_mkfs_to_detach() {
    for release in Release::ALL {
        let Some(udev) = Udev::start(release) else {
            return;
        };
        let pool = Pool::on_ram_disk("found");
        let device = pool.volume("v", "64M");
        make_fs(&udev, &device.path, "data", UUID);
        assert_eq!(by_uuid(UUID).as_ref(), Some(&device.path), "{release:?}");
        let by_label = link("/dev/disk/by-label/data");
        assert_eq!(by_label.as_ref(), Some(&device.path), "{release:?}");
        let alias = "SYSTEMD_ALIAS=/dev/blockfork/found/v";
        let properties = udev.properties(&device.path);
        assert!(
            properties.lines().any(|line| line.trim() == alias),
            "{release:?}: {properties}"
        );

        mounts_by_uuid();

        pool.detach("v");
        udev.settle();
        assert_eq!(by_uuid(UUID), None, "{release:?}");
        assert_eq!(link("/dev/disk/by-label/data"), None, "{release:?}");

        let device = pool.attach("v");
        udev.settle();
        assert_eq!(by_uuid(UUID), Some(device.path), "{release:?}");
    }
}

/// Mounts by UUID as fstab does where udev runs: by the link alone, without a search through all devices.
fn mounts_by_uuid() {
    let mount = Mount {
        path: "/mnt/by-uuid".to_owned(),
    };
    shell(&format!(
        "echo EVALUATE=udev >/run/blkid.conf && mkdir -p {0} && \
         BLKID_FILE=/dev/null BLKID_CONF=/run/blkid.conf mount UUID={UUID} {0} && grep -q ' {0} ' /proc/mounts",
        mount.path
    ));
    mount.unmount();
    shell("rm /run/blkid.conf");
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_partition_is_found_by_its_number_name_and_uuid() {
    for release in Release::ALL {
        let Some(udev) = Udev::start(release) else {
            return;
        };
        let pool = Pool::on_ram_disk("parts");
        let device = pool.volume("v", "64M");
        // A volume may be called what a partition is called elsewhere.
        let other = pool.volume("v-part1", "16M");
        let part = partition(&udev, &device);
        make_fs(&udev, &part, "inner", UUID);
        let links = [
            "/dev/blockfork/parts/v+part1".to_owned(),
            "/dev/disk/by-partlabel/first".to_owned(),
            format!("/dev/disk/by-partuuid/{PART_UUID}"),
            format!("/dev/disk/by-uuid/{UUID}"),
            "/dev/disk/by-label/inner".to_owned(),
        ];
        for path in &links {
            assert_eq!(link(path).as_ref(), Some(&part), "{release:?}: {path}");
        }
        assert_eq!(link("/dev/blockfork/parts/v"), Some(device.path));
        assert_eq!(link("/dev/blockfork/parts/v-part1"), Some(other.path));
        pool.detach("v");
        udev.settle();
        for path in &links {
            assert_eq!(link(path), None, "{release:?}: {path}");
        }
        assert!(link("/dev/blockfork/parts/v-part1").is_some());
        pool.detach("v-part1");
        assert_eq!(link("/dev/blockfork/parts"), None, "{release:?}");
    }
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_snapshot_takes_no_link_from_its_volume_and_none_after_it() {
    for release in Release::ALL {
        let Some(udev) = Udev::start(release) else {
            return;
        };
        let pool = Pool::on_ram_disk("beside");
        let device = pool.volume("v", "64M");
        let part = partition(&udev, &device);
        make_fs(&udev, &part, "inner", UUID);
        pool.create("w", "64M");
        let whole = pool.attach("w");
        make_fs(&udev, &whole.path, "whole", OTHER_UUID);
        pool.ctl(&["snapshot", "beside/v@s", "beside/w@s"]);

        let snapshots = [pool.attach("v@s"), pool.attach("w@s")];
        udev.settle();
        assert_eq!(by_uuid(UUID).as_ref(), Some(&part), "{release:?}");
        assert_eq!(by_uuid(OTHER_UUID), Some(whole.path), "{release:?}");
        let inner = format!("{}p1", snapshots[0].path);
        assert_eq!(link("/dev/blockfork/beside/v@s+part1"), Some(inner));
        let name = link("/dev/blockfork/beside/w@s");
        assert_eq!(name.as_ref(), Some(&snapshots[1].path));

        for snapshot in &snapshots {
            udev.trigger(&snapshot.path);
        }
        assert_eq!(by_uuid(UUID), Some(part), "{release:?}");

        pool.detach("v");
        pool.detach("w");
        udev.settle();
        assert_eq!(by_uuid(UUID), None, "{release:?}: it leads to the snapshot");
        assert_eq!(by_uuid(OTHER_UUID), None, "{release:?}");
    }
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_clone_has_the_links_only_while_its_volume_is_detached() {
    for release in Release::ALL {
        let Some(udev) = Udev::start(release) else {
            return;
        };
        let pool = Pool::on_ram_disk("cloned");
        let device = pool.volume("v", "64M");
        make_fs(&udev, &device.path, "data", UUID);
        pool.snapshot("v@s");
        pool.ctl(&["clone", "cloned/v@s", "cloned/c"]);
        let clone = pool.attach("c");
        udev.settle();
        assert_eq!(by_uuid(UUID).as_ref(), Some(&device.path), "{release:?}");
        udev.trigger(&clone.path);
        assert_eq!(by_uuid(UUID).as_ref(), Some(&device.path), "{release:?}");
        pool.detach("v");
        udev.settle();
        assert_eq!(by_uuid(UUID).as_ref(), Some(&clone.path), "{release:?}");
        let device = pool.attach("v");
        udev.settle();
        assert_eq!(by_uuid(UUID), Some(device.path), "{release:?}");
    }
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn the_links_follow_a_rollback() {
    for release in Release::ALL {
        let Some(udev) = Udev::start(release) else {
            return;
        };
        let pool = Pool::on_ram_disk("back");
        let device = pool.volume("v", "64M");
        make_fs(&udev, &device.path, "old", UUID);
        pool.snapshot("v@s");
        make_fs(&udev, &device.path, "new", OTHER_UUID);
        assert_eq!(by_uuid(OTHER_UUID).as_ref(), Some(&device.path));
        pool.ctl(&["rollback", "back/v@s"]);
        udev.settle();
        assert_eq!(by_uuid(UUID).as_ref(), Some(&device.path), "{release:?}");
        assert_eq!(by_uuid(OTHER_UUID), None, "{release:?}");
    }
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn the_links_outlive_the_daemon() {
    let Some(udev) = Udev::start(Release::Bookworm) else {
        return;
    };
    let pool = Pool::on_ram_disk("again");
    let device = pool.volume("v", "64M");
    make_fs(&udev, &device.path, "data", UUID);
    pool.kill_daemon();
    assert_eq!(by_uuid(UUID).as_ref(), Some(&device.path));
    shell("rm -r /run/blockfork");
    pool.recover();
    udev.trigger(&device.path);
    assert_eq!(by_uuid(UUID), Some(device.path));
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_device_of_another_server_is_left_to_the_system() {
    let Some(udev) = Udev::start(Release::Bookworm) else {
        return;
    };
    let pool = Pool::on_ram_disk("foreign");
    let device = pool.volume("v", "64M");
    make_fs(&udev, &device.path, "data", UUID);
    assert!(by_uuid(UUID).is_some());
    // Nothing describes a device that is not ours.
    shell("rm -r /run/blockfork");
    udev.trigger(&device.path);
    assert_eq!(by_uuid(UUID), None);
    let properties = udev.properties(&device.path);
    assert!(!properties.contains("SYSTEMD_ALIAS"), "{properties}");
}

#[test]
#[ignore = "needs a kernel with ublk: cargo x test runs it in the guest"]
fn a_member_of_a_volume_group_is_left_alone_unless_a_rule_says_otherwise() {
    let opt_in = (
        "59-local.rules",
        "KERNEL==\"ublkb*\", ENV{BLOCKFORK_ACTIVATE}=\"1\"\n",
    );
    for release in Release::ALL {
        for (rules, is_activated) in [
            (vec![Udev::rules()], false),
            (vec![Udev::rules(), opt_in], true),
        ] {
            let Some(udev) = Udev::with_rules(release, &rules) else {
                return;
            };
            let pool = Pool::on_ram_disk("member");
            let device = pool.volume("v", "64M");
            write_physical_volume(&device);
            pool.detach("v");
            // LVM's own rules decide when the device appears.
            let device = pool.attach("v");
            let properties = udev.properties(&device.path);
            let has = |line: &str| properties.lines().any(|found| found == line);
            assert!(has("ID_FS_TYPE=LVM2_member"), "{release:?}: {properties}");
            // What LVM's rules do for a device that they go on to activate.
            let by_id = format!("/dev/disk/by-id/lvm-pv-uuid-{}", physical_volume_id());
            assert_eq!(link(&by_id).is_some(), is_activated, "{release:?}");
            // What those of arrays look at.
            assert_ne!(has("SYSTEMD_READY=0"), is_activated, "{release:?}");
        }
    }
}

const PV_ID: &str = "0123456789abcdefghijklmnopqrstuv";

/// As LVM writes it for people.
fn physical_volume_id() -> String {
    let groups = [0..6, 6..10, 10..14, 14..18, 18..22, 22..26, 26..32];
    groups.map(|group| PV_ID[group].to_owned()).join("-")
}

/// Writes the label of an empty physical volume.
fn write_physical_volume(device: &Device) {
    let mut sector = [0_u8; 512];
    sector[0..8].copy_from_slice(b"LABELONE");
    sector[8..16].copy_from_slice(&1_u64.to_le_bytes());
    sector[20..24].copy_from_slice(&32_u32.to_le_bytes());
    sector[24..32].copy_from_slice(b"LVM2 001");
    sector[32..64].copy_from_slice(PV_ID.as_bytes());
    sector[64..72].copy_from_slice(&(64 * MIB).to_le_bytes());
    let checksum = lvm_checksum(&sector[20..]);
    sector[16..20].copy_from_slice(&checksum.to_le_bytes());
    std::fs::write("/run/label", sector).expect("the label can be written");
    shell(&format!(
        "dd if=/run/label of={} bs=512 seek=1 conv=fsync,notrunc status=none; rm /run/label",
        device.path
    ));
}

/// CRC-32 with LVM's own start and without the closing inversion.
fn lvm_checksum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0xf597_a6cf, |crc: u32, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| {
            if crc & 1 == 1 {
                crc >> 1 ^ 0xedb8_8320
            } else {
                crc >> 1
            }
        })
    })
}
