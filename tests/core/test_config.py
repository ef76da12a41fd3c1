"""Configurations: how a file is found and read, how values are overridden, and where problems are reported."""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import optional
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from installed_plugins import write_distribution

import embedonce
from embedonce import KeyPolicy, config, plugins
from embedonce._config.documents import Document, read_document
from embedonce._config.places import Place, find_places
from embedonce._config.tables import CacheTable, FallbackTable, KeyTable, PluginsTable, ProviderTable, TierTable
from embedonce._plugins.options import options_of
from embedonce.errors import ConfigError, Problem
from embedonce_providers.ngram import NgramProvider

NGRAM = '[provider]\ntype = "ngram"\n'
PLAIN = f'{NGRAM}[[tiers]]\ntype = "memory"\n'

PROBE = '''
"""Plugins that record their creation and closing."""
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal
import embedonce
from embedonce.options import Doc, Duration, Size
from embedonce_backends.memory import MemoryBackend
from embedonce_providers.ngram import NgramProvider

made, closed = [], []

class Probe(MemoryBackend):
    capabilities = MemoryBackend.capabilities

    def __init__(
        self, *, url: str = "", password: str | None = None, path: Path | None = None, folder: str | Path | None = None,
        servers: Sequence[str] = (), headers: Mapping[str, str] | None = None, pool: Mapping[str, int] | None = None,
        verbose: bool = False, size: Size = 0, wait: Duration = 0.0, ratio: float = 0.5, fail: str = "",
        level: Literal["low", "high"] = "low",
    ):
        if fail:
            raise OSError(f"{fail} {url} {password}")
        super().__init__()
        self.given = dict(locals())
        made.append(self)

    def close(self):
        closed.append(self)
        super().close()

class Wide(NgramProvider):
    def __init__(self, *, dimensions: int = 64, token: str = "") -> None:
        super().__init__(dimensions=dimensions)
        made.append(self)

    def close(self):
        closed.append(self)
        super().close()

@embedonce.hookimpl
def embedonce_backends():
    return {"probe": Probe}

@embedonce.hookimpl
def embedonce_providers():
    return {"wide": Wide}
'''


@pytest.fixture(scope="module")
def probe_site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    site = tmp_path_factory.mktemp("probe")
    write_distribution(site, "config_probe", PROBE, plugins=["probe", "wide"], distribution="probe")
    return site


