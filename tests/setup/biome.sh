#!/usr/bin/env bash
# biome.sh DIR: installs Biome, which checks our JavaScript and JSON, into DIR. npm is the system's, or that which the
# drivers of Node were fetched with.
set -euo pipefail
umask 022
dir=$1
here=$(cd "$(dirname "$0")/biome" && pwd)

if [ -e "$dir" ]; then exit 0; fi
"$here/../drivers.sh" "$DEV/drivers" node
PATH=$PATH:$DEV/drivers/node/python/bin
echo "==> downloading Biome into ${dir#"$PWD"/}"
rm -rf "$dir.part"
mkdir -p "$dir.part"
cp "$here/package.json" "$here/package-lock.json" "$dir.part/"
(cd "$dir.part" && npm ci --silent --ignore-scripts --no-audit --no-fund)
mv "$dir.part" "$dir"
