"""Keys are those that the same expression gives in Python, and errors show the column."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedonce.errors import ConfigError
from embedonce_importers._key_templates import KeyTemplate, Step


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def md5(text: str) -> str:
    return hashlib.md5(text.encode()).hexdigest()


M = "text-embedding-3-small"
SEEN: dict[str, Callable[[str], str]] = {
    '"{text}"': lambda t: t,
    'sha256("{text}")': sha256,
    "sha256('{text}')": sha256,
    '"{model}" + "{text}"': lambda t: M + t,
    '"{model}||{text}"': lambda t: f"{M}||{t}",
    '"{model}|" + sha256("{text}")': lambda t: f"{M}|{sha256(t)}",
    '"embed:{model}:" + sha256("{text}")[:16]': lambda t: f"embed:{M}:{sha256(t)[:16]}",
    '"embedding:" + sha256("{text}")': lambda t: f"embedding:{sha256(t)}",
    '"v1:" + md5("{text}")': lambda t: "v1:" + md5(t),
    'sha256("{model}|{text}")[:16]': lambda t: sha256(f"{M}|{t}")[:16],
    'sha256("{model}:" + md5("{text}"))[ : 32 ] + ":end"': lambda t: sha256(f"{M}:{md5(t)}")[:32] + ":end",
    r'sha256("{model}\n{text}\0\t\\\"\'")': lambda t: sha256(f"{M}\n{t}\0\t\\\"'"),
    "sha256(\"{{'model': {model}, {{}}}}{text}\")": lambda t: sha256(f"{{'model': {M}, {{}}}}{t}"),
    'blake2b("{text}")': lambda t: hashlib.blake2b(t.encode()).hexdigest(),
    'blake2s("{text}")': lambda t: hashlib.blake2s(t.encode()).hexdigest(),
    'sha1("{text}")': lambda t: hashlib.sha1(t.encode()).hexdigest(),
    'sha224("{text}")': lambda t: hashlib.sha224(t.encode()).hexdigest(),
    'sha384("{text}")': lambda t: hashlib.sha384(t.encode()).hexdigest(),
    'sha512("{text}")[:20]': lambda t: hashlib.sha512(t.encode()).hexdigest()[:20],
}


@pytest.mark.parametrize("template", SEEN)
def test_keys_are_those_of_the_same_expression_in_python(template: str) -> None:
    keys = KeyTemplate(template, model=M if "{model}" in template else None)
    for text in ("", "a text", "Grüße\n\t{text} {model} %s 🎉", "x" * 10_000):
        assert keys.make_key(text) == SEEN[template](text)


@given(text=st.text(), model=st.text(min_size=1))
def test_neither_text_nor_model_is_interpreted(text: str, model: str) -> None:
    assert KeyTemplate('"{model}{text}"', model=model).make_key(text) == model + text


@pytest.mark.parametrize(
    ("steps", "text", "key"),
    [
        (("strip",), "  A  b ", "A  b"),
        (("lower",), " A  b ", " a  b "),
        (("squeeze",), "  A \n b ", "A b"),
        (("strip", "lower"), "  A  b ", "a  b"),
        ((), " A ", " A "),
    ],
)
def test_steps_change_the_text_before_the_key_is_made(steps: tuple[Step, ...], text: str, key: str) -> None:
    assert KeyTemplate('"{text}"', steps=steps).make_key(text) == key


def test_texts_with_the_same_key_are_grouped() -> None:
    keys = KeyTemplate('"{text}"', steps=["lower"])
    assert keys.group_by_key(["A", "b", "a", "lone \udc80 surrogate"]) == {"a": ["A", "a"], "b": ["b"]}


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("", 'key must be a template such as sha256("{text}")'),
        ("{text}", 'column 1: expected a string in quotes such as "{text}", or a hash function'),
        ("text", 'column 1: write "{text}", in quotes and braces'),
        ('"{text}', "column 1: this string has no end"),
        ('"{text} {"', "column 9: unknown field; the fields are {text} and {model}"),
        ('"{text.upper}"', "column 2: unknown field"),
        ('"{text!r}"', "column 2: unknown field"),
        ('"{}{text}"', "column 2: unknown field"),
        ('"{text}}"', "column 8: a single }; write }} for a brace"),
        (r'"{text}\x"', r"column 8: unknown escape"),
        ('sha3("{text}")', "column 1: unknown function; use one of md5, sha1"),
        ('sha256 "{text}"', "column 8: expected ( after the function"),
        ('sha256("{text}"', "column 16: expected + or )"),
        ('sha256("{text}") "b"', "column 18: expected + or the end"),
        ('sha256("{text}").hexdigest()', "column 17: expected + or the end"),
        ('sha256("{text}")[0]', "column 17: expected a slice such as [:16]"),
        ('sha256("{text}")[:8]', "column 17: keep at least 16 digits of a hash"),
        ('md5("{text}")[:33]', "column 14: this hash has only 32 digits"),
        ('"{text}"[:20]', "column 9: only a hash can be cut"),
        ('"{model}{text}"', "column 2: {model} needs the option model"),
        ('"model"', "key does not use {text}, so all texts would have the same key"),
        ("sha256(" * 9 + '"{text}"' + ")" * 9, "at most 8 functions may be inside each other"),
        ('"' + "x" * 1000 + '{text}"', "key must have at most 1,000 characters"),
        ('__import__("os")', "column 1: unknown function"),
    ],
)
def test_an_invalid_template_is_an_error_with_its_column(template: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        KeyTemplate(template)
    assert message in str(caught.value)


def test_a_model_without_a_place_and_unknown_steps_are_errors() -> None:
    with pytest.raises(ConfigError, match=r"does not use \{model\}"):
        KeyTemplate('"{text}"', model="m")
    with pytest.raises(ConfigError, match="steps must be a list of these names: strip, lower, squeeze"):
        KeyTemplate('"{text}"', steps=["upper"])  # type: ignore[list-item]
    with pytest.raises(ConfigError, match="steps must be a list"):
        KeyTemplate('"{text}"', steps="strip")  # type: ignore[arg-type]


@given(template=st.text(alphabet="sha256md5()\"'{}textmodel+[:16] \\", max_size=60))
def test_any_other_template_is_a_configuration_error(template: str) -> None:
    try:
        keys = KeyTemplate(template)
    except ConfigError:
        return
    assert keys.make_key("one") != keys.make_key("another")


def test_the_name_tells_every_option() -> None:
    name = KeyTemplate('sha256("{model}{text}")', model="m", steps=["strip"]).name
    assert name == 'key sha256("{model}{text}"), model m, steps strip'
