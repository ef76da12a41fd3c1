"""``embedonce embed``: its output, its counts, and how a run ends."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optional import needs

import embedonce

CONFIG = """\
[provider]
type = "ngram"
dimensions = 64

[[tiers]]
type = "memory"

[[tiers]]
type = "disk"
path = "vectors.cache"
timeout = "60s"
"""


@pytest.fixture
def corpus(folder: Path) -> Path:
    (folder / "embedonce.toml").write_text(CONFIG)
    docs = folder / "docs"
    docs.mkdir()
    (docs / "a.md").write_text("# One\n\nfirst\nparagraph\n\nthe same\n")
    (docs / "b.jsonl").write_text('{"text": "the same"}\n{"text": \n{"text": "last"}\n')
    (docs / "c.bin").write_bytes(b"\0\1\2")
    return docs


def read_index(out: Path) -> list[tuple[str, int]]:
    lines = out.with_suffix(".index.jsonl").read_text().splitlines()
    return [(row["source"], row["line"]) for row in map(json.loads, lines)]


def embed_texts(texts: list[str]) -> Any:
    with embedonce.open({"provider": {"type": "ngram", "dimensions": 64}, "tiers": []}) as cache:
        return cache.embed_batch(texts)


# --- what is written and counted --------------------------------------------------------------


def test_rows_in_order_with_their_sources_and_every_count(command: Any, corpus: Path) -> None:
    done = command("embed", "docs", "--out", "out.npy", "--json")
    assert done.code == 1
    assert done.err == "docs/b.jsonl:2: not JSON: Expecting value at character 10\n"
    summary = done.json
    assert summary["seconds"] > 0
    assert 0 <= summary["spent"]["seconds"] <= summary["seconds"]
    summary["spent"]["seconds"] = 0
    assert summary | {"seconds": 0, "bytes": 0} == {
        "texts": 5,
        "unique": 4,
        "computed": 4,
        "hits": {"memory": 0, "disk": 0},
        "imported": {},
        "spent": {"texts": 4, "tokens": None, "seconds": 0, "money": {}, "unknown_tokens": 4, "unknown_seconds": 0},
        "saved": {"texts": 0, "tokens": 0, "seconds": 0, "money": {}, "unknown_tokens": 0, "unknown_seconds": 0},
        "repeated": 1,
        "failed": 1,
        "failures": [
            {
                "file": "docs/b.jsonl",
                "reason": "not JSON",
                "count": 1,
                "lines": [2],
                "last_line": 2,
                "fields": [],
                "detail": ": Expecting value at character 10",
                "suggestion": None,
            }
        ],
        "rows": 5,
        "dimensions": 64,
        "files": 2,
        "binary": 1,
        "skipped": {},
        "unknown": [],
        "trouble": {},
        "causes": {},
        "unstored": [],
        "bytes": 0,
        "seconds": 0,
        "out": "out.npy",
        "index": "out.index.jsonl",
        "stopped": None,
        "estimate": None,
    }
    texts = ["# One", "first\nparagraph", "the same", "the same", "last"]
    assert np.array_equal(np.load("out.npy"), embed_texts(texts))
    places = [("docs/a.md", 1), ("docs/a.md", 3), ("docs/a.md", 6), ("docs/b.jsonl", 1), ("docs/b.jsonl", 3)]
    assert read_index(Path("out.npy")) == places


def test_a_second_run_computes_only_changed_passages(command: Any, corpus: Path) -> None:
    command("embed", "docs", "--out", "cold.npy")
    warm = command("embed", "docs", "--out", "warm.npy", "--json").json
    assert (warm["computed"], warm["hits"], warm["repeated"]) == (0, {"memory": 0, "disk": 5}, 0)
    assert Path("warm.npy").read_bytes() == Path("cold.npy").read_bytes()
    (corpus / "a.md").write_text("# One\n\nfirst\nparagraph, changed\n\nthe same\n")
    changed = command("embed", "docs", "--out", "changed.npy", "--json").json
    assert (changed["computed"], changed["hits"]) == (1, {"memory": 0, "disk": 4})


def test_a_text_computed_in_an_earlier_window_comes_from_a_tier(command: Any, corpus: Path) -> None:
    lines = [f"line {number % 3000}" for number in range(6000)]
    done = command("embed", "-", "--split", "line", "--out", "out.npy", "--json", input="\n".join(lines))
    assert done.code == 0
    summary = done.json
    # Equal lines are 3,000 apart, and a window has 2,048.
    assert (summary["texts"], summary["unique"], summary["computed"]) == (6000, 3000, 3000)
    assert (sum(summary["hits"].values()), summary["repeated"]) == (3000, 0)
    assert np.array_equal(np.load("out.npy"), embed_texts(lines))
    assert read_index(Path("out.npy"))[-1] == ("-", 6000)


def test_the_configuration_file_is_not_embedded(command: Any, corpus: Path) -> None:
    other = corpus / "other.toml"
    other.write_text(CONFIG)
    done = command("embed", "docs", "embedonce.toml", "--config", "docs/other.toml", "--out", "out.npy")
    assert {source for source, _ in read_index(Path("out.npy"))} == {"docs/a.md", "docs/b.jsonl", "embedonce.toml"}
    assert done.code == 1


def test_standard_input_may_be_closed(process: Callable[..., subprocess.Popen[str]], corpus: Path) -> None:
    started = process("embed", "-", "docs/a.md", "--out", "out.npy", preexec_fn=lambda: os.close(0))
    _, err = started.communicate(timeout=100)
    assert (started.returncode, err) == (1, "-: standard input is closed\n")
    assert np.load("out.npy").shape == (3, 64)


@pytest.mark.parametrize("kind", ["jsonl", pytest.param("parquet", marks=needs("pyarrow"))])
def test_all_output_formats_have_the_same_rows(command: Any, corpus: Path, kind: str) -> None:
    assert command("embed", "docs", "--out", "out.npy", "--quiet").out == ""
    done = command("embed", "docs", "--out", f"out.{kind}", "--with-text")
    assert "out.index.jsonl" not in done.out
    if kind == "jsonl":
        rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    else:
        import pyarrow.parquet as pq

        rows = pq.read_table("out.parquet").to_pylist()
    assert [(row["source"], row["line"]) for row in rows] == read_index(Path("out.npy"))
    assert [row["text"] for row in rows] == ["# One", "first\nparagraph", "the same", "the same", "last"]
    assert np.array_equal(np.array([row["vector"] for row in rows], np.float32), np.load("out.npy"))


def test_tasks_share_vectors_if_the_provider_is_symmetric(command: Any, corpus: Path) -> None:
    command("embed", "docs", "--out", "out.npy")
    assert command("embed", "docs", "--out", "out.npy", "--task", "query", "--json").json["computed"] == 0


@pytest.mark.parametrize(
    ("task", "message"),
    [("qurey", 'the task "qurey"; did you mean "query"?'), ("Document", 'did you mean "document"?'), ("", "empty")],
)
def test_an_unknown_task_is_refused_and_no_output_is_written(
    command: Any, corpus: Path, task: str, message: str
) -> None:
    for arguments in (["embed", "docs", "--out", "out.npy"], ["explain", "a text"]):
        done = command(*arguments, "--task", task)
        assert done.code == 2
        assert message in " ".join(done.err.split())
    assert not Path("out.npy").exists()


INVALID_LINES = '{"text": "first"}\n{"text": "tea \\ud83c"}\n{"text": "tea \\ud83c\\udf75"}\n{"text": "last"}\n'


def test_an_invalid_passage_fails_alone_and_is_named_by_its_line(command: Any, corpus: Path) -> None:
    done = command(
        "embed", "-", "--format", "jsonl", "--out", "out.jsonl", "--with-text", "--json", input=INVALID_LINES
    )
    assert (done.code, done.json["rows"], done.json["failed"]) == (1, 3, 1)
    assert "-:2: TextError: the text has a lone surrogate at character 4" in done.err.replace("<stdin>", "-")
    assert [json.loads(line)["line"] for line in Path("out.jsonl").read_text().splitlines()] == [1, 3, 4]
    done = command("embed", "-", "--format", "jsonl", "--out", "out.jsonl", "--strict", input=INVALID_LINES)
    assert done.code == 1
    assert "--strict" in done.err


@pytest.mark.parametrize("suffix", ["jsonl", "npy"])
def test_the_step_surrogates_embeds_an_invalid_passage(command: Any, corpus: Path, suffix: str) -> None:
    file = Path("embedonce.toml")
    file.write_text(file.read_text() + '\n[key]\nnormalize = ["surrogates"]\n')
    out = f"out.{suffix}"
    done = command("embed", "-", "--format", "jsonl", "--out", out, "--with-text", "--json", input=INVALID_LINES)
    assert (done.code, done.json["rows"], done.json["failed"]) == (0, 4, 0)
    written = Path("out.jsonl" if suffix == "jsonl" else "out.index.jsonl").read_text()
    texts = [json.loads(line)["text"] for line in written.splitlines()]
    assert texts == ["first", "tea \ufffd", "tea \U0001f375", "last"]


def test_json_lines_from_standard_input(command: Any, corpus: Path) -> None:
    done = command("embed", "-", "--format", "jsonl", "--field", "q", "--out", "o.jsonl", "--json", input='{"q": "x"}')
    assert (done.code, done.json["rows"]) == (0, 1)
    assert json.loads(Path("o.jsonl").read_text())["source"] == "-"


def test_an_output_in_the_input_folder_is_not_read(command: Any, corpus: Path) -> None:
    (corpus / "out.jsonl").write_text('{"text": "an earlier output"}\n')
    done = command("embed", "docs", "--out", "docs/out.jsonl", "--json")
    assert done.json["texts"] == 5
    again = command("embed", corpus, "--out", "docs/out.jsonl", "--json")
    assert (again.json["texts"], again.json["computed"]) == (5, 0)


def test_the_summary_for_people(command: Any, corpus: Path) -> None:
    done = command("embed", "docs", "--out", "out.npy")
    summary = re.sub(r"[\d.,]+ s, [\d,]+ passages/s", "TIME", done.out)
    assert summary.splitlines() == [
        "5 passages from 2 files, 4 distinct",
        "             4 ( 80.0 %) computed",
        "             1 ( 20.0 %) repeated",
        "1 failed, reported above",
        "1 binary file skipped",
        "wrote 5 rows of 64 dimensions to out.npy",
        "and the source of each row to out.index.jsonl",
        "TIME",
    ]


def test_without_a_configuration_it_reports_the_defaults(command: Any, folder: Path) -> None:
    done = command("embed", "-", "--out", "out.npy", input="one text")
    assert done.code == 0
    assert "No configuration found: using a memory tier" in done.err
    assert "embedonce init" in done.err


# --- what is refused at once ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["docs", "--out", "out.txt"], "the file name must end in .npy, .jsonl or .parquet"),
        (["docs", "--out", "missing/out.npy"], "the folder missing does not exist"),
        (["docs", "--out", "docs"], "the file name must end in"),
        (["docs", "nowhere", "--out", "out.npy"], "nowhere: no such file or folder"),
        (["docs/b.jsonl", "--out", "docs/b.jsonl"], "docs/b.jsonl: --out would overwrite this input"),
        (["-", "-", "--out", "out.npy"], "standard input (-) can be given only once"),
        (["-", "--format", "parquet", "--out", "out.npy"], "cannot read Parquet from standard input"),
        (["docs", "--out", "out.npy", "--config", "none.toml"], "none.toml"),
        (["docs", "--out", "out.npy", "--split", "word"], "--split"),
        (["docs"], "--out"),
        (["--out", "out.npy"], "PATH"),
    ],
)
def test_invalid_usage_is_refused_before_anything_is_computed(
    command: Any, corpus: Path, arguments: list[str], message: str
) -> None:
    before = sorted(os.listdir())
    done = command("embed", *arguments)
    assert done.code == 2
    assert message in done.err
    assert done.out == ""
    assert sorted(os.listdir()) == before


# --- what fails -------------------------------------------------------------------------------


def test_strict_stops_at_the_first_failure_and_keeps_the_earlier_output(command: Any, corpus: Path) -> None:
    Path("out.npy").write_bytes(b"earlier")
    done = command("embed", "docs", "--out", "out.npy", "--strict", "--json")
    assert done.code == 1
    assert "docs/b.jsonl:2" in done.err
    assert "stopped: an input could not be read, and --strict is set" in done.err
    assert (done.json["out"], done.json["stopped"]) == (None, "an input could not be read, and --strict is set")
    assert Path("out.npy").read_bytes() == b"earlier"
    assert not [name for name in os.listdir() if name.endswith(".part")]


def test_the_earlier_output_stays_if_every_passage_fails(command: Any, corpus: Path) -> None:
    Path("out.npy").write_bytes(b"earlier")
    done = command("embed", "-", "--format", "jsonl", "--out", "out.npy", input="no\nJSON\n")
    assert done.code == 1
    assert "no passage could be embedded" in done.err
    assert Path("out.npy").read_bytes() == b"earlier"


def test_replay_reports_missing_texts_and_writes_the_others(command: Any, corpus: Path) -> None:
    command("embed", "docs/a.md", "--out", "out.npy")
    Path("embedonce.toml").write_text('[cache]\nmode = "replay"\n' + CONFIG)
    done = command("embed", "docs", "--out", "out.npy", "--json")
    assert done.code == 1
    assert (done.json["rows"], done.json["failed"], done.json["computed"]) == (4, 2, 0)
    assert "docs/b.jsonl:3: ReplayMiss" in done.err
    assert read_index(Path("out.npy"))[-1] == ("docs/b.jsonl", 1)


@pytest.mark.slow
def test_a_failed_write_is_reported_and_leaves_no_file(
    process: Callable[..., subprocess.Popen[str]], corpus: Path
) -> None:
    (corpus / "long.txt").write_text("".join(f"passage {number}\n" for number in range(30_000)))
    Path("out.jsonl").write_text("earlier")

    def small_files() -> None:
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit then fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (8 * 2**20, 8 * 2**20))

    started = process("embed", "docs/long.txt", "--split", "line", "--out", "out.jsonl", preexec_fn=small_files)
    _, err = started.communicate(timeout=100)
    assert started.returncode == 1
    assert f"error: cannot write out.jsonl: {os.strerror(errno.EFBIG)}" in err
    assert "Traceback" not in err
    assert Path("out.jsonl").read_text() == "earlier"
    assert not [name for name in os.listdir() if name.endswith(".part")]


# --- signals, pipes, other processes ----------------------------------------------------------

MANY = 30_000


@pytest.fixture
def long(corpus: Path) -> Path:
    path = corpus / "long.txt"
    path.write_text("".join(f"passage number {number} of a long text\n" for number in range(MANY)))
    return path


def wait_for_half(part: Path, started: subprocess.Popen[str]) -> None:
    """Wait until half of the rows are in the unfinished file."""
    half = MANY // 2 * 64 * 4
    while not (part.exists() and part.stat().st_size > half):
        assert started.poll() is None, started.communicate()
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_continues_after_it_was_interrupted(
    command: Any, process: Callable[..., subprocess.Popen[str]], long: Path, number: signal.Signals
) -> None:
    arguments = ["embed", "docs/long.txt", "--split", "line", "--out", "out.npy", "--json"]
    started = process(*arguments)
    part = Path(".out.npy.part")
    wait_for_half(part, started)
    started.send_signal(number)
    out, err = started.communicate(timeout=100)
    if number == signal.SIGKILL:
        assert started.returncode == -signal.SIGKILL
        assert part.exists()
    else:
        assert started.returncode == 128 + number
        assert "Run the same command again" in err
        assert "Traceback" not in err
        assert json.loads(out)["stopped"] == "interrupted"
        assert not part.exists()
    assert not Path("out.npy").exists()
    assert not Path("out.index.jsonl").exists()

    stored = command("stats", "--json").json["entries"]
    assert MANY // 2 <= stored < MANY
    done = command(*arguments)
    assert done.code == 0
    assert (done.json["computed"], done.json["hits"]) == (MANY - stored, {"memory": 0, "disk": stored})
    rows = np.load("out.npy")
    assert rows.shape == (MANY, 64)
    rows_to_check = [0, 1, MANY - 2, MANY - 1]
    assert np.array_equal(
        rows[rows_to_check], embed_texts([f"passage number {number} of a long text" for number in rows_to_check])
    )
    assert sorted(os.listdir()) == ["docs", "embedonce.toml", "out.index.jsonl", "out.npy", "vectors.cache"]


@pytest.mark.slow
def test_a_terminal_shows_the_progress(process: Callable[..., subprocess.Popen[str]], long: Path) -> None:
    pty = pytest.importorskip("pty")
    terminal, inner = pty.openpty()
    options = {"stderr": inner, "env": {**os.environ, "TERM": "xterm"}}
    started = process("embed", "docs/long.txt", "--split", "line", "--out", "out.npy", **options)
    os.close(inner)
    seen = b""
    with contextlib.suppress(OSError):  # Linux raises it once the other end is closed
        while more := os.read(terminal, 2**16):
            seen += more
    os.close(terminal)
    out, _ = started.communicate(timeout=100)
    assert started.returncode == 0
    assert f"{MANY:,} passages from 1 file" in out
    shown = re.findall(rb"([\d,]+) passages  [\d,]+/s  0 % hits", seen)
    assert shown[-1] == f"{MANY:,}".encode()
    assert b"100%" in seen


def test_two_runs_at_once_do_not_write_one_output(
    command: Any, process: Callable[..., subprocess.Popen[str]], long: Path
) -> None:
    started = process("embed", "-", "--out", "out.npy", stdin=subprocess.PIPE)
    try:
        while not Path(".out.npy.part").exists():
            assert started.poll() is None
            time.sleep(0.002)
        done = command("embed", "docs/a.md", "--out", "out.npy")
        assert done.code == 2
        assert "another run is writing" in done.err
    finally:
        started.communicate("one text", timeout=100)
    assert started.returncode == 0
    assert np.load("out.npy").shape == (1, 64)


def test_a_closed_pipe_ends_the_command_without_a_message(
    process: Callable[..., subprocess.Popen[str]], corpus: Path
) -> None:
    read, write = os.pipe()
    os.close(read)
    started = process("embed", "docs/a.md", "--out", "out.npy", "--json", stdout=write)
    os.close(write)
    _, err = started.communicate(timeout=100)
    assert started.returncode == 1
    assert err == ""
    assert np.load("out.npy").shape == (3, 64)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_corpus(process: Callable[..., subprocess.Popen[str]], corpus: Path) -> None:
    def peak(passages: int) -> int:
        """Return the peak memory, in bytes, of a run over this many long passages."""
        started = process("embed", "-", "--split", "line", "--out", "out.jsonl", stdin=subprocess.PIPE)
        assert started.stdin is not None
        for number in range(passages):
            started.stdin.write(f"{number} " + "long passage " * 80 + "\n")
        started.stdin.flush()
        started.stdin.close()
        _, status, usage = os.wait4(started.pid, 0)
        started.returncode = os.waitstatus_to_exitcode(status)
        for pipe in (started.stdout, started.stderr):
            if pipe is not None:
                pipe.close()
        assert started.returncode == 0
        return usage.ru_maxrss * 1024

    # 12,000 more passages are 12 MB of text, 3 MB of vectors and 10 MB of JSON; the memory tier is full in both runs.
    assert peak(18_000) - peak(6_000) < 8 * 2**20


def test_a_tier_that_stored_nothing_is_an_error_with_a_cause(
    command: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    from embedonce_backends.disk import DiskBackend

    def full(self: Any, items: Any, ttl: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    assert command("init").code == 0
    Path("notes.txt").write_text("one\n\ntwo\n")
    with monkeypatch.context() as patch:
        patch.setattr(DiskBackend, "set_many", full)
        done = command("embed", "notes.txt", "--out", "out.npy")
        assert done.code == 1
        assert "tier disk: " in done.err
        assert "(OSError: " in done.err
        assert "error: tier disk stored none of the computed vectors" in done.err
        assert np.load("out.npy").shape == (2, 256)
        assert command("embed", "notes.txt", "--out", "out.npy", "--json").json["unstored"] == ["disk"]
    assert command("embed", "notes.txt", "--out", "out.npy").code == 0


def test_the_index_of_a_linked_output_is_beside_the_real_file(command: Any, folder: Path) -> None:
    Path("real").mkdir()
    Path("link.npy").symlink_to("real/there.npy")
    Path("notes.txt").write_text("one\n")
    index = command("embed", "notes.txt", "--out", "link.npy", "--json").json["index"]
    assert Path(index).read_text() == '{"row": 0, "source": "notes.txt", "line": 1}\n'
    assert Path("link.npy").is_symlink()


def test_a_permanent_failure_does_not_advise_running_again_unchanged(command: Any, folder: Path) -> None:
    assert command("init").code == 0
    Path("lines.jsonl").write_text("{}\n")
    done = command("embed", "lines.jsonl", "--out", "out.npy", "--strict")
    assert done.code == 1
    assert "Run the same command again" not in done.err
    assert "Fix the cause, then run the same command" in done.err
