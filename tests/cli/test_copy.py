"""``embedonce copy``: what it prints, what it refuses, and how it ends. The engine's own tests say what is copied."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from patience import wait_until

import embedonce
from embedonce._engine import bulk_calls, transferring
from embedonce_backends.disk import DiskBackend

TEXTS = [f"text {i}" for i in range(20)]
TIERS = """
[provider]
type = "ngram"
dimensions = 16

[[tiers]]
type = "memory"

[[tiers]]
type = "disk"
name = "near"
path = "near"
timeout = "60s"

[[tiers]]
type = "disk"
name = "far"
path = "far"
timeout = "60s"
write = "none"
"""


@pytest.fixture(autouse=True)
def tiers(folder: Path) -> None:
    """Two disk tiers, of which the first one has vectors."""
    Path("embedonce.toml").write_text(TIERS)
    with embedonce.open("embedonce.toml") as cache:
        cache.embed_batch(TEXTS)


def read_far() -> int:
    with embedonce.open("embedonce.toml") as cache:
        return sum(one.entries for one in cache.contents() if one.tier == "far")


def test_a_copy_says_what_it_has_done(command: Any) -> None:
    done = command("copy", "--from", "near", "--to", "far", "--dry-run")
    assert (done.code, done.out, done.err) == (0, "20 entries would be copied from near to far\n", "")
    assert read_far() == 0
    done = command("copy", "--from", "near", "--to", "far")
    assert (done.code, done.out, done.err) == (0, "20 entries copied from near to far\n", "")
    assert read_far() == 20
    done = command("copy", "--from", "near", "--to", "far")
    assert (done.code, done.out) == (0, "0 entries copied from near to far\n  20 already in far\n")
    assert command("copy", "--from", "near", "--to", "far", "--quiet").out == ""


def test_the_counts_are_a_json_document(command: Any) -> None:
    Path("some.txt").write_text("text 1\n\ntext 2\n")
    found = command("copy", "--from", "near", "--to", "far", "--texts", "some.txt", "--json")
    assert (found.code, found.err) == (0, "")
    [card] = found.json.pop("scopes").values()
    assert card["model"] == "char-ngram"
    assert found.json | {"scopes": {}} == {
        "source": "near",
        "target": "far",
        "scopes": {},
        "found": 2,
        "copied": 2,
        "already_there": 0,
        "expired": 0,
        "corrupt": 0,
        "too_large": 0,
        "decrypted": False,
        "unused": [],
        "unknown": {},
        "dry_run": False,
        "stopped": None,
    }


def test_the_selection_names_scopes_and_files(command: Any) -> None:
    Path("some.jsonl").write_text('{"body": "text 1"}\n{"body": "text 2"}\n')
    Path("others").mkdir()
    Path("others/one.txt").write_text("text 3\ntext 4\n")
    with embedonce.open("embedonce.toml") as cache:
        scope = cache.explain("a").scope

    def copy(*options: str) -> int:
        found = command("copy", "--from", "near", "--to", "far", "--dry-run", "--json", *options)
        copied: int = found.json["copied"]
        assert found.code == (0 if copied else 1)
        return copied

    assert copy("--texts", "some.jsonl", "--field", "body") == 2
    assert copy("--texts", "some.jsonl", "--field", "body", "--texts", "others") == 4
    assert copy("--except-texts", "others") == 18
    assert copy("--model", "char-ngram", "--version", "v1", "--namespace", "", "--scope", scope) == 20
    assert copy("--model", "another") == 0
    assert copy("--except-scope", scope) == 0


def test_nothing_that_matches_is_an_error(command: Any) -> None:
    done = command("copy", "--from", "far", "--to", "near")
    assert (done.code, done.out, done.err) == (1, "nothing matches in far\n", "")
    done = command("copy", "--from", "far", "--to", "near", "--quiet")
    assert (done.code, done.out, done.err) == (1, "", "nothing matches in far\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--from", "memory", "--to", "far"],
            "tier 'memory' is in the memory of a process, so it is empty in this one; ",
        ),
        (["--from", "near", "--to", "disk"], "'disk' is not a tier of the configuration; the tiers are: near and far"),
        (["--from", "near", "--to", "near"], "the source and the target are the same tier, 'near'"),
        (["--from", "near", "--to", "far", "--texts", "none.txt"], "none.txt: no such file or folder"),
        (["--from", "near", "--to", "far", "--texts", "-"], "texts cannot be read from standard input (-), because"),
        (["--from", "near", "--to", "far", "--scope", "abc"], "must be 16 hex digits"),
        (["--from", "near", "--to", "far", "--except-scope", "abc"], "must be 16 hex digits"),
    ],
)
def test_what_cannot_work_is_refused(command: Any, options: list[str], message: str) -> None:
    done = command("copy", *options)
    assert (done.code, done.out) == (2, "")
    assert message in " ".join(done.err.replace("│", " ").split())


def test_nothing_is_copied_if_a_text_to_leave_out_cannot_be_read(command: Any) -> None:
    Path("broken.jsonl").write_text('{"text": "text 1"}\n{"text": \n')
    done = command("copy", "--from", "near", "--to", "far", "--except-texts", "broken.jsonl")
    assert done.code == 1
    assert "broken.jsonl" in done.err
    assert "error: 1 record could not be read, as reported above. Nothing was done\n" in done.err
    assert read_far() == 0


def test_a_tier_that_fails_is_named_with_what_to_do(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transferring, "MAX_WINDOW", 5)
    monkeypatch.setattr(bulk_calls, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(bulk_calls, "LONGEST_PAUSE", 0.001)
    calls: list[int] = []
    store = DiskBackend.set_many

    def fail_later(self: DiskBackend, items: Any, ttl: float | None, /) -> None:
        calls.append(len(items))
        if len(calls) > 3:  # the card and two windows
            raise OSError("the disk is full")
        store(self, items, ttl)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiskBackend, "set_many", fail_later)
        done = command("copy", "--from", "near", "--to", "far", "--json")
    assert done.code == 1
    assert done.err.startswith("error: tier 'far' failed for 0.")
    assert done.err.endswith(
        "s (OSError): the disk is full. What was copied until then is stored. Run the same command again to continue.\n"
    )
    assert (done.json["copied"], done.json["stopped"][:23]) == (10, "tier 'far' failed for 0")
    done = command("copy", "--from", "near", "--to", "far")
    assert done.out == "10 entries copied from near to far\n  10 already in far\n"


def test_a_target_that_fails_at_once_is_not_reported_as_nothing_that_matches(
    command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk_calls, "MAX_FAILURES", 1)
    near = DiskBackend.get_many

    def fail(self: DiskBackend, keys: Any, /) -> Any:
        if self.path.name == "far":
            raise OSError("the disk is away")
        return near(self, keys)

    command("copy", "--from", "near", "--to", "far")
    monkeypatch.setattr(DiskBackend, "get_many", fail)
    done = command("copy", "--from", "near", "--to", "far")
    assert (done.code, done.out) == (1, "")
    assert "error: tier 'far' failed" in done.err


def test_a_tier_that_cannot_even_be_listed_leaves_only_the_error(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_calls, "MAX_FAILURES", 1)

    def fail(self: DiskBackend, prefix: str, /) -> Any:
        raise OSError("The folder is gone.")

    monkeypatch.setattr(DiskBackend, "scan", fail)
    done = command("copy", "--from", "near", "--to", "far")
    assert (done.code, done.out) == (1, "")
    assert done.err.endswith(
        "(OSError): The folder is gone. What was copied until then is stored. Run the same command again to continue.\n"
    )


def test_an_entry_that_is_too_large_makes_the_exit_code_1(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_calls, "_encode_fitting", lambda tier, entries: {})
    done = command("copy", "--from", "near", "--to", "far")
    assert (done.code, done.out) == (1, "0 entries copied from near to far\n  20 too large for far\n")


def test_copies_without_encryption_and_of_other_spaces_are_noted(command: Any) -> None:
    key = "A" * 43 + "="
    hidden = TIERS.replace('path = "near"', f'path = "hidden"\nencryption = "{key}"').replace("16", "8")
    Path("hidden.toml").write_text(hidden)
    with embedonce.open("hidden.toml") as cache:
        cache.embed("a")
    Path("hidden.toml").write_text(hidden.replace("dimensions = 8", "dimensions = 16"))
    done = command("copy", "--config", "hidden.toml", "--from", "near", "--to", "far")
    assert (done.code, done.out) == (0, "1 entry copied from near to far\n")
    encrypted, unused = done.err.splitlines()
    assert encrypted == "note: near is encrypted and far is not, so the copies can be read without a key"
    assert unused.startswith("note: the configuration uses none of these spaces: ")
    assert unused.endswith("dimensions 8)")
    assert key not in done.err


def test_an_interrupted_copy_says_how_to_continue(command: Any) -> None:
    with embedonce.open("embedonce.toml") as cache:
        cache.embed_batch([f"more {i}" for i in range(1500)])
    # The child waits in the middle of the copy until it gets the signal.
    program = (
        "import signal, time; signal.signal(2, signal.default_int_handler)\n"
        "from embedonce._engine import transferring as t\n"
        "t.MAX_WINDOW = 100\n"
        "store = t.write_strictly\n"
        "async def wait(*arguments):\n"
        "    done = await store(*arguments)\n"
        "    open('stored', 'w').close()\n"
        "    time.sleep(60)\n"
        "    return done\n"
        "t.write_strictly = wait\n"
        "from embedonce.cli import main; main()"
    )
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", program, "copy", "--from", "near", "--to", "far", "--json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_until(Path("stored").exists)
    child.send_signal(signal.SIGTERM)
    out, err = child.communicate(timeout=60)
    assert child.returncode == 143
    assert err == ("interrupted. What was copied until then is stored. Run the same command again to continue.\n")
    assert json.loads(out) == {"dry_run": False, "stopped": "interrupted", "done": 0}
    done = command("copy", "--from", "near", "--to", "far", "--json")
    assert (done.json["copied"], done.json["already_there"]) == (1420, 100)
