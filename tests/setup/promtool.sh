#!/usr/bin/env bash
# promtool.sh FILE: puts Prometheus' promtool, which checks alert rules and metrics, at FILE: this machine's own, or the one
# in Debian's package, of which nothing is installed into the system.
#
# Exit status 3: it cannot be had on this machine.
set -euo pipefail
umask 022
file=$1

if [ -e "$file" ]; then exit 0; fi

unavailable() {
    echo "promtool is not available here: $1" >&2
    exit 3
}

mkdir -p "$(dirname "$file")"
if own=$(command -v promtool); then
    ln -s "$own" "$file"
    exit 0
fi
command -v apt-get >/dev/null || unavailable "there is no apt-get."
echo "==> downloading Debian's Prometheus, for its promtool"
work=$file.part
rm -rf "$work"
mkdir -p "$work/deb"
chmod 777 "$work/deb" # apt's own unprivileged user writes here
fetch() { (cd "$work/deb" && apt-get download -q prometheus 2>&1); }
fetch >/dev/null || { [ "$(id -u)" = 0 ] && apt-get update -q && fetch; } || unavailable "apt-get could not download it."
dpkg-deb --fsys-tarfile "$work"/deb/*.deb | tar -x -C "$work" ./usr/bin/promtool
"$work/usr/bin/promtool" --version >/dev/null || unavailable "it does not start."
mv "$work/usr/bin/promtool" "$file"
rm -rf "$work"
