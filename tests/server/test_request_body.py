"""The body of a request for vectors: what is accepted, and what is refused before anything is sent."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedonce_server.api.api_errors import ApiError
from embedonce_server.api.request_body import MAX_DEPTH, MAX_INPUTS, parse_body, read_request


def read(forward: tuple[str, ...] = (), **fields: Any) -> Any:
    return read_request({"model": "m", "input": "a", **fields}, forward)


def refuse(forward: tuple[str, ...] = (), **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as refused:
        read(forward, **fields)
    return refused.value


@pytest.mark.parametrize(
    ("given", "texts", "are_tokens"),
    [
        ("a", ["a"], False),
        (["a", "b", "a"], ["a", "b", "a"], False),
        ([1, 2, 3], ["[1,2,3]"], True),
        ([[1, 2], [3]], ["[1,2]", "[3]"], True),
        ([1.0, 2], ["[1,2]"], True),  # for JSON, 1.0 is a whole number
        ([[1e3]], ["[1000]"], True),
        (" ", [" "], False),
    ],
)
def test_the_four_shapes_of_input(given: Any, texts: list[str], are_tokens: bool) -> None:
    request = read(input=given)
    assert (request.texts, request.are_tokens) == (texts, are_tokens)


@pytest.mark.parametrize(
    "given",
    [
        None,
        "",
        [],
        ["a", ""],
        ["a", 1],
        [1, "a"],
        [1, [2]],
        [[1], "a"],
        [[]],
        [[1], []],
        [1.5],
        [True],
        [[True]],
        [-1],
        [2**31],
        [[1, None]],
        {"text": "a"},
        5,
        True,
        [None],
        [[["a"]]],
        [["a"]],
    ],
)
def test_other_inputs_are_refused(given: Any) -> None:
    error = refuse(input=given)
    assert (error.status, error.kind, error.param) == (400, "invalid_request_error", "input")


def test_a_missing_input_is_named() -> None:
    with pytest.raises(ApiError, match='"input" is missing'):
        read_request({"model": "m"}, ())


def test_too_many_inputs_are_refused_but_one_list_of_tokens_may_be_long() -> None:
    assert refuse(input=["a"] * (MAX_INPUTS + 1)).param == "input"
    assert refuse(input=[[1]] * (MAX_INPUTS + 1)).param == "input"
    assert len(read(input=["a"] * MAX_INPUTS).texts) == MAX_INPUTS
    assert len(read(input=[1] * (MAX_INPUTS + 1)).texts) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"encoding_format": 5}, "encoding_format"),
        ({"encoding_format": ["float"]}, "encoding_format"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": True}, "dimensions"),
        ({"dimensions": 1.5}, "dimensions"),
        ({"dimensions": "256"}, "dimensions"),
        ({"dimensions": 10**9}, "dimensions"),
        ({"user": 5}, "user"),
        ({"input_type": 5}, "input_type"),
        ({"task": ""}, "task"),
        ({"task_type": "x" * 65}, "task_type"),
        ({"task": "a\nb"}, "task"),
        ({"task": "query", "input_type": "document"}, "task"),
        ({"truncate": "END"}, "truncate"),
    ],
)
def test_invalid_fields_are_named(fields: dict[str, Any], param: str) -> None:
    error = refuse(**fields)
    assert (error.status, error.param) == (400, param)


def test_null_counts_as_absent() -> None:
    request = read(dimensions=None, encoding_format=None, user=None, input_type=None, task=None, truncate=None)
    assert request == read()


@pytest.mark.parametrize(
    ("field", "name", "task"),
    [
        ("input_type", "query", "query"),
        ("input_type", "search_query", "query"),
        ("input_type", "passage", "document"),
        ("task", "retrieval.query", "query"),
        ("task", "retrieval.passage", "document"),
        ("task_type", "RETRIEVAL_QUERY", "query"),
        ("task_type", "RETRIEVAL_DOCUMENT", "document"),
        ("task_type", "CLASSIFICATION", "classification"),
        ("input_type", "Document", "document"),
    ],
)
def test_the_names_of_several_vendors_mean_embedonces_tasks(field: str, name: str, task: str) -> None:
    assert read(**{field: name}).task == task
    assert read(input_type=None, **({} if field == "input_type" else {field: name})).task in (task, "document")


def test_two_fields_may_name_the_same_task() -> None:
    assert read(input_type="query", task_type="RETRIEVAL_QUERY").task == "query"


def test_fields_that_the_model_lists_are_forwarded() -> None:
    assert read(("truncate",), truncate="END", user="u").forwarded == {"truncate": "END"}
    error = refuse(("truncate",), padding=1)
    assert "truncate" in str(error)
    assert error.code == "unsupported_field"


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b'"a"', b"null", b"\xff\xfe", b'{"a": NaN}'),
        *(b'["\\ud800"]', b'{"input": "\\ud800", "a": NaN}', b'{"input": "\\ud800", "a": -Infinity}'),
        *(b'{"input": "\\ud800", "a": 1e999}', b'{"input": "\\ud800"', b'{"input": "\\ud800 \n"}'),
        *(b'{"input": "\\ud800 \xed\xa0\x80"}', b'\xef\xbb\xbf{"input": "\\ud800"}', b"'\\ud800'"),
        b'{"input": "\\ud800", "a": %b1%b}' % (b"[" * 100_000, b"]" * 100_000),
        '{"input": "\\ud800"}'.encode("utf-16"),
    ],
)
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as refused:
        parse_body(body)
    assert (refused.value.status, refused.value.code) == (400, "invalid_json")


def test_deep_nesting_is_refused_and_not_a_fault() -> None:
    with pytest.raises(ApiError):
        parse_body(b'{"input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")


def test_lone_surrogates_are_accepted_in_one_field_only() -> None:
    body = b'{"model": "m", "input": ["a", "cut \\uD83d", "\\ud83d\\ude00"], "x": [1, 1e3, 123456789012345678901]}'
    data = parse_body(body, surrogates_in="input")
    assert data == {"model": "m", "input": ["a", "cut \ud83d", "😀"], "x": [1, 1000.0, 123456789012345678901.0]}
    assert list(map(type, data["x"])) == [int, float, float], "numbers are those of the faster parser"
    with pytest.raises(ApiError) as refused:
        parse_body(body)
    assert (refused.value.status, refused.value.param) == (400, "input")


@pytest.mark.parametrize(
    "field",
    [
        *(b'"model": "\\udc00"', b'"user": "\\ud800"', b'"task": "\\ud800"', b'"x": {"a": ["\\ud800"]}'),
        *(b'"x": {"\\ud800": 1}', b'"\\ud800": 1', b'"\\udfff\\ud800": "a"'),
    ],
)
def test_lone_surrogates_elsewhere_are_refused_and_the_error_can_be_sent(field: bytes) -> None:
    with pytest.raises(ApiError, match="surrogate") as refused:
        parse_body(b'{"input": "a", %b}' % field, surrogates_in="input")
    assert refused.value.status == 400
    assert json.loads(refused.value.to_body())["error"]["message"]


def test_a_body_with_surrogates_is_not_deeper_than_other_bodies() -> None:
    def parse(depth: int) -> None:
        parse_body(b'{"input": "\\ud800", "x": %b1%b}' % (b"[" * depth, b"]" * depth), surrogates_in="input")

    parse(500)
    with pytest.raises(ApiError):
        parse(MAX_DEPTH)


@pytest.mark.parametrize("number", ["18446744073709551616", "-9223372036854775809", "1e19", "1" * 300])
def test_forwarded_numbers_that_would_be_rounded_are_refused(number: str) -> None:
    for value in (number, f'{{"a": [{number}]}}'):
        for text in ("a", "\\ud800"):
            data = parse_body(f'{{"model": "m", "input": "{text}", "seed": {value}}}'.encode(), surrogates_in="input")
            with pytest.raises(ApiError, match="64 bits") as refused:
                read_request(data, ("seed",))
            assert (refused.value.status, refused.value.param) == (400, "seed")


def test_forwarded_numbers_of_64_bits_are_exact() -> None:
    for number in (2**64 - 1, -(2**63), 0.1, 1e18):
        for text in ("a", "\\ud800"):
            data = parse_body(f'{{"model": "m", "input": "{text}", "seed": {number}}}'.encode(), surrogates_in="input")
            assert read_request(data, ("seed",)).forwarded == {"seed": number}


def test_errors_show_no_text() -> None:
    for body in (b'{"input": "private text', b"private text"):
        with pytest.raises(ApiError) as refused:
            parse_body(body)
        assert "private" not in str(refused.value)
        assert b"private" not in refused.value.to_body()


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=10,
)


@given(
    st.dictionaries(
        st.sampled_from(["input", "model", "dimensions", "encoding_format", "user", "task", "x"]), json_values
    )
)
def test_any_object_is_a_request_or_an_error_in_openais_form(data: dict[str, Any]) -> None:
    parsed = parse_body(json.dumps(data).encode())
    error = None
    try:
        request = read_request({"model": "m", **parsed}, ())
    except ApiError as refused:
        error = refused
    if error is None:
        assert all(request.texts)
        return
    assert error.status == 400
    assert set(json.loads(error.to_body())["error"]) == {"message", "type", "param", "code"}
