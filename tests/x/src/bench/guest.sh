# Runs every job on every target, on the same RAM disk. One line per result: @bench TARGET JOB TERSE...
# TARGETS: in this order, some of them several times.
export UBLKCTL_STATE_DIR=/run/state UBLKCTL_RUNTIME_DIR=/run/ublkctl
set -e

# Every page of the RAM disk exists before anything is timed.
dd if=/dev/zero of=/dev/ram0 bs=1M count=768 oflag=direct status=none

measure() {
  export DEVICE=$2
  fio --name=fill --filename="$DEVICE" --rw=write --bs=256k --iodepth=8 --ioengine=libaio --direct=1 --size=256M \
    --eta=never --minimal >/dev/null
  for job in /root/*.fio; do
    name=$(basename "$job" .fio)
    echo "@bench $1 $name $(fio --eta=never --minimal "$job" | tail -n 1)"
  done
}

for target in $TARGETS; do
  case $target in
  rublk)
    /root/rublk add loop -n 0 -q 2 -d 128 --quiet -f /dev/ram0 >/run/rublk.log 2>&1
    while [ ! -b /dev/ublkb0 ]; do sleep 0.1; done
    measure rublk /dev/ublkb0
    /root/rublk del -n 0 >/run/rublk.log 2>&1
    ;;
  rublk-zc)
    /root/rublk add loop -n 0 -q 2 -d 128 -z --quiet -f /dev/ram0 >/run/rublk.log 2>&1
    while [ ! -b /dev/ublkb0 ]; do sleep 0.1; done
    measure rublk-zc /dev/ublkb0
    /root/rublk del -n 0 >/run/rublk.log 2>&1
    ;;
  ublkctl)
    dd if=/dev/zero of=/dev/ram0 bs=1M count=8 oflag=direct conv=notrunc status=none
    ublkctl pool create bench /dev/ram0 --force
    ublkctl create bench/v --size 256M
    measure ublkctl "$(ublkctl attach bench/v --queues 2 --depth 128)"
    ublkctl detach bench/v
    ublkctl pool destroy bench --force 2>/dev/null || ublkctl pool destroy bench
    ;;
  esac
done