@pytest.fixture
def probe(probe_site: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A module with two plugins: the backend ``probe`` and the provider ``wide``."""
    monkeypatch.syspath_prepend(str(probe_site))
    import config_probe  # type: ignore[import-not-found]

    module: ModuleType = config_probe
    module.made.clear()
    module.closed.clear()
    return module


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run each test in its own folder, which is several levels deep."""
    folder = tmp_path / "top" / "middle" / "here"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


def problems(source: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.load(source)
    assert str(caught.value).splitlines() == [str(problem) for problem in caught.value.problems]
    return [str(problem) for problem in caught.value.problems]


def problems_of(text: str, name: str = "embedonce.toml") -> list[str]:
    Path(name).write_text(inspect.cleandoc(text) if text.startswith("\n") else text, encoding="utf-8")
    return problems(name)


# --- finding a file ---------------------------------------------------------------------------


def test_without_any_configuration_there_are_defaults(own_home: Path) -> None:
    found = config.load()
    assert found.source == "defaults, since no configuration was found"
    assert found.file is None
    assert found.provider.type == "ngram"
    assert [tier.type for tier in found.tiers] == ["memory", "disk"]
    assert Path(found.tiers[1].options["path"]).is_relative_to(own_home)
    text = "a text that no other test stores in the cache folder of the user"
    with embedonce.open() as cache:
        assert cache.fetch([text]).sources == ["provider"]
    with embedonce.open() as cache:
        assert cache.fetch([text]).sources == ["disk"]


def test_a_file_here_or_above(here: Path) -> None:
    top = here.parent.parent
    (top / "embedonce.toml").write_text(PLAIN)
    assert config.load().file == top / "embedonce.toml"
    (here.parent / "pyproject.toml").write_text("[tool.other]\n# about embedonce\n")
    assert config.load().file == top / "embedonce.toml"
    (here.parent / "pyproject.toml").write_text(
        PLAIN.replace("[p", "[tool.embedonce.p").replace("[[t", "[[tool.embedonce.t")
    )
    found = config.load()
    assert found.file == here.parent / "pyproject.toml"
    assert found.source.startswith("[tool.embedonce] in ")
    (here.parent / "embedonce.toml").write_text(PLAIN)
    assert config.load().file == here.parent / "embedonce.toml"
    (here / "embedonce.toml").write_text(PLAIN)
    assert config.load().source == "embedonce.toml"


def test_the_variable_overrides_what_is_found(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "embedonce.toml").write_text(PLAIN)
    (here / "other.toml").write_text(PLAIN)
    monkeypatch.setenv("EMBEDONCE_CONFIG", "other.toml")
    assert config.load().source == "EMBEDONCE_CONFIG=other.toml"
    assert config.load("embedonce.toml").source == "embedonce.toml"
    monkeypatch.setenv("EMBEDONCE_CONFIG", "")
    assert config.load().source == "embedonce.toml"
    monkeypatch.setenv("EMBEDONCE_CONFIG", "nowhere.toml")
    assert problems(None) == ["nowhere.toml: there is no such file (EMBEDONCE_CONFIG); embedonce init writes one"]


def test_a_broken_pyproject_of_another_tool_is_ignored(here: Path) -> None:
    (here / "pyproject.toml").write_text("[project\nname = embedonce")
    (here.parent / "pyproject.toml").write_bytes(b"embedonce \xff")
    assert config.load().file is None


def test_a_broken_pyproject_with_our_table_is_an_error(here: Path) -> None:
    (here / "pyproject.toml").write_text("[tool.embedonce\n")
    assert problems(None)[0].startswith("pyproject.toml:1:16: not valid TOML: ")


def test_a_file_that_cannot_be_read(here: Path) -> None:
    assert problems("nowhere.toml") == ["nowhere.toml: there is no such file; embedonce init writes one"]
    assert problems(here)[0].startswith(".: cannot be read: ")
    (here / "latin.toml").write_bytes(b'x = "\xe9"')
    assert problems("latin.toml") == ["latin.toml:1:6: cannot be read: byte 6 is not UTF-8"]
    (here / "pyproject.toml").write_text("[project]\n")
    assert problems(Path("pyproject.toml")) == ["pyproject.toml: has no [tool.embedonce]"]
    assert problems(7) == ["expected a path or a dict as configuration, or None to look for a file, got int"]


def test_a_byte_order_mark_and_windows_lines(here: Path) -> None:
    (here / "w.toml").write_bytes(b"\xef\xbb\xbf" + PLAIN.replace("\n", "\r\n").encode() + b"ttl = 0\r\n")
    assert problems("w.toml") == ['w.toml:5:7: ttl = 0 in [[tiers]] "memory": must be greater than 0']


# --- what it contains -------------------------------------------------------------------------


def test_every_option_of_a_file_reaches_the_cache() -> None:
    Path("embedonce.toml").write_text(
        """
        [cache]
        dtype = "float16"
        mode = "replay"
        max_wait = "2m"
        flush_timeout = 0
        max_queued = 7
        [key]
        version = "v2"
        normalize = ["nfc", "strip"]
        namespace = "tests"
        hash = "blake2b"
        secret = "much"
        [provider]
        type = "ngram"
        dimensions = 32
        price = "0.02 USD per 1000K tokens"
        coalesce = "2ms"
        [provider.fallback]
        type = "ngram"
        fetch_only = true
        price = "0.1 EUR / 1K tokens"
        [[tiers]]
        type = "memory"
        name = "first"
        ttl = "1h30m"
        on_error = "raise"
        max_bytes = "2 MiB"
        [[tiers]]
        type = "disk"
        path = "vectors"
        timeout = "250ms"
        write = "background"
        """
    )
    found = config.load()
    assert found.key == KeyPolicy(
        version="v2", normalize=("nfc", "strip"), namespace="tests", hash="blake2b", secret="much"
    )
    assert (found.cache.dtype, found.cache.mode, found.cache.max_wait) == ("float16", "replay", 120)
    assert (found.cache.flush_timeout, found.cache.max_queued) == (0, 7)
    assert found.provider.options == {"dimensions": 32}
    assert found.fallback is not None
    assert found.fallback.options == {}
    assert (found.provider.price, found.fallback.price) == ("0.02 USD / 1M tokens", "0.1 EUR / 1K tokens")
    assert (found.provider.coalesce, found.fallback.coalesce) == (0.002, None)
    assert found.fallback_fetch_only is True
    first, second = found.tiers
    assert (first.name, first.ttl, first.on_error, first.options) == ("first", 5400, "raise", {"max_bytes": 2**21})
    assert (second.name, second.timeout, second.write) == ("disk", 0.25, "background")
    assert Path(second.options["path"]) == Path.cwd() / "vectors"
    with config.compose(found) as cache:
        assert list(cache.tiers) == ["first", "disk"]
        with pytest.raises(embedonce.ReplayMiss):
            cache.embed("never seen")


def test_a_dict_has_the_same_shape_as_the_file() -> None:
    tier = {"type": "memory", "max_entries": 3}
    with embedonce.open({"cache": {"dtype": "int8"}, "provider": {"type": "ngram"}, "tiers": [tier]}) as cache:
        assert cache.fetch(["a"]).sources == ["provider"]
        assert cache.fetch(["a"]).sources == ["memory"]
    assert problems({"provider": {"type": "ngram"}, "tiers": [{**tier, "max_entries": 0}]}) == [
        'max_entries = 0 in [[tiers]] "memory": must be greater than 0'
    ]


def test_without_tiers_every_text_is_embedded() -> None:
    with embedonce.open({"provider": {"type": "ngram"}, "tiers": []}) as cache:
        assert cache.fetch(["a", "a"]).sources == ["provider", "provider"]


def test_a_dict_may_hold_paths_and_tuples(tmp_path: Path, probe: ModuleType) -> None:
    tier = {"type": "probe", "path": tmp_path, "folder": "in/here", "servers": ("a", "b")}
    config.compose(config.load({"provider": {"type": "ngram"}, "tiers": (tier,)})).close()
    given = probe.made[0].given
    assert given["path"] == tmp_path
    assert given["folder"] == str(Path.cwd() / "in/here")
    assert given["servers"] == ["a", "b"]


def test_a_relative_path_starts_at_the_folder_of_its_file(here: Path, probe: ModuleType, own_home: Path) -> None:
    (here.parent / "embedonce.toml").write_text(NGRAM + '[[tiers]]\ntype = "probe"\npath = "a/b"\nfolder = "~/c"')
    options = config.load().tiers[0].options
    assert options == {"path": here.parent / "a/b", "folder": str(own_home / "c")}


# --- variables --------------------------------------------------------------------------------


def test_variables_in_text(probe: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIZE", "3 kB")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("SERVERS", "a, b")
    tier = {
        "type": "${KIND:-probe}",
        "url": "x://${HOST:-localhost}:${PORT:-1}/$$HOME $5 $",
        "size": "${SIZE}",
        "password": "a${EMPTY}b${EMPTY:-c}",
        "ratio": "${RATIO:-0.25}",
        "verbose": "${VERBOSE:-true}",
        "servers": "${SERVERS}",
        "pool": {"a": 1},
        "headers": {"x": "${HOST:-y}"},
    }
    found = config.load({"provider": {"type": "ngram"}, "tiers": [tier]})
    assert found.tiers[0].options == {
        "url": "x://localhost:1/$HOME $5 $",
        "size": 3000,
        "password": "abc",
        "ratio": 0.25,
        "verbose": True,
        "servers": ["a", "b"],
        "pool": {"a": 1},
        "headers": {"x": "y"},
    }


def test_a_variable_that_is_not_set_is_named_with_its_place() -> None:
    text = f'{PLAIN}max_entries = "${{COUNT}}"\nttl = "${{2}}"'
    assert problems_of(text) == [
        'embedonce.toml:5:15: max_entries in [[tiers]] "memory" needs the environment variable COUNT, which is not '
        "set; set it, or write ${COUNT:-default}",
        'embedonce.toml:6:7: ttl in [[tiers]] "memory" has a ${ that is not ${NAME} or ${NAME:-default}; '
        "write $$ for a dollar sign",
    ]


@pytest.mark.parametrize(
    "text",
    [
        PLAIN + '[key]\nsecret = "${UNSET}"',
        pytest.param(
            'tiers = []\n[provider]\ntype = "openai"\nmodel = "m"\napi_key = "${UNSET}"', marks=optional.needs("openai")
        ),
        PLAIN + '[serve]\nadmin_key = "${UNSET}"',
        PLAIN + '[[serve.tenants]]\nname = "a"\nkeys = ["sha256:${UNSET}"]',
    ],
)
def test_no_default_is_proposed_for_the_variable_of_a_secret(text: str) -> None:
    (problem,) = problems_of(text)
    assert problem.endswith(
        "needs the environment variable UNSET, which is not set; set it before you start the program"
    )


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[provider]\ntype = 'ngram'\ncoalesce = '2s'", "must be at most 1s"),
        ("[provider]\ntype = 'ngram'\ncoalesce = 0", "must be greater than 0"),
        (PLAIN + "[[serve.tenants]]\nname = 'a'\nkeys = ['0123456789abcdef']\nrequests_per_minute = 0", "than 0"),
        (PLAIN + "[serve]\nmax_body = 1000", "must be at least 1 KiB"),
    ],
)
def test_a_bound_is_written_as_its_option_is(text: str, wanted: str) -> None:
    (problem,) = problems_of(text if "tiers" in text else "tiers = []\n" + text)
    assert problem.endswith(wanted)


def test_text_is_not_converted_to_a_number() -> None:
    assert problems_of(f'{PLAIN}max_entries = "20"') == [
        'embedonce.toml:5:15: max_entries = "20" in [[tiers]] "memory": must be a whole number'
    ]


def test_the_environment_overrides_values(monkeypatch: pytest.MonkeyPatch) -> None:
    tiers = [{"type": "memory", "name": "hot-one", "ttl": 1}, {"type": "memory", "name": "a__b"}]
    source = {"provider": {"type": "ngram", "fallback": {"type": "ngram"}}, "tiers": tiers}
    for name, text in {
        "CACHE__DTYPE": "int8",
        "KEY__NORMALIZE": "nfc,strip",
        "KEY__SECRET": "1234",
        "PROVIDER__DIMENSIONS": "128",
        "PROVIDER__FALLBACK__DIMENSIONS": "64",
        "PROVIDER__FALLBACK__FETCH_ONLY": "true",
        "TIERS__HOT_ONE__TTL": "30m",
        "TIERS__HOT_ONE__MAX_ENTRIES": "5",
        "TIERS__A__B__MAX_BYTES": "1 kB",
    }.items():
        monkeypatch.setenv(f"EMBEDONCE__{name}", text)
    monkeypatch.setenv("embedonce__tiers__a__b__policy", "lru")
    found = config.load(source)
    assert found.cache.dtype == "int8"
    assert found.key == KeyPolicy(normalize=("nfc", "strip"), secret="1234")
    assert found.provider.options == {"dimensions": 128}
    assert found.fallback is not None
    assert found.fallback.options == {"dimensions": 64}
    assert found.fallback_fetch_only is True
    assert (found.tiers[0].ttl, found.tiers[0].options) == (1800, {"max_entries": 5})
    assert found.tiers[1].options == {"max_bytes": 1000, "policy": "lru"}


def test_the_environment_overrides_a_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMBEDONCE__TIERS__DISK__TYPE", "memory")
    found = config.load({"provider": {"type": "ngram"}, "tiers": [{"type": "disk"}]})
    assert (found.tiers[0].name, found.tiers[0].type) == ("disk", "memory")


def test_an_invalid_override_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {
        "CACHE__DTYPE": "hunter2",
        "CACH__DTYPE": "int8",
        "TIERS__MEMORY__TTLL": "hunter2",
        "TIERS__MEMORY__NAME": "hunter2",
        "TIERS__MEMORY__TIMEOUT": "1s",
        "KEY__NORMALIZE": "strip,hunter",
        "": "x",
    }.items():
        monkeypatch.setenv(f"EMBEDONCE__{name}", text)
    assert problems({"provider": {"type": "ngram"}, "tiers": [{"type": "memory"}]}) == [
        'EMBEDONCE__CACHE__DTYPE: must be "float32", "float16" or "int8"',
        "EMBEDONCE__KEY__NORMALIZE: no normalisation step of that name. embedonce provides nfc, nfkc, strip, "
        "collapse-whitespace, casefold, newlines, surrogates; plugins can add steps; an entry point must have the name "
        "of the step",
        "EMBEDONCE__TIERS__MEMORY__TIMEOUT: the tier does not support a timeout, because the tier keeps its entries in "
        'this process and its calls do not wait; remove "timeout"',
        "the environment variable EMBEDONCE__ overrides nothing",
        "the environment variable EMBEDONCE__CACH__DTYPE overrides nothing; did you mean EMBEDONCE__CACHE__DTYPE?",
        "the environment variable EMBEDONCE__TIERS__MEMORY__NAME overrides nothing: a tier's name cannot "
        "be overridden, because the name identifies the tier",
        "the environment variable EMBEDONCE__TIERS__MEMORY__TTLL overrides nothing; did you mean "
        "EMBEDONCE__TIERS__MEMORY__TTL?",
    ]


# --- problems ---------------------------------------------------------------------------------


def test_all_problems_are_reported_together_each_with_its_place() -> None:
    text = """
        max_wait = 5
        [cache]
        dtype = "float8"
        max_queued = true
        [key]
        normalize = ["nfc", "stripp", 3]
        secrt = "a"
        [provider]
        type = "ngrm"
        "dimensions" = 128
        [[tiers]]
        type = "memory"
        max_entrys = 2048
        timeout = "1s"
        max_bytes = "3 zb"
        [[tiers]]
        type = "memory"
        policy = "lruu"
        [[tiers]]
        name = "Bad Name"
        [tire]
        [other.thing]
    """
    assert problems_of(text) == [
        'embedonce.toml:1:1: unknown key "max_wait"; it belongs in [cache]',
        'embedonce.toml:3:9: dtype = "float8" in [cache]: must be "float32", "float16" or "int8"; '
        'did you mean "float32"?',
        "embedonce.toml:4:14: max_queued = true in [cache]: must be a whole number",
        'embedonce.toml:6:21: normalize in [key]: no normalisation step "stripp"; did you mean "strip"? embedonce '
        "provides nfc, nfkc, strip, collapse-whitespace, casefold, newlines, surrogates; plugins can add steps; an "
        "entry point must have the name of the step",
        "embedonce.toml:6:31: normalize[2] = 3 in [key]: must be text",
        'embedonce.toml:7:1: unknown key "secrt" in [key]; did you mean "secret"?',
        'embedonce.toml:9:8: type in [provider]: no plugin "ngrm" is installed; did you mean "ngram"? '
        f"Installed: {', '.join(plugins.names())}",
        'embedonce.toml:13:1: unknown key "max_entrys" in [[tiers]] "memory"; did you mean "max_entries"?',
        'embedonce.toml:14:1: timeout in [[tiers]] "memory": the tier does not support a timeout, because the tier '
        'keeps its entries in this process and its calls do not wait; remove "timeout"',
        'embedonce.toml:15:13: max_bytes = "3 zb" in [[tiers]] "memory": has an unknown unit; use B, kB, MB, GB, TB, '
        "KiB, MiB, GiB or TiB",
        'embedonce.toml:17:8: another tier is already named "memory"; choose another name: name = "memory2"',
        'embedonce.toml:18:10: policy = "lruu" in [[tiers]] "memory": must be "segmented" or "lru"; '
        'did you mean "lru"?',
        'embedonce.toml:19:1: "type" is missing in [[tiers]] "Bad Name"; add it: name of a plugin, such as '
        'type = "memory"',
        'embedonce.toml:20:8: "Bad Name" is not a valid tier name: it must start with a letter a-z and contain only '
        'a-z, 0-9, - and _; for example: "bad-name"',
        "embedonce.toml:21:1: unknown table [tire]; did you mean [[tiers]]?",
        "embedonce.toml:22:1: unknown table [other]; valid tables are [cache], [key], [plugins], "
        "[provider], [drift], [[tiers]], [[imports]], [embed] and [serve]",
    ]


def test_in_a_pyproject_tables_are_named_as_they_are_written() -> None:
    text = """
        [project]
        name = "x"
        [tool.embedonce]
        provider = { type = "ngram", dimension = 3 }
        [[tool.embedonce.tiers]]
        type = "memory"
        max_entrys = 1
        [tool.embedonce.cahce]
    """
    assert problems_of(text, "pyproject.toml") == [
        'pyproject.toml:4:30: unknown key "dimension" in [tool.embedonce.provider]; did you mean "dimensions"?',
        'pyproject.toml:7:1: unknown key "max_entrys" in [[tool.embedonce.tiers]] "memory"; '
        'did you mean "max_entries"?',
        "pyproject.toml:8:1: unknown table [tool.embedonce.cahce]; did you mean [tool.embedonce.cache]?",
    ]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "[provider] is missing; add one, such as [provider] type = "),
        ("", "[[tiers]] is missing; add at least one tier, or write tiers = [] to store nothing"),
        (NGRAM + "tiers = 1", ':3:1: unknown key "tiers" in [provider]'),
        ("tiers = 1\n" + NGRAM, ":1:9: tiers must be a list of tables: write [[tiers]]"),
        ("tiers = [1]\n" + NGRAM, ":1:10: [[tiers]] number 1 must be a table"),
        ("cache = 1\n" + PLAIN, ":1:9: [cache] must be a table"),
        ("tiers = []\nprovider = 'ngram'", ":2:12: [provider] must be a table"),
        ("tiers = []\n[provider]\ntype = 5", ":3:8: type = 5 in [provider]: must be text"),
        ("tiers = []\n[provider]\ntype = 'memory'", '"memory" is not a provider; embedonce '),
        (NGRAM + "fallback = 1\n[[tiers]]\ntype='memory'", ":3:12: [provider.fallback] must be a table"),
        (NGRAM + "[provider.fallback]\ntype = 'x'\n[[tiers]]\ntype='memory'", ":4:8: type in [provider.fallback]: no"),
        (PLAIN + "name = 'provider'", ':5:8: "provider" is not a valid tier name: it is reserved'),
        (PLAIN + "name = 'a-b'\n[[tiers]]\ntype='memory'\nname='a_b'", ':8:6: another tier is already named "a-b"'),
        (PLAIN + "name = 5", ':5:8: name = 5 in [[tiers]] "memory": must be text'),
        (PLAIN + "ttl = 0", ":5:7: ttl = 0 in [[tiers]]"),
        (PLAIN + "ttl = -1", "ttl = -1 in [[tiers]] \"memory\": must be at least 0"),
        (PLAIN + "ttl = nan", ':5:7: ttl in [[tiers]] "memory" must be a finite number'),
        (PLAIN + "ttl = 2020-01-01", ":5:7: ttl in [[tiers]] \"memory\" must be text, a number, true or false, a list"),
        (PLAIN + "max_entries = 99999999999999999999", ':5:15: max_entries in [[tiers]] "memory" is too large'),
        (PLAIN + "max_entries = 2.5", ":5:15: max_entries = 2.5 in"),
        (PLAIN + "ttl = [1]", ':5:7: ttl in [[tiers]] "memory": must be a number of seconds or text'),
        (PLAIN + "on_error = 'ignore'", ':5:12: on_error = "ignore" in [[tiers]] "memory": must be "skip" or "raise"'),
        (PLAIN + "[key]\nnormalize = 'nfc'", ":6:13: normalize = \"nfc\" in [key]: must be a list"),
        (PLAIN + "[key]\nnormalize = ['x']", ':6:14: normalize in [key]: no normalisation step "x"'),
        (PLAIN + "[key]\nsecret = ''", ":6:10: secret in [key]: secret must not be empty; to use no secret"),
        (PLAIN + "[cache]\nmax_queued = 0", ":6:14: max_queued = 0 in [cache]: must be greater than 0"),
        (PLAIN + "[tiers.x]\na = 1", ':5:1: unknown key "x" in [[tiers]] "memory"; valid keys are '),
        (PLAIN + '"ma\\nx" = 1', ':5:1: unknown key "ma\\nx" in'),
        (f"{PLAIN}{'x' * 99} = 1", f':5:1: unknown key "{"x" * 59}…" in'),
        (PLAIN + "a.b.c = 1", ':5:1: unknown key "a" in'),
    ],
)  # fmt: skip
def test_the_message_of_each_problem(text: str, wanted: str) -> None:
    assert any(wanted in problem for problem in problems_of(text)), problems_of(text)


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("[cache\n", "1:7", "expected ']'"),
        ("a = 1\n\n  a = 2", "3:3", "cannot overwrite a value"),
        ("[a]\n[b]\n[a]\n", "3:1", "cannot declare"),
        ("a = \n", "1:5", "invalid value"),
        ("é = ", "1:1", "invalid statement"),
        ("a = [1,\n2", "2:2", "unclosed array"),
        ("a = '", "1:6", "expected"),
    ],
)
def test_a_syntax_error_has_a_place(text: str, place: str, said: str) -> None:
    [problem] = problems_of(text)
    assert problem.startswith(f"embedonce.toml:{place}: not valid TOML: {said}")


