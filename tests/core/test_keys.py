"""Keys: equal for equal requests, in every process and version, and different for all other requests.

This file implements the rule of ``docs/keys.md`` a second time, from that page alone. The tests compare the
results with those of keys.py, with the examples of the page and with the golden keys.
"""

from __future__ import annotations

import ast
import hashlib
import hmac
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import unicodedata
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from enum import IntEnum, StrEnum
from itertools import permutations
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from embedonce.errors import ConfigError, SpaceError, TextError
from embedonce.keys import (
    CARD_PREFIX,
    NORMALIZERS,
    Keyer,
    KeyPolicy,
    VectorSpace,
    canonical,
    canonical_url,
    card,
    make_digests,
    read_fingerprint,
)

HERE = Path(__file__).parent
CORE = HERE.parent.parent / "core"
PAGE = (HERE.parent.parent / "docs" / "keys.md").read_text(encoding="utf-8")
GOLDEN = json.loads((HERE / "golden" / "keys.json").read_text(encoding="utf-8"))

SPACE = VectorSpace(provider="p", model="m")
POLICY = KeyPolicy()


def key_of(text: str = "text", space: VectorSpace = SPACE, policy: KeyPolicy = POLICY) -> str:
    steps = [NORMALIZERS[name] for name in policy.normalize]
    keyer = Keyer(policy, space, steps)
    return keyer.key(keyer.normalize(text))


# --- the rule, implemented from the page only -------------------------------------------------


def encode_by_the_page(value: Any) -> bytes:
    """Return the canonical form of a value, as the table of the page defines it."""

    def sized(tag: str, content: bytes) -> bytes:
        return f"{tag}{len(content)}:".encode() + content

    match value:
        case None:
            return b"n"
        case bool():
            return b"t" if value else b"f"
        case int():
            return sized("i", format(value, "d").encode())
        case float():
            return b"d" + struct.pack("!d", 0.0 if value == 0 else value)
        case str():
            return sized("s", value.encode("utf-8"))
        case bytes():
            return sized("b", value)
        case list() | tuple():
            return f"l{len(value)}:".encode() + b"".join(map(encode_by_the_page, value))
        case dict():
            ordered = sorted(value, key=lambda name: name.encode("utf-8"))
            return f"m{len(value)}:".encode() + b"".join(
                encode_by_the_page(name) + encode_by_the_page(value[name]) for name in ordered
            )
    raise AssertionError(f"the page does not describe {type(value)}")


def derive_by_the_page(space: dict[str, Any], policy: dict[str, str], normalized: str) -> dict[str, str]:
    """Return all values of a worked example of the page, computed only by the rule of the page."""
    form = encode_by_the_page({name: value for name, value in space.items() if value is not None})
    fingerprint = hashlib.sha256(b"embedonce/space/1" + form).digest()
    secret = policy["secret"].encode() if "secret" in policy else None
    secret_id = None if secret is None else hmac.new(b"embedonce/secret-id/1", secret, "sha256").digest()[:16]
    parts = {
        "namespace": policy.get("namespace", ""),
        "version": policy.get("version", "v1"),
        "secret": secret_id,
        "space": fingerprint,
    }
    scope = hashlib.sha256(b"embedonce/scope/1" + encode_by_the_page(parts)).hexdigest()[:16]
    data = b"embedonce/text/1" + fingerprint + normalized.encode("utf-8")
    if policy.get("hash", "sha256") == "blake2b":
        digest = hashlib.blake2b(data, digest_size=32, key=secret or b"").hexdigest()
    elif secret is None:
        digest = hashlib.sha256(data).hexdigest()
    else:
        digest = hmac.new(secret, data, hashlib.sha256).hexdigest()
    return {
        "canonical": form.hex(),
        "fingerprint": fingerprint.hex(),
        "scope": scope,
        "key": f"eo1.{scope}.{digest}",
    }


