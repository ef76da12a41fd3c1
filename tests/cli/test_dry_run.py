"""``embedonce embed --dry-run`` and ``--max-cost``, and the costs in the summary of a run."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optional import needs

from embedonce import Cache
from embedonce.answers import Estimate
from embedonce.cli.embedding.cost_limit import CostLimit
from embedonce.cli.embedding.dry_run import (
    DryRun,
    describe_dry_run,
    describe_price,
    describe_tier_errors,
    describe_tokens,
    round_estimate,
)
from embedonce.cli.embedding.progress import Display, ReadingProgress
from embedonce.cli.embedding.sources import Reader
from embedonce.cli.embedding.summary import Summary, describe_cost
from embedonce.cli.money import sum_cost
from embedonce.prices import Price
from embedonce.testing import OpenAIServer
from embedonce.vectors import Work
from embedonce_backends.memory import MemoryBackend
from embedonce_providers.ngram import NgramProvider

PRICE = "0.02 USD / 1M tokens"
CONFIG = f"""\
[provider]
type = "ngram"
dimensions = 64
price = "{PRICE}"

[[tiers]]
type = "disk"
path = "vectors.cache"
timeout = "60s"
"""
NOTHING = "nothing was computed or stored, and no text was sent to the provider"


@pytest.fixture
def corpus(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small corpus, and a provider that cannot count tokens."""
    monkeypatch.delattr(NgramProvider, "count_exact_tokens")
    (folder / "embedonce.toml").write_text(CONFIG)
    docs = folder / "docs"
    docs.mkdir()
    (docs / "a.md").write_text("one\n\ntwo\n\nthe same\n")
    (docs / "b.jsonl").write_text('{"text": "the same"}\n{"text": "last"}\n')
    return docs


@pytest.fixture
def server(folder: Path) -> Iterator[OpenAIServer]:
    """A server that charges for tokens, and a corpus of which a third is cached."""
    with OpenAIServer(model="unknown-to-tokenizers", dimensions=8) as server:
        (folder / "embedonce.toml").write_text(
            f'[provider]\ntype = "openai"\nmodel = "{server.model}"\nbase_url = "{server.base_url}"\napi_key = "test"\n'
            f'price = "{PRICE}"\nbatch_size = 10\n[[tiers]]\ntype = "disk"\npath = "vectors.cache"\ntimeout = "60s"\n'
        )
        texts = [f"passage number {number}: {'word ' * (number % 17)}" for number in range(600)]
        Path("third.txt").write_text("\n".join(texts[::3]))
        Path("all.txt").write_text("\n".join(texts))
        yield server


