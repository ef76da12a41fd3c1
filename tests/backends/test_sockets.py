"""Waiting for sockets and for slots, which several backends share."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
from servers import wait_until

from embedonce.contracts import deadline
from embedonce.errors import TierTimeout
from embedonce.testing.contracts.support import run_in_threads
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


def test_a_waiting_call_goes_before_a_new_call() -> None:
    slots = CallSlots(1)
    assert slots.take(never)
    taken = threading.Event()

    def wait() -> None:
        assert slots.take(lambda: LONG)
        taken.set()

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    wait_until(lambda: slots._waiting, "the thread waits")
    with slots._lock:  # the slot becomes free, and the waiting thread cannot run yet
        slots._used -= 1
        slots._changed.notify()
        is_free = slots._used + slots._waiting < slots._limit
    assert not is_free
    assert taken.wait(LONG)
    waiting.join(LONG)
    slots.free()
    assert slots.take(never)


def test_closing_ends_all_waits() -> None:
    slots = CallSlots(1)
    assert slots.take(never)
    results: list[bool] = []
    waiting = [threading.Thread(target=lambda: results.append(slots.take(lambda: LONG)), daemon=True) for _ in range(3)]
    for thread in waiting:
        thread.start()
    wait_until(lambda: slots._waiting == 3, "all threads wait")
    slots.close()
    for thread in waiting:
        thread.join(LONG)
    assert results == [True] * 3
