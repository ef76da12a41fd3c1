"""``check``, ``stats``, ``purge --unused`` and ``forget``: what they prove, what they show and what they remove."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optional import needs

import embedonce
from embedonce import Cache, Capabilities, Limits, Tier, VectorSpace
from embedonce.contracts import time_left
from embedonce.errors import CacheClosed, PartialAnswer, TierError
from embedonce_backends.disk import DiskBackend
from embedonce_backends.memory import MemoryBackend
from embedonce_providers.ngram import NgramProvider

CONFIG = (
    '[provider]\ntype = "ngram"\ndimensions = {}\n[[tiers]]\ntype = "memory"\n[[tiers]]\ntype = "disk"\npath = "d"\n'
)


def write_config(dimensions: int, name: str = "embedonce.toml") -> None:
    Path(name).write_text(CONFIG.format(dimensions))


class Store:
    """A store of frames in a dict, whose writes can fail in several ways."""

    def __init__(self, *, fail: str = "", delete: bool = True, scope: Any = "network") -> None:
        self.capabilities = Capabilities(scope=scope, delete=delete, scan=True)
        self.values: dict[str, bytes] = {}
        self.written: list[str] = []
        self.fail = fail

    def get_many(self, keys: Sequence[str], /) -> Mapping[str, bytes]:
        return {key: self.values[key] for key in keys if key in self.values}

    def set_many(self, items: Mapping[str, bytes], ttl: float | None, /) -> None:
        self.written += items
        if self.fail == "raise":
            raise OSError("MISCONF the disk is full")
        if self.fail == "node":
            lost = list(items)[: len(items) // 2]
            self.values |= {key: value for key, value in items.items() if key not in lost}
            raise PartialAnswer("a node is down", failed=lost)
        if self.fail != "drop":
            self.values |= items

    def delete_many(self, keys: Sequence[str], /) -> None:
        for key in keys:
            self.values.pop(key, None)

    def scan(self, prefix: str, /) -> list[str]:
        return [key for key in self.values if key.startswith(prefix)]

    def close(self) -> None: ...


# --- check ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("store", "ok", "writes", "detail"),
    [
        (Store(), True, True, ""),
        (Store(fail="raise"), False, False, "OSError: MISCONF the disk is full"),
        (Store(fail="drop"), False, False, "a probe was written, but it is missing when it is read"),
        (Store(fail="node"), True, True, ""),
        (Store(delete=False), True, None, "no probe was written, because this tier cannot delete"),
    ],
)
def test_check_writes_reads_and_deletes_a_probe(store: Store, ok: bool, writes: bool | None, detail: str) -> None:
    with Cache(NgramProvider(), [store]) as cache:
        (check,) = cache.check()
        assert (check.ok, check.writes, check.detail) == (ok, writes, detail)
        assert store.values == {}
        assert bool(store.written) == (writes is not None)
        counted = cache.stats().tiers["store"]
        assert (counted.hits, counted.misses, counted.stored, counted.errors) == (0, 0, 0, 0)
        assert cache.contents() == []


async def test_the_async_check_does_the_same() -> None:
    store = Store(fail="raise")
    async with Cache(NgramProvider(), [store]) as cache:
        (check,) = await cache.acheck()
        assert (check.ok, check.writes) == (False, False)
        (called,) = await cache.acheck_providers(embed=True)
        assert (called.ok, called.dimensions) == (True, 256)


def test_a_tier_that_is_never_written_gets_no_probe() -> None:
    store = Store(fail="raise")
    with Cache(NgramProvider(), [Tier(store, write="none")]) as cache:
        (check,) = cache.check()
        assert (check.ok, check.writes, check.detail) == (True, None, 'read-only (write = "none")')
    assert store.written == []


def test_a_probe_evicts_nothing_from_memory() -> None:
    backend = MemoryBackend(max_entries=2)
    with Cache(NgramProvider(), [backend]) as cache:
        assert [check.writes for check in cache.check()] == [True]
        assert backend.count("") == 0
        cache.embed_batch(["one", "two"])
        assert [check.ok for check in cache.check()] == [True]
        assert cache.lookup(["one", "two"]).sources == ["memory", "memory"]


def test_a_probe_that_was_interrupted_expires(tmp_path: Path) -> None:
    backend = DiskBackend(path=tmp_path)
    backend.delete_many = lambda keys: None  # type: ignore[method-assign]
    with Cache(NgramProvider(), [backend]) as cache:
        cache.check()
    with closing(sqlite3.connect(tmp_path / "cache.db")) as database:
        ((left, dated),) = database.execute("SELECT COUNT(*), COUNT(expire_time) FROM Cache").fetchall()
    assert left == dated > 0


@pytest.mark.parametrize(
    ("provider", "variable"),
    [
        pytest.param("openai", "OPENAI_API_KEY", marks=needs("openai")),
        pytest.param("gemini", "GEMINI_API_KEY", marks=needs("google.genai")),
    ],
)
def test_check_fails_without_an_api_key(
    command: Any, monkeypatch: pytest.MonkeyPatch, provider: str, variable: str
) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "GEMINI_API_KEY", "GOOGLE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    Path("x.toml").write_text(f'tiers = []\n[provider]\ntype = "{provider}"\nmodel = "m"\n')
    for more in ([], ["--provider"]):
        done = command("check", "--config", "x.toml", "--json", *more)
        assert (done.code, done.json["ok"]) == (1, False)
        assert variable in done.json["providers"][0]["detail"]
        assert f"error: provider '{provider}' cannot be called" in done.err
    monkeypatch.setenv(variable, "hunter2\n")
    done = command("check", "--config", "x.toml")
    assert done.code == 2  # found when the configuration is loaded
    assert f"the environment variable {variable} ends with a line end" in done.err
    assert "hunter2" not in done.err + done.out
    monkeypatch.setenv(variable, "hunter2")
    assert command("check", "--config", "x.toml").code == 0


class Choosy:
    """A provider with its own check, whose calls fail."""

    limits = Limits()

    def __init__(self, problem: str = "") -> None:
        self.problem = problem
        self.texts: list[str] = []

    def space(self, task: str) -> VectorSpace:
        return VectorSpace(provider="choosy", model="m")

    def check(self) -> None:
        if self.problem == "check":
            raise ValueError("set CHOOSY_KEY")

    def embed(self, texts: Sequence[str], task: str) -> Any:
        self.texts += texts
        return embedonce.Embedded(np.ones((len(texts), 3 if self.problem != "zero" else 0)), model="m-2")

    def close(self) -> None: ...


def test_the_check_of_a_provider() -> None:
    with Cache(Choosy("check"), fallback=Choosy(), fallback_fetch_only=True) as cache:
        checks = cache.check_providers()
        assert [(one.provider, one.ok, one.detail) for one in checks] == [
            ("choosy", False, "set CHOOSY_KEY"),
            ("fallback:choosy", True, ""),
        ]
    provider = Choosy()
    store = Store()
    with Cache(provider, [store]) as cache:
        assert cache.check_providers()[0].dimensions is None
        assert provider.texts == []
        (check,) = cache.check_providers(embed=True)
        assert (check.ok, check.dimensions, check.model) == (True, 3, "m-2")
        assert (len(provider.texts), store.values) == (1, {})
    with Cache(Choosy("zero")) as cache:
        assert not cache.check_providers(embed=True)[0].ok


# --- problems as JSON -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["check"],
        ["config"],
        ["explain", "x"],
        ["stats"],
        ["forget", "x"],
        ["purge", "--unused", "--yes"],
        ["purge", "--model", "m", "--yes"],
        ["migrate"],
        ["compact"],
        ["embed", "text.txt", "--out", "out.npy"],
    ],
)
def test_the_problems_of_a_configuration_are_a_json_document(command: Any, arguments: list[str]) -> None:
    Path("text.txt").write_text("one")
    Path("bad.toml").write_text(f"{CONFIG.format(64)}nonsense = 1\n")
    done = command(*arguments, "--config", "bad.toml", "--json")
    assert done.code == 2
    assert done.json["ok"] is False
    (problem,) = done.json["problems"]
    assert (problem["file"], problem["line"], problem["column"]) == ("bad.toml", 9, 1)
    assert problem["message"].startswith('unknown key "nonsense"')
    assert "error: bad.toml:9:1" in done.err


# --- compact ----------------------------------------------------------------------------------


class Compacted(Store):
    """A store whose ``compact`` fails if ``problem`` is set."""

    def __init__(self, problem: str = "") -> None:
        super().__init__()
        self.problem = problem
        self.calls = 0

    def compact(self) -> str:
        self.calls += 1
        if self.problem:
            raise OSError(self.problem)
        return "1.0 MiB, was 2.0 MiB"


def test_compact_calls_every_store_that_has_it() -> None:
    stores = [Tier(Store(), name="plain"), Tier(Compacted(), name="one"), Tier(Compacted(), name="two")]
    with Cache(NgramProvider(), stores) as cache:
        assert cache.compact() == {"one": "1.0 MiB, was 2.0 MiB", "two": "1.0 MiB, was 2.0 MiB"}
    with pytest.raises(CacheClosed):
        cache.compact()


async def test_a_store_that_cannot_be_compacted_keeps_no_other_from_it() -> None:
    works = Compacted()
    async with Cache(NgramProvider(), [Tier(Compacted("no space"), name="bad"), Tier(works, name="good")]) as cache:
        with pytest.raises(TierError) as raised:
            cache.compact()
        assert (raised.value.tier, str(raised.value.__cause__), works.calls) == ("bad", "no space", 1)
        with pytest.raises(TierError):
            await cache.acompact()
        assert works.calls == 2


def test_compact_has_no_timeout() -> None:
    seen: list[float | None] = []

    class Slow(Compacted):
        def compact(self) -> str:
            seen.append(time_left())
            return super().compact()

    with Cache(NgramProvider(), [Tier(Slow(), timeout=0.01)]) as cache:
        cache.compact()
    assert seen == [None]


def test_the_command_compact_says_what_each_tier_weighs(
    command: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(64)
    monkeypatch.setattr(DiskBackend, "compact", lambda backend: "4.2 GiB, was 6.0 GiB", raising=False)
    done = command("compact", "--json")
    assert (done.code, done.json) == (
        0,
        {"tiers": {"disk": "4.2 GiB, was 6.0 GiB"}, "nothing_to_compact": ["memory"]},
    )
    lines = command("compact").out.splitlines()
    assert [line.strip().split(maxsplit=1) for line in lines[-2:]] == [
        ["memory", "nothing to compact"],
        ["disk", "4.2 GiB, was 6.0 GiB"],
    ]

    def fail(backend: Any) -> str:
        raise OSError("no space left")

    monkeypatch.setattr(DiskBackend, "compact", fail)
    done = command("compact", "--json")
    assert (done.code, done.out) == (1, "")
    assert "error: tier 'disk': OSError: no space left" in done.err


# --- stats and purge --------------------------------------------------------------------------


@pytest.fixture
def two_spaces(command: Any, folder: Path) -> Path:
    """A disk tier with the same texts in two vector spaces. The configuration uses the second one."""
    Path("t.txt").write_text("one\n\ntwo\n")
    for dimensions in (128, 384):
        write_config(dimensions)
        assert command("embed", "t.txt", "--out", "o.npy").code == 0
    return folder


def test_stats_tells_vector_spaces_apart(command: Any, two_spaces: Path) -> None:
    data = command("stats", "--json").json
    old, new = sorted(data["held"], key=lambda one: one["dimensions"])
    assert (old["dimensions"], old["current"], new["dimensions"], new["current"]) == (128, False, 384, True)
    assert new["bytes"] > old["bytes"] > 128 * 4
    assert 0 < old["oldest"] <= old["newest"] <= new["newest"]
    assert data["folders"] == {"disk": str(two_spaces / "d")}
    size = sum(file.stat().st_size for file in (two_spaces / "d").iterdir())
    assert data["folder_bytes"] == {"disk": size}
    shown = command("stats").out
    assert f"disk  {two_spaces / 'd'}  {size / 2**10:.1f} KiB\n" in shown
    assert {"128", "384", "yes", "no"} <= set(shown.split())


def test_stats_does_not_call_a_tier_empty_that_it_cannot_list(
    command: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(64)

    def fail(backend: Any, *arguments: Any, **options: Any) -> None:
        raise OSError("no")

    monkeypatch.setattr(DiskBackend, "scan", fail)
    done = command("stats")
    assert done.code == 1
    assert "empty" not in done.out
    assert "tier 'disk'" in done.err


def test_stats_works_without_a_provider(command: Any, two_spaces: Path) -> None:
    Path("x.toml").write_text(CONFIG.format(64).partition("[[tiers]]")[2].join(("[[tiers]]", "")))
    held = command("stats", "--config", "x.toml", "--json").json["held"]
    assert [one["current"] for one in held] == [None, None]


def test_purge_unused_keeps_what_the_configuration_uses(command: Any, two_spaces: Path) -> None:
    with embedonce.open() as cache:
        cache.embed("one", "clustering")
    assert "clustering" not in command("purge", "--unused", "--dry-run").out
    assert command("purge", "--unused").code == 2  # without a terminal, nobody can confirm
    done = command("purge", "--unused", "--yes", "--json")
    assert (done.code, done.json["removed"]["disk"]) == (0, 2)
    assert [(one["dimensions"], one["entries"]) for one in command("stats", "--json").json["held"]] == [(384, 2)]
    assert command("purge", "--unused", "--yes").out.endswith("nothing matches\n")


def test_purge_unused_keeps_every_task_and_removes_a_scope_without_a_card() -> None:
    class Asymmetric(Choosy):
        def space(self, task: str) -> VectorSpace:
            return VectorSpace(provider="choosy", model="m", task=task)

    store = Store()
    with Cache(Asymmetric(), [Tier(store, write="inline")]) as cache:
        for task in ("document", "query", "clustering"):
            cache.embed("one", task)
    lost = {key.replace(key.split(".")[1], "0" * 16) for key in store.scan("eo1.") if key.count(".") == 2}
    store.values |= dict.fromkeys(list(lost)[:1], b"x")
    with Cache(Asymmetric(), [store]) as cache:
        assert list(cache.purge(unused=True, dry_run=True).scopes) == ["0" * 16]
        assert sum(cache.purge(unused=True).removed.values()) == 1
        assert sorted(str((one.card or {})["task"]) for one in cache.contents()) == ["clustering", "document", "query"]
        assert {one.current for one in cache.contents()} == {True}
    with (
        embedonce.open({"provider": {"type": "ngram"}, "tiers": []}) as cache,
        pytest.raises(ValueError, match="unused"),
    ):
        cache.purge()


def test_a_tier_without_its_own_measure_is_measured_by_reading() -> None:
    store = Store()
    with Cache(Choosy(), [Tier(store, write="inline")]) as cache:
        cache.embed_batch(["one", "two"])
        (held,) = cache.contents()
        frames = [value for key, value in store.values.items() if key.count(".") == 2 and ".card." not in key]
        assert (held.dimensions, held.bytes, held.current) == (3, sum(map(len, frames)), True)
        assert held.oldest is not None


def test_measuring_memory_counts_as_no_use() -> None:
    backend = MemoryBackend(max_entries=2, policy="lru")
    with Cache(NgramProvider(), [backend]) as cache:
        cache.embed("one")
        cache.embed("two")
        (held,) = cache.contents()
        assert (held.entries, held.dimensions) == (2, 256)
        assert held.bytes is not None
        assert held.bytes > 2 * 256 * 4
        cache.embed("three")
        assert cache.lookup(["one", "two"]).sources == [None, "memory"]


# --- forget -----------------------------------------------------------------------------------


def test_forget_removes_a_text_for_every_task(command: Any, two_spaces: Path) -> None:
    done = command("forget", "one", "--json")
    assert done.code == 0
    assert done.json["tiers"] == ["memory", "disk"]
    assert (done.json["texts"], len(done.json["other_scopes"])) == (1, 1)
    assert "one" not in done.out.replace('"one', "")
    with embedonce.open() as cache:
        assert cache.lookup(["one", "two"]).sources == [None, "disk"]


@pytest.mark.parametrize("text", ["one\n\ntwo\n", "one\r\n"])
def test_forget_reads_files_as_embed_does_and_as_a_whole(command: Any, folder: Path, text: str) -> None:
    write_config(64)
    Path("t.txt").write_bytes(text.encode())
    texts = ["one", "two", text, text.rstrip("\r\n")]
    with embedonce.open() as cache:
        cache.embed_batch(texts)
    done = command("forget", "--file", "t.txt")
    assert done.code == 0
    assert done.out.startswith("removed ")
    with embedonce.open() as cache:
        found = cache.lookup(texts).sources
    assert found == ([None] * 4 if "two" in text else [None, "disk", None, None])


@pytest.mark.parametrize(
    ("name", "content", "options"),
    [
        ("t.txt", b"one\ntwo\n\nthree\n", ["--split", "line"]),
        ("t.txt", b"\xef\xbb\xbfone\ntwo\n", ["--split", "file"]),
        ("t.txt", "one\n\ntwo\n".encode("utf-16"), ["--split", "file"]),
        ("t.tsv", b'id\ttext\n1\t"quoted"\n', ["--quote", "none"]),
        ("t.csv", b"id;text\n1;one\n", ["--delimiter", ";"]),
        ("t.csv", b"text,answer\none,two\n", []),
        ("t.dat", b'{"text": "one"}\n', ["--format", "jsonl"]),
        ("t.txt", b"caf\xe9", ["--encoding", "latin-1"]),
    ],
)
def test_forget_removes_all_that_embed_stored(
    command: Any, folder: Path, name: str, content: bytes, options: list[str]
) -> None:
    write_config(64)
    if b"answer" in content:
        with Path("embedonce.toml").open("a") as file:
            file.write('\n[embed]\nfields = { "t.csv" = "answer" }\n')
    Path(name).write_bytes(content)
    assert command("embed", name, *options, "--out", "v.npy").code == 0
    same = [] if "--split" in options else options
    assert command("forget", "--file", name, *same).code == 0
    assert command("stats", "--json").json["entries"] == 0


def test_forget_reads_standard_input(command: Any, folder: Path) -> None:
    write_config(64)
    with embedonce.open() as cache:
        cache.embed_batch(["one", "one\n", "two"])
    assert command("forget", "--stdin", input="one\n").code == 0
    with embedonce.open() as cache:
        assert cache.lookup(["one", "one\n", "two"]).sources == [None, None, "disk"]


def test_forget_says_which_tiers_it_did_not_reach(command: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(64)

    def fail(backend: Any, keys: Sequence[str]) -> None:
        raise OSError("no")

    monkeypatch.setattr(DiskBackend, "delete_many", fail)
    done = command("forget", "a secret text", "--json")
    assert (done.code, done.json["ok"], done.json["tiers"], list(done.json["failed"])) == (
        1,
        False,
        ["memory"],
        ["disk"],
    )
    assert "a secret text" not in done.out + done.err


@pytest.mark.parametrize("arguments", [[], ["x", "--stdin"], ["--file", "f", "--stdin"], ["--file", "missing"]])
def test_forget_needs_exactly_one_source(command: Any, folder: Path, arguments: list[str]) -> None:
    assert command("forget", *arguments).code == 2


# --- tasks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["explain", "x"], ["embed", "t.txt", "--out", "o.npy"]])
@pytest.mark.parametrize("task", ["qurey", "Document", ""])
def test_an_unknown_task_is_refused(command: Any, folder: Path, arguments: list[str], task: str) -> None:
    write_config(64)
    Path("t.txt").write_text("one")
    done = command(*arguments, "--task", task)
    assert done.code == 2
    assert not Path("o.npy").exists()


# --- conformance ------------------------------------------------------------------------------

PROVIDER = """
from pathlib import Path
from embedonce_providers.ngram import NgramProvider

class Reader(NgramProvider):
    def __init__(self, *, vocabulary: Path, extra: Path | None = None):
        assert vocabulary.read_text() == "words", vocabulary
        assert extra is None or extra.is_dir()
        super().__init__()
"""


def test_conformance_only_reads_the_paths_of_a_provider(
    command: Any, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(folder))
    Path("reader_of_words.py").write_text(PROVIDER)
    Path("words.txt").write_text("words")
    Path("more").mkdir()
    done = command(
        *("conformance", "reader_of_words:Reader", "--option", "vocabulary=words.txt", "--option", "extra=more"),
        *("--rounds", "0", "--examples", "2", "--json"),
    )
    assert done.json["failed"] == 0
    assert list(Path("more").iterdir()) == []
    assert "missing --option vocabulary" in command("conformance", "reader_of_words:Reader").err
