"""Every fault does what its name says, in the calls that it names, and nothing else."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from embedonce.contracts import Embedded, deadline
from embedonce.errors import TextRefused, TierTimeout
from embedonce.testing import (
    CountingProvider,
    DictBackend,
    Fault,
    FaultyBackend,
    FaultyProvider,
    ManualClock,
    ProviderFault,
)
from embedonce.vectors import Entry, freeze

FRAMES = {f"eo1.a.{number}": bytes([number]) * 40 for number in range(6)}
ENTRIES = {key: Entry(freeze([1.0, 2.0, 3.0 + number]), 1.0) for number, key in enumerate(FRAMES)}
KEYS = list(FRAMES)
FAR = 60.0


def make_faulty(*faults: Fault, entries: bool = False, **options: Any) -> FaultyBackend:
    """Return a make_faulty backend that holds six values, stored before the faults apply."""
    inner = DictBackend(holds="entries" if entries else "frames", twin=True)
    inner.set_many(ENTRIES if entries else FRAMES, None)
    return FaultyBackend(inner, faults, **options)


def run_in_thread(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Start a thread; return it and the list to which it appends the result or the error of the call."""
    answers: list[Any] = []

    def run() -> None:
        try:
            answers.append(call())
        except Exception as error:
            answers.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, answers


# --- when a fault applies ---------------------------------------------------------------------


def test_without_faults_it_is_the_inner_backend() -> None:
    backend = make_faulty()
    assert backend.get_many(KEYS) == FRAMES
    assert backend.get(KEYS[0]) == FRAMES[KEYS[0]]
    assert backend.count("") == 6
    assert set(backend.scan("eo1.a.")) == set(KEYS)
    assert backend.add_many({KEYS[0]: b"x", "eo1.b": b"y"}, None) == {"eo1.b"}
    backend.delete_many(["eo1.b"])
    assert backend.capabilities == backend.inner.capabilities
    assert [name for name, _ in backend.calls] == ["get", "get", "count", "scan", "add", "delete"]
    assert backend.calls[0] == ("get", 6)
    assert backend.called("get") == 2
    assert backend.called() == 6


def test_a_fault_applies_to_the_calls_that_are_named() -> None:
    backend = make_faulty(Fault("raise", on="get", calls=[2, 3]))
    backend.set_many({}, None)
    outcomes = []
    for _ in range(4):
        try:
            outcomes.append(len(backend.get_many(KEYS)))
        except OSError:
            outcomes.append("raised")
    assert outcomes == [6, "raised", "raised", 6]


def test_the_same_seed_makes_the_same_choices() -> None:
    def list_failures(seed: int) -> list[bool]:
        backend = make_faulty(Fault("partial", on="get", probability=0.3), seed=seed)
        return [len(backend.get_many(KEYS)) < 6 for _ in range(100)]

    assert list_failures(1) == list_failures(1)
    assert list_failures(1) != list_failures(2)
    assert 10 < sum(list_failures(1)) < 60


def test_the_first_fault_that_applies_happens() -> None:
    backend = make_faulty(Fault("raise", calls=[1], error=KeyError), Fault("raise", error=ValueError))
    with pytest.raises(KeyError):
        backend.get_many(KEYS)
    with pytest.raises(ValueError, match="an injected fault"):
        backend.get_many(KEYS)


def test_equal_faults_are_counted_separately() -> None:
    backend = make_faulty(Fault("raise", calls=[1]), Fault("raise", calls=[1]))
    for _ in range(2):
        with pytest.raises(OSError, match="an injected fault"):
            backend.get_many(KEYS)
    assert backend.get_many(KEYS) == FRAMES


def test_heal_ends_the_faults() -> None:
    backend = make_faulty(Fault("refuse"))
    with pytest.raises(ConnectionRefusedError):
        backend.get_many(KEYS)
    backend.heal()
    assert backend.get_many(KEYS) == FRAMES


def test_every_call_raises_its_own_exception() -> None:
    once = OSError(28, "no space left")
    backend = make_faulty(Fault("raise", error=once))
    caught = []
    for _ in range(2):
        with pytest.raises(OSError, match="no space left") as error:
            backend.get_many(KEYS)
        caught.append(error.value)
    assert caught[0] is not caught[1]
    assert once not in caught
    assert caught[0].errno == 28


# --- what a fault does ------------------------------------------------------------------------


