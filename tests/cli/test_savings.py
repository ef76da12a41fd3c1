"""``embedonce savings`` and the work that ``embedonce stats`` shows."""

from __future__ import annotations

import json
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from optional import needs
from typer.testing import CliRunner

from embedonce import Cache, KeyPolicy, Tier
from embedonce.cli import app
from embedonce.testing.fakes import CountingProvider
from embedonce.vectors import Work
from embedonce_backends.disk import DiskBackend
from embedonce_backends.memory import MemoryBackend

CONFIG = '[[tiers]]\ntype = "memory"\n[[tiers]]\ntype = "disk"\npath = "vectors"\n'
DAY = 86_400.0


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "embedonce.toml").write_text(CONFIG)
    return tmp_path


def work(model: str = "m", *, times: int = 1, price: str | None = "0.5 USD / 1K tokens", ago: float = 0.0) -> None:
    """Compute three texts with six tokens, unless they are stored, and look them up ``times`` times."""
    now = time.time() - ago * DAY
    with Cache(
        CountingProvider(model=model), [MemoryBackend(), DiskBackend(path="vectors")], price=price, clock=lambda: now
    ) as cache:
        for _ in range(1 + times):
            cache.embed_batch(["a", "bb", "ccc"])


def run(*arguments: str, code: int = 0) -> tuple[str, str]:
    result = CliRunner().invoke(app, ["savings", *arguments])
    assert result.exit_code == code, result.output
    return result.stdout, result.stderr


def read_json(*arguments: str, code: int = 0) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(run(*arguments, "--json", code=code)[0])
    return document


@pytest.mark.parametrize("by", ["model", "namespace", "tier"])
def test_no_name_of_another_program_controls_the_terminal(by: str) -> None:
    name = "[red]x\x1b]0;title\x07\r\nline" + "long" * 100
    with Cache(
        CountingProvider(model=name), [Tier(DiskBackend(path="vectors"), name=name)], key=KeyPolicy(namespace=name)
    ) as cache:
        cache.embed_batch(["a"])
        cache.forget(["a"])
        cache.embed_batch(["b"])
        cache.embed_batch(["b"])
    out, _ = run("--by", by)
    assert "[red]x\\x1b]0;title\\x07\\r\\nline" in out.replace(" ", "")
    stats = CliRunner().invoke(app, ["stats"]).stdout
    assert not {"\x1b", "\x07", "\r"} & set(out + stats)
    assert max(len(line) for line in out.splitlines() if "█" in line or "░" in line) < 160


@needs("matplotlib")
def test_a_plot_escapes_the_characters_that_a_font_lacks() -> None:
    work("$x\x1b\x07$")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run("--plot", "plot.png")
    assert Path("plot.png").stat().st_size > 1000


def test_a_console_without_block_characters_shows_bars_of_ascii() -> None:
    work()
    result = CliRunner(charset="ascii").invoke(app, ["savings"])
    assert result.exit_code == 0
    (bar,) = [line for line in result.stdout.splitlines() if line.endswith(" saved")]
    assert bar == f"m  {'#' * 20}{'-' * 20} 50.0 % saved"


def test_a_table_and_a_bar_chart() -> None:
    work()
    work("n", times=3)
    out, err = run()
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["model", "work", "texts", "tokens", "time", "money"]
    assert [line[:4] for line in lines if line[:2] == ["n", "computed"]] == [["n", "computed", "3", "6"]]
    assert ["saved", "9", "18"] in [line[:3] for line in lines]
    assert ["total", "computed", "6", "12"] in [line[:4] for line in lines]
    saved = [line for line in lines if line[:3] == ["saved", "12", "24"]]
    assert saved[0][-2:] == ["0.012", "USD"]
    bars = [line for line in out.splitlines() if "█" in line]
    assert [bar.split()[0] for bar in bars] == ["n", "m"]  # the largest saving first
    assert bars[0].count("█") == 30
    assert bars[0].count("░") == 10
    assert bars[0].endswith("75.0 % saved")
    assert err == ""


def test_one_json_document_has_every_number() -> None:
    work(times=2)
    document = read_json()
    assert (document["by"], document["since"], document["tiers"], document["errors"]) == ("model", None, ["disk"], {})
    (group,) = document["groups"]
    assert group["name"] == "m"
    for kind, texts, tokens in (("computed", 3, 6), ("saved", 6, 12)):
        assert set(group[kind]) == {*Work._fields, "money"}
        assert (group[kind]["texts"], group[kind]["tokens"], group[kind]["unknown_tokens"]) == (texts, tokens, 0)
    assert group["computed"]["money"] == {"USD": "0.003"}
    assert group["saved"]["money"] == {"USD": "0.006"}
    assert document["total"] == {"computed": group["computed"], "saved": group["saved"]}


def test_by_tier_the_provider_has_the_computed_work() -> None:
    work()
    work(times=0)
    groups = {group["name"]: group for group in read_json("--by", "tier")["groups"]}
    assert {name: (group["computed"]["texts"], group["saved"]["texts"]) for name, group in groups.items()} == {
        "memory": (0, 3),
        "disk": (0, 3),
        "provider": (3, 0),
    }
    assert "33.3 % of all texts" in run("--by", "tier")[0]


