"""Output streams that are broken, full or closed, or whose encoding lacks characters."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from embedonce.cli.output import say, tolerate_broken_consoles

Process = Callable[..., "subprocess.Popen[str]"]

CONFIG = '[provider]\ntype = "ngram"\n\n[[tiers]]\ntype = "disk"\npath = "vectors.cache"\n'


@pytest.fixture
def names(folder: Path) -> Path:
    """A folder with a text and a broken file, whose names are not ASCII."""
    (folder / "embedonce.toml").write_text(CONFIG)
    (folder / "\u0416-é.txt").write_text("one text\n")
    (folder / "é.jsonl").write_text("{\n")
    return folder


@contextmanager
def open_broken(kind: str) -> Iterator[int]:
    """Yield a descriptor that cannot be written to."""
    if kind == "full":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        read, descriptor = os.pipe()
        os.close(read)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("encoding", ["ascii:strict", "cp1252:strict"])
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["embed", "\u0416-é.txt", "--out", "\u0416-é.npy"], 0),
        (["embed", "\u0416-é.txt", "é.jsonl", "--out", "é.npy", "--json"], 1),
        (["embed", "\u0416.txt", "--out", "é.npy"], 2),
        (["explain", "one \u0416"], 0),
        (["init", "\u0416.toml"], 0),
        (["config", "--config", "\u0416.toml"], 2),
        (["embed", "--help"], 0),
    ],
)
def test_an_encoding_that_lacks_characters_changes_nothing(
    names: Path, process: Process, arguments: list[str], code: int, encoding: str
) -> None:
    started = process(
        *arguments,
        env={**os.environ, "PYTHONIOENCODING": encoding, "COLUMNS": "120"},
        encoding=encoding[:6].rstrip(":"),
    )
    out, err = started.communicate(timeout=100)
    assert started.returncode == code, err
    assert "Traceback" not in err
    assert "UnicodeEncodeError" not in err
    if "--json" in arguments:
        assert json.loads(out)["out"] == "é.npy"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no names that are not Unicode")
def test_a_name_that_is_not_unicode_is_escaped(names: Path, process: Process) -> None:
    name = os.fsdecode(b"n\xe9.txt")
    Path(name).write_text("one text\n")
    started = process("embed", name, "--out", os.fsdecode(b"n\xe9.npy"))
    out, err = started.communicate(timeout=100)
    assert (started.returncode, err) == (0, "")
    assert "dimensions to n\\udce9.npy\n" in out


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("kind", ["full", "pipe"])
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["embed", "\u0416-é.txt", "é.jsonl", "--out", "out.npy"], 1),
        (["embed", "\u0416-é.txt", "--out", "out.npy", "--config", "none.toml"], 2),
        (["embed", "\u0416-é.txt", "--out", "out.npy"], 0),
        (["nonsense"], 2),
    ],
)
def test_a_broken_standard_error_loses_only_messages(
    names: Path, process: Process, arguments: list[str], code: int, kind: str
) -> None:
    with open_broken(kind) as broken:
        started = process(*arguments, stderr=broken)
        out, _ = started.communicate(timeout=100)
    assert started.returncode == code
    assert Path("out.npy").exists() == (code < 2)
    assert ("wrote 1 row" in out) == (code < 2)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [["config"], ["embed", "\u0416-é.txt", "--out", "out.npy", "--json"]])
def test_a_full_standard_output_is_named(names: Path, process: Process, arguments: list[str]) -> None:
    with open_broken("full") as broken:
        started = process(*arguments, stdout=broken)
        _, err = started.communicate(timeout=100)
    assert (started.returncode, err) == (1, "error: cannot write to standard output: No space left on device\n")


def test_a_stream_of_another_kind_is_tolerated(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ascii(io.StringIO):
        encoding = "ascii"  # type: ignore[assignment]

        def write(self, text: str) -> int:
            text.encode("ascii")
            return super().write(text)

    stream = Ascii()
    monkeypatch.setattr(sys, "stderr", stream)
    with tolerate_broken_consoles():
        say("tea \u0416")
        assert stream.getvalue() == "tea \\u0416\n"
        stream.close()
        say("a lost message")
        assert not sys.stderr.isatty()
    assert sys.stderr is stream
