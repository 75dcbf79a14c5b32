#!/usr/bin/env bash
# promtool.sh FILE: puts Prometheus' promtool, which checks alert rules and metrics, at FILE: this machine's own, or the one
# in Debian's package, of which nothing is installed into the system.
#
# Exit status 3: it cannot be had on this machine.
set -euo pipefail
umask 022
file=$1
here=$(cd "$(dirname "$0")" && pwd)

if [ -e "$file" ]; then exit 0; fi

unavailable() {
    echo "promtool is not available here: $1" >&2
    exit 3
}
. "$here/debian.sh"

mkdir -p "$(dirname "$file")"
if own=$(command -v promtool); then
    ln -s "$own" "$file"
    exit 0
fi
echo "==> downloading Debian's Prometheus, for its promtool"
work=$file.part
rm -rf "$work"
download "$work/deb" prometheus
dpkg-deb --fsys-tarfile "$work"/deb/*.deb | tar -x -C "$work" ./usr/bin/promtool
"$work/usr/bin/promtool" --version >/dev/null || unavailable "it does not start."
mv "$work/usr/bin/promtool" "$file"
rm -rf "$work"