@pytest.mark.parametrize(
    "text", ["a = " + "[" * 5000, "a = " + "{b=" * 5000, "a = " + "9" * 5000, "\0", "a." * 3000 + "a=1"]
)
def test_hostile_files_are_refused(text: str) -> None:
    assert problems_of(text)


def test_places_of_keys_and_values() -> None:
    text = inspect.cleandoc("""
        a.b = 1
        "q k" = 'x'
        [cache] # c
        é = {"ü" = "", 'z'.y = [1, # c
          {k = 2}]}
        [[tiers]]
        type = "m"
        [tiers.sub]
        x = 1
        [[tiers]]
        [[tiers.subs]]
        x = 1
        [[tiers.subs]]
        x = 2
        [p."f.x"]
    """)
    found = find_places(text.replace("é", "e").replace("e = {", "e = {"))
    assert found.key(("a", "b")) == Place(1, 3)
    assert found.value(("a", "b")) == Place(1, 7)
    assert found.key(("q k",)) == Place(2, 1)
    assert found.key(("cache", "e", "ü")) == Place(4, 6)
    assert found.value(("cache", "e", "ü")) == Place(4, 12)
    assert found.key(("cache", "e", "z", "y")) == Place(4, 20)
    assert found.value(("cache", "e", "z", "y", 1)) == Place(5, 3)
    assert found.value(("cache", "e", "z", "y", 1, "k")) == Place(5, 8)
    assert found.key(("tiers", 0)) == Place(6, 1)
    assert found.key(("tiers", 0, "sub", "x")) == Place(9, 1)
    assert found.value(("tiers", 1, "subs", 1, "x")) == Place(14, 5)
    assert found.key(("p", "f.x")) == Place(15, 1)
    assert found.key(("tiers", 1, "nothing", "there")) == Place(10, 1)
    assert found.key(("nothing",)) is None


