"""Bundles with damaged bytes, and with manifests that somebody else has written.

Whatever is damaged, a lookup returns the stored vector, a miss, or a corrupt value; never another vector. A file whose
structure is broken is an error when it is opened, which names the file and says what to do.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import optional
import pytest
from bundle_entries import CARD, CARD_KEY, OTHER_SCOPE, SCOPE, is_same, key_of, make_entries, write_bundle
from hypothesis import given, settings
from hypothesis import strategies as st

from embedonce import ConfigError
from embedonce.errors import TierError
from embedonce.vectors import Dtype, Entry

pytestmark = optional.needs("pyarrow")

CORRUPT = b""


def open_bundle(folder: Path) -> Any:
    from embedonce_backends.bundle import BundleBackend

    return BundleBackend(path=folder)


def make_bundle(folder: Path, dtype: Dtype | None) -> dict[str, Entry | bytes]:
    """Write a bundle of one part; without a dtype, it has frames."""
    items: dict[str, Entry | bytes] = dict(make_entries(12, dtype=dtype or "float32", dimensions=4))
    if dtype is None:
        items = {key: b"frame of " + key.encode() for key in items}
    write_bundle(folder, items)
    return items


def find_part(folder: Path) -> Path:
    [part] = folder.glob("*.arrow")
    return part


def check_answers(backend: Any, items: Mapping[str, Entry | bytes], *, has_frames: bool) -> tuple[int, int]:
    """Check that no answer is wrong, and return how many keys are corrupt and how many are missing."""
    found = backend.get_many(list(items))
    for key, value in found.items():
        # A frame has its own checksum, which the engine checks.
        assert value == CORRUPT or is_same(value, items[key]) or (has_frames and isinstance(value, bytes))
        alone = backend.get(key)
        # With a damaged prefix, a search for one key may go another way than a search for several.
        assert alone is None or alone == CORRUPT or is_same(alone, items[key]) or has_frames
    return sum(value == CORRUPT for value in found.values()), len(items) - len(found)


@pytest.mark.parametrize("dtype", ["float32", "int8", None])
@pytest.mark.parametrize("is_open", [True, False])
def test_no_flipped_bit_gives_another_vector(tmp_path: Path, dtype: Dtype | None, is_open: bool) -> None:
    items = make_bundle(tmp_path / "b", dtype)
    part = find_part(tmp_path / "b")
    original = part.read_bytes()
    chosen = random.Random(7)
    places = chosen.sample(range(len(original)), 300)
    refused = damaged = 0
    backend = open_bundle(tmp_path / "b")
    with part.open("r+b", buffering=0) as file:
        for place in places:
            file.seek(place)
            file.write(bytes([original[place] ^ (1 << chosen.randrange(8))]))
            problem = ""
            try:
                backend = backend if is_open else open_bundle(tmp_path / "b")
            except ConfigError as error:
                refused += 1
                problem = str(error)
            if problem:
                assert str(part) in problem
                assert "copy the bundle again" in problem
            else:
                damaged += check_answers(backend, items, has_frames=dtype is None) != (0, 0)
                list(backend.scan("eo1."))
                backend.count(f"eo1.{SCOPE}.8")
                backend.measure("eo1.")
            file.seek(place)
            file.write(original[place : place + 1])
    assert bool(refused) is not is_open
    assert damaged or dtype is None
    assert check_answers(backend, items, has_frames=False) == (0, 0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_overwritten_stretch_gives_another_vector(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "b"
        items = make_bundle(folder, "float16")
        part = find_part(folder)
        content = bytearray(part.read_bytes())
        start = data.draw(st.integers(0, len(content) - 1))
        stretch = data.draw(st.binary(min_size=1, max_size=200) | st.sampled_from([bytes(300), b"\xff" * 300]))
        content[start : start + len(stretch)] = stretch[: len(content) - start]
        part.write_bytes(content)
        try:
            backend = open_bundle(folder)
        except ConfigError:
            return
        check_answers(backend, items, has_frames=False)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_a_damaged_row_is_corrupt_alone_and_verify_names_its_part(tmp_path: Path, dtype: Dtype) -> None:
    items = make_bundle(tmp_path / "b", dtype)
    part = find_part(tmp_path / "b")
    content = bytearray(part.read_bytes())
    for key in list(items)[3:5]:
        content[content.index(key.encode()) + 60] ^= 1
    part.write_bytes(content)
    backend = open_bundle(tmp_path / "b")
    assert check_answers(backend, items, has_frames=False) == (2, 0)
    assert [backend.get(key) == CORRUPT for key in list(items)[2:6]] == [False, True, True, False]
    with pytest.raises(TierError, match=r"checksum is not that of the manifest \(2 of 12 rows affected\)") as caught:
        backend.verify()
    assert part.name in str(caught.value)
    assert "embedonce export --out" in str(caught.value)


def test_an_intact_row_of_another_part_replaces_a_damaged_one(tmp_path: Path) -> None:
    items = make_bundle(tmp_path / "a", "float32")
    some = dict(list(items.items())[2:])
    write_bundle(tmp_path / "b", some)
    manifest, other = (json.loads((tmp_path / name / "manifest.json").read_text()) for name in "ab")
    damaged = bytearray(find_part(tmp_path / "a").read_bytes())
    damaged[damaged.index(list(items)[3].encode()) + 70] ^= 1
    damaged[damaged.index(next(iter(items)).encode()) + 70] ^= 1
    find_part(tmp_path / "a").write_bytes(damaged)
    shutil.copy(find_part(tmp_path / "b"), tmp_path / "a")
    manifest["parts"] += other["parts"]
    (tmp_path / "a/manifest.json").write_text(json.dumps(manifest))
    assert check_answers(open_bundle(tmp_path / "a"), items, has_frames=False) == (1, 0)


@pytest.mark.parametrize("size", [0, 1, 100, -1, -200])
def test_a_truncated_part_is_an_error_when_it_is_opened(tmp_path: Path, size: int) -> None:
    make_bundle(tmp_path / "b", "float32")
    part = find_part(tmp_path / "b")
    os.truncate(part, size if size >= 0 else part.stat().st_size + size)
    with pytest.raises(ConfigError, match=r"is damaged: it has [\d,]+ bytes instead of [\d,]+; copy the bundle again"):
        open_bundle(tmp_path / "b")


def test_a_pointer_of_git_lfs_is_recognised(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b", "float32")
    find_part(tmp_path / "b").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(ConfigError, match="run `git lfs pull`"):
        open_bundle(tmp_path / "b")


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b", "float32")
    part = find_part(tmp_path / "b")
    part.unlink()
    with pytest.raises(ConfigError, match=f"{part.name} is missing"):
        open_bundle(tmp_path / "b")


def test_a_part_of_another_form_is_refused(tmp_path: Path) -> None:
    """Each file is a valid Arrow file, but not the one that the manifest describes."""
    import pyarrow as pa

    make_bundle(tmp_path / "b", "float32")
    part = find_part(tmp_path / "b")
    table = pa.ipc.open_file(part).read_all()
    others: list[tuple[Any, dict[str, Any]]] = [
        (table.drop_columns(["checksum"]), {}),
        (table.slice(1), {}),
        (table, {"compression": "zstd"}),
        (pa.concat_tables([table, table]), {}),
        (table.set_column(0, "key", table["key"].cast(pa.large_string())), {}),
        (table.set_column(1, "prefix", table["created"]), {}),
    ]
    for other, options in others:
        with pa.ipc.new_file(part, other.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
            writer.write_table(other)
        change_manifest(tmp_path / "b", lambda found: found["parts"][0].update(bytes=part.stat().st_size))
        with pytest.raises(ConfigError, match=r"is damaged: (its columns|it has|a column is compressed)"):
            open_bundle(tmp_path / "b")


def test_verify_finds_rows_that_another_writer_has_made_wrong(tmp_path: Path) -> None:
    """The checksum of the file is right, because it is of what was written."""
    import pyarrow as pa
    import xxhash

    changes: list[tuple[str, Callable[[Any], Any]]] = [
        ("keys are not in ascending order", lambda table: table.take([1, 0, *range(2, 12)])),
        ("column prefix does not match", lambda table: _replace(table, "prefix", pa.array([0] * 12, pa.uint64()))),
        ("a checksum is wrong", lambda table: _replace(table, "checksum", pa.array([0] * 12, pa.uint64()))),
        ("a checksum is wrong", lambda table: _replace(table, "created", pa.array([1.0] * 12))),
    ]
    for number, (problem, change) in enumerate(changes):
        folder = tmp_path / str(number)
        items = make_bundle(folder, "float32")
        part = find_part(folder)
        table = change(pa.ipc.open_file(part).read_all()).combine_chunks()
        with pa.ipc.new_file(part, table.schema) as writer:
            writer.write_table(table)
        digest = xxhash.xxh3_128_hexdigest(part.read_bytes())
        renamed = part.rename(folder / f"{SCOPE}-{digest}.arrow")
        keys = table["key"].to_pylist()
        change_manifest(
            folder,
            lambda found, new=renamed, digest=digest, keys=keys: found["parts"][0].update(  # type: ignore[misc]
                file=new.name, checksum=digest, bytes=new.stat().st_size, first=min(keys[0], keys[-1]), last=keys[-1]
            ),
        )
        backend = open_bundle(folder)
        check_answers(backend, items, has_frames=False)
        with pytest.raises(TierError, match=problem):
            backend.verify()


def _replace(table: Any, name: str, values: Any) -> Any:
    index = table.schema.get_field_index(name)
    return table.set_column(index, table.schema.field(index), values)


# --- manifests --------------------------------------------------------------------------------


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


PART = "0123456789abcdef-" + "0" * 32 + ".arrow"
WRONG_FIELDS: list[tuple[str, Any]] = [
    *(("file", name) for name in ("../x.arrow", "/etc/passwd", "a/b.arrow", "", ".", "..", f"{PART}\n")),
    *(("file", name) for name in (f"../{PART}", f"./{PART}", f"{PART}/", PART.replace("/", "\\"), "x\0", 7, None)),
    *(("rows", rows) for rows in (0, -1, 13, 2**31, 2**63, 10**30, 12.0, "12", True, None, 1e400)),
    *(("bytes", size) for size in (0, -1, 1, 2**62, 10**30, "1", None)),
    *(("dimensions", number) for number in (0, -4, 3, 5, 2**31, 2**64, "4", None)),
    *(("dtype", name) for name in ("float16", "int8", "float64", "", None, 1)),
    *(("scope", name) for name in (OTHER_SCOPE, "..", "", 1)),
    *(("first", key) for key in (key_of(1, OTHER_SCOPE), "eo1.", f"eo1.{SCOPE}.{'f' * 64}", 1)),
    *(("last", key) for key in (key_of(1, OTHER_SCOPE), f"eo1.{SCOPE}.{'0' * 64}", [], None)),
    *(("checksum", text) for text in ("0" * 32, "", None)),
    *(("encrypted", flag) for flag in (True, 0, "false", None)),
    ("extra", 1),
]  # fmt: skip


def test_wrong_fields_of_a_part_are_refused(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b", "float32")
    manifest = (tmp_path / "b/manifest.json").read_text()
    for name, value in WRONG_FIELDS:
        change_manifest(tmp_path / "b", lambda found, name=name, value=value: found["parts"][0].update({name: value}))  # type: ignore[misc]
        with pytest.raises(ConfigError, match="is damaged") as caught:
            open_bundle(tmp_path / "b")
        assert "embedonce export --out" in str(caught.value), (name, value)
        (tmp_path / "b/manifest.json").write_text(manifest)
    open_bundle(tmp_path / "b")


def test_a_missing_field_of_a_part_is_refused(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b", "float32")
    manifest = (tmp_path / "b/manifest.json").read_text()
    for name in json.loads(manifest)["parts"][0]:
        change_manifest(tmp_path / "b", lambda found, name=name: found["parts"][0].pop(name))  # type: ignore[misc]
        with pytest.raises(ConfigError, match="is damaged at parts"):
            open_bundle(tmp_path / "b")
        (tmp_path / "b/manifest.json").write_text(manifest)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
        (b"<<<<<<< HEAD\n{}\n", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"a": ' * 100_000, "not valid JSON"),
        (b'{"format": "embedonce bundle", "version": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b"[]", "belongs to another program"),
        (b"null", "belongs to another program"),
        (b'{"format": "other"}', "belongs to another program"),
        (b'{"format": ["embedonce bundle"]}', "belongs to another program"),
        (b'{"format": "embedonce bundle", "version": 2, "files": []}', "version 2, .*; upgrade embedonce: pip install"),
        (b'{"format": "embedonce bundle", "version": 999999999999}', "upgrade embedonce"),
        (b'{"format": "embedonce bundle", "version": 0, "spaces": {}, "parts": []}', "damaged at version"),
        (b'{"format": "embedonce bundle", "version": true, "spaces": {}, "parts": []}', "damaged at version"),
        (b'{"format": "embedonce bundle", "version": 1.0, "spaces": {}, "parts": []}', "damaged at version"),
        (b'{"format": "embedonce bundle", "version": 1}', "parts is missing"),
        (b'{"format": "embedonce bundle", "version": 1, "spaces": {}, "parts": {}}', "damaged at parts"),
        (b'{"format": "embedonce bundle", "version": 1, "spaces": {}, "parts": [null]}', r"damaged at parts\.0"),
        (b'{"format": "embedonce bundle", "version": 1, "spaces": {}, "parts": [], "x": 1}', "other fields than"),
        (b'{"format": "embedonce bundle", "version": 1, "spaces": {"x": {"card": {}}}, "parts": []}', "damaged"),
    ],
)  # fmt: skip
def test_an_invalid_manifest_says_what_is_wrong(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        open_bundle(tmp_path)


@pytest.mark.parametrize(
    "space",
    [
        {}, None, [], {"card": None}, {"card": []}, {"card": {"a": 1}, "frame": "AA=="}, {"frame": "A"}, {"frame": 1},
        {"frame": "AA==\n"}, {"frame": "é"}, {"card": {"a": "x" * 70_000}}, {"card": {"a": float("nan")}}, {"other": 1},
    ],
)  # fmt: skip
def test_an_invalid_space_card_is_refused(tmp_path: Path, space: Any) -> None:
    write_bundle(tmp_path / "b", {CARD_KEY: CARD})
    change_manifest(tmp_path / "b", lambda found: found["spaces"].update({SCOPE: space}))
    with pytest.raises(ConfigError, match="is damaged"):
        open_bundle(tmp_path / "b")


def test_a_part_that_is_named_twice_is_refused(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b", "float32")
    change_manifest(tmp_path / "b", lambda found: found["parts"].append(found["parts"][0]))
    with pytest.raises(ConfigError, match="contains a file twice"):
        open_bundle(tmp_path / "b")


def test_a_manifest_beyond_every_size_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("embedonce_backends.bundle.opened.MAX_MANIFEST_BYTES", 100)
    make_bundle(tmp_path / "b", "float32")
    with pytest.raises(ConfigError, match="is larger than 100 bytes"):
        open_bundle(tmp_path / "b")


# --- links and other files --------------------------------------------------------------------


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b", "float32")
    part = find_part(tmp_path / "b")
    outside = part.rename(tmp_path / part.name)
    part.symlink_to(outside)
    with pytest.raises(ConfigError, match="is a link out of the folder"):
        open_bundle(tmp_path / "b")


def test_links_inside_the_folder_are_followed(tmp_path: Path) -> None:
    """Kubernetes mounts a volume in this way. The folder itself may be a link, too."""
    items = make_bundle(tmp_path / "b", "float32")
    (tmp_path / "b/..data").mkdir()
    for path in list((tmp_path / "b").glob("*.*")):
        if path.is_file():
            path.rename(tmp_path / "b/..data" / path.name)
            path.symlink_to(Path("..data") / path.name)
    (tmp_path / "link").symlink_to(tmp_path / "b")
    for name in ("b", "link"):
        assert check_answers(open_bundle(tmp_path / name), items, has_frames=False) == (0, 0)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this platform has no named pipes")
def test_a_pipe_in_the_place_of_a_part_does_not_hang(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b", "float32")
    part = find_part(tmp_path / "b")
    part.unlink()
    os.mkfifo(part)
    with pytest.raises(ConfigError, match="is not a regular file"):
        open_bundle(tmp_path / "b")


def test_a_folder_in_the_place_of_a_part_is_refused(tmp_path: Path) -> None:
    make_bundle(tmp_path / "b", "float32")
    part = find_part(tmp_path / "b")
    part.unlink()
    part.mkdir()
    with pytest.raises(ConfigError, match="is not a regular file"):
        open_bundle(tmp_path / "b")
