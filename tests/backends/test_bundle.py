"""The bundle tier: what is written comes back in every bit, from parts of every form, also in forks and threads."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import optional
import pytest
from bundle_entries import CARD, CARD_KEY, OTHER_SCOPE, SCOPE, are_same, is_same, key_of, make_entries, write_bundle
from hypothesis import given, settings
from hypothesis import strategies as st

from embedonce import Cache, ConfigError, Tier, config
from embedonce.contracts import deadline
from embedonce.encryption import Encryption
from embedonce.errors import CacheClosed, TierTimeout
from embedonce.testing import CountingProvider, ReadOnlyContract, Recipe
from embedonce.vectors import Dtype, Entries, Entry, encode_frames, freeze

pytestmark = optional.needs("pyarrow")

DTYPES: tuple[Dtype, ...] = ("float32", "float16", "int8")


def open_bundle(folder: Path) -> Any:
    from embedonce_backends.bundle import BundleBackend

    return BundleBackend(path=folder)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part is finished after ten entries or a few more."""
    monkeypatch.setattr("embedonce_backends.bundle.writing.CHUNK_ITEMS", 10)
    monkeypatch.setattr("embedonce_backends.bundle.writing.MAX_PART_BYTES", 1024)


class TestBundle(ReadOnlyContract):
    examples = 20
    _folder: tempfile.TemporaryDirectory[str] | None = None
    _number = 0

    def make(self, items: Mapping[str, Any]) -> Any:
        self._folder = self._folder or tempfile.TemporaryDirectory()
        self._number += 1
        path = Path(self._folder.name) / str(self._number)
        write_bundle(path, items)
        return open_bundle(path)

    def reopen(self, backend: Any) -> Any:
        return open_bundle(backend.path)

    def recipe(self, backend: Any) -> Recipe:
        return Recipe(type(backend), {"path": str(backend.path)})

    def damage(self, backend: Any, name: str) -> None:
        [part] = backend.path.glob("*.arrow")
        content = bytearray(part.read_bytes())
        content[content.index(name.encode()) + 40] ^= 1
        part.write_bytes(content)

    def folder(self, backend: Any) -> Path:
        return Path(backend.path)


# --- round trips ------------------------------------------------------------------------------

numbers = st.integers(0, 40)
dates = st.floats(-1e12, 1e12)
values = st.builds(
    lambda scope, number, dtype, dimensions, created, expires, metadata, tokens, seconds, seed: (
        key_of(number, scope),
        _make_entry(dtype, dimensions, created, expires, metadata, tokens, seconds, seed),
    ),
    st.sampled_from([SCOPE, OTHER_SCOPE]),
    numbers,
    st.sampled_from(DTYPES),
    st.sampled_from([1, 3, 8]),
    dates,
    st.none() | dates,
    st.none() | st.dictionaries(st.text("aß\U0001f375\0", max_size=3), st.none() | st.text(max_size=3), max_size=2),
    st.none() | st.integers(0, 2**40),
    st.none() | st.floats(0, 1e9),
    st.integers(0, 2**32),
)


def _make_entry(
    dtype: Dtype,
    dimensions: int,
    created: float,
    expires: float | None,
    metadata: Any,
    tokens: int | None,
    seconds: float | None,
    seed: int,
) -> Entry:
    [entry] = make_entries(1, dtype=dtype, dimensions=dimensions, seed=seed).values()
    return Entry(entry.vector, created, expires, metadata, dtype, tokens, None if seconds is None else seconds + 0.0)