# --- secrets ----------------------------------------------------------------------------------

SECRET = "hunter2-and-more"


@pytest.mark.parametrize(
    "options",
    [
        {"password": [SECRET]},
        {"password": {"a": SECRET}},
        {"headers": {"x": {"Authorization": SECRET}}},
        {"headers": SECRET},
        {"pool": {"token": SECRET}},
        {"size": "${THE_SECRET}"},
        {"wait": "1h ${THE_SECRET}"},
        {"level": "${THE_SECRET}"},
        {"level": f"x://user:{SECRET}@host/"},
        {"level": f"x://host/?key={SECRET}"},
        {"ratio": "${THE_SECRET}"},
        {"servers": ["${THE_SECRET}", 1]},
        {"pool": {"a": "${THE_SECRET}"}},
        {"name": "${THE_SECRET} !"},
        {"type": "${THE_SECRET}"},
        {"fail": "cannot reach", "password": SECRET},
        {"fail": "cannot reach", "url": f"x://me:{SECRET}@host/"},
        {"fail": "cannot reach", "url": "${THE_SECRET}"},
    ],
)
def test_no_message_contains_a_secret(
    probe: ModuleType, monkeypatch: pytest.MonkeyPatch, options: Mapping[str, Any]
) -> None:
    monkeypatch.setenv("THE_SECRET", SECRET)
    with pytest.raises(ConfigError) as caught:
        config.compose(config.load({"provider": {"type": "ngram"}, "tiers": [{"type": "probe", **options}]}))
    shown = "".join(_list_messages(caught.value))
    assert SECRET not in shown
    assert next(iter(options.keys() & {"fail"}), next(iter(options))) in shown or "fail" in options


