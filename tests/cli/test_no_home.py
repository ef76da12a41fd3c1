"""Commands without a cache folder: memory alone is used, and this is said once."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows finds the user's folders without HOME")


@pytest.fixture(params=["unknown", "a file", "read-only"])
def reason(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Leave no cache folder that can be used, and return what the message says about it."""
    import pwd

    from embedonce._config import documents

    monkeypatch.setattr(documents, "_WARNED", set())  # other tests of this process may have been told already

    def find_no_user(uid: int) -> Any:
        raise KeyError("no such user")

    (folder / "one.txt").write_text("one text\n\nanother text\n")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", find_no_user)
    if request.param == "unknown":
        monkeypatch.delenv("HOME", raising=False)
        return "the home folder is unknown"
    home = folder / "home"
    monkeypatch.setenv("HOME", str(home))
    if request.param == "a file":
        home.touch()
        return "is not a folder"
    if os.geteuid() == 0:
        pytest.skip("root can write everywhere")
    home.mkdir(mode=0o500)
    return "cannot be written to"


def test_embed_uses_memory_alone_and_says_so_once(
    command: Any, reason: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    done = command("embed", "one.txt", "--out", "one.npy", "--json")
    assert (done.code, done.json["hits"]) == (0, {"memory": 0})
    assert np.load("one.npy").shape == (2, 256)
    (said,) = [record.message for record in caplog.records if "no disk tier" in record.message]
    assert reason in said
    assert "a memory tier and the ngram provider" in done.err


@pytest.mark.parametrize("arguments", [["check"], ["config"], ["stats"], ["explain", "one"], ["forget", "one"]])
def test_other_commands_use_memory_alone_and_say_so_once(
    command: Any, reason: str, arguments: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert command(*arguments).code == 0
    assert sum("no disk tier" in record.message for record in caplog.records) == 1


def test_a_path_in_an_unknown_home_folder_is_an_error_with_its_line(
    command: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pwd

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    (folder / "one.txt").write_text("one text\n")
    (folder / "embedonce.toml").write_text(
        '[provider]\ntype = "ngram"\n\n[[tiers]]\ntype = "disk"\npath = "~/vectors"\n'
    )
    done = command("embed", "one.txt", "--out", "one.npy")
    assert done.code == 2
    assert "embedonce.toml:6:8: path" in done.err
    assert "home directory" in done.err
