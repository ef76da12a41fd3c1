"""A server with a read-only tier: what it finds there, and what it cannot erase there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from admin_calls import ask, configure, is_cached
from optional import needs
from read_only_stores import export_to_bundle
from serving import serve

from embedonce import config
from embedonce_providers.ngram import NgramProvider

pytestmark = needs("pyarrow")

TEXTS = ["private one", "private two", "private three"]


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """A memory tier, a disk tier and a bundle with three texts."""
    export_to_bundle(tmp_path / "bundle", NgramProvider(), TEXTS)
    found = configure(tmp_path)
    found["tiers"].append({"type": "bundle", "path": str(tmp_path / "bundle")})
    return found


async def test_forget_names_the_tier_and_how_its_store_is_made_again(settings: Any, tmp_path: Path) -> None:
    async with serve(settings, tmp_path) as server:
        assert await is_cached(server, TEXTS[0])
        answer = await ask(server, "forget", {"input": TEXTS[:2]})
        assert (answer.status, answer.error["code"]) == (503, "erase_incomplete")
        assert answer.error["tiers"] == {
            "bundle": "it is read-only and keeps 2 of the entries; rebuild it without them: "
            "embedonce export --from bundle --out FOLDER --replace --except-texts FILE"
        }
        assert answer.error["unable"] == ["bundle"]
        assert [sum(scopes.values()) for scopes in answer.error["kept"].values()] == [2]
        assert "which cannot be changed" in answer.error["message"]
        assert "expires or is evicted" not in answer.error["message"]
        assert "retry-after" not in answer.headers
        assert b"private" not in answer.body


async def test_forget_succeeds_if_the_bundle_has_none_of_the_texts(settings: Any, tmp_path: Path) -> None:
    async with serve(settings, tmp_path) as server:
        await server.embed("new")
        assert (await ask(server, "forget", {"input": "new"})).status == 200
        assert not await is_cached(server, "new")


async def test_purge_counts_what_the_bundle_keeps(settings: Any, tmp_path: Path) -> None:
    async with serve(settings, tmp_path) as server:
        await server.embed("new")
        dry = await ask(server, "purge", {"version": "v1"})
        (scope,) = dry.json["scopes"]
        assert (dry.status, dry.json["kept"]) == (200, {"bundle": {scope: 3}})
        assert dry.json["removed"] == {"memory": 1, "disk": 1}
        done = await ask(server, "purge", {"version": "v1", "dry_run": False})
        assert (done.status, done.error["kept"]) == (503, {"bundle": {scope: 3}})
        assert done.error["tiers"]["bundle"].endswith(f"--except-scope {scope}")
        assert not await is_cached(server, "new")


async def test_purge_of_a_model_asks_whether_another_model_shares_what_the_bundle_keeps(
    settings: Any, tmp_path: Path
) -> None:
    models = [{"name": name, "provider": {"type": "ngram"}} for name in ("one", "two")]
    async with serve({**settings, "serve": {**settings["serve"], "models": models}}, tmp_path) as server:
        answer = await ask(server, "purge", {"model": "one", "dry_run": False})
        assert (answer.status, answer.error["code"]) == (400, "shared_scopes")


async def test_check_and_stats_show_it(settings: Any, tmp_path: Path) -> None:
    async with serve(settings, tmp_path) as server:
        checked = await ask(server, "check", {})
        found = {tier["tier"]: tier for tier in checked.json["tiers"]}
        assert (found["bundle"]["ok"], found["bundle"]["writes"], found["bundle"]["read_only"]) == (True, None, True)


def test_workers_share_nothing_that_they_compute_through_a_bundle(settings: Any) -> None:
    from embedonce_server.serving import list_warnings

    alone = {**settings, "tiers": [tier for tier in settings["tiers"] if tier["type"] != "disk"]}
    (warning,) = list_warnings(config.load(alone), 2, [])
    assert "no tier is shared by the 2 workers" in warning
    assert list_warnings(config.load(settings), 2, []) == []
