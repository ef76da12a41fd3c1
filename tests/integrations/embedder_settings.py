"""Hypothesis strategies for embedders with a random mix of settings, for the tests of all frameworks.

A framework's test makes one embedder for each of two mixes of a :class:`Pair`, and compares their keys::

    @given(pairs())
    def test_...(pair: Pair) -> None:
        keys = [key_of(attach(MyEmbedder(), mix)) for mix in pair.mixes]
        assert (keys[0] == keys[1]) is pair.are_equal
"""

from __future__ import annotations

import keyword
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import PurePosixPath
from threading import Lock
from typing import Any, TypeVar

import numpy as np
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, PrivateAttr

from embedonce_integrations.embedder_fields import (
    ENDPOINT_FIELDS,
    MODEL_FIELDS,
    NOT_IN_SPACE,
    decides_nothing,
    is_secret,
    is_unmistakable,
)

T = TypeVar("T")

IRRELEVANT = (*sorted(NOT_IN_SPACE), "api_key", "openaiApiKey", "cohere_api_key", "x-api-key", "hf_token", "password")


class Plain:
    """An object with attributes."""


class Slotted:
    __slots__ = ("_hidden", "name", "value")

    def __init__(self, name: str, value: Any) -> None:
        self.name = name
        self.value = {name: value}
        self._hidden = 1


@dataclass
class Data:
    options: dict[str, Any] = field(default_factory=dict)


class Model(BaseModel):
    model_config = ConfigDict(extra="allow", arbitrary_types_allowed=True)
    _hidden: Any = PrivateAttr(default=None)


class Pooling(Enum):
    MEAN = "mean"
    CLS = "cls"
    LAST = 3


def set_public(embedder: Any, name: str, value: Any) -> None:
    embedder.__dict__[name] = value


def set_private(embedder: Any, name: str, value: Any) -> None:
    private = getattr(embedder, "__pydantic_private__", None)
    (embedder.__dict__ if private is None else private)[f"_{name}"] = value


def set_in_object(embedder: Any, name: str, value: Any) -> None:
    part = Plain()
    part.__dict__[name] = value
    set_private(embedder, f"part_{name}", part)


def set_in_slots(embedder: Any, name: str, value: Any) -> None:
    set_public(embedder, f"part_{name}", Slotted(name, value))


def set_in_dataclass(embedder: Any, name: str, value: Any) -> None:
    set_public(embedder, f"part_{name}", Data({name: value}))


def set_in_list(embedder: Any, name: str, value: Any) -> None:
    set_private(embedder, f"part_{name}", [({name: value},)])


def set_in_model(embedder: Any, name: str, value: Any) -> None:
    set_public(embedder, f"part_{name}", Model(**{name: value}))


def set_in_private_part_of_a_model(embedder: Any, name: str, value: Any) -> None:
    part = Model()
    part._hidden = {name: value}
    set_private(embedder, f"part_{name}", part)


PLACES: tuple[Callable[[Any, str, Any], None], ...] = (
    set_public,
    set_private,
    set_in_object,
    set_in_slots,
    set_in_dataclass,
    set_in_list,
    set_in_model,
    set_in_private_part_of_a_model,
)


MAPPINGS = (set_in_slots, set_in_list, set_in_private_part_of_a_model)
"""Places where the name of a setting is a key of a mapping."""


@dataclass(frozen=True)
class Setting:
    place: Callable[[Any, str, Any], None]
    name: str
    value: Any


@dataclass(frozen=True)
class Pair:
    """Two mixes of settings, and whether embedders with them make the same vectors."""

    mixes: tuple[list[Setting], list[Setting]]
    are_equal: bool


def attach(embedder: T, mix: list[Setting]) -> T:
    """Give an embedder the settings of a mix, and return it."""
    for setting in mix:
        setting.place(embedder, setting.name, setting.value)
    return embedder


TEXT = st.text("abc xyz", max_size=4)
SCALARS = (
    TEXT,
    st.text("é\ud800", min_size=1, max_size=3),
    st.integers(),
    st.sampled_from([10**400, 10**5000, -(10**5000)]),
    st.floats(),
    st.booleans(),
    st.binary(max_size=3),
    st.sampled_from(Pooling),
    st.dates(max_value=date(2030, 1, 1)),
    st.just(timedelta(1)) | st.timedeltas(),
    st.decimals(allow_nan=False),
    st.fractions(),
    st.builds(PurePosixPath, st.sampled_from(["a", "b/c"])),
    st.builds(np.float32, st.integers(0, 3)),
    st.builds(lambda size: np.arange(size, dtype=np.float32), st.integers(0, 3)),
    st.sampled_from([len, max, datetime.now, Fraction, Decimal, np.sum, np.add]),
)
KINDS = (
    *SCALARS,
    st.lists(TEXT, max_size=2),
    st.lists(st.integers(), max_size=2).map(deque),
    st.dictionaries(TEXT, st.integers(), max_size=2),
    st.dictionaries(st.integers(0, 3), TEXT, max_size=2).map(OrderedDict),
    st.frozensets(st.integers(0, 3), max_size=2),
    st.tuples(st.integers(0, 1), TEXT),
)


def _name_is_free(name: str) -> bool:
    plain = name.strip("_")
    return not (
        keyword.iskeyword(name)
        or decides_nothing(name)
        or is_secret(name)
        or plain in MODEL_FIELDS
        or plain in ENDPOINT_FIELDS
        or "late" in plain
        or plain == "precision"
    )


NAMES = st.sampled_from(["task", "prompt", "dimensions", "truncate", "normalize", "input_type", "pooling", "revision"])
FREE_NAMES = (NAMES | st.from_regex(r"[a-z]{1,8}(_[a-z]{1,4})?", fullmatch=True)).filter(_name_is_free)


def _shown(value: Any) -> str:
    """Return a text that differs for values of one kind that differ. (-0.0 is 0.0.)"""
    if isinstance(value, float | np.floating):
        return repr(float(value) + 0.0)
    if isinstance(value, int) and not isinstance(value, bool):
        return hex(value)
    if isinstance(value, dict):
        return repr(sorted(value.items()))
    return repr(sorted(value)) if isinstance(value, frozenset) else repr(value)


@st.composite
def pairs(draw: st.DrawFn) -> Pair:
    """Draw two mixes that differ in one setting, which matters or does not."""
    places = st.sampled_from(PLACES)
    mix = [
        Setting(draw(places), f"{name}_{position}", draw(draw(st.sampled_from(KINDS))))
        for position, name in enumerate(draw(st.lists(FREE_NAMES, max_size=3)))
    ]
    place, at = draw(places), draw(st.integers(0, len(mix)))
    if draw(st.booleans()):
        kind = draw(st.sampled_from(KINDS))
        name, first, second = draw(FREE_NAMES), draw(kind), draw(st.none() | kind)
        are_equal = _shown(first) == _shown(second)
    else:
        # A single word may be a word of the user's own in a mapping that does not say what it is.
        names = [name for name in IRRELEVANT if place not in MAPPINGS or is_unmistakable(name)]
        name, first, second = draw(st.sampled_from(names)), draw(TEXT), draw(st.none() | TEXT | st.builds(Lock))
        are_equal = True
    mixes = tuple([*mix[:at], Setting(place, name, value), *mix[at:]] for value in (first, second))
    return Pair((mixes[0], mixes[1]), are_equal)
