#!/bin/bash
# Boot a systemd as PID 1 in new namespaces, on an overlay of /, so that its writes do not reach the host.
#   boot.sh prepare CGROUP WORK [FROM=TO ...]    CGROUP: an empty cgroup2; WORK: an empty directory, becomes a
#                                                tmpfs; FROM=TO: FROM is seen at TO, read-only
# Returns when the last process of the namespaces has ended. Until the machine has booted, its / is WORK/root.
set -eu

if [ "$1" = prepare ]; then
    echo $$ >"$2/cgroup.procs"
    exec unshare --pid --fork --kill-child --mount --uts --ipc --net --cgroup --propagation private -- \
        "$BASH" "$0" boot "${@:3}"
fi

work=$2
root=$work/root
mount -t tmpfs tmpfs "$work"
mkdir "$work/upper" "$work/scratch" "$root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$work/upper,workdir=$work/scratch" "$root"
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"

mount -t tmpfs -o mode=755 tmpfs "$root/dev"
for device in null zero full random urandom tty; do
    touch "$root/dev/$device"
    mount --bind "/dev/$device" "$root/dev/$device"
done
ln -s /proc/self/fd "$root/dev/fd"
ln -s /proc/self/fd/0 "$root/dev/stdin"
ln -s /proc/self/fd/1 "$root/dev/stdout"
ln -s /proc/self/fd/2 "$root/dev/stderr"
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"
mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
mount -t tmpfs -o mode=755 tmpfs "$root/run"
mount -t tmpfs -o mode=1777 tmpfs "$root/tmp"

for share in "${@:3}"; do
    mkdir -p "$root${share#*=}"
    mount --bind "${share%%=*}" "$root${share#*=}"
    mount -o remount,bind,ro "$root${share#*=}"
done

# Start none of the host's services except those of basic.target: the journal and tmpfiles.
hostname fd-dp-test
echo >"$root/etc/fstab"
tr -d - </proc/sys/kernel/random/uuid >"$root/etc/machine-id"
rm -rf "$root/etc/systemd/system"
mkdir -p "$root/etc/systemd/system"
for unit in systemd-udevd.service systemd-udev-trigger.service systemd-firstboot.service; do
    ln -s /dev/null "$root/etc/systemd/system/$unit"
done

cd "$root"
mkdir .host
pivot_root . .host
cd /
umount -l /.host
rmdir /.host
# On a real machine systemd does this. Units get their credentials through shared mounts.
mount --make-rshared /
exec env -i container=fd-dp-test PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin TERM=dumb \
    /lib/systemd/systemd --system --unit=basic.target --show-status=0
