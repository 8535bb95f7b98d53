# Runs the jobs on every target, on the same RAM disk. One line per result: @bench TARGET JOB TERSE...
# TARGETS: in this order, some of them several times. QUEUES: of each ublk device.
# A target is a few functions: T_open makes a device of which nothing is written and puts its path into DEVICE, T_snapshot
# takes a snapshot, T_clone puts a clone of a new snapshot into DEVICE, T_close takes everything away.
# JOBS: the folder of the jobs. RUBLK: the peer's program.
JOBS=${JOBS:-/root} RUBLK=${RUBLK:-/root/rublk}
export UBLKCTL_STATE_DIR=/run/state UBLKCTL_RUNTIME_DIR=/run/ublkctl DM_DISABLE_UDEV=1
set -e

raw_open() { DEVICE=/dev/ram0; }
raw_close() { :; }

rublk_open() {
  "$RUBLK" add "$@" -n 0 -q "$QUEUES" -d 128 --quiet >/run/rublk.log 2>&1
  DEVICE=/dev/ublkb0
  while [ ! -b $DEVICE ]; do sleep 0.1; done
  SERVER=$(pidof rublk | tr ' ' '\n' | tail -n 1)
}
# Now and then it fails after the device is gone.
rublk_close() {
  "$RUBLK" del -n 0 >/run/rublk.log 2>&1 || {
    sleep 1
    [ ! -b /dev/ublkb0 ] || "$RUBLK" del -n 0
  }
}
null_open() { rublk_open null; }
null_close() { rublk_close; }
loop_open() { rublk_open loop -f /dev/ram0; }
loop_close() { rublk_close; }
loop_z_open() { rublk_open loop -z -f /dev/ram0; }
loop_z_close() { rublk_close; }

# As LVM makes a thin pool: chunks of 64 KiB, zeroed where they are not written whole.
make_dm() { dmsetup create "$1" --table "$2"; }
thin_open() {
  dd if=/dev/zero of=/dev/ram1 bs=4k count=1 oflag=direct status=none
  make_dm pool "0 $(blockdev --getsz /dev/ram0) thin-pool /dev/ram1 /dev/ram0 128 0"
  dmsetup message pool 0 'create_thin 0'
  make_dm thin0 "0 524288 thin /dev/mapper/pool 0"
  DEVICE=/dev/mapper/thin0
  NUMBER=0
}
thin_snapshot() {
  NUMBER=$((NUMBER + 1))
  dmsetup suspend thin0
  dmsetup message pool 0 "create_snap $NUMBER 0"
  dmsetup resume thin0
}
thin_close() {
  dmsetup remove thin0
  dmsetup remove pool
}

snapshot_open() {
  make_dm origin "0 524288 linear /dev/ram0 0"
  DEVICE=/dev/mapper/origin
}
snapshot_snapshot() {
  [ -z "$(dmsetup ls --target snapshot | grep copies)" ] || return 0
  dd if=/dev/zero of=/dev/ram1 bs=4k count=1 oflag=direct status=none
  make_dm below "0 524288 linear /dev/ram0 0"
  dmsetup suspend origin
  make_dm copies "0 524288 snapshot /dev/mapper/below /dev/ram1 P 8"
  dmsetup reload origin --table "0 524288 snapshot-origin /dev/mapper/below"
  dmsetup resume origin
}
snapshot_close() {
  for name in origin copies below; do
    ! dmsetup info "$name" >/dev/null 2>&1 || dmsetup remove "$name"
  done
}

btrfs_open() {
  mkfs.btrfs -q -f /dev/ram0
  mount -t btrfs /dev/ram0 /mnt
  truncate -s 256M /mnt/disk
  DEVICE=$(losetup --direct-io=on --find --show /mnt/disk)
  NUMBER=0
}
btrfs_snapshot() {
  NUMBER=$((NUMBER + 1))
  sync
  busybox cp --reflink=always /mnt/disk "/mnt/snapshot$NUMBER"
}
btrfs_close() {
  losetup --detach "$DEVICE"
  umount /mnt
}

qcow2_connect() {
  qemu-nbd --socket=/run/nbd0.socket --connect=/dev/nbd0 --format=qcow2 --cache=none --aio=io_uring --discard=unmap --fork "/mnt/disk$NUMBER" >/dev/null
  while [ "$(cat /sys/block/nbd0/size)" = 0 ]; do sleep 0.1; done
  DEVICE=/dev/nbd0
}
qcow2_disconnect() {
  qemu-nbd --disconnect /dev/nbd0 >/dev/null
  while [ "$(cat /sys/block/nbd0/size)" != 0 ]; do sleep 0.1; done
  # The program has its files open a little longer.
  while pidof qemu-nbd >/dev/null; do sleep 0.1; done
}
qcow2_open() {
  modprobe nbd
  mkfs.ext4 -q -F /dev/ram0
  mount -t ext4 /dev/ram0 /mnt
  NUMBER=0
  qemu-img create -q -f qcow2 /mnt/disk0 256M
  qcow2_connect
}
qcow2_snapshot() {
  qcow2_disconnect
  NUMBER=$((NUMBER + 1))
  qemu-img create -q -f qcow2 -F qcow2 -b "/mnt/disk$((NUMBER - 1))" "/mnt/disk$NUMBER"
  qcow2_connect
}
qcow2_close() {
  qcow2_disconnect
  umount /mnt
}

