"""Tests for the reason in a message: what an API said, without texts and secrets."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedonce_providers._reasons import MAX_CHARACTERS, TEXT_RUN, describe_reason

TEXT = 'A private\ttext: "café" & more of it'


@pytest.mark.parametrize(
    "body",
    [
        "the batch is full",
        {"error": "the batch is full"},
        {"error": {"message": "the batch is full", "code": 7}},
        {"message": "the batch\n is full"},
        {"detail": [{"loc": ["input"], "msg": "the batch is full"}]},
        [{"error": {"message": "the batch is full"}}],
    ],
    ids=str,
)
def test_the_message_is_found_in_each_form_of_a_body(body: Any) -> None:
    assert describe_reason(body, texts=[TEXT]) == ": the batch is full"


@pytest.mark.parametrize(
    "body", [None, "", {}, {"code": 7}, {"error": None}, [], 7, {"error": {"message": " "}}], ids=str
)
def test_a_body_without_a_message_gives_no_reason(body: Any) -> None:
    assert describe_reason(body, texts=[TEXT]) == ""


@pytest.mark.parametrize(
    "quoted",
    [
        TEXT,
        TEXT.upper(),
        repr(TEXT),
        json.dumps(TEXT),
        json.dumps(TEXT, ensure_ascii=False),
        json.dumps(json.dumps(TEXT))[3:-3],
        TEXT.replace('"', "&quot;").replace("&", "&amp;"),
        TEXT[:20] + "...",
        "..." + TEXT[-17:],
        " ".join(TEXT.split()),
    ],
)
def test_no_text_is_in_a_reason(quoted: str) -> None:
    reason = describe_reason(f"cannot embed {quoted}, it is invalid", texts=["other", TEXT])
    assert reason.startswith(": cannot embed ")
    assert reason.endswith(", it is invalid")
    for piece in ("private", "caf", "more of it"):
        assert piece not in reason.lower()


def test_a_short_text_is_removed_as_a_word() -> None:
    assert describe_reason("'Bob' is no Bobby", texts=["Bob"]) == ": '…' is no Bobby"


@pytest.mark.parametrize(
    "secret",
    [
        "my-gateway-key-1",
        "Bearer abc.def",
        "sk-abc***xyz",
        "eyJhbGciOi.eyJzdWIi.c2ln",
        "AIzaSyA1234567890abcdef",
        "pa-0123456789",
    ],
)
def test_no_secret_is_in_a_reason(secret: str) -> None:
    reason = describe_reason(f"the key {secret} is wrong", texts=[], secrets=[None, "", "my-gateway-key-1"])
    assert reason == ": the key … is wrong"


def test_credentials_of_a_url_are_removed() -> None:
    reason = describe_reason("cannot reach http://me:pw@host/v1?key=abc&n=1 now", texts=[])
    assert reason == ": cannot reach http://…host/v1?…&n=1 now"


def test_many_texts_give_no_reason() -> None:
    assert describe_reason("the batch is full", texts=["word " * 100] * 500) == ": the batch is full"
    assert describe_reason("the batch is full", texts=["word " * 100] * 5000) == ""


def test_a_reason_is_short() -> None:
    reason = describe_reason("word " * 500, texts=[])
    assert len(reason) == MAX_CHARACTERS + 2
    assert reason.endswith("…")


@given(st.text(min_size=TEXT_RUN), st.text(max_size=20), st.text(max_size=20))
def test_no_run_of_a_text_is_in_a_reason(text: str, before: str, after: str) -> None:
    reason = describe_reason(before + text + after, texts=[text])
    plain = " ".join(text.split())
    assert not any(plain[place : place + TEXT_RUN] in reason for place in range(len(plain) - TEXT_RUN + 1))
