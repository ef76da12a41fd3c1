"""``config``, ``check``, ``plugins`` and ``schema``: effective settings, their sources, and broken plugins."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from installed_plugins import write_distribution

FILE = """\
[key]
secret = "${CACHE_SECRET}"
normalize = ["nfc", "strip"]

[provider]
type = "ngram"

[[tiers]]
type = "disk"
path = "vectors"
ttl = "1h"

[[tiers]]
type = "memory"
"""

_numbers = itertools.count()


@pytest.fixture
def config_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CACHE_SECRET", "hunter2")
    file = folder / "embedonce.toml"
    file.write_text(FILE)
    return file


@pytest.fixture
def stranger(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that installs a plugin ``stranger`` of a distribution ``acme`` with this code."""

    def install(code: str) -> None:
        site, number = tmp_path_factory.mktemp("site"), next(_numbers)
        module, version = f"cli_stranger_{number}", f"2.{number}"
        write_distribution(site, module, code, plugins=["stranger"], distribution="acme", version=version)
        monkeypatch.syspath_prepend(str(site))

    return install


def test_config_shows_every_setting_and_its_source(
    command: Any, config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EMBEDONCE__PROVIDER__DIMENSIONS", "64")
    monkeypatch.setenv("EMBEDONCE__TIERS__DISK__ON_ERROR", "raise")
    done = command("config")
    assert done.code == 0
    assert "hunter2" not in done.out + done.err
    lines = [line.split() for line in done.out.splitlines()]
    for line in (
        ["key.secret", "(hidden)", "embedonce.toml:2"],
        ["key.normalize", '["nfc",', '"strip"]', "embedonce.toml:3"],
        ["key.version", '"v1"', "default"],
        ["provider.dimensions", "64", "EMBEDONCE__PROVIDER__DIMENSIONS"],
        ["tiers.disk.path", str(config_file.parent / "vectors"), "embedonce.toml:10"],
        ["tiers.disk.ttl", "3600.0", "embedonce.toml:11"],
        ["tiers.disk.on_error", '"raise"', "EMBEDONCE__TIERS__DISK__ON_ERROR"],
        ["tiers.memory.max_entries", "2048", "default"],
        ["plugins.allow", "-", "default"],
    ):
        assert line in lines
    assert not (config_file.parent / "vectors").exists(), "config opens nothing"


def test_config_as_json(command: Any, config_file: Path) -> None:
    output = command("config", "--config", config_file.name, "--json").json
    assert output["source"] == "embedonce.toml"
    by_name = {one["name"]: one for one in output["settings"]}
    assert by_name["key.secret"] == {"name": "key.secret", "value": "(hidden)", "origin": "embedonce.toml:2"}
    assert by_name["key.normalize"]["value"] == ["nfc", "strip"]
    assert by_name["tiers.disk.ttl"]["value"] == 3600.0


def test_without_a_file_the_defaults_are_shown(command: Any, folder: Path) -> None:
    done = command("config")
    assert "No configuration found" in done.err
    assert "tiers.disk.max_bytes" in done.out


def test_an_invalid_configuration_is_explained(command: Any, config_file: Path) -> None:
    config_file.write_text(FILE.replace("memory", "memry").replace("ttl", "tll"))
    done = command("config")
    assert done.code == 2
    assert 'embedonce.toml:11:1: unknown key "tll" in [[tiers]] "disk"; did you mean "ttl"?' in done.err
    assert 'embedonce.toml:14:8: type in [[tiers]] "memry": no plugin "memry" is installed; did you mean' in done.err


def test_check_shows_a_chain_warning_once_with_its_place(command: Any, config_file: Path) -> None:
    done = command("check")
    assert done.code == 0
    assert done.err.count("'memory' (in this process) comes after the slower tier 'disk'") == 1
    assert "warning: embedonce.toml:13:1: tier 'memory'" in done.err
    (warning,) = command("check", "--json").json["warnings"]
    assert (warning["line"], warning["column"]) == (13, 1)


BROKEN = {
    "raise RuntimeError('boom')": "cannot be imported: RuntimeError: boom",
    "api = 2": "is written for version 2 of the plugin contract",
    "x = 1": "the module has no hooks",
    "import embedonce\n@embedonce.hookimpl\ndef embedonce_backends(): 1 / 0": "ZeroDivisionError",
    "import embedonce\n@embedonce.hookimpl\ndef embedonce_backends(): return {'stranger': dict}": "must define",
}


@pytest.mark.slow
@pytest.mark.parametrize(("code", "why"), BROKEN.items(), ids=range(len(BROKEN)))
def test_a_broken_plugin_is_reported_and_does_no_harm(
    command: Any, config_file: Path, stranger: Any, code: str, why: str
) -> None:
    stranger(code)
    checked = command("check")
    assert checked.code == 0
    (line,) = [line for line in checked.err.splitlines() if "stranger" in line]
    assert line.startswith('warning: an installed plugin cannot be used: plugin "stranger" of acme 2.')
    assert why in line
    assert command("embed", "embedonce.toml", "--out", "x.npy").code == 0
    listed = command("plugins")
    assert listed.code == 1
    (line,) = [line for line in listed.out.splitlines() if line.startswith("stranger")]
    assert "acme 2." in line
    assert why in line
    (reported,) = [one for one in command("check", "--json").json["plugins"] if one["name"] == "stranger"]
    assert why in reported["error"]


def test_no_command_loads_a_plugin_that_is_not_allowed(command: Any, config_file: Path, stranger: Any) -> None:
    stranger("from pathlib import Path\nPath('loaded').touch()\nraise RuntimeError")
    config_file.write_text(FILE + "[plugins]\nallow = []\n")
    for name in ("check", "plugins", "schema", "config", "stats"):
        command(name)
    assert not Path("loaded").exists()
    done = command("plugins")
    (line,) = [line for line in done.out.splitlines() if line.startswith("stranger")]
    assert 'is not allowed: add "acme" to the list "allow" in [plugins]' in line
    command("plugins", "--config", "/dev/null")
    assert Path("loaded").exists()


def test_an_invalid_list_of_allowed_plugins_is_reported(command: Any, config_file: Path) -> None:
    config_file.write_text('tiers = 3\n[plugins]\nallow = "acme"\n')
    done = command("plugins")
    assert done.code == 2
    assert done.err == 'error: embedonce.toml:3:9: allow = "acme" in [plugins]: must be a list, such as ["acme"]\n'
