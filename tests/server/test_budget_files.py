"""Two workers whose file of the budgets is damaged or deleted, and days that end, as clients of the endpoint see it."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from patience import wait_until_async
from prometheus_client.parser import text_string_to_metric_families
from serving import ADMIN_KEY, KEY, Answer
from worker_pairs import Worker, serve_workers

from embedonce.testing.servers.openai import OpenAIServer
from embedonce_server import service
from embedonce_server.tenants import budget_file
from embedonce_server.tenants.budgets import Budgets

HEADERS = {"authorization": f"Bearer {KEY}"}
ADMIN = {"authorization": f"Bearer {ADMIN_KEY}"}
TEXT = "tea is ready " * 20
CALLS = 4
"""How many texts the budget is enough for."""
DAY = 86_400
MIDNIGHT = 20_000.0 * DAY


def make_text(number: int) -> str:
    """Return one of up to a hundred texts with the same number of tokens."""
    return f"{TEXT}{number:02}"


def compute_budget(api: OpenAIServer) -> int:
    """Return the tokens of ``CALLS`` texts, and some more, because an estimate may be larger than what a text costs."""
    cost = api.tokens_of(make_text(0))
    return CALLS * cost + cost // 2


def configure(api: OpenAIServer) -> dict[str, Any]:
    tenant = {"name": "search", "keys": [KEY], "tokens_per_day": compute_budget(api)}
    return {
        "provider": {"type": "openai", "model": "m", "base_url": api.base_url, "api_key": "k", "max_retries": 0},
        "tiers": [{"type": "memory"}],
        "serve": {"admin_key": ADMIN_KEY, "tenants": [tenant]},
    }


async def ask(workers: list[Worker], numbers: range) -> list[int]:
    """Ask the workers in turn for one text each, and return the statuses."""
    answers = [await workers[i % 2].embed(make_text(i), headers=HEADERS) for i in numbers]
    assert {one.error["code"] for one in answers if one.status == 503} <= {"budgets_unavailable"}
    return [one.status for one in answers]


async def read_used(worker: Worker) -> int:
    tenants = (await worker.call("GET", "/admin/stats", headers=ADMIN)).json["tenants"]
    used: int = tenants[0]["tokens_used"]
    return used


# --- a file that is damaged or deleted --------------------------------------------------------


def list_files(path: Path) -> list[Path]:
    return list(path.parent.glob(f"{path.name}*"))


def delete_all(path: Path) -> None:
    for file in list_files(path):
        file.unlink()


def delete_file_alone(path: Path) -> None:
    path.unlink()


def delete_log(path: Path) -> None:
    for file in list_files(path):
        if file != path:
            file.unlink()


def replace_file(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(b"this is no database" * 1000)
    other.replace(path)


def overwrite_file(path: Path) -> None:
    overwrite(path)


def overwrite_tables(path: Path) -> None:
    overwrite(path, 4096)


def overwrite_log(path: Path) -> None:
    overwrite(path.with_name(f"{path.name}-wal"))


def overwrite(path: Path, start: int = 0) -> None:
    """Overwrite a file in place, as a broken disk does. Connections that are open stay connected to it."""
    with path.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(start)
        file.write(b"\xa5" * (size - start))


def cut_off_tables(path: Path) -> None:
    os.truncate(path, 4096)


def empty_file(path: Path) -> None:
    os.truncate(path, 0)


DAMAGES = [
    delete_all,
    delete_file_alone,
    delete_log,
    replace_file,
    overwrite_file,
    overwrite_tables,
    overwrite_log,
    cut_off_tables,
    empty_file,
]


@pytest.mark.parametrize("is_log_empty", [False, True], ids=["in log", "in file"])
@pytest.mark.parametrize("damage", DAMAGES)
async def test_a_damaged_file_never_lets_a_tenant_spend_more_than_one_more_budget(
    api: OpenAIServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
    is_log_empty: bool,
) -> None:
    monkeypatch.setattr(budget_file, "BUSY_SECONDS", 0.01)
    async with serve_workers(configure(api), tmp_path) as workers:
        path = tmp_path / "budgets.db"
        assert await ask(workers, range(2)) == [200, 200]
        if is_log_empty:  # SQLite does this by itself from time to time
            with closing(sqlite3.connect(path)) as connection:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        damage(path)
        statuses = await ask(workers, range(10, 24))
        # The file either still counts, or counts anew, or stops all spending.
        assert statuses.count(200) <= CALLS
        assert set(statuses[-4:]) <= {429, 503}
        assert len(api.requests) == 2 + statuses.count(200), "a refused request was sent"
        for i in range(2):
            assert (await workers[i].embed(make_text(i), headers=HEADERS)).cache == ("hit", 1, 0)

        delete_all(path)
        before = len(api.requests)
        statuses = await ask(workers, range(30, 40))
        assert set(statuses[:2]) <= {200, 503}
        assert statuses.count(200) == len(api.requests) - before == CALLS
        assert set(statuses[-4:]) == {429}
        assert await read_used(workers[0]) == CALLS * api.tokens_of(make_text(0))


async def test_damage_is_logged_once_and_named(
    api: OpenAIServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with serve_workers(configure(api), tmp_path, 1) as (worker,):
        path = tmp_path / "budgets.db"
        delete_all(path)
        path.write_bytes(b"this is no database" * 1000)
        for i in range(3):
            answer = await worker.embed(make_text(i), headers=HEADERS)
            assert (answer.status, answer.headers["retry-after"]) == (503, "5")
        (record,) = [record for record in caplog.records if record.name == "embedonce.serve"]
        assert f"{path}: the budgets of the tenants cannot be used (DatabaseError" in record.getMessage()
        assert "If it is damaged, delete it with its -wal and -shm" in record.getMessage()
        assert (await worker.call("GET", "/admin/stats", headers=ADMIN)).json["tenants"] is None
        assert (await worker.call("GET", "/metrics", headers=ADMIN)).status == 200
        assert api.requests == []


# --- midnight UTC -----------------------------------------------------------------------------


class Clock:
    """A clock that the test moves."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock(MIDNIGHT - 10)
    monkeypatch.setattr(service, "Budgets", partial(Budgets, clock=clock))
    return clock