def compute_with_keyer(space: dict[str, Any], policy: dict[str, Any], text: str) -> dict[str, str]:
    """Return the same values as :func:`derive_by_the_page`, computed by keys.py."""
    described = VectorSpace(**space)
    keyer = Keyer(KeyPolicy(**policy), described)
    return {
        "canonical": canonical(described.described()).hex(),
        "fingerprint": keyer.fingerprint.hex(),
        "scope": keyer.scope,
        "key": keyer.key(text),
    }


def list_fences(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_pages_worked_examples_follow_from_the_page_alone() -> None:
    (block,) = list_fences("json")
    examples = json.loads(block)
    assert len(examples) >= 8
    for shown in examples:
        given_ = [shown.pop(name) for name in ("space", "policy", "text")]
        assert shown == derive_by_the_page(*given_) == compute_with_keyer(*given_)


def test_the_pages_canonical_forms_follow_from_the_page_alone() -> None:
    shown = re.findall(r"^canonical\((.+)\)  # -> (.+)$", "".join(list_fences("python")), re.MULTILINE)
    assert len(shown) >= 10
    for value, form in shown:
        assert encode_by_the_page(ast.literal_eval(value)) == ast.literal_eval(form)


def test_the_page_names_every_step() -> None:
    assert set(re.findall(r"^\| `([a-z-]+)` \|", PAGE.split("### version")[0], re.MULTILINE)) == set(NORMALIZERS)


# --- values for hypothesis --------------------------------------------------------------------

# Short strings from a small alphabet make collisions likely. Digits and tags make a string resemble the encoding.
strings = st.text(st.sampled_from("01:sn\x00é\U0001f375"), max_size=4)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-11, 11),
    st.integers(),
    st.floats(allow_nan=False),
    strings,
    st.text(st.characters(exclude_categories=["Cs"]), max_size=20),
    strings.map(str.encode),
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(strings, inner, max_size=3), max_leaves=6
)
texts = st.text(st.characters(exclude_categories=["Cs"]))
some_policies = st.builds(
    dict,
    version=strings,
    namespace=strings,
    hash=st.sampled_from(["sha256", "blake2b"]),
) | st.builds(
    dict, hash=st.sampled_from(["sha256", "blake2b"]), secret=st.text(min_size=1, max_size=10).filter(str.isascii)
)


def is_same(a: Any, b: Any) -> bool:
    """Return whether two values are equal and of the same type. Such values must have the same canonical form."""
    if type(a) is not type(b):
        return False
    if isinstance(a, list):
        return len(a) == len(b) and all(map(is_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_same(a[name], b[name]) for name in a)
    return bool(a == b)


# --- canonical --------------------------------------------------------------------------------


@given(values)
def test_canonical_is_what_the_page_says(value: Any) -> None:
    assert canonical(value) == encode_by_the_page(value)


@given(values, values)
def test_canonical_is_injective(a: Any, b: Any) -> None:
    assert (canonical(a) == canonical(b)) == is_same(a, b)


def _decode(form: bytes, at: int = 0) -> tuple[Any, int]:
    """Decode a canonical form. If every form can be decoded, no two values have the same form."""
    tag = form[at : at + 1]
    if tag in b"ntf":
        return {b"n": None, b"t": True, b"f": False}[tag], at + 1
    if tag == b"d":
        return struct.unpack(">d", form[at + 1 : at + 9])[0], at + 9
    colon = form.index(b":", at)
    size, at = int(form[at + 1 : colon]), colon + 1
    if tag in b"isb":
        content = form[at : at + size]
        assert len(content) == size
        decoded = {b"i": lambda: int(content), b"s": content.decode, b"b": lambda: content}[tag]()
        return decoded, at + size
    items = []
    for _ in range(size * (2 if tag == b"m" else 1)):
        item, at = _decode(form, at)
        items.append(item)
    return (items if tag == b"l" else dict(zip(items[::2], items[1::2], strict=True))), at


@given(values)
def test_canonical_can_be_read_back(value: Any) -> None:
    form = canonical(value)
    read, end = _decode(form)
    assert end == len(form)
    assert is_same(read, value)


def test_every_type_has_a_form_of_its_own() -> None:
    ones = [1, True, 1.0, "1", b"1", [1], ["1"], [True], [[1]], {"1": 1}, {"1": None}, {"1": "1"}, ["1", 1], [["1", 1]]]
    nothings = [None, False, 0, 0.0, "", b"", [], {}, [None], [[]], [{}], "None", "n", b"n", {"": None}, {"": ""}]
    forms = [canonical(value) for value in ones + nothings]
    assert len(set(forms)) == len(forms)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (["ab", "c"], ["a", "bc"]),
        (["a", "b"], ["a,b"]),
        (["a", "b"], ["as1:b"]),
        (["a", ["b"]], ["a", "b"]),
        ([["a"], "b"], [["a", "b"]]),
        ([["a", "b"], []], [["a"], ["b"]]),
        ({"a": "b", "c": "d"}, {"a": "bs1:cs1:d"}),
        ({"a": {"b": 1}}, {"a": {}, "b": 1}),
        ({"ab": "c"}, {"a": "bc"}),
        ([12, 3], [1, 23]),
        ([1, 2], [12]),
        ([-1], ["-1"]),
        ([1.5, "x"], ["1.5", "x"]),
        (["\xe9"], ["e\u0301"]),
        (["a\x00"], ["a"]),
    ],
)
def test_values_that_differ_only_in_their_boundaries_have_different_forms(a: Any, b: Any) -> None:
    assert canonical(a) != canonical(b)


