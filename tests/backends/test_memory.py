"""The memory backend: its bounds, its two policies, threads and forks."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from embedonce.errors import ConfigError
from embedonce.vectors import Entry
from embedonce_backends import memory
from embedonce_backends.memory import ENTRY_BYTES, MemoryBackend, entry_bytes

POLICIES = ("segmented", "lru")
every_policy = pytest.mark.parametrize("policy", POLICIES)


def entry_of(number: float, dimensions: int = 4, metadata: dict[str, Any] | None = None) -> Entry:
    payload = np.full(dimensions, number, dtype=np.float32).tobytes()
    return Entry(np.frombuffer(payload, dtype=np.float32), 0.0, None, metadata)


def fill(backend: MemoryBackend, keys: Iterator[str] | list[str]) -> None:
    backend.set_many({key: entry_of(i) for i, key in enumerate(keys)}, None)


# --- the contract -----------------------------------------------------------------------------


@every_policy
def test_get_returns_the_stored_object_itself(policy: Any) -> None:
    backend = MemoryBackend(policy=policy)
    entry = entry_of(1.0)
    backend.set_many({"a": entry}, 60.0)
    assert backend.get("a") is entry
    assert backend.get_many(["b", "a", "a"])["a"] is entry
    assert backend.get("b") is None
    assert list(backend.get_many(["b"])) == []
    assert not entry.vector.flags.writeable


@every_policy
def test_delete_scan_count_and_close(policy: Any) -> None:
    backend = MemoryBackend(policy=policy)
    fill(backend, ["eo1.aa.1", "eo1.aa.2", "eo1.bb.1"])
    backend.get("eo1.aa.1")
    assert sorted(backend.scan("eo1.aa.")) == ["eo1.aa.1", "eo1.aa.2"]
    assert (backend.count("eo1.aa."), backend.count("eo1."), backend.count("x")) == (2, 3, 0)
    backend.delete_many(["eo1.aa.1", "eo1.bb.1", "never there"])
    assert backend.scan("") == ["eo1.aa.2"]
    backend.close()
    backend.close()
    for call in (lambda: backend.get("eo1.aa.2"), lambda: backend.count(""), lambda: backend.delete_many(["eo1.aa.2"])):
        with pytest.raises(RuntimeError, match="closed"):
            call()


@every_policy
def test_a_hit_between_any_two_steps_of_a_scan_changes_nothing(policy: Any) -> None:
    """A hit takes no lock, so another thread's can happen at any bytecode of a scan. A trace function simulates it."""
    backend = MemoryBackend(policy=policy, max_entries=100)
    keys = [f"eo1.aa.{i}" for i in range(20)]
    fill(backend, keys)
    assert all(backend.get(key) is not None for key in keys)  # with the segmented policy, all are protected now
    hits = 0

    def trace(frame: Any, event: str, argument: Any) -> Any:
        nonlocal hits
        if frame.f_code.co_filename != memory.__file__:
            return None
        frame.f_trace_opcodes = True
        hits += backend.get(keys[hits % len(keys)]) is not None
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        scanned, counted = backend.scan("eo1."), backend.count("eo1.")
    finally:
        sys.settrace(before)
    assert sorted(scanned) == sorted(keys)
    assert counted == len(keys)
    assert hits > 20


def test_scanning_while_writing_is_a_snapshot() -> None:
    backend = MemoryBackend()
    fill(backend, [str(i) for i in range(10)])
    for key in backend.scan(""):
        backend.delete_many([key])
    assert backend.count("") == 0


def test_an_empty_backend_is_truthy() -> None:
    assert MemoryBackend()
    assert not hasattr(MemoryBackend, "__len__")


def test_the_hook_registers_the_backend() -> None:
    assert memory.embedonce_backends() == {"memory": MemoryBackend}


@pytest.mark.parametrize("options", [{"max_entries": 0}, {"max_entries": -1}, {"max_bytes": 0}, {"policy": "lfu"}])
def test_invalid_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(options))} must be"):
        MemoryBackend(**options)


# --- the bounds -------------------------------------------------------------------------------


@every_policy
def test_if_a_batch_does_not_fit_its_last_entries_stay(policy: Any) -> None:
    backend = MemoryBackend(max_entries=3, policy=policy)
    fill(backend, list("abcdefgh"))
    assert sorted(backend.scan("")) == ["f", "g", "h"]


@every_policy
def test_with_room_for_one_entry_the_newest_stays(policy: Any) -> None:
    backend = MemoryBackend(max_entries=1, policy=policy)
    for key in "abc":
        fill(backend, [key])
        assert backend.get(key) is not None
        assert backend.get(key) is not None
    assert backend.scan("") == ["c"]


@every_policy
def test_an_entry_that_can_never_fit_removes_only_its_own_old_entry(policy: Any) -> None:
    backend = MemoryBackend(max_bytes=entry_bytes(entry_of(0)) * 2, policy=policy)
    fill(backend, ["a", "b"])
    backend.set_many({"a": entry_of(1.0, dimensions=1000), "c": entry_of(2.0, dimensions=1000)}, None)
    assert backend.scan("") == ["b"]


