#!/bin/bash
# A clean Debian host with systemd as PID 1, made of namespaces, an overlay and cgroups: no virtual machine, no daemon.
#
#   host.sh image              makes the base system of SUITE once (kept under CACHE by what is in it)
#   host.sh up                 boots systemd on a fresh overlay of it; only loopback, no way out
#   host.sh run COMMAND...     runs inside; one argument is a line for bash
#   host.sh net COMMAND...     runs a program of this machine in the host's network
#   host.sh put FILE PATH      copies a file in
#   host.sh reboot | down | name
#
# SUITE (bookworm | trixie), HOST (a name; hosts of other names run beside), CACHE. Root, x86-64 or arm64, Debian's mmdebstrap.
#
# What such a host is not: it shares the kernel and its clock with this machine, so it gets no capability that reaches
# through (clock, modules, boot, syslog), /proc/sys is read-only, and its udev sees no devices.
set -euo pipefail
cd "$(dirname "$0")"
. ../real/servers/lib.sh

SUITE=${SUITE:-bookworm}
HOST=${HOST:-ds-$SUITE}
HOSTS=${DEALSCALE_HOSTS:-/run/dealscale-hosts}
HERE=$HOSTS/$HOST
ROOT=$HERE/root

# Installed in the base: what a minimal cloud image has.
INSTALLED=systemd,systemd-sysv,dbus,udev,apt,iproute2,procps,curl,libpam-systemd
# Only downloaded: what `apt install` of our package has to bring by itself, without a network.
DOWNLOADED='polkitd adduser ca-certificates openssh-server'
KEY=$(printf '%s\n' 2 "$SUITE" "$INSTALLED" "$DOWNLOADED" | sha256sum | cut -c1-10)
IMAGE=$CACHE/host-$SUITE-$KEY

# With these the host could change the machine that it shares a kernel with.
FORBIDDEN=-sys_time,-sys_module,-sys_boot,-syslog,-sys_rawio,-mac_admin,-mac_override,-wake_alarm,-block_suspend

[ "$(id -u)" = 0 ] || die "hosts need root"

image() {
  [ ! -e "$IMAGE/.complete" ] || return 0
  command -v mmdebstrap >/dev/null || ../real/servers/packages.sh host
  local new=$IMAGE.new.$$
  mkdir -p "$CACHE"
  PROGRESS_OF=$new with_progress "Debian $SUITE" "$CACHE/host-$SUITE.log" mmdebstrap --variant=minbase --include="$INSTALLED" \
    --dpkgopt=force-unsafe-io --aptopt='Acquire::Languages "none"' --aptopt='APT::Install-Recommends "false"' \
    --skip=cleanup/apt/lists --skip=cleanup/apt/cache \
    --customize-hook='chroot "$1" apt-get clean' \
    --customize-hook="chroot \"\$1\" apt-get -y -qq --download-only install $DOWNLOADED" \
    --customize-hook='echo "Binary::apt::APT::Keep-Downloaded-Packages \"1\";" >"$1/etc/apt/apt.conf.d/90-keep"' \
    --customize-hook='printf "127.0.0.1 localhost\n::1 localhost\n127.0.0.1 receiver.test\n" >"$1/etc/hosts"' \
    --customize-hook='rm -f "$1/etc/resolv.conf"; : >"$1/etc/machine-id"' \
    "$SUITE" "$new"
  touch "$new/.complete"
  rm -rf "$IMAGE"
  mv "$new" "$IMAGE"
}

# "hierarchy folder" of each control group that the host is put into: one of its own below ours.
groups() {
  if [ "$(stat -fc %T /sys/fs/cgroup)" = cgroup2fs ]; then
    echo "unified /sys/fs/cgroup/$HOST"
    return
  fi
  local line names path
  while IFS=: read -r _ names path; do
    case $names in
      '') [ ! -d /sys/fs/cgroup/unified ] || echo "unified /sys/fs/cgroup/unified${path%/}/$HOST" ;;
      name=systemd) echo "systemd /sys/fs/cgroup/systemd${path%/}/$HOST" ;;
      *) [ ! -d "/sys/fs/cgroup/$names" ] || echo "$names /sys/fs/cgroup/$names${path%/}/$HOST" ;;
    esac
  done </proc/self/cgroup
}