@given(st.dictionaries(strings, scalars, max_size=5), st.randoms(use_true_random=False))
def test_the_order_of_a_mapping_does_not_matter(value: dict[str, Any], random: Any) -> None:
    items = list(value.items())
    random.shuffle(items)
    assert canonical(dict(items)) == canonical(value)
    assert canonical(OrderedDict(items)) == canonical(MappingProxyType(dict(items))) == canonical(value)


def test_mappings_are_in_the_order_of_utf_8_not_of_utf_16() -> None:
    form = canonical({"\U0001f375": 1, "\uff5e": 2})
    assert form.index("\uff5e".encode()) < form.index("\U0001f375".encode())


def test_the_python_class_of_a_value_does_not_matter() -> None:
    class Number(IntEnum):
        one = 1

    class Word(StrEnum):
        one = "1"

    class Text(str):
        pass

    assert canonical((1, ("a",))) == canonical([1, ["a"]])
    assert canonical(Number.one) == canonical(1)
    assert canonical(Word.one) == canonical(Text("1")) == canonical("1")
    assert canonical(bytearray(b"1")) == canonical(memoryview(b"1")) == canonical(b"1")
    assert canonical(-0.0) == canonical(0.0)


@pytest.mark.parametrize(
    "value",
    [
        float("nan"),
        {"a": [float("nan")]},
        {1, 2},
        object(),
        1j,
        {1: "a"},
        {None: "a"},
        {b"a": 1},
        "\ud800",
        ["ok", {"a": "\udfff"}],
        {"\udc00": 1},
        10**5000,
        (item for item in "ab"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_without_a_canonical_form_are_refused(value: Any) -> None:
    with pytest.raises(SpaceError):
        canonical(value)


# --- the vector space -------------------------------------------------------------------------


def other_values(name: str) -> list[Any]:
    """Return several values for a field of VectorSpace, depending on its annotation. The default is not among them."""
    (annotation,) = [str(field.type) for field in fields(VectorSpace) if field.name == name]
    if "bool" in annotation:
        return [True, False]
    if "Mapping" in annotation:
        return [{}, {"a": 1}, {"a": "1"}, {"b": 1}, {"a": 1, "b": 1}, {"a": {"b": 1}}]
    if "Sequence" in annotation:
        return [[], ["a"], ["b"], ["a", "b"], ["b", "a"], ["ab"]]
    if "int" in annotation:
        return [0, 1, 384] + (["1"] if "str" in annotation else [])
    assert "str" in annotation, f"add values for the new field {name} here"
    return ["a", "b", "a ", "A"] + ([] if name in ("provider", "model") else [""])


@pytest.mark.parametrize("name", [field.name for field in fields(VectorSpace)])
def test_every_field_of_the_space_changes_fingerprint_scope_and_key(name: str) -> None:
    spaces = [SPACE, *(replace(SPACE, **{name: value}) for value in other_values(name))]
    assert len({space.fingerprint() for space in spaces}) == len(spaces)
    assert len({POLICY.scope(space) for space in spaces}) == len(spaces)
    digests = {key_of(space=space).rpartition(".")[2] for space in spaces}
    assert len(digests) == len(spaces)


def test_no_value_moves_from_one_field_to_another() -> None:
    optional = [field.name for field in fields(VectorSpace) if field.name not in ("provider", "model")]
    # Every field gets the same value, whatever its type. If the fingerprint did not depend on which field has the
    # value, two spaces would have the same fingerprint.
    spaces = [VectorSpace(**{"provider": "p", "model": "m", name: "x"}) for name in optional]
    spaces += [VectorSpace(provider="p", model="m", extra={name: "x"}) for name in optional]
    spaces += [VectorSpace(provider="px", model="m"), VectorSpace(provider="p", model="mx"), SPACE]
    spaces += [VectorSpace(provider="m", model="p")]
    assert len({space.fingerprint() for space in spaces}) == len(spaces)


def test_a_field_that_is_not_set_is_not_in_the_fingerprint() -> None:
    assert SPACE.described() == {"provider": "p", "model": "m"}
    assert (
        SPACE.fingerprint()
        == hashlib.sha256(b"embedonce/space/1" + encode_by_the_page({"provider": "p", "model": "m"})).digest()
    )


def test_how_the_space_was_written_does_not_matter() -> None:
    one = VectorSpace.of({"model": "m", "adapters": ("a", "b"), "extra": {"x": 1, "y": 2}, "provider": "p"})
    two = VectorSpace.of({"provider": "p", "y": 2, "x": 1, "adapters": ["a", "b"], "model": "m"})
    three = VectorSpace(provider="p", model="m", adapters=["a", "b"], extra=MappingProxyType({"y": 2, "x": 1}))
    assert key_of(space=one) == key_of(space=two) == key_of(space=three)


@pytest.mark.parametrize("value", [None, {}, {"provider": "p"}, {"model": ""}, "m", 3, {"model": 3}, {"extra": {}}])
def test_a_space_that_names_no_model_is_refused(value: Any) -> None:
    with pytest.raises(SpaceError):
        VectorSpace.of(value)


@given(st.dictionaries(strings, values, max_size=3), st.dictionaries(strings, values, max_size=3))
def test_extra_fields_matter_by_name_and_value(a: dict[str, Any], b: dict[str, Any]) -> None:
    one, two = (VectorSpace(provider="p", model="m", extra=extra).fingerprint() for extra in (a, b))
    assert (one == two) == is_same(a, b)


# --- keys -------------------------------------------------------------------------------------


@given(texts, some_policies, st.dictionaries(strings, scalars, max_size=2))
def test_a_key_is_what_the_page_says(text: str, policy: dict[str, Any], extra: dict[str, Any]) -> None:
    space = {"provider": "p", "model": "m", "extra": extra}
    assert compute_with_keyer(space, policy, text) == derive_by_the_page(space, policy, text)


@given(texts, texts)
@example("", " ")
@example("a", "a\x00")
@example("é", "e\u0301")
@example("note:nomic", "note")
def test_different_texts_have_different_keys(a: str, b: str) -> None:
    assert (key_of(a) == key_of(b)) == (a == b)


def test_nothing_moves_between_text_model_namespace_and_version() -> None:
    def key(text: str, model: str, namespace: str = "", version: str = "v1") -> str:
        policy = KeyPolicy(namespace=namespace, version=version)
        return key_of(text, VectorSpace(provider="p", model=model), policy)

    keys = [
        key("note:nomic", "v1"),
        key("note", "nomic:v1"),
        key("ab", "m"),
        key("b", "ma"),
        key("b", "m", namespace="a"),
        key("b", "m", version="a"),
        key("b", "m", namespace="a", version=""),
        key("b", "m", namespace="", version="av1"),
        key("b", "m", namespace="av1", version=""),
        key("", "mb"),
        key("", "m", namespace="b"),
    ]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    "other",
    [
        {"version": "v2"},
        {"version": ""},
        {"namespace": "a"},
        {"namespace": "v1"},
        {"secret": "a"},
        {"secret": "b"},
        {"secret": b"a\x00"},
        {"secret": b"\x00"},
        {"secret": b"\xff" * 200},
    ],
)
@pytest.mark.parametrize("algorithm", ["sha256", "blake2b"])
def test_every_part_of_the_policy_changes_scope_and_key(other: dict[str, Any], algorithm: Any) -> None:
    if algorithm == "blake2b" and len(other.get("secret", "")) > 64:
        pytest.skip("BLAKE2b takes a key of at most 64 bytes")
    changed = KeyPolicy(hash=algorithm, **other)
    assert changed.scope(SPACE) != KeyPolicy(hash=algorithm).scope(SPACE)
    assert key_of(policy=changed) != key_of(policy=KeyPolicy(hash=algorithm))


def test_the_hash_changes_the_key() -> None:
    policies = [KeyPolicy(hash=name, secret=secret) for name in ("sha256", "blake2b") for secret in (None, "s")]  # type: ignore[arg-type]
    assert len({key_of(policy=policy) for policy in policies}) == 4
    assert len({key_of(policy=policy).rpartition(".")[2] for policy in policies}) == 4


@given(st.binary(min_size=1, max_size=64), st.binary(min_size=1, max_size=64), st.sampled_from(["sha256", "blake2b"]))
@example(b"a", b"a\x00", "sha256")
@example(b"a", b"a\x00", "blake2b")
def test_a_rotated_secret_is_a_new_scope(a: bytes, b: bytes, algorithm: Any) -> None:
    one, two = KeyPolicy(secret=a, hash=algorithm), KeyPolicy(secret=b, hash=algorithm)
    assert (one.scope(SPACE) == two.scope(SPACE)) == (a == b)
    assert (key_of(policy=one) == key_of(policy=two)) == (a == b)


def test_a_secret_may_be_text_or_its_bytes() -> None:
    assert key_of(policy=KeyPolicy(secret="sé")) == key_of(policy=KeyPolicy(secret="sé".encode()))


def test_a_secret_is_never_shown() -> None:
    secret = "a very secret secret"
    policy = KeyPolicy(secret=secret)
    shown = repr(policy) + str(policy) + str(card(policy, SPACE)) + key_of(policy=policy) + repr(Keyer(policy, SPACE))
    assert secret not in shown
    with pytest.raises(ConfigError) as caught:
        KeyPolicy(secret=secret * 4, hash="blake2b")
    assert secret not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        KeyPolicy(secret=secret + "\udcff")
    assert secret not in f"{caught.value!r} {caught.value.__context__!r} {caught.value.__cause__!r}"


def test_normalisation_changes_the_text_but_not_the_scope() -> None:
    assert key_of("  x ", policy=KeyPolicy(normalize=["strip"])) == key_of("x") != key_of("  x ")
    assert KeyPolicy(normalize=["strip", "nfc"]).scope(SPACE) == POLICY.scope(SPACE)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\x00",
        "a\x00b",
        "\U0001f375",
        "\U0010ffff",
        "\ufeff",
        "\ufffe\uffff",
        "é",
        "e\u0301",
        "ﷺ",
        "👩‍👩‍👧",
        "x" * 2**20,
        "ß" * 2**19,
    ],
    ids=lambda text: ascii(text[:8]),
)
@pytest.mark.parametrize(
    "policy", [POLICY, KeyPolicy(secret="s"), KeyPolicy(hash="blake2b"), KeyPolicy(hash="blake2b", secret="s")]
)
def test_any_text_has_a_key_of_the_same_shape(text: str, policy: KeyPolicy) -> None:
    key = key_of(text, policy=policy)
    assert re.fullmatch(r"eo1\.[0-9a-f]{16}\.[0-9a-f]{64}", key)
    assert (len(key), key.isascii()) == (85, True)
    assert Keyer(policy, SPACE).prefix == key[:21]


