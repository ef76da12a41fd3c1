"""Writing a bundle: what is refused, what an unfinished writer leaves, and that equal entries give equal bytes."""

from __future__ import annotations

import errno
import resource
import sys
from pathlib import Path
from typing import Any

import numpy as np
import optional
import pytest
from bundle_entries import CARD, CARD_KEY, OTHER_SCOPE, SCOPE, are_same, key_of, make_entries, write_bundle

from embedonce import ConfigError
from embedonce.errors import StoreExists
from embedonce.vectors import Entry, freeze

pytestmark = optional.needs("pyarrow")


def open_bundle(folder: Path) -> Any:
    from embedonce_backends.bundle import BundleBackend

    return BundleBackend(path=folder)


def create_writer(folder: Path, *, replace: bool = False) -> Any:
    from embedonce_backends.bundle import BundleWriter

    return BundleWriter(folder, replace=replace)


def list_names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([f"eo1.{SCOPE}.{'b' * 64}", f"eo1.{SCOPE}.{'a' * 64}"], "ascending order"),
        ([key_of(0), key_of(0)], "each key only once"),
        ([key_of(0, OTHER_SCOPE), key_of(1)], "ascending order"),
        (["eo1.x"], "neither the key of an entry nor the key of a space card"),
        ([f"eo1.lease.{SCOPE}.{'a' * 64}"], "neither"),
        ([f"eo1.card.{SCOPE}x"], "neither"),
        ([f"eo1.{SCOPE}.{'A' * 64}"], "neither"),
        ([CARD_KEY], "space card needs metadata"),
    ],
)
def test_a_wrong_key_is_refused(tmp_path: Path, keys: list[str], message: str) -> None:
    entry = make_entries(1)[key_of(0)]._replace(metadata=None)
    with create_writer(tmp_path / "b") as writer:
        for name in keys[:-1]:
            writer.add({name: entry})
        with pytest.raises(ValueError, match=message):
            writer.add({keys[-1]: entry})


@pytest.mark.parametrize(
    "wrong",
    [
        {"vector": freeze([np.nan, 1.0])}, {"vector": freeze(())}, {"created": float("inf")}, {"expires": float("nan")},
        {"tokens": -1}, {"tokens": 2**63}, {"seconds": -1.0}, {"metadata": {1: 2}}, {"metadata": {"a": "x" * 70_000}},
    ],
)  # fmt: skip
def test_an_invalid_entry_is_refused_and_its_text_is_not_shown(tmp_path: Path, wrong: dict[str, Any]) -> None:
    entry = Entry(freeze([1.0, 2.0]), 1.0)._replace(**wrong)
    with create_writer(tmp_path / "b") as writer, pytest.raises((ValueError, TypeError)) as caught:
        writer.add({key_of(1): entry})
    assert "xxx" not in str(caught.value)
    assert not (tmp_path / "b").exists()


def test_an_existing_bundle_is_replaced_only_on_request(tmp_path: Path) -> None:
    items, others = make_entries(3), make_entries(5, seed=2)
    write_bundle(tmp_path / "b", items)
    with pytest.raises(StoreExists, match="already has a bundle; replace it with --replace"):
        create_writer(tmp_path / "b")
    assert are_same(open_bundle(tmp_path / "b").get_many(list(items)), items)
    write_bundle(tmp_path / "b", others, replace=True)
    assert are_same(open_bundle(tmp_path / "b").get_many(list(others)), others)
    assert len(list_names(tmp_path / "b")) == 2


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/notes.unfinished").write_text("x")
    (tmp_path / "app").mkdir()
    (tmp_path / "app/manifest.json").write_text("{}")
    (tmp_path / "file").write_text("x")
    for name, message in (
        ("folder", "do not belong to a bundle"),
        ("app", "not the manifest of a bundle"),
        ("file", "file"),
    ):
        with pytest.raises(StoreExists, match=message):
            create_writer(tmp_path / name, replace=True)
    assert (tmp_path / "folder/notes.unfinished").exists()
    assert (tmp_path / "app/manifest.json").read_text() == "{}"
    write_bundle(tmp_path / "b", make_entries(2))
    (tmp_path / "b/README.md").write_text("about this bundle")
    write_bundle(tmp_path / "b", make_entries(3), replace=True)
    assert (tmp_path / "b/README.md").exists()


@pytest.mark.parametrize("manifest", ["{", '{"format": "embedonce bundle", "version": 2}'])
def test_a_damaged_or_newer_bundle_can_be_replaced(tmp_path: Path, manifest: str) -> None:
    write_bundle(tmp_path / "b", make_entries(2))
    (tmp_path / "b/manifest.json").write_text(manifest)
    items = make_entries(3, seed=2)
    write_bundle(tmp_path / "b", items, replace=True)
    assert are_same(open_bundle(tmp_path / "b").get_many(list(items)), items)


def test_two_writers_cannot_write_to_one_folder(tmp_path: Path) -> None:
    with create_writer(tmp_path / "b") as writer:
        writer.add(make_entries(3))
        with pytest.raises(StoreExists, match="another export writes to"):
            create_writer(tmp_path / "b", replace=True)
        writer.commit()
        create_writer(tmp_path / "b", replace=True).close()
    assert open_bundle(tmp_path / "b").count("eo1.") == 3