@pytest.mark.parametrize("operation", ["get", "set", "delete", "scan", "count", "add"])
def test_a_fault_can_apply_to_one_operation_only(operation: Any) -> None:
    backend = make_faulty(Fault("refuse", on=operation))
    calls: dict[str, Callable[[], object]] = {
        "get": lambda: backend.get_many(KEYS),
        "set": lambda: backend.set_many(FRAMES, None),
        "delete": lambda: backend.delete_many([]),
        "scan": lambda: list(backend.scan("")),
        "count": lambda: backend.count(""),
        "add": lambda: backend.add_many({}, None),
    }
    with pytest.raises(ConnectionRefusedError):
        calls.pop(operation)()
    for call in calls.values():
        call()


def test_corrupt_flips_one_bit_of_each_frame() -> None:
    found = make_faulty(Fault("corrupt")).get_many(KEYS)
    for key, frame in FRAMES.items():
        flipped = int.from_bytes(frame) ^ int.from_bytes(found[key])
        assert flipped.bit_count() == 1
        assert len(found[key]) == len(frame)


def test_corrupt_puts_nan_into_each_entry() -> None:
    backend = make_faulty(Fault("corrupt", calls=[1]), entries=True)
    assert all(np.isnan(entry.vector).sum() == 1 for entry in backend.get_many(KEYS).values())
    assert not any(np.isnan(entry.vector).any() for entry in backend.get_many(KEYS).values())


def test_truncate_shortens() -> None:
    assert {len(frame) for frame in make_faulty(Fault("truncate")).get_many(KEYS).values()} == {20}
    found = make_faulty(Fault("truncate"), entries=True).get_many(KEYS)
    assert {entry.vector.shape for entry in found.values()} == {(2,)}


def test_a_damaged_single_get() -> None:
    frame = make_faulty(Fault("truncate")).get(KEYS[0])
    assert frame == FRAMES[KEYS[0]][:20]
    assert make_faulty(Fault("truncate")).get("eo1.none") is None


def test_partial_leaves_out_and_stores_some() -> None:
    backend = make_faulty(Fault("partial"))
    found = backend.get_many(KEYS)
    assert len(found) == 3
    assert found.items() <= FRAMES.items()
    fresh = {f"eo1.b.{number}": b"x" for number in range(4)}
    with pytest.raises(OSError, match="an injected fault"):
        backend.set_many(fresh, None)
    assert backend.inner.count("eo1.b.") == 2
    with pytest.raises(OSError, match="an injected fault"):
        backend.delete_many(KEYS)
    assert backend.inner.count("eo1.a.") == 3
    seen = []
    with pytest.raises(OSError, match="an injected fault"):
        seen.extend(backend.scan("eo1."))


def test_wrong_reply_gives_another_keys_value() -> None:
    backend = make_faulty(Fault("wrong_reply", on="get"))
    found = backend.get_many(KEYS)
    assert set(found) == set(KEYS)
    assert sorted(found.values()) == sorted(FRAMES.values())
    assert all(found[key] != FRAMES[key] for key in KEYS)


def test_wrong_reply_to_one_key_is_one_that_was_seen_before() -> None:
    backend = make_faulty(Fault("wrong_reply", on="get", calls=[2]))
    assert backend.get_many(KEYS[:1]) == {KEYS[0]: FRAMES[KEYS[0]]}
    assert backend.get_many(KEYS[1:2]) == {KEYS[1]: FRAMES[KEYS[0]]}
    assert backend.get_many(["eo1.none"]) == {}


def test_wrong_reply_to_a_miss() -> None:
    backend = make_faulty(Fault("wrong_reply", on="get", calls=[2]))
    backend.get_many(KEYS[:1])
    assert backend.get_many(["eo1.none"]) == {"eo1.none": FRAMES[KEYS[0]]}


def test_unasked_and_none_for_miss() -> None:
    backend = make_faulty(Fault("unasked", calls=[2]), Fault("none_for_miss"))
    backend.get_many(KEYS[:1])
    found = backend.get_many(KEYS[1:2])
    assert found == {KEYS[1]: FRAMES[KEYS[1]], KEYS[0]: FRAMES[KEYS[0]]}
    assert backend.get_many(["eo1.none"]) == {"eo1.none": None}


def test_a_hang_ends_with_release_and_then_makes_the_call() -> None:
    backend = make_faulty(Fault("hang", on="get"))
    with deadline(0.01):
        thread, answers = run_in_thread(lambda: backend.get_many(KEYS))
        backend.gate.until(1, FAR)
        assert backend.gate.waiting == 1
    backend.release()
    thread.join(FAR)
    assert answers == [FRAMES]
    again, answers = run_in_thread(lambda: backend.get_many(KEYS[:1]))
    backend.gate.until(1, FAR)
    assert again.is_alive(), "a call after release() hangs again"
    backend.close()
    again.join(FAR)
    assert isinstance(answers[0], RuntimeError), "close() releases hanging calls, and the inner backend is closed"


