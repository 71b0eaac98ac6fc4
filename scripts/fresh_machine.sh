#!/usr/bin/env bash
# Runs the README's commands on a bare Debian 12: a minimal root, made for this and removed at the end, with a clone of
# HEAD in it and nothing else. Exit code 77: no such root can be made here, and a line says why.
#
#   scripts/fresh_machine.sh [demo|test|all]
#
# The package archive and the settings for reaching it are those of this machine. CCACHE_DIR names a compiler cache that
# the builds inside may use.
set -euo pipefail
cd "$(dirname "$0")/.."
suite=bookworm

case "${1:-all}" in
  demo) commands=(scripts/demo.sh) ;;
  test) commands=(scripts/test.sh) ;;
  all) commands=(scripts/demo.sh scripts/test.sh) ;;
  *)
    echo "usage: scripts/fresh_machine.sh [demo|test|all]" >&2
    exit 2
    ;;
esac

no_root() {
  echo "fresh_machine.sh: no bare Debian 12 can be made here: $1" >&2
  exit 77
}

[ "$(id -u)" -eq 0 ] || no_root "it takes root rights"
unshare --mount --pid --fork true 2>/dev/null || no_root "no mounts of its own are allowed"
reason=$({ . scripts/packages.sh && install_missing debootstrap >/dev/null; } 2>&1) || no_root "$reason"
archive=$(apt-get indextargets --format '$(RELEASE) $(SITE)' 'Created-By: Packages' |
  awk -v suite=$suite '$1 == suite && !found++ { print $2 }')
[ -n "$archive" ] || no_root "apt's sources on this machine do not name the archive of $suite"

root=$(mktemp -d "${TMPDIR:-/tmp}/circlet-bare-debian.XXXXXX")
inside=
# Every mount is in the name space of the processes inside and ends with the last of them. A path that is a mount point
# all the same is not ours to delete.
tear_down() {
  trap '' INT TERM HUP
  if [ -n "$inside" ]; then
    kill -KILL "$inside" 2>/dev/null || true
    wait "$inside" 2>/dev/null || true
  fi
  if grep -qF " $root" /proc/self/mountinfo; then
    echo "fresh_machine.sh: $root is left there: something is mounted in it" >&2
  else
    rm -rf --one-file-system "$root"
  fi
}
trap tear_down EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

# Runs "$@" as the first process of a name space of mounts and processes; a signal to this script is acted on at once
# because it waits for a process in the background.
run_apart() {
  local status=0
  unshare --mount --propagation private --pid --fork --kill-child -- "$@" </dev/null &
  inside=$!
  wait "$inside" || status=$?
  inside=
  return $status
}

run_inside() {
  # $0 is the root, $1 the compiler cache. debootstrap has made the devices.
  run_apart bash -euc 'root=$0 cache=$1
    shift
    mount -t proc proc "$root/proc"
    mount -t sysfs -o ro sysfs "$root/sys"
    mount -t devpts -o newinstance,ptmxmode=0666 devpts "$root/dev/pts"
    mount -t tmpfs -o mode=1777 tmpfs "$root/dev/shm"
    # A quota of processor time takes a group of the cpu controller, where this machine has it as a tree of its own
    # (version 1). That tree alone is shared: a group that is made inside is one of the machine.
    if [ -e /sys/fs/cgroup/cpu/tasks ]; then
      groups=$root/sys/fs/cgroup
      tree=$(basename "$(readlink -f /sys/fs/cgroup/cpu)") # cpu, or a joint one that the name cpu is a link to
      mount -t tmpfs -o mode=755 tmpfs "$groups"
      mkdir "$groups/$tree"
      [ "$tree" = cpu ] || ln -s "$tree" "$groups/cpu"
      mount --bind "/sys/fs/cgroup/$tree" "$groups/$tree"
    fi
    if [ -n "$cache" ]; then mount --bind "$cache" "$root/ccache"; fi
    exec chroot "$root" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root "$@"' "$root" "$cache" \
    ${http_proxy:+http_proxy="$http_proxy"} ${https_proxy:+https_proxy="$https_proxy"} \
    ${cache:+CCACHE_DIR=/ccache CCACHE_BASEDIR=/circlet CCACHE_NOHASHDIR=1} "$@"
}

cache=
if [ -n "${CCACHE_DIR:-}" ] && mkdir -p "$CCACHE_DIR" 2>/dev/null; then cache=$CCACHE_DIR; fi

log=$root.log
run_apart debootstrap --variant=minbase --include=ca-certificates $suite "$root" "$archive" >"$log" 2>&1 || {
  reason=$(grep -m 1 '^E: ' "$log" || tail -n 1 "$log")
  rm -f "$log"
  no_root "debootstrap: $reason"
}
rm -f "$log"
# apt's sources, the keys that they may name, and how files are fetched; not the hooks, which call what is not inside.
rm -rf "$root"/etc/apt/sources.list "$root"/etc/apt/sources.list.d
for path in /etc/apt/sources.list /etc/apt/sources.list.d /etc/apt/keyrings /etc/apt/trusted.gpg.d /usr/share/keyrings; do
  if [ -e "$path" ]; then cp -RL "$path" "$root${path%/*}/"; fi
done
apt-config dump | grep '^Acquire::' >"$root/etc/apt/apt.conf.d/90machine"
cp -L /etc/resolv.conf /etc/hosts "$root/etc/"
mkdir "$root/ccache"
run_inside apt-get update -qq >/dev/null 2>&1 && run_inside apt-cache show g++ >/dev/null 2>&1 ||
  no_root "the package archive is out of reach from inside"
# ccache brings run-time libraries only, so it cannot stand in for a package that the build needs, and an object from the
# cache has been compiled from the same headers.
if [ -n "$cache" ]; then
  run_inside apt-get install -qq --no-install-recommends ccache >/dev/null 2>&1 || cache=
fi

git clone -q --depth 1 "file://$PWD" "$root/circlet"
for command in "${commands[@]}"; do
  echo "=== bare Debian 12: $command"
  status=0
  run_inside bash -c "cd /circlet && $command" || status=$?
  [ $status -eq 0 ] || exit $((status == 77 ? 1 : status))
done
