"""Tests for texts that are joined with their own keywords."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import PurePosixPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedonce import SpaceError
from embedonce.keys import NORMALIZERS
from embedonce_integrations.composite_texts import join, join_keywords, split, split_all, split_keywords

TEXTS = ["one", "two", "three"]


@dataclass
class Options:
    titles: Any


@dataclass(slots=True)
class Slotted:
    titles: Any


class Plain:
    def __init__(self, titles: Any) -> None:
        self.titles = titles


@given(st.text(), st.one_of(st.none(), st.text(), st.integers(), st.booleans()))
def test_a_text_and_its_keywords_come_back(text: str, title: Any) -> None:
    assert split(join(text, {"titles": title})) == (text, {"titles": title})


@given(st.text(), st.text(), st.text(), st.text())
def test_different_pairs_have_different_composites(text: str, title: str, other: str, other_title: str) -> None:
    same = (text, title) == (other, other_title)
    assert (join(text, {"titles": title}) == join(other, {"titles": other_title})) is same


@pytest.mark.parametrize("step", NORMALIZERS)
@given(text=st.text(), title=st.text())
def test_normalisation_reaches_the_text_and_not_its_keywords(step: str, text: str, title: str) -> None:
    normalize = NORMALIZERS[step]
    (composite,) = join_keywords([text], {"titles": [title]}, normalize)
    if normalize(normalize(text)) == normalize(text):  # some texts need NFKC or casefold twice
        assert split(normalize(composite)) == (normalize(text), {"titles": title})


@pytest.mark.parametrize("damage", [str.upper, lambda text: text[1:], lambda text: text[:-1], lambda text: "", str])
def test_a_step_that_damages_a_composite_is_found(damage: Any) -> None:
    composite = join("text", {"titles": "T"})
    if damage is str:
        assert split(damage(composite)) == ("text", {"titles": "T"})
        return
    with pytest.raises(SpaceError, match=r"\[key\] normalize changes a text"):
        split(damage(composite))


def test_keywords_are_cut_along_with_the_texts() -> None:
    composites = [join(text, {"titles": text.upper()}) for text in TEXTS]
    assert split_all(composites[1:]) == (["two", "three"], {"titles": ["TWO", "THREE"]})


@pytest.mark.parametrize("titles", [["a", "b", "c"], ("a", "b", "c"), np.array(["a", "b", "c"])])
def test_titles_belong_to_the_texts(titles: Any) -> None:
    per_text, request = split_keywords({"titles": titles, "size": 3}, TEXTS)
    assert [str(title) for title in per_text["titles"]] == ["a", "b", "c"]
    assert request == {"size": 3}


def test_titles_of_another_number_are_an_error() -> None:
    with pytest.raises(ValueError, match="titles must have one value per text; texts: 3, values: 2"):
        split_keywords({"titles": ["a", "b"]}, TEXTS)
    assert split_keywords({"titles": "one for all"}, TEXTS) == ({}, {"titles": "one for all"})
    with pytest.raises(SpaceError, match="a value of titles must be a text"):
        join("text", {"titles": object()})


@pytest.mark.parametrize(
    "value",
    [
        [1, 2, 3],
        (1, 2, 3),
        np.zeros(3),
        range(3),
        {0: "a", 1: "b", 2: "c"},
        dict.fromkeys(TEXTS, 1),
        {"headings": [1, 2, 3]},
        [{"headings": [1, 2, 3]}],
        {"a": {"b": ["x", "y", "z"]}},
        [["x", "y", "z"]],
        {"a": [[["x", "y", "z"]]]},
        ([1, 2], [1, 2, 3]),
        np.zeros((1, 3)),
        [np.zeros((2, 1, 3))],
        {"0": "a", "1": "b", "2": "c"},
        {1: "a", 2: "b", 3: "c"},
        {"a": 1, "b": 2, "c": 3}.values(),
        SimpleNamespace(titles=["x", "y", "z"]),
        [SimpleNamespace(titles=[("x", "y", "z")])],
        Options(["x", "y", "z"]),
        Slotted(["x", "y", "z"]),
        Plain(["x", "y", "z"]),
    ],
)
def test_another_keyword_with_a_value_per_text_is_refused(value: Any) -> None:
    with pytest.raises(SpaceError, match=r"headings.* has as many values as there are texts"):
        split_keywords({"headings": value}, TEXTS)


def test_one_value_may_belong_to_one_text() -> None:
    with pytest.raises(SpaceError, match="headings has as many values"):
        split_keywords({"headings": ["x"]}, ["one"])


@pytest.mark.parametrize("value", [{"7": "x"}, np.zeros((2, 1)), [[["x"], 1], 2], Options(["x"])])
def test_one_text_is_not_searched_for_at_every_depth(value: Any) -> None:
    assert split_keywords({"headings": value}, ["one"]) == ({}, {"headings": value})


def test_an_object_that_contains_itself_is_searched_once() -> None:
    options = Options(None)
    options.titles = [options, {"again": options}]
    assert split_keywords({"options": options}, TEXTS)[1]["options"] is options
    options.titles.append(["x", "y", "z"])
    with pytest.raises(SpaceError, match=r"options\.titles has as many"):
        split_keywords({"options": options}, TEXTS)


class Side(Enum):
    LEFT = (1, 2, 3)


@pytest.mark.parametrize(
    "value",
    [
        *([1, 2], "abc", b"abc", {"a": 1, "b": 2, "c": 3}, {"x", "y", "z"}, 3, None),
        *(["abc", ["abc"]], {"1": 1, "b": 2, "c": 3}, {"1": 1, "2": 2}, Side.LEFT, len, Options, np.float32(3)),
        *(PurePosixPath("/a/b"), SimpleNamespace(callbacks=[1, 2, 3]), Options([1, 2])),
    ],
)
def test_another_value_is_a_setting_of_the_call(value: Any) -> None:
    assert split_keywords({"stop": value}, TEXTS) == ({}, {"stop": value})


def test_what_decides_no_vector_may_have_any_length() -> None:
    callbacks = [SimpleNamespace(), SimpleNamespace(), SimpleNamespace()]
    assert split_keywords({"callbacks": callbacks}, TEXTS) == ({}, {"callbacks": callbacks})
