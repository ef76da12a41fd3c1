"""The folders of a server: one that outlives it, and a temporary one that is removed even if the server was killed."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from embedonce import config
from embedonce_server.connections.listening import list_open_addresses, resolve_host
from embedonce_server.processes.reloading import Reloads
from embedonce_server.run_folder import NoStateFolder, open_run_folder

KEY = "key-of-the-search-team"


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "states"))
    monkeypatch.setenv("HOME", str(tmp_path))
    return folder


def load(tenant: Mapping[str, Any] | None = None, **serve: Any) -> config.Config:
    tenants = [] if tenant is None else [{"name": "search", "keys": [KEY], **tenant}]
    return config.load({"provider": {"type": "ngram"}, "tiers": [], "serve": {"tenants": tenants, **serve}})


def test_a_server_without_tenants_keeps_its_state_too_because_a_reload_may_add_tenants(temporary: Path) -> None:
    with open_run_folder(load()) as (folder, locks):
        assert folder.is_lasting
        assert not folder.state.is_relative_to(temporary)
        assert len(locks) == 2
    assert list(temporary.iterdir()) == []
    assert folder.state.is_dir()


def test_of_two_servers_without_tenants_the_second_one_has_a_temporary_state(
    temporary: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with open_run_folder(load()) as (first, _), open_run_folder(load()) as (second, locks):
        assert (first.is_lasting, second.is_lasting) == (True, False)
        assert second.state.is_relative_to(second.path)
        assert len(locks) == 1
        assert "a reload cannot add tenants with tokens_per_day" in caplog.text
        with pytest.raises(NoStateFolder, match="set another state_dir"), open_run_folder(load({})):
            pass
    assert list(temporary.iterdir()) == []


def test_without_a_home_folder_only_a_server_with_tenants_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("platformdirs.user_state_path", lambda *args, **options: Path("relative"))
    with open_run_folder(load()) as (folder, _):
        assert not folder.is_lasting
    with pytest.raises(NoStateFolder, match="the home folder is unknown; set state_dir"), open_run_folder(load({})):
        pass
    with open_run_folder(load({}, state_dir=str(tmp_path / "state"))) as (folder, _):
        assert folder.is_lasting


def test_rates_that_cannot_be_opened_are_one_error_with_a_hint(tmp_path: Path, temporary: Path) -> None:
    (tmp_path / "state" / "rates").mkdir(parents=True)
    settings = load({}, state_dir=str(tmp_path / "state"))
    with pytest.raises(NoStateFolder, match=r"cannot use .*rates: Is a directory; .*set state_dir in \[serve\]"):  # noqa: SIM117
        with open_run_folder(settings):
            pass
    assert list(temporary.iterdir()) == []


_SERVER = """
import os, sys
from embedonce import config
from embedonce_server.run_folder import open_run_folder

with open_run_folder(config.load({"provider": {"type": "ngram"}, "tiers": []})) as (folder, locks):
    print(folder.path, flush=True)
    sys.stdin.read()
"""


def test_the_folder_of_a_killed_server_is_removed_at_the_next_start_and_no_other(temporary: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as server:
        assert server.stdout is not None
        killed = Path(server.stdout.readline().strip())
        (temporary / "embedonce-of-another-program").mkdir()
        with open_run_folder(load()) as (living, _):
            assert killed.is_dir()
            server.kill()
            server.wait()
            with open_run_folder(load()):
                assert not killed.exists()
                assert (living.path / "metrics").is_dir()
    assert [folder.name for folder in temporary.iterdir()] == ["embedonce-of-another-program"]


@pytest.mark.parametrize("keeps_budgets", [True, False])
async def test_a_reload_adds_budgets_only_if_they_can_be_kept(
    keeps_budgets: bool, caplog: pytest.LogCaptureFixture
) -> None:
    for tenant, is_accepted in (({"tokens_per_day": 5}, keeps_budgets), ({"requests_per_minute": 5}, True)):
        reloads = Reloads(lambda tenant=tenant: load(tenant), load(), (), keeps_budgets=keeps_budgets)  # type: ignore[misc]
        assert ((await reloads.load()) is not None) is is_accepted
    assert ("set state_dir in [serve], and restart the server" in caplog.text) is not keeps_budgets


async def test_the_log_says_what_a_reload_has_loaded_and_warns_if_keys_are_no_longer_needed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "embedonce.serve")
    reloads = Reloads(load, load(), (), keeps_budgets=True)
    for loaded in (load(), load({}), load()):
        reloads.report_success(loaded)
    assert caplog.messages == [
        "reloaded [serve] of a dict: 1 model, 0 tenants",
        "reloaded [serve] of a dict: 1 model, 1 tenant",
        "reloaded [serve] of a dict: 1 model, 0 tenants",
        "the configuration has no tenants any more, so requests need no key",
    ]


def test_an_ipv4_address_in_the_form_of_ipv6_is_the_ipv4_address() -> None:
    addresses = resolve_host("::ffff:127.0.0.1")
    assert [(address.family, address.ip) for address in addresses] == [(socket.AF_INET, "127.0.0.1")]
    assert list_open_addresses(addresses) == []
    assert list_open_addresses(resolve_host("::ffff:0.0.0.0")) == ["0.0.0.0"]
