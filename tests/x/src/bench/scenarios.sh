# What a job on one volume does not show: commands beside a load, many volumes, a device whose flush costs time, system
# calls, and what a snapshot does to the order on the device.
# One line per measurement: @figure NAME NUMBER; several lines of a name are several turns.
export UBLKCTL_STATE_DIR=/run/state UBLKCTL_RUNTIME_DIR=/run/ublkctl DM_DISABLE_UDEV=1
set -e
mount -t tracefs tracefs /sys/kernel/tracing
TURNS="1 2 3 4 5"

now() { date +%s%N; }
# How long a command takes, in microseconds.
timed() {
  name=$1
  shift
  begin=$(now)
  "$@" >/run/said
  end=$(now)
  echo "@figure $name $(((end - begin) / 1000))"
}
fio_minimal() { fio --ioengine=libaio --direct=1 --eta=never --minimal "$@"; }
# Fields of fio's terse lines, format 3, added up over the jobs: 8 and 49 are requests per second, 80 the longest write in us.
rate() { awk -F ';' '{ sum += $8 + $49 } END { printf "%d\n", sum }'; }
longest() { awk -F ';' '$80 > most { most = $80 } END { printf "%d\n", most }'; }
fill() { fio_minimal --name=fill --filename="$1" --rw=write --bs=256k --iodepth=8 --size="$2" >/dev/null; }
pages() { dd if=/dev/zero of=/dev/ram0 bs=1M count=1024 oflag=direct status=none; }
pool() {
  pages
  ublkctl pool create bench "$1" --force >/dev/null
}
end_pool() {
  for node in /dev/blockfork/bench/*; do ublkctl detach "bench/$(basename "$node")"; done
  ublkctl pool destroy bench --force
}

# Now and then it fails after the device is gone.
end_loop() {
  /root/rublk del -n 0 >/run/said 2>&1 || {
    sleep 1
    [ ! -b /dev/ublkb0 ] || /root/rublk del -n 0 >/run/said
  }
}

# The longest write in a second: by itself, with a snapshot in it, and with a command that only asks the daemon, since
# whatever runs takes processors from the job.
stall() {
  pool /dev/ram0
  ublkctl create bench/v --size 256M
  device=$(ublkctl attach bench/v --queues 2 --depth 128)
  fill "$device" 256M
  for turn in $TURNS; do
    for beside in nothing list snapshot; do
      sleep 0.5
      case $beside in
        list) { sleep 0.5; ublkctl list bench >/run/said; } & ;;
        snapshot) { sleep 0.5; ublkctl snapshot "bench/v@s$turn"; } & ;;
      esac
      fio_minimal --name=stall --filename="$device" --rw=randwrite --bs=4k --iodepth=32 --size=256M --time_based --runtime=1 |
        longest | sed "s/^/@figure longest-write-with-$beside-us /"
      wait
    done
  done
  end_pool
}

# What a fork costs until it can be used; beside it a loop device of the same driver.
fork_to_usable() {
  pool /dev/ram0
  ublkctl create bench/v --size 256M
  device=$(ublkctl attach bench/v --queues 2 --depth 128)
  fill "$device" 256M
  ublkctl snapshot bench/v@s
  for turn in $TURNS; do
    timed clone-us ublkctl clone bench/v@s "bench/c$turn"
    timed attach-us ublkctl attach "bench/c$turn" --queues 2 --depth 128
    timed list-us ublkctl list bench
  done
  end_pool
  for turn in $TURNS; do
    timed loop-add-us /root/rublk add loop -z -f /dev/ram0 -n 0 -q 2 -d 128 --quiet
    end_loop
  done
}

# A device with a cache, as a RAM disk has none, that takes 20 ms for a flush.
delayed() {
  modprobe null_blk nr_devices=0
  mount -t configfs configfs /sys/kernel/config
  mkdir /sys/kernel/config/nullb/cached
  for setting in size=640 memory_backed=1 cache_size=16 irqmode=0 power=1; do
    echo "${setting#*=}" >"/sys/kernel/config/nullb/cached/${setting%=*}"
  done
  # Older kernels give it a number.
  cached=cached
  [ -b /dev/cached ] || cached=nullb0
  set -- /dev/$cached 0
  dmsetup create delayed --table "0 $(blockdev --getsz "$1") delay $* 0 $* 0 $* 20"
}
# Blocks of 4 KiB that the device was given, and its flushes, so far: fields 7 and 16 of its stat file.
below() { awk '{ print $7 / 8, $16 }' /sys/block/$cached/stat; }
# The delayed device answers with a tick of the clock, of which there are 250 a second: so that each turn begins at another
# time between two of them.
stagger() { sleep "0.10$((turn * 8))"; }
slow_flushes() {
  delayed
  pool /dev/mapper/delayed
  ublkctl create bench/v --size 256M
  device=$(ublkctl attach bench/v --queues 2 --depth 128)
  fill "$device" 256M
  for turn in $TURNS; do
    timed snapshot-slow-flush-us ublkctl snapshot "bench/v@s$turn"
    dd if=/dev/zero of="$device" bs=4k count=64 oflag=direct conv=notrunc,fsync status=none
    stagger
    timed rollback-slow-flush-us ublkctl rollback "bench/v@s$turn"
    # What is left to do in the background is done before the next turn.
    sleep 3
    timed list-slow-flush-us ublkctl list bench
    stagger
    timed flush-us dd if=/dev/zero of=/dev/mapper/delayed bs=4k count=0 conv=notrunc,fsync status=none
    timed no-flush-us dd if=/dev/zero of=/dev/ram0 bs=4k count=0 conv=notrunc,fsync status=none
  done
  set -- --filename="$device" --rw=randwrite --bs=4k --fdatasync=1 --size=256M --time_based --runtime=3
  # In place: no mapping changes.
  for turn in $TURNS; do ublkctl rm "bench/v@s$turn"; done
  sleep 3
  before=$(below)
  synced=$(fio_minimal --name=one "$@" | tee /run/one | awk -F ';' '{ print $47 / 4 }')
  after=$(below)
  echo "$before $after $synced" | awk '{ print "@figure in-place-blocks-per-sync " ($3 - $1) / $5; print "@figure in-place-flushes-per-sync " ($4 - $2) / $5 }'
  echo "@figure slow-flush-1-job $(rate </run/one)"
  echo "@figure slow-flush-8-jobs $(fio_minimal --name=eight --numjobs=8 "$@" | rate)"
  jobs=
  for number in $(seq 8); do
    ublkctl create "bench/v$number" --size 4M
    small=$(ublkctl attach "bench/v$number" --queues 1 --depth 32)
    fill "$small" 4M
    jobs="$jobs --name=v$number --filename=$small"
  done
  # shellcheck disable=SC2086 # words
  echo "@figure slow-flush-8-volumes $(fio_minimal --rw=randwrite --bs=4k --fdatasync=1 --size=4M --time_based --runtime=3 $jobs | rate)"
  ublkctl snapshot bench/v@last
  before=$(below)
  synced=$(fio_minimal --name=one "$@" | awk -F ';' '{ print $47 / 4 }')
  after=$(below)
  echo "$before $after $synced" | awk '{ print "@figure redirected-blocks-per-sync " ($3 - $1) / $5; print "@figure redirected-flushes-per-sync " ($4 - $2) / $5 }'
  end_pool
  # The same 8 jobs where no engine decides who shares a flush.
  /root/rublk add loop -z -f /dev/mapper/delayed -n 0 -q 2 -d 128 --quiet >/run/said
  shift
  echo "@figure slow-flush-loop-z-1-job $(fio_minimal --name=one --filename=/dev/ublkb0 "$@" | rate)"
  echo "@figure slow-flush-loop-z-8-jobs $(fio_minimal --name=eight --filename=/dev/ublkb0 --numjobs=8 "$@" | rate)"
  end_loop
  dmsetup remove delayed
}

# 64 jobs on a volume, and on 64 volumes.
volumes() {
  pool /dev/ram0
  ublkctl create bench/one --size 256M
  device=$(ublkctl attach bench/one --queues 2 --depth 128)
  fill "$device" 256M
  set -- --rw=randwrite --bs=4k --iodepth=4 --size=4M --time_based --runtime=2
  echo "@figure one-volume-64-jobs $(fio_minimal --filename="$device" "$@" --offset_increment=4M --numjobs=64 --name=one | rate)"
  ublkctl detach bench/one
  jobs=
  for number in $(seq 64); do
    ublkctl create "bench/v$number" --size 4M
    device=$(ublkctl attach "bench/v$number" --queues 2 --depth 128)
    fill "$device" 4M
    jobs="$jobs --name=v$number --filename=$device"
  done
  # shellcheck disable=SC2086 # words
  echo "@figure 64-volumes $(fio_minimal "$@" $jobs | rate)"
  end_pool
}

# System calls of a daemon's threads per request, by the kernel's own count.
calls() {
  event=/sys/kernel/tracing/events/raw_syscalls/sys_enter
  echo 'hist:keys=common_pid:size=4096' >"$event/trigger"
  requests=$(fio_minimal --filename="$DEVICE" --bs=4k --iodepth=32 --size=256M "$@" | awk -F ';' '{ print ($6 + $47) / 4 }')
  threads=$(ls "/proc/$SERVER/task")
  awk -v threads="$threads" -v requests="$requests" -v name="$NAME" '
    BEGIN { split(threads, list, "\n"); for (at in list) server[list[at]] = 1 }
    /common_pid:/ { gsub(/[{}:,]/, " "); if ($2 in server) sum += $4 }
    END { print "@figure " name " " sum / requests }' "$event/hist"
  echo '!hist:keys=common_pid:size=4096' >"$event/trigger"
}
system_calls() {
  for turn in $TURNS; do
    pages
    /root/rublk add loop -z -f /dev/ram0 -n 0 -q 2 -d 128 --quiet >/run/said
    DEVICE=/dev/ublkb0
    SERVER=$(pidof rublk | tr ' ' '\n' | tail -n 1)
    NAME=calls-loop-z-read calls --name=read --rw=randread --time_based --runtime=1
    NAME=calls-loop-z-overwrite calls --name=write --rw=randwrite --time_based --runtime=1
    end_loop
    pool /dev/ram0
    ublkctl create bench/v --size 256M
    DEVICE=$(ublkctl attach bench/v --queues 2 --depth 128)
    SERVER=$(pidof ublkctl | tr ' ' '\n' | tail -n 1)
    fill "$DEVICE" 256M
    NAME=calls-read calls --name=read --rw=randread --time_based --runtime=1
    NAME=calls-overwrite calls --name=write --rw=randwrite --time_based --runtime=1
    ublkctl snapshot bench/v@s
    NAME=calls-redirect calls --name=write --rw=randwrite --io_size=64M
    end_pool
  done
}

# A sequential read before and after every block was written again, in random order, below a snapshot.
fragmentation() {
  pool /dev/ram0
  ublkctl create bench/v --size 256M
  device=$(ublkctl attach bench/v --queues 2 --depth 128)
  fill "$device" 256M
  set -- --name=read --filename="$device" --rw=read --bs=256k --iodepth=8 --size=256M --time_based --runtime=1
  echo "@figure sequential-read-fresh $(fio_minimal "$@" | rate)"
  ublkctl snapshot bench/v@s
  fio_minimal --name=write --filename="$device" --rw=randwrite --bs=4k --iodepth=32 --size=256M >/run/said
  echo "@figure sequential-read-redirected $(fio_minimal "$@" | rate)"
  end_pool
}

for scenario in $SCENARIOS; do
  "$scenario"
done