def test_a_hang_that_obeys_raises_at_the_deadline() -> None:
    backend = make_faulty(Fault("hang", obey=True), deadline=True)
    with deadline(0.02), pytest.raises(TierTimeout):
        backend.get_many(KEYS)
    assert backend.capabilities.deadline


def test_waiting_for_a_hang_has_a_timeout() -> None:
    with pytest.raises(TimeoutError, match="expected 1 hanging calls"):
        make_faulty().gate.until(1, 0.01)


def test_slow_answers_in_the_end() -> None:
    assert make_faulty(Fault("slow", seconds=0.001)).get_many(KEYS) == FRAMES


# --- the twin ---------------------------------------------------------------------------------


def test_a_twin_has_the_faults_and_the_counts() -> None:
    async def main() -> None:
        backend = make_faulty(Fault("refuse", on="get", calls=[1]), Fault("truncate", calls=[1]))
        twin = backend.twin()
        with pytest.raises(ConnectionRefusedError):
            await twin.get_many(KEYS)
        assert {len(frame) for frame in (await twin.get_many(KEYS)).values()} == {20}
        await twin.set_many({"eo1.b": b"x"}, None)
        assert await twin.get_many(["eo1.b"]) == {"eo1.b": b"x"}
        assert [name for name, _ in backend.calls] == ["get", "get", "set", "get"]
        await twin.close()

    asyncio.run(main())


def test_a_twin_hangs_until_it_is_released_from_another_thread() -> None:
    backend = make_faulty(Fault("hang", on="get"))

    async def main() -> dict[str, bytes]:
        return await backend.twin().get_many(KEYS)

    thread, answers = run_in_thread(lambda: asyncio.run(main()))
    backend.gate.until(1, FAR)
    backend.release()
    thread.join(FAR)
    assert answers == [FRAMES]


def test_a_cancelled_hang_leaves_its_reply_until_the_twin_is_dropped() -> None:
    async def main() -> None:
        backend = make_faulty(Fault("hang", on="get", calls=[1]))
        twin = backend.twin()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await twin.get_many(KEYS[:2])
        assert backend.gate.waiting == 0
        assert await twin.get_many(KEYS[2:4]) == dict(zip(KEYS[2:4], list(FRAMES.values())[:2], strict=True))
        assert await twin.get_many(KEYS[4:]) == dict(zip(KEYS[4:], list(FRAMES.values())[2:4], strict=True))
        await twin.close()
        fresh = backend.twin()
        assert await fresh.get_many(KEYS) == FRAMES

    asyncio.run(main())


# --- DictBackend ------------------------------------------------------------------------------


def test_a_dict_backend_refuses_what_it_does_not_declare() -> None:
    backend = DictBackend(delete=False, max_batch=2, max_value_bytes=4)
    with pytest.raises(NotImplementedError, match="delete"):
        backend.delete_many(["eo1.a"])
    with pytest.raises(NotImplementedError, match="twin"):
        backend.twin()
    with pytest.raises(ValueError, match="at most 2 keys per call"):
        backend.get_many(["eo1.a", "eo1.b", "eo1.c"])
    with pytest.raises(ValueError, match="at most 4 bytes"):
        backend.set_many({"eo1.a": b"12345"}, None)
    with pytest.raises(TypeError, match="frames"):
        backend.set_many({"eo1.a": ENTRIES[KEYS[0]]}, None)
    assert len(backend) == 0


def test_a_twin_of_another_loop_raises() -> None:
    backend = DictBackend(twin=True)

    async def make() -> Any:
        return backend.twin()

    async def use(twin: Any) -> None:
        await twin.get_many(["eo1.a"])

    twin = asyncio.run(make())
    with pytest.raises(RuntimeError, match="another event loop"):
        asyncio.run(use(twin))


def test_a_clock_moves_forward_only() -> None:
    clock = ManualClock(100.0)
    assert clock.advance(1.5) == clock() == 101.5
    with pytest.raises(ValueError, match="seconds must be at least 0"):
        clock.advance(-1.0)


# --- providers --------------------------------------------------------------------------------


def embed_vectors(provider: FaultyProvider, texts: list[str]) -> np.ndarray:
    return np.asarray(provider.embed(texts, "document").vectors)


