"""``embedonce export``, and ``embedonce import --from bundle``: what they print, refuse and leave behind."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any

import pytest
from optional import needs

import embedonce
from embedonce import KeyPolicy
from embedonce._engine import bulk_calls
from embedonce_backends.disk import DiskBackend

pytestmark = needs("pyarrow")

TEXTS = [f"text {i}" for i in range(20)]
PROVIDER = '[provider]\ntype = "ngram"\ndimensions = 16\n'
MEMORY = '[[tiers]]\ntype = "memory"\n'
DISK = '[[tiers]]\ntype = "disk"\npath = "near"\ntimeout = "60s"\n'
BUNDLE = '[[tiers]]\ntype = "bundle"\npath = "bundle"\n'
KEY = "A" * 43 + "="


def write_config(*tables: str, name: str = "embedonce.toml") -> None:
    Path(name).write_text("\n".join(tables))


@pytest.fixture(autouse=True)
def tiers(folder: Path) -> None:
    """A disk tier with vectors."""
    write_config(PROVIDER, MEMORY, DISK)
    with embedonce.open("embedonce.toml") as cache:
        cache.fetch(TEXTS, metadata=[{"number": i} for i in range(20)])


def look_up(texts: list[str] = TEXTS, name: str = "embedonce.toml") -> list[str | None]:
    with embedonce.open(name) as cache:
        return list(cache.lookup(texts).sources)


# --- export -----------------------------------------------------------------------------------


def test_an_export_makes_a_bundle_that_a_tier_reads(command: Any) -> None:
    done = command("export", "--out", "a/bundle", "--dry-run")
    assert (done.code, done.out, done.err) == (0, "20 entries of 1 space would be exported to a/bundle\n", "")
    assert not Path("a").exists()
    done = command("export", "--out", "a/bundle")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("20 entries of 1 space exported to a/bundle (1 part, ")
    write_config(PROVIDER, BUNDLE.replace('bundle"\n', 'a/bundle"\n').replace('type = "a/bundle"', 'type = "bundle"'))
    with embedonce.open("embedonce.toml") as cache:
        found = cache.lookup(TEXTS)
    assert list(found.sources) == ["bundle"] * 20
    assert [metadata["number"] for metadata in found.metadata if metadata is not None] == list(range(20))


def test_the_counts_are_a_json_document(command: Any) -> None:
    found = command("export", "--out", "bundle", "--from", "disk", "--json").json
    assert found.pop("bytes") > 1000
    assert found | {"scopes": 0} == {
        "path": "bundle",
        "sources": ["disk"],
        "scopes": 0,
        "found": 20,
        "entries": 20,
        "expired": 0,
        "corrupt": 0,
        "encrypted": False,
        "unknown": {},
        "parts": 1,
        "dry_run": False,
        "stopped": None,
    }


def test_a_bundle_is_only_replaced_on_request_and_other_files_never(command: Any) -> None:
    assert command("export", "--out", "bundle").code == 0
    done = command("export", "--out", "bundle")
    assert (done.code, done.out) == (2, "")
    assert "has a bundle already; replace it with --replace, or choose another folder" in done.err
    assert command("export", "--out", "bundle", "--replace").code == 0
    done = command("export", "--out", "near", "--replace")
    assert done.code == 2
    assert "near has files that belong to no bundle" in done.err


def test_a_bundle_is_rebuilt_without_some_texts(command: Any) -> None:
    assert command("export", "--out", "bundle").code == 0
    Path("gone.txt").write_text("text 3\n\ntext 4\n")
    write_config(PROVIDER, BUNDLE)
    done = command("export", "--from", "bundle", "--out", "bundle", "--replace", "--except-texts", "gone.txt")
    assert (done.code, done.out[:23]) == (0, "18 entries of 1 space e")
    assert look_up(TEXTS[2:6]) == ["bundle", None, None, "bundle"]


def test_nothing_is_written_if_nothing_matches(command: Any) -> None:
    done = command("export", "--out", "bundle", "--model", "another")
    assert (done.code, done.out, done.err) == (1, "", "nothing matches; no bundle was written\n")
    with embedonce.open("embedonce.toml") as cache:
        cache.purge(model="char-ngram")
    assert command("export", "--out", "bundle").err == "nothing matches; no bundle was written\n"
    assert not Path("bundle").exists()


@pytest.mark.parametrize(
    ("tables", "options", "message"),
    [
        ([MEMORY], [], "error: no tier outlives a process, so there is nothing to export; add a tier such as disk"),
        ([MEMORY, DISK], ["--from", "memory"], "error: tier 'memory' is in the memory of a process"),
        ([MEMORY, DISK], ["--from", "redis"], "error: 'redis' is not a tier of the configuration; the tiers are: disk"),
        (
            [DISK, f'{DISK}name = "hidden"\nencryption = "{KEY}"\n'],
            [],
            "error: tier 'hidden' is encrypted and tier 'disk' is not, but a bundle is either encrypted or not; choose "
            "one tier with source= (--from on the command line)",
        ),
    ],
)
def test_what_cannot_work_is_refused(command: Any, tables: list[str], options: list[str], message: str) -> None:
    write_config(PROVIDER, *tables)
    done = command("export", "--out", "bundle", *options)
    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert not Path("bundle").exists()


def test_a_tier_that_fails_leaves_no_bundle(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_calls, "MAX_FAILURES", 1)

    def fail(self: DiskBackend, keys: Any, /) -> Any:
        raise OSError("unreadable sector")

    monkeypatch.setattr(DiskBackend, "get_many", fail)
    done = command("export", "--out", "bundle")
    assert (done.code, done.out) == (1, "")
    assert done.err.endswith("(OSError): unreadable sector. No bundle was written.\n")
    assert not Path("bundle").exists()


def test_a_full_disk_is_reported_with_the_folder_and_leaves_no_bundle(
    command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from embedonce_backends.bundle.staging import PlainStage

    def fill(self: PlainStage, *_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PlainStage, "add", fill)
    done = command("export", "--out", "a/bundle")
    assert (done.code, done.out) == (1, "")
    assert done.err == "error: a/bundle: No space left on device. No bundle was written.\n"
    assert not Path("a/bundle").exists()
    assert "No space left on device" in command("export", "--out", "bundle", "--json").json["stopped"]


# --- import --from bundle ---------------------------------------------------------------------


def test_a_bundle_is_imported_into_each_tier_that_lacks_its_entries(command: Any) -> None:
    assert command("export", "--out", "bundle").code == 0
    write_config(MEMORY, DISK, DISK.replace("near", "far").replace("[[tiers]]", '[[tiers]]\nname = "far"'), BUNDLE)
    done = command("import", "bundle", "--from", "bundle", "--dry-run")
    assert (done.code, done.err) == (0, "")
    assert done.out == (
        "0 entries would be copied from bundle to disk\n  20 already in disk\n"
        "20 entries would be copied from bundle to far\nnothing was stored\n"
    )
    shutil.rmtree("near")
    done = command("import", "bundle", "--from", "bundle", "--json")
    counts = {tier: (one["copied"], one["already_there"]) for tier, one in done.json["tiers"].items()}
    assert counts == {"disk": (20, 0), "far": (20, 0)}
    assert (done.code, done.err, done.json["done"], done.json["importer"]) == (0, "", 40, "bundle")
    assert command("import", "bundle", "--from", "bundle", "--quiet").out == ""
    write_config(PROVIDER, DISK.replace("near", "far"))
    assert look_up() == ["disk"] * 20


def test_a_second_import_fills_a_tier_that_failed(command: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command("export", "--out", "bundle").code == 0
    monkeypatch.setattr(bulk_calls, "MAX_FAILURES", 1)
    write_config(*[DISK.replace("near", name).replace("[[tiers]]", f'[[tiers]]\nname = "{name}"') for name in "abc"])
    store = DiskBackend.set_many

    def fail(self: DiskBackend, items: Any, ttl: float | None, /) -> None:
        if self.path.name == "b":
            raise OSError("the disk is full")
        store(self, items, ttl)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DiskBackend, "set_many", fail)
        done = command("import", "bundle", "--from", "bundle", "--json")
    assert done.code == 1
    assert {name: one["copied"] for name, one in done.json["tiers"].items()} == {"a": 20, "b": 0, "c": 20}
    assert done.err.startswith("error: tier 'b' failed for ")
    done = command("import", "bundle", "--from", "bundle", "--json")
    assert {name: one["copied"] for name, one in done.json["tiers"].items()} == {"a": 0, "b": 20, "c": 0}


def test_an_encrypted_bundle_is_imported_with_the_keys_of_the_tiers(command: Any) -> None:
    hidden, other = DISK.replace("near", "hidden") + f'encryption = "{KEY}"\n', DISK.replace("near", "other")
    write_config(PROVIDER, hidden)
    with embedonce.open("embedonce.toml") as cache:
        cache.embed_batch(TEXTS)
    done = command("export", "--out", "bundle")
    assert done.out.startswith("20 entries of 1 space exported, encrypted, to bundle (")
    write_config(other)
    done = command("import", "bundle", "--from", "bundle")
    assert (done.code, done.out) == (2, "")
    assert done.err == "error: bundle is encrypted, and no tier has a key: add encryption to the tiers with its key\n"
    write_config(other + f'encryption = ["{"B" * 43}=", "{KEY}"]\n')
    done = command("import", "bundle", "--from", "bundle")
    assert (done.code, done.out, done.err) == (0, "20 entries copied from bundle to disk\n", "")


def test_a_bundle_of_other_spaces_is_imported_and_described(command: Any) -> None:
    assert command("export", "--out", "bundle").code == 0
    write_config(PROVIDER.replace("16", "8"), DISK)
    done = command("import", "bundle", "--from", "bundle")
    assert done.code == 0
    assert done.err.startswith("note: the configuration uses none of these spaces: ")
    assert "model char-ngram" in done.err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--verify", "20"],
            "--verify cannot be used with --from bundle: nothing needs to be proven, because",
        ),
        (["--task", "document"], "--task cannot be used with --from bundle: a bundle says itself for which task"),
        (["--option", "a=b"], "--option cannot be used with --from bundle: a bundle has no options"),
        (["--texts", "embedonce.toml"], "--texts cannot be used with --from bundle: all entries of a bundle are"),
    ],
)
def test_options_of_other_sources_are_refused_with_the_reason(command: Any, options: list[str], message: str) -> None:
    done = command("import", "bundle", "--from", "bundle", *options)
    assert (done.code, done.out) == (2, "")
    assert message in done.err


def test_what_is_not_a_bundle_and_has_no_place_is_refused(command: Any) -> None:
    done = command("import", "nothing", "--from", "bundle")
    assert (done.code, done.out) == (2, "")
    assert "there is no bundle at" in done.err
    assert command("export", "--out", "bundle").code == 0
    write_config(PROVIDER, MEMORY, BUNDLE)
    done = command("import", "bundle", "--from", "bundle")
    assert (done.code, "outlives this process, so the entries would be lost" in done.err) == (2, True)


def test_a_bundle_among_the_importers_is_an_error_that_names_the_tier() -> None:
    write_config(PROVIDER, DISK, '[[imports]]\ntype = "bundle"\npath = "bundle"\n')
    message = r'embedonce.toml:\d+:\d+: \[\[imports\]\] "bundle": .*; use a tier: \[\[tiers\]\] type = "bundle"'
    with pytest.raises(embedonce.ConfigError, match=message):
        embedonce.open("embedonce.toml")


def test_a_keyed_cache_exports_keyed_entries(command: Any) -> None:
    write_config(PROVIDER, DISK, '[key]\nsecret = "a long secret"\n')
    with embedonce.open("embedonce.toml") as cache:
        cache.embed_batch(TEXTS)
        scope = cache.explain("a").scope
        [tier] = cache._chain.tiers
        assert isinstance(tier.backend, DiskBackend)
    assert command("export", "--out", "bundle", "--scope", scope).code == 0
    shutil.rmtree("near")
    for policy, sources in ((KeyPolicy(secret="a long secret"), ["bundle"] * 20), (KeyPolicy(), [None] * 20)):
        secret = f'[key]\nsecret = "{policy.secret}"\n' if policy.secret else ""
        write_config(PROVIDER, BUNDLE, secret)
        assert look_up() == sources
