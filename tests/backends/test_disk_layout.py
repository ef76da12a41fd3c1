"""How the disk tier stores keys, the folders of an earlier version, and what diskcache leaves in a folder."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import diskcache
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import embedonce
from embedonce.contracts import deadline
from embedonce.testing import CountingProvider, ManualClock
from embedonce_backends.disk import BytesDisk, DiskBackend
from embedonce_backends.disk.stored_keys import Form, decode_key, encode_key, group_keys

SCOPE = "0123456789abcdef"
HEX = "0123456789abcdef"


def key_of(number: int) -> str:
    return f"eo1.{SCOPE}.{sha256(b'%d' % number).hexdigest()}"


def lease_of(number: int) -> str:
    return key_of(number).replace("eo1.", "eo1.lease.")


def items_of(numbers: range) -> dict[str, bytes]:
    return {key_of(number): b"%d" % number * 500 for number in numbers}


@contextmanager
def open_file(folder: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(folder / "cache.db", isolation_level=None)) as connection:
        yield connection


# --- the stored form of keys ------------------------------------------------------------------

own_keys = st.builds(
    lambda prefix, scope, digest: f"{prefix}{scope}.{digest}",
    st.sampled_from(["eo1.", "eo1.lease."]),
    st.sampled_from([SCOPE, "0" * 16, "f" * 16]) | st.text(HEX, min_size=16, max_size=16),
    st.sampled_from(["0" * 64, "f" * 64]) | st.text(HEX, min_size=64, max_size=64),
)


@st.composite
def nearly_own_keys(draw: st.DrawFn) -> str:
    """A key with one character that is replaced, removed or added."""
    key = draw(own_keys)
    place = draw(st.integers(0, len(key)))
    character = draw(st.sampled_from(["", " ", "\t", "A", "F", "g", ".", "\0", "é", "\ud800", "٣", "0"]))
    return key[:place] + character + key[place + draw(st.integers(0, 1)) :]


other_keys = st.sampled_from(
    ["", "eo1.", "eo1.card." + SCOPE, "eo1.savings.20261130.x.y", "eo2.x", f"eo1.{SCOPE}.", "a" * 85, "b" * 91]
) | st.text(max_size=20)
any_keys = own_keys | nearly_own_keys() | other_keys


@given(st.lists(any_keys, min_size=1, unique=True))
def test_every_key_has_a_stored_form_of_its_own(keys: list[str]) -> None:
    stored = [encode_key(key) for key in keys]
    assert len(set(stored)) == len(keys)
    for key, (form, value) in zip(keys, stored, strict=True):
        assert (form is Form.TEXT) == isinstance(value, str)
        assert value == key if isinstance(value, str) else decode_key(form, value) == key


@given(st.lists(any_keys, min_size=1, unique=True) | st.lists(own_keys, min_size=1, unique=True))
def test_a_batch_is_encoded_as_each_of_its_keys(keys: list[str]) -> None:
    found = {key: (group.form, stored) for group in group_keys(keys) for key, stored in group.list_stored()}
    assert found == {key: encode_key(key) for key in keys}


@given(
    st.lists(any_keys.filter(lambda key: "\ud800" not in key and "\0" not in key), unique=True),
    st.data(),
)
@settings(max_examples=40, deadline=None)
def test_a_scan_lists_the_keys_of_all_forms_in_order(
    tmp_path_factory: pytest.TempPathFactory, keys: list[str], data: st.DataObject
) -> None:
    whole = data.draw(st.sampled_from([*keys, "eo1.", ""]))
    prefix = whole[: data.draw(st.integers(0, len(whole)))]
    with closing(DiskBackend(path=tmp_path_factory.mktemp("scan"))) as backend:
        backend.set_many({key: key.encode() for key in keys}, None)
        expected = sorted(key for key in keys if key.startswith(prefix))
        assert list(backend.scan(prefix)) == expected
        assert backend.count(prefix) == len(expected)
        assert backend.measure(prefix).bytes == sum(len(key.encode()) for key in expected)
        assert backend.get_many(keys) == {key: key.encode() for key in keys} if keys else True
        backend.delete_many(expected)
        assert list(backend.scan("")) == sorted(set(keys).difference(expected))


def test_a_blob_that_is_no_stored_key_is_not_listed(tmp_path: Path) -> None:
    with closing(DiskBackend(path=tmp_path)) as backend:
        backend.set_many(items_of(range(2)), None)
        with open_file(tmp_path) as connection:
            for planted in (b"", b"x", bytes(39), bytes(41), 7, 1.5):
                connection.execute("INSERT INTO Cache (key, raw, mode, value) VALUES (?, 1, 1, x'00')", (planted,))
        assert sorted(backend.scan("")) == sorted(items_of(range(2)))
        assert backend.count("") == 2


# --- leases -----------------------------------------------------------------------------------


def test_leases_leave_no_gaps_between_entries(tmp_path: Path) -> None:
    with closing(DiskBackend(path=tmp_path)) as backend:
        clock = ManualClock(1e9)
        backend.clock = clock
        for start in range(0, 500, 50):
            leases = {lease_of(number): b"token" for number in range(start, start + 50)}
            assert backend.add_many(leases, 2.5) == set(leases)
            assert backend.add_many(leases, 2.5) == set()
            backend.set_many(items_of(range(start, start + 50)), None)
            assert backend.get_many(list(leases)) == leases
        assert count_rows(tmp_path) == 500
        with open_file(tmp_path) as connection:
            assert connection.execute("SELECT MAX(rowid) FROM Cache").fetchall() == [(500,)]
        clock.advance(10.0)
        assert backend.add_many({lease_of(0): b"token"}, 2.5) == {lease_of(0)}
        assert count_rows(tmp_path) == 1, "expired leases are deleted"


def count_rows(folder: Path) -> int:
    """Return how many leases are stored, with those that have expired."""
    with closing(sqlite3.connect(folder / "leases.db")) as connection:
        return int(connection.execute("SELECT COUNT(*) FROM Leases").fetchone()[0])


def test_a_lease_need_not_wait_until_a_batch_is_stored(tmp_path: Path) -> None:
    with closing(DiskBackend(path=tmp_path)) as backend, closing(DiskBackend(path=tmp_path)) as other:
        backend.set_many(items_of(range(1)), None)
        with backend._database.open_transaction(), deadline(5.0):
            assert other.add_many({lease_of(0): b"token"}, 2.5) == {lease_of(0)}
            assert other.get(lease_of(0)) == b"token"


def test_reading_leases_makes_no_file(tmp_path: Path) -> None:
    with closing(DiskBackend(path=tmp_path)) as backend:
        backend.set_many(items_of(range(2)), None)
        assert backend.get(lease_of(0)) is None
        assert backend.get_many([lease_of(0), key_of(0), lease_of(1)]) == items_of(range(1))
        backend.delete_many([lease_of(0)])
        assert list(backend.scan("eo1.lease.")) == []
        assert backend.count("") == 2
        assert not (tmp_path / "leases.db").exists()


def test_entries_and_leases_in_one_batch(tmp_path: Path) -> None:
    items = {**items_of(range(3)), **{lease_of(number): b"token" for number in range(3)}, "eo1.card.x": b"card"}
    with closing(DiskBackend(path=tmp_path)) as backend:
        backend.set_many(items, 60.0)
        assert backend.get_many(list(items)) == items
        assert backend.add_many({**items, lease_of(9): b"token", key_of(9): b"nine"}, 60.0) == {lease_of(9), key_of(9)}
        assert list(backend.scan("")) == sorted([*items, lease_of(9), key_of(9)])
        backend.delete_many([lease_of(0), key_of(0)])
        assert backend.get_many(list(items)) == {
            key: value for key, value in items.items() if key not in (lease_of(0), key_of(0))
        }


# --- folders of an earlier version ------------------------------------------------------------


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A folder in which the keys of 300 entries are stored as text, with diskcache's triggers."""
    folder = tmp_path / "earlier"
    with diskcache.Cache(str(folder), eviction_policy="none", cull_limit=0, disk_min_file_size=2**31 - 1) as cache:
        for key, value in items_of(range(300)).items():
            cache[key] = value
        cache["eo1.card." + SCOPE] = b"card"
    folder.chmod(0o700)
    return folder