@pytest.mark.parametrize("text", ["\ud800", "a\udfff", "ok \udc80", "\udc00\ud800"])
@pytest.mark.parametrize("steps", [[], ["nfc", "strip"], ["nfkc", "casefold", "newlines", "collapse-whitespace"]])
def test_a_lone_surrogate_is_refused_without_showing_the_text(text: str, steps: list[str]) -> None:
    with pytest.raises(TextError, match="lone surrogate") as caught:
        key_of("my private words " + text, policy=KeyPolicy(normalize=steps))
    assert "private" not in f"{caught.value!r}"
    assert caught.value.__suppress_context__


def test_the_card_names_the_scope_and_holds_no_text() -> None:
    space = VectorSpace(provider="p", model="m", task="query", dimensions=3, prompt="a private prompt")
    policy = KeyPolicy(version="v2", namespace="n", secret="s")
    made = card(policy, space)
    settings, hidden = made.pop("settings"), made.pop("fingerprint")
    assert made == {
        "provider": "p",
        "model": "m",
        "task": "query",
        "dimensions": 3,
        "version": "v2",
        "namespace": "n",
    }
    assert settings.keys() == {"prompt"}
    assert re.fullmatch("[0-9a-f]{8}", settings["prompt"])
    assert card(replace(policy, secret="other"), space)["settings"] != settings
    fingerprint = space.fingerprint().hex()
    assert re.fullmatch("[0-9a-f]{64}", hidden)
    assert hidden != fingerprint
    assert card(replace(policy, secret=None), space)["fingerprint"] == fingerprint
    keyer = Keyer(policy, space)
    assert keyer.card_key == CARD_PREFIX + keyer.scope
    assert re.fullmatch(r"eo1\.card\.[0-9a-f]{16}", keyer.card_key)
    json.dumps(card(policy, space))


