# How long `ublkctl snapshot` takes: for volumes that hold more and more, and with more and more snapshots around.
# The pool lies on zram, which keeps a page of one repeated word without memory: so 64 GiB fit into this guest.
# One line per measurement: @snapshot GIB-MAPPED SNAPSHOTS-BEFORE MICROSECONDS...
export UBLKCTL_STATE_DIR=/run/state UBLKCTL_RUNTIME_DIR=/run/ublkctl
set -e
modprobe zram
echo "$((LARGEST + 8))G" >/sys/block/zram0/disksize
ublkctl pool create bench /dev/zram0 --force

measure() {
  line=
  for turn in 1 2 3 4 5; do
    begin=$(date +%s%N)
    ublkctl snapshot "bench/$1@$2-$turn"
    end=$(date +%s%N)
    line="$line $(((end - begin) / 1000))"
    # A write after each, so that the next one has something to share.
    dd if=/dev/urandom of="$DEVICE" bs=64k count=4 oflag=direct conv=notrunc status=none
  done
  echo "@snapshot $3 $4$line"
}

# The second volume is larger than the pool, as a sparse one may be.
for size in 1 $LARGEST; do
  whole=${size}G
  [ "$size" = 1 ] || whole=1T
  ublkctl create "bench/v$size" --size "$whole"
  DEVICE=$(ublkctl attach "bench/v$size" --queues 2)
  fio --name=fill --filename="$DEVICE" --rw=write --bs=512k --iodepth=4 --ioengine=libaio --direct=1 \
    --size="${size}G" --buffer_pattern=0x5a --eta=never --minimal >/dev/null
  measure "v$size" first "$size" 0
done

DEVICE=$(readlink -f /dev/blockfork/bench/v1)
number=0
while [ "$number" -lt 500 ]; do
  ublkctl snapshot "bench/v1@many-$number"
  number=$((number + 1))
done
measure v1 second 1 500