def read_gauge(answer: Answer, name: str) -> float:
    (value,) = [
        sample.value
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
        if sample.name == name
    ]
    return value


async def test_after_midnight_all_workers_compute_again(api: OpenAIServer, tmp_path: Path, clock: Clock) -> None:
    cost = api.tokens_of(make_text(0))
    async with serve_workers(configure(api), tmp_path) as workers:
        assert await ask(workers, range(CALLS)) == [200] * CALLS
        for worker in workers:
            refused = await worker.embed(make_text(50), headers=HEADERS)
            assert (refused.status, refused.headers["retry-after"]) == (429, "10")
        clock.now = MIDNIGHT - 0.25
        refused = await workers[0].embed(make_text(50), headers=HEADERS)
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
        clock.now = MIDNIGHT
        assert await read_used(workers[0]) == 0
        assert await ask(workers, range(50, 52)) == [200, 200]
        assert [await read_used(worker) for worker in workers] == [2 * cost] * 2
        metrics = await workers[1].call("GET", "/metrics", headers=ADMIN)
        assert read_gauge(metrics, "embed_serve_budget_used_tokens") == 2 * cost
        assert read_gauge(metrics, "embed_serve_budget_tokens") == compute_budget(api)
        # A clock that is set back continues the earlier day, whose tokens are used up.
        clock.now = MIDNIGHT - 1
        assert await ask(workers, range(60, 62)) == [429, 429]


async def test_a_request_that_is_refused_while_the_day_ends_is_computed_on_the_new_day(
    api: OpenAIServer, tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve_workers(configure(api), tmp_path, 1) as (worker,):
        assert [(await worker.embed(make_text(i), headers=HEADERS)).status for i in range(CALLS)] == [200] * CALLS
        reserve, outcomes = budget_file.BudgetFile.reserve, list[Any]()

        def reserve_at_midnight(*args: Any, **options: Any) -> Any:
            outcomes.append(reserve(*args, **options))
            clock.now = MIDNIGHT + 1
            return outcomes[-1]

        monkeypatch.setattr(budget_file.BudgetFile, "reserve", reserve_at_midnight)
        clock.now = MIDNIGHT - 0.001
        assert (await worker.embed(make_text(50), headers=HEADERS)).status == 200
        assert isinstance(outcomes[0], budget_file.Refusal)
        assert isinstance(outcomes[-1], budget_file.Reservation)


async def test_a_call_that_ends_after_midnight_counts_for_the_day_on_which_it_began(
    api: OpenAIServer, tmp_path: Path, clock: Clock
) -> None:
    cost = api.tokens_of(make_text(0))
    async with serve_workers(configure(api), tmp_path) as workers:
        assert await ask(workers, range(2)) == [200, 200]
        api.misbehave("hang", times=1)
        late = asyncio.create_task(workers[0].embed(make_text(10), headers=HEADERS))
        await asyncio.to_thread(api.until_hanging)
        clock.now = MIDNIGHT + 1
        assert await ask(workers, range(21, 22)) == [200]
        assert await read_used(workers[1]) == cost
        api.heal()
        assert (await late).status == 200
        assert await read_used(workers[1]) == cost
        clock.now = MIDNIGHT - 1
        assert await read_used(workers[1]) == 3 * cost


async def test_a_request_that_waits_for_tokens_at_midnight_gets_those_of_the_new_day(
    api: OpenAIServer, tmp_path: Path, clock: Clock
) -> None:
    async with serve_workers(configure(api), tmp_path) as (worker, other):
        assert await ask([worker, other], range(CALLS - 1)) == [200] * (CALLS - 1)
        api.misbehave("hang", times=1)
        last = asyncio.create_task(worker.embed(make_text(10), headers=HEADERS))
        await asyncio.to_thread(api.until_hanging)
        # The other worker waits until the file says that the call has been settled, or that there is a new day.
        waiting = asyncio.create_task(other.embed(make_text(11), headers=HEADERS))
        await wait_until_async(lambda: other.service.count_active() == 1)
        for _ in range(5):  # it has time to find that there are no tokens for it
            await read_used(other)
        assert not waiting.done()
        sent = len(api.requests)
        clock.now = MIDNIGHT
        assert (await waiting).status == 200
        assert not last.done()
        assert len(api.requests) == sent + 1
        api.heal()
        assert (await last).status == 200
