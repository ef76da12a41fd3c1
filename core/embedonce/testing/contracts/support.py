"""Threads and processes for the contracts, each with an end: what hangs fails instead of hanging the tests."""

from __future__ import annotations

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
from collections.abc import Callable, Mapping, Sequence
from contextvars import copy_context
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")

BOUND = 60.0
"""Seconds after which a call counts as one that hangs. Generous: a busy machine is no failure."""


class Recipe(NamedTuple):
    """How another process makes the same plugin: an importable class, and keyword options that JSON can hold."""

    plugin: Callable[..., Any]
    options: Mapping[str, Any] = {}


def bounded(call: Callable[[], T], what: str) -> T:
    """Return what ``call`` returns, run in a thread that is left behind if it hangs.

    Raises:
        AssertionError: it did not come back.
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
    thread.join(BOUND)
    assert not thread.is_alive(), f"{what} does not come back within {BOUND:g} s"
    if errors:
        raise errors[0]
    return results[0]


def in_threads(count: int, work: Callable[[int], None], what: str) -> None:
    """Run ``work(0)`` to ``work(count - 1)`` at once, and raise the first error.

    Raises:
        AssertionError: a thread did not end.
    """
    start = threading.Barrier(count)
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            start.wait(BOUND)
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + BOUND
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    assert not any(thread.is_alive() for thread in threads), f"{what} does not come back within {BOUND:g} s"
    if errors:
        raise errors[0]


def in_fork(work: Callable[[], None], what: str, *, beside: Callable[[], None] = lambda: None) -> None:
    """Run ``work`` in a forked child of this process, and ``beside`` here, again and again until that has ended.

    Raises:
        AssertionError: it raised there (with what it said), or did not end.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 and later warn of a fork beside threads. That is what is tried here.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:  # pragma: no cover  (another process)
        _run_and_exit(work, writer)
    os.close(writer)
    try:
        said = _read_all(reader, child, lambda: bounded(beside, f"{what}, in the parent,"))
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        os.close(reader)
        _, status = os.waitpid(child, 0)
    assert said is not None, f"{what} does not come back within {BOUND:g} s in a forked child"
    assert status == 0, f"{what} fails in a forked child:\n{said.decode(errors='replace')}"


def _run_and_exit(work: Callable[[], None], writer: int) -> None:  # pragma: no cover  (another process)
    # Never back into the test runner, whatever happens.
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        with contextlib.suppress(OSError):
            os.write(writer, traceback.format_exc().encode()[-8192:])
    finally:
        os._exit(status)


def _read_all(reader: int, child: int, meanwhile: Callable[[], None]) -> bytes | None:
    """Return what the child wrote until its end, or None after ending it for taking too long."""
    said = b""
    end = time.monotonic() + BOUND
    while time.monotonic() < end:
        if not select.select([reader], [], [], 0.0)[0]:
            meanwhile()
            continue
        part = os.read(reader, 8192)
        if not part:
            return said
        said += part
    os.kill(child, signal.SIGKILL)
    return None


def in_processes(requests: Sequence[Mapping[str, Any]], recipe: Recipe, **environment: str) -> list[Any]:
    """Hand each request to a fresh Python process that makes the plugin of ``recipe``; return their answers.

    All begin at one moment, when the last has made its plugin. :mod:`embedonce.testing.contracts.child` says what they
    understand.

    Raises:
        AssertionError: a process failed, with what it said, or did not end.
    """
    children = [_child(environment) for _ in requests]
    try:
        for child, request in zip(children, requests, strict=True):
            _say(child, _message(recipe, request))
        for child in children:
            _told(child)
        for child in children:
            _say(child, b"\n")
        return [_answer(child) for child in children]
    finally:
        for child in children:
            child.kill()
            child.communicate()


def killed_while_writing(recipe: Recipe, *, scope: str, batches: int, holds: str, dimensions: Sequence[int]) -> int:
    """Let a fresh process store one batch of samples after the other, and kill it after it has told of ``batches``.

    It is struck half a batch later, by the time that the last one took: in the middle of the next, if it keeps pace.
    Return how many keys it had told of as stored; it was at work on the next ones.

    Raises:
        AssertionError: it failed, with what it said, or did not tell.
    """
    with _child({}) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(_message(recipe, {"scope": scope, "holds": holds, "dimensions": dimensions}))
            child.stdin.close()
            told, times = [], []
            for _ in range(batches):
                told.append(int(_told(child)))
                times.append(time.monotonic())
            time.sleep((times[-1] - times[-2]) / 2)
        finally:
            child.kill()  # with SIGKILL
        # It may have told of more before it was struck.
        told += [int(line) for line in child.stdout.read().splitlines(keepends=True) if line.endswith(b"\n")]
        return told[-1]


def _say(child: subprocess.Popen[bytes], line: bytes) -> None:
    """Write to a child. One that has failed does not read; what it said is looked at when it is asked."""
    assert child.stdin is not None
    with contextlib.suppress(BrokenPipeError):
        child.stdin.write(line)
        child.stdin.flush()


def _told(child: subprocess.Popen[bytes]) -> bytes:
    """Return the next line that a child tells."""
    assert child.stdout is not None
    told = bounded(child.stdout.readline, "another process")
    if not told:
        assert child.stderr is not None
        raise AssertionError(f"it fails in another process:\n{child.stderr.read().decode(errors='replace')}")
    return told


def _child(environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    paths = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "embedonce.testing.contracts.child"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths, **environment},
    )


def _message(recipe: Recipe, request: Mapping[str, Any]) -> bytes:
    name = f"{recipe.plugin.__module__}:{recipe.plugin.__qualname__}"
    return json.dumps({"plugin": name, "options": dict(recipe.options), **request}).encode() + b"\n"


def _answer(child: subprocess.Popen[bytes]) -> Any:
    try:
        said, errors = child.communicate(timeout=BOUND)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"another process does not come back within {BOUND:g} s") from None
    assert child.returncode == 0, (
        f"it fails in another process ({child.returncode}):\n{errors.decode(errors='replace')}"
    )
    return json.loads(said)
