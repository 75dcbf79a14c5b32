#!/usr/bin/env bash
# A RUSTC_WRAPPER: lets pgrx-pg-sys be checked with the bindings that it ships for its documentation, so that the
# headers of that PostgreSQL are not needed. The flag is for that one crate: others would assume a nightly compiler.
set -euo pipefail
case " $* " in
    *" --crate-name pgrx_pg_sys "*) exec "$@" --cfg docsrs ;;
    *) exec "$@" ;;
esac
