#!/usr/bin/env bash
# pgrx.sh PG_CONFIG ARGUMENTS…: runs `cargo pgrx ARGUMENTS` knowing that one PostgreSQL only. (ARGUMENTS may also begin
# with `cargo`, for a plain cargo command that builds against it.)
#
# Each version of PostgreSQL has a PGRX_HOME of its own, which is all that `cargo pgrx init` would make: with a shared one,
# adding a second PostgreSQL would change the file and so make bindgen run again for the first. For the same reason the file
# names a link, so that a copy of a PostgreSQL in another directory is built for with what was built for the first.
set -euo pipefail
umask 022
pg_config=$1
shift
major=$("$pg_config" --version | sed -nE 's/^PostgreSQL ([0-9]+).*/\1/p')
export PGRX_HOME=$DEV/pgrx/$major
mkdir -p "$PGRX_HOME"
ln -sfn "$pg_config" "$PGRX_HOME/pg_config"
wanted=$(printf '[configs]\npg%s = "%s"' "$major" "$PGRX_HOME/pg_config")
if [ "$(cat "$PGRX_HOME/config.toml" 2>/dev/null)" != "$wanted" ]; then
    printf '%s\n' "$wanted" >"$PGRX_HOME/config.toml"
fi
# pgrx keeps the SQL section by a compiler flag for all crates, which makes cargo build all of them a second time.
if grep -q no-gc-sections extension/build.rs 2>/dev/null; then export CARGO_PGRX_DISABLE_GC_SECTIONS_WORKAROUND=1; fi
if [ "$1" = cargo ]; then exec "$@"; fi
# It takes the one that --pg-config names for another than the link to it.
arguments=()
for argument in "$@"; do
    if [ "$argument" = "$pg_config" ]; then argument=$PGRX_HOME/pg_config; fi
    arguments+=("$argument")
done
exec "$DEV/tools/bin/cargo-pgrx" pgrx "${arguments[@]}"
