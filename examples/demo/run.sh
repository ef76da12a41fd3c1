#!/bin/sh
# usage: run.sh FOLDER
#
# Embeds this project's own documents in an empty FOLDER: cold, where everything is computed, and warm, in a new
# process, where everything comes from the disk tier. `make demo` calls it.
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
