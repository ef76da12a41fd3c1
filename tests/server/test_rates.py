"""Requests per minute are counted exactly, by all processes of a host together."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from patience import LONG_TIMEOUT

from embedonce.config import Tenant
from embedonce_server.tenants import rates
from embedonce_server.tenants.rates import Rates

SECOND = 1_000_000_000


class Clock:
    def __init__(self, now: int = 1_000_000 * SECOND) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


def make_tenant(rate: float | None, name: str = "search") -> Tenant:
    return Tenant(name=name, keys=(), namespace=name, requests_per_minute=rate)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rates"


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limiter(path: Path, clock: Clock) -> Iterator[Rates]:
    with closing(Rates(path, clock=clock)) as limiter:
        yield limiter


def count_admitted(limiter: Rates, tenant: Tenant, most: int = 100_000) -> int:
    return next(i for i in range(most) if limiter.admit(tenant) > 0)


@pytest.mark.parametrize("rate", [1, 2, 7, 59, 60, 61, 600, 7_777, 1.5, 59.9])
def test_a_minutes_requests_are_admitted_at_once_and_no_more(limiter: Rates, rate: float) -> None:
    assert count_admitted(limiter, make_tenant(rate)) == int(rate)


def test_without_a_rate_every_request_is_admitted(limiter: Rates) -> None:
    assert all(limiter.admit(make_tenant(None)) == 0.0 for _ in range(100))


def test_a_request_is_admitted_exactly_when_the_time_to_wait_has_passed(limiter: Rates, clock: Clock) -> None:
    tenant = make_tenant(60)
    count_admitted(limiter, tenant)
    assert limiter.admit(tenant) == 1.0
    assert limiter.admit(tenant) == 1.0  # a refused request costs nothing
    clock.now += SECOND - 1
    assert limiter.admit(tenant) == 1e-9
    clock.now += 1
    assert limiter.admit(tenant) == 0.0
    assert limiter.admit(tenant) == 1.0


@pytest.mark.parametrize("rate", [0.5, 1e-3, 1e-300])
def test_less_than_one_request_per_minute_still_admits_one(limiter: Rates, clock: Clock, rate: float) -> None:
    tenant = make_tenant(rate)
    assert limiter.admit(tenant) == 0.0
    wait = limiter.admit(tenant)
    assert wait > 60
    clock.now += int(wait * SECOND) + 1
    assert limiter.admit(tenant) == 0.0


def test_any_rate_is_accepted(limiter: Rates) -> None:
    assert all(limiter.admit(make_tenant(1e300)) == 0.0 for _ in range(100))


@settings(max_examples=100, deadline=None)
@given(
    rate=st.integers(1, 30),
    steps=st.lists(st.tuples(st.integers(0, 20 * SECOND), st.integers(0, 2)), min_size=1, max_size=150),
)
def test_no_minute_has_more_than_twice_the_rate_and_several_processes_count_together(
    tmp_path_factory: pytest.TempPathFactory, rate: int, steps: list[tuple[int, int]]
) -> None:
    clock, tenant = Clock(), make_tenant(rate)
    path = tmp_path_factory.mktemp("rates") / "rates"
    admitted: list[int] = []
    with ExitStack() as stack:
        workers = [stack.enter_context(closing(Rates(path, clock=clock))) for _ in range(3)]
        for pause, worker in steps:
            clock.now += pause
            wait = workers[worker].admit(tenant)
            if wait == 0.0:
                admitted.append(clock.now)
            else:
                # A refusal is right: the requests of the bucket of the last minutes have used it up.
                assert any(
                    len(used := [at for at in admitted if at >= start]) + 1
                    > rate + (clock.now - used[0]) * rate / rates.MINUTE
                    for start in admitted
                )
    for start in admitted:
        for end in admitted:
            if end >= start:
                # The bucket has `rate` requests, and is refilled with `rate` requests per minute.
                count = sum(start <= at <= end for at in admitted)
                assert count <= rate + (end - start) * rate / rates.MINUTE + 1e-3


def test_tenants_do_not_share_a_rate(limiter: Rates) -> None:
    names = [f"tenant-{i}" for i in range(200)]
    assert all(count_admitted(limiter, make_tenant(3, name)) == 3 for name in names)
    assert all(limiter.admit(make_tenant(3, name)) > 0 for name in names)


def test_a_process_with_other_settings_counts_in_the_same_slot(path: Path, clock: Clock) -> None:
    with closing(Rates(path, clock=clock)) as old, closing(Rates(path, clock=clock)) as new:
        assert old.admit(make_tenant(2)) == 0.0
        assert all(new.admit(make_tenant(5, f"new-{i}")) == 0.0 for i in range(20))
        assert old.admit(make_tenant(2)) == 0.0
        assert old.admit(make_tenant(2)) > 0
        assert new.admit(make_tenant(2)) > 0
        # With the new rate, the tenant has used its whole minute.
        assert new.admit(make_tenant(60)) == 1.0


def test_counts_last_after_a_restart_of_the_server(path: Path, clock: Clock) -> None:
    with closing(Rates(path, clock=clock)) as limiter:
        count_admitted(limiter, make_tenant(5))
    with closing(Rates(path, clock=clock)) as limiter:
        assert limiter.admit(make_tenant(5)) == 12.0


@pytest.mark.parametrize("rate", [60, 0.01])
def test_after_a_restart_of_the_host_tenants_start_anew(path: Path, rate: float) -> None:
    with closing(Rates(path, clock=Clock(1_000_000 * SECOND))) as limiter:
        count_admitted(limiter, make_tenant(rate))
    with closing(Rates(path, clock=Clock(30 * SECOND))) as limiter:  # the monotonic clock starts at 0 again
        assert count_admitted(limiter, make_tenant(rate)) == max(1, int(rate))


@pytest.mark.parametrize("content", [b"", b"short", b"x" * 400_000])
def test_a_damaged_file_is_filled_anew(path: Path, clock: Clock, content: bytes) -> None:
    path.write_bytes(content)
    with closing(Rates(path, clock=clock)) as limiter:
        assert count_admitted(limiter, make_tenant(3)) == 3
    assert path.stat().st_size >= len(content)


def test_a_file_that_is_truncated_is_filled_again(path: Path, clock: Clock) -> None:
    with closing(Rates(path, clock=clock)) as one, closing(Rates(path, clock=clock)) as two:
        assert count_admitted(one, make_tenant(3)) == 3
        size = path.stat().st_size
        os.truncate(path, 0)
        assert two.admit(make_tenant(3)) == 0.0
        assert count_admitted(one, make_tenant(3)) == 2
        assert two.admit(make_tenant(3)) > 0
        assert path.stat().st_size == size
    with closing(Rates(path, clock=clock)) as later:
        assert later.admit(make_tenant(3)) > 0


@pytest.mark.parametrize("is_replaced", [True, False])
def test_processes_count_together_again_after_the_file_was_deleted_or_moved(
    path: Path, clock: Clock, is_replaced: bool
) -> None:
    with closing(Rates(path, clock=clock)) as one, closing(Rates(path, clock=clock)) as two:
        assert all(limiter.admit(make_tenant(3)) == 0.0 for limiter in (one, two))
        if is_replaced:
            path.rename(path.with_name("moved"))
        else:
            path.unlink()
        with closing(Rates(path, clock=clock)) as new:
            assert new.admit(make_tenant(3)) == 0.0
            clock.now += SECOND
            assert count_admitted(one, make_tenant(3)) == 2
            assert all(limiter.admit(make_tenant(3)) > 0 for limiter in (one, two, new))


def test_processes_go_on_with_a_file_whose_folder_was_deleted(tmp_path: Path, clock: Clock) -> None:
    folder = tmp_path / "state"
    folder.mkdir()
    with closing(Rates(folder / "rates", clock=clock)) as one, closing(Rates(folder / "rates", clock=clock)) as two:
        shutil.rmtree(folder)
        clock.now += SECOND
        assert one.admit(make_tenant(2)) == 0.0
        assert two.admit(make_tenant(2)) == 0.0
        assert one.admit(make_tenant(2)) > 0


def test_requests_are_admitted_while_the_disk_fails(
    limiter: Rates, clock: Clock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    assert count_admitted(limiter, make_tenant(3)) == 3
    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", fail)
        assert all(limiter.admit(make_tenant(3)) == 0.0 for _ in range(10))
    assert [record.message for record in caplog.records] == [
        f"{limiter._path}: requests per minute are not counted: Input/output error"
    ]
    assert limiter.admit(make_tenant(3)) > 0


def test_the_file_is_for_its_owner_only(limiter: Rates, path: Path) -> None:
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_folder_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Rates(tmp_path / "missing" / "rates")


def test_if_all_slots_are_used_the_tenant_that_rested_longest_loses_its_slot(
    path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "SLOTS", 4)
    monkeypatch.setattr(rates, "PROBES", 4)
    with closing(Rates(path, clock=clock)) as one, closing(Rates(path, clock=clock)) as two:
        for name in "abcd":
            clock.now += SECOND
            assert one.admit(make_tenant(1, name)) == 0.0
            assert two.admit(make_tenant(1, name)) > 0
        assert two.admit(make_tenant(1, "e")) == 0.0
        assert all(worker.admit(make_tenant(1, name)) > 0 for worker in (one, two) for name in "bcde")
        # "a" has lost its slot, and gets that of "b". A process that still knows the old slot does not use it.
        assert one.admit(make_tenant(1, "a")) == 0.0
        assert two.admit(make_tenant(1, "a")) > 0
        assert one.admit(make_tenant(1, "e")) > 0


def test_threads_of_a_process_count_exactly(path: Path, clock: Clock) -> None:
    tenant = make_tenant(500)
    with closing(Rates(path, clock=clock)) as one, closing(Rates(path, clock=clock)) as two:
        barrier = threading.Barrier(4)

        def run(limiter: Rates) -> int:
            barrier.wait(LONG_TIMEOUT)
            return sum(limiter.admit(tenant) == 0.0 for _ in range(250))

        with ThreadPoolExecutor(4) as pool:
            assert sum(pool.map(run, [one, two, one, two])) == 500


_PROCESS = """
import sys
from pathlib import Path
from embedonce.config import Tenant
from embedonce_server.tenants.rates import Rates
tenant = Tenant(name="search", keys=(), namespace="search", requests_per_minute=5000)
limiter = Rates(Path(sys.argv[1]), clock=lambda: 10**15)
print("ready", flush=True)
sys.stdin.readline()
print(sum(limiter.admit(tenant) == 0.0 for _ in range(4000)))
"""

_HOLDER = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_EX)
print(1, flush=True)
sys.stdin.read()
"""


