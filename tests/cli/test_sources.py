"""Reading passages in every format: invalid input costs one passage, not the file."""

from __future__ import annotations

import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optional import needs

from embedonce.cli.embedding import csv_records, texts
from embedonce.cli.embedding import passages as limits
from embedonce.cli.embedding.passages import Broken, Passage, decode_path, format_place
from embedonce.cli.embedding.sources import Reader

WORDS = st.text(st.characters(exclude_characters="\r\n\0", exclude_categories=["Cs"]), max_size=20)


def read_items(*paths: Path, **options: Any) -> list[Passage | Broken]:
    return list(Reader([str(path) for path in paths], **options))


def read_passages(*paths: Path, **options: Any) -> list[tuple[int, str]]:
    """Return the line and text of every passage; no item may be broken."""
    passages = read_items(*paths, **options)
    assert not [one for one in passages if isinstance(one, Broken)]
    return [(one.line, one.text) for one in passages if isinstance(one, Passage)]


def read_broken(*paths: Path, **options: Any) -> list[tuple[int | None, str]]:
    return [(one.line, one.reason + one.detail) for one in read_items(*paths, **options) if isinstance(one, Broken)]


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


# --- text -------------------------------------------------------------------------------------


@given(st.lists(st.text(alphabet="ab \n\n\n\r\t\x0b\x1c\u2003é\udc80", max_size=12), max_size=6), st.integers(1, 12))
def test_paragraphs_that_are_split_in_one_step_are_those_that_are_read_by_line(chunks: list[str], longest: int) -> None:
    part, passage = texts.LONGEST_PART, limits.MAX_PASSAGE
    try:
        for texts.LONGEST_PART in (part, longest):
            for limits.MAX_PASSAGE in (passage, longest * 4):
                by_line = texts._read_lines_of(iter(chunks), "a", 1, "utf-8")
                assert list(texts.read_text(chunks, "a", "utf-8", "paragraph")) == list(by_line)
    finally:
        texts.LONGEST_PART, limits.MAX_PASSAGE = part, passage


def test_paragraphs_before_an_error_are_read() -> None:
    def read() -> Iterator[str]:
        yield "one\n \ntwo\n\nthr"
        raise OSError("gone")

    items = texts.read_text(read(), "a", "utf-8", "paragraph")
    assert [next(items), next(items)] == [Passage("one", "a", 1), Passage("two", "a", 3)]
    with pytest.raises(OSError, match="gone"):
        next(items)


def test_blank_lines_separate_paragraphs(tmp_path: Path) -> None:
    path = write(tmp_path, "a.md", "# Title\n\n\nfirst\nsecond\n \t\nthird")
    assert read_passages(path) == [(1, "# Title"), (4, "first\nsecond"), (7, "third")]


def test_lines_keep_their_spaces_and_blank_lines_are_skipped(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "  one \n\n\ttwo\n \n")
    assert read_passages(path, split="line") == [(1, "  one "), (3, "\ttwo")]


def test_a_whole_file_is_one_unchanged_passage(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "\none\r\n\r\ntwo\n")
    assert read_passages(path, split="file") == [(1, "\none\r\n\r\ntwo\n")]


@pytest.mark.parametrize("split", ["line", "paragraph", "file"])
@pytest.mark.parametrize("content", ["", "\n", " \r\n\r\n", "\ufeff", "\ufeff\n"])
def test_blank_content_yields_no_passage(tmp_path: Path, split: str, content: str) -> None:
    assert read_items(write(tmp_path, "a.txt", content), split=split) == []