def test_a_folder_of_an_earlier_version_is_read_and_written(earlier: Path) -> None:
    items = items_of(range(600))
    keys = list(items)
    with closing(DiskBackend(path=earlier)) as backend:
        assert backend.get_many(keys) == items_of(range(300))
        assert backend.get(keys[7]) == items[keys[7]]
        assert backend.get(keys[400]) is None
        assert backend.add_many(items, None) == set(keys[300:])
        backend.set_many({keys[0]: b"new"}, None)
        assert backend.get_many(keys[:2]) == {keys[0]: b"new", keys[1]: items[keys[1]]}
        assert list(backend.scan(f"eo1.{SCOPE}.")) == sorted(keys)
        assert backend.count("") == 601
        backend.delete_many([keys[0], keys[1], keys[599]])
        assert backend.get_many([*keys[:3], keys[599]]) == {keys[2]: items[keys[2]]}
        assert backend.count("") == 598


def test_hits_in_a_folder_of_an_earlier_version_cost_nothing(tmp_path: Path) -> None:
    provider = CountingProvider()
    texts = [f"text {number}" for number in range(50)]
    with embedonce.Cache(provider, [DiskBackend(path=tmp_path)]) as cache:
        cache.embed_batch(texts)
    with open_file(tmp_path) as connection:
        for rowid, stored in connection.execute("SELECT rowid, key FROM Cache WHERE TYPEOF(key) = 'blob'").fetchall():
            connection.execute("UPDATE Cache SET key = ? WHERE rowid = ?", (decode_key(Form.ENTRY, stored), rowid))
    with embedonce.Cache(provider, [DiskBackend(path=tmp_path)]) as cache:
        assert cache.fetch(texts).sources == ["disk"] * 50
        cache.forget(texts[:10])
        assert cache.fetch(texts).sources == ["provider"] * 10 + ["disk"] * 40
    assert provider.texts == 60


