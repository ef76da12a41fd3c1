"""Functions that run calls in threads and processes, with timeouts. A hanging call then makes only one test fail."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import copy_context
from typing import Any, NamedTuple, TypeVar

from embedonce.event_loops import async_deadline

T = TypeVar("T")

CALL_TIMEOUT = 60.0
"""Seconds after which a call counts as hung. The number is high, so that no test fails because of a busy machine."""


class Recipe(NamedTuple):
    """Tells another process how to make the same plugin: call ``plugin`` with ``options`` as keyword arguments.

    The class or function ``plugin`` must be importable by name, and JSON must be able to represent the options. A path
    is passed as text.
    """

    plugin: Callable[..., Any]
    options: Mapping[str, Any] = {}


def call_with_timeout(call: Callable[[], T], what: str) -> T:
    """Run ``call`` in a thread and return its result; a thread that hangs is abandoned.

    Raises:
        AssertionError: the call did not return in time.
    """
    results: list[T] = []
    errors: list[BaseException] = []
    context = copy_context()

    def run() -> None:
        try:
            results.append(context.run(call))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(CALL_TIMEOUT)
    assert not thread.is_alive(), f"{what} did not return within {CALL_TIMEOUT:g} s"
    if errors:
        raise errors[0]
    return results[0]


def run_in_threads(count: int, work: Callable[[int], None], what: str) -> None:
    """Run ``work(0)`` to ``work(count - 1)`` in parallel threads, and raise the first error.

    Raises:
        AssertionError: a thread did not finish in time.
    """
    start = threading.Barrier(count)
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            start.wait(CALL_TIMEOUT)
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + CALL_TIMEOUT
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads), f"{what} did not return within {CALL_TIMEOUT:g} s"
    if errors:
        raise errors[0]


def run_in_fork(work: Callable[[], None], what: str, *, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Run ``work`` in a forked child, and call ``meanwhile`` in this process repeatedly until the child exits.

    Raises:
        AssertionError: ``work`` raised (the message has its traceback), or the child did not exit in time.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 and later warn about a fork while threads run. Here the fork is intended.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:  # pragma: no cover  (another process)
        _run_and_exit(work, writer)
    os.close(writer)
    try:
        output = _read_until_exit(reader, child, lambda: call_with_timeout(meanwhile, f"{what}: a call in the parent"))
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.close(reader)
        _, status = os.waitpid(child, 0)
    assert output is not None, f"{what}: the forked child did not exit within {CALL_TIMEOUT:g} s"
    assert status == 0, f"{what}: the forked child failed:\n{output.decode(errors='replace')}"


def _run_and_exit(work: Callable[[], None], writer: int) -> None:  # pragma: no cover  (another process)
    # The child must exit here: if it returned into the test runner, it would run the remaining tests.
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        with contextlib.suppress(OSError):
            os.write(writer, traceback.format_exc().encode()[-8192:])
    finally:
        os._exit(status)


def _read_until_exit(reader: int, child: int, call: Callable[[], None]) -> bytes | None:
    """Return everything that the child wrote until it exited. If the child takes too long, kill it and return None."""
    output = b""
    end = time.monotonic() + CALL_TIMEOUT
    while time.monotonic() < end:
        if not select.select([reader], [], [], 0.0)[0]:
            call()
            continue
        part = os.read(reader, 8192)
        if not part:
            return output
        output += part
    os.kill(child, signal.SIGKILL)
    return None


def run_in_processes(requests: Sequence[Mapping[str, Any]], recipe: Recipe, **environment: str) -> list[Any]:
    """Send each request to a new Python process that makes the plugin of ``recipe``, and return the answers.

    The processes start to handle their requests at the same moment, when all of them have made their plugins.
    :mod:`embedonce.testing.contracts.child` defines the requests.

    Raises:
        AssertionError: a process failed (the message has its error output) or did not exit in time.
    """
    children = [_start_child(environment) for _ in requests]
    try:
        for child, request in zip(children, requests, strict=True):
            _write_line(child, _encode_request(recipe, request))
        for child in children:
            _read_line(child)
        for child in children:
            _write_line(child, b"\n")
        return [_read_answer(child) for child in children]
    finally:
        for child in children:
            child.kill()
            child.communicate()


def run_with_twin(backend: Any, use: Callable[[Any], Awaitable[None]]) -> None:
    """Run ``use`` with an async client of a backend on a new event loop, and close the client afterwards.

    Raises:
        TimeoutError: ``use`` did not end in time.
    """

    async def main() -> None:
        twin = backend.twin()
        try:
            async with asyncio.timeout(CALL_TIMEOUT):
                await use(twin)
        finally:
            await twin.close()

    asyncio.run(main())


async def read_while_loop_is_blocked(twin: Any, keys: Sequence[str]) -> Mapping[str, Any]:
    """Read keys with a timeout of a second while another task blocks the loop for longer.

    Raises:
        AssertionError: the call timed out.
    """
    await twin.get_many(keys)  # connects

    async def read() -> Mapping[str, Any]:
        async with async_deadline(1.0):
            found: Mapping[str, Any] = await twin.get_many(keys)
            return found

    call = asyncio.ensure_future(read())
    await asyncio.sleep(0)
    time.sleep(1.5)
    try:
        return await call
    except TimeoutError:
        raise AssertionError(
            "the async client reported a timeout, although only the event loop was blocked: "
            "use embedonce.event_loops.async_deadline instead of asyncio.timeout"
        ) from None


def kill_while_writing(recipe: Recipe, *, scope: str, batches: int, holds: str, dimensions: Sequence[int]) -> int:
    """Start a process that stores batches of samples, and kill it. Return how many keys it reported as stored.

    The process reports each batch that it has stored. After ``batches`` reports, this function waits for half the time
    of one batch and then kills the process, so that the kill most likely interrupts the next batch. The process may
    have stored some keys that it did not report.

    Raises:
        AssertionError: the process failed (the message has its error output) or reported nothing in time.
    """
    with _start_child({}) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(_encode_request(recipe, {"scope": scope, "holds": holds, "dimensions": dimensions}))
            child.stdin.close()
            reported, times = [], []
            for _ in range(batches):
                reported.append(int(_read_line(child)))
                times.append(time.monotonic())
            time.sleep((times[-1] - times[-2]) / 2)
        finally:
            child.kill()  # with SIGKILL
        # Before the process was killed, it may have reported more keys in lines that were not read above.
        reported += [int(line) for line in child.stdout.read().splitlines(keepends=True) if line.endswith(b"\n")]
        return reported[-1]


def _write_line(child: subprocess.Popen[bytes], line: bytes) -> None:
    """Write a line to a child. Ignore a broken pipe: the next read from the child raises an error with the reason."""
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        child.stdin.write(line)
        child.stdin.flush()


def _read_line(child: subprocess.Popen[bytes]) -> bytes:
    """Return the next line that a child writes."""
    assert child.stdout is not None
    line = call_with_timeout(child.stdout.readline, "another process")
    if not line:
        assert child.stderr is not None
        raise AssertionError(f"the plugin failed in another process:\n{child.stderr.read().decode(errors='replace')}")
    return line


def _start_child(environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "embedonce.testing.contracts.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths, **environment},
    )


def _encode_request(recipe: Recipe, request: Mapping[str, Any]) -> bytes:
    name = f"{recipe.plugin.__module__}:{recipe.plugin.__qualname__}"
    return json.dumps({"plugin": name, "options": json.loads(encode_options(recipe)), **request}).encode() + b"\n"


def encode_options(recipe: Recipe) -> str:
    """Return the options of a recipe as JSON."""
    return json.dumps(dict(recipe.options), default=os.fspath)


def _read_answer(child: subprocess.Popen[bytes]) -> Any:
    try:
        output, errors = child.communicate(timeout=CALL_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"another process did not return within {CALL_TIMEOUT:g} s") from None
    assert child.returncode == 0, (
        f"the plugin failed in another process (exit status {child.returncode}):\n{errors.decode(errors='replace')}"
    )
    return json.loads(output)
