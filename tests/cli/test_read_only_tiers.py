"""Commands that meet a read-only tier: what they show, and what they say that it keeps."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from optional import needs
from read_only_stores import export_to_bundle

from embedonce import config
from embedonce.config import schema
from embedonce_providers.ngram import NgramProvider

pytestmark = needs("pyarrow")

PROVIDER = '[provider]\ntype = "ngram"\ndimensions = 8\n'
DISK = '[[tiers]]\ntype = "disk"\npath = "d"\n'
BUNDLE = '[[tiers]]\ntype = "bundle"\npath = "my bundle"\n'
TEXTS = ["one", "two", "three"]


@pytest.fixture
def bundle(folder: Path) -> Path:
    """The folder of a bundle with three texts. The configuration has a disk tier and this bundle."""
    path = folder / "my bundle"
    export_to_bundle(path, NgramProvider(dimensions=8), TEXTS)
    Path("embedonce.toml").write_text(PROVIDER + DISK + BUNDLE)
    return path


def find_scope(command: Any) -> str:
    (held,) = command("stats", "--json").json["held"]
    return str(held["scope"])


def damage(bundle: Path) -> None:
    (part,) = bundle.glob("*.arrow")
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 0xFF
    part.write_bytes(content)


# --- check ------------------------------------------------------------------------------------


def test_check_verifies_the_files_and_says_so_before(command: Any, bundle: Path) -> None:
    done = command("check")
    assert done.code == 0
    assert "verifying tier 'bundle' (" in done.err
    (row,) = [line for line in done.out.splitlines() if line.startswith("bundle")]
    assert row.split()[:4] == ["bundle", "bundle", "yes", "read-only"]
    assert "3 entries in 1 part are intact" in row
    found = {check["tier"]: check for check in command("check", "--json").json["tiers"]}
    assert (found["bundle"]["verified"], found["bundle"]["read_only"], found["bundle"]["writes"]) == (True, True, None)
    assert (found["disk"]["verified"], found["disk"]["read_only"], found["disk"]["writes"]) == (None, False, True)


def test_a_quick_check_reads_no_files_as_a_whole(command: Any, bundle: Path) -> None:
    damage(bundle)
    done = command("check", "--quick", "--json")
    assert (done.code, done.err) == (0, "")
    assert done.json["tiers"][1]["verified"] is None


def test_check_finds_a_damaged_file(command: Any, bundle: Path) -> None:
    damage(bundle)
    done = command("check")
    assert done.code == 1
    assert "error: 1 tier cannot be read completely: bundle" in done.err
    found = command("check", "--json").json
    assert (found["ok"], found["tiers"][1]["ok"], found["tiers"][1]["verified"]) == (False, False, False)


def test_check_says_what_a_bundle_of_another_space_holds(command: Any, bundle: Path) -> None:
    Path("embedonce.toml").write_text(PROVIDER.replace("8", "16") + DISK + BUNDLE)
    done = command("check", "--quick")
    assert done.code == 0
    expected = "holds 3 entries of ngram char-ngram (8 dimensions, version v1), none of which this configuration uses"
    assert expected in done.out
    assert "dimensions 8 instead of 16" in done.out


# --- forget and purge -------------------------------------------------------------------------


def test_forget_has_the_command_that_makes_the_bundle_again(command: Any, bundle: Path) -> None:
    Path("my texts.txt").write_text("one\n\ntwo\n")
    done = command("forget", "--file", "my texts.txt")
    assert done.code == 1
    assert done.out.startswith("removed ")
    assert (
        f"it is read-only and keeps 2 of the entries; rebuild it without them: embedonce export --from bundle "
        f"--out '{bundle}' --replace --except-texts 'my texts.txt'"
    ) in done.err
    found = command("forget", "three", "--json")
    assert (found.code, found.json["tiers"], list(found.json["failed"])) == (1, ["disk"], ["bundle"])
    assert found.json["kept"] == {"bundle": {find_scope(command): 1}}
    assert found.json["failed"]["bundle"].endswith("--except-texts FILE")


def test_forget_succeeds_if_the_bundle_has_none_of_the_texts(command: Any, bundle: Path) -> None:
    done = command("forget", "four", "--json")
    assert (done.code, done.json["tiers"], done.json["failed"]) == (0, ["disk", "bundle"], {})


def test_purge_counts_what_the_bundle_keeps_and_names_the_command(command: Any, bundle: Path) -> None:
    scope = find_scope(command)
    dry = command("purge", "--scope", scope, "--dry-run")
    assert dry.code == 0
    assert "3 entries kept in bundle, which is read-only" in dry.out
    dry = command("purge", "--scope", scope, "--dry-run", "--json")
    assert (dry.code, dry.json["kept"], dry.json["failed"]) == (0, {"bundle": {scope: 3}}, {})
    done = command("purge", "--scope", scope, "--yes")
    assert done.code == 1
    assert "3 entries kept in bundle" in done.out
    assert f"embedonce export --from bundle --out '{bundle}' --replace --except-scope {scope}" in done.err
    done = command("purge", "--scope", scope, "--yes", "--json")
    assert (done.code, list(done.json["failed"]), done.json["removed"]) == (1, ["bundle"], {"disk": 0})


def test_purge_of_unused_scopes_counts_what_the_bundle_keeps(command: Any, bundle: Path) -> None:
    Path("embedonce.toml").write_text(PROVIDER.replace("8", "16") + DISK + BUNDLE)
    done = command("purge", "--unused", "--dry-run", "--json")
    assert (done.code, [sum(scopes.values()) for scopes in done.json["kept"].values()]) == (0, [3])


# --- the other commands -----------------------------------------------------------------------


def test_stats_explain_and_savings_show_it(command: Any, bundle: Path) -> None:
    (held,) = command("stats", "--json").json["held"]
    assert (held["tier"], held["entries"], held["current"]) == ("bundle", 3, True)
    assert command("explain", "one", "--json").json["tiers"] == {"disk": "miss", "bundle": "hit"}
    assert command("savings", "--json").code == 0
    assert command("migrate").code == 0
    assert command("compact").code == 0


def test_savings_are_in_no_bundle(command: Any, bundle: Path) -> None:
    Path("embedonce.toml").write_text(PROVIDER + BUNDLE)
    done = command("savings")
    assert done.code == 1
    assert "nothing is written to a read-only tier" in done.err


def test_embed_reads_the_bundle_and_writes_to_the_other_tier(command: Any, bundle: Path) -> None:
    Path("texts.txt").write_text("one\n\nfour\n")
    done = command("embed", "texts.txt", "--split", "line", "--out", "vectors.jsonl", "--json")
    assert done.code == 0
    assert (done.json["computed"], done.json["hits"]["bundle"]) == (1, 1)


def test_a_chain_that_stores_nothing_gets_a_warning(command: Any, bundle: Path) -> None:
    Path("embedonce.toml").write_text(PROVIDER + BUNDLE)
    assert "no other tier stores vectors" in command("check", "--quick").err


def test_a_conformance_run_names_the_contract(command: Any, folder: Path) -> None:
    done = command("conformance", "bundle")
    assert done.code == 2
    assert "embedonce.testing.ReadOnlyContract" in done.err


# --- the configuration ------------------------------------------------------------------------


@pytest.mark.parametrize(("option", "value"), [("ttl", "60"), ("write", '"none"'), ("lease", "5")])
def test_options_of_writes_are_refused_with_their_place(command: Any, bundle: Path, option: str, value: str) -> None:
    Path("embedonce.toml").write_text(PROVIDER + BUNDLE + f"{option} = {value}\n")
    done = command("check")
    assert done.code == 2
    assert f'embedonce.toml:7:1: {option} in [[tiers]] "bundle": the tier does not support' in done.err
    assert f'its store is read-only and nothing is written to it; remove "{option}"' in done.err


def test_the_schema_has_no_options_of_writes_for_a_bundle() -> None:
    tables = {table["title"]: table for table in schema()["properties"]["tiers"]["items"]["oneOf"] if "title" in table}
    assert not {"ttl", "write", "lease"} & tables["bundle"]["properties"].keys()
    assert {"path", "timeout", "on_error", "encryption"} <= tables["bundle"]["properties"].keys()
    assert {"ttl", "write", "lease"} <= tables["disk"]["properties"].keys()


def test_a_plugin_without_set_many_is_not_broken(command: Any) -> None:
    (found,) = [plugin for plugin in json.loads(command("plugins", "--json").out) if plugin["type"] == "bundle"]
    assert not found["error"]


def test_the_configuration_knows_that_the_tier_is_read_only(bundle: Path) -> None:
    assert [tier.is_read_only for tier in config.load("embedonce.toml").tiers] == [False, True]


def copy_command(message: str) -> list[str]:
    """Return the words of the command that a message names."""
    return shlex.split(message.split("rebuild it without them: embedonce ")[1].splitlines()[0])


def test_the_command_of_forget_works_as_it_is_with_the_same_configuration_and_the_same_reading(
    command: Any, bundle: Path
) -> None:
    Path("a b").mkdir()
    Path("a b/read only.toml").write_text(
        Path("embedonce.toml").read_text().replace('path = "', f'path = "{bundle.parent}/')
    )
    Path("embedonce.toml").write_text(PROVIDER + DISK)
    Path("my texts.txt").write_text("title;body\nx;one\ny;two\n")
    reading = ("--format", "csv", "--delimiter", ";", "--field", "body", "--quote", "none", "--encoding", "cp1252")
    forget = ("forget", "--file", "my texts.txt", *reading, "--config", "a b/read only.toml")
    done = command(*forget)
    assert (done.code, "keeps 2 of the entries" in done.err) == (1, True)
    rebuilt = command(*copy_command(done.err))
    assert (rebuilt.code, rebuilt.out[:25]) == (0, "1 entry of 1 space export"), rebuilt.err
    assert command(*forget).code == 0


def test_the_command_of_purge_names_the_configuration_and_says_what_to_do_if_nothing_is_left(
    command: Any, bundle: Path
) -> None:
    scope = find_scope(command)
    Path("other.toml").write_text(Path("embedonce.toml").read_text())
    Path("embedonce.toml").write_text(PROVIDER + DISK)
    done = command("purge", "--scope", scope, "--yes", "--config", "other.toml")
    assert done.code == 1
    rebuilt = command(*copy_command(done.err))
    assert rebuilt.code == 1
    assert "no bundle was written" in rebuilt.err
    assert f"{bundle} stays as it is; remove the folder if nothing is to stay" in rebuilt.err
