"""The commands other than ``embed``: output for people and for programs, and exit codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
from installed_plugins import write_distribution

import embedonce
from embedonce import config
from embedonce.answers import Purged
from embedonce.cli import output
from embedonce.cli.output import read_excerpt
from embedonce.errors import EraseIncomplete, Problem, TierError

ALL = ["init", "check", "embed", "evaluate", "explain", "stats", "purge", "plugins", "schema"]


@pytest.fixture
def filled_folder(command: Any, folder: Path) -> Path:
    """A folder with a configuration, and two texts in its disk tier."""
    assert command("init").code == 0
    assert command("embed", "-", "--out", "out.npy", input="one text\n\nanother").code == 0
    return folder


# --- all commands -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_help_has_options_and_examples(command: Any, name: str) -> None:
    done = command(name, "--help")
    assert done.code == 0
    assert "--json" in done.out
    assert "Examples:" in done.out
    assert f"embedonce {name}" in done.out


def test_top_level_help_and_version(command: Any) -> None:
    assert all(name in command("--help").out for name in ALL)
    assert command("--version").out.strip() == embedonce.__version__
    assert command("chekc").code == 2
    assert command("check", "--nope").code == 2


def test_the_module_is_the_same_command(folder: Path) -> None:
    result = subprocess.run([sys.executable, "-P", "-m", "embedonce", "--version"], capture_output=True, text=True)
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, embedonce.__version__, "")


@pytest.mark.parametrize("name", ["check", "stats", "explain", "purge"])
def test_every_problem_of_a_configuration_is_reported_without_a_traceback(
    command: Any, folder: Path, name: str
) -> None:
    Path("embedonce.toml").write_text(
        '[cache]\ndtyp = "int8"\n\n[provider]\ntype = "ngrm"\n\n[[tiers]]\ntype = "disk"\n'
    )
    more = {"explain": ["x"], "purge": ["--version", "v1", "--yes"]}.get(name, [])
    done = command(name, *more)
    assert done.code == 2
    assert 'error: embedonce.toml:2:1: unknown key "dtyp" in [cache]; did you mean "dtype"?' in done.err
    # Commands that compute nothing do not read [provider].
    assert ("error: embedonce.toml:5:8: " in done.err) == (name in ("check", "explain"))
    assert "Traceback" not in done.err
    assert "|" not in done.err, "only a terminal gets the line itself"
    assert done.out == ""


def test_a_terminal_shows_the_invalid_line(
    command: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("embedonce.toml").write_text("[cache]\n\tdtype\t= 1\n")
    assert read_excerpt(Problem("wrong", "embedonce.toml", 2, 10)) == ["    2 | \tdtype\t= 1", "      | \t     \t  ^"]
    assert read_excerpt(Problem("wrong", "embedonce.toml", 3, 1)) == []
    assert read_excerpt(Problem("wrong", "gone.toml", 1, 1)) == []
    assert read_excerpt(Problem("wrong")) == []
    monkeypatch.setattr(output.sys.stderr, "isatty", lambda: True)
    output.say_config_error(embedonce.ConfigError([Problem("wrong", "embedonce.toml", 1, 1), Problem("more")]))
    assert capsys.readouterr().err.splitlines() == [
        "error: embedonce.toml:1:1: wrong",
        "    1 | [cache]",
        "      | ^",
        "error: more",
    ]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (embedonce.PluginError("no plugin"), 2, "error: no plugin\n"),
        (TierError("it failed", "redis"), 1, "error: tier 'redis': it failed\n"),
        (EraseIncomplete("not all", {"redis": "OSError"}), 1, "error: not all\n  redis: OSError\n"),
        (PermissionError(13, "Permission denied", "x"), 1, "error: x: Permission denied\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_every_error_has_its_exit_code(
    command: Any, filled_folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, message: str
) -> None:
    def fails(cache: embedonce.Cache) -> Any:
        raise error

    monkeypatch.setattr(embedonce.Cache, "contents", fails)
    done = command("stats", "--json")
    assert (done.code, done.out, done.err) == (code, "", message)


# --- check ------------------------------------------------------------------------------------


def test_check_shows_the_chain(command: Any, filled_folder: Path) -> None:
    done = command("check")
    assert done.code == 0
    assert done.out.startswith("provider  ngram, model ")
    assert [line.split()[:3] for line in done.out.splitlines()[3:]] == [
        ["memory", "memory", "yes"],
        ["disk", "disk", "yes"],
    ]
    data = command("check", "--json").json
    assert data["ok"] is True
    assert data["provider"]["dimensions"] == 256
    assert [(tier["tier"], tier["type"], tier["ok"]) for tier in data["tiers"]] == [
        ("memory", "memory", True),
        ("disk", "disk", True),
    ]


def test_check_fails_if_a_tier_fails(command: Any, filled_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = [
        embedonce.TierCheck("memory", "memory", True, 0.0),
        embedonce.TierCheck("far", "redis", False, 0.2, "cut"),
    ]
    monkeypatch.setattr(embedonce.Cache, "check", lambda cache, verify: checks)
    done = command("check", "--json")
    assert (done.code, done.json["ok"]) == (1, False)
    assert done.err.endswith("error: 1 tier did not answer: far\n")
    assert "cut" in command("check").out


# --- explain ----------------------------------------------------------------------------------


def test_explain_names_the_tier_and_never_repeats_the_text(command: Any, filled_folder: Path) -> None:
    done = command("explain", "one text", "--json")
    assert done.code == 0
    assert (done.json["found"], done.json["tiers"]) == ("disk", {"memory": "miss", "disk": "hit"})
    assert "one text" not in done.out
    shown = command("explain", "one text").out
    assert done.json["key"] in shown
    assert "one text" not in shown
    assert command("explain", "not there", "--json").json["found"] is None


def test_explain_reads_standard_input_as_it_is(command: Any, filled_folder: Path) -> None:
    assert command("explain", "--stdin", "--json", input="one text").json["found"] == "disk"
    trimmed = command("explain", "--stdin", "--json", input="one text\n").json
    assert (trimmed["found"], trimmed["normalized"]) == ("disk", True)
    wrong = command("explain", "--stdin", input=b"\xff")
    assert (wrong.code, wrong.err) == (2, "error: standard input is not UTF-8 at byte 1\n")


@pytest.mark.parametrize("arguments", [[], ["a text", "--stdin"]])
def test_explain_requires_exactly_one_text(command: Any, filled_folder: Path, arguments: list[str]) -> None:
    done = command("explain", *arguments)
    assert (done.code, done.err) == (2, "error: explain requires either TEXT or --stdin\n")


# --- stats, plugins, schema -------------------------------------------------------------------


def test_stats_counts_entries_by_scope(command: Any, filled_folder: Path) -> None:
    command("embed", "-", "--out", "out.npy", "--config", "v2.toml", input="x")
    Path("v2.toml").write_text(Path("embedonce.toml").read_text().replace('version = "v1"', 'version = "v2"'))
    command("embed", "-", "--out", "out.npy", "--config", "v2.toml", input="x")
    held = command("stats", "--json").json
    assert held["entries"] == 3
    assert {(one["tier"], one["card"]["version"], one["entries"]) for one in held["held"]} == {
        ("disk", "v1", 2),
        ("disk", "v2", 1),
    }
    shown = command("stats").out
    assert all(one["scope"] in shown for one in held["held"])


def test_stats_of_empty_tiers(command: Any, folder: Path) -> None:
    command("init")
    assert command("stats").out == "The tiers are empty.\n"
    folders = {"disk": str(folder / ".embedonce")}
    shown = command("stats", "--json").json
    assert shown.pop("folder_bytes")["disk"] > 0
    assert shown == {"held": [], "entries": 0, "work": [], "errors": {}, "folders": folders}


def test_plugins_lists_the_installed_plugins(command: Any) -> None:
    names = {plugin["name"]: plugin["kinds"] for plugin in command("plugins", "--json").json}
    assert names["memory"] == names["disk"] == ["backend"]
    assert names["ngram"] == ["provider"]
    assert "ngram" in command("plugins").out


def test_a_plugin_that_cannot_be_used_is_shown(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDONCE_DISABLE_PLUGINS", "ngram")
    done = command("plugins", "--json")
    (disabled,) = [plugin for plugin in done.json if plugin["name"] == "ngram"]
    assert "disabled" in disabled["error"]
    assert done.code == 0, "it is disabled on purpose, not broken"


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["schema"], ["plugins", "--json"], ["check", "--json"]])
def test_output_printed_by_a_plugin_is_not_in_the_json_document(folder: Path, arguments: list[str]) -> None:
    write_distribution(folder / "site", "loud", "print('here I am')", plugins=["loud"], distribution="loud")
    environment = {**os.environ, "PYTHONPATH": str(folder / "site")}
    result = subprocess.run(
        [sys.executable, "-m", "embedonce", *arguments], env=environment, capture_output=True, text=True, timeout=100
    )
    assert "here I am" in result.stderr
    json.loads(result.stdout)


def test_schema_prints_the_schema(command: Any) -> None:
    assert command("schema").json == command("schema", "--json").json == json.loads(json.dumps(config.schema()))


# --- purge ------------------------------------------------------------------------------------


def count_entries(command: Any) -> int:
    count: int = command("stats", "--json").json["entries"]
    return count


def test_a_dry_run_removes_nothing(command: Any, filled_folder: Path) -> None:
    done = command("purge", "--version", "v1", "--dry-run", "--json")
    assert done.code == 0
    assert (done.json["removed"]["disk"], done.json["dry_run"]) == (2, True)
    assert "2 entries would be removed from disk" in command("purge", "--version", "v1", "--dry-run").out
    assert count_entries(command) == 2


def test_purge_removes_the_scopes_that_match_all_options(command: Any, filled_folder: Path) -> None:
    assert command("purge", "--version", "v1", "--namespace", "other", "--yes").out.endswith("nothing matches\n")
    scope = command("stats", "--json").json["held"][0]["scope"]
    done = command("purge", "--scope", scope, "--namespace", "", "--yes")
    assert done.code == 0
    assert "2 entries removed from disk" in done.out
    assert count_entries(command) == 0


def test_stats_and_purge_need_no_provider(command: Any, filled_folder: Path) -> None:
    config = Path("embedonce.toml")
    whole = config.read_text()
    tables = [table for table in re.split(r"\n(?=\[)", whole) if not table.startswith("[provider")]
    for written in ("\n".join(tables), whole.replace('type = "ngram"', 'type = "not-installed-here"')):
        config.write_text(written)
        assert count_entries(command) == 2
        assert command("purge", "--model", "char-ngram", "--dry-run").code == 0
    assert command("purge", "--model", "char-ngram", "--yes").code == 0
    assert count_entries(command) == 0


def test_purge_requires_a_selection(command: Any, filled_folder: Path) -> None:
    done = command("purge", "--yes")
    assert (done.code, count_entries(command)) == (2, 2)
    assert "--scope, --model, --version or --namespace" in done.err


def test_without_a_terminal_purge_requires_yes(command: Any, filled_folder: Path) -> None:
    done = command("purge", "--version", "v1", input="y\n")
    assert (done.code, count_entries(command)) == (2, 2)
    assert done.err == "error: cannot ask for confirmation without a terminal: add --yes, or try --dry-run first\n"


@pytest.mark.skipif(sys.platform == "win32", reason="closes a stream with a shell")
def test_with_a_closed_standard_input_purge_requires_yes(command: Any, filled_folder: Path) -> None:
    result = subprocess.run(
        ["sh", "-c", '"$0" -P -m embedonce purge --version v1 <&-', sys.executable], capture_output=True, text=True
    )
    assert (result.returncode, count_entries(command)) == (2, 2)
    assert result.stderr.startswith("error: cannot ask for confirmation")


@pytest.mark.slow
@pytest.mark.parametrize(("answer", "left"), [("y", 0), ("n", 2), ("", 2)])
def test_on_a_terminal_purge_asks(
    command: Any, filled_folder: Path, process: Callable[..., subprocess.Popen[str]], answer: str, left: int
) -> None:
    pty = pytest.importorskip("pty")
    import os

    terminal, inner = pty.openpty()
    started = process("purge", "--version", "v1", stdin=inner)
    os.close(inner)
    os.write(terminal, f"{answer}\n".encode())
    _, err = started.communicate(timeout=100)
    os.close(terminal)
    assert "2 entries would be removed from disk" in err
    assert "Remove this? [y/N]" in err
    assert ("nothing was removed" in err) == (left == 2)
    assert started.returncode == 0
    assert count_entries(command) == left


# --- errors and secrets -----------------------------------------------------------------------


def test_a_failing_tier_is_reported_with_its_cause(
    command: Any, filled_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(cache: embedonce.Cache) -> Any:
        raise TierError("it failed", "disk") from OSError("the store's own words")

    monkeypatch.setattr(embedonce.Cache, "contents", fails)
    done = command("stats")
    assert (done.code, done.err) == (1, "error: tier 'disk': it failed: the store's own words\n")
    Path("embedonce.toml").write_text(
        '[provider]\ntype = "ngram"\n[[tiers]]\ntype = "disk"\npath = "${MY_PATH}"\n', encoding="utf-8"
    )
    monkeypatch.setenv("MY_PATH", "own")
    assert command("stats").err == "error: tier 'disk': it failed\n", "the cause repeats a value from a variable"


@pytest.mark.parametrize(
    "text",
    [
        '[tiers]\npassword = "hunter2"\n',
        '[tiers]\npasword = "hunter2"\n',
        '[tiers]\nurl = "redis://me:hunter2@host"\n',
        '[tiers]\nheaders = [\n"x: hunter2",\n]\n',
        '[provider.headers]\nx = "hunter2"\n',
        '[tool.embedonce.provider.headers]\nx = "hunter2"\n',
        'key = { secret = "hunter2" }\n',
        '[key]\nsecret = """\nhunter2"""\n',
    ],
)
def test_a_line_with_a_secret_is_not_shown(folder: Path, text: str) -> None:
    Path("x.toml").write_text(text)
    number = next(n for n, line in enumerate(text.split("\n"), start=1) if "hunter2" in line)
    assert read_excerpt(Problem("wrong", "x.toml", number, 1)) == []


def test_an_excerpt_has_the_right_line_and_no_control_characters(folder: Path) -> None:
    Path("x.toml").write_text(
        '[key]\nversion = "a\u2028b"\r\nnormalize = 1 # \x1b[31m\r\n', encoding="utf-8", newline=""
    )
    shown = read_excerpt(Problem("wrong", "x.toml", 3, 13))
    assert shown == ["    3 | normalize = 1 #  [31m", "      | " + " " * 12 + "^"]


def test_an_invalid_scope_is_invalid_usage(command: Any, filled_folder: Path) -> None:
    assert command("purge", "--scope", "zz", "--yes").code == 2


def test_ctrl_c_at_the_question_of_a_purge(command: Any, filled_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from embedonce.cli import purge

    def interrupted(*_: Any, **__: Any) -> bool:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise typer.Abort from None

    monkeypatch.setattr(purge.typer, "confirm", interrupted)
    with pytest.raises(KeyboardInterrupt):
        purge._confirm_purge(Purged({}, {}))


def test_ctrl_c_during_the_imports(folder: Path) -> None:
    code = """
import sys
class Interrupts:
    def find_spec(self, name, *_):
        if name == "typer":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupts())
from embedonce.cli import main
main()
"""
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (130, "interrupted\n")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="closes a stream with a shell")
@pytest.mark.parametrize("name", ["check", "plugins", "schema"])
def test_a_closed_output_causes_no_traceback(folder: Path, name: str) -> None:
    result = subprocess.run(
        ["sh", "-c", f'"$0" -P -m embedonce {name} >&-', sys.executable], capture_output=True, text=True
    )
    assert result.returncode == 0
    assert "Traceback" not in result.stderr


def test_no_color_disables_every_style(folder: Path) -> None:
    environment = {**os.environ, "NO_COLOR": "1", "FORCE_COLOR": "1"}
    result = subprocess.run(
        [sys.executable, "-P", "-m", "embedonce", "--help"], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0
    assert "\x1b" not in result.stdout