def _list_messages(error: BaseException | None) -> list[str]:
    """Return the messages in the traceback of an error, including those of its causes and contexts."""
    if error is None:
        return []
    before = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return [f"{error!r} {error} {getattr(error, '__notes__', '')}\n", *_list_messages(before)]


def test_no_message_repeats_a_step_from_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("THE_SECRET", SECRET)
    key = {"normalize": ["nfc", "${THE_SECRET}"]}
    assert SECRET not in str(problems({"key": key, "provider": {"type": "ngram"}, "tiers": []}))


def test_a_secret_is_not_in_the_configurations_repr(probe: ModuleType) -> None:
    tier = {"type": "probe", "password": SECRET, "url": f"x://me:{SECRET}@host/"}
    found = config.load({"key": {"secret": SECRET}, "provider": {"type": "wide", "token": SECRET}, "tiers": [tier]})
    assert SECRET not in repr(found)
    assert SECRET not in str(found.settings())


def test_settings_show_effective_values_and_their_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("embedonce.toml").write_text(f'{PLAIN}ttl = "1h"\nmax_bytes = "${{BYTES:-1 kB}}"\n')
    monkeypatch.setenv("EMBEDONCE__CACHE__DTYPE", "int8")
    monkeypatch.setenv("EMBEDONCE__KEY__VERSION", "from outside")
    found = {setting.name: (setting.value, setting.origin) for setting in config.load().settings()}
    assert found["provider.type"] == ("ngram", "embedonce.toml:2")
    assert found["tiers.memory.ttl"] == (3600, "embedonce.toml:5")
    assert found["tiers.memory.max_bytes"] == (1000, "embedonce.toml:6")
    assert found["tiers.memory.max_entries"] == (2048, "default")
    assert found["cache.dtype"] == ("int8", "EMBEDONCE__CACHE__DTYPE")
    assert found["key.version"] == ("(hidden)", "EMBEDONCE__KEY__VERSION")
    assert found["key.secret"] == (None, "default")


# --- composing --------------------------------------------------------------------------------


def test_a_plugin_that_refuses_its_options_is_reported_at_its_table_and_the_rest_is_closed(probe: ModuleType) -> None:
    text = """
        [provider]
        type = "wide"
        [[tiers]]
        type = "probe"
        [[tiers]]
        type = "probe"
        name = "second"
        fail = "no route to host"
    """
    Path("embedonce.toml").write_text(inspect.cleandoc(text))
    with pytest.raises(ConfigError) as caught:
        embedonce.open()
    message = '[[tiers]] "second" cannot be created: OSError: no route to host None'
    assert caught.value.problems == (Problem(message, "embedonce.toml", 5, 1),)
    assert isinstance(caught.value.__cause__, OSError)
    assert len(probe.made) == 2
    assert probe.closed == probe.made[::-1]


def test_parts_that_do_not_fit_together_are_closed(probe: ModuleType) -> None:
    provider = {"type": "wide", "dimensions": 64, "fallback": {"type": "wide", "dimensions": 32}}
    with pytest.raises(ConfigError):
        embedonce.open({"provider": provider, "tiers": [{"type": "probe"}]})
    assert len(probe.made) == 3
    assert set(probe.closed) == set(probe.made)


def test_close_closes_everything_that_open_created(probe: ModuleType) -> None:
    embedonce.open({"provider": {"type": "wide"}, "tiers": [{"type": "probe"}]}).close()
    assert set(probe.closed) == set(probe.made)


def test_importing_embedonce_is_light() -> None:
    code = """
        import sys
        import embedonce.config
        heavy = ("pydantic", "pluggy", "importlib.metadata", "tree_sitter", "platformdirs", "tomllib", "difflib")
        print([name for name in heavy if name in sys.modules])
    """
    done = subprocess.run(
        [sys.executable, "-I", "-c", inspect.cleandoc(code)], check=True, capture_output=True, text=True, timeout=100
    )
    assert done.stdout.strip() == "[]"


# --- prices -----------------------------------------------------------------------------------


def test_the_price_is_that_of_its_own_provider() -> None:
    source = {"provider": {"type": "ngram", "price": "0.02 USD / 1M tokens"}, "tiers": [{"type": "memory"}]}
    with embedonce.open(source) as cache, embedonce.open(source, provider=NgramProvider()) as own:
        for opened, price in ((cache, "0.02 USD / 1M tokens"), (own, "None")):
            opened.embed("a")
            assert [str(space.price) for space in opened.stats().spaces.values()] == [price]


def test_a_wrong_price_is_a_problem_at_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    text = NGRAM + 'price = 0.5\n[provider.fallback]\ntype = "ngram"\nprice = "$3 / 1K tokens"\n'
    Path("w.toml").write_text(f"tiers = []\n{text}")
    form = 'must be written like "0.02 USD / 1M tokens"'
    assert problems("w.toml") == [
        f"w.toml:4:9: price = 0.5 in [provider]: {form}; add the currency and the number of tokens, for example "
        '"0.5 USD / 1M tokens"',
        f'w.toml:7:9: price = "$3 / 1K tokens" in [provider.fallback]: {form}; write "3 USD / 1K tokens"',
    ]
    # What came out of a variable is not repeated, not even in the advice.
    monkeypatch.setenv("EMBEDONCE__PROVIDER__PRICE", "7 usd / 1M tokens")
    monkeypatch.setenv("MY_PRICE", "8 usd / 1M tokens")
    Path("w.toml").write_text(Path("w.toml").read_text().replace("$3 / 1K tokens", "${MY_PRICE}"))
    assert sorted(problems("w.toml")) == [
        f"EMBEDONCE__PROVIDER__PRICE: {form}",
        f"w.toml:7:9: price in [provider.fallback]: {form} (from the environment variable MY_PRICE)",
    ]


