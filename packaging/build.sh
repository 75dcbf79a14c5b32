#!/usr/bin/env bash
# build.sh DIR PG_CONFIG…: makes Debian packages in DIR: for each of these PostgreSQLs, of what `make install` put into it, and
# of the daemon on its own, since it may run elsewhere. Called by `make package`.
#
# The same source gives the same packages: times are those of the last commit, or SOURCE_DATE_EPOCH. Their maintainer, whom
# Debian policy (5.6.2) wants to be reachable, is DEBFULLNAME and DEBEMAIL, by which Debian's own tools know who builds, or
# else the author of that commit. TOLLGATED and COMPRESSION are for tests, which have another daemon and little time.
set -euo pipefail
umask 022
out=$1
shift
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/.."

version=$(sed -nE 's/^version = "(.*)"/\1/p' Cargo.toml)
debian_version=$version-1
architecture=$(dpkg --print-architecture)
if [ -n "${DEBEMAIL:-}" ] && [ -n "${DEBFULLNAME:-}" ]; then
    maintainer="$DEBFULLNAME <$DEBEMAIL>"
elif ! maintainer=$(git log -1 --format='%an <%ae>' 2>/dev/null) || [ -z "$maintainer" ]; then
    # Not from a repository. As Debian's own tools do when they are given no name.
    maintainer="$(id -un) <$(id -un)@$(uname -n)>"
fi
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || date +%s)}
export SOURCE_DATE_EPOCH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The packages of the shared libraries that a binary names, and the least version of the C library that it asks for.
needs() {
    local library
    echo -n "libc6 (>= $(objdump -T "$1" | grep -oE 'GLIBC_[0-9.]+' | sed s/GLIBC_// | sort -V | tail -1))"
    for library in $(objdump -p "$1" | sed -nE 's/^ *NEEDED +//p'); do
        case $library in
            libc.so.* | libm.so.* | ld-linux*) ;;
            libgcc_s.so.1) echo -n ', libgcc-s1' ;;
            *) echo "$1 needs $library, of whose package this script knows nothing." >&2 && return 1 ;;
        esac
    done
}

# As dh_strip does.
stripped() { strip --strip-unneeded --remove-section=.comment --remove-section=.note "$1"; }

# control PACKAGE DEPENDS SUMMARY [FIELD…]: reads the long description.
control() {
    local package=$1 depends=$2 summary=$3
    shift 3
    mkdir -p "$work/$package/DEBIAN"
    {
        printf 'Package: %s\nSource: tollgate\nVersion: %s\nArchitecture: %s\nMaintainer: %s\n' "$package" "$debian_version" \
            "$architecture" "$maintainer"
        printf 'Installed-Size: %s\nDepends: %s\n' "$(du -sk --apparent-size "$work/$package" | cut -f1)" "$depends"
        if [ $# != 0 ]; then printf '%s\n' "$@"; fi
        printf 'Section: database\nPriority: optional\nDescription: %s\n' "$summary"
        sed 's/^$/./; s/^/ /'
    } >"$work/$package/DEBIAN/control"
}

# The changelog of a package, in Debian's form: one entry for each release that CHANGELOG.md lists.
changelog() {
    local package=$1 date
    date=$(date -u -R -d "@$SOURCE_DATE_EPOCH")
    if ! grep -qE "^## \[?$version\]?" CHANGELOG.md 2>/dev/null; then
        printf '%s (%s) unstable; urgency=medium\n\n  * Version %s.\n\n -- %s  %s\n' "$package" "$debian_version" "$version" \
            "$maintainer" "$date"
        return
    fi
    # Headings are `## [VERSION] - DATE`; what is not released yet has no version, and its date is that of this build.
    awk -v package="$package" -v maintainer="$maintainer" -v today="$date" '
        function finish() { if (version != "") printf "\n -- %s  %s\n\n", maintainer, date }
        function rfc(day,    command, result) {
            command = "date -u -R -d " day; command | getline result; close(command); return result
        }
        /^## / {
            finish(); version = ""
            if (match($0, /[0-9]+\.[0-9]+\.[0-9]+/)) {
                version = substr($0, RSTART, RLENGTH)
                date = match($0, /[0-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]/) ? rfc(substr($0, RSTART, RLENGTH)) : today
                printf "%s (%s-1) unstable; urgency=medium\n\n", package, version
            }
            next
        }
        version != "" && /^[-*] / { sub(/^[-*] /, "  * "); print; next }
        version != "" && /^  +[^ ]/ { sub(/^ +/, "    "); print }
        END { finish() }' CHANGELOG.md | fold_lines
}

