#!/usr/bin/env bash
# images.sh PACKAGES DIR: makes two OCI images in DIR, of PostgreSQL 18 with the extension and of the daemon, from Debian and
# the packages of `make package`. Called by `make images`. Each is a layout, to copy with skopeo or to load with podman:
#
#   skopeo copy oci:DIR/tollgated:VERSION docker://…          podman load --input DIR/tollgated.oci.tar
#
# Which PostgreSQL is inside is the label org.postgresql.version. It is the one of IMAGE_SUITE, a release of Debian, by
# default the one after Debian 13, which has PostgreSQL 18; IMAGE_SOURCES names a file of further apt sources, such as that
# of PostgreSQL's own archive for IMAGE_SUITE=trixie. IMAGE_APTOPT is an option for apt, such as
# 'Acquire::Check-Valid-Until "false"' where the mirror stands still.
#
# Exit status 3: they cannot be made here, for the reason that the last line says.
set -euo pipefail
umask 022
packages=$1
out=$2
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/.."

unavailable() {
    echo "The images cannot be made here: $1" >&2
    exit 3
}
. tests/setup/debian.sh

version=$(sed -nE 's/^version = "(.*)"/\1/p' Cargo.toml)
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}
export SOURCE_DATE_EPOCH
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)
[ "$(id -u)" = 0 ] || unavailable "only root can make their file systems."
command -v umoci >/dev/null || unavailable "there is no umoci (apt-get install umoci)."
mirror=$(debian_mirror)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mmdebstrap=$(debian_mmdebstrap "$work")
mkdir -p "$out"

# image NAME SUITE USER PACKAGE INCLUDE [OPTION…]: the root file system of an image, with our package, as a layout of one layer.
# USER has the id 999.
image() {
    local name=$1 suite=$2 user=$3 deb=$4 include=$5
    shift 5
    echo "==> making the image $name from Debian's $suite (a minute or two)"
    cp "$deb" "$work/package.deb"
    rm -f "$work/has-debian"
    "$mmdebstrap" --mode=root --variant=essential --format=directory --skip=output/dev --include="$include" \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-include=/usr/share/doc/*/copyright' \
        --dpkgopt='path-exclude=/usr/share/man/*' --dpkgopt='path-exclude=/usr/share/locale/*' \
        --dpkgopt='path-exclude=/usr/share/info/*' \
        --essential-hook="echo '$user:x:999:' >>\"\$1/etc/group\"" \
        --essential-hook="echo '$user:x:999:999::/nonexistent:/bin/sh' >>\"\$1/etc/passwd\"" \
        --essential-hook='mkdir -p "$1/etc/postgresql-common"; echo "create_main_cluster = false" >"$1/etc/postgresql-common/createcluster.conf"' \
        --customize-hook="touch '$work/has-debian'" \
        --customize-hook="upload $work/package.deb /tmp/package.deb" \
        --customize-hook='chroot "$1" dpkg -i /tmp/package.deb && rm "$1/tmp/package.deb"' \
        --customize-hook='rm -rf "$1"/etc/ssl/private/ssl-cert-snakeoil.key "$1"/etc/ssl/certs/ssl-cert-snakeoil.pem' \
        --customize-hook='rm -rf "$1"/etc/resolv.conf "$1"/etc/hostname "$1"/etc/machine-id "$1"/var/log/* "$1"/var/cache/*' \
        ${IMAGE_APTOPT:+--aptopt="$IMAGE_APTOPT"} "$@" "$suite" "$work/$name" "$mirror" ${IMAGE_SOURCES:+"$IMAGE_SOURCES"} >"$work/log" 2>&1 ||
        {
            tail -15 "$work/log" >&2
            # From here on it is our own work that failed.
            if [ -e "$work/has-debian" ]; then echo "The package could not be installed in Debian's $suite." >&2 && exit 1; fi
            unavailable "mmdebstrap could not get Debian's $suite."
        }
    rm -rf "${out:?}/$name" "$out/$name.oci.tar"
    umoci init --layout "$out/$name"
    umoci new --image "$out/$name:$version"
    umoci insert --image "$out/$name:$version" "$work/$name" /
}

# configure NAME OPTION…
configure() {
    local name=$1
    shift
    umoci config --image "$out/$name:$version" --created "$(date -u -d "@$SOURCE_DATE_EPOCH" +%FT%TZ)" --config.user 999:999 \
        --config.label org.opencontainers.image.version="$version" --config.label org.opencontainers.image.revision="$revision" \
        --config.label org.opencontainers.image.licenses=PostgreSQL "$@"
    umoci gc --layout "$out/$name"
    tar -C "$out/$name" --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner -cf "$out/$name.oci.tar" .
    echo "    $out/$name:$version, $(du -sh "$out/$name" | cut -f1) compressed"
}

image tollgated trixie tollgated "$packages"/tollgated_"$version"-1_*.deb ca-certificates,adduser \
    --customize-hook='rm "$1/etc/tollgated/tollgated.toml"'
configure tollgated --config.entrypoint /usr/bin/tollgated --config.cmd run \
    --config.label org.opencontainers.image.title=tollgated \
    --config.label org.opencontainers.image.description='The daemon of Tollgate, API tokens inside PostgreSQL'

suite=${IMAGE_SUITE:-forky}
image tollgate-postgresql-18 "$suite" postgres "$packages"/postgresql-18-tollgate_"$version"-1_*.deb postgresql-18,adduser \
    --customize-hook="upload packaging/image/entrypoint.sh /usr/local/bin/entrypoint" \
    --customize-hook='chmod 755 "$1/usr/local/bin/entrypoint"; install -d -o 999 -g 999 -m 750 "$1/var/lib/postgresql"' \
    --customize-hook='install -d -o 999 -g 999 -m 2775 "$1/run/postgresql"'
inside=$("$work/tollgate-postgresql-18/usr/lib/postgresql/18/bin/postgres" --version 2>/dev/null ||
    chroot "$work/tollgate-postgresql-18" /usr/lib/postgresql/18/bin/postgres --version)
configure tollgate-postgresql-18 --config.entrypoint /usr/local/bin/entrypoint \
    --config.env PGDATA=/var/lib/postgresql/18/main --config.env PATH=/usr/lib/postgresql/18/bin:/usr/sbin:/usr/bin:/sbin:/bin \
    --config.env LC_ALL=C.UTF-8 --config.workingdir /var/lib/postgresql --config.volume /var/lib/postgresql \
    --config.exposedports 5432/tcp --config.stopsignal SIGINT --config.label org.postgresql.version="$inside" \
    --config.label org.opencontainers.image.title=tollgate-postgresql-18 \
    --config.label org.opencontainers.image.description='PostgreSQL 18 with Tollgate, API tokens inside PostgreSQL'
echo "    with $inside"
