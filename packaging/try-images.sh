#!/usr/bin/env bash
# try-images.sh DIR: runs the images that images.sh made in DIR: the server makes its cluster, and the daemon serves it. In
# containers by crun, or, where that or the kernel is missing something, in a chroot, which it says.
#
# Exit status 3: they cannot be run here, for the reason that the last line says.
set -euo pipefail
umask 022
images=$1
unavailable() {
    echo "The images cannot be run here: $1" >&2
    exit 3
}
[ "$(id -u)" = 0 ] || unavailable "only root can unpack them with their owners."
for program in umoci python3; do
    command -v $program >/dev/null || unavailable "there is no $program (apt-get install $program)."
done
here=$(cd "$(dirname "$0")" && pwd)
version=$(sed -nE 's/^version = "(.*)"/\1/p' "$here/../Cargo.toml")
work=$(mktemp -d)
chmod 711 "$work"
running=()

finish() {
    for process in "${running[@]}"; do kill -INT "$process" 2>/dev/null || true; done
    wait
    for mounted in "$work"/*/rootfs/run/postgresql; do
        while umount --lazy "$mounted" 2>/dev/null; do :; done
    done
    rm -rf --one-file-system "$work"
}
trap finish EXIT

# The socket's directory is what both share.
mkdir "$work/sockets"
chmod 2777 "$work/sockets"
for name in tollgate-postgresql-18 tollgated; do
    umoci unpack --image "$images/$name:$version" "$work/$name" >/dev/null
    mkdir -p "$work/$name/rootfs/run/postgresql"
done

# bundle NAME VARIABLE=VALUE…: has the bundle's configuration, which umoci derived from the image's, run without a terminal, with
# these variables and the shared directory. No network is needed.
bundle() {
    python3 - "$work/$1/config.json" "$work/sockets" "${@:2}" <<'PYTHON'
import json, sys
path, sockets, *variables = sys.argv[1:]
with open(path) as file: config = json.load(file)
process = config["process"]
process["terminal"] = False
process["env"] += variables
config["mounts"] = [m for m in config["mounts"] if m["destination"] not in ("/etc/resolv.conf", "/var/lib/postgresql")]
config["mounts"].append({"destination": "/run/postgresql", "type": "bind", "source": sockets, "options": ["bind", "rw"]})
with open(path, "w") as file: json.dump(config, file)
print(process["user"]["uid"], *process["args"])
PYTHON
}

how=crun
# start NAME VARIABLE=VALUE…: in the background; its process is the last of `running`.
start() {
    local name=$1 user args
    shift
    read -r user args <<<"$(bundle "$name" "$@")"
    [ "$user" = 999 ] || { echo "the image $name runs as the user $user" >&2 && exit 1; }
    if [ "$how" = crun ]; then
        (cd "$work/$name" && exec crun --root "$work/crun" --cgroup-manager=disabled run "try-$$-$name") >"$work/$name.log" 2>&1 &
    else
        mount --bind "$work/sockets" "$work/$name/rootfs/run/postgresql" 2>/dev/null || true
        # shellcheck disable=SC2086
        (exec chroot --userspec=999:999 "$work/$name/rootfs" /usr/bin/env -i PATH=/usr/lib/postgresql/18/bin:/usr/bin:/bin LC_ALL=C.UTF-8 \
            PGDATA=/var/lib/postgresql/18/main "$@" $args) >"$work/$name.log" 2>&1 &
    fi
    running+=($!)
}

# The client is that of the server's image.
sql() {
    chroot --userspec=999:999 "$work/tollgate-postgresql-18/rootfs" /usr/bin/env -i PATH=/usr/lib/postgresql/18/bin:/usr/bin:/bin \
        PGHOST="$1" PGUSER=postgres PGPASSWORD=secret PGDATABASE=app psql -XqAtw -v ON_ERROR_STOP=1 -c "$2"
}

# Not the server that only makes the cluster, which listens to no network.
started() { [ "$(sql /run/postgresql 'show listen_addresses')" = '*' ]; }

# until_true WHAT COMMAND…: within a minute.
until_true() {
    local what=$1 end=$((SECONDS + 60))
    shift
    until "$@" >/dev/null 2>&1; do
        if [ $SECONDS -gt $end ] || ! kill -0 "${running[-1]}" 2>/dev/null; then
            echo "$what did not happen:" >&2
            tail -20 "$work"/*.log >&2
            return 1
        fi
        sleep 0.2
    done
}

if ! command -v crun >/dev/null; then
    echo '==> there is no crun here: the images run in a chroot'
    how=chroot
fi
server=(tollgate-postgresql-18 POSTGRES_PASSWORD=secret POSTGRES_DB=app)
start "${server[@]}"
# The client comes from outside of the container, so its root needs the socket's directory too.
mount --bind "$work/sockets" "$work/tollgate-postgresql-18/rootfs/run/postgresql" 2>/dev/null || true
if ! until_true 'the start of the server' started; then
    [ "$how" = crun ] || exit 1
    echo '==> crun could not run it on this kernel, see above: trying in a chroot'
    how=chroot running=()
    start "${server[@]}"
    until_true 'the start of the server' started
fi
sql /run/postgresql "create role tollgated login password 'daemon'" >/dev/null
sql /run/postgresql "select tollgate.grant_capability('tollgated', 'operator')" >/dev/null
start tollgated "DATABASE_URL=host=/run/postgresql user=tollgated password=daemon dbname=app" TOLLGATED_OPS_ADDRESS=off
token=$(sql /run/postgresql "select token from tollgate.create_api_token('ann', 'tried')")
[ "$(sql /run/postgresql "select code from tollgate.verify_api_token('$token')")" = VALID ]
flushed() { [ "$(sql /run/postgresql 'select coalesce(sum(use_count), 0) from tollgate.token_usage')" = 1 ]; }
until_true 'the flush of a use' flushed
echo "==> the images ran by $how as user 999, with $(sql /run/postgresql 'show server_version'), and carried a use of a token"