@settings(max_examples=40, deadline=None)
@given(st.lists(values, max_size=30), st.lists(st.tuples(numbers, st.binary(min_size=1, max_size=40)), max_size=5))
def test_whatever_is_written_comes_back(pairs: list[tuple[str, Entry]], frames: list[tuple[int, bytes]]) -> None:
    items: dict[str, Entry | bytes] = {CARD_KEY: CARD, **dict(pairs)}
    items |= {key_of(number, OTHER_SCOPE): frame for number, frame in frames}
    with tempfile.TemporaryDirectory() as folder:
        written = write_bundle(Path(folder) / "bundle", items)
        assert written.entries == len(items) - 1
        assert written.bytes == sum(path.stat().st_size for path in (Path(folder) / "bundle").iterdir())
        backend = open_bundle(Path(folder) / "bundle")
        found = backend.get_many([*items, key_of(41)])
        assert are_same(found, items)
        assert all(is_same(backend.get(key), value) for key, value in items.items())
        assert backend.get(key_of(41)) is None
        assert list(backend.scan("")) == sorted(items)
        assert backend.count("") == len(items)
        for scope in (SCOPE, OTHER_SCOPE):
            prefix = f"eo1.{scope}."
            assert list(backend.scan(prefix)) == sorted(key for key in items if key.startswith(prefix))
            assert backend.count(prefix) == sum(key.startswith(prefix) for key in items)
        assert "intact" in backend.verify()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("wanted", DTYPES)
def test_a_cache_rounds_the_entries_to_its_own_dtype(tmp_path: Path, dtype: Dtype, wanted: Dtype) -> None:
    """A finer entry is rounded. A coarser one is a miss."""
    from embedonce.vectors import round_vectors

    provider = CountingProvider()
    with Cache(provider, []) as cache:
        keys = cache.keys(["a", "b"])
    vectors = round_vectors(np.stack([provider.vector_of(text) for text in "ab"]), dtype)
    entries = [Entry(freeze(vector), 1.0, dtype=dtype) for vector in vectors]
    write_bundle(tmp_path / "b", dict(zip(keys, entries, strict=True)))
    with Cache(provider, [Tier(open_bundle(tmp_path / "b"), name="b")], dtype=wanted) as cache:
        fetched = cache.fetch(["a", "b"])
    is_finer = DTYPES.index(dtype) <= DTYPES.index(wanted)
    assert fetched.sources == (["b", "b"] if is_finer else ["provider"] * 2)
    assert np.array_equal(fetched.vectors, round_vectors(vectors if is_finer else fetched.vectors, wanted))


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_batch_from_several_parts_is_one_block_in_the_order_of_the_keys(tmp_path: Path, dtype: Dtype) -> None:
    items = {key: entry._replace(metadata=None) for key, entry in make_entries(300, dtype=dtype).items()}
    assert write_bundle(tmp_path / "b", items).parts > 5
    backend = open_bundle(tmp_path / "b")
    asked = [*(key_of(number) for number in range(300)), key_of(1000)]
    found = backend.get_many(asked)
    assert isinstance(found, Entries)
    [block] = found.blocks
    assert block.keys == asked[:-1]
    assert are_same(found, items)
    assert list(backend.scan("eo1.")) == list(items)
    assert backend.count(f"eo1.{SCOPE}.0") == sum(key.startswith(f"eo1.{SCOPE}.0") for key in items)


@pytest.mark.usefixtures("small_parts")
def test_bundles_can_be_merged_by_their_manifests(tmp_path: Path) -> None:
    """The parts of several exports may overlap, and may have the same keys."""
    items = make_entries(200)
    names = list(items)
    one = {name: items[name] for name in names[:150]}
    other = {name: items[name] for name in names[47:]}
    write_bundle(tmp_path / "a", one)
    write_bundle(tmp_path / "b", other)
    manifest = json.loads((tmp_path / "a/manifest.json").read_text())
    manifest["parts"] += json.loads((tmp_path / "b/manifest.json").read_text())["parts"]
    for part in (tmp_path / "b").glob("*.arrow"):
        part.rename(tmp_path / "a" / part.name)
    (tmp_path / "a/manifest.json").write_text(json.dumps(manifest))
    backend = open_bundle(tmp_path / "a")
    assert are_same(backend.get_many(names), items)
    assert list(backend.scan("eo1.")) == names
    assert backend.count("eo1.") == 200


