#!/usr/bin/env bash
# lint.sh: all static checks, and the rules for our SQL. Called by `make lint`.
set -euo pipefail

# As in test.sh, so that the bindings to PostgreSQL are made once.
export PROFILE=dev FEATURES=testing

step() { echo "==> $*"; }

step "formatting"
cargo fmt --all --check

make --no-print-directory linters

step "shell scripts"
mapfile -t scripts < <(git ls-files '*.sh' .ci tests/setup/bin)
# SC2016: programs in single quotes are meant for other shells.
"$DEV/shellcheck/bin/shellcheck" --external-sources --source-path=SCRIPTDIR --exclude=SC2016 "${scripts[@]}"

# A command that stops reading early ends the one before it by SIGPIPE, which pipefail makes a failure, now and then.
if git grep -nE '\| *(head|grep -[a-zA-Z]*q)([^a-z]|$)' -- "${scripts[@]}" Makefile ':!tests/setup/lint.sh'; then
    echo "Let the last command of a pipe read to the end: sed -n 1,10p, grep >/dev/null." >&2
    exit 1
fi

step "Python"
"$DEV/ruff/bin/ruff" check --quiet
"$DEV/ruff/bin/ruff" format --quiet --check

step "JavaScript and JSON"
biome=("$DEV"/biome/node_modules/@biomejs/cli-*/biome)
"${biome[0]}" check --error-on-warnings

step "YAML"
mapfile -t documents < <(git ls-files '*.yaml' '*.yml')
PYTHONPATH=$DEV/yamllint python3 -m yamllint --strict "${documents[@]}"

step "plain English: words that our texts, comments and names do without"
words='whoever|nobody|somebody|amiss|mend(s|ed|ing)?|fares?|told|(tell|tells|telling) of'
# The Unix account nobody is what root runs PostgreSQL as where there is no postgres.
if git grep -IniE "(^|[^a-z])($words)([^a-z]|\$)" -- ':!*.lock' ':!*lock.json' ':!tests/setup/lint.sh' ':!tests/src/account.rs' |
    grep -vE '^Makefile:[0-9]+:export RUN_AS '; then
    echo "Say it in other words: who, none, one, wrong, fix, do, reported, distinguished, publish." >&2
    exit 1
fi

step "clippy: core, daemon, tests"
cargo clippy --quiet --package tollgate-core --package tollgated --package tollgate-tests --all-targets -- -D warnings

for major in 18 15 17 16; do
    if ! make --no-print-directory postgres PG=$major; then
        if [ "${CI-}" = true ]; then exit 1; fi
        step "skipping clippy for PostgreSQL $major, for the reason above"
        continue
    fi
    name=PG$major
    pg_config=${!name}
    step "clippy: extension, PostgreSQL $major"
    clippy=(tests/setup/pgrx.sh "$pg_config" cargo clippy --quiet --profile "$PROFILE" --package tollgate --no-default-features)
    "${clippy[@]}" --lib --features "pg$major $FEATURES" -- -D warnings
    # The tests are the same for each.
    if [ $major = 18 ]; then "${clippy[@]}" --all-targets --features "pg$major pg_test $FEATURES" -- -D warnings; fi
done

step "the rules for our SQL"
make --no-print-directory install PG=18
TOLLGATE_TEST_PG_CONFIG=$PG18 \
    cargo test --quiet --package tollgate-tests --test it -- sql_lint::
