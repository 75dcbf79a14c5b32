#!/usr/bin/env bash
# clean-root.sh SUITE MAJOR DIR: makes DIR a small Debian of that release with its PostgreSQL and nothing of ours, in which
# packages are tried. Made once; a test works on a copy of it.
#
# Exit status 3: it cannot be had here.
set -euo pipefail
umask 022
suite=$1
major=$2
dir=$3
here=$(cd "$(dirname "$0")" && pwd)

if [ -e "$dir" ]; then exit 0; fi

unavailable() {
    echo "A clean Debian ($suite) to try packages in is not available here: $1" >&2
    exit 3
}
. "$here/debian.sh"

[ "$(id -u)" = 0 ] || unavailable "only root can enter one."
mirror=$(debian_mirror)
work=$dir.part
rm -rf "$work"
mkdir -p "$work"
mmdebstrap=$(debian_mmdebstrap "$work")

echo "==> making a clean Debian ($suite) with PostgreSQL $major in ${dir#"$PWD"/} (a minute or two, once)"
# Nothing is started by being installed. The lists are removed, so that nothing else can be installed later.
"$mmdebstrap" --mode=root --variant=minbase --include="postgresql-$major,adduser" --format=directory \
    --essential-hook='printf "#!/bin/sh\nexit 101\n" >"$1/usr/sbin/policy-rc.d"; chmod 755 "$1/usr/sbin/policy-rc.d"' \
    --essential-hook='mkdir -p "$1/etc/postgresql-common"; echo "create_main_cluster = false" >"$1/etc/postgresql-common/createcluster.conf"' \
    --customize-hook='mkdir -p "$1/dev/shm"; chmod 1777 "$1/dev/shm"' \
    "$suite" "$work/root" "$mirror" >"$work/log" 2>&1 ||
    { tail -5 "$work/log" >&2 && unavailable "mmdebstrap failed."; }
mv "$work/root" "$dir"
rm -rf "$work"
