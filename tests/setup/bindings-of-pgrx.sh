#!/usr/bin/env bash
# A RUSTC_WRAPPER: lets pgrx-pg-sys be checked with the bindings that it carries for its documentation, so that no
# headers of that PostgreSQL are needed. The flag is for that one crate: others take it to mean a nightly compiler.
set -euo pipefail
case " $* " in
    *" --crate-name pgrx_pg_sys "*) exec "$@" --cfg docsrs ;;
    *) exec "$@" ;;
esac