def test_the_counting_provider_counts() -> None:
    provider = CountingProvider(max_batch=3)
    answer = provider.embed(["a", "b", "a"], "document")
    assert isinstance(answer, Embedded)
    assert provider.count == {"a": 2, "b": 1}
    assert provider.texts == 3
    assert provider.calls == [("document", ("a", "b", "a"))]
    assert np.array_equal(answer.vectors[1], provider.vector_of("b"))
    assert not hasattr(provider, "aembed")
    with pytest.raises(ValueError, match="at most 3 texts per call"):
        provider.embed(list("abcd"), "document")
    with pytest.raises(ValueError, match="at least one"):
        provider.embed([], "document")
    assert provider.texts == 3


def test_vectors_differ_by_text_task_and_model() -> None:
    one, two = CountingProvider(symmetric=False), CountingProvider(model="other", symmetric=False)
    vectors = [
        provider.vector_of(text, task) for provider in (one, two) for text in "ab" for task in ("document", "query")
    ]
    assert len({vector.tobytes() for vector in vectors}) == 8
    assert one.space("query") != one.space("document")
    assert CountingProvider().space("query") == CountingProvider().space("document")


def test_the_counting_provider_counts_calls_in_flight() -> None:
    provider = CountingProvider(asynchronous=True, delay=0.001)

    async def main() -> None:
        await asyncio.gather(*(provider.aembed([text], "document") for text in "abcde"))

    asyncio.run(main())
    assert provider.most_at_once == 5


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("short", (2, 8)), ("long", (4, 8)), ("dimension", (3, 7)), ("empty", (3, 0))],
)
def test_answers_of_another_shape(kind: Any, shape: tuple[int, int]) -> None:
    provider = FaultyProvider(CountingProvider(), [ProviderFault(kind, calls=[1])])
    assert embed_vectors(provider, ["a", "b", "c"]).shape == shape
    assert embed_vectors(provider, ["a", "b", "c"]).shape == (3, 8)


def test_answers_with_other_values() -> None:
    faults = [ProviderFault(kind, calls=[1]) for kind in ("nan", "infinity", "zeros")]
    provider = FaultyProvider(CountingProvider(), faults)
    assert np.isnan(embed_vectors(provider, ["a", "b"])).sum() == 1
    assert np.isinf(embed_vectors(provider, ["a", "b"])).sum() == 1
    assert (~embed_vectors(provider, ["a", "b"]).any(axis=1)).sum() == 1
    assert np.array_equal(embed_vectors(provider, ["a"])[0], provider.inner.vector_of("a"))


def test_a_provider_raises_on_its_second_call() -> None:
    provider = FaultyProvider(CountingProvider(), [ProviderFault("raise", calls=[2], error=RuntimeError("quota"))])
    provider.embed(["a"], "document")
    with pytest.raises(RuntimeError, match="quota"):
        provider.embed(["b"], "document")
    provider.embed(["c"], "document")
    assert provider.count == {"a": 1, "b": 1, "c": 1}
    assert provider.inner.count == {"a": 1, "c": 1}


@pytest.mark.parametrize("positions", [True, False])
def test_a_provider_refuses_some_texts(positions: bool) -> None:
    fault = ProviderFault("refuse", refused=lambda text: not text, positions=positions)
    provider = FaultyProvider(CountingProvider(), [fault])
    with pytest.raises(TextRefused) as refused:
        provider.embed(["a", "", "b", ""], "document")
    assert refused.value.positions == ((1, 3) if positions else ())
    assert len(embed_vectors(provider, ["a", "b"])) == 2


def test_providers_that_hang_are_counted_and_released() -> None:
    provider = FaultyProvider(CountingProvider(), [ProviderFault("hang")])
    calls = [run_in_thread(lambda text=text: provider.embed([text], "document")) for text in "abc"]
    provider.gate.until(3, FAR)
    assert provider.most_at_once == 3
    provider.heal()
    for thread, answers in calls:
        thread.join(FAR)
        assert len(answers) == 1


def test_an_async_provider_hangs_cancellably() -> None:
    provider = FaultyProvider(CountingProvider(asynchronous=True), [ProviderFault("hang", calls=[1])])
    assert not hasattr(provider, "embed")

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await provider.aembed(["a"], "document")
        await provider.aembed(["a"], "document")

    asyncio.run(main())
    assert provider.gate.waiting == 0
    assert provider.inner.count == {"a": 1}


# --- requirements -----------------------------------------------------------------------------


def test_faults_need_neither_pytest_nor_hypothesis() -> None:
    script = """
import sys
sys.modules["pytest"] = sys.modules["hypothesis"] = None
from embedonce.testing import DictBackend, Fault, FaultyBackend
try:
    from embedonce.testing import BackendContract
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=100)
    assert 'pip install "embedonce[testing]"' in done.stdout
