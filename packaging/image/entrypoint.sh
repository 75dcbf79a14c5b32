#!/bin/sh
# The entry point of the image of PostgreSQL with Tollgate. At the first start it makes a cluster in PGDATA, whose superuser
# postgres has the password that POSTGRES_PASSWORD_FILE or POSTGRES_PASSWORD gives, and creates the extension in the
# database that POSTGRES_DB names. Arguments are the server's: `-c max_connections=300`.
set -eu

bin=$(echo /usr/lib/postgresql/*/bin)
if [ ! -s "$PGDATA/PG_VERSION" ]; then
    if [ -n "${POSTGRES_PASSWORD_FILE-}" ]; then POSTGRES_PASSWORD=$(cat "$POSTGRES_PASSWORD_FILE"); fi
    if [ -z "${POSTGRES_PASSWORD-}" ]; then
        echo 'Give the superuser a password: POSTGRES_PASSWORD_FILE or POSTGRES_PASSWORD.' >&2
        exit 64
    fi
    umask 077
    mkdir -p "$PGDATA"
    printf '%s\n' "$POSTGRES_PASSWORD" >/tmp/pw
    "$bin/initdb" --pgdata "$PGDATA" --username postgres --pwfile /tmp/pw --encoding UTF8 --locale-provider builtin \
        --builtin-locale C.UTF-8 --locale C.UTF-8 --data-checksums --auth-host scram-sha-256 --auth-local scram-sha-256 >/dev/null
    rm -f /tmp/pw
    # Others give a password, also over the socket.
    cat >"$PGDATA/pg_hba.conf" <<'HBA'
local all postgres peer
local all all scram-sha-256
host all all all scram-sha-256
HBA
    {
        echo "listen_addresses = '*'"
        echo "shared_preload_libraries = 'tollgate'"
        echo "unix_socket_directories = '/var/run/postgresql'"
    } >>"$PGDATA/postgresql.conf"
    "$bin/pg_ctl" --pgdata "$PGDATA" --silent --wait --options "-c listen_addresses=''" start >/dev/null
    database=${POSTGRES_DB:-postgres}
    if [ "$database" != postgres ]; then "$bin/createdb" --username postgres --maintenance-db postgres -- "$database"; fi
    PGDATABASE=$database "$bin/psql" -Xqw -U postgres -v ON_ERROR_STOP=1 -c 'CREATE EXTENSION tollgate'
    "$bin/pg_ctl" --pgdata "$PGDATA" --silent --wait --mode fast stop >/dev/null
fi
unset POSTGRES_PASSWORD
exec "$bin/postgres" -D "$PGDATA" "$@"