def test_what_was_forgotten_in_a_folder_of_an_earlier_version_is_overwritten(earlier: Path) -> None:
    secret = b"a vector that somebody wants forgotten" * 40
    with open_file(earlier) as connection:
        connection.execute("UPDATE Cache SET value = ? WHERE key = ?", (secret, key_of(5)))
    with closing(DiskBackend(path=earlier)) as backend:
        backend.delete_many([key_of(5)])
        assert not any(secret[:60] in path.read_bytes() for path in earlier.iterdir())


def test_compact_gives_keys_of_an_earlier_version_the_form_of_today(earlier: Path) -> None:
    items = items_of(range(300))
    with closing(DiskBackend(path=earlier)) as backend:
        backend.compact()
        assert backend.get_many(list(items)) == items
    with open_file(earlier) as connection:
        rows = connection.execute("SELECT key FROM Cache ORDER BY rowid").fetchall()
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert [key for (key,) in rows] == [*(encode_key(key)[1] for key in items), "eo1.card." + SCOPE]
    with closing(DiskBackend(path=earlier)) as backend:
        assert backend.get_many(list(items)) == items


def test_a_key_in_two_forms_is_counted_once(earlier: Path) -> None:
    with closing(DiskBackend(path=earlier)) as backend:
        backend.add_many({lease_of(1): b"token"}, 60.0)
        with open_file(earlier) as connection:
            for key in (encode_key(key_of(1))[1], encode_key(key_of(900))[1], lease_of(1)):
                connection.execute("INSERT INTO Cache (key, raw, mode, value) VALUES (?, 1, 1, x'00')", (key,))
        for prefix, count in (("", 303), ("eo1.", 303), (f"eo1.{SCOPE}.", 301), ("eo1.lease.", 1), (key_of(1), 1)):
            assert backend.count(prefix) == len(list(backend.scan(prefix))) == count


# --- diskcache ----------------------------------------------------------------------------------


def list_triggers(folder: Path) -> list[str]:
    with open_file(folder) as connection:
        return [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'")]


def test_triggers_of_diskcache_do_no_harm_and_are_dropped(tmp_path: Path) -> None:
    items = items_of(range(60))
    with closing(DiskBackend(path=tmp_path)) as backend:
        backend.set_many(items_of(range(20)), None)
        assert list_triggers(tmp_path) == []
        with diskcache.Cache(str(tmp_path), disk=BytesDisk) as cache:
            assert len(list_triggers(tmp_path)) == 5
            backend.set_many(items_of(range(20, 40)), None)
            backend.delete_many([key_of(39)])
            assert len(cache) == 19, "diskcache counts from the moment when it opened the file"
            assert cache.get(key_of(38)) == items[key_of(38)]
            cache.set(key_of(39), items[key_of(39)])
    with closing(DiskBackend(path=tmp_path)) as backend:
        assert backend.get_many(list(items)) == items_of(range(40))
        assert list_triggers(tmp_path) == []


def test_diskcache_stores_keys_in_the_same_form(tmp_path: Path) -> None:
    with closing(DiskBackend(path=tmp_path)) as backend:
        backend.set_many({key_of(1): b"one", "eo1.card.x": b"card"}, None)
        with diskcache.Cache(str(tmp_path), disk=BytesDisk) as cache:
            cache[key_of(1)] = b"uno"
            cache[key_of(2)] = b"two"
            with pytest.raises(TypeError, match="lease"):
                cache[lease_of(1)] = b"token"
            assert lease_of(1) not in cache
            assert cache.get(lease_of(1)) is None
            assert set(cache) == {key_of(1), key_of(2), "eo1.card.x"}
        assert backend.get_many([key_of(1), key_of(2)]) == {key_of(1): b"uno", key_of(2): b"two"}
        assert backend.count("") == 3


def test_the_stored_form_of_a_key_is_documented() -> None:
    form, stored = encode_key(key_of(1))
    assert form is Form.ENTRY
    assert stored == bytes.fromhex(SCOPE) + sha256(b"1").digest()


def test_a_transaction_has_up_to_4096_items(tmp_path: Path) -> None:
    statements: list[str] = []
    with closing(DiskBackend(path=tmp_path)) as backend:
        backend.set_many(items_of(range(1)), None)
        connection = backend._database.connections.take()
        connection.set_trace_callback(statements.append)
        backend._database.connections.give(connection, is_reusable=True)
        backend.set_many(dict.fromkeys(map(key_of, range(5000)), b"value"), None)
    assert statements.count("COMMIT") == 2


def test_any_key_of_the_engine_can_be_removed(tmp_path: Path) -> None:
    """The engine's own keys, as a real cache stores them."""
    options: dict[str, Any] = {"timeout": 60.0}
    with embedonce.Cache(CountingProvider(), [embedonce.Tier(DiskBackend(path=tmp_path), **options)]) as cache:
        cache.embed_batch([f"text {number}" for number in range(20)])
    with closing(DiskBackend(path=tmp_path)) as backend:
        keys = list(backend.scan(""))
        assert {encode_key(key)[0] for key in keys} == set(Form)
        backend.delete_many(keys)
        assert list(backend.scan("")) == []
