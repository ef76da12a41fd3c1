"""Everything in a manifest is checked when a bundle is opened, without pydantic."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optional import needs

from embedonce.errors import ConfigError
from embedonce.vectors import Entry, freeze

pytestmark = needs("pyarrow")

SCOPE = "0123456789abcdef"
FOLDER = Path("bundle")


def make_part(**changes: Any) -> dict[str, Any]:
    part = {
        "file": f"{SCOPE}-{'a' * 32}.arrow",
        "scope": SCOPE,
        "rows": 2,
        "bytes": 1000,
        "checksum": "a" * 32,
        "first": f"eo1.{SCOPE}.{'0' * 64}",
        "last": f"eo1.{SCOPE}.{'f' * 64}",
        "encrypted": False,
        "dtype": "float32",
        "dimensions": 4,
    }
    part |= changes
    return {name: value for name, value in part.items() if value is not ...}


def make_manifest(**changes: Any) -> dict[str, Any]:
    spaces = {SCOPE: {"card": {"model": "m"}}, "f" * 16: {"frame": "AAEC"}}
    return {"format": "embedonce bundle", "version": 1, "spaces": spaces, "parts": [make_part()], **changes}


def parse(found: Any) -> Any:
    from embedonce_backends.bundle.manifest import parse_manifest

    return parse_manifest(json.dumps(found).encode(), FOLDER)


def test_a_manifest_is_written_as_it_was_read() -> None:
    encrypted = make_part(
        file=f"{SCOPE}-{'b' * 32}.arrow", checksum="b" * 32, encrypted=True, dtype=..., dimensions=...
    )
    found = make_manifest(parts=[make_part(), encrypted])
    manifest = parse(found)
    assert json.loads(manifest.write()) == found
    assert manifest.entries == 4
    assert manifest.spaces["f" * 16] == b"\0\1\2"


DAMAGED: dict[str, tuple[Callable[[], Any], str]] = {
    "no JSON object": (lambda: [], "belongs to another program"),
    "another version": (lambda: make_manifest(version=2), "is a bundle of version 2, and this embedonce reads only"),
    "a version that is no number": (lambda: make_manifest(version="1"), "damaged at version: expected 1"),
    "another field": (
        lambda: make_manifest(more=1),
        "it has other fields than format, parts, spaces, version",
    ),
    "no parts": (lambda: {"format": "embedonce bundle", "version": 1, "spaces": {}}, "damaged: parts is missing"),
    "parts as an object": (lambda: make_manifest(parts={}), "damaged at parts: expected a list"),
    "a part as a list": (lambda: make_manifest(parts=[[]]), r"damaged at parts\.0: expected an object"),
    "spaces as a list": (lambda: make_manifest(spaces=[]), "damaged at spaces: expected an object"),
    "a space without a scope": (lambda: make_manifest(spaces={"../x": {"card": {}}}), "damaged at spaces: expected"),
    "an empty space": (lambda: make_manifest(spaces={SCOPE: {}}), "a space has either a card or a frame"),
    "a card as a text": (
        lambda: make_manifest(spaces={SCOPE: {"card": "m"}}),
        rf"damaged at spaces\.{SCOPE}\.card: expected a JSON object",
    ),
    "a frame that is not base64": (lambda: make_manifest(spaces={SCOPE: {"frame": "%"}}), "frame: expected base64"),
    "a frame as a number": (lambda: make_manifest(spaces={SCOPE: {"frame": 5}}), "frame: expected base64"),
    "a part twice": (lambda: make_manifest(parts=[make_part(), make_part()]), "damaged at parts: it contains a file"),
}
PARTS: dict[str, tuple[dict[str, Any], str]] = {
    "a missing field": ({"rows": ...}, "rows is missing"),
    "another field": ({"more": 1}, "it has other fields than"),
    "no rows": ({"rows": 0}, r"0\.rows: expected a number from 1 to"),
    "a truth value as a number": ({"rows": True}, r"rows: expected a number"),
    "a fraction": ({"bytes": 1.5}, "bytes: expected a number"),
    "a path": ({"file": f"../{SCOPE}-{'a' * 32}.arrow"}, r"file: expected <scope>-<checksum>\.arrow"),
    "a name with a line break": ({"file": f"{SCOPE}-{'a' * 32}.arrow\n"}, "file: expected"),
    "the file of another part": ({"checksum": "b" * 32}, "the file must be named after the scope and the checksum"),
    "a key of another scope": ({"first": f"eo1.{'0' * 16}.{'0' * 64}"}, "must be keys of the scope"),
    "keys in descending order": (
        {"first": f"eo1.{SCOPE}.{'f' * 64}", "last": f"eo1.{SCOPE}.{'0' * 64}"},
        "must be keys of the scope, in this order",
    ),
    "no key": ({"first": "eo1"}, "first: expected the key of an entry"),
    "an unknown dtype": ({"dtype": "float64"}, "dtype: expected one of float32, float16, int8"),
    "a dtype as a list": ({"dtype": []}, "dtype: expected one of"),
    "no dimensions": ({"dimensions": ...}, "a part has a dtype and dimensions, unless it is encrypted"),
    "a dtype of encrypted entries": ({"encrypted": True}, "a part has a dtype and dimensions, unless it is encrypted"),
    "encrypted as a number": ({"encrypted": 1}, "encrypted: expected true or false"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_an_invalid_manifest_is_refused_at_its_place(name: str) -> None:
    make, message = DAMAGED[name]
    with pytest.raises(ConfigError, match=message):
        parse(make())


@pytest.mark.parametrize("name", PARTS)
def test_an_invalid_part_is_refused_at_its_place(name: str) -> None:
    changes, message = PARTS[name]
    with pytest.raises(ConfigError, match=message):
        parse(make_manifest(parts=[make_part(**changes)]))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.data(), values)
def test_any_other_value_in_a_manifest_is_valid_or_refused(data: st.DataObject, value: Any) -> None:
    manifest = make_manifest()
    place: Any = data.draw(st.sampled_from([manifest, manifest["parts"][0], manifest["spaces"][SCOPE]]))
    place[data.draw(st.sampled_from([*place, "other"]))] = value
    with suppress(ConfigError):
        parsed = parse(manifest)
        assert parse(json.loads(parsed.write())) == parsed


OPEN = """
import sys
from embedonce_backends.bundle import BundleBackend
backend = BundleBackend(path=sys.argv[1])
[key] = backend.scan("eo1.0")
assert backend.get(key) is not None and list(backend.get_many([key])) == [key]
print({"pydantic", "pandas"} & set(sys.modules))
"""


def test_opening_and_reading_a_bundle_imports_neither_pydantic_nor_pandas(tmp_path: Path) -> None:
    from embedonce_backends.bundle import BundleBackend

    with BundleBackend.create_writer(tmp_path, replace=False) as writer:
        writer.add({f"eo1.{SCOPE}.{'0' * 64}": Entry(freeze([1.0, 2.0]), 1e9)})
        writer.commit()
    command = [sys.executable, "-c", OPEN, str(tmp_path)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout == "set()\n"