leader() { cat "$HERE/pid" 2>/dev/null; }

is_up() { local pid; pid=$(leader) && [ -n "$pid" ] && tr '\0' '\n' <"/proc/$pid/environ" 2>/dev/null | grep -qx "container=dealscale-host"; }

inside() {
  nsenter -t "$(leader)" -m -u -i -n -p -C -r -- env -C / -i HOME=/root TERM=dumb LANG=C.UTF-8 DEBIAN_FRONTEND=noninteractive \
    PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin setpriv --bounding-set "$FORBIDDEN" --inh-caps "$FORBIDDEN" -- "$@"
}

boot() {
  local group dir starter pid='' state
  groups >"$HERE/groups"
  while read -r group dir; do
    mkdir -p "$dir"
    # A cpuset without CPUs takes no process.
    [ "$group" != cpuset ] || for file in cpuset.cpus cpuset.mems; do cat "${dir%/*}/$file" >"$dir/$file"; done
  done <"$HERE/groups"
  SELF=$PWD/host.sh
  # The starter enters the groups first, so that the new cgroup namespace has them as its root.
  HERE=$HERE SELF=$SELF FORBIDDEN=$FORBIDDEN HOST=$HOST SUITE=$SUITE setsid bash -c '
    while read -r _ dir; do echo $$ >"$dir/cgroup.procs"; done <"$HERE/groups"
    exec unshare --mount --pid --fork --uts --ipc --net --cgroup --kill-child=KILL --propagation private bash "$SELF" become-init
  ' </dev/null >"$HERE/console" 2>&1 &
  starter=$!
  for _ in $(seq 200); do
    pid=$(cat "/proc/$starter/task/$starter/children" 2>/dev/null | tr -d ' ') || true
    [ -z "$pid" ] || break
    kill -0 "$starter" 2>/dev/null || { cat "$HERE/console" >&2; die "the host's first process did not start"; }
    sleep 0.02
  done
  echo "$pid" >"$HERE/pid"
  # The starter is outside of the host's process namespace; left in its groups it would be a process "0" that systemd chokes on.
  while read -r _ dir; do echo "$starter" >"${dir%/*}/cgroup.procs" 2>/dev/null || true; done <"$HERE/groups"
  for _ in $(seq 900); do
    kill -0 "$pid" 2>/dev/null || { cat "$HERE/console" >&2; die "the host's systemd ended"; }
    state=$(inside systemctl is-system-running 2>/dev/null) || true
    case $state in running | degraded) return 0 ;; esac
    sleep 0.1
  done
  inside systemctl list-jobs >&2 || true
  die "the host did not come up in 90 s"
}

up() {
  image
  down
  mkdir -p "$HERE/disk" "$ROOT"
  mount -t tmpfs -o mode=755,size="${DISK:-3G}" "$HOST" "$HERE/disk"
  mkdir "$HERE/disk/upper" "$HERE/disk/work"
  mount -t overlay overlay -o "lowerdir=$IMAGE,upperdir=$HERE/disk/upper,workdir=$HERE/disk/work" "$ROOT"
  echo "$HOST" >"$ROOT/etc/hostname"
  boot
}