ublkctl_open() {
  dd if=/dev/zero of=/dev/ram0 bs=1M count=8 oflag=direct conv=notrunc status=none
  ublkctl pool create bench /dev/ram0 --force >/dev/null
  ublkctl create bench/v0 --size 256M
  DEVICE=$(ublkctl attach bench/v0 --queues "$QUEUES" --depth 128)
  SERVER=$(pidof ublkctl | tr ' ' '\n' | tail -n 1)
  NUMBER=0
  VOLUME=bench/v0
}
ublkctl_snapshot() {
  NUMBER=$((NUMBER + 1))
  ublkctl snapshot "$VOLUME@s$NUMBER"
}
ublkctl_clone() {
  ublkctl_snapshot
  ublkctl clone "$VOLUME@s$NUMBER" "bench/v$NUMBER"
  VOLUME=bench/v$NUMBER
}
ublkctl_attach() { DEVICE=$(ublkctl attach "$VOLUME" --queues "$QUEUES" --depth 128); }
ublkctl_close() {
  for node in /dev/blockfork/bench/*; do ublkctl detach "bench/$(basename "$node")"; done
  ublkctl pool destroy bench --force 2>/dev/null || ublkctl pool destroy bench
}

# Every page of the RAM disk exists before anything is timed, also those that the target before discarded.
open() {
  dd if=/dev/zero of=/dev/ram0 bs=1M count=1024 oflag=direct status=none
  "$1_open"
}
has() { command -v "$1" >/dev/null; }
# Time on a processor: with one, and a clock that counts instructions, those of the server alone.
spent() { cat "/proc/$SERVER"/task/*/schedstat 2>/dev/null | { sum=0; while read -r ns _; do sum=$((sum + ns)); done; echo "$sum"; }; }

run() {
  [ -f "$JOBS/$2.fio" ] || return 0
  export DEVICE
  before=$(spent)
  result=$(fio --eta=never --minimal "$JOBS/$2.fio" | tail -n 1)
  after=$(spent)
  echo "@bench $1 $2 $result"
  [ -z "$SERVER" ] || echo "@spent $1 $2 $((after - before)) $result"
}
fill() {
  fio --name=fill --filename="$DEVICE" --rw=write --bs=256k --iodepth=8 --ioengine=libaio --direct=1 --size=256M \
    --eta=never --minimal >/dev/null
}
wanted() { for name in "$@"; do [ ! -f "$JOBS/$name.fio" ] || return 0; done; return 1; }

for target in $TARGETS; do
  function=$(echo "$target" | tr - _)
  function=${function#dm_}
  SERVER=
  if wanted randwrite-4k-fill && { has "${function}_snapshot" || [ "$target" = loop-z ]; }; then
    open "$function"
    run "$target" randwrite-4k-fill
    "${function}_close"
  fi
  open "$function"
  run "$target" write-256k-fill
  fill
  for job in randread-4k randread-4k-depth1 randwrite-4k-overwrite randwrite-4k-overwrite-depth1 read-256k \
    write-256k-overwrite randwrite-4k-fdatasync randwrite-4k-fdatasync-8jobs; do
    run "$target" "$job"
  done
  if wanted randwrite-4k-after-snapshot && has "${function}_snapshot"; then
    "${function}_snapshot"
    run "$target" randwrite-4k-after-snapshot
  fi
  if wanted randread-4k-under-snapshots && has "${function}_snapshot"; then
    count=15
    [ "$target" != ublkctl ] || count=1000
    while [ "$count" -gt 0 ]; do
      dd if=/dev/urandom of="$DEVICE" bs=4k count=4 seek=$((count * 64)) oflag=direct conv=notrunc status=none
      "${function}_snapshot"
      count=$((count - 1))
    done
    run "$target" randread-4k-under-snapshots
  fi
  if wanted randread-4k-deep-clone && has "${function}_clone"; then
    count=100
    while [ "$count" -gt 0 ]; do
      "${function}_clone"
      count=$((count - 1))
    done
    "${function}_attach"
    run "$target" randread-4k-deep-clone
  fi
  "${function}_close"
done
