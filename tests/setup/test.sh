#!/usr/bin/env bash
# test.sh [--long] MAJOR…: every tier of tests, on these versions of PostgreSQL. Called by `make test` and `make test-long`.
#
#   unit       tollgate-core, tollgated and the benchmark, no server
#   in-server  #[pg_test]: functions that run inside a backend, by cargo-pgrx, in copies of the PostgreSQLs
#   client     tests/tests/it: clients, daemons, standbys and crashes, on real servers
#
# The client tests run whole on PostgreSQL 18. On 15 those are left out that are about the daemon and its command line
# alone, which send the same statements to any version, and the growth of costs (bulk), which --long measures there; on 16
# and 17 the topics that SMOKE names run.
#
# ONLY='verify:: usage::' runs the client tests whose names contain one of these, and nothing else.
#
# What the others need is built, and their in-server tests run, while the client tests run on the first.
#
# With --long, what takes long by nature: the tests marked `#[ignore = "long: …"]`, and those that break servers and
# daemons, ten times over.
set -euo pipefail
umask 022

# Of the extension, for all tiers: with the checks of a debug build, and compiled in a third of the time.
export PROFILE=dev FEATURES=testing
# A failing test prints enough; a backtrace of the harness adds nothing.
export RUST_LIB_BACKTRACE=0
# Tests mostly wait for a server, so more of them run at once than there are processors.
threads=${TEST_THREADS:-$(($(nproc 2>/dev/null || echo 2) * 3))}
# About the daemon alone.
daemon_side=(bench:: cli:: config:: daemon:: drivers:: fetch_keys:: forward_auth:: http:: import_cli:: jwt_libraries:: leadership:: network:: package:: readme:: sse:: tls::)

mkdir -p "$DEV/tmp"
durations=$DEV/tmp/test-durations
stages=$DEV/tmp/test-stages
: >"$durations"
: >"$stages"

# Runs a command whose last lines report how many tests ran, and fails if none did.
count() {
    local output from=$SECONDS n
    output=$(mktemp "$DEV/tmp/test-output-XXXXXX")
    echo "==> $what"
    "$@" 2>&1 | tee "$output"
    n=$(awk '/^test result: ok\. / { n += $4 } END { print n + 0 }' "$output")
    if [ "$n" = 0 ]; then
        echo "No test ran: $what" >&2
        exit 1
    fi
    sed -nE "s/^test (.*) \.\.\. ok <([0-9.]+)s>$/\2 s  \1, $what/p" "$output" >>"$durations"
    printf '%5d s  %5d tests  %s\n' $((SECONDS - from)) "$n" "$what" >>"$stages"
    rm "$output"
}

pg_config() {
    local name=PG$1
    if [ -z "${!name-}" ]; then echo "make test knows PostgreSQL 18, 17, 16 and 15, not $1" >&2 && exit 1; fi
    echo "${!name}"
}

# Runs the client tests. The time of each is only printed by an unstable option of Rust's test harness, which is read when
# the tests run and changes nothing of how they are built.
client_tests() {
    (cd tests && RUSTC_BOOTSTRAP=1 "$binary" -Z unstable-options --report-time --test-threads "$threads" "$@")
}

long=
if [ "${1-}" = --long ]; then
    long=1
    shift
fi

majors=()
for major in "$@"; do
    if make --no-print-directory postgres PG="$major"; then
        majors+=("$major")
    elif [ "$major" != 18 ] && [ "${CI-}" != true ]; then
        echo "==> skipping the tests on PostgreSQL $major, for the reason above"
    else
        echo "PostgreSQL $major is needed and cannot be had, for the reason above." >&2
        exit 1
    fi
done

# Runs #[pg_test] functions in a copy of a PostgreSQL: a test build has functions and a schema that others must not have.
in_server_tests() {
    local major=$1 copy data=$DEV/tmp/pgrx as=()
    rm -rf "$DEV/pg$major-test"
    cp -a "$DEV/pg$major" "$DEV/pg$major-test"
    copy=$(pg_config "$major" | sed "s:/pg$major/:/pg$major-test/:")
    mkdir -p "$data"
    if [ "$(id -u)" = 0 ]; then
        PATH=$PWD/tests/setup/bin:$PATH
        as=(--runas "$RUN_AS")
        chown "$RUN_AS" "$data"
    fi
    what="in-server tests, PostgreSQL $major"
    USER=$(id -un) count tests/setup/pgrx.sh "$copy" test "pg$major" --profile "$PROFILE" --package tollgate \
        --no-default-features --features "$FEATURES" --pgdata "$data" "${as[@]}"
}