def test_two_processes_count_exactly_and_a_killed_one_blocks_nobody(path: Path, limiter: Rates) -> None:
    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROCESS, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    with start() as one, start() as two:
        assert one.stdin is not None
        assert two.stdin is not None
        for process in (one, two):
            process.stdin.write("\n")  # type: ignore[union-attr]
            process.stdin.flush()  # type: ignore[union-attr]
        assert sum(int(process.communicate(timeout=LONG_TIMEOUT)[0]) for process in (one, two)) == 5000

    holder = subprocess.Popen([sys.executable, "-c", _HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"1\n"
        holder.kill()
        holder.wait(LONG_TIMEOUT)
        assert limiter.admit(make_tenant(1, "other")) == 0.0
    assert limiter.admit(make_tenant(1, "other")) > 0


def test_a_suspended_process_that_holds_the_lock_does_not_stop_requests(
    limiter: Rates, path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "MAX_LOCK_WAIT", 1_000_000)
    file = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        with caplog.at_level(logging.WARNING):
            waits = Counter(limiter.admit(make_tenant(3)) == 0.0 for _ in range(10))
    finally:
        os.close(file)
    assert waits == {True: 3, False: 7}
    assert "suspended" in caplog.records[0].message
    assert limiter.admit(make_tenant(3)) > 0


def test_closing_twice_is_allowed(path: Path) -> None:
    limiter = Rates(path)
    limiter.close()
    limiter.close()
