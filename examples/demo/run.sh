#!/bin/sh
# usage: run.sh FOLDER
#
# Embeds this project's documents in an empty FOLDER twice. The first, cold run computes everything. The second, warm run
# is a new process and takes everything from the disk tier. `make demo` runs this script.
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
cp "$project/examples/demo/embedonce.toml" "$project/README.md" "$project/CHANGELOG.md" .
cp -R "$project/docs" .

echo "In $folder: embedonce.toml, and this project's documents."
show embedonce embed README.md CHANGELOG.md docs --out cold.npy
show embedonce embed README.md CHANGELOG.md docs --out warm.npy
show cmp cold.npy warm.npy
show embedonce stats

embedonce embed README.md CHANGELOG.md docs --out again.npy --json >again.json
python - <<'END'
import json

with open("again.json") as file:
    again = json.load(file)
found = sum(again["hits"].values())
print(f"\nSaved: {found} of {again['texts']} texts are not embedded again, and the vectors are the same bytes.")
END
