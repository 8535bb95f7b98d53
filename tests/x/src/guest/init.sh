#!/bin/busybox sh
# The guest's first process: prepares it, runs /command, reports its exit status, powers off.
export PATH=/usr/bin:/usr/sbin:/bin:/sbin HOME=/root TERM=dumb LANG=C.UTF-8
busybox mount -t proc proc /proc
busybox mount -t sysfs sys /sys
busybox mount -t devtmpfs dev /dev
mkdir -p /dev/shm /dev/pts
busybox mount -t devpts pts /dev/pts
for place in /run /tmp /dev/shm; do busybox mount -t tmpfs -o mode=1777 tmpfs "$place"; done
hostname guest
modprobe brd rd_nr=2 rd_size=1048576 max_part=0
modprobe loop
modprobe ublk_drv
[ -d /sys/bus/virtio/devices ] && modprobe virtio_blk
boot_lines=$(dmesg | wc -l)
echo "@@x up $(uname -r)"

# Through a pipe, so that programs don't take the console for a person's terminal. Daemons that
# the command left behind may hold the pipe open: nobody waits for its end.
mkfifo /run/output
cat /run/output &
cd /root
setsid /bin/sh /command </dev/null >/run/output 2>&1
status=$?
if [ "$status" -ne 0 ]; then
  echo "what the kernel said meanwhile:"
  dmesg | tail -n "+$((boot_lines + 1))" | tail -n 40
else
  # Nothing may go wrong unnoticed because the command did not mind.
  dmesg | tail -n "+$((boot_lines + 1))" | grep -E 'BUG:|WARNING:|Oops|blocked for more than|refcount_t' | head -n 20
fi
sleep 0.3
echo
echo "@@x exit $status"
sync
poweroff -f