def test_a_price_in_another_table_belongs_to_the_provider() -> None:
    assert problems_of('[cache]\nprice = "1 USD / 1K tokens"\n' + PLAIN) == [
        'embedonce.toml:2:1: unknown key "price" in [cache]; it belongs in [provider]'
    ]


# --- the schema -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = config.schema()
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(json.loads(json.dumps(schema)))


@pytest.mark.parametrize(
    "text",
    [
        PLAIN,
        PLAIN + 'ttl = "1h30m"\nmax_bytes = "512 MiB"\nmax_entries = "${N:-3}"\nname = "x"',
        NGRAM + '[provider.fallback]\ntype = "ngram"\nfetch_only = true\n[[tiers]]\ntype = "${TIER:-memory}"',
        "tiers = []\n" + NGRAM + '[key]\nnormalize = ["nfc"]\nsecret = "${EMPTY_SECRET:-x}"\n[cache]\nmax_wait = 3.5',
        NGRAM + '[[tiers]]\ntype = "disk"\npath = "x"\nmax_bytes = "1GB"\ntimeout = "${T:-1s}"',
    ],
)  # fmt: skip
def test_the_schema_accepts_valid_documents(validator: Any, text: str) -> None:
    validator.validate(tomllib.loads(text))
    config.load(tomllib.loads(text))


@pytest.mark.parametrize(
    "text",
    [
        NGRAM,
        PLAIN + "max_entrys = 3",
        PLAIN + "max_entries = 0",
        PLAIN + 'max_entries = "3"',
        PLAIN + 'max_bytes = "3 zb"',
        PLAIN + 'ttl = "1 y"',
        PLAIN + 'policy = "lfu"',
        PLAIN + "[cahce]",
        PLAIN + '[key]\nnormalize = ["stripp"]',
        "tiers = []\n" + NGRAM + "max_entries = 3",
        "tiers = []\n[provider]",
        'tiers = []\n[provider]\ntype = "memory"',
        NGRAM + '[[tiers]]\ntype = "ngram"',
    ],
)
def test_the_schema_rejects_invalid_documents(validator: Any, text: str) -> None:
    assert not validator.is_valid(tomllib.loads(text))
    assert problems(tomllib.loads(text))


SAMPLES: Sequence[tuple[str, str, Sequence[str]]] = [
    ("disk", "max_bytes", ['"2 GiB"', '"1.5 MiB"', '"1.5"', '"1.5 B"', '"2000000.0"', "2000000", "2e6", "-1", '"2 Mb"',
                           '" 2 mib "', '""', "true", str(2**63), '"9999999 TB"']),
    ("disk", "ttl", ['"1h30m"', '"1h 30m"', "1.5", "0", '"0s"', "-1", "nan", "inf", '"1 month"', "4e9", '"5"', "[]"]),
    ("disk", "path", ['"x"', '""', "1", '"${NO_SUCH:-x}"']),
    ("disk", "name", ['"a-b_2"', '"A"', '"provider"', '"é"', '""', '"2"']),
    ("disk", "write", ['"inline"', '"none"', '"nowhere"', "true"]),
    ("disk", "lease", ['"5s"', "0"]),
    ("memory", "timeout", ['"5s"']),
    ("memory", "lease", ['"5s"']),
    ("memory", "encryption", ['"x"']),
    ("memory", "max_entries", ["1", "0", "1.0", '"1"', "true", str(2**63)]),
    ("memory", "type", ['"embedonce:memory"', '"embedonce:memry"', '"disk:memory"']),
]  # fmt: skip

# The loader refuses these values. The schema accepts them, because a schema can hardly express their rules.
ONLY_THE_LOADER_REFUSES = {
    ("max_bytes", '"9999999 TB"'),
    ("max_entries", str(2**63)),
    ("max_entries", "1.0"),  # JSON does not distinguish 1.0 from 1
    ("max_bytes", "2e6"),
    ("ttl", '"0s"'),
}


@pytest.mark.parametrize(("kind", "option", "value"), [(k, o, v) for k, o, values in SAMPLES for v in values])
def test_the_schema_and_the_loader_agree(validator: Any, kind: str, option: str, value: str) -> None:
    path = 'path = "x"\n' if kind == "disk" and option != "path" else ""
    kind = "" if option == "type" else f'type = "{kind}"\n'
    document = tomllib.loads(f'provider.type = "ngram"\n[[tiers]]\n{kind}{path}{option} = {value}')
    try:
        config.load(document)
    except ConfigError:
        is_accepted = False
    else:
        is_accepted = True
    if value in ("nan", "inf"):  # JSON cannot express these numbers, so the schema is not tested
        assert not is_accepted
    elif (option, value) in ONLY_THE_LOADER_REFUSES:
        assert not is_accepted
        assert validator.is_valid(document)
    else:
        assert validator.is_valid(document) == is_accepted


@pytest.mark.parametrize(
    "price",
    ["0.02 USD / 1M tokens", " 2USD/1000token ", "2 USD per 5K tokens", "${NO_SUCH:-1 USD / 1K tokens}"]
    + ["2 USD per5K tokens", "2 usd / 1M tokens", "$2 / 1M tokens", "2 USD / 0 tokens", "2 USD / tokens", "", 2, True]
    + [f"{'9' * digits} USD / 1M tokens" for digits in (9, 10)],
)  # fmt: skip
@pytest.mark.parametrize("is_fallback", [False, True])
def test_the_schema_and_the_loader_agree_on_prices(validator: Any, price: object, is_fallback: bool) -> None:
    provider: dict[str, Any] = {"type": "ngram", "price": price}
    document = {"provider": {"type": "ngram", "fallback": provider} if is_fallback else provider, "tiers": []}
    try:
        config.load(document)
    except ConfigError:
        assert not validator.is_valid(document)
    else:
        assert validator.is_valid(document)


def test_every_option_is_described(validator: Any) -> None:
    undocumented = [
        f"{title}.{name}"
        for title, table in _list_tables(validator.schema)
        for name, option in table["properties"].items()
        if "description" not in option
        and "$ref" not in option
        and table.get("title") in (None, "disk", "memory", "ngram")
    ]
    assert undocumented == []


def _list_tables(schema: Mapping[str, Any]) -> list[tuple[str, Any]]:
    own = [(name, schema["properties"][name]) for name in ("cache", "key")]
    plugged = [*schema["properties"]["provider"]["oneOf"], *schema["properties"]["tiers"]["items"]["oneOf"]]
    return [*own, *((table["title"], table) for table in plugged if "title" in table)]


# --- random documents -------------------------------------------------------------------------

