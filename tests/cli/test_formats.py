"""JSON, Parquet, plain text, encodings and compression: the exact texts, or a named failure."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optional import needs
from readers import read_items, read_reasons, read_texts, write

from embedonce.cli.embedding import json_records, passages, streams
from embedonce.cli.embedding.passages import TOO_LONG, Broken, Passage
from embedonce.cli.embedding.sources import Reader

TEXTS = st.text(st.sampled_from("ab \"'\r\n{}[],:\\\0\ufeff\u2028\x85é😀"), max_size=12)
RECORDS = [{"id": 1, "text": "one"}, {"id": 2, "text": "two\nlines", "meta": {"a": [1]}}, {"text": ""}]


def compress(content: bytes, suffix: str) -> bytes:
    if suffix == ".gz":
        return gzip.compress(content)
    if suffix == ".zst":
        import zstandard

        return zstandard.compress(content)
    return content


# --- JSON -------------------------------------------------------------------------------------


@given(
    texts=st.lists(TEXTS, max_size=6),
    indent=st.sampled_from([None, 2]),
    is_ascii=st.booleans(),
    encoding=st.sampled_from(["utf-8", "utf-16", "utf-32"]),
    form=st.sampled_from(["array", "objects", "lines"]),
)
def test_what_json_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory,
    texts: list[str],
    indent: int | None,
    is_ascii: bool,
    encoding: str,
    form: str,
) -> None:
    records = [{"n": {"x": number}, "text": text} for number, text in enumerate(texts)]
    if form == "array":
        content = json.dumps(records, indent=indent, ensure_ascii=is_ascii)
    else:
        step = None if form == "lines" else indent
        content = "\n".join(json.dumps(record, indent=step, ensure_ascii=is_ascii) for record in records)
    path = write(tmp_path_factory.mktemp("json"), "a.json", content.encode(encoding))
    items = read_items(path, keep=["n.x"])
    assert [(one.text, one.kept) for one in items if isinstance(one, Passage)] == [
        (text, (number,)) for number, text in enumerate(texts)
    ]
    assert len(items) == len(texts)


def test_json_lines_in_a_json_file_are_recognised(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", '\n{"text": "one"}\n{"text": \n{"text": "three"}\n')
    assert read_texts(write(tmp_path, "b.json", "".join(f'{{"text": "{n}"}}\n' for n in range(1000)))) == [
        str(n) for n in range(1000)
    ]
    assert read_reasons(path) == [(3, "not JSON: Expecting value at character 10")]
    assert [one.line for one in read_items(path)] == [2, 3, 4]


@pytest.mark.parametrize("content", [json.dumps(RECORDS), json.dumps(RECORDS, indent=2), json.dumps(RECORDS, indent=0)])
def test_an_array_of_objects_is_read(tmp_path: Path, content: str) -> None:
    items = read_items(write(tmp_path, "a.json", content), keep=["id", "meta"])
    assert [(one.text, one.kept) for one in items if isinstance(one, Passage)] == [
        ("one", (1, None)),
        ("two\nlines", (2, {"a": [1]})),
        ("", (None, None)),
    ]


def test_the_line_of_an_object_in_an_array_is_known(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", '[\n {"text": "one"},\n\n {"text": 1},\n 5, {"text":\n"six"}]\n')
    assert [one.line for one in read_items(path)] == [2, 4, 5, 5]
    assert read_reasons(path) == [(4, 'field "text" is int, not a string'), (5, json_records.NOT_AN_OBJECT)]


@pytest.mark.parametrize(
    ("content", "line", "reason"),
    [
        ('[{"text": "one"},\n{"text": ', 2, "not JSON"),
        ('[{"text": "one"}\n', 2, json_records.NOT_CLOSED),
        ('[{"text": "one"}\n{"text": "two"}]', 2, "not JSON: a comma is missing in the array"),
        ('[{"text": "one"},\n]', 2, "not JSON"),
        ('[{"text": "one"}]\nmore', 2, "not JSON: more text follows the array"),
        ("\n{\n1}", 2, "not JSON"),
        ("plain", 1, "not JSON"),
    ],
)
def test_an_invalid_json_file_is_named(tmp_path: Path, content: str, line: int, reason: str) -> None:
    ((found, message),) = read_reasons(write(tmp_path, "a.json", content))
    assert found == line
    assert message.startswith(reason)


def test_one_object_without_the_field_is_named_with_its_fields(tmp_path: Path) -> None:
    (broken,) = read_items(write(tmp_path, "package.json", '{\n  "name": "x",\n  "version": "1"\n}\n'))
    assert broken == Broken(str(tmp_path / "package.json"), 1, 'no field "text"', ("name", "version"))


@pytest.mark.parametrize(
    "content", [json.dumps(RECORDS), json.dumps(RECORDS, indent=2), json.dumps(RECORDS[0], indent=2)]
)
def test_json_in_another_form_than_lines_is_named_once(tmp_path: Path, content: str) -> None:
    path = write(tmp_path, "a.jsonl", content)
    assert read_reasons(path) == [(1, json_records.SPANS_LINES)]
    assert "--format json" in json_records.SPANS_LINES
    assert read_texts(path, format="json")[0] == "one"


def test_a_first_line_that_is_no_object_costs_only_itself(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", '["x"]\n{"text": "after"}\n')
    assert read_items(path) == [
        Broken(str(path), 1, json_records.NOT_AN_OBJECT),
        Passage("after", str(path), 2),
    ]


def test_an_object_that_is_too_long_ends_the_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passages, "MAX_PASSAGE", 1000)
    monkeypatch.setattr(json_records, "STEP", 100)
    long = json.dumps([{"text": "one"}, {"text": "x" * 70_000}, {"text": "after"}])
    assert read_reasons(write(tmp_path, "a.json", long)) == [(1, TOO_LONG)]


@pytest.mark.parametrize("size", range(1, 9))
def test_the_size_of_chunks_makes_no_difference(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "CHUNK", size)
    monkeypatch.setattr(json_records, "STEP", 1)
    texts = ["one", "é😀", "a\r\nb"]
    objects = [{"text": text} for text in texts]
    csv_text = "text\r\n" + "".join(f'"{text}"\r\n' for text in texts)
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        for name, content in [
            ("a.json", json.dumps(objects, ensure_ascii=False)),
            ("b.json", "\n".join(json.dumps(one, indent=1) for one in objects)),
            ("c.jsonl", "\n".join(map(json.dumps, objects))),
            ("d.csv", csv_text),
            ("e.csv", csv_text.replace('"\r\n', '"\n').replace("text\r\n", "text\n")),
            ("f.csv", csv_text.replace('"\r\n', '"\r').replace("text\r\n", "text\r")),
        ]:
            assert read_texts(write(tmp_path, name, content.encode(encoding))) == texts
        path = write(tmp_path, "a.txt", "one\r\né😀\r\n\r\nb".encode(encoding))
        assert read_texts(path) == ["one\né😀", "b"]


# --- encodings --------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-le", "utf-16-be", "cp1252", "latin-1", "cp037"])
@pytest.mark.parametrize("split", ["line", "paragraph", "file"])
def test_text_in_other_encodings(tmp_path: Path, encoding: str, split: str) -> None:
    content = "café\r\nmore\r\n\r\nend"
    path = write(tmp_path, "a.txt", content.encode(encoding))
    expected = {"line": ["café", "more", "end"], "paragraph": ["café\nmore", "end"], "file": [content]}
    is_detected = encoding in ("utf-16", "utf-32")
    assert read_texts(path, split=split, encoding=None if is_detected else encoding) == expected[split]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_only_one_byte_order_mark_is_removed(tmp_path: Path, encoding: str) -> None:
    mark = "" if encoding in ("utf-8-sig", "utf-16", "utf-32") else "\ufeff"
    path = write(tmp_path, "a.txt", f"{mark}\ufeffone".encode(encoding))
    assert read_texts(path, encoding=encoding) == ["\ufeffone"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16-le", "shift_jis", "gb18030", "ascii"])
def test_invalid_bytes_cost_one_passage_in_any_encoding(tmp_path: Path, encoding: str) -> None:
    invalid = b"\x00\xdc" if encoding == "utf-16-le" else b"\xff"
    content = "good\n".encode(encoding) + invalid + "bad\nfine\n".encode(encoding)
    items = read_items(write(tmp_path, "a.txt", content), split="line", encoding=encoding)
    assert [one.text if isinstance(one, Passage) else one.line for one in items] == ["good", 2, "fine"]


@pytest.mark.parametrize("bad", [b"\xed\xa0\x80", b"\xed\xb2\x80", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82"])
def test_bytes_that_are_not_utf8_never_become_a_text(tmp_path: Path, bad: bytes) -> None:
    for name, content in [
        ("a.txt", bad),
        ("a.csv", b"text\n" + bad + b"\n"),
        ("a.csv", b'text\n"' + bad + b'"\n'),
        ("a.jsonl", b'{"text": "' + bad + b'"}'),
        ("a.json", b'[{"text": "' + bad + b'"}]'),
    ]:
        path = write(tmp_path, name, content)
        assert [type(one) for one in read_items(path)] == [Broken]
        assert "not UTF-8" in str(read_items(path)[0])


# --- compression ------------------------------------------------------------------------------


@needs("zstandard")
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": "two"}\n'),
        ("a.json", b'[{"text": "one"}, {"text": "two"}]'),
        ("a.csv", b"text\none\ntwo\n"),
        ("a.tsv", b"id\ttext\n1\tone\n2\ttwo\n"),
        ("a.txt", b"one\n\ntwo\n"),
        ("a", "one\n\ntwo\n".encode("utf-16")),
    ],
)
def test_compressed_files_of_every_format(tmp_path: Path, suffix: str, name: str, content: bytes) -> None:
    path = write(tmp_path, name + suffix, compress(content, suffix))
    reader = Reader([str(path)])
    assert [str(one) if isinstance(one, Broken) else one.text for one in reader] == ["one", "two"]
    assert reader.bytes_read == reader.compute_total_bytes() == path.stat().st_size
    disguised = write(tmp_path, name, compress(content, suffix))
    assert read_texts(disguised) == ["one", "two"]
    assert read_texts(tmp_path, include=[name + "*"]) == ["one", "two"] * 2


@needs("zstandard")
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_files_of_several_parts(tmp_path: Path, suffix: str) -> None:
    parts = compress(b"one\nt", suffix) + compress(b"", suffix) + compress(b"wo\n", suffix)
    assert read_texts(write(tmp_path, "a.txt" + suffix, parts), split="line") == ["one", "two"]


@needs("zstandard")
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_truncated_file_yields_no_part_of_a_text(tmp_path: Path, suffix: str) -> None:
    lines = [f"line {number} {number**9}" for number in range(50_000)]
    whole = compress("\n".join(lines).encode(), suffix)
    for size in (0, 2, 5, 100, len(whole) // 2, len(whole) - 9, len(whole) - 1):
        path = write(tmp_path, "a.txt" + suffix, whole[:size])
        *items, broken = read_items(path, split="line")
        assert [one.text for one in items if isinstance(one, Passage)] == lines[: len(items)]
        assert isinstance(broken, Broken)
        assert str(broken).startswith(f"{path}: truncated ")


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.jsonl.gz", b'{"text": "one"}\n{"text": "two"}\n', ["one", "two"]),
        ("a.json.gz", b'[{"text": "one"},\n{"text": "two"}]', ["one", "two"]),
        ("a.csv.gz", b"text\none\ntwo\n", ["one", "two"]),
        ("a.txt.gz", b"one\n\ntwo\n\nthree", ["one", "two"]),
    ],
)
def test_a_small_file_is_read_up_to_the_damage(tmp_path: Path, name: str, content: bytes, texts: list[str]) -> None:
    whole = compress(content, ".gz")
    for damaged in (whole[:-8], whole + b"more"):
        *items, broken = read_items(write(tmp_path, name, damaged))
        assert [item.text for item in items if isinstance(item, Passage)] == texts
        assert isinstance(broken, Broken)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl", "a.json"])
def test_a_missing_byte_order_mark_fails_one_file(tmp_path: Path, name: str, encoding: str) -> None:
    write(tmp_path, name, '{"text": "one"}\n'.encode(encoding + "-le"))
    [item] = read_items(str(tmp_path), encoding=encoding)
    assert str(item) == (
        f"{tmp_path / name}: not {encoding}: the byte order mark is missing; "
        f"use --encoding {encoding}-le or {encoding}-be"
    )


@needs("zstandard")
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_damaged_file_is_named(tmp_path: Path, suffix: str) -> None:
    whole = compress(b"one\n" * 10_000, suffix)
    for content in (whole[:20] + b"\xff" * 20 + whole[40:], whole + b"garbage", b"not compressed"):
        path = write(tmp_path, "a.txt" + suffix, content)
        broken = read_items(path, split="line")[-1]
        assert isinstance(broken, Broken)
        assert str(broken).startswith(f"{path}: damaged ")


@needs("zstandard")
@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_that_expands_to_one_huge_line_is_bounded(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passages, "MAX_PASSAGE", 2**20)
    path = write(tmp_path, "a.txt" + suffix, compress(b"x" * 2**26 + b"\nafter\n", suffix))
    assert read_items(path, split="line") == [Broken(str(path), 1, TOO_LONG), Passage("after", str(path), 2)]


# --- Parquet ----------------------------------------------------------------------------------


@needs("pyarrow")
@pytest.mark.parametrize(
    "kind", ["string", "large_string", "string_view", "binary", "large_binary", "dictionary", "dictionary of binary"]
)
def test_parquet_columns_of_strings_and_bytes(tmp_path: Path, kind: str) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = {"dictionary": pa.string(), "dictionary of binary": pa.binary()}
    texts = ["one", "é😀\r\n", ""]
    values: list[Any] = [text.encode() if "binary" in kind else text for text in texts]
    array = pa.array(values, types[kind] if kind in types else getattr(pa, kind)())
    array = array.dictionary_encode() if kind in types else array
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"a.b": array, "meta": pa.array([{"title": text} for text in texts])}), path)
    assert read_texts(path, field="a.b") == texts
    assert read_texts(path, field="meta.title") == texts


@needs("pyarrow")
def test_one_invalid_value_of_parquet_costs_one_row(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": pa.array([b"one", b"\xff", None, b"four"], pa.binary())}), path)
    assert [one.text for one in read_items(path) if isinstance(one, Passage)] == ["one", "four"]
    assert read_reasons(path) == [(2, 'column "text" is not UTF-8'), (3, 'field "text" is null, not a string')]


@needs("pyarrow")
def test_parquet_structs_with_nulls_and_values_to_keep(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"deep": {"text": "one"}}, None, {"deep": None}, {"deep": {"text": "four"}}]
    when = pa.array([1, 2, 3, 4], pa.timestamp("ns"))
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"meta": rows, "id": [1, 2, 3, 4], "when": when, "tags": [["x"]] * 4}), path)
    items = read_items(path, field="meta.deep.text", keep=["id", "when", "tags", "none"])
    found = [(one.text, one.kept) for one in items if isinstance(one, Passage)]
    assert [text for text, _ in found] == ["one", "four"]
    assert [kept[0] for _, kept in found] == [1, 4]
    assert json.loads(json.dumps(found[0][1])) == [1, "1970-01-01 00:00:00.000000001", ["x"], None]
    (broken,) = read_items(path, field="meta.none")
    assert isinstance(broken, Broken)
    assert broken.fields == ("meta", "id", "when", "tags")


# --- fields of the configuration --------------------------------------------------------------


def test_fields_by_patterns_of_names(tmp_path: Path) -> None:
    write(tmp_path, "a.csv", "answer,text\nA,x\n")
    write(tmp_path, "b.csv.gz", gzip.compress(b"answer,text\nB,x\n"))
    write(tmp_path, "c.jsonl", '{"content": "C", "text": "x"}')
    write(tmp_path, "d/e.jsonl", '{"body": "D", "text": "x"}')
    write(tmp_path, "z.json", '[{"text": "Z"}]')
    fields = {"*.csv": "answer", "d/*.jsonl": "body", "*.jsonl": "content"}
    assert read_texts(tmp_path, fields=fields) == ["A", "B", "C", "D", "Z"]
    assert read_texts(tmp_path / "a.csv", fields=fields, field="text") == ["x"]


def test_plain_text_has_no_fields_to_keep(tmp_path: Path) -> None:
    write(tmp_path, "a.txt", "one")
    write(tmp_path, "b.jsonl", '{"text": "two", "id": 7}')
    reader = Reader([str(tmp_path)], keep=["id", "idd"])
    assert [one.kept for one in reader if isinstance(one, Passage)] == [(None, None), (7, None)]
    assert reader.notes == ['note: no record has the field "idd" that keep names']


def test_html_is_text_and_a_note_says_so(tmp_path: Path) -> None:
    reader = Reader([str(write(tmp_path, "a.html", "<p>one</p>"))])
    assert [one.text for one in reader if isinstance(one, Passage)] == ["<p>one</p>"]
    assert reader.notes == ["note: HTML is read as text, so its tags are part of the passages"]