def test_keys_with_the_same_prefix_are_told_apart(tmp_path: Path) -> None:
    """An attacker can compute two texts whose digests begin with the same 8 bytes."""
    beginning = f"eo1.{SCOPE}.{'a' * 16}"
    keys = [f"{beginning}{digit * 48}" for digit in "1379"]
    items = dict(zip(keys, make_entries(4).values(), strict=True))
    write_bundle(tmp_path / "b", items)
    backend = open_bundle(tmp_path / "b")
    absent = [f"{beginning}{digit * 48}" for digit in "024f"]
    for names in (keys, keys[::-1], [*absent, *keys], *([key] for key in keys), absent):
        assert are_same(backend.get_many(names), {key: items[key] for key in names if key in items})
        assert all(is_same(backend.get(key), items.get(key)) for key in names)


@pytest.mark.parametrize(
    "odd",
    [
        "", "a", "eo1.", f"eo1.{SCOPE}", f"eo1.{SCOPE}.{'A' * 64}",
        f"eo1.{SCOPE}.{'g' * 64}", f"eo1.{SCOPE}.{'a' * 65}",
        f"eo1.{SCOPE}.{'é' * 64}", f"eo1.{SCOPE}.{' ' * 64}", f"eo1.{SCOPE}.{'0x' * 32}", f"eo2.{SCOPE}.{'a' * 64}",
        f"eo1.{SCOPE}:{'a' * 64}", "x" * 85, "\ud800" * 85, f"eo1.lease.{SCOPE}.{'a' * 64}", f"eo1.{SCOPE}.{'1_' * 32}",
    ],
)  # fmt: skip
def test_a_key_of_another_form_is_absent(tmp_path: Path, odd: str) -> None:
    items = make_entries(3)
    write_bundle(tmp_path / "b", items)
    backend = open_bundle(tmp_path / "b")
    assert are_same(backend.get_many([odd, *items]), items)
    assert are_same(backend.get_many([*items, odd, odd]), items)
    assert backend.get(odd) is None
    assert list(backend.scan(odd)) == [key for key in items if key.startswith(odd)]


# --- encryption -------------------------------------------------------------------------------


def test_an_encrypted_bundle_needs_its_key_and_shows_nothing(tmp_path: Path) -> None:
    provider, encryption = CountingProvider(), Encryption(b"k" * 32)
    with Cache(provider, []) as cache:
        [key] = cache.keys(["secret text"])
    entry = Entry(freeze(provider.vector_of("secret text")), 1.0, metadata={"source": "secret.md"})
    card = {CARD_KEY: Entry(freeze(()), 1.0, metadata={"model": "secret-model"})}
    write_bundle(tmp_path / "b", encryption.encrypt(encode_frames({key: entry, **card})))
    for path in (tmp_path / "b").iterdir():
        assert b"secret" not in path.read_bytes()
    for key_bytes, source in ((b"k" * 32, "b"), (b"x" * 32, "provider")):
        tier = Tier(open_bundle(tmp_path / "b"), name="b", encryption=Encryption(key_bytes))
        with Cache(provider, [tier]) as cache:
            assert list(cache.fetch(["secret text"]).sources) == [source]


# --- opening ----------------------------------------------------------------------------------


def test_a_configuration_opens_a_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bundle(tmp_path / "b", make_entries(3))
    monkeypatch.setenv("HOME", str(tmp_path))
    with config.open({"provider": {"type": "ngram"}, "tiers": [{"type": "bundle", "path": "~/b"}]}) as cache:
        assert cache.tiers == ("bundle",)
        assert cache.check()[0].ok