def test_line_ends_and_a_byte_order_mark_are_removed(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", b"\xef\xbb\xbfone\r\nmore\r\n\r\ntwo\r\n")
    assert read_passages(path) == [(1, "one\nmore"), (4, "two")]
    assert read_passages(path, split="line") == [(1, "one"), (2, "more"), (4, "two")]
    assert read_passages(path, split="file") == [(1, "one\r\nmore\r\n\r\ntwo\r\n")]


def test_invalid_utf8_costs_one_passage(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", b"good\n\nba\xe9d\n\nfine\n")
    assert read_items(path) == [
        Passage("good", str(path), 1),
        Broken(str(path), 3, "not UTF-8", detail=" at byte 3"),
        Passage("fine", str(path), 5),
    ]
    assert read_broken(path, split="file") == [(1, "not UTF-8 at byte 9")]


@pytest.mark.parametrize("split", ["line", "paragraph", "file"])
def test_a_passage_may_have_the_maximum_length(tmp_path: Path, split: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_PASSAGE", 1000)
    longest = "x" * 1000
    assert read_passages(write(tmp_path, "a.txt", longest), split=split) == [(1, longest)]
    path = write(tmp_path, "b.txt", "y" + longest + "\n\nafter")
    passages = read_items(path, split=split)
    assert isinstance(passages[0], Broken)
    assert passages[0].reason.startswith("longer than")
    if split != "file":
        assert passages[1:] == [Passage("after", str(path), 3)]


def test_a_paragraph_of_many_lines_is_bounded_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_PASSAGE", 1000)
    path = write(tmp_path, "a.txt", "x" * 99 + "\n" + ("y" * 99 + "\n") * 50 + "\nafter\n" + "z" * 2000 + "\nmore\n")
    assert read_items(path) == [
        Broken(str(path), 1, limits.TOO_LONG),
        Broken(str(path), 53, limits.TOO_LONG),
    ]


@given(st.lists(st.lists(WORDS.filter(str.strip), min_size=1, max_size=4), max_size=6), st.sampled_from(["\n", "\r\n"]))
def test_any_paragraphs_are_read_back(
    tmp_path_factory: pytest.TempPathFactory, paragraphs: list[list[str]], end: str
) -> None:
    # Every line starts with x, so that none is blank.
    paragraphs = [[f"x{line}" for line in lines] for lines in paragraphs]
    content = (end + end).join(end.join(lines) for lines in paragraphs)
    path = write(tmp_path_factory.mktemp("any"), "a.txt", content)
    assert [text for _, text in read_passages(path)] == ["\n".join(lines) for lines in paragraphs]


# --- JSON Lines -------------------------------------------------------------------------------


def test_json_lines_by_field(tmp_path: Path) -> None:
    rows: list[Any] = [{"text": "one"}, {"text": ""}, {"text": "a\u0000b"}, {"a.b": "dotted", "a": {"b": "inner"}}]
    path = write(tmp_path, "a.jsonl", "\n\n".join(map(json.dumps, rows[:3])) + "\n")
    assert read_passages(path) == [(1, "one"), (3, ""), (5, "a\0b")]
    inner = write(tmp_path, "b.ndjson", "\n".join([json.dumps(rows[3]), '{"a": {"b": "deep"}}']))
    assert read_passages(inner, field="a.b") == [(1, "dotted"), (2, "deep")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{", "not JSON: Expecting property name enclosed in double quotes at character 2"),
        (b'{"text": "secret', "not JSON: Unterminated string starting at at character 10"),
        (b"[1]", "not a JSON object"),
        (b"{}", 'no field "text"'),
        (b'{"text": null}', 'field "text" is null, not a string'),
        (b'{"text": 1}', 'field "text" is int, not a string'),
        (b'{"text": "\xff"}', "not UTF-8 at byte 11"),
        (b'{"text": "a\x00b"}', "not JSON: Invalid control character at at character 12"),
        (b'{"n": ' + b"1" * 5000 + b"}", "not readable as JSON: ValueError"),
        (b"[" * 200_000, "not readable as JSON: RecursionError"),
    ],
    ids=lambda value: str(value)[:24],
)
def test_an_invalid_json_line_costs_only_itself(tmp_path: Path, line: bytes, reason: str) -> None:
    path = write(tmp_path, "a.jsonl", b'{"text": "before"}\n' + line + b'\n{"text": "after"}\n')
    before, broken, after = read_items(path)
    assert (before, after) == (Passage("before", str(path), 1), Passage("after", str(path), 3))
    assert str(broken) == f"{path}:2: {reason}"


# --- CSV --------------------------------------------------------------------------------------


def test_csv_by_column_with_quotes_and_lines_inside(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", '\ufeffid,text\r\n1,"a, ""b"""\r\n2,"two\r\nlines"\r\n\r\n3,last')
    assert read_passages(path) == [(2, 'a, "b"'), (3, "two\r\nlines"), (6, "last")]
    assert [text for _, text in read_passages(path, field="id")] == ["1", "2", "3"]


def test_tab_separated(tmp_path: Path) -> None:
    assert read_passages(write(tmp_path, "a.tsv", "id\ttext\n1\ta, b\n")) == [(2, "a, b")]


def test_an_invalid_csv_record_costs_only_itself(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", b'id,text\n1\n2,"a"b\n3,\xff\n\xff,good\n4,"never closed\n')
    assert read_items(path) == [
        Broken(str(path), 2, 'no column "text" in this record'),
        Broken(str(path), 3, "not CSV: ',' expected after '\"'"),
        Broken(str(path), 4, 'column "text" is not UTF-8'),
        Passage("good", str(path), 5),
        Broken(str(path), 6, csv_records.UNCLOSED),
    ]


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ("id,body\n", 'no column "text" in the header; choose a column with --field'),
        ("text,text\n", 'more than one column "text" in the header; choose a column with --field'),
        ('"a"b\n', "not a CSV header: ',' expected after '\"'"),
    ],
)
def test_a_csv_without_the_column_is_reported_once(tmp_path: Path, header: str, reason: str) -> None:
    assert read_broken(write(tmp_path, "a.csv", header + "1,2\n" * 3)) == [(1, reason)]


def test_csv_goes_on_after_a_line_that_is_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_PASSAGE", 100)
    path = write(tmp_path, "a.csv", "text\n" + "x" * 300 + "\nafter\n")
    assert read_items(path) == [Broken(str(path), 2, f"not CSV: {limits.TOO_LONG}"), Passage("after", str(path), 3)]


# --- Parquet ----------------------------------------------------------------------------------


@needs("pyarrow")
@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
def test_parquet_by_column(tmp_path: Path, kind: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    type_of_column = pa.dictionary(pa.int32(), pa.string()) if kind == "dictionary" else getattr(pa, kind)()
    path = tmp_path / "a.parquet"
    values = ["one", None, "two"] * 1000
    pq.write_table(pa.table({"text": pa.array(values, type_of_column), "n": list(range(3000))}), path)
    passages = read_items(path)
    assert [one.text for one in passages if isinstance(one, Passage)] == ["one", "two"] * 1000
    assert passages[1] == Broken(str(path), 2, 'field "text" is null, not a string')
    assert passages[-1] == Passage("two", str(path), 3000)


@needs("pyarrow")
def test_an_invalid_parquet_file_or_a_missing_column_is_reported(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    good = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [1]}), good)
    assert read_broken(good) == [(None, 'no column "text"; choose a column with --field')]
    assert read_broken(write(tmp_path, "b.parquet", b"PAR1 or not")) == [
        (None, "not readable as Parquet: ArrowInvalid")
    ]


# --- files and folders ------------------------------------------------------------------------


def test_folders_are_read_by_name_at_every_level(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/1.txt", "b.txt", "a/z/y.md", "c.rst", ".hidden", "b/.git/config"):
        write(tmp_path, name, name)
    assert [text for _, text in read_passages(tmp_path)] == ["a/z/y.md", "b/1.txt", "b/2.txt", "b.txt", "c.rst"]
    assert [text for _, text in read_passages(tmp_path / "c.rst", tmp_path / "b", tmp_path / "c.rst")] == [
        "c.rst",
        "b/1.txt",
        "b/2.txt",
        "c.rst",
    ]


def test_each_file_of_a_folder_is_read_by_its_suffix(tmp_path: Path) -> None:
    write(tmp_path, "a.jsonl", '{"text": "json"}\n')
    write(tmp_path, "b.csv", "text\ncsv\n")
    write(tmp_path, "c", "plain")
    assert [text for _, text in read_passages(tmp_path)] == ["json", "csv", "plain"]
    assert [text for _, text in read_passages(tmp_path / "a.jsonl", format="text")] == ['{"text": "json"}']


def test_binary_files_in_folders_are_counted_and_others_are_reported(tmp_path: Path) -> None:
    write(tmp_path, "a.bin", b"\x7fELF\0\0")
    write(tmp_path, "b.txt", b"late NUL: " + b"x" * 10_000 + b"\0")
    reader = Reader([str(tmp_path)], split="line")
    passages = list(reader)
    assert [type(one) for one in passages] == [Passage]
    assert (reader.files, reader.binary) == (1, 1)
    assert read_broken(tmp_path / "a.bin") == [(None, "binary file; use --format text to read it anyway")]
    assert read_passages(tmp_path / "a.bin", format="text") == [(1, "\x7fELF\0\0")]


def test_excluded_files_are_not_read(tmp_path: Path) -> None:
    write(tmp_path, "in.txt", "in")
    out = write(tmp_path, "out.jsonl", '{"text": "old output"}')
    (tmp_path / "link.jsonl").symlink_to(out)
    assert read_passages(tmp_path, leave_out=[str(out)]) == [(1, "in")]


def test_circular_links_do_not_loop(tmp_path: Path) -> None:
    write(tmp_path, "a/file.txt", "one")
    (tmp_path / "a/up").symlink_to(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "linked.txt").symlink_to("a/file.txt")
    passages = [one for one in read_items(tmp_path) if isinstance(one, Passage)]
    assert [one.text for one in passages] == ["one", "one"]
    assert read_broken(tmp_path) == [(None, "dangling link"), (None, "dangling link")]
    assert [text for _, text in read_passages(tmp_path / "a/up/a/up/a")] == ["one"]


def test_very_deep_folders(tmp_path: Path) -> None:
    folders = [tmp_path / "d"]
    while len(folders) < 1200:  # deeper than Python's recursion limit, which makedirs and rmtree cannot handle
        folders.append(folders[-1] / "d")
    for folder in folders:
        folder.mkdir()
    path = write(folders[-1], "a.txt", "deep")
    assert [text for _, text in read_passages(tmp_path)] == ["deep"]
    path.unlink()
    for folder in reversed(folders):
        folder.rmdir()


def test_sockets_and_pipes_in_folders_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
        assert read_broken(Path(".")) == [(None, "not a regular file"), (None, "not a regular file")]


def test_a_line_of_no_break_spaces_is_blank(tmp_path: Path) -> None:
    path = write(tmp_path, "a.txt", "one\n\u00a0\n \u3000 \n\u00a0two\n")
    assert read_passages(path, split="line") == [(1, "one"), (4, "\u00a0two")]


def test_an_unreadable_file_is_reported(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "a")
    assert read_broken(tmp_path / "gone.txt", tmp_path / "a.txt") == [(None, "No such file or directory")]
    loop = tmp_path / "loop"
    loop.symlink_to("loop")
    assert read_broken(loop) == [(None, os.strerror(40))]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_reported(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "a").chmod(0)
    write(tmp_path, "b/c.txt", "c")
    (tmp_path / "b").chmod(0)
    try:
        assert read_broken(tmp_path) == [(None, "Permission denied"), (None, "Permission denied")]
    finally:
        (tmp_path / "b").chmod(0o700)


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_a_file_name_that_is_not_utf8_is_escaped(tmp_path: Path) -> None:
    raw = os.path.join(os.fsencode(tmp_path), b"caf\xe9\n.txt")
    with open(raw, "wb") as file:
        file.write(b"text")
    (one,) = read_items(tmp_path)
    assert isinstance(one, Passage)
    assert one.source.endswith("/caf\\xe9\n.txt")
    assert format_place(one.source, 3).endswith("/caf\\xe9\\n.txt:3")
    assert decode_path("café") == "café"


@needs("pyarrow")
def test_bytes_read_reach_the_total(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    write(tmp_path, "a.txt", "one\n\ntwo\n" * 1000)
    write(tmp_path, "b.jsonl", '{"text": "x"}\n' * 100)
    write(tmp_path, "c.csv", "text\nx\n")
    write(tmp_path, "d.bin", b"\0" * 5000)
    pq.write_table(pa.table({"text": ["x"] * 100}), tmp_path / "e.parquet")
    reader = Reader([str(tmp_path)])
    total = reader.compute_total_bytes()
    assert reader.bytes_read == 0
    list(reader)
    assert reader.bytes_read == total


def test_the_total_of_a_pipe_is_unknown(tmp_path: Path) -> None:
    assert Reader(["-"]).compute_total_bytes() is None
    os.mkfifo(tmp_path / "pipe")
    assert Reader([str(tmp_path / "pipe")]).compute_total_bytes() is None
