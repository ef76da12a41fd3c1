#!/bin/sh
# usage: run.sh FOLDER
#
# Embeds this project's own documents twice, in an empty FOLDER: cold, where everything is computed, and warm,
# in a new process, where everything comes from the disk tier.
set -eu

project=$(cd "$(dirname "$0")/../.." && pwd)
folder=$1

show() {
    printf '\n$ %s\n' "$*"
    "$@"
}

rm -rf "$folder"
mkdir -p "$folder"
cd "$folder"
cp "$project/examples/demo/embedonce.toml" .
cp -R "$project/README.md" "$project/CHANGELOG.md" "$project/docs" .

echo "In $folder: embedonce.toml, and this project's documents."
show embedonce embed README.md CHANGELOG.md docs --out cold.npy
show embedonce embed README.md CHANGELOG.md docs --out warm.npy
show cmp cold.npy warm.npy
echo "the same bytes, cold and warm"
show embedonce stats
