# shellcheck shell=bash
# Sourced by the scripts that take packages from Debian. They define `unavailable MESSAGE`, which ends the script.

# Prints the Debian mirror that this machine's apt uses, or the one that DEBIAN_MIRROR names.
debian_mirror() {
    known() {
        apt-get indextargets --format '$(REPO_URI)' 'Identifier: Packages' 'Origin: Debian' 'Label: Debian' 2>/dev/null |
            grep -E '^(https?|file):' | sed -n 1p
    }
    local mirror=${DEBIAN_MIRROR-}
    command -v apt-get >/dev/null || unavailable "there is no apt-get."
    # apt knows who publishes an archive only after it has downloaded the lists.
    [ -n "$mirror" ] || mirror=$(known) || { [ "$(id -u)" = 0 ] && apt-get update -q >&2 && mirror=$(known); } ||
        unavailable "apt knows no Debian mirror. Run \`apt-get update\` as root if this is a Debian; else name a mirror in DEBIAN_MIRROR."
    echo "$mirror"
}

# Prints the keyring that Debian's archives are verified with.
debian_keyring() {
    local keyring=/usr/share/keyrings/debian-archive-keyring.gpg
    [ -e $keyring ] || unavailable "there is no $keyring (package debian-archive-keyring)."
    echo $keyring
}

# download DIR PACKAGE…: downloads packages of this machine's own release into DIR. Installs nothing.
download() {
    local dir=$1
    shift
    command -v apt-get >/dev/null || unavailable "there is no apt-get."
    mkdir -p "$dir"
    chmod 777 "$dir" # apt's own unprivileged user writes here
    fetch() { (cd "$dir" && apt-get download -q "$@" 2>&1); }
    fetch "$@" >/dev/null || { [ "$(id -u)" = 0 ] && apt-get update -q >&2 && fetch "$@" >&2; } ||
        unavailable "apt-get could not download $*."
}

# private_apt DIR SUITE…: makes DIR hold what apt knows of these suites of Debian and nothing of this machine, and sets the
# array `apt_options` so that `apt-get "${apt_options[@]}"` works there. Needs no root, and installs nothing.
private_apt() {
    local dir=$1 mirror keyring suite
    shift
    mirror=$(debian_mirror)
    keyring=$(debian_keyring)
    mkdir -p "$dir/state/lists/partial" "$dir/cache/archives/partial"
    : >"$dir/status"
    for suite in "$@"; do echo "deb [signed-by=$keyring] $mirror $suite main"; done >"$dir/sources.list"
    apt_options=(-q -o Dir::Etc::sourcelist="$dir/sources.list" -o Dir::Etc::sourceparts=/dev/null
        -o Dir::State="$dir/state" -o Dir::Cache="$dir/cache" -o Dir::State::status="$dir/status"
        -o APT::Sandbox::User="$(id -un)" -o Acquire::Languages=none
        -o Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false)
    apt-get "${apt_options[@]}" update >"$dir/log" 2>&1 || {
        tail -5 "$dir/log" >&2
        unavailable "apt-get cannot read the lists of Debian's $*."
    }
}

# debian_mmdebstrap DIR: prints a program that makes root file systems of Debian. It is unpacked into DIR if this machine
# has none.
debian_mmdebstrap() {
    if command -v mmdebstrap; then return; fi
    download "$1/mmdebstrap" mmdebstrap
    dpkg-deb -x "$1"/mmdebstrap/mmdebstrap_*.deb "$1/mmdebstrap"
    echo "$1/mmdebstrap/usr/bin/mmdebstrap"
}