@every_policy
def test_a_large_new_entry_is_stored_even_if_it_evicts_hot_ones(policy: Any) -> None:
    large = entry_of(1.0, dimensions=500)
    backend = MemoryBackend(max_bytes=entry_bytes(large), policy=policy)
    fill(backend, ["a", "b"])
    backend.get_many(["a", "b"])
    backend.set_many({"large": large}, None)
    assert backend.scan("") == ["large"]


def test_bytes_count_payload_overhead_and_metadata() -> None:
    plain = entry_of(1.0, dimensions=384)
    assert entry_bytes(plain) == 1536 + ENTRY_BYTES
    assert entry_bytes(plain._replace(metadata={"id": "x" * 1000, "tags": ["y" * 500]})) > 1536 + ENTRY_BYTES + 1500


@every_policy
def test_metadata_that_its_owner_changes_later_does_not_break_the_count(policy: Any) -> None:
    backend = MemoryBackend(max_bytes=4000, policy=policy)
    tags: list[str] = []
    for i in range(50):
        backend.set_many({f"k{i}": entry_of(i, metadata={"tags": tags})}, None)
        backend.get(f"k{i - 1}")
        tags.append("x" * 50)
        tags[:] = tags[-3:]
    assert backend.get("k49") is not None


class Bounded(RuleBasedStateMachine):
    """Both bounds hold, a read returns the right entry or none, and an entry that was just stored is found."""

    # Few keys, so that they collide. Sizes from that of a space card (no dimensions) to one that does not fit.
    keys = st.sampled_from([f"k{i}" for i in range(8)])
    sizes = st.sampled_from([0, 1, 50, 200, 2000])

    def __init__(self) -> None:
        super().__init__()
        self.model: dict[str, Entry] = {}
        self.numbers = count()
        self.backend = MemoryBackend(max_entries=5, max_bytes=3 * ENTRY_BYTES + 1000, policy=self.policy())

    def policy(self) -> Any:
        return "lru"

    @rule(key=keys, dimensions=sizes)
    def store(self, key: str, dimensions: int) -> None:
        entry = entry_of(next(self.numbers), dimensions)
        self.backend.set_many({key: entry}, None)
        self.model[key] = entry
        if dimensions < 2000:
            assert self.backend.get(key) is entry
        else:
            assert self.backend.get(key) is None

    @rule(keys=st.lists(keys, max_size=4))
    def read(self, keys: list[str]) -> None:
        for key, entry in self.backend.get_many(keys).items():
            assert entry is self.model[key]

    @rule(keys=st.lists(keys, max_size=3))
    def delete(self, keys: list[str]) -> None:
        self.backend.delete_many(keys)
        for key in keys:
            self.model.pop(key, None)

    @invariant()
    def bounded(self) -> None:
        held = self.backend.scan("")
        assert len(held) == len(set(held)) <= 5
        assert set(held) <= set(self.model)
        assert sum(entry_bytes(self.model[key]) for key in held) <= 3 * ENTRY_BYTES + 1000


class BoundedSegmented(Bounded):
    """The same rules for the segmented policy."""

    def policy(self) -> Any:
        return "segmented"


TestBounded = Bounded.TestCase
TestBoundedSegmented = BoundedSegmented.TestCase
TestBounded.settings = TestBoundedSegmented.settings = settings(max_examples=60, deadline=None)


# --- the policies -----------------------------------------------------------------------------


def test_lru_evicts_the_least_recently_used_entry() -> None:
    backend = MemoryBackend(max_entries=3, policy="lru")
    fill(backend, list("abc"))
    backend.get("a")
    fill(backend, ["b"])
    fill(backend, ["d"])
    assert sorted(backend.scan("")) == ["a", "b", "d"]


@pytest.mark.parametrize(("policy", "survive"), [("segmented", 50), ("lru", 0)])
def test_only_segmented_keeps_entries_that_were_read_twice_during_a_scan(policy: Any, survive: int) -> None:
    backend = MemoryBackend(max_entries=100, policy=policy)
    hot = [f"hot{i}" for i in range(50)]
    fill(backend, hot)
    backend.get_many(hot)
    fill(backend, [f"cold{i}" for i in range(1000)])
    assert len(backend.get_many(hot)) == survive


def test_entries_that_used_to_be_hot_are_evicted() -> None:
    backend = MemoryBackend(max_entries=100)
    for generation in range(5):
        hot = [f"hot{generation}.{i}" for i in range(90)]
        for _ in range(3):
            fill(backend, [key for key in hot if backend.get(key) is None])
        assert len(backend.get_many(hot)) == 90


def test_without_a_second_read_the_segmented_policy_uses_all_the_room() -> None:
    backend = MemoryBackend(max_entries=100)
    fill(backend, [str(i) for i in range(100)])
    assert backend.count("") == 100


