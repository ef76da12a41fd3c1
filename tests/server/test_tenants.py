"""Keys of requests belong to tenants. Only digests of keys are kept, and no printed value shows a key."""

from __future__ import annotations

import hashlib

import pytest

from embedonce import config
from embedonce.config import Tenant
from embedonce_server.tenants.keyring import Keyring, read_bearer

ADMIN = "the-key-of-the-admin"
SEARCH = "the-key-of-the-search-team"
OTHER = "another-key-of-the-search-team"
CHAT = "the-key-of-the-chat-team"


def digest(key: str) -> str:
    return "sha256:" + hashlib.sha256(key.encode()).hexdigest()


def make_tenant(name: str, *keys: str) -> Tenant:
    return Tenant(name=name, keys=keys, namespace=name)


search = make_tenant("search", SEARCH, digest(OTHER))
chat = make_tenant("chat", digest(CHAT).upper().replace("SHA256", "sha256"))
keyring = Keyring([search, chat], ADMIN)


@pytest.mark.parametrize(("key", "tenant"), [(SEARCH, search), (OTHER, search), (CHAT, chat)])
def test_a_key_belongs_to_one_tenant_whether_the_key_or_its_digest_is_configured(key: str, tenant: Tenant) -> None:
    assert keyring.find_tenant(key.encode()) is tenant
    assert not keyring.is_admin(key.encode())


@pytest.mark.parametrize("key", ["", "x", ADMIN, SEARCH + " ", SEARCH.upper(), digest(SEARCH), digest(OTHER)])
def test_other_keys_and_digests_that_are_presented_as_keys_belong_to_no_tenant(key: str) -> None:
    assert keyring.find_tenant(key.encode()) is None


def test_a_key_may_be_any_bytes() -> None:
    assert keyring.find_tenant(b"\xff\x00" * 40_000) is None
    assert not keyring.is_admin(b"\xff\x00" * 40_000)


def test_only_the_admin_key_is_the_admin_key() -> None:
    assert keyring.is_admin(ADMIN.encode())
    assert Keyring([], digest(ADMIN)).is_admin(ADMIN.encode())
    assert not keyring.is_admin(digest(ADMIN).encode())
    assert not keyring.is_admin(b"")


def test_without_an_admin_key_no_key_is_the_admin_key() -> None:
    empty = Keyring([], None)
    assert not empty.is_admin(b"")
    assert not empty.is_admin(b"None")
    assert empty.find_tenant(b"") is None
    assert empty.is_open


def test_keys_of_a_configuration_are_found() -> None:
    served = config.load(
        {
            "provider": {"type": "ngram"},
            "tiers": [],
            "serve": {"admin_key": ADMIN, "tenants": [{"name": "search", "keys": [SEARCH, digest(OTHER)]}]},
        }
    ).serve
    loaded = Keyring(served.tenants, served.admin_key)
    assert loaded.find_tenant(SEARCH.encode()) is served.tenants[0]
    assert loaded.find_tenant(OTHER.encode()) is served.tenants[0]
    assert loaded.is_admin(ADMIN.encode())


@pytest.mark.parametrize(
    ("tenants", "admin"),
    [
        ([search, make_tenant("thief", digest(SEARCH))], None),
        ([search], SEARCH),
        ([make_tenant("short", "sha256:1234")], None),
        ([make_tenant("words", "sha256:" + "xy" * 32)], None),
    ],
    ids=["two tenants", "admin", "short digest", "no digest"],
)
def test_a_keyring_refuses_shared_keys_and_invalid_digests_without_showing_them(
    tenants: list[Tenant], admin: str | None
) -> None:
    with pytest.raises(ValueError, match="key") as caught:
        Keyring(tenants, admin)
    assert not any(key.removeprefix("sha256:") in str(caught.value) for tenant in tenants for key in tenant.keys)


def test_a_tenant_may_list_a_key_twice() -> None:
    keyring = Keyring([make_tenant("search", SEARCH, digest(SEARCH))], None)
    assert repr(keyring) == "<Keyring 1 keys of tenants, no admin key>"
    assert not keyring.is_open


def test_printed_keyrings_show_neither_keys_nor_digests() -> None:
    assert repr(keyring) == "<Keyring 3 keys of tenants, an admin key>"
    assert repr(Keyring([], None)) == "<Keyring 0 keys of tenants, no admin key>"


@pytest.mark.parametrize(
    ("header", "key"),
    [
        (b"Bearer abc", b"abc"),
        (b"bearer abc", b"abc"),
        (b"BEARER   abc \t", b"abc"),
        (b"Bearer a b", b"a b"),
        (b"Bearer", None),
        (b"Bearer ", None),
        (b"", None),
        (b"abc", None),
        (b"Basic abc", None),
        (b"Bearerabc", None),
        (b"Bearer\xff abc", None),
    ],
)
def test_only_a_bearer_token_is_read_from_an_authorization_header(header: bytes, key: bytes | None) -> None:
    assert read_bearer(header) == key