def list_folder() -> dict[str, bytes | None]:
    """Return the files of the folder, which include the store, with their content."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(Path().rglob("*"))}


def make_estimate(**changed: Any) -> Estimate:
    fields: dict[str, Any] = {
        "texts": 5,
        "distinct": 4,
        "invalid": 0,
        "hits": {"disk": 1},
        "missing": 3,
        "bytes": 100,
        "tokens": 1_000_000,
        "min_tokens": 980_000,
        "max_tokens": 1_030_000,
        "method": "measured",
        "sample": 50,
        "seconds": 90.0,
        "price": Price.parse(PRICE),
        "errors": {},
    }
    return Estimate(**(fields | changed))


# --- beside a real run ------------------------------------------------------------------------


@needs("openai")
def test_a_dry_run_predicts_the_run_that_follows(command: Any, server: OpenAIServer) -> None:
    first = command("embed", "third.txt", "--split", "line", "--out", "third.npy", "--json").json
    server.requests.clear()
    before = list_folder()
    done = command("embed", "all.txt", "--split", "line", "--dry-run", "--json")
    assert done.code == 0
    assert not server.requests
    assert list_folder() == before
    predicted = done.json["estimate"]
    assert (predicted["distinct"], predicted["hits"], predicted["missing"]) == (600, {"disk": 200}, 400)
    assert (predicted["method"], predicted["sample"]) == ("measured", 200)
    run = command("embed", "all.txt", "--split", "line", "--out", "all.npy", "--json").json
    assert (run["computed"], run["hits"]) == (400, {"disk": 200})
    tokens = run["spent"]["tokens"]
    assert predicted["min_tokens"] <= tokens <= predicted["max_tokens"]
    assert abs(predicted["tokens"] - tokens) < 0.05 * tokens
    assert run["spent"]["money"] == {"USD": f"{Decimal('0.02') * tokens / 10**6:f}"}
    for kind in ("money", "min_money", "max_money"):
        number = Decimal(predicted[kind].removesuffix(" USD"))
        assert number == Decimal("0.02") * predicted[kind.replace("money", "tokens")] / 10**6
    # What was paid for the first third is saved now.
    assert run["saved"]["tokens"] == first["spent"]["tokens"]
    assert run["saved"]["money"] == first["spent"]["money"]
    assert (run["saved"]["texts"], run["saved"]["unknown_tokens"]) == (200, 0)


@needs("openai")
def test_counted_tokens_are_those_that_the_run_pays(
    command: Any, server: OpenAIServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedonce_providers.openai import OpenAIProvider

    def count(self: OpenAIProvider, texts: list[str], task: str) -> list[int]:
        return list(map(server.tokens_of, texts))

    monkeypatch.setattr(OpenAIProvider, "count_exact_tokens", count)
    command("embed", "third.txt", "--split", "line", "--out", "third.npy")
    predicted = command("embed", "all.txt", "--split", "line", "--dry-run", "--json").json["estimate"]
    assert predicted["method"] == "counted"
    limit = predicted["money"]
    above = command("embed", "all.txt", "--split", "line", "--out", "all.npy", "--max-cost", f"{limit[:-5]}0 USD")
    assert above.code == 1
    run = command("embed", "all.txt", "--split", "line", "--out", "all.npy", "--max-cost", limit, "--json").json
    assert run["spent"]["tokens"] == predicted["tokens"] == predicted["min_tokens"] == predicted["max_tokens"]
    assert [f"{amount} {currency}" for currency, amount in run["spent"]["money"].items()] == [limit]


@needs("openai")
def test_the_summary_names_tokens_and_money(command: Any, server: OpenAIServer) -> None:
    command("embed", "third.txt", "--split", "line", "--out", "third.npy")
    lines = command("embed", "all.txt", "--split", "line", "--out", "all.npy").out.splitlines()
    done = command("embed", "all.txt", "--split", "line", "--out", "all.npy", "--json").json
    cost, saved = (next(line for line in lines if line.startswith(label)) for label in ("cost: ", "saved: "))
    tokens = int(cost.split()[1].replace(",", "")) + int(saved.split()[1].replace(",", ""))
    assert tokens == done["saved"]["tokens"]
    # After a second or more, the line also has the time of the calls.
    assert re.fullmatch(r"cost: [0-9,]+ tokens, 0\.00[0-9]+ USD(, .+ of computation)?", cost)


class CountingProvider:
    """Counts tokens exactly: one per word."""

    def count_exact_tokens(self, texts: list[str], task: str) -> list[int]:
        return [len(text.split()) for text in texts]


def test_tokens_are_exact_where_the_provider_counts_them(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NgramProvider, "count_exact_tokens", CountingProvider.count_exact_tokens, raising=False)
    with Cache(NgramProvider(), [MemoryBackend()], price=PRICE) as cache:
        trial = DryRun(cache, Reader(["docs"]), task="document")
        estimate = trial.execute(Display())
        assert cache.stats().requested == 0
    assert (estimate.method, estimate.tokens, estimate.max_tokens) == ("counted", 5, 5)
    lines = list(describe_dry_run(trial.summary, estimate))
    assert "tokens: 5, counted with the provider's tokenizer" in lines
    assert f"price: 0.00000010 USD, at {PRICE}" in lines


# --- the result of a dry run ------------------------------------------------------------------


def test_a_dry_run_shows_what_a_run_would_do(command: Any, corpus: Path) -> None:
    command("embed", "docs/b.jsonl", "--out", "out.npy")
    before = list_folder()
    done = command("embed", "docs", "--dry-run", "--quiet")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines.pop(-2).startswith("time of the provider's calls: ")
    assert lines == [
        "5 passages from 2 files, 4 distinct texts",
        "             2 ( 50.0 %) in disk",
        "             2 ( 50.0 %) in no tier",
        "tokens: between 0 and 14, guessed from the length, because the tiers have too few texts with known tokens",
        "price: at most 0.00000028 USD, at 0.02 USD / 1M tokens",
        NOTHING,
    ]
    assert list_folder() == before
    command("embed", "docs", "--out", "out.npy")
    assert "a run would compute nothing" in command("embed", "docs", "--dry-run").out


def test_without_a_price_the_result_says_how_to_set_one(command: Any, corpus: Path) -> None:
    Path("embedonce.toml").write_text(CONFIG.replace(f'price = "{PRICE}"\n', ""))
    done = command("embed", "docs", "--dry-run")
    assert f'into [provider]: price = "{PRICE}"' in done.out
    found = command("embed", "docs", "--dry-run", "--json").json["estimate"]
    assert [found[name] for name in ("price", "money", "min_money", "max_money")] == [None] * 4


@pytest.mark.parametrize("options", [(), ("--strict",), ("--allow-empty",), ("--json",)])
@pytest.mark.parametrize("content", ["", '{"text": "good"}\n{"text": \n', '{"text": \n', '{"text": "\\ud800"}\n'])
def test_the_exit_code_is_that_of_a_run(command: Any, corpus: Path, content: str, options: tuple[str, ...]) -> None:
    Path("in.jsonl").write_text(content)
    dry = command("embed", "in.jsonl", "--dry-run", *options)
    limited = command("embed", "in.jsonl", "--out", "out.npy", "--max-cost", "5", *options)
    real = command("embed", "in.jsonl", "--out", "out.npy", *options)
    assert dry.code == limited.code == real.code
    # The first lines are the failures. What follows says how the command ended.
    assert [line for line in dry.err.splitlines() if line.startswith("in.jsonl")] == [
        line for line in real.err.splitlines() if line.startswith("in.jsonl")
    ]
    if "--json" in options:
        for name in ("texts", "failed", "failures", "files", "binary", "skipped", "bytes"):
            assert dry.json[name] == limited.json[name] == real.json[name]
        assert bool(dry.json["stopped"]) == bool(real.json["stopped"])


def test_standard_input_and_skipped_files_count_as_in_a_run(command: Any, corpus: Path) -> None:
    (corpus / "c.bin").write_bytes(b"\0\1\2")
    (corpus / "d.pdf").write_bytes(b"%PDF")
    done = command("embed", "docs", "-", "--dry-run", input="from standard input")
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0] == "6 passages from 3 files, 5 distinct texts"
    assert {"1 binary file skipped", "skipped: .pdf: 1"} <= set(lines)


def test_the_output_of_a_run_is_not_touched_and_not_read(command: Any, corpus: Path) -> None:
    out = corpus / "out.jsonl"
    out.write_text('{"text": "earlier output"}\n')
    assert command("embed", "docs", "--dry-run").out.startswith("6 passages from 3 files")
    assert command("embed", "docs", "--dry-run", "--out", "docs/out.jsonl").out.startswith("5 passages from 2 files")
    assert out.read_text() == '{"text": "earlier output"}\n'
    for name in ("out.pdf", "missing/out.npy", "docs"):
        assert command("embed", "docs", "--dry-run", "--out", name).code == 2


def test_in_replay_mode_a_run_computes_nothing(command: Any, corpus: Path) -> None:
    command("embed", "docs/a.md", "--out", "out.npy")
    Path("embedonce.toml").write_text('[cache]\nmode = "replay"\n' + CONFIG)
    done = command("embed", "docs", "--dry-run")
    assert done.code == 1
    assert "replay mode: 1 distinct text would fail, because no tier has a vector" in done.out
    assert "price" not in done.out
    assert command("embed", "docs/a.md", "--dry-run").code == 0
    # A run costs nothing, so no limit is exceeded.
    assert command("embed", "docs/a.md", "--out", "out.npy", "--max-cost", "0.000000001").code == 0


def test_a_tier_that_fails_is_named(command: Any, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from embedonce_backends.disk import DiskBackend

    command("embed", "docs", "--out", "out.npy")

    def fail(self: object, keys: object) -> Any:
        raise OSError("gone")

    monkeypatch.setattr(DiskBackend, "get_many", fail)
    done = command("embed", "docs", "--dry-run")
    assert done.code == 0
    assert done.err == (
        "tier disk: cannot be read (OSError); its texts count as missing, so the estimate may be too high\n"
    )
    assert "4 (100.0 %) in no tier" in done.out


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("options", [["--dry-run"], ["--out", "out.npy", "--max-cost", "5"]])
def test_a_signal_ends_a_dry_run(
    process: Callable[..., subprocess.Popen[str]], corpus: Path, number: int, code: int, options: list[str]
) -> None:
    lines = "".join(f"line {line}\n" for line in range(200_000))
    Path("long.txt").write_text(lines)
    # A listing of the folder shows that the tier is open, so the command is about to read or is reading.
    started = process("embed", "long.txt", "--split", "line", *options, "--json")
    while not Path("vectors.cache").exists():
        assert started.poll() is None
        time.sleep(0.002)
    started.send_signal(number)
    out, err = started.communicate(timeout=100)
    assert started.returncode == code, err
    assert "interrupted" in err
    assert not Path("out.npy").exists()
    assert "Traceback" not in err
    assert '"computed": 0' in out or not out


# --- the limit --------------------------------------------------------------------------------


def test_a_run_above_the_limit_computes_nothing(command: Any, corpus: Path) -> None:
    Path("out.npy").write_bytes(b"earlier")
    done = command("embed", "docs", "--out", "out.npy", "--max-cost", "0.0000001")
    assert (done.code, done.out) == (1, "")
    assert done.err == (
        "error: a run may cost up to 0.00000068 USD, more than --max-cost 0.0000001 USD; nothing was computed. "
        "To embed anyway, raise --max-cost; --dry-run shows more.\n"
    )
    assert Path("out.npy").read_bytes() == b"earlier"
    found = command("embed", "docs", "--out", "out.npy", "--max-cost", "0.0000001", "--json").json
    assert (found["computed"], found["out"], found["estimate"]["missing"]) == (0, None, 4)
    assert found["stopped"] == "a run may cost up to 0.00000068 USD, more than --max-cost 0.0000001 USD"
    assert command("embed", "docs", "--dry-run", "--json").json["estimate"]["hits"] == {"disk": 0}


def test_a_dry_run_above_the_limit_fails(command: Any, corpus: Path) -> None:
    above = command("embed", "docs", "--dry-run", "--max-cost", "0.0000001")
    assert above.code == 1
    assert "more than --max-cost 0.0000001 USD; nothing was computed." in above.err
    assert NOTHING in above.out
    assert command("embed", "docs", "--dry-run", "--max-cost", "5").code == 0
    assert command("embed", "-", "--dry-run", "--max-cost", "5", input="text").code == 0


@pytest.mark.parametrize("limit", ["5", "0.5", "5 USD", "5.50USD", " 5 "])
def test_a_run_below_the_limit_is_a_usual_run(command: Any, corpus: Path, limit: str) -> None:
    done = command("embed", "docs", "--out", "out.npy", "--max-cost", limit, "--json")
    assert (done.code, done.json["computed"], done.json["rows"]) == (0, 4, 5)
    assert done.json["estimate"]["missing"] == 4
    assert np.load("out.npy").shape == (5, 64)


@pytest.mark.parametrize("limit", ["0", "0.0", "-1", "$5", "5,50", "1e3", "nan", "inf", "", "USD", "٣", "5 usd"])
@pytest.mark.parametrize("dry_run", [(), ("--dry-run",)])
def test_a_wrong_limit_is_refused(command: Any, corpus: Path, limit: str, dry_run: tuple[str, ...]) -> None:
    done = command("embed", "docs", "--out", "out.npy", f"--max-cost={limit}", *dry_run)
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        f"error: --max-cost {limit}: must be an amount of money above 0, such as --max-cost 5 or '5.50 USD'\n"
    )
    assert not Path("vectors.cache").exists()


def test_a_limit_needs_the_currency_of_the_price(command: Any, corpus: Path) -> None:
    done = command("embed", "docs", "--out", "out.npy", "--max-cost", "5 EUR")
    assert done.code == 2
    assert "the price of the provider is in USD; write the limit in USD too" in done.err
    Path("embedonce.toml").write_text(CONFIG.replace(f'price = "{PRICE}"\n', ""))
    done = command("embed", "docs", "--out", "out.npy", "--max-cost", "5")
    assert done.code == 2
    assert f'write it into [provider], for example: price = "{PRICE}"' in done.err
    assert not Path("vectors.cache").exists()


@pytest.mark.skipif(os.name == "nt", reason="Windows has no named pipes")
def test_an_input_that_cannot_be_read_twice_is_refused(command: Any, corpus: Path) -> None:
    os.mkfifo("pipe")
    for path in ("-", "pipe"):
        done = command("embed", path, "--out", "out.npy", "--max-cost", "5", input="text")
        assert done.code == 2
        assert "the input is read twice" in done.err
        assert "--dry-run" in done.err
    assert not Path("vectors.cache").exists()


@pytest.mark.slow
@needs("openai")
@pytest.mark.parametrize(("answer", "code"), [(b"y\n", 0), (b"n\n", 1), (b"\n", 1), (b"\x04", 1), (b"\x03", 130)])
def test_on_a_terminal_it_asks(
    process: Callable[..., subprocess.Popen[str]], server: OpenAIServer, answer: bytes, code: int
) -> None:
    pty = pytest.importorskip("pty")
    terminal, inner = pty.openpty()
    Path("out.npy").write_bytes(b"earlier")
    arguments = ("embed", "third.txt", "--split", "line", "--out", "out.npy", "--max-cost", "0.0000001", "--json")
    started = process(*arguments, stdin=inner, stderr=inner, start_new_session=True, preexec_fn=take_terminal)
    os.close(inner)
    seen = b""
    while b"[y/N]" not in seen:
        seen += os.read(terminal, 2**16)
    assert re.search(rb"A run may cost up to 0.00\d+ USD, more than --max-cost 0.0000001 USD. Embed anyway\?", seen)
    assert not server.requests
    os.write(terminal, answer)
    out = None
    while out is None:
        try:
            out, _ = started.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            if answer == b"\x03":  # the signal came before the process began to wait for input, so it is still waiting
                os.write(terminal, answer)
    os.close(terminal)
    assert started.returncode == code
    assert ('"rows": 200' in out) == bool(server.requests) == (code == 0)
    assert (Path("out.npy").read_bytes() == b"earlier") == (code != 0)


def take_terminal() -> None:
    """Make the standard input the terminal that controls this process, so that Ctrl-C reaches it."""
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_run_that_costs_more_than_was_estimated_says_so() -> None:
    limit = CostLimit(Decimal("0.01"), Price.parse(PRICE))
    work = Work(texts=2, tokens=1_000_000, seconds=1.0)
    summary = Summary(spent=sum_cost(work, {"USD": Decimal("0.02")}))
    assert limit.describe_real_excess(summary) == "note: the run cost 0.020 USD, more than --max-cost 0.01 USD"
    assert limit.describe_real_excess(Summary(spent=sum_cost(work, {"USD": Decimal("0.01")}))) is None
    assert limit.describe_real_excess(Summary()) is None
    assert limit.is_exceeded(make_estimate(max_tokens=500_001))
    assert not limit.is_exceeded(make_estimate(max_tokens=500_000))


# --- numbers for people -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "rounded"),
    [
        ((1_234_567, 1_200_123, 1_270_123), (1_235_000, 1_200_000, 1_271_000)),
        ((5, 5, 5), (5, 5, 5)),
        ((0, 0, 7), (0, 0, 7)),
        ((100, 25, 399), (100, 20, 400)),
    ],
)
def test_an_estimate_is_rounded_within_its_bounds(numbers: tuple[int, int, int], rounded: tuple[int, int, int]) -> None:
    assert round_estimate(*numbers) == rounded


def test_an_estimate_names_its_bounds_and_its_sample() -> None:
    measured = make_estimate()
    assert describe_tokens(measured) == ("about 1,000,000 (± 3 %), measured on 50 texts with known tokens")
    assert describe_price(measured) == f"about 0.020 USD, at most 0.021 USD, at {PRICE}"
    assert "time of the provider's calls: about 1 min 30 s" in describe_dry_run(Summary(), measured)
    guessed = make_estimate(method="guessed", min_tokens=10, max_tokens=2_000_000)
    assert describe_price(guessed) == f"at most 0.040 USD, at {PRICE}"
    free = make_estimate(method="counted", tokens=0, min_tokens=0, max_tokens=0, price=None)
    assert "tokens: 0, so the price is 0" in describe_dry_run(Summary(), free)
    unknown = describe_dry_run(Summary(), make_estimate(seconds=None))
    assert "time of the provider's calls: unknown, because the tiers have no text with known seconds" in unknown
    assert not list(describe_tier_errors(measured))


NOT_INCLUDED = "(not included: 2 texts with unknown cost)"


@pytest.mark.parametrize(
    ("work", "money", "shown"),
    [
        (Work(), {}, None),
        (Work(3, 1200, 2.0), {"USD": "0.5"}, "1,200 tokens, 0.50 USD, 2 s of computation"),
        (Work(3, 1200, 0.5), {}, "1,200 tokens"),
        (Work(3, 0, 70.0, 3), {"USD": "0"}, "1 min 10 s of computation"),
        (Work(3, 0, 0.5, 3), {"USD": "0"}, None),
        (Work(3, 0, 2.0), {"USD": "0"}, "2 s of computation"),
        (Work(3, 40, 1.0, 2, 1), {"USD": "1"}, f"40 tokens, 1.00 USD, 1 s of computation {NOT_INCLUDED}"),
        (Work(3, 0, 0.0, 3, 3), {"USD": "0"}, "the cost of 3 texts is unknown"),
    ],
)
def test_an_unknown_cost_is_never_shown_as_zero(work: Work, money: dict[str, str], shown: str | None) -> None:
    assert describe_cost(sum_cost(work, {name: Decimal(text) for name, text in money.items()})) == shown


def test_the_progress_of_a_dry_run_shows_the_share_of_the_bytes() -> None:
    now = 0.0
    progress = ReadingProgress(1000, clock=lambda: now)
    assert progress.estimate_seconds_left() is None
    progress.start_window(100, 250)
    assert progress.completed == 0
    now = 2.0
    progress.add_results(hits=0, others=98, failed=2)
    assert progress.completed == 250
    assert progress.describe() == "100 passages  50/s  2 failed"
    assert progress.estimate_seconds_left() == 6.0


@pytest.mark.slow
def test_a_terminal_shows_the_progress(process: Callable[..., subprocess.Popen[str]], corpus: Path) -> None:
    pty = pytest.importorskip("pty")
    Path("long.txt").write_text("".join(f"line {line}\n" for line in range(30_000)))
    terminal, inner = pty.openpty()
    options = {"stderr": inner, "env": {**os.environ, "TERM": "xterm"}}
    started = process("embed", "long.txt", "--split", "line", "--dry-run", **options)
    os.close(inner)
    seen = b""
    try:
        while more := os.read(terminal, 2**16):
            seen += more
    except OSError:  # Linux raises it once the other end is closed
        pass
    os.close(terminal)
    out, _ = started.communicate(timeout=100)
    assert started.returncode == 0
    assert out.startswith("30,000 passages from 1 file")
    assert b"30,000 passages" in seen
    assert b"100%" in seen
