#!/usr/bin/env bash
# clean-root.sh DIR: makes DIR a small Debian 12 with PostgreSQL 15 and nothing of ours, in which packages are tried. Made
# once; a test works on a copy of it.
#
# Exit status 3: it cannot be had here.
set -euo pipefail
umask 022
dir=$1
suite=bookworm

if [ -e "$dir" ]; then exit 0; fi

unavailable() {
    echo "A clean root to try packages in is not available here: $1" >&2
    exit 3
}

[ "$(id -u)" = 0 ] || unavailable "only root can make one and enter it."
command -v apt-get >/dev/null || unavailable "there is no apt-get."

# The mirror that this machine uses, if it is a Debian.
mirror=$(apt-get indextargets --format '$(REPO_URI) $(SUITE) $(CODENAME)' 'Identifier: Packages' 2>/dev/null |
    awk '$3 == "bookworm" && $1 ~ /debian\/?$/ { print $1; exit }' || true)
mirror=${mirror:-http://deb.debian.org/debian}

work=$dir.part
rm -rf "$work"
mkdir -p "$work"

debootstrap=$(command -v debootstrap || true)
if [ -z "$debootstrap" ]; then
    mkdir "$work/deb"
    chmod 777 "$work/deb" # apt's own unprivileged user writes here
    fetch() { (cd "$work/deb" && apt-get download -q debootstrap 2>&1); }
    fetch >/dev/null || { apt-get update -q && fetch; } || unavailable "apt-get could not download debootstrap."
    dpkg-deb -x "$work"/deb/debootstrap_*.deb "$work/debootstrap"
    export DEBOOTSTRAP_DIR=$work/debootstrap/usr/share/debootstrap
    debootstrap=$work/debootstrap/usr/sbin/debootstrap
fi

echo "==> making a clean root with PostgreSQL 15 in ${dir#"$PWD"/} (a minute or two, once)"
"$debootstrap" --variant=minbase "$suite" "$work/root" "$mirror" >"$work/log" 2>&1 ||
    { tail -5 "$work/log" >&2 && unavailable "debootstrap failed."; }
cp -f /etc/resolv.conf "$work/root/etc/resolv.conf"
# Packages must not start services while they are installed.
printf '#!/bin/sh\nexit 101\n' >"$work/root/usr/sbin/policy-rc.d"
chmod 755 "$work/root/usr/sbin/policy-rc.d"
proxy=$(apt-config dump | grep -E '^Acquire::https?::Proxy ' || true)
printf '%s\n' "$proxy" >"$work/root/etc/apt/apt.conf.d/90proxy"
DEBIAN_FRONTEND=noninteractive LC_ALL=C chroot "$work/root" sh -c '
    mkdir -p /etc/postgresql-common
    echo "create_main_cluster = false" >/etc/postgresql-common/createcluster.conf
    apt-get update -q && apt-get install -q -y --no-install-recommends postgresql-15 adduser && apt-get clean' >>"$work/log" 2>&1 ||
    { tail -5 "$work/log" >&2 && unavailable "apt-get could not install postgresql-15 in it."; }
rm -rf "$work/root/var/lib/apt/lists" && mkdir -p "$work/root/var/lib/apt/lists/partial"
mkdir -p "$work/root/dev/shm" && chmod 1777 "$work/root/dev/shm"
mv "$work/root" "$dir"
rm -rf "$work"
