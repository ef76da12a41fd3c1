"""The body of a request for vectors: what is accepted, and what is refused before anything is sent."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedonce_server.api_errors import ApiError
from embedonce_server.request_body import MAX_INPUTS, parse_body, read_request


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
    "body", [b"", b"{", b"[]", b'"a"', b"null", b"\xff\xfe", b'{"input": "\\ud800"}', b'{"a": NaN}']
)
def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(ApiError) as refused:
        parse_body(body)
    assert (refused.value.status, refused.value.code) == (400, "invalid_json")


def test_deep_nesting_is_refused_and_not_a_fault() -> None:
    with pytest.raises(ApiError):
        parse_body(b'{"input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")


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
