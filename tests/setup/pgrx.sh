#!/usr/bin/env bash
# pgrx.sh NAME PG_CONFIG ARGUMENTS…: runs `cargo pgrx ARGUMENTS` knowing that one PostgreSQL only. (ARGUMENTS may also
# begin with `cargo`, for a plain cargo command that builds against it.)
#
# Each PostgreSQL has a PGRX_HOME of its own, which is all that `cargo pgrx init` would make: with a shared one, adding
# a second PostgreSQL would change the file and so make bindgen run again for the first.
set -euo pipefail
umask 022
export PGRX_HOME=$DEV/pgrx/$1
pg_config=$2
shift 2
mkdir -p "$PGRX_HOME"
major=$("$pg_config" --version | sed -nE 's/^PostgreSQL ([0-9]+).*/\1/p')
wanted=$(printf '[configs]\npg%s = "%s"' "$major" "$pg_config")
if [ "$(cat "$PGRX_HOME/config.toml" 2>/dev/null)" != "$wanted" ]; then
    printf '%s\n' "$wanted" >"$PGRX_HOME/config.toml"
fi
# pgrx keeps the SQL section by a compiler flag for all crates, which makes cargo build all of them a second time.
if grep -q no-gc-sections extension/build.rs 2>/dev/null; then export CARGO_PGRX_DISABLE_GC_SECTIONS_WORKAROUND=1; fi
if [ "$1" = cargo ]; then exec "$@"; fi
exec "$DEV/tools/bin/cargo-pgrx" pgrx "$@"
