"""Large JSON files are read in pieces: the same values as with ``json``, and errors for everything that is no JSON."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedonce_importers import _json_stores
from embedonce_importers._json_stores import JsonReader, decode_string

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
stores = st.dictionaries(st.text(), st.dictionaries(st.text(), values, max_size=5), max_size=4)


class Trickle(io.BytesIO):
    """A file that returns a few bytes per read, so that every token is cut somewhere."""

    def read(self, size: int | None = -1) -> bytes:
        return super().read(3)


def read_all(data: bytes, file: type[io.BytesIO] = io.BytesIO) -> dict[str, Any]:
    reader = JsonReader(file(data))
    read = {
        decode_string(name): {decode_string(key): json.loads(reader.read()) for key in reader.members()}
        for name in reader.members()
    }
    assert reader.has_ended()
    return read


@given(stores, st.booleans(), st.sampled_from([None, 1]), st.sampled_from([io.BytesIO, Trickle]))
def test_values_are_those_that_json_reads(
    store: dict[str, Any], ascii: bool, indent: int | None, file: type[io.BytesIO]
) -> None:
    data = json.dumps(store, ensure_ascii=ascii, indent=indent).encode("utf-8", "surrogatepass")
    assert read_all(data, file) == store


@given(values, values)
def test_a_value_that_is_skipped_does_not_move_the_next_one(first: Any, second: Any) -> None:
    data = json.dumps({"first": first, "second": second}).encode()
    reader = JsonReader(Trickle(data))
    names = reader.members()
    next(names)
    reader.skip()
    assert next(names) == b'"second"'
    begin = reader.offset
    value = reader.read()
    assert json.loads(value) == second
    assert data[begin : reader.offset] == value


@given(stores.filter(bool), st.data())
def test_a_truncated_file_is_an_error(store: dict[str, Any], data: st.DataObject) -> None:
    content = json.dumps(store).encode()
    cut = content[: data.draw(st.integers(0, len(content) - 1))]
    with pytest.raises(ValueError, match=r"ends too early|not valid JSON|missing|not a valid string"):
        read_all(cut)


@given(st.binary(max_size=60) | st.text(alphabet='{}[]",:\\ 1ae', max_size=60).map(str.encode))
def test_any_bytes_give_a_value_or_an_error_without_content(data: bytes) -> None:
    reader = JsonReader(io.BytesIO(b'{"secret": ' + data))
    message = ""
    try:
        for _ in reader.members():
            reader.read()
    except ValueError as error:
        message = str(error)
    assert "secret" not in message


def test_a_value_larger_than_the_limit_is_an_error_but_can_be_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_json_stores, "MAX_PIECE", 1000)
    monkeypatch.setattr(_json_stores, "CHUNK", 100)
    monkeypatch.setattr(_json_stores, "MAX_LIST", 100)
    data = json.dumps({"large": [[1, "x"]] * 3000, "next": 1}).encode()
    reader = JsonReader(io.BytesIO(data))
    next(reader.members())
    with pytest.raises(ValueError, match="has a value of more than"):
        reader.read()
    reader = JsonReader(io.BytesIO(data))
    names = reader.members()
    next(names)
    reader.skip()
    assert next(names) == b'"next"'
    assert len(reader._data) < 2000


@pytest.mark.parametrize(
    "bomb",
    [b"[" * 200_000, b'{"a":' * 100_000, b"[1," * 200_000, b'["' * 200_000, b"[1,{" * 100_000, b'"\\' * 200_000],
    ids=["lists", "objects", "numbers", "strings", "mixed", "escapes"],
)
def test_a_bomb_of_brackets_is_an_error_in_linear_time(bomb: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[int] = []
    find = JsonReader._pass_numbers

    def count(self: JsonReader, start: int | None) -> bool:
        searches.append(1)
        return find(self, start)

    monkeypatch.setattr(JsonReader, "_pass_numbers", count)
    reader = JsonReader(io.BytesIO(b'{"a":' + bomb))
    next(reader.members())
    with pytest.raises(ValueError, match="ends too early"):
        reader.skip()
    # The search for the end of a list may read far ahead, so it is given up after a few lists with something else.
    assert len(searches) <= _json_stores.MAX_NESTED


def test_zero_bytes_behind_a_value_are_an_error_without_reading_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    class Zeros(io.BytesIO):
        read_bytes = 0

        def read(self, size: int | None = -1) -> bytes:
            part = super().read(size)
            assert size is not None
            self.read_bytes += size
            assert self.read_bytes < 10 << 20
            return part or bytes(size)

    monkeypatch.setattr(_json_stores, "MAX_PIECE", 1 << 20)
    for begin in (b'{"a": ', b'{"a": [', b'{"a": "', b'{"a": [1, 2', b""):
        reader = JsonReader(Zeros(begin + bytes(1 << 20)))
        with pytest.raises(ValueError, match=r"not valid JSON|missing|has a value of more"):
            skip_all(reader)


def skip_all(reader: JsonReader) -> None:
    for _ in reader.members():
        reader.skip()