# All that comes before the client tests on a PostgreSQL.
prepare() {
    if [ -z "$long${ONLY-}" ]; then in_server_tests "$1"; fi
    make --no-print-directory install PG="$1"
}

if [ -z "$long${ONLY-}" ]; then
    what="unit tests"
    count cargo test --package tollgate-core --package tollgated
    what="unit tests of the benchmark"
    count cargo test --package tollgate-tests --bin bench
fi

if [ -n "$long" ]; then
    # What the packages and images are tried in and with. Without them their tests say so.
    if ! make --no-print-directory package clean-roots VERSIONS="18 17 16 15" && [ "${CI-}" = true ]; then exit 1; fi
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends lintian umoci crun >/dev/null || [ "${CI-}" != true ]
    fi
fi
make --no-print-directory pgbouncer promtool drivers binaries
if [ -n "$long" ]; then make --no-print-directory drivers-long; fi
export TOLLGATE_TEST_TOLLGATED=$DEV/bin/tollgated
others=
if [ -n "$long" ]; then
    # A test of these upgrades from another version.
    for major in "${majors[@]}"; do prepare "$major"; done
else
    prepare "${majors[0]}"
fi
echo "==> building the client tests"
binary=$(cargo test --quiet --no-run --message-format=json --package tollgate-tests --test it |
    sed -nE 's|.*"executable":"([^"]+/it-[^"]+)".*|\1|p')
if [ -z "$long" ]; then
    (for major in "${majors[@]:1}"; do prepare "$major"; done) >"$DEV/tmp/prepare.log" 2>&1 &
    others=$!
    trap 'if [ -n "$others" ]; then kill "$others" 2>/dev/null || true; fi' EXIT
fi
for major in "${majors[@]}"; do
    if [ "$major" != "${majors[0]}" ] && [ -n "$others" ]; then
        prepared=0
        wait "$others" || prepared=$?
        cat "$DEV/tmp/prepare.log"
        if [ $prepared != 0 ]; then exit $prepared; fi
        others=
    fi
    TOLLGATE_TEST_PG_CONFIG=$(pg_config "$major")
    export TOLLGATE_TEST_PG_CONFIG
    unset TOLLGATE_TEST_OLDER_PG_CONFIG
    for other in "${majors[@]}"; do
        if [ "$other" -lt "$major" ]; then
            TOLLGATE_TEST_OLDER_PG_CONFIG=$(pg_config "$other")
            export TOLLGATE_TEST_OLDER_PG_CONFIG
        fi
    done
    read -ra only <<<"${ONLY-}"
    case $major in
        16 | 17) [ -n "${ONLY-}" ] || for topic in $SMOKE; do only+=("$topic::"); done ;;
        15) [ -n "${ONLY-}" ] || for topic in bulk:: "${daemon_side[@]}"; do only+=(--skip "$topic"); done ;;
    esac
    if [ -z "$long" ]; then
        what="client tests, PostgreSQL $major"
        count client_tests "${only[@]}"
    elif [ "$major" != 16 ] && [ "$major" != 17 ]; then
        what="long client tests, PostgreSQL $major"
        count client_tests --ignored
        if [ "$major" = 15 ]; then
            what="growth of costs, PostgreSQL $major"
            count client_tests bulk::
        fi
        what="faults ten times over, PostgreSQL $major"
        TOLLGATE_TEST_ROUNDS=${TOLLGATE_TEST_ROUNDS:-10} count client_tests faults:: daemon::
    fi
done

echo "==> the slowest ten"
sort -rn "$durations" | sed -n 1,10p
echo "==> how long each part took"
cat "$stages"
echo "==> PostgreSQL ${majors[*]}:"
awk '{ passed += $3 } END { print passed " passed, 0 failed" }' "$stages"
