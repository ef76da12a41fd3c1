"""A good output is never replaced with nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optional import needs

CONFIG = '[provider]\ntype = "ngram"\ndimensions = 64\n\n[[tiers]]\ntype = "disk"\npath = "vectors.cache"\n'


@pytest.fixture
def docs(folder: Path) -> Path:
    (folder / "embedonce.toml").write_text(CONFIG)
    (folder / "docs").mkdir()
    return folder / "docs"


def list_files(folder: Path) -> dict[str, bytes]:
    """Return the content of the files in the folder, except those of the cache and of the inputs."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.suffix != ".toml"}


def make_nothing(docs: Path) -> list[str]:
    return ["docs"]


def make_pdfs(docs: Path) -> list[str]:
    (docs / "a.pdf").write_bytes(b"%PDF-1.7\0")
    (docs / "b.pdf").write_bytes(b"%PDF-1.7\0")
    return ["docs"]


def make_blanks(docs: Path) -> list[str]:
    (docs / "a.txt").write_text("\n \n\u00a0\n")
    return ["docs"]


def make_excluded(docs: Path) -> list[str]:
    (docs / "a.txt").write_text("a text")
    return ["docs", "--include", "*.md"]


def make_hidden(docs: Path) -> list[str]:
    (docs / ".a.txt").write_text("a text")
    return ["docs"]


NOTHING = [make_nothing, make_pdfs, make_blanks, make_excluded, make_hidden]


@pytest.mark.parametrize("suffix", ["npy", "jsonl", pytest.param("parquet", marks=needs("pyarrow"))])
@pytest.mark.parametrize("make", NOTHING)
def test_an_input_without_passages_keeps_the_earlier_output(command: Any, docs: Path, make: Any, suffix: str) -> None:
    out = f"out.{suffix}"
    assert command("embed", "-", "--out", out, input="good").code == 0
    before = list_files(docs.parent)
    done = command("embed", *make(docs), "--out", out, "--json")
    assert (done.code, done.json["rows"], done.json["out"]) == (1, 0, None)
    assert "stopped: there is no passage to embed" in done.err
    assert "--allow-empty" in done.err
    assert done.json["stopped"] in done.err
    assert list_files(docs.parent) == before


@pytest.mark.parametrize("make", NOTHING)
def test_an_output_without_rows_is_written_if_it_is_allowed(command: Any, docs: Path, make: Any) -> None:
    assert command("embed", "-", "--out", "out.npy", input="good").code == 0
    done = command("embed", *make(docs), "--out", "out.npy", "--allow-empty", "--json")
    assert (done.code, done.json["rows"], done.json["out"], done.json["stopped"]) == (0, 0, "out.npy", None)
    assert np.load("out.npy").shape == (0, 64)
    assert Path("out.index.jsonl").read_bytes() == b""


@pytest.mark.parametrize("content", ["", "\n\n \n", "\ufeff"])
def test_empty_standard_input(command: Any, docs: Path, content: str) -> None:
    assert command("embed", "-", "--out", "out.npy", input=content).code == 1
    assert not Path("out.npy").exists()
    assert command("embed", "-", "--out", "out.npy", "--allow-empty", input=content).code == 0
    assert np.load("out.npy").shape == (0, 64)


def test_what_was_passed_over_is_named(command: Any, docs: Path) -> None:
    make_pdfs(docs)
    (docs / "c.bin").write_bytes(b"\0")
    done = command("embed", "docs", "--out", "out.npy")
    assert "(no file was read; skipped: .pdf: 2, binary: 1)" in done.err
    (docs / "a.txt").write_text("a text")
    done = command("embed", "docs", "--out", "out.npy")
    assert done.code == 0
    assert "1 binary file skipped\nskipped: .pdf: 2\n" in done.out


@pytest.mark.parametrize("allow", [[], ["--allow-empty"]])
def test_an_output_is_kept_if_every_passage_failed(command: Any, docs: Path, allow: list[str]) -> None:
    assert command("embed", "-", "--out", "out.npy", input="good").code == 0
    before = list_files(docs.parent)
    (docs / "a.jsonl").write_text('{"body": "one"}\n{"body": "two"}\n')
    done = command("embed", "docs", "--out", "out.npy", *allow)
    assert done.code == 1
    assert "stopped: no passage could be embedded" in done.err
    assert list_files(docs.parent) == before


def test_a_link_to_an_earlier_output_keeps_its_target(command: Any, docs: Path) -> None:
    assert command("embed", "-", "--out", "real.npy", input="good").code == 0
    os.symlink("real.npy", "link.npy")
    before = list_files(docs.parent)
    assert command("embed", "docs", "--out", "link.npy").code == 1
    assert list_files(docs.parent) == before
    assert Path("link.npy").is_symlink()
