"""Options of plugins: their units, their declaration in a constructor, and the checks that do not need pydantic."""

from __future__ import annotations

import inspect
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Gt, Le, Lt, MinLen
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from embedonce._plugins.options import Option, Refused, options_of, read_text
from embedonce._plugins.plain_values import UNSURE, convert_plain_value
from embedonce.errors import PluginError
from embedonce.options import (
    BadValue,
    Doc,
    Duration,
    Size,
    check_secret,
    parse_duration,
    parse_size,
    read_secret_variable,
)

# --- units ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "size"),
    [
        (0, 0),
        (17, 17),
        ("17", 17),
        ("17 B", 17),
        ("1kB", 1000),
        ("1GB", 10**9),
        ("512 MiB", 512 * 2**20),
        ("512mib", 512 * 2**20),
        (" 1.5 GiB ", 3 * 2**29),
        ("0.1 kB", 100),
        ("2 TiB", 2**41),
        (2**63 - 1, 2**63 - 1),
    ],
)
def test_sizes(written: object, size: int) -> None:
    assert parse_size(written) == size


@pytest.mark.parametrize(
    "written",
    [
        *("", "B", "1 M", "1 MB/s", "1 zb", "-1", "1,5 GB", "1e3", "nan", "1.5", "1.5 B", "9" * 30, "9000000 TiB"),
        *("\u0661 kB", -1, 2**63, 1.0, True, None, [1], b"1"),
    ],
)
def test_invalid_sizes(written: object) -> None:
    with pytest.raises(BadValue):
        parse_size(written)


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        (0, 0.0),
        (3, 3.0),
        (0.25, 0.25),
        ("3600", 3600.0),
        ("250ms", 0.25),
        ("90 s", 90.0),
        ("1h", 3600.0),
        ("1h30m", 5400.0),
        ("1h 30m", 5400.0),
        ("1.5h", 5400.0),
        ("7d", 604800.0),
        ("1w", 604800.0),
    ],
)
def test_durations(written: object, seconds: float) -> None:
    assert parse_duration(written) == seconds


@pytest.mark.parametrize(
    "written",
    [
        *("", "h", "1 y", "1H", "-1s", "1h1h", "1h and 2m", "1,5h", "1e3", "nan", "inf", "99999999d"),
        *(-1, -0.001, math.nan, math.inf, 1e300, True, None, [1]),
    ],
)
def test_invalid_durations(written: object) -> None:
    with pytest.raises(BadValue):
        parse_duration(written)


@given(st.one_of(st.text(max_size=20), st.integers(), st.floats(), st.binary(max_size=4)))
def test_units_are_read_or_refused(written: object) -> None:
    for parse in (parse_size, parse_duration):
        try:
            parsed = parse(written)
        except BadValue:
            continue
        assert math.isfinite(parsed)
        assert parsed >= 0


@given(st.integers(min_value=0, max_value=2**63 - 1))
def test_a_number_of_bytes_is_that_number(size: int) -> None:
    assert parse_size(size) == parse_size(str(size)) == parse_size(f"{size} B") == size


# --- options ----------------------------------------------------------------------------------


class Everything:
    def __init__(
        self,
        *,
        needed: Annotated[str, Doc("It must be there.")],
        size: Annotated[Size | None, Gt(0), Doc("How much.")] = None,
        path: Annotated[str | Path, Doc("Where.")] = ".",
        words: Sequence[str] = (),
        client: object = None,
    ) -> None: ...


def test_options_are_the_keyword_only_parameters() -> None:
    options = options_of(Everything)
    assert list(options) == ["needed", "size", "path", "words", "client"]
    assert [name for name, option in options.items() if option.required] == ["needed"]
    assert options["needed"].doc == "It must be there."
    assert options["size"].doc == "How much."
    assert options["words"].doc is None
    assert [name for name, option in options.items() if option.is_path] == ["path"]


