#!/usr/bin/env bash
# dev-dir.sh: creates `.dev`, which holds everything that the tools download, build and run, and prints its real path.
#
# PostgreSQL refuses to run as root, so root runs it as another user, who must be able to enter that directory. If that
# user cannot enter the checkout's directory (below /root, say), `.dev` becomes a symbolic link to one elsewhere.
set -euo pipefail
umask 022
cd "$(dirname "$0")/../.."
user=${1-}

enterable() { tests/setup/bin/sudo -u "$user" test -x "$1/." 2>/dev/null; }

mkdir -p .dev
real=$(realpath .dev)
if [ "$(id -u)" = 0 ] && ! enterable "$real"; then
    elsewhere=/var/lib/tollgate-dev/$(printf %s "$PWD" | cksum | cut -d' ' -f1)
    echo "==> the user $user cannot enter $real: keeping it in $elsewhere, with a symbolic link" >&2
    mkdir -p "$(dirname "$elsewhere")"
    if [ ! -e "$elsewhere" ]; then
        mv "$real" "$elsewhere"
    elif ! rmdir "$real"; then
        echo "Both $real and $elsewhere exist: remove one of them." >&2
        exit 1
    fi
    ln -sfn "$elsewhere" .dev
    enterable "$elsewhere" || {
        echo "The user $user cannot enter $elsewhere either." >&2
        exit 1
    }
    real=$elsewhere
fi
echo "$real"
