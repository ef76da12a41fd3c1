"""Which files of a folder are read: patterns, .gitignore, links, and what is skipped."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from readers import read_reasons, read_texts, write

from embedonce.cli.embedding import selection
from embedonce.cli.embedding.passages import Broken, Passage
from embedonce.cli.embedding.sources import Reader


def make_tree(folder: Path, *names: str) -> None:
    """Write files whose text is their name."""
    for name in names:
        write(folder, name, name)


def read_with_skipped(*paths: Path, **options: Any) -> tuple[list[str], dict[str, int]]:
    reader = Reader([str(path) for path in paths], **options)
    items = list(reader)
    assert not [str(one) for one in items if isinstance(one, Broken)]
    return [one.text for one in items if isinstance(one, Passage)], reader.skipped


# --- patterns ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": ["*.md"]}, ["a.md", "drafts/d.md", "sub/b.md"]),
        ({"include": ["*.md", "sub/"]}, ["a.md", "drafts/d.md", "sub/b.md", "sub/c.py"]),
        ({"include": ["/*.md"]}, ["a.md"]),
        ({"include": ["sub/**"]}, ["sub/b.md", "sub/c.py"]),
        ({"exclude": ["drafts/"]}, ["a.md", "sub/b.md", "sub/c.py"]),
        ({"exclude": ["./drafts", "*.py"]}, ["a.md", "sub/b.md"]),
        ({"include": ["*.md"], "exclude": ["sub"]}, ["a.md", "drafts/d.md"]),
    ],
)
def test_patterns_choose_files(tmp_path: Path, options: dict[str, list[str]], expected: list[str]) -> None:
    make_tree(tmp_path, "a.md", "drafts/d.md", "sub/b.md", "sub/c.py")
    assert read_with_skipped(tmp_path, **options)[0] == expected


def test_patterns_concern_named_files_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_tree(tmp_path, "a.md", "b.py", "prod.env")
    paths = [Path("a.md"), Path("b.py"), Path("prod.env")]
    texts, skipped = read_with_skipped(*paths, include=["*.md", "*.env"], exclude=["*.env"])
    assert texts == ["a.md"]
    assert skipped == {selection.NOT_INCLUDED: 1, selection.EXCLUDED: 1}


# --- .gitignore -------------------------------------------------------------------------------


def test_gitignore_files_apply_at_every_level(tmp_path: Path) -> None:
    write(tmp_path, ".gitignore", "*.log\nbuild/\n/secret.txt\n[bad\n!\n")
    write(tmp_path, "sub/.gitignore", "!keep.log\n*.tmp\n")
    make_tree(tmp_path, "a.txt", "x.log", "build/b.txt", "secret.txt", "sub/keep.log", "sub/c.tmp", "sub/secret.txt")
    texts, skipped = read_with_skipped(tmp_path)
    assert texts == ["a.txt", "sub/keep.log", "sub/secret.txt"]
    assert skipped == {selection.IGNORED: 4}


def test_gitignore_files_above_the_folder_apply_up_to_the_root_of_the_repository(tmp_path: Path) -> None:
    write(tmp_path, ".gitignore", "*\n")
    (tmp_path / "repo/.git").mkdir(parents=True)
    write(tmp_path, "repo/.gitignore", "docs/secret.txt\nbuild/\n*.log\n")
    make_tree(tmp_path / "repo", "docs/a.txt", "docs/secret.txt", "docs/x.log", "build/b.txt")
    assert read_texts(tmp_path / "repo/docs") == ["docs/a.txt"]
    # A folder that is ignored itself is read when the user names it.
    assert read_texts(tmp_path / "repo/build") == ["build/b.txt"]
    assert read_texts(tmp_path / "repo/docs/secret.txt") == ["docs/secret.txt"]


def test_a_gitignore_that_is_no_file_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".gitignore")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub/.gitignore").symlink_to("/dev/zero")
    make_tree(tmp_path, "a.txt", "sub/b.txt")
    assert read_texts(tmp_path) == ["a.txt", "sub/b.txt"]


PATTERNS = [
    "*",
    "*.x",
    "!*.x",
    "a",
    "b/",
    "!b/",
    "/a",
    "a/b",
    "a/*",
    "!a/b",
    "**/b",
    "a/**",
    "!c.x",
    "c.?",
    "#c",
    "*/",
    "**/",
    "**/*",
    "a/**/",
    "!a/**/",
    "**/**",
    "/*",
    "/*/",
    "!/a/",
    "[a-c]",
    "!*/",
    "/**",
]


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
@given(
    rules=st.dictionaries(
        st.sampled_from(["", "a/", "a/b/"]), st.lists(st.sampled_from([*PATTERNS, "**/d "]), max_size=3), max_size=3
    )
)
def test_git_ignores_the_same_files(tmp_path_factory: pytest.TempPathFactory, rules: dict[str, list[str]]) -> None:
    folder = tmp_path_factory.mktemp("repo")
    names = ["a/b/c.x", "a/b/d", "a/c.x", "a/d", "b/c.x", "c.x", "d"]
    make_tree(folder, *names)
    for place, lines in rules.items():
        write(folder, f"{place}.gitignore", "\n".join(lines))
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    listed = ["git", "-c", "core.excludesFile=", "ls-files", "-co", "--exclude-standard"]
    done = subprocess.run(listed, cwd=folder, check=True, capture_output=True, text=True)
    expected = {name for name in done.stdout.split() if not name.endswith(".gitignore")}
    assert set(read_texts(folder)) == expected


def test_generated_folders_are_passed_over(tmp_path: Path) -> None:
    make_tree(tmp_path, "a.txt", "node_modules/x/b.txt", "sub/__pycache__/c.txt", ".venv/d.txt", ".env", "venv.txt")
    texts, skipped = read_with_skipped(tmp_path)
    assert texts == ["a.txt", "venv.txt"]
    assert skipped == {"node_modules": 1, "__pycache__": 1, ".venv": 1}
    assert read_texts(tmp_path / "node_modules") == ["node_modules/x/b.txt"]
    assert read_texts(tmp_path / ".env") == [".env"]


# --- links ------------------------------------------------------------------------------------


def test_links_that_lead_out_of_the_folder_are_passed_over(tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    make_tree(tmp_path, "secret.env", "outside/a.txt", "repo/a.txt", "repo-2/b.txt")
    (repo / "readme.md").symlink_to("../secret.env")
    (repo / "absolute.md").symlink_to(tmp_path / "secret.env")
    (repo / "chain.md").symlink_to("readme.md")
    (repo / "folder").symlink_to("../outside")
    (repo / "through.md").symlink_to("folder/a.txt")
    (repo / "sibling.md").symlink_to("../repo-2/b.txt")
    (repo / "around.md").symlink_to("../repo/a.txt")
    texts, skipped = read_with_skipped(repo)
    assert texts == ["repo/a.txt", "repo/a.txt"]
    assert skipped == {selection.LEADS_OUT: 6}
    # Who names a link asks for its target.
    assert read_texts(repo / "readme.md") == ["secret.env"]
    assert read_texts(repo / "folder") == ["outside/a.txt"]


def test_a_link_does_not_reveal_a_file_that_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, ".gitignore", "ignored.txt\nbuild/\n")
    make_tree(tmp_path, "a.txt", ".env", ".hidden/b.txt", "ignored.txt", "build/c.txt", "node_modules/d.txt", "x.skip")
    for number, target in enumerate(
        [".env", ".hidden/b.txt", "ignored.txt", "build/c.txt", "node_modules/d.txt", "x.skip"]
    ):
        (tmp_path / f"{number}.md").symlink_to(target)
    texts, skipped = read_with_skipped(tmp_path, exclude=["*.skip"])
    assert texts == ["a.txt"]
    assert skipped[selection.LEADS_TO_SKIPPED] == 6


def test_a_volume_of_kubernetes_is_read(tmp_path: Path) -> None:
    make_tree(tmp_path, "..2026_11_30/a.txt")
    (tmp_path / "..data").symlink_to("..2026_11_30")
    (tmp_path / "a.txt").symlink_to("..data/a.txt")
    assert read_texts(tmp_path) == ["..2026_11_30/a.txt"]


# --- what is skipped ---------------------------------------------------------------------------


def test_files_that_promise_text_are_counted_by_suffix(tmp_path: Path) -> None:
    write(tmp_path, "a.pdf", "%PDF-1.4 without a NUL")
    write(tmp_path, "b.PDF", "%PDF")
    write(tmp_path, "c.docx", b"PK\0")
    write(tmp_path, "d.txt", b"\0\1")
    write(tmp_path, "e.png", b"\x89PNG\0")
    write(tmp_path, "f.jsonl.xz", b"\xfd7zXZ")
    write(tmp_path, "g.tar.gz", b"\x1f\x8b")
    reader = Reader([str(tmp_path)])
    total = reader.compute_total_bytes()
    assert list(reader) == []
    assert reader.skipped == {".pdf": 2, ".docx": 1, ".txt": 1, ".xz": 1, ".tar": 1}
    assert (reader.files, reader.binary, reader.bytes_read) == (0, 2, total)
    assert read_reasons(tmp_path / "a.pdf") == [(None, "cannot read .pdf files; convert the file to text first")]


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.parquet", "a.gz"])
def test_a_named_pipe_does_not_hang(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    (tmp_path / "link").symlink_to(name)
    assert read_reasons(tmp_path / name, tmp_path / "link") == [(None, "not a regular file")] * 2


def test_a_device_is_not_read() -> None:
    assert read_reasons(Path("/dev/zero"), Path("/dev/null")) == [(None, "not a regular file")] * 2


@pytest.mark.skipif(not os.path.isdir("/dev/fd"), reason="this system has no /dev/fd")
def test_a_pipe_of_the_shell_is_read() -> None:
    reading, writing = os.pipe()
    try:
        os.write(writing, b"one\n\ntwo\n")
        os.close(writing)
        assert read_texts(Path(f"/dev/fd/{reading}")) == ["one", "two"]
    finally:
        os.close(reading)
