#!/usr/bin/env bash
# build.sh PG_CONFIG DIR: makes Debian packages of what `make install PG=15` put into that PostgreSQL and of the daemon, in
# DIR: the extension for Debian's PostgreSQL 15 and, on its own since it may run elsewhere, the daemon. Called by
# `make package`.
#
# The same source gives the same packages: times are those of the last commit, or SOURCE_DATE_EPOCH. Their maintainer, whom
# Debian policy (5.6.2) wants to be somebody who can be reached, is DEBFULLNAME and DEBEMAIL, by which Debian's own tools know
# who builds, or else who made that commit.
set -euo pipefail
umask 022
pg_config=$1
out=$2
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/.."

major=$("$pg_config" --version | sed -nE 's/^PostgreSQL ([0-9]+).*/\1/p')
version=$(sed -nE 's/^version = "(.*)"/\1/p' Cargo.toml)
debian_version=$version-1
architecture=$(dpkg --print-architecture)
if [ -n "${DEBEMAIL:-}" ] && [ -n "${DEBFULLNAME:-}" ]; then
    maintainer="$DEBFULLNAME <$DEBEMAIL>"
elif ! maintainer=$(git log -1 --format='%an <%ae>' 2>/dev/null) || [ -z "$maintainer" ]; then
    # Not from a repository. As Debian's own tools do when they are told nothing.
    maintainer="$(id -un) <$(id -un)@$(uname -n)>"
fi
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}
export SOURCE_DATE_EPOCH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The least of the shared libraries' versions that a binary asks for, as dpkg-shlibdeps would say of these two.
needs_libc() { echo "libc6 (>= $(objdump -T "$1" | grep -oE 'GLIBC_[0-9.]+' | sed s/GLIBC_// | sort -V | tail -1))"; }

# control PACKAGE DEPENDS SUMMARY: reads the long description.
control() {
    mkdir -p "$work/$1/DEBIAN"
    {
        printf 'Package: %s\nVersion: %s\nArchitecture: %s\nMaintainer: %s\n' "$1" "$debian_version" "$architecture" "$maintainer"
        printf 'Installed-Size: %s\nDepends: %s\nSection: database\nPriority: optional\n' "$(du -sk --apparent-size "$work/$1" | cut -f1)" "$2"
        printf 'Description: %s\n' "$3"
        sed 's/^$/./; s/^/ /'
    } >"$work/$1/DEBIAN/control"
}

# What every package has under /usr/share/doc.
documents() {
    local doc=$work/$1/usr/share/doc/$1
    mkdir -p "$doc"
    {
        printf 'Format: https://www.debian.org/doc/packaging-manuals/copyright-format/1.0/\nUpstream-Name: tollgate\n\n'
        printf 'Files: *\nCopyright: Tollgate developers\nLicense: PostgreSQL\n'
        sed 's/^$/./; s/^/ /' LICENSE
    } >"$doc/copyright"
    printf '%s (%s) unstable; urgency=medium\n\n  * Version %s.\n\n -- %s  %s\n' "$1" "$debian_version" "$version" "$maintainer" \
        "$(date -u -R -d "@$SOURCE_DATE_EPOCH")" | gzip -9n >"$doc/changelog.Debian.gz"
}

build() {
    local root=$work/$1
    (cd "$root" && find . -type f ! -path './DEBIAN/*' -printf '%P\0' | sort -z | xargs -0 md5sum >DEBIAN/md5sums)
    find "$root" -newermt "@$SOURCE_DATE_EPOCH" -print0 | xargs -0 touch --no-dereference --date="@$SOURCE_DATE_EPOCH"
    mkdir -p "$out"
    dpkg-deb --root-owner-group -Zxz --build "$root" "$out" >/dev/null
    echo "$out/${1}_${debian_version}_$architecture.deb"
}

# ---- the extension

extension=postgresql-$major-tollgate
root=$work/$extension
install -D -m 644 "$("$pg_config" --pkglibdir)/tollgate.so" "$root/usr/lib/postgresql/$major/lib/tollgate.so"
strip --strip-unneeded "$root/usr/lib/postgresql/$major/lib/tollgate.so"
mkdir -p "$root/usr/share/postgresql/$major/extension"
install -m 644 "$("$pg_config" --sharedir)"/extension/tollgate.control "$("$pg_config" --sharedir)"/extension/tollgate--*.sql \
    "$root/usr/share/postgresql/$major/extension/"
documents "$extension"
install -m 644 docs/reference.md docs/operations.md docs/migrating.md "$root/usr/share/doc/$extension/"
control "$extension" "postgresql-$major, $(needs_libc "$root/usr/lib/postgresql/$major/lib/tollgate.so"), libgcc-s1" \
    "API tokens inside PostgreSQL $major" <<'END'
Issues, verifies, scopes, limits, meters, rotates, revokes and audits API tokens
in the database itself, by SQL calls and in row-level security policies.

Add tollgate to shared_preload_libraries, restart the server, and run
CREATE EXTENSION tollgate in your database.
END
build "$extension"

# ---- the daemon

root=$work/tollgated
binary=${CARGO_TARGET_DIR:-target}/release/tollgated
install -D -m 755 "$binary" "$root/usr/bin/tollgated"
strip --strip-unneeded "$root/usr/bin/tollgated"
install -D -m 644 packaging/tollgated/tollgated.service "$root/usr/lib/systemd/system/tollgated.service"
install -D -m 644 packaging/tollgated/sysusers.conf "$root/usr/lib/sysusers.d/tollgated.conf"
install -D -m 640 packaging/tollgated/tollgated.toml "$root/etc/tollgated/tollgated.toml"
mkdir -p "$root"/usr/share/{man/man8,bash-completion/completions,zsh/vendor-completions,fish/vendor_completions.d}
"$binary" man | gzip -9n >"$root/usr/share/man/man8/tollgated.8.gz"
"$binary" completions bash >"$root/usr/share/bash-completion/completions/tollgated"
"$binary" completions zsh >"$root/usr/share/zsh/vendor-completions/_tollgated"
"$binary" completions fish >"$root/usr/share/fish/vendor_completions.d/tollgated.fish"
documents tollgated
install -m 644 docs/operations.md "$root/usr/share/doc/tollgated/"
control tollgated "$(needs_libc "$root/usr/bin/tollgated"), libgcc-s1, adduser" \
    "daemon and command line of Tollgate, API tokens inside PostgreSQL" <<'END'
Carries the usage of tokens from the server's memory into its tables, records
expiries, deletes what ended long ago, seals the audit log and tells of events.
Also manages tokens by hand, and examines a deployment (tollgated check).

It runs beside the server or elsewhere, which /etc/tollgated/tollgated.toml
says.
END
echo /etc/tollgated/tollgated.toml >"$root/DEBIAN/conffiles"
for script in postinst prerm postrm; do install -m 755 "packaging/tollgated/$script" "$root/DEBIAN/$script"; done
build tollgated