def test_a_closed_writer_refuses_entries(tmp_path: Path) -> None:
    writer = create_writer(tmp_path / "b")
    writer.add(make_entries(3))
    writer.commit()
    writer.close()
    for call in (lambda: writer.add(make_entries(3)), writer.commit):
        with pytest.raises(ValueError, match="this writer is closed"):
            call()
    assert open_bundle(tmp_path / "b").count("eo1.") == 3


# --- what is left -----------------------------------------------------------------------------


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part is finished after ten entries or a few more, and columns are written to files after some bytes."""
    monkeypatch.setattr("embedonce_backends.bundle.writing.CHUNK_ITEMS", 10)
    monkeypatch.setattr("embedonce_backends.bundle.writing.MAX_PART_BYTES", 1024)
    monkeypatch.setattr("embedonce_backends.bundle.staging.MAX_BUFFER_BYTES", 64)


@pytest.mark.usefixtures("small_parts")
def test_a_writer_that_does_not_commit_leaves_nothing(tmp_path: Path) -> None:
    with create_writer(tmp_path / "new") as writer:
        writer.add(make_entries(100))
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    with create_writer(tmp_path / "empty") as writer:
        writer.add(make_entries(100))
    assert list_names(tmp_path / "empty") == []
    items = make_entries(50)
    write_bundle(tmp_path / "b", items)
    before = list_names(tmp_path / "b")
    with create_writer(tmp_path / "b", replace=True) as writer:
        writer.add({**items, **make_entries(60, scope=OTHER_SCOPE)})
    assert list_names(tmp_path / "b") == before
    assert "intact" in open_bundle(tmp_path / "b").verify()


@pytest.mark.usefixtures("small_parts")
def test_remnants_of_a_killed_writer_are_removed(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", make_entries(5))
    [part] = (tmp_path / "b").glob("*.arrow")
    for name in (f"{SCOPE}-{'0' * 32}.arrow", f"{'a' * 16}.unfinished", "manifest.json.unfinished"):
        (tmp_path / "b" / name).write_text("x")
    assert open_bundle(tmp_path / "b").count("eo1.") == 5
    with create_writer(tmp_path / "b", replace=True):
        assert list_names(tmp_path / "b") == [part.name, "manifest.json"]


def test_an_unfinished_export_is_not_a_bundle(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / f"{'a' * 16}.unfinished").write_text("x")
    with pytest.raises(ConfigError, match="is not a bundle: the export did not finish"):
        open_bundle(tmp_path / "b")
    items = make_entries(3)
    write_bundle(tmp_path / "b", items)
    assert are_same(open_bundle(tmp_path / "b").get_many(list(items)), items)


@pytest.mark.skipif(sys.platform == "win32", reason="requires a limit on the size of files")
@pytest.mark.usefixtures("small_parts")
def test_a_full_disk_is_an_error_and_the_previous_bundle_stays(tmp_path: Path) -> None:
    """A limit on the size of files gives an error like that of a full disk."""
    items = make_entries(20)
    write_bundle(tmp_path / "b", items)
    before = list_names(tmp_path / "b")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with create_writer(tmp_path / "b", replace=True) as writer:
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, hard))
        try:
            with pytest.raises(OSError, match=r"File too large|errno 27") as caught:
                writer.add(make_entries(500, seed=2))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.errno in (errno.EFBIG, None)
    assert list_names(tmp_path / "b") == before
    assert are_same(open_bundle(tmp_path / "b").get_many(list(items)), items)


# --- the same entries, the same bytes ---------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 7])
def test_equal_entries_give_equal_bytes_however_they_are_added(tmp_path: Path, batch: int) -> None:
    items = {**make_entries(30), **make_entries(30, scope=OTHER_SCOPE, dtype="int8")}
    write_bundle(tmp_path / "a", {**items, CARD_KEY: CARD})
    pairs = sorted(items.items())
    with create_writer(tmp_path / "b") as writer:
        writer.add({CARD_KEY: CARD._replace(created=5.0)})
        for start in range(0, len(pairs), batch):
            writer.add(dict(pairs[start : start + batch]))
        writer.commit()
    assert list_names(tmp_path / "a") == list_names(tmp_path / "b")
    for name in list_names(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_memory_does_not_grow_with_the_number_of_entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All columns together hold at most a buffer each in memory; the rest is in files."""
    monkeypatch.setattr("embedonce_backends.bundle.staging.MAX_BUFFER_BYTES", 4096)
    items = make_entries(2000, dimensions=16)
    with create_writer(tmp_path / "b") as writer:
        for start in range(0, 2000, 50):
            writer.add(dict(list(items.items())[start : start + 50]))
            [stage] = writer._stages.values()
            held = sum(len(column._tail) for column in stage._columns.values())
            assert held <= len(stage._columns) * (4096 + 50 * 85)
        assert stage.size > 20 * held
        writer.commit()
    assert are_same(open_bundle(tmp_path / "b").get_many(list(items)), items)
