"""``embedonce embed`` reads files: the texts in the output, the messages and the exit code."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

from readers import write


def read_output(folder: Path) -> list[str]:
    with (folder / "out.jsonl").open(encoding="utf-8", newline="\n") as file:
        return [json.loads(line)["text"] for line in file]


def test_a_tab_separated_file_with_stray_quotes(command: Any, folder: Path) -> None:
    write(folder, "a.tsv", 'id\ttext\n0\tzero\n1\t"To be or not to be\n2\tan ordinary row\n3\tthe end"\n')
    done = command("embed", "a.tsv", "--out", "out.jsonl", "--with-text")
    assert done.code == 1
    assert "a.tsv:3: " in done.err
    assert "--quote none" in done.err
    assert "To be" not in done.err
    assert read_output(folder) == ["zero"]
    assert command("embed", "a.tsv", "--out", "out.jsonl", "--with-text", "--quote", "none").code == 0
    assert read_output(folder) == ["zero", '"To be or not to be', "an ordinary row", 'the end"']


def test_a_folder_of_many_formats(command: Any, folder: Path) -> None:
    write(
        folder,
        "embedonce.toml",
        '[provider]\ntype = "ngram"\n[[tiers]]\ntype = "memory"\n[embed.fields]\n"*.csv" = "a"\n',
    )
    write(folder, "in/a.csv", 'id,a\r\n1,"two\r\nlines"\r\n')
    write(folder, "in/b.json", json.dumps([{"text": "array"}]))
    write(folder, "in/c.jsonl.gz", gzip.compress(b'{"text": "compressed"}\n'))
    write(folder, "in/d.txt", "wide".encode("utf-16"))
    write(folder, "in/e.html", "<b>bold</b>")
    write(folder, "in/node_modules/f.txt", "generated")
    write(folder, "in/g.log", "ignored")
    write(folder, "in/.gitignore", "*.log")
    write(folder, "secret.env", "secret")
    os.symlink("../secret.env", folder / "in/readme.md")
    done = command("embed", "in", "--out", "out.jsonl", "--with-text")
    assert done.code == 0
    assert read_output(folder) == ["two\r\nlines", "array", "compressed", "wide", "<b>bold</b>"]
    assert "HTML is read as text" in done.err


def test_a_wrong_option_is_named(command: Any, folder: Path) -> None:
    write(folder, "a.csv", "text\none\n")
    done = command("embed", "a.csv", "--out", "out.jsonl", "--delimiter", ";", "--quote", ";")
    assert (done.code, "must be different" in done.err) == (2, True)
    assert "not a text encoding" in command("embed", "a.csv", "--out", "out.jsonl", "--encoding", "rot13").err
