"""Daemon threads for calls that may hang."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import copy_context
from typing import TypeVar

T = TypeVar("T")


class Workers:
    """Daemon threads for calls that may hang. A thread starts on demand, is reused, and ends after ten idle seconds.

    ``max_threads`` limits how many threads run at the same time; None means no limit. A ThreadPoolExecutor is not used,
    because it joins its threads at exit, so one hanging call would keep the program alive for ever.
    """

    IDLE_SECONDS = 10.0

    def __init__(self, max_threads: int | None = None) -> None:
        self._max_threads = max_threads
        self._lock = threading.RLock()
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._threads = 0
        self._free = 0  # number of idle threads that no queued job needs
        self._backlog = 0  # queued jobs that must wait for a busy thread

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Run ``call`` in a thread, in a copy of the caller's context. If all threads are busy, the call is queued.

        If no thread can be started, because the system allows no more, the call is queued for a thread that runs.

        Raises:
            RuntimeError: no thread can be started and none is running, or the interpreter is shutting down.
        """
        future: Future[T] = Future()
        context = copy_context()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = context.run(call)
            except StopIteration as error:  # asyncio cannot raise StopIteration into a coroutine
                replacement = RuntimeError("a call raised StopIteration, as next() does on an empty iterator")
                replacement.__cause__ = error
                future.set_exception(replacement)
            except BaseException as error:  # noqa: BLE001  (the future passes the error on to the waiting caller)
                future.set_exception(error)
            else:
                future.set_result(result)

        with self._lock:
            if self._free:
                self._free -= 1
            elif self._max_threads is None or self._threads < self._max_threads:
                try:
                    threading.Thread(target=self._work, name="embedonce-worker", daemon=True).start()
                    self._threads += 1
                except RuntimeError:
                    if not self._threads:
                        raise
                    self._backlog += 1
            else:
                self._backlog += 1
            self._jobs.put(run)
        return future

    def _work(self) -> None:
        run = self._jobs.get()
        while True:
            run()
            del run
            with self._lock:
                if self._backlog:
                    self._backlog -= 1
                else:
                    self._free += 1
            while True:
                try:
                    run = self._jobs.get(timeout=self.IDLE_SECONDS)
                    break
                except queue.Empty:
                    with self._lock:
                        if self._free:  # otherwise, a job was just queued for this thread
                            self._free -= 1
                            self._threads -= 1
                            return