@given(st.lists(st.integers(0, 12), max_size=60), st.integers(1, 8))
def test_lru_evicts_as_a_simple_model_does(trace: list[int], room: int) -> None:
    backend = MemoryBackend(max_entries=room, policy="lru")
    model: dict[str, None] = {}
    for key in map(str, trace):
        assert (backend.get(key) is not None) == (key in model)
        model.pop(key, None)
        model[key] = None
        backend.set_many({key: entry_of(0.0)}, None)
        if len(model) > room:
            del model[next(iter(model))]
        assert sorted(backend.scan("")) == sorted(model)


# --- threads and forks ------------------------------------------------------------------------


def run_in_threads(work: list[Any]) -> None:
    """Run the functions at the same time, each in a thread, and raise the first exception that one of them raised."""
    failures: list[BaseException] = []

    def run(function: Any) -> None:
        try:
            function()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    if failures:
        raise failures[0]


@pytest.fixture
def eager_switches() -> Iterator[None]:
    """Make the interpreter switch threads as often as it can, so that races show."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@every_policy
@pytest.mark.usefixtures("eager_switches")
def test_a_stored_entry_is_never_a_miss_while_other_threads_move_it(policy: Any) -> None:
    # Every read moves keys between probation and protection, and nothing is evicted, so every read must hit.
    backend = MemoryBackend(max_entries=16, policy=policy)
    keys = [f"k{i}" for i in range(16)]
    fill(backend, keys)

    def read() -> None:
        for turn in range(1500):
            key = keys[turn % 16]
            entry = backend.get(key)
            assert entry is not None, "a stored key was a miss"
            assert entry.vector[0] == turn % 16

    run_in_threads([read] * 4)


@every_policy
@pytest.mark.usefixtures("eager_switches")
def test_threads_read_write_delete_and_count_at_the_same_time(policy: Any) -> None:
    backend = MemoryBackend(max_entries=20, max_bytes=15 * (ENTRY_BYTES + 16), policy=policy)

    def work(start: int) -> None:
        for turn in range(400):
            number = (start + turn * 7) % 40
            backend.set_many({f"k{number}": entry_of(number)}, None)
            for key, entry in backend.get_many([f"k{i}" for i in range(number, number + 5)]).items():
                assert entry.vector[0] == int(key[1:])
            backend.delete_many([f"k{(number + 3) % 40}"])
            assert backend.count("k") <= 15

    run_in_threads([lambda start=start: work(start) for start in range(4)])
    assert sum(entry_bytes(entry) for entry in backend.get_many(backend.scan("")).values()) <= 15 * (ENTRY_BYTES + 16)


@every_policy
def test_a_deleted_key_is_not_brought_back_by_a_reader(policy: Any) -> None:
    backend = MemoryBackend(max_entries=4, policy=policy)
    stop = threading.Event()

    def read() -> None:
        while not stop.is_set():
            backend.get("a")

    def delete() -> None:
        try:
            for _ in range(2000):
                fill(backend, ["a"])
                backend.delete_many(["a"])
                assert backend.count("") == 0
        finally:
            stop.set()

    run_in_threads([read, delete])


def test_a_hit_on_a_hot_entry_does_not_wait_for_the_lock() -> None:
    backend = MemoryBackend()
    fill(backend, ["a"])
    backend.get("a")
    with memory._lock:
        run_in_threads([lambda: backend.get("a")])


FORKS = """
import os, sys, threading, warnings
import numpy as np
from embedonce.vectors import Entry
from embedonce_backends.memory import MemoryBackend

warnings.simplefilter("ignore", DeprecationWarning)  # the test forks while threads run, which Python warns about
sys.setswitchinterval(1e-6)
backend = MemoryBackend(max_entries=64, policy=sys.argv[1], max_bytes=40_000)
entry = Entry(np.frombuffer(bytes(16), dtype=np.float32), 0.0)
stop = threading.Event()

def churn(start):
    while not stop.is_set():
        backend.set_many({f"k{i}": entry for i in range(start, start + 50)}, None)
        backend.get_many([f"k{i}" for i in range(start, start + 90)])
        backend.delete_many([f"k{start + 5}"])

threads = [threading.Thread(target=churn, args=(i * 30,)) for i in range(3)]
for thread in threads:
    thread.start()
for turn in range(30):
    child = os.fork()
    if child == 0:
        held = backend.scan("")
        backend.set_many({f"child{i}": entry for i in range(100)}, None)
        backend.delete_many(held)
        good = len(backend.scan("child")) == backend.count("") > 10 and backend.get("child99") is entry
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0, turn
stop.set()
for thread in threads:
    thread.join()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
@every_policy
def test_a_child_forked_in_the_middle_of_a_write_can_use_it(policy: str) -> None:
    path = f"import sys; sys.path[:0] = {[p for p in sys.path if p]!r}"
    done = subprocess.run(
        [sys.executable, "-c", path + FORKS, policy], capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
