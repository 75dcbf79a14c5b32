#!/usr/bin/env bash
# wheel.sh NAME DIR: downloads the Python wheel pinned in wheels/NAME.txt, checks its digest, unpacks it as DIR.
#
# A wheel is a zip file; nothing of it is installed into Python. It is fetched with pip, so that whatever index,
# mirror or proxy this machine's pip is configured with is the one used.
set -euo pipefail
umask 022
name=$1 dir=$2
here=$(cd "$(dirname "$0")" && pwd)

if [ -e "$dir" ]; then exit 0; fi

pip() {
    if python3 -m pip --version >/dev/null 2>&1; then
        PIP_REQUIRE_VIRTUALENV=0 python3 -m pip "$@"
        return
    fi
    local venv
    venv=$(dirname "$dir")/venv
    if [ ! -x "$venv/bin/pip" ]; then
        rm -rf "$venv"
        if ! python3 -m venv "$venv" >/dev/null 2>&1; then
            rm -rf "$venv"
            if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
                echo "==> python3 has no pip: installing the package python3-pip" >&2
                apt-get update -q >&2
                DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends python3-pip >&2
                python3 -m pip "$@"
                return
            fi
            echo "Cannot download $name: this python3 has neither pip nor venv." >&2
            echo "Install one of them (Debian, Ubuntu: apt install python3-pip) and run make again." >&2
            return 1
        fi
    fi
    "$venv/bin/pip" "$@"
}

echo "==> downloading $name into ${dir#"$PWD"/}"
work=$dir.part
rm -rf "$work"
mkdir -p "$work/wheel"
pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes \
    --requirement "$here/wheels/$name.txt" --dest "$work/wheel"
python3 -m zipfile -e "$work"/wheel/*.whl "$work/files"
for lib in "$work"/files/*.data/platlib; do # the part that an installer would move to the top
    if [ -d "$lib" ]; then mv "$lib"/* "$work/files/"; fi
done
# Python's zipfile drops the executable bits.
find "$work/files" -type d -name bin -exec chmod -R a+rX,a+x {} +
mv "$work/files" "$dir"
rm -rf "$work"
