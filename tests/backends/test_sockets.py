"""Waiting for sockets and for slots, which several backends share."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest
from servers import wait_until

from embedonce.contracts import deadline
from embedonce.errors import TierTimeout
from embedonce.testing.contracts.support import run_in_threads
from embedonce_backends import _call_slots
from embedonce_backends._call_slots import CallSlots
from embedonce_backends._sockets import SocketWaiter, send_all

LONG = 60.0


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    with ours, theirs:
        yield ours, theirs


# --- sockets ------------------------------------------------------------------------------------


def test_a_wait_ends_at_the_deadline(pair: tuple[socket.socket, socket.socket]) -> None:
    waiter = SocketWaiter(pair[0].fileno())
    with deadline(0.02), pytest.raises(TierTimeout):
        waiter.wait_until_readable()


def test_a_wait_without_a_deadline_ends_after_the_longest_time(pair: tuple[socket.socket, socket.socket]) -> None:
    waiter = SocketWaiter(pair[0].fileno(), 0.02)
    with pytest.raises(TimeoutError):
        waiter.wait_until_readable()


def test_a_wait_ends_when_data_arrives_or_the_other_side_closes(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    waiter = SocketWaiter(ours.fileno())
    assert not waiter.is_readable()
    theirs.sendall(b"x")
    with deadline(LONG):
        waiter.wait_until_readable()
    assert waiter.is_readable()
    assert ours.recv(1) == b"x"
    assert not waiter.is_readable()
    theirs.close()
    with deadline(LONG):
        waiter.wait_until_readable()
    assert waiter.is_readable()


def test_data_that_does_not_fit_into_the_buffers_is_sent_whole(pair: tuple[socket.socket, socket.socket]) -> None:
    ours, theirs = pair
    data = bytes(range(256)) * 40_000
    received = bytearray()

    def receive() -> None:
        while len(received) < len(data):
            received.extend(theirs.recv(2**16))

    reader = threading.Thread(target=receive, daemon=True)
    reader.start()
    with deadline(LONG):
        send_all(ours, SocketWaiter(ours.fileno()), data)
    reader.join(LONG)
    assert bytes(received) == data


def test_sending_ends_at_the_deadline_if_nobody_receives(pair: tuple[socket.socket, socket.socket]) -> None:
    with deadline(0.05), pytest.raises(TierTimeout):
        send_all(pair[0], SocketWaiter(pair[0].fileno()), bytes(10_000_000))


def test_sending_to_a_closed_socket_fails(pair: tuple[socket.socket, socket.socket]) -> None:
    pair[1].close()
    with deadline(LONG), pytest.raises(OSError, match="pipe"):
        send_all(pair[0], SocketWaiter(pair[0].fileno()), b"x")


# --- slots --------------------------------------------------------------------------------------


def never() -> float:
    raise AssertionError("the call had to wait")


def test_no_more_calls_than_slots_run_at_the_same_time() -> None:
    slots, running, most = CallSlots(3), [0], [0]
    lock = threading.Lock()

    def work(_: int) -> None:
        for _ in range(50):
            assert slots.take(lambda: LONG)
            with lock:
                running[0] += 1
                most[0] = max(most[0], running[0])
            with lock:
                running[0] -= 1
            slots.free()

    run_in_threads(8, work, "eight threads with three slots")
    assert most[0] <= 3
    for _ in range(3):
        assert slots.take(never)


def test_a_call_gives_up_after_its_time() -> None:
    slots = CallSlots(1)
    assert slots.take(never)
    assert not slots.take(lambda: 0.01)
    slots.free()
    assert slots.take(never)


def start_waiting(slots: CallSlots, done: Callable[[], None]) -> threading.Thread:
    """Start a thread that waits for a slot, calls ``done`` and frees the slot."""

    def work() -> None:
        assert slots.take(lambda: LONG)
        done()
        slots.free()

    count = len(slots._waiting)
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    wait_until(lambda: len(slots._waiting) == count + 1, "the thread waits")
    return thread


def test_waiting_calls_go_before_a_new_call_in_their_order() -> None:
    slots, order = CallSlots(1), list[str]()
    assert slots.take(never)
    threads = [start_waiting(slots, partial(order.append, name)) for name in ("first", "second", "third")]
    slots.free()
    assert slots.take(lambda: LONG)
    order.append("new")
    assert order == ["first", "second", "third", "new"]
    for thread in threads:
        thread.join(LONG)
    slots.free()
    assert slots.take(never)


def test_a_freed_slot_belongs_to_the_waiting_call_at_once() -> None:
    slots, may_end = CallSlots(1), threading.Event()
    assert slots.take(never)
    waiting = start_waiting(slots, partial(may_end.wait, LONG))
    slots.free()
    assert not slots.take(lambda: 0.0)
    may_end.set()
    waiting.join(LONG)
    assert slots.take(never)


def test_no_thread_starves() -> None:
    slots, turns = CallSlots(1), [0] * 4

    def work(number: int) -> None:
        while min(turns) < 20:
            assert slots.take(lambda: LONG / 4)
            turns[number] += 1
            time.sleep(0)  # other threads run while this one has the slot
            slots.free()

    run_in_threads(4, work, "four threads with one slot")


@pytest.mark.parametrize("is_given", [True, False], ids=["with the slot", "without a slot"])
@pytest.mark.parametrize("end", ["time", "interrupt"])
def test_a_wait_that_ends_loses_no_slot(monkeypatch: pytest.MonkeyPatch, end: str, is_given: bool) -> None:
    """The wait ends at the moment when the call is given the slot, or before that."""
    slots = CallSlots(1)
    assert slots.take(never)

    class EndedTurn(_call_slots._Turn):
        def __init__(self) -> None:
            super().__init__()
            self.lock = self  # type: ignore[assignment]

        def acquire(self, timeout: float) -> bool:
            assert timeout == LONG
            if is_given:
                slots.free()
            if end == "interrupt":
                raise KeyboardInterrupt
            return False

        def release(self) -> None:
            pass

    with monkeypatch.context() as patch:
        patch.setattr(_call_slots, "_Turn", EndedTurn)
        if end == "interrupt":
            with pytest.raises(KeyboardInterrupt):
                slots.take(lambda: LONG)
        else:
            assert slots.take(lambda: LONG) == is_given
    assert not slots._waiting
    if not is_given or end == "time":
        slots.free()
    assert slots.take(never)
    assert not slots.take(lambda: 0.0)


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no signals to threads here")
def test_an_interrupted_wait_leaves_the_queue() -> None:
    slots, main = CallSlots(1), threading.main_thread().ident
    assert slots.take(never)
    assert main is not None

    def interrupt() -> None:
        wait_until(lambda: slots._waiting, "the main thread waits")
        signal.pthread_kill(main, signal.SIGINT)

    thread = threading.Thread(target=interrupt, daemon=True)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            slots.take(lambda: LONG)
        thread.join(LONG)
    finally:
        signal.signal(signal.SIGINT, before)
    slots.free()
    assert slots.take(never)


def test_a_call_whose_time_is_over_does_not_wait() -> None:
    slots = CallSlots(1)
    assert slots.take(never)
    assert not slots.take(lambda: -1.0)
    with pytest.raises(TierTimeout):
        slots.take(raise_timeout)
    slots.free()
    assert slots.take(never)


def raise_timeout() -> float:
    raise TierTimeout("no time is left")


def test_closing_ends_all_waits() -> None:
    slots = CallSlots(1)
    assert slots.take(never)
    results: list[bool] = []
    waiting = [threading.Thread(target=lambda: results.append(slots.take(lambda: LONG)), daemon=True) for _ in range(3)]
    for thread in waiting:
        thread.start()
    wait_until(lambda: len(slots._waiting) == 3, "all threads wait")
    slots.close()
    for thread in waiting:
        thread.join(LONG)
    assert results == [True] * 3
    for _ in range(4):
        slots.free()
    assert slots.take(never)