words = st.sampled_from(
    [
        *(
            "cache",
            "key",
            "provider",
            "tiers",
            "fallback",
            "type",
            "name",
            "ttl",
            "timeout",
            "on_error",
            "write",
            "dtype",
        ),
        *("mode", "version", "normalize", "secret", "hash", "max_entries", "max_bytes", "policy", "path", "dimensions"),
        *("fetch_only", "max_wait", "plugins", "x"),
    ]
)
keys = words | st.text(st.characters(codec="utf-8"), max_size=4)
scalars = st.one_of(
    st.sampled_from(
        ["memory", "disk", "ngram", "lru", "float16", "1h", "1 MiB", "${X}", "${X:-memory}", "$$", "${", "skip"]
    ),
    st.sampled_from([0, 1, -1, 64, 10**30, 0.5, True, False]),
    st.text(max_size=6),
    st.integers(),
    st.floats(),
    st.dates(),
    st.none(),
    st.binary(max_size=3),
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(keys, inner, max_size=4), max_leaves=8
)
plugged = st.dictionaries(words, anything, max_size=4)
served = st.fixed_dictionaries(
    {}, optional={"name": scalars, "provider": st.just({"type": "ngram"}) | plugged | anything, "forward": anything}
)
tenants = st.fixed_dictionaries(
    {"name": st.just("a") | scalars, "keys": st.just(["0123456789abcdef"]) | anything},
    optional={"namespace": scalars, "models": st.just(["a"]) | anything, "tokens_per_day": scalars, "x": anything},
)
serving = st.fixed_dictionaries(
    {},
    optional={
        "host": scalars,
        "port": scalars,
        "allowed_hosts": anything,
        "admin_key": st.just("0123456789abcdef") | anything,
        "state_dir": scalars,
        "models": st.lists(served | anything, max_size=2) | anything,
        "tenants": st.lists(tenants | anything, max_size=2) | anything,
    },
)
documents = st.fixed_dictionaries(
    {},
    optional={
        "cache": plugged | anything,
        "key": plugged | anything,
        "provider": st.builds(lambda more: {"type": "ngram", **more}, plugged) | anything,
        "tiers": st.lists(st.builds(lambda more: {"type": "memory", **more}, plugged) | anything, max_size=3)
        | anything,
        "serve": serving | anything,
        "other": anything,
    },
)

fuzz = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def _load_or_refuse(source: Any) -> None:
    try:
        found = config.load(source)
    except ConfigError as refused:
        error = refused
    else:
        assert found.settings()
        return
    assert error.problems
    assert all(problem.message and "\n" not in problem.message for problem in error.problems)


@fuzz
@given(documents)
def test_no_dict_causes_a_traceback(source: dict[str, Any]) -> None:
    _load_or_refuse(source)


@fuzz
@given(documents)
def test_no_file_causes_a_traceback(source: dict[str, Any]) -> None:
    text = _write_toml(source)
    Path("fuzz.toml").write_text(text, encoding="utf-8")
    _load_or_refuse("fuzz.toml")


@fuzz
@given(documents)
def test_the_schema_accepts_what_the_loader_accepts(validator: Any, source: dict[str, Any]) -> None:
    text = _write_toml(source)
    try:
        document = tomllib.loads(text)
        config.load(document)
    except (ValueError, ConfigError):
        return
    validator.validate(json.loads(json.dumps(document, default=str)))


VALID = """\
# A file with one of everything.
[cache]
dtype = "float16"
max_wait = 3.5

[key]
version = "v2"
normalize = ["nfc", "strip"]
secret = "${NO_SUCH_SECRET:-sixteen characters}"

[plugins]
allow = ["acme", 'another']

[provider]
type = "ngram"
dimensions = 0x40
fallback = { type = "ngram", dimensions = 128, fetch_only = true }

[[tiers]]
type = "memory"
max_entries = 1_000
max_bytes = "64 MiB"

[[tiers]]
type = "memory"
name = "second"
ttl = "1h30m"
policy = \'\'\'lru\'\'\'
"""

edits = st.lists(
    st.tuples(
        st.integers(0, len(VALID)),
        st.integers(0, 12),
        st.binary(max_size=4)
        | st.sampled_from(
            [b'"', b"'", b"[", b"]]", b"{", b"}", b"=", b"\n", b"\0", b".", b"${", b'"""', b"\xef\xbb\xbf"]
        ),
    ),
    max_size=4,
)


def mutate(changes: Sequence[tuple[int, int, bytes]]) -> bytes:
    """Return the valid file with some parts replaced."""
    content = VALID.encode()
    for start, length, put in changes:
        content = content[:start] + put + content[start + length :]
    return content


def test_the_file_to_mutate_is_valid() -> None:
    Path("fuzz.toml").write_bytes(mutate([]))
    assert len(config.load("fuzz.toml").tiers) == 2


@fuzz
@given(edits)
def test_no_mutation_of_a_valid_file_causes_a_traceback(changes: list[tuple[int, int, bytes]]) -> None:
    Path("fuzz.toml").write_bytes(mutate(changes))
    _load_or_refuse("fuzz.toml")