def test_a_missing_bundle_is_an_error_at_startup(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no bundle at .*; create a bundle with `embedonce export"):
        config.open({"provider": {"type": "ngram"}, "tiers": [{"type": "bundle", "path": str(tmp_path / "b")}]})


def test_what_is_not_a_bundle_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/manifest.json").write_text('{"name": "an app"}')
    for name, message in (
        ("file", "is a file and not the folder of a bundle"),
        ("folder", r"because it has no manifest\.json"),
        ("other", r"manifest\.json belongs to another program"),
    ):
        with pytest.raises(ConfigError, match=message):
            open_bundle(tmp_path / name)


def test_an_empty_bundle_is_a_bundle(tmp_path: Path) -> None:
    assert write_bundle(tmp_path / "b", {CARD_KEY: CARD}).parts == 0
    backend = open_bundle(tmp_path / "b")
    assert are_same(backend.get_many([key_of(1), CARD_KEY]), {CARD_KEY: CARD})
    assert backend.describe() == "0 entries in 0 parts, 0.0 MiB"
    assert backend.verify() == "0 entries in 0 parts are intact"


def test_the_description_names_the_models_and_the_size(tmp_path: Path) -> None:
    items = {**make_entries(5), **make_entries(1, scope=OTHER_SCOPE), CARD_KEY: CARD}
    write_bundle(tmp_path / "b", items)
    assert open_bundle(tmp_path / "b").describe() == (
        f"6 entries in 2 parts, 0.0 MiB, of a-model ({SCOPE}), an unnamed space ({OTHER_SCOPE})"
    )


def test_an_open_bundle_goes_on_when_it_is_replaced_or_removed(tmp_path: Path) -> None:
    items, others = make_entries(10), make_entries(20, seed=2)
    write_bundle(tmp_path / "b", items)
    backend = open_bundle(tmp_path / "b")
    write_bundle(tmp_path / "b", others, replace=True)
    assert are_same(backend.get_many(list(items)), items)
    assert are_same(open_bundle(tmp_path / "b").get_many(list(others)), others)
    for path in (tmp_path / "b").iterdir():
        path.unlink()
    assert are_same(backend.get_many(list(items)), items)


def test_a_bundle_that_is_replaced_while_it_is_opened_is_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedonce_backends.bundle import opened

    items, others = make_entries(10), make_entries(20, seed=2)
    write_bundle(tmp_path / "b", items)
    read = opened.read_manifest
    pending = [others]

    def read_and_replace(folder: Path) -> bytes:
        written = read(folder)
        if pending:
            write_bundle(folder, pending.pop(), replace=True)
        return written

    monkeypatch.setattr(opened, "read_manifest", read_and_replace)
    assert are_same(open_bundle(tmp_path / "b").get_many(list(others)), others)


def test_a_closed_backend_raises(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", make_entries(3))
    backend = open_bundle(tmp_path / "b")
    backend.close()
    backend.close()
    for call in (lambda: backend.get(key_of(1)), lambda: backend.count(""), backend.describe, backend.verify):
        with pytest.raises(CacheClosed):
            call()


def test_a_call_without_time_left_is_a_timeout(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", make_entries(3))
    backend = open_bundle(tmp_path / "b")
    with deadline(0), pytest.raises(TierTimeout):
        backend.get_many([key_of(1)])


def test_no_file_stays_open_after_a_backend_is_gone(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", make_entries(3))
    folder = Path("/proc/self/fd")
    if not folder.exists():
        pytest.skip("requires /proc")
    before = len(os.listdir(folder))
    backend = open_bundle(tmp_path / "b")
    backend.get_many([key_of(1)])
    backend.close()
    assert len(os.listdir(folder)) == before


def test_threads_may_close_a_backend_that_others_read(tmp_path: Path) -> None:
    items = make_entries(50)
    write_bundle(tmp_path / "b", items)

    def read(backend: Any) -> bool:
        try:
            return are_same(backend.get_many(list(items)), items)
        except CacheClosed:
            return True

    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            backend = open_bundle(tmp_path / "b")
            calls = [pool.submit(read, backend) for _ in range(4)]
            backend.close()
            assert all(call.result() for call in calls)


def test_the_size_of_an_encrypted_scope_has_no_dates(tmp_path: Path) -> None:
    write_bundle(tmp_path / "b", {**make_entries(4), key_of(9, OTHER_SCOPE): b"frame"})
    backend = open_bundle(tmp_path / "b")
    plain, encrypted = (backend.measure(f"eo1.{scope}.") for scope in (SCOPE, OTHER_SCOPE))
    assert (plain.oldest, plain.newest, plain.dimensions) == (1_700_000_000.0, 1_700_000_003.0, 8)
    assert (encrypted.oldest, encrypted.newest, encrypted.dimensions) == (None, None, None)
    assert encrypted.bytes