@pytest.mark.parametrize("secret", [None, "s", "long" * 20])
@pytest.mark.parametrize("hash", ["sha256", "blake2b"])
def test_a_card_shows_the_keys_of_texts_in_its_scope(secret: str | None, hash: Any) -> None:
    if hash == "blake2b" and secret is not None and len(secret) > 64:
        hash = "sha256"
    policy = KeyPolicy(hash=hash, secret=secret, namespace="n", version="v2")
    keyer = Keyer(policy, SPACE)
    made = card(policy, SPACE)
    reader = KeyPolicy(secret=secret)  # its namespace, version and hash are different
    assert read_fingerprint(reader, keyer.scope, made) == keyer.fingerprint
    assert keyer.key("tea").rpartition(".")[2] in make_digests(reader, keyer.fingerprint, ["tea", "\ud800"])
    assert read_fingerprint(replace(reader, secret="other"), keyer.scope, made) is None
    assert read_fingerprint(reader, "0" * 16, made) is None
    for strange in ({}, {"fingerprint": 1}, {"fingerprint": "xyz"}, {"fingerprint": "00"}, {"version": [[]]}):
        changed = {**({} if not strange else made), **strange}
        assert read_fingerprint(reader, keyer.scope, changed) is None


@pytest.mark.parametrize(
    "options",
    [
        {"normalize": "strip"},
        {"hash": "md5"},
        {"secret": ""},
        {"secret": b""},
        {"secret": "x" * 65, "hash": "blake2b"},
        {"secret": "\ud800"},
        {"version": 1},
        {"version": None},
        {"version": "\ud800"},
        {"namespace": None},
        {"namespace": "a\udfff"},
    ],
    ids=str,
)
def test_an_invalid_policy_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        KeyPolicy(**options)


