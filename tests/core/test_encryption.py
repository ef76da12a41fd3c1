"""Encrypted frames reveal nothing, cannot be swapped or given a new expiry, and require the right key."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import embedonce
from embedonce import Cache, ConfigError, Tier
from embedonce.encryption import Encryption
from embedonce.testing.fakes import CountingProvider, DictBackend
from embedonce.vectors import Entry, decode_frames, encode_frames, freeze
from embedonce_backends.memory import MemoryBackend

KEY, OTHER = bytes(range(32)), bytes(range(1, 33))
NOW = 1_700_000_000.0


def entry(seed: int, metadata: Any = None) -> Entry:
    vector = np.random.default_rng(seed).standard_normal(32).astype(np.float32)
    return Entry(freeze(vector), NOW, NOW + 100, metadata)


def frames(n: int = 3) -> dict[str, bytes]:
    return encode_frames({f"eo1.key{i}": entry(i, {"source": "a private file"} if i % 2 else None) for i in range(n)})


def test_what_was_encrypted_reads_back_bit_for_bit() -> None:
    plain = frames()
    encryption = Encryption(KEY)
    sealed = encryption.encrypt(plain)
    assert encryption.decrypt(sealed) == (plain, [], [])


def test_the_stored_bytes_contain_nothing_of_the_content() -> None:
    plain = frames()
    for key, sealed in Encryption(KEY).encrypt(plain).items():
        assert b"private" not in sealed
        assert plain[key][-64:] not in sealed
    assert Encryption(KEY).encrypt(plain) != Encryption(KEY).encrypt(plain)  # each call uses a new nonce


@pytest.mark.parametrize("at", [*range(64), 70, 80, -1])
def test_every_changed_byte_is_corrupt_even_with_a_valid_checksum(at: int) -> None:
    from xxhash import xxh3_64_intdigest

    encryption = Encryption(KEY)
    (key, sealed), *_ = encryption.encrypt(frames()).items()
    changed = bytearray(sealed)
    changed[at] ^= 1
    if at not in range(8, 16):
        word = int.from_bytes(changed[:8], "little")
        changed[8:16] = xxh3_64_intdigest(bytes(changed[16:]), word).to_bytes(8, "little")
    plain, corrupt, unencrypted = encryption.decrypt({key: bytes(changed)})
    if at in range(8, 16):  # decrypt() ignores the checksum of the encrypted frame, and checks only the tag
        assert key in plain
    else:
        assert not plain
        assert corrupt + unencrypted == [key]
        assert not decode_frames(plain, now=NOW).entries


def test_frames_swapped_between_keys_are_corrupt() -> None:
    encryption = Encryption(KEY)
    sealed = encryption.encrypt(frames(2))
    swapped = dict(zip(sealed, reversed(sealed.values()), strict=True))
    assert encryption.decrypt(swapped) == ({}, list(sealed), [])


def test_an_expiry_cannot_be_forged() -> None:
    import struct

    encryption = Encryption(KEY)
    (key, sealed), *_ = encryption.encrypt(frames()).items()
    forged = sealed[:32] + struct.pack("<d", NOW * 2) + sealed[40:]
    assert encryption.decrypt({key: forged}) == ({}, [key], [])


@given(junk=st.binary(max_size=200) | st.none() | st.integers() | st.text())
def test_junk_never_raises(junk: Any) -> None:
    plain, corrupt, unencrypted = Encryption(KEY).decrypt({"k": junk})
    assert not plain
    assert corrupt + unencrypted == ["k"]


def test_every_truncation_is_corrupt() -> None:
    encryption = Encryption(KEY)
    (key, sealed), *_ = encryption.encrypt(frames()).items()
    for size in range(len(sealed)):
        plain, corrupt, unencrypted = encryption.decrypt({key: sealed[:size]})
        assert not plain
        assert corrupt + unencrypted == [key]


# --- keys -------------------------------------------------------------------------------------


def test_rotation_reads_the_old_key_and_writes_the_new_one() -> None:
    old = Encryption(KEY).encrypt(frames())
    rotated = Encryption([OTHER, KEY])
    assert rotated.decrypt(old)[0] == frames()
    new = rotated.encrypt(frames())
    assert Encryption(OTHER).decrypt(new)[0] == frames()
    assert Encryption(KEY).decrypt(new) == ({}, list(new), [])


def test_a_key_as_base64_and_from_a_file(tmp_path: Path) -> None:
    text = base64.b64encode(KEY).decode()
    path = tmp_path / "key"
    path.write_text(text + "\n")
    for given_ in (text, text.replace("+", "-").replace("/", "_"), f"file:{path}", [text], [OTHER, text]):
        assert f"{Encryption(KEY).key_ids[0]}" in Encryption(given_).key_ids


@pytest.mark.parametrize(
    "wrong", ["", "short", b"short", "x" * 44, "file:/not/there", [], base64.b64encode(b"1").decode()]
)
def test_an_invalid_key_is_refused_without_showing_it(wrong: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Encryption(wrong)
    assert "xxx" not in str(caught.value)
    assert "short" not in str(caught.value)


# --- in a cache -------------------------------------------------------------------------------


def open_(store: DictBackend, encryption: Encryption | None, holds: Any = "frames", *, scan: bool = True) -> Cache:
    tier = Tier(DictBackend(store=store, scope="host", holds=holds, scan=scan), name="t", encryption=encryption)
    return Cache(CountingProvider(), [tier])


@pytest.mark.parametrize("holds", ["frames", "either"])
def test_an_encrypted_tier_returns_the_vectors_bit_for_bit(holds: Any) -> None:
    store = DictBackend()
    with open_(store, Encryption(KEY), holds) as cache:
        first = cache.embed_batch(["a", "b"])
        cache.fetch(["c"], metadata=[{"id": 7}])
        assert {held.card and held.card["model"] for held in cache.contents()} == {"counting"}
    assert not any(b"counting" in store.get(key) for key in store.scan(""))
    with open_(store, Encryption([OTHER, KEY]), holds) as cache:
        found = cache.lookup(["b", "a", "c"])
        assert found.sources == ["t"] * 3
        assert (np.stack(found.rows[:2]) == first[::-1]).all()  # type: ignore[arg-type]
        assert found.metadata[2] == {"id": 7}


def test_a_wrong_key_gives_a_corrupt_miss_and_check_reports_it() -> None:
    store = DictBackend()
    with open_(store, Encryption(KEY)) as cache:
        cache.embed("a")
    with open_(store, Encryption(OTHER)) as cache:
        assert cache.lookup(["a"]).sources == [None]
        assert cache.stats().tiers["t"].corrupt == 1
        (check,) = cache.check()
        assert not check.ok
        assert "encrypted with a different key" in check.detail
        assert cache.embed("a") is not None
        assert cache.lookup(["a"]).sources == ["t"]


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize(
    ("encryption", "words"), [(None, "the tier has no key"), (Encryption(OTHER), "encrypted with a different key")]
)
def test_check_reports_a_wrong_or_missing_key(encryption: Encryption | None, words: str, scan: bool) -> None:
    store = DictBackend()
    with open_(store, Encryption(KEY), scan=scan) as cache:
        cache.embed("a")
        assert [check.ok for check in cache.check()] == [True]
    with open_(store, encryption, scan=scan) as cache:
        (check,) = cache.check()
        assert not check.ok
        assert words in check.detail


def test_entries_from_before_encryption_are_misses_and_are_replaced() -> None:
    store = DictBackend()
    with open_(store, None) as cache:
        cache.embed("a")
    with open_(store, Encryption(KEY)) as cache:
        assert cache.lookup(["a"]).sources == [None]
        assert cache.stats().tiers["t"].corrupt == 0
        cache.embed("a")
        assert cache.lookup(["a"]).sources == ["t"]
    with open_(store, None) as cache:
        assert cache.lookup(["a"]).sources == [None]  # the entry is encrypted, and this tier has no key


def test_encryption_is_refused_for_a_tier_of_arrays() -> None:
    with pytest.raises(ConfigError, match="encryption requires a backend that stores frames"):
        Cache(CountingProvider(), [Tier(MemoryBackend(), encryption=Encryption(KEY))])


def test_from_toml_with_the_key_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_KEY", base64.b64encode(os.urandom(32)).decode())
    path = tmp_path / "embedonce.toml"
    path.write_text(
        '[provider]\ntype = "ngram"\n[[tiers]]\ntype = "disk"\npath = "cache"\nencryption = "${CACHE_KEY}"\n'
    )
    for _ in range(2):
        with embedonce.open(path) as cache:
            cache.embed("a private text")
    assert cache.stats().tiers["disk"].hits == 1
    monkeypatch.setenv("CACHE_KEY", "not-a-key-at-all")
    with pytest.raises(ConfigError, match=r"embedonce\.toml:6:14.*32 random bytes") as caught:
        embedonce.open(path)
    assert "not-a-key" not in str(caught.value)
