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
from typing import ClassVar

import pytest

from embedonce.cli.output import say, tolerate_broken_consoles

pytestmark = pytest.mark.slow  # each test starts a process of its own

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


@pytest.mark.skipif(sys.platform == "win32", reason="on Windows, arguments are Unicode, not bytes")
class TestArgumentsThatAreTexts:
    ASCII: ClassVar = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    """Settings with which Python decodes arguments as ASCII."""

    @pytest.fixture
    def run(self, names: Path, process: Process) -> Callable[..., tuple[int, str, str]]:
        def run(*arguments: str, **env: str) -> tuple[int, str, str]:
            started = process(*arguments, env={**os.environ, "COLUMNS": "120", **env})
            out, err = started.communicate(timeout=100)
            assert "Traceback" not in err
            return started.returncode, out, err

        return run

    def test_a_text_has_the_same_key_in_every_locale(self, run: Callable[..., tuple[int, str, str]]) -> None:
        keys = [json.loads(run("explain", "é", "--json", **env)[1])["key"] for env in ({}, self.ASCII)]
        assert keys[0] == keys[1]

    def test_a_text_can_be_forgotten_in_every_locale(self, run: Callable[..., tuple[int, str, str]]) -> None:
        Path("one.txt").write_text("é", "utf-8")
        assert run("embed", "one.txt", "--out", "one.npy")[0] == 0
        assert json.loads(run("explain", "é", "--json")[1])["found"] == "disk"
        assert run("forget", "é", **self.ASCII)[0] == 0
        assert json.loads(run("explain", "é", "--json")[1])["found"] is None

    @pytest.mark.parametrize("env", [{}, ASCII])
    @pytest.mark.parametrize(
        "before",
        [
            ["explain"],
            ["forget"],
            ["forget", "--file", "one.jsonl", "--field"],
            ["explain", "a text", "--task"],
            ["embed", "é.jsonl", "--out", "one.npy", "--task"],
            ["embed", "é.jsonl", "--out", "one.npy", "--field"],
            ["embed", "é.jsonl", "--out", "one.npy", "--keep"],
            ["embed", "é.jsonl", "--out", "one.npy", "--delimiter"],
            ["embed", "é.jsonl", "--out", "one.npy", "--quote"],
            ["purge", "--yes", "--model"],
            ["purge", "--yes", "--version"],
            ["purge", "--yes", "--namespace"],
            ["purge", "--yes", "--scope"],
        ],
    )
    def test_bytes_that_are_not_utf_8_are_refused(
        self,
        run: Callable[..., tuple[int, str, str]],
        before: list[str],
        env: dict[str, str],
    ) -> None:
        code, out, err = run(*before, os.fsdecode(b"caf\xe9"), **env)
        assert (code, out) == (2, "")
        assert "must be UTF-8" in err
        assert "caf" not in err