# --- normalisation ----------------------------------------------------------------------------

# Characters that the steps change. Some characters are changed by several steps, in different ways.
awkward = st.text(
    st.sampled_from(
        " \t\r\n\x0b\x1c\x85\xa0\u2028\u3000\u200b\ufeff\xa8ßİıſΣςK\u0130\u01f0\u0345\u1fb3ﬁ①Ａé\u0301e\u030cjJ"
    )
    | st.characters(exclude_categories=["Cs"]),
    max_size=12,
)


@pytest.mark.parametrize("name", NORMALIZERS)
def test_every_step_is_idempotent(name: str) -> None:
    step = NORMALIZERS[name]

    @given(awkward)
    def twice(text: str) -> None:
        once = step(text)
        assert step(once) == once

    twice()


@pytest.mark.parametrize("name", NORMALIZERS)
def test_every_step_is_idempotent_for_every_character(name: str) -> None:
    step = NORMALIZERS[name]
    for number in range(sys.maxunicode + 1):
        once = step(chr(number))
        assert step(once) == once, hex(number)


@pytest.mark.parametrize(
    ("name", "text", "normalized"),
    [
        ("nfc", "e\u0301", "é"),
        ("nfc", "ﬁ", "ﬁ"),
        ("nfkc", "ﬁ①Ａ", "fi1A"),
        ("strip", " \t\xa0\u3000x y\r\n", "x y"),
        ("strip", "\u200bx\ufeff", "\u200bx\ufeff"),
        ("collapse-whitespace", " a \r\n\n b\xa0c ", "a b c"),
        ("casefold", "Straße ΣΣς", "strasse σσσ"),
        ("newlines", "a\r\nb\rc\nd\r\r\n", "a\nb\nc\nd\n\n"),
        ("surrogates", "\ud83d\ude00", "\U0001f600"),
        ("surrogates", "a\ud83db", "a\ufffdb"),
        ("surrogates", "\ude00\ud83d", "\ufffd\ufffd"),
        ("surrogates", "\ud83d\ud83d\ude00\ude00", "\ufffd\U0001f600\ufffd"),
        ("surrogates", "\ufeffa\x00é\U0001f600\ufffe", "\ufeffa\x00é\U0001f600\ufffe"),
    ],
)
def test_what_each_step_does(name: str, text: str, normalized: str) -> None:
    assert NORMALIZERS[name](text) == normalized


