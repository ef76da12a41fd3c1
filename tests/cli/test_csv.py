"""CSV and TSV: each text is read exactly as it stands in the file, or its record is named."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from readers import read_items, read_reasons, read_texts, write

from embedonce.cli.embedding import csv_records, passages
from embedonce.cli.embedding.passages import Broken, Passage

# The characters that a reader of CSV can get wrong, and a few others.
TEXTS = st.text(st.sampled_from("ab \"'\r\n,;\t\0\ufeff\u00a0\u2028\x85\x1c\\éß😀"), max_size=12)
QUOTED = st.text(st.sampled_from("ab \"',;\t\r\n\ufeffé😀"), max_size=12)


def format_csv(rows: list[list[str]], **options: Any) -> str:
    out = io.StringIO(newline="")
    csv.writer(out, **options).writerows(rows)
    return out.getvalue()


@given(
    texts=st.lists(TEXTS, max_size=8),
    delimiter=st.sampled_from(",;|\t "),
    quote=st.sampled_from("\"'"),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "gb18030"]),
)
def test_what_csv_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], delimiter: str, quote: str, end: str, encoding: str
) -> None:
    rows = [["id", "text", "more"], *([str(number), text, ""] for number, text in enumerate(texts))]
    content = format_csv(rows, delimiter=delimiter, quotechar=quote, lineterminator=end, quoting=csv.QUOTE_ALL)
    path = write(tmp_path_factory.mktemp("csv"), "a.csv", content.encode(encoding))
    given_encoding = None if encoding in ("utf-8", "utf-16", "utf-32") else encoding
    items = read_items(path, delimiter=delimiter, quote=quote, encoding=given_encoding, keep=["id"])
    assert [(one.text, one.kept) for one in items if isinstance(one, Passage)] == [
        (text, (str(number),)) for number, text in enumerate(texts)
    ]
    assert len(items) == len(texts)


@given(texts=st.lists(QUOTED, max_size=8), end=st.sampled_from(["\n", "\r\n"]))
def test_what_csv_writes_with_few_quotes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], end: str
) -> None:
    # A lone carriage return in a file whose lines end with LF needs no quotes, so Python 3.11 writes none.
    content = format_csv([["id", "text", "n"], *(["x", text, "1"] for text in texts)], lineterminator=end)
    assert read_texts(write(tmp_path_factory.mktemp("csv"), "a.csv", content)) == texts


def test_a_text_keeps_its_line_ends_and_spaces(tmp_path: Path) -> None:
    for text in ("two\r\nlines", "two\rlines", "two\nlines", " spaces\t ", "NUL \0 inside", "\ufeffmark", "end\r\n"):
        path = write(tmp_path, "a.csv", f'id,text\r\n1,"{text}"\r\n2,next\r\n')
        assert read_texts(path) == [text, "next"]


def test_tsv_without_quotes_is_read_line_by_line(tmp_path: Path) -> None:
    path = write(tmp_path, "a.tsv", 'id\ttext\n1\t"To be or not to be\n2\tan ordinary row\n3\tthe end"\n')
    assert read_texts(path, quote="none") == ['"To be or not to be', "an ordinary row", 'the end"']


@pytest.mark.parametrize("name", ["a.tsv", "a.csv"])
def test_a_tab_separated_record_that_spans_lines_is_refused(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, name, 'id\ttext\n1\tfirst\n2\t"To be\n3\tthe end"\n4\t"quoted"\n')
    assert [str(one) if isinstance(one, Broken) else one.text for one in read_items(path, delimiter="\t")] == [
        "first",
        f"{path}:3: {csv_records.SPANS_LINES} (lines 3 to 4)",
        "quoted",
    ]
    assert "--quote none" in csv_records.SPANS_LINES
    assert read_texts(path, delimiter="\t", quote='"') == ["first", "To be\n3\tthe end", "quoted"]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_a_quote_that_is_never_closed_is_named_where_it_opens(tmp_path: Path, end: str) -> None:
    lines = ["id,text", "1,good", '"two', 'lines","never closed', "3,a", "4,b"]
    path = write(tmp_path, "a.csv", end.join(lines) + end)
    assert [str(one) if isinstance(one, Broken) else one.text for one in read_items(path)] == [
        "good",
        f"{path}:4: {csv_records.UNCLOSED}; lines 3 to 6 are not read",
    ]


def test_a_quote_that_is_never_closed_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passages, "MAX_PASSAGE", 1000)
    path = write(tmp_path, "a.csv", "id,text\n1,good\n" + '2,"open\n' + "3,swallowed\n" * 10_000 + '4,"closed"\n')
    items = read_items(path)
    assert [one.text for one in items if isinstance(one, Passage)] == ["good"]
    (broken,) = [one for one in items if isinstance(one, Broken)]
    assert (broken.line, broken.reason) == (3, csv_records.UNCLOSED)


@pytest.mark.parametrize("row", ["1,an unquoted, comma", "1,a\r2,b"])
def test_a_record_with_more_fields_than_the_header_is_refused(tmp_path: Path, row: str) -> None:
    path = write(tmp_path, "a.csv", f"id,text\n{row}\n2,good,,\n")
    assert read_reasons(path) == [(2, csv_records.TOO_MANY)]
    assert [one.text for one in read_items(path) if isinstance(one, Passage)] == ["good"]


def test_the_likely_delimiter_is_suggested(tmp_path: Path) -> None:
    (broken,) = read_items(write(tmp_path, "a.csv", "id;text\n1;one\n"))
    assert isinstance(broken, Broken)
    assert "use --delimiter ';'" in str(broken)
    assert broken.fields == ("id", "text")


def test_a_missing_column_names_the_columns_but_no_text(tmp_path: Path) -> None:
    secret = "a first record that is a text, because the file has no header, and that nobody may see"
    (broken,) = read_items(write(tmp_path, "a.csv", f'id,body,"{secret}"\n1,x,y\n'))
    assert isinstance(broken, Broken)
    assert broken.fields == ("id", "body")


def test_a_missing_column_to_keep_is_null(tmp_path: Path) -> None:
    path = write(tmp_path, "a.csv", "id,text\n1,one\n")
    assert [one.kept for one in read_items(path, keep=["none", "id"]) if isinstance(one, Passage)] == [(None, "1")]


@pytest.mark.parametrize(
    "options",
    [
        ["--delimiter", "ab"],
        ["--delimiter", '"'],
        ["--delimiter", "\n"],
        ["--quote", ""],
        ["--quote", "''"],
        ["--encoding", "base64"],
        ["--encoding", "utf-9"],
        ["--include", ""],
        ["--exclude", "["],
        ["--keep", ""],
        ["--field", ""],
        ["--delimiter", ";", "--quote", ";"],
    ],
)
def test_invalid_options_are_refused(command: Any, folder: Path, options: list[str]) -> None:
    write(folder, "a.csv", "id,text\n1,one\n")
    assert command("embed", "a.csv", "--out", "a.jsonl", *options).code == 2
    assert not (folder / "a.jsonl").exists()


def test_options_say_how_csv_is_read(command: Any, folder: Path) -> None:
    write(folder, "a.csv", "id;body\n1;'caf\xe9; noir'\n".encode("cp1252"))
    options = ["--delimiter", ";", "--quote", "'", "--encoding", "cp1252", "--field", "body"]
    assert command("embed", "a.csv", "--out", "a.jsonl", "--with-text", *options).code == 0
    assert '"text": "café; noir"' in (folder / "a.jsonl").read_text("utf-8")