@pytest.mark.parametrize(
    ("since", "days"),
    [(None, [400, 40, 2, 0]), ("30d", [2, 0]), ("90d", [40, 2, 0]), ("{2}", [2, 0]), ("{1}", [0]), ("1h", [0])],
)
def test_since_leaves_out_earlier_days(since: str | None, days: list[int]) -> None:
    for number, ago in enumerate((400, 40, 2, 0)):
        work(f"m{number}", ago=ago)
    dates = {ago: datetime.fromtimestamp(time.time() - ago * DAY, UTC).date().isoformat() for ago in (400, 40, 2, 1, 0)}
    for ago, date in dates.items():
        since = since.replace(f"{{{ago}}}", date) if since else since
    document = read_json("--by", "day", *([] if since is None else ["--since", since]))
    expected = [dates[ago] for ago in days if ago != 400]  # records expire after a year
    assert [group["name"] for group in document["groups"]] == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--since", "yesterday"], "30d"),
        (["--since", "2026-02-30"], "2026-01-31"),
        (["--since", "-3d"], "30d"),
        (["--by", "colour"], "tier, model, namespace, day"),
        (["--plot", "a.txt"], ".png"),
        (["--plot", "missing/a.png"], "missing"),
    ],
)
def test_wrong_options_are_refused(arguments: list[str], message: str) -> None:
    _, err = run(*arguments, code=2)
    assert message in " ".join(err.replace("│", " ").split())


def test_without_records_the_output_says_so() -> None:
    assert run()[0] == "No record of work found in disk.\n"
    assert "since" in run("--since", "2026-01-01")[0]
    assert read_json()["groups"] == []


def test_without_a_tier_that_keeps_records_the_command_fails(here: Path) -> None:
    (here / "embedonce.toml").write_text('[[tiers]]\ntype = "memory"\n')
    out, err = run(code=1)
    assert out == ""
    assert "Add a disk, Redis or Postgres tier" in err


def test_a_tier_that_fails_is_named_and_the_code_is_1(here: Path) -> None:
    work()
    text = CONFIG + '[[tiers]]\ntype = "redis"\nurl = "redis://127.0.0.1:1"\n'
    pytest.importorskip("redis")
    (here / "embedonce.toml").write_text(text)
    out, err = run(code=1)
    assert "m " in out
    assert "tier 'redis'" in err
    assert list(read_json(code=1)["errors"]) == ["redis"]


def test_unknown_tokens_are_named(here: Path) -> None:
    work()
    with Cache(CountingProvider(model="m"), [DiskBackend(path="vectors")]) as cache:
        cache.put(["new"], [cache.embed("a")])
        cache.embed("new")
    assert "the tokens of 1 saved text are unknown" in run()[1]


def test_a_model_that_reports_no_tokens_has_none_in_the_table() -> None:
    def embed(texts: list[str]) -> list[list[float]]:
        return [[1.0, 2.0]] * len(texts)

    with Cache(embed, [DiskBackend(path="vectors")], space={"model": "local"}, price="1 USD / 1 token") as cache:
        cache.embed("x")
        cache.embed("x")
    out, err = run()
    rows = [line.split() for line in out.splitlines() if line.split()[1:2] == ["computed"] or "saved " in line]
    assert (rows[0][:4], rows[0][-1]) == (["local", "computed", "1", "-"], "-")
    assert (rows[1][:3], rows[1][-1]) == (["saved", "1", "-"], "-")
    assert err == ""


def test_a_namespace_without_a_name_has_a_bar_too() -> None:
    work()
    assert "(none)" in run("--by", "namespace")[0]
    assert read_json("--by", "namespace")["groups"][0]["name"] == ""


@needs("matplotlib")
@pytest.mark.parametrize("by", ["tier", "model", "namespace", "day"])
def test_the_plot_is_written(here: Path, by: str) -> None:
    work("$a_{b$")
    work("a model with a name that is much longer than any axis", times=4)
    _, err = run("--by", by, "--plot", "savings.png")
    assert "wrote savings.png" in err
    assert (here / "savings.png").read_bytes().startswith(b"\x89PNG")


def test_stats_show_the_work_of_each_scope_by_tier() -> None:
    work(times=2)
    result = CliRunner().invoke(app, ["stats", "--json"])
    (scope,) = json.loads(result.stdout)["work"]
    assert (scope["provider"], scope["model"], scope["computed"]["tokens"]) == ("counting", "m", 6)
    assert {tier: saved["tokens"] for tier, saved in scope["saved"].items()} == {"memory": 12}
    (row,) = [line for line in CliRunner().invoke(app, ["stats"]).stdout.splitlines() if "saved by memory" in line]
    assert row.split("saved by memory")[1].split()[:2] == ["6", "12"]
    assert row.split()[-2:] == ["0.0060", "USD"]
