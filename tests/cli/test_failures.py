"""Failures are counted by file and reason, and a message never quotes a text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import embedonce
from embedonce.cli.embedding import failures as counting
from embedonce.cli.embedding.failures import MAX_GROUPS, MAX_SHOWN, Failures
from embedonce.cli.embedding.passages import Broken, Passage

CONFIG = 'tiers = []\n\n[provider]\ntype = "ngram"\ndimensions = 64\n'


def describe(items: Sequence[Broken]) -> list[str]:
    failures = Failures()
    for item in items:
        failures.add_broken(item)
    return list(failures.describe())


def test_one_failure_has_its_line_and_its_detail() -> None:
    assert describe([Broken("a", 3, "not JSON", (), ": at character 1")]) == ["a:3: not JSON: at character 1"]
    assert describe([Broken("a", None, "dangling link")]) == ["a: dangling link"]


def test_failures_with_one_reason_are_one_line() -> None:
    items = [Broken("a", line, "not JSON", (), f": at character {line}") for line in range(2, 9)]
    assert describe(items) == ["a: not JSON: 7 times, lines 2, 3, 4, 5, 6, ..., 8"]
    assert describe(items[:3]) == ["a: not JSON: 3 times, lines 2, 3, 4"]


def test_files_and_reasons_are_told_apart_in_the_order_of_the_input() -> None:
    items = [Broken("b", 1, "x"), Broken("a", 1, "x"), Broken("b", 2, "y"), Broken("b", 3, "x")]
    assert describe(items) == ["b: x: 2 times, lines 1, 3", "a:1: x", "b:2: y"]


def test_the_fields_that_exist_are_named_with_a_suggestion() -> None:
    items = [Broken("a", 1, 'no field "txt"', ("id", "text")), Broken("a", 2, 'no field "txt"', ("id", "body"))]
    expected = 'a: no field "txt": 2 times, lines 1, 2; the fields are: id, text, body; did you mean "text"?'
    assert describe(items) == [expected]
    assert describe([Broken("a", 1, 'no field "answer"', ("id",))]) == ['a:1: no field "answer"; the fields are: id']


def test_the_lines_and_the_memory_are_bounded() -> None:
    failures = Failures()
    for number in range(3 * MAX_GROUPS):
        failures.add_broken(Broken(f"{number}.txt", None, "permission denied"))
    lines = list(failures.describe())
    assert len(lines) == MAX_SHOWN + 1
    assert lines[-1].startswith(f"... and {3 * MAX_GROUPS - MAX_SHOWN:,} more failures")
    assert (len(failures.groups), failures.ungrouped) == (MAX_GROUPS, 2 * MAX_GROUPS)


def test_errors_of_texts_are_counted_by_file_and_reason() -> None:
    failures = Failures()
    for line in range(1, 4):
        failures.add_failed(Passage("a text", "a", line), embedonce.TextRefused(f"{line * 1000} tokens are too many"))
    failures.add_failed(Passage("a text", "b", 1), None)
    assert list(failures.describe()) == [
        "a: TextRefused: 1000 tokens are too many: 3 times, lines 1, 2, 3",
        "b:1: the provider returned no vector",
    ]


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_wrong_field_is_one_message_however_long_the_file_is(command: Any, folder: Path, suffix: str) -> None:
    (folder / "embedonce.toml").write_text(CONFIG)
    lines = ["textt,id", *(f"text {n},{n}" for n in range(30_000))]
    if suffix == "jsonl":
        lines = [json.dumps({"textt": f"text {n}", "id": n}) for n in range(30_000)]
    (folder / f"a.{suffix}").write_text("\n".join(lines))
    (folder / "b.txt").write_text("good")
    done = command("embed", f"a.{suffix}", "b.txt", "--out", "out.npy", "--json")
    assert done.code == 1
    assert len(done.err.splitlines()) == 1
    assert 'did you mean "textt"?' in done.err
    assert "textt, id" in done.err
    (group,) = done.json["failures"]
    assert (group["file"], group["fields"], group["suggestion"]) == (f"a.{suffix}", ["textt", "id"], "textt")
    assert (group["count"], done.json["failed"]) == ((30_000, 30_000) if suffix == "jsonl" else (1, 1))
    assert group["lines"] == ([1, 2, 3, 4, 5] if suffix == "jsonl" else [1])
    strict = command("embed", f"a.{suffix}", "--out", "out.npy", "--json", "--strict")
    assert (strict.code, strict.json["failed"]) == (1, 1)
    assert f"a.{suffix}:1: " in strict.err


def test_many_files_give_few_messages(command: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counting, "MAX_SHOWN", 3)
    (folder / "embedonce.toml").write_text(CONFIG)
    (folder / "docs").mkdir()
    for number in range(10):
        (folder / f"docs/{number}.jsonl").write_text("no JSON\n\nno JSON\n")
    done = command("embed", "docs", "--out", "out.npy", "--json")
    assert done.code == 1
    lines = done.err.splitlines()
    assert lines[0] == "docs/0.jsonl: not JSON: 2 times, lines 1, 3"
    assert lines[3].startswith("... and 14 more failures")
    assert len(lines) == 5
    assert len(done.json["failures"]) == 10