def normalize_with(steps: Sequence[str], text: str) -> str:
    return Keyer(POLICY, SPACE, [NORMALIZERS[name] for name in steps]).normalize(text)


@pytest.mark.parametrize(
    ("first", "second", "text"),
    [
        ("nfc", "casefold", "\u01f0"),
        ("nfkc", "casefold", "\u2121"),
        ("nfkc", "strip", "\xa8x"),
        ("nfkc", "collapse-whitespace", "\xa8x"),
    ],
)
def test_the_order_of_steps_matters(first: str, second: str, text: str) -> None:
    assert normalize_with([first, second], text) != normalize_with([second, first], text)
    assert key_of(text, policy=KeyPolicy(normalize=[first, second])) != key_of(
        text, policy=KeyPolicy(normalize=[second, first])
    )


def test_casefold_after_nfc_leaves_text_that_is_not_nfc() -> None:
    assert not unicodedata.is_normalized("NFC", normalize_with(["nfc", "casefold"], "\u01f0"))


@given(st.text(st.characters(categories=["Cs", "Lu", "So"]) | st.sampled_from("\ud83d\ude00\ufeff\x00")))
def test_surrogates_makes_any_text_valid_and_changes_no_valid_text(text: str) -> None:
    once = NORMALIZERS["surrogates"](text)
    once.encode()
    assert NORMALIZERS["surrogates"](once) == once
    joined = re.sub("[\ud800-\udbff][\udc00-\udfff]", lambda pair: join_surrogates(pair[0]), text)
    assert once == re.sub("[\ud800-\udfff]", "\ufffd", joined)
    if not re.search("[\ud800-\udfff]", text):
        assert once == text


def join_surrogates(pair: str) -> str:
    return chr(0x10000 + (ord(pair[0]) - 0xD800) * 0x400 + ord(pair[1]) - 0xDC00)


@given(awkward)
def test_the_lists_that_the_page_recommends_are_idempotent(text: str) -> None:
    for steps in (["nfc", "newlines", "strip"], ["nfc", "casefold", "nfc"]):
        once = normalize_with(steps, text)
        assert normalize_with(steps, once) == once
        assert unicodedata.is_normalized("NFC", once)