def test_a_class_without_init_has_no_options() -> None:
    class Plain: ...

    assert options_of(Plain) == {}


def test_a_class_that_needs_a_positional_argument_is_refused() -> None:
    class Positional:
        def __init__(self, client: object, *, size: int = 1) -> None: ...

    with pytest.raises(PluginError, match='its parameter "client" must be keyword-only'):
        options_of(Positional)


def test_the_error_names_a_type_that_is_missing_at_run_time() -> None:
    class Hidden:
        def __init__(self, *, client: NotImported | None = None) -> None: ...  # type: ignore[name-defined] # noqa: F821

    with pytest.raises(PluginError, match=r"Hidden's options cannot be read: name 'NotImported'"):
        options_of(Hidden)


class Client:
    """A type that no TOML value can have."""


def test_an_option_that_only_python_can_give() -> None:
    with pytest.raises(PluginError, match="can only be given in Python"):
        Option("client", Client | None, None).check("x")


STRICT: Sequence[tuple[Any, Any]] = [
    (int, "5"),
    (int, 5.0),
    (int, True),
    (bool, "yes"),
    (bool, 1),
    (str, 5),
    (float, "5"),
    (float, True),
    (Sequence[str], "nfc"),
    (Annotated[int, Gt(0)], 0),
    (Annotated[Size | None, Gt(0)], "0 B"),
    (Literal["lru", "fifo"], "lfu"),
]


@pytest.mark.parametrize(("hint", "value"), STRICT)
def test_values_are_not_converted_between_types(hint: Any, value: Any) -> None:
    with pytest.raises(Refused):
        Option("option", hint).check(value)


@pytest.mark.parametrize(
    ("hint", "text", "value"),
    [
        (str, "2048", "2048"),
        (int, "2048", 2048),
        (float, "0.5", 0.5),
        (bool, "true", True),
        (bool, "TRUE", True),
        (bool, "yes", "yes"),
        (int, "many", "many"),
        (int, "99.5", "99.5"),
        (float, "inf", "inf"),
        (Size, "1 MiB", "1 MiB"),
        (Sequence[str], "nfc,strip", ["nfc", "strip"]),
        (Sequence[str], "nfc", ["nfc"]),
        (Sequence[str], '["nfc", "strip"]', ["nfc", "strip"]),
        (Sequence[str], "", []),
        (list[int], "1, 2", [1, 2]),
        (Mapping[str, int], "{a = 1}", {"a": 1}),
        (Mapping[str, int], '{"a": 1}', {"a": 1}),
        (Sequence[str], "[" * 5000, ["[" * 5000]),
    ],
)
def test_the_text_of_a_variable_is_read_by_the_type_of_its_option(hint: Any, text: str, value: Any) -> None:
    assert read_text(Option("option", hint), text) == value


# --- plain values -----------------------------------------------------------------------------

HINTS: Sequence[Any] = [
    str,
    int,
    bool,
    float,
    Path,
    str | None,
    int | None,
    int | str,
    float | int,
    bool | int,
    str | Path,
    Size,
    Duration,
    Size | None,
    Duration | None,
    Annotated[Size | None, Gt(0)],
    Annotated[Annotated[Size, Gt(0)] | None, Doc("x")],
    Annotated[int, Ge(2), Le(5), Doc("x")],
    Annotated[float | None, Gt(0), Lt(3)],
    Literal["lru", "fifo"],
    Literal["a", 1, True] | None,
    Sequence[str],
    list[int],
    list[str] | None,
    Annotated[list[float], Doc("x")],
    Annotated[str, MinLen(2), Doc("x")],
    Annotated[Sequence[str], MinLen(1)] | None,
    Mapping[str, int],
    tuple[str, ...],
    Any,
]

plain = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-10, 10),
        st.integers(-(2**63), 2**63 - 1),
        st.floats(allow_nan=False, allow_infinity=False),
        st.sampled_from(["lru", "a", "1", "1h", "1 kB", "true", ""]),
        st.text(st.characters(codec="utf-8"), max_size=5),
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
    max_leaves=4,
)


