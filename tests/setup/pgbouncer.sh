#!/usr/bin/env bash
# pgbouncer.sh DIR: unpacks Debian's PgBouncer, with the libraries that this machine lacks, into DIR, so that nothing is
# installed into the system. DIR/run starts it.
#
# Exit status 3: it is not available on this machine.
set -euo pipefail
umask 022
dir=$1
here=$(cd "$(dirname "$0")" && pwd)

if [ -e "$dir" ]; then exit 0; fi

unavailable() {
    echo "PgBouncer is not available here: $1" >&2
    exit 3
}
. "$here/debian.sh"

echo "==> downloading Debian's PgBouncer"
work=$dir.part
rm -rf "$work"
download "$work/deb" pgbouncer libevent-2.1-7 libc-ares2
for deb in "$work"/deb/*.deb; do dpkg-deb -x "$deb" "$work"; done
rm -rf "$work/deb"
cat >"$work/run" <<'RUN'
#!/bin/sh
here=$(cd "$(dirname "$0")" && pwd)
LD_LIBRARY_PATH=$(echo "$here"/usr/lib/*-linux-gnu) exec "$here/usr/sbin/pgbouncer" "$@"
RUN
chmod 755 "$work/run"
mv "$work" "$dir"
"$dir/run" --version >/dev/null || {
    rm -rf "$dir"
    unavailable "it does not start."
}