@fuzz
@given(edits, st.sampled_from([["check"], ["config"], ["config", "--json"], ["plugins"]]))
def test_no_file_causes_a_traceback_in_a_command(changes: list[tuple[int, int, bytes]], command: list[str]) -> None:
    from typer.testing import CliRunner

    from embedonce.cli import app, output

    Path("fuzz.toml").write_bytes(mutate(changes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "is_terminal", lambda: True)  # invalid lines are printed only on a terminal
        done = CliRunner().invoke(app, [*command, "--config", "fuzz.toml"])
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code in (0, 1, 2)
    assert "Traceback" not in done.output
    assert done.exit_code != 2 or "error: fuzz.toml" in done.stderr


lines = st.sampled_from(
    [
        *("[cache]", "[key]", "[provider]", "[[tiers]]", "[tiers.x]", "[provider.fallback]", "tiers = []", "ttl = 1"),
        *('type = "memory"', 'type = "ngram"', 'dtype = "int8"', 'normalize = ["nfc"]', "a.b = {c = [1, 2]}"),
        *("x = '''", '"""', "#", "é = 1"),
    ]
)


@fuzz
@given(st.lists(lines | st.text(st.characters(codec="utf-8"), max_size=8), max_size=12), st.integers(0, 200))
def test_no_text_causes_a_traceback(written: list[str], cut: int) -> None:
    text = "\n".join(written)
    Path("fuzz.toml").write_bytes((text[:cut] + text[cut + 1 :]).encode())
    _load_or_refuse("fuzz.toml")


@fuzz
@given(
    st.dictionaries(
        st.lists(words, max_size=3).map("__".join), st.text(st.characters(min_codepoint=1), max_size=8), max_size=3
    )
)
def test_no_environment_causes_a_traceback(variables: dict[str, str]) -> None:
    usable = {name: text for name, text in variables.items() if "\0" not in text and _can_encode(text)}
    with pytest.MonkeyPatch.context() as patch:
        for name, text in usable.items():
            patch.setenv(f"EMBEDONCE__{name.upper()}", text)
        _load_or_refuse({"provider": {"type": "ngram"}, "tiers": [{"type": "memory"}]})


def _can_encode(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return True


@fuzz
@given(documents)
def test_every_key_and_value_of_a_file_has_a_place(source: dict[str, Any]) -> None:
    text = _write_toml(source)
    Path("fuzz.toml").write_text(text, encoding="utf-8")
    try:
        found = read_document(Path("fuzz.toml"))
    except ConfigError:
        return
    _check_places(found, found.data, ())


def _check_places(found: Document, value: Any, path: tuple[str | int, ...]) -> None:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        place = found.place((*path, key), key=True)
        assert place is not None
        line = found.text.split("\n")[place.line - 1]
        assert place.column <= len(line)
        _check_places(found, item, (*path, key))


def _write_toml(value: Mapping[str, Any]) -> str:
    """Write a dict as TOML, each value inline. Values that TOML cannot express are omitted."""
    return "\n".join(
        f"{json.dumps(str(key))} = {_write_inline(item)}" for key, item in value.items() if item is not None
    )


def _write_inline(value: Any) -> str:
    if isinstance(value, dict):
        return (
            "{"
            + ", ".join(f"{json.dumps(key)} = {_write_inline(item)}" for key, item in value.items() if item is not None)
            + "}"
        )
    if isinstance(value, list):
        return "[" + ", ".join(_write_inline(item) for item in value if item is not None) + "]"
    if isinstance(value, bool | str):
        return json.dumps(value)
    return repr(value) if isinstance(value, int | float) else str(value)


# --- the docs page ----------------------------------------------------------------------------

PAGE = Path(__file__).parent.parent.parent / "docs" / "configuration.md"


def test_the_page_lists_every_option_with_its_default() -> None:
    page = PAGE.read_text()
    for table in (CacheTable, KeyTable, PluginsTable, TierTable, ProviderTable, FallbackTable):
        for name, option in options_of(table).items():
            assert f"`{name}`" in page or f"{name} = " in page, name
            if table in (CacheTable, KeyTable) and isinstance(option.default, str):
                assert f'| `{name}` | `"{option.default}"`' in page


# --- invisible characters around secrets and URLs ---------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "name"),
    [
        ("password", "hunter2\\n", "password"),
        ("password", "\\tx${KEY}x", "password"),
        ("password", "x${KEY}x", "password"),
        ("url", "redis://:${KEY}@localhost/0", "url"),
        ("url", "redis://localhost/0 ", "url"),
        ("servers", ["localhost:1", "localhost:2\\u200b"], "servers[1]"),
        ("servers", ["localhost:1", "http://u:${KEY}@h"], "servers[1]"),
        ("headers", {"Authorization": "Bearer ${KEY}"}, "headers.Authorization"),
        ("folder", "https://h/\\n", "folder"),
    ],
)
def test_an_invisible_character_around_a_secret_is_reported_with_its_place(
    probe: ModuleType, monkeypatch: pytest.MonkeyPatch, option: str, value: Any, name: str
) -> None:
    monkeypatch.setenv("KEY", "hunter2\n")
    written = _write_inline(value).replace("\\\\", "\\")
    (said,) = problems_of(f'{NGRAM}[[tiers]]\ntype = "probe"\n{option} = {written}\n')
    assert re.match(rf"embedonce.toml:5:\d+: {re.escape(name)} in \[\[tiers\]\] \"probe\": (starts|ends) with a", said)
    assert "hunter2" not in said
    assert ("KEY" in said) == ("${KEY}" in str(value))


def test_an_invisible_character_in_an_override_or_a_dict_is_reported(
    probe: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = {"provider": {"type": "wide", "token": " hunter2"}, "tiers": [{"type": "probe"}], "key": {"secret": "x\n"}}
    said = problems(source)
    assert [line.partition(": ")[0] for line in said] == ["secret in [key]", "token in [provider]"]
    monkeypatch.setenv("EMBEDONCE__PROVIDER__TOKEN", "hunter2\r\n")
    monkeypatch.setenv("EMBEDONCE__KEY__SECRET", "hunter2")
    (said_again,) = problems(source)
    assert said_again.startswith("EMBEDONCE__PROVIDER__TOKEN: ends with a line end; remove it")
    assert "echo -n" in said_again
    assert "hunter2" not in said_again


def test_white_space_in_other_options_is_kept(probe: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOLDER", "my folder ")
    source = {"provider": {"type": "wide"}, "tiers": [{"type": "probe", "folder": "${FOLDER}"}]}
    assert str(config.load(source).tiers[0].options["folder"]).endswith("my folder ")


# --- defects that an outside tester found -----------------------------------------------------


def test_a_broken_link_or_a_folder_instead_of_the_file_is_an_error(here: Path) -> None:
    place = here / "embedonce.toml"
    place.symlink_to("gone.toml")
    assert problems(None) == ["embedonce.toml: is a broken symbolic link"]
    place.unlink()
    place.symlink_to("embedonce.toml")
    assert problems(None)[0].startswith("embedonce.toml: cannot be read: ")
    place.unlink()
    place.mkdir()
    assert problems(None)[0].startswith("embedonce.toml: cannot be read: ")


def test_an_empty_path_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    text = f'{NGRAM}[[tiers]]\ntype = "disk"\npath = "{{}}"\n'
    said = 'must not be empty; write "." for the folder of the configuration'
    assert problems_of(text.format("")) == [f'embedonce.toml:5:8: path in [[tiers]] "disk": {said}']
    assert problems_of(text.format("${NO_SUCH:-}"))[0].endswith(said)
    Path("embedonce.toml").write_text(text.format("cache"))
    monkeypatch.setenv("EMBEDONCE__TIERS__DISK__PATH", "")
    assert problems(None) == [f"EMBEDONCE__TIERS__DISK__PATH: {said}"]
    monkeypatch.setenv("EMBEDONCE__TIERS__DISK__PATH", ".")
    assert config.load().tiers[0].options["path"] == Path.cwd()


def test_a_byte_that_is_not_utf_8_has_its_place(here: Path) -> None:
    (here / "x.toml").write_bytes(b"\xef\xbb\xbf# \xc3\xa9\n# a\xc3\xa9\xff\n")
    assert problems("x.toml") == ["x.toml:2:5: cannot be read: byte 14 is not UTF-8"]


def test_a_huge_number_is_reported_without_pythons_message() -> None:
    assert problems_of(f"x = {'9' * 5000}\n") == ["embedonce.toml: has a number that is far too large"]


def test_a_message_names_the_variable_of_a_value_but_hides_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_DTYPE", "hunter2")
    assert problems_of('[cache]\ndtype = "${MY_DTYPE}"\n' + PLAIN) == [
        'embedonce.toml:2:9: dtype in [cache]: must be "float32", "float16" or "int8" '
        "(from the environment variable MY_DTYPE)"
    ]


def test_an_unknown_type_does_not_hide_what_else_is_wrong() -> None:
    found = problems_of(f'{NGRAM}[[tiers]]\ntype = "nope"\nname = "a"\nttl = 0\ntimeout = "soon"\n')
    assert [problem.split(":")[1] for problem in found] == ["4", "6", "7"]


def test_a_key_of_another_table_is_reported_with_that_table() -> None:
    assert problems_of('[cache]\nsecret = "' + "x" * 40 + '"\n' + PLAIN) == [
        'embedonce.toml:2:1: unknown key "secret" in [cache]; it belongs in [key]'
    ]


def test_a_repeated_table_is_named_as_toml_writes_it() -> None:
    assert problems_of("[key.a]\n[key.a]\n")[0].endswith("not valid TOML: cannot declare key.a twice")