@given(st.sampled_from(HINTS), plain)
def test_pydantic_agrees_with_the_plain_check(hint: Any, value: Any) -> None:
    converted = convert_plain_value(hint, value)
    if converted is UNSURE:
        return
    try:
        validated = TypeAdapter(hint).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        pytest.fail(f"the plain check accepts {value!r} as {hint}, but pydantic refuses it: {error}")
    assert converted == validated
    assert type(converted) is type(validated)


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (str, "x"),
        (Annotated[int, Gt(0), Doc("x")], 1),
        (Annotated[Size | None, Doc("x")], "1 kB"),
        (str | Path, "x"),
        (Sequence[str], ["x"]),
        (Annotated[Sequence[str], MinLen(1)] | None, ["x"]),
        (Literal["a"], "a"),
    ],
)
def test_common_options_need_no_pydantic(hint: Any, value: Any) -> None:
    assert convert_plain_value(hint, value) is not UNSURE


def test_a_plain_configuration_is_read_without_pydantic() -> None:
    code = """
        import sys
        from embedonce import config
        config.load({"provider": {"type": "ngram", "dimensions": 64},
                     "tiers": [{"type": "memory", "max_bytes": "1 MiB", "ttl": "1h"}]})
        print("pydantic" in sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", inspect.cleandoc(code)], check=True, capture_output=True, text=True, timeout=100
    )
    assert done.stdout.strip() == "False"


# --- secrets ----------------------------------------------------------------------------------

INVISIBLE = {
    "\n": "a line end",
    "\r\n": "a line end",
    "\u2028": "a line end",
    " ": "a space",
    "\u00a0": "a space",
    "\t": "a tab",
    "\ufeff": "a byte order mark",
    "\u200b": "a zero-width character",
    "\x1b": "a control character",
}


@pytest.mark.parametrize("character", INVISIBLE)
def test_a_secret_with_an_invisible_character_around_it_is_refused(
    character: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text, verb in ((f"hunter2{character}", "ends with"), (f"{character}hunter2", "starts with")):
        with pytest.raises(BadValue) as caught:
            check_secret(text)
        assert f"{verb} {INVISIBLE[character]}; remove it" in str(caught.value)
        monkeypatch.setenv("SOME_KEY", text)
        with pytest.raises(BadValue) as caught:
            read_secret_variable("SOME_KEY")
        assert str(caught.value).startswith(f"the environment variable SOME_KEY {verb}")
        assert "hunter2" not in str(caught.value)
        assert caught.value.__cause__ is None


def test_what_a_secret_may_contain(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("", "hunter2", "correct horse", "p\u00e4ss", "-----BEGIN KEY-----\nabc\n", '{"a": 1}\n'):
        check_secret(text)
    with pytest.raises(BadValue, match="NUL"):
        check_secret("a\0b")
    monkeypatch.setenv("SOME_KEY", "")
    assert read_secret_variable("SOME_KEY") is None
    assert read_secret_variable("NOT_SET_AT_ALL") is None
    monkeypatch.setenv("SOME_KEY", "hunter2")
    assert read_secret_variable("SOME_KEY") == "hunter2"


@pytest.mark.parametrize(
    ("hint", "is_choice"),
    [
        (Literal["low", "high"], True),
        (Annotated[Literal["low", "high"] | None, Doc("Level.")], True),
        (Literal["none"] | bool, True),
        (Literal["auto"] | str, False),
        (Literal["auto"] | Path, False),
        (Literal["auto"] | list[str], False),
        (Literal["auto"] | dict[str, str] | None, False),
        (str, False),
    ],
)
def test_only_an_option_without_free_text_is_a_choice(hint: Any, is_choice: bool) -> None:
    """The value of a choice from a variable is shown, because it cannot be a secret."""
    assert Option("level", hint, None).is_choice == is_choice