# Runs as process 1 of the new namespaces: builds what a container manager would, then becomes systemd.
become_init() {
  local group dir node
  mount --bind "$ROOT" "$ROOT"
  cd "$ROOT"
  mount -t proc -o nosuid,nodev,noexec proc proc
  mount --bind proc/sys proc/sys
  mount -o remount,bind,ro proc/sys
  [ ! -e proc/sysrq-trigger ] || mount --bind /dev/null proc/sysrq-trigger
  mount -t sysfs -o ro,nosuid,nodev,noexec sysfs sys
  if grep -q '^unified /sys/fs/cgroup/unified' "$HERE/groups" || ! grep -q ^unified "$HERE/groups"; then
    mount -t tmpfs -o mode=755,nosuid,nodev,noexec tmpfs sys/fs/cgroup
    while read -r group dir; do
      mkdir "sys/fs/cgroup/$group"
      case $group in
        unified) mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 sys/fs/cgroup/unified ;;
        systemd) mount -t cgroup -o nosuid,nodev,noexec,none,name=systemd cgroup sys/fs/cgroup/systemd ;;
        *) mount -t cgroup -o "nosuid,nodev,noexec,$group" cgroup "sys/fs/cgroup/$group" ;;
      esac
    done <"$HERE/groups"
  else
    mount -t cgroup2 -o nosuid,nodev,noexec cgroup2 sys/fs/cgroup
  fi
  mount -t tmpfs -o mode=755,nosuid tmpfs dev
  mkdir dev/pts dev/shm dev/mqueue
  for node in null:3 zero:5 full:7 random:8 urandom:9; do mknod -m 666 "dev/${node%:*}" c 1 "${node#*:}"; done
  mknod -m 666 dev/tty c 5 0
  mount -t devpts -o newinstance,ptmxmode=0666,mode=620,gid=5 devpts dev/pts
  ln -s pts/ptmx dev/ptmx
  ln -s /proc/self/fd dev/fd
  for node in 0:stdin 1:stdout 2:stderr; do ln -s "fd/${node%:*}" "dev/${node#*:}"; done
  mount -t tmpfs -o mode=1777 tmpfs dev/shm
  mount -t mqueue mqueue dev/mqueue
  mount -t tmpfs -o mode=755,nosuid,nodev tmpfs run
  hostname "$HOST"
  mkdir -p .before
  pivot_root . .before
  # The old root can only be let go of by a program of the new one. Mounts are shared as a machine's are: in a container systemd leaves that as
  # it finds it, and credentials would not reach services.
  exec chroot . /bin/sh -c 'umount -l /.before; rmdir /.before; mount --make-rshared /
    exec env -i container=dealscale-host PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin \
      setpriv --pdeathsig KILL --bounding-set "$0" --inh-caps "$0" /lib/systemd/systemd --log-target=journal systemd.unit=multi-user.target' "$FORBIDDEN"
}

# Ends process 1 and with it everything inside; the disk stays.
halt() {
  local pid dir
  if is_up; then
    pid=$(leader)
    [ "${1:-}" != gently ] || { inside systemctl exit >/dev/null 2>&1 || true; for _ in $(seq 600); do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done; }
    kill -KILL "$pid" 2>/dev/null || true
    for _ in $(seq 200); do kill -0 "$pid" 2>/dev/null || break; sleep 0.05; done
  fi
  rm -f "$HERE/pid"
  [ ! -e "$HERE/groups" ] || for _ in $(seq 20); do
    while read -r _ dir; do [ ! -d "$dir" ] || find "$dir" -depth -type d -exec rmdir {} + 2>/dev/null || true; done <"$HERE/groups"
    cut -d' ' -f2 "$HERE/groups" | xargs -r ls -d >/dev/null 2>&1 || break
    sleep 0.1
  done
}

down() {
  halt
  ! mountpoint -q "$ROOT" || umount -l "$ROOT"
  ! mountpoint -q "$HERE/disk" || umount -l "$HERE/disk"
  rm -rf "$HERE"
}

case ${1:-} in
  image) locked "host-$SUITE" image ;;
  up) up ;;
  run) shift; is_up || die "$HOST is not up"; if [ $# = 1 ]; then inside bash -c "$1"; else inside "$@"; fi ;;
  net) shift; is_up || die "$HOST is not up"; exec nsenter -t "$(leader)" -n -- "$@" ;;
  put) is_up || die "$HOST is not up"; inside bash -c 'cat >"$1"' - "$3" <"$2" ;;
  reboot) halt gently; boot ;;
  down) down ;;
  name) echo "$HOST" ;;
  become-init) become_init ;;
  *) sed -n '2,16s/^# \{0,1\}//p' host.sh; exit 2 ;;
esac
