#!/usr/bin/env bash
# pg15.sh DIR: makes DIR a private copy of the system's PostgreSQL 15, so that nothing is ever installed into the
# system's own directories. PostgreSQL finds its libraries relative to its binaries, so a copy with the same layout works.
#
# Exit status 3: PostgreSQL 15 is not on this machine and cannot be installed by this user.
set -euo pipefail
umask 022
dir=$1
bin=/usr/lib/postgresql/15/bin
headers=/usr/include/postgresql/15/server

if [ -e "$dir" ]; then exit 0; fi

unavailable() {
    echo "PostgreSQL 15 is not available here: $1" >&2
    exit 3
}

. "$(dirname "$0")/debian.sh"

if [ ! -x $bin/postgres ] || [ ! -x $bin/pgbench ]; then
    command -v apt-get >/dev/null || unavailable "there is no $bin/postgres (the layout of Debian's packages), and no apt-get."
    [ "$(id -u)" = 0 ] || unavailable "the package postgresql-15 is not installed, and only root can install it."
    echo "==> installing the package postgresql-15"
    apt-get update -q
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends postgresql-15 ||
        unavailable "apt-get could not install postgresql-15."
fi

echo "==> copying the system's PostgreSQL 15 to ${dir#"$PWD"/}"
work=$dir.part
rm -rf "$work"
mkdir -p "$work/usr/lib/postgresql" "$work/usr/share/postgresql" "$work/usr/include"
cp -a /usr/lib/postgresql/15 "$work/usr/lib/postgresql/"
cp -a /usr/share/postgresql/15 "$work/usr/share/postgresql/"

if [ -e $headers/postgres.h ]; then
    cp -a /usr/include/postgresql "$work/usr/include/"
else
    # Unpacked rather than installed: the package depends on LLVM, and only its headers are needed.
    echo "==> downloading the headers (package postgresql-server-dev-15)"
    download "$work/deb" postgresql-server-dev-15
    dpkg-deb -x "$work"/deb/postgresql-server-dev-15_*.deb "$work/deb/files"
    cp -a "$work/deb/files/usr/include/postgresql" "$work/usr/include/"
    rm -rf "$work/deb"
fi

mv "$work" "$dir"
reported=$("$dir/usr/lib/postgresql/15/bin/pg_config" --sharedir)
expected=$(cd "$dir" && pwd -P)/usr/share/postgresql/15
if [ "$(cd "$reported" && pwd -P)" != "$expected" ]; then
    rm -rf "$dir"
    unavailable "a copy of this build does not find its files: pg_config reports $reported, not $expected."
fi
