#!/usr/bin/env bash
# drivers.sh DIR PART…: fetches what docs/drivers.md is run with into DIR, each part once: python (a virtual environment with
# the drivers, from PyPI), node (the drivers, from npm), go and java (Debian's packages, unpacked and not installed). With the
# drivers come the packages whose tokens docs/migrating.md takes over, libraries that verify signed tokens, and issuers of
# them; and nginx, for which there is a verifier of signed URLs. Called by `make drivers` and `make drivers-long`.
#
# Versions and digests are pinned in tests/drivers; those of Debian's packages are what its release has. A part whose pins have
# changed is fetched anew.
#
# Exit status 3: a part cannot be had on this machine.
set -euo pipefail
umask 022
dir=$1
shift
here=$(cd "$(dirname "$0")/../drivers" && pwd)
mkdir -p "$dir"

unavailable() {
    echo "Not available here: $1" >&2
    exit 3
}

fetch_python() {
    python3 -m venv "$1" || unavailable "python3 cannot make a virtual environment (Debian, Ubuntu: apt install python3-venv)."
    PIP_REQUIRE_VIRTUALENV=0 "$1/bin/pip" install --quiet --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes \
        --requirement "$here/python/requirements.txt"
}

fetch_node() {
    mkdir -p "$1"
    cp "$here/node/package.json" "$here/node/package-lock.json" "$1/"
    if ! command -v npm >/dev/null || [ "$(node -p 'process.versions.node.split(".")[0]')" -lt 20 ]; then
        python3 -m venv "$1/python" || unavailable "there is no Node 20, and python3 cannot make a virtual environment."
        PIP_REQUIRE_VIRTUALENV=0 "$1/python/bin/pip" install --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
            --require-hashes --requirement "$here/node/requirements.txt"
        ln -s python/bin/node "$1/node"
        PATH=$1/python/bin:$PATH
    else
        ln -s "$(command -v node)" "$1/node"
    fi
    (cd "$1" && npm ci --silent --ignore-scripts --no-audit --no-fund)
}

# unpack DIR PACKAGE…: what Debian would install for these, but for what is installed already.
unpack() {
    local to=$1
    shift
    command -v apt-get >/dev/null || unavailable "there is no apt-get."
    mkdir -p "$to/deb/partial"
    chmod -R 777 "$to/deb" # apt's own unprivileged user writes here
    fetch() {
        apt-get -q -y --no-install-recommends --download-only --reinstall -o Dir::Cache::archives="$to/deb" -o Debug::NoLocking=1 install "$@" 2>&1
    }
    fetch "$@" >/dev/null || { [ "$(id -u)" = 0 ] && apt-get update -q >/dev/null && fetch "$@" >/dev/null; } ||
        unavailable "apt-get could not download $*."
    for deb in "$to"/deb/*.deb; do dpkg-deb -x "$deb" "$to"; done
    rm -rf "$to/deb"
}

fetch_go() { unpack "$1" golang-go golang-github-jackc-pgx-v4-dev; }

fetch_java() {
    command -v javac >/dev/null || unavailable "there is no javac (Debian, Ubuntu: apt install default-jdk-headless)."
    unpack "$1" libpostgresql-jdbc-java
}

# nginx with its module njs, and the shell of njs, for contrib/signed-urls.
fetch_njs() { unpack "$1" njs nginx-light libnginx-mod-http-js; }

for part in "$@"; do
    pins=$(cat "$0" "$here/$part"/*.txt "$here/$part"/*.json 2>/dev/null | sha256sum || true)
    if [ "$(cat "$dir/$part/pins" 2>/dev/null)" = "$pins" ]; then continue; fi
    echo "==> fetching the drivers for $part into ${dir#"$PWD"/}/$part"
    rm -rf "${dir:?}/$part" "$dir/$part.part"
    # In place, since a virtual environment cannot be moved; the pins say that it is complete.
    "fetch_$part" "$dir/$part"
    echo "$pins" >"$dir/$part/pins"
done