# Debian wants lines of at most 80 characters there.
fold_lines() {
    while IFS= read -r line; do
        case $line in
            '  '*) first=${line%%[! ]*} && printf '%s\n' "${line#"$first"}" | fold -s -w 74 |
                sed -E "1s/^/$first/; 2,\$s/^/    /; s/ +\$//" ;;
            *) printf '%s\n' "$line" ;;
        esac
    done
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
    changelog "$1" | gzip -9n >"$doc/changelog.Debian.gz"
}

# overrides PACKAGE: reads what lintian is to accept.
overrides() {
    mkdir -p "$work/$1/usr/share/lintian/overrides"
    cat >"$work/$1/usr/share/lintian/overrides/$1"
}

build() {
    local root=$work/$1
    (cd "$root" && find . -type f ! -path './DEBIAN/*' -printf '%P\0' | sort -z | xargs -0 md5sum >DEBIAN/md5sums)
    find "$root" -newermt "@$SOURCE_DATE_EPOCH" -print0 | xargs -0 touch --no-dereference --date="@$SOURCE_DATE_EPOCH"
    mkdir -p "$out"
    dpkg-deb --root-owner-group "-Z${COMPRESSION:-xz}" --build "$root" "$out" >/dev/null
    echo "    ${1}_${debian_version}_$architecture.deb"
}

# ---- the extension, named as PostgreSQL's own package archive names extensions

for pg_config in "$@"; do
    major=$("$pg_config" --version | sed -nE 's/^PostgreSQL ([0-9]+).*/\1/p')
    extension=postgresql-$major-tollgate
    root=$work/$extension
    library=$root/usr/lib/postgresql/$major/lib/tollgate.so
    install -D -m 644 "$("$pg_config" --pkglibdir)/tollgate.so" "$library"
    stripped "$library"
    mkdir -p "$root/usr/share/postgresql/$major/extension"
    install -m 644 "$("$pg_config" --sharedir)"/extension/tollgate.control \
        "$("$pg_config" --sharedir)"/extension/tollgate--*.sql "$root/usr/share/postgresql/$major/extension/"
    documents "$extension"
    install -m 644 docs/*.md "$root/usr/share/doc/$extension/"
    needed=$(needs "$library")
    control "$extension" "postgresql-$major, $needed" "API tokens inside PostgreSQL $major" "Suggests: tollgated (= $debian_version)" <<'END'
Issues, verifies, scopes, limits, meters, rotates, revokes and audits API
tokens in the database itself, by SQL calls and in row-level security
policies.

Add tollgate to shared_preload_libraries, restart the server, and run
CREATE EXTENSION tollgate in your database.
END
    build "$extension"
done

# ---- the daemon

root=$work/tollgated
binary=${TOLLGATED:-${CARGO_TARGET_DIR:-target}/release/tollgated}
install -D -m 755 "$binary" "$root/usr/bin/tollgated"
stripped "$root/usr/bin/tollgated"
install -D -m 644 -t "$root/usr/lib/systemd/system" packaging/tollgated/tollgated.service packaging/tollgated/tollgated@.service
install -D -m 644 packaging/tollgated/sysusers.conf "$root/usr/lib/sysusers.d/tollgated.conf"
install -D -m 640 packaging/tollgated/tollgated.toml "$root/etc/tollgated/tollgated.toml"
mkdir -p "$root"/usr/share/{man/man8,bash-completion/completions,zsh/vendor-completions,fish/vendor_completions.d}
"$binary" man | gzip -9n >"$root/usr/share/man/man8/tollgated.8.gz"
"$binary" completions bash >"$root/usr/share/bash-completion/completions/tollgated"
"$binary" completions zsh >"$root/usr/share/zsh/vendor-completions/_tollgated"
"$binary" completions fish >"$root/usr/share/fish/vendor_completions.d/tollgated.fish"
documents tollgated
install -m 644 docs/operations.md docs/metrics.md "$root/usr/share/doc/tollgated/"
overrides tollgated <<'END'
# It may hold a password.
tollgated: non-standard-file-perm 0640 != 0644 [etc/tollgated/tollgated.toml]
END
needed=$(needs "$root/usr/bin/tollgated")
control tollgated "$needed, adduser" "daemon and command line of Tollgate, API tokens inside PostgreSQL" \
    'Pre-Depends: init-system-helpers (>= 1.54~)' 'Suggests: ca-certificates' <<'END'
Carries the usage of tokens from the server's memory into its tables, records
expiries, deletes what ended long ago, seals the audit log and delivers
events. Also manages tokens by hand, and examines a deployment (tollgated
check).

It runs beside the server or elsewhere, which /etc/tollgated/tollgated.toml
says. For several databases, see tollgated@.service.
END
echo /etc/tollgated/tollgated.toml >"$root/DEBIAN/conffiles"
for script in postinst prerm postrm; do install -m 755 "packaging/tollgated/$script" "$root/DEBIAN/$script"; done
build tollgated