@given(awkward)
def test_steps_whose_order_does_not_matter(text: str) -> None:
    assert len({normalize_with(order, text) for order in permutations(["newlines", "strip", "nfc"])}) == 1
    collapsed = normalize_with(["collapse-whitespace"], text)
    for other in ("strip", "newlines"):
        assert normalize_with([other, "collapse-whitespace"], text) == collapsed
        assert normalize_with(["collapse-whitespace", other], text) == collapsed


# --- golden keys, other processes, other Pythons ----------------------------------------------


def golden_space(golden: Mapping[str, Any]) -> dict[str, Any]:
    return dict(golden["space"])


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden["name"])
def test_golden_keys_never_change(golden: dict[str, Any]) -> None:
    expected = {name: golden[name] for name in ("canonical", "fingerprint", "scope", "key")}
    policy = {name: value for name, value in golden["policy"].items() if name != "normalize"}
    text = normalize_with(golden["policy"].get("normalize", []), golden["text"])
    assert text == golden["normalized"]
    assert compute_with_keyer(golden_space(golden), policy, text) == expected
    assert derive_by_the_page(golden_space(golden), policy, text) == expected


ELSEWHERE = """
import importlib, json, sys, types
package = types.ModuleType("embedonce")  # keys.py imports only errors.py, so it needs no numpy and no package
package.__path__ = [sys.argv[1] + "/embedonce"]
sys.modules["embedonce"] = package
keys = importlib.import_module("embedonce.keys")
found = []
for golden in json.load(open(sys.argv[2], encoding="utf-8")):
    policy, space = keys.KeyPolicy(**golden["policy"]), keys.VectorSpace(**golden["space"])
    keyer = keys.Keyer(policy, space, [keys.NORMALIZERS[name] for name in policy.normalize])
    found.append(keyer.key(keyer.normalize(golden["text"])))
json.dump(found, sys.stdout)
"""


def compute_keys_elsewhere(python: str, **environment: str) -> list[str]:
    """Return the keys of the golden texts, computed by another interpreter that loads keys.py from its path."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [python, "-c", ELSEWHERE, str(CORE), str(HERE / "golden" / "keys.json")],
        env={**clean, **environment, "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return list(json.loads(done.stdout))


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONHASHSEED": "0"}, {"PYTHONHASHSEED": "1"}, {"PYTHONHASHSEED": "random", "PYTHONUTF8": "0", "LC_ALL": "C"}],
    ids=str,
)
def test_keys_are_the_same_in_every_process(environment: dict[str, str]) -> None:
    assert compute_keys_elsewhere(sys.executable, **environment) == [golden["key"] for golden in GOLDEN]


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
def test_keys_are_the_same_in_every_python(version: str) -> None:
    python = shutil.which(f"python{version}")
    if python is None:
        pytest.skip(f"there is no python{version} on the PATH")
    # A version manager may put a stub on the PATH even if the version is not installed.
    tried = subprocess.run([python, "-c", "pass"], capture_output=True, text=True, timeout=100, check=False)
    if tried.returncode != 0:
        pytest.skip(f"python{version} does not start: {tried.stderr.strip().partition(chr(10))[0]}")
    assert compute_keys_elsewhere(python) == [golden["key"] for golden in GOLDEN]


@pytest.mark.parametrize(
    ("url", "canonical"),
    [
        ("http://[::1]:8000/v1/", "http://[::1]:8000/v1"),
        ("http://HOST:80", "http://host"),
        ("https://u:p@host:444/a/B/", "https://host:444/a/B"),
    ],
)
def test_canonical_urls(url: str, canonical: str) -> None:
    assert canonical_url(url) == canonical


@pytest.mark.parametrize("url", ["localhost:8000", "http://host/v1?key=1", "http://host#x", "ftp://host", "http://"])
def test_invalid_endpoint_urls(url: str) -> None:
    with pytest.raises(ValueError, match="URL"):
        canonical_url(url)
