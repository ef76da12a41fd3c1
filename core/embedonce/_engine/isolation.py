"""Finds the texts that make a request fail, so that the other texts of the request do not fail.

A failed request is halved until a single text fails alone. A text is never given up on a conclusion: it is always sent
alone first, because the failure of a larger request may have been a passing one. A bad text costs at most
``2 * ceil(log2(n))`` requests in a request of n texts:

- each halving costs one request. If the first half works, the second half must have the bad text. Only at the first
  such conclusion is the second half sent as a whole: if it works too, then no text was bad, and the request was too
  large;
- the last text costs one request, unless it has just failed alone;
- the parts that were set aside are sent together, in one request. If no request of the search has worked, the smallest
  of them is sent alone before, because a provider that refuses many texts in a row must show that it works at all.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from itertools import chain

from embedonce.errors import DriftError, TextRefused

from .batch_sizes import BatchSizes, count_bytes
from .refusals import find_cause, is_refusal, read_batch_limit, speaks_of_size

Request = Callable[[list[str]], Awaitable[Exception | None]]
"""Sends the texts of some keys to the provider, and returns the error of the request, or None if it worked. It raises
:class:`Stop` if it may not be sent."""

Pause = Callable[[Exception, int], Awaitable[None]]
"""Waits after a request that failed because the provider has too much to do. The number counts such requests in a row,
from 0."""

FEW = 3
"""Number of requests in a row with status 429 after which a call ends, if the engine does not repeat such requests."""


def count_halvings(texts: int) -> int:
    """Return ``ceil(log2(texts))``, and 1 for a single text."""
    return max(1, (texts - 1).bit_length())


class Patience:
    """The failed requests of one call since the last one that worked, over all its chunks.

    Several threads may use it at the same time. If a call fails as a whole, it makes few requests, however many chunks
    it has.
    """

    def __init__(self, texts: int) -> None:
        self._lock = threading.Lock()
        self._most = 4 * count_halvings(texts)
        self._failures = 0
        self._overloads = 0
        self.is_search_futile = False
        """Whether a chunk ended without any success, and no request has worked since."""
        self.final_error: Exception | None = None
        """If not None, the error of all texts that have not been sent yet."""

    def note_success(self) -> None:
        if not (self._failures or self._overloads or self.is_search_futile):
            return
        with self._lock:
            self._failures = self._overloads = 0
            self.is_search_futile = False

    def note_failure(self, error: Exception) -> None:
        with self._lock:
            self._failures += 1
            if self._failures >= self._most:
                self.final_error = error

    def stop(self, error: Exception) -> None:
        """Send nothing more: all texts that have not been sent yet fail with this error."""
        with self._lock:
            self.final_error = error

    def note_rate_limit(self, error: Exception, *, is_retried: bool) -> None:
        """Note a status 429. If the request was repeated in vain, or after a few of them, the call ends."""
        with self._lock:
            self._overloads += 1
            if is_retried or self._overloads >= FEW:
                self.final_error = error


class Stop(Exception):
    """No more requests are made for a chunk. All of its remaining texts get ``error``."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error


async def embed_chunk(
    keys: list[str],
    texts: Mapping[str, str],
    request: Request,
    *,
    pause: Pause,
    batches: BatchSizes,
    patience: Patience,
    is_retried: bool = False,
) -> tuple[dict[str, Exception], dict[str, Exception]]:
    """Send the texts of a chunk in as few requests as the provider accepts.

    Return the errors of the texts that failed alone, and the error of the texts that were given up together.

    ``is_retried`` says whether ``request`` repeats a request that is answered with status 429.
    """
    error: Exception | None = None
    doubts = batches.doubts
    if patience.final_error is None and not batches.is_in_doubt:
        try:
            error = await request(keys)
        except Stop as stop:
            return {}, dict.fromkeys(keys, stop.error)
        if error is None:
            patience.note_success()
            return {}, {}
    search = _Search(keys, texts, request, pause, batches, doubts, patience, is_retried)
    try:
        await search.send_all(error)
    except Stop as stop:
        return search.failed, dict.fromkeys(search.pending, stop.error)
    return search.failed, {}


class _Search:
    """The texts of one chunk, and the requests that were made to find those that fail."""

    def __init__(
        self,
        keys: list[str],
        texts: Mapping[str, str],
        request: Request,
        pause: Pause,
        batches: BatchSizes,
        doubts: int,
        patience: Patience,
        is_retried: bool,
    ) -> None:
        self.failed: dict[str, Exception] = {}
        self.pending = dict.fromkeys(keys)
        """The keys of texts that have neither worked nor failed yet, in order."""
        self._texts = texts
        self._request = request
        self._pause = pause
        self._batches = batches
        self._doubts = doubts
        """``doubts`` of ``batches`` before the last request that failed."""
        self._patience = patience
        self._is_retried = is_retried
        self._is_single = len(keys) == 1
        self._most_failures = 4 * count_halvings(len(keys))
        # The search for one text that fails takes this many requests, if it is the first text of its chunk.
        self._most_overloads = count_halvings(len(keys)) + 1
        self._failures = 0
        self._overloads = 0

    async def send_all(self, error: Exception | None) -> None:
        """Send all texts. Search each part that fails. ``error`` is that of all texts, if they have been sent together.

        Raises:
            Stop: the provider fails, whatever is sent to it.
        """
        todo = [list(self.pending)]
        while todo:
            parts = self._cut(self._select_pending(todo.pop()))
            if not parts:
                continue
            part, *rest = parts
            if rest:
                todo.append(list(chain.from_iterable(rest)))
            # Another chunk may have found a limit since all texts were sent together. Then the error says nothing.
            error = await self._send(part, None if rest else error)
            if error is not None:
                if self._patience.is_search_futile:
                    raise Stop(error)
                todo += await self._find_bad_text(self._select_pending(part), error)
                error = None

    async def _find_bad_text(self, suspects: list[str], error: Exception) -> list[list[str]]:
        """Find one text that fails alone in a part that failed. Return the parts to send next, the last one first.

        If all texts of the part work after all, the part was too large.
        """
        refused, refusal, worked = suspects, error, list[str]()
        aside: list[list[str]] = []
        has_just_failed, was_other_sent = True, False
        while len(suspects) > 1:
            named = read_batch_limit(error, self._list_texts(suspects)) if has_just_failed else None
            middle = named or len(suspects) // 2
            first, other = suspects[:middle], suspects[middle:]
            problem = await self._send(first)
            if problem is None and named:
                self._batches.learn_number(named)
                return [*_merge(aside), other]
            if problem is None:
                worked = max(worked, first, key=len)
                suspects, has_just_failed = other, False
                if not was_other_sent:
                    was_other_sent = True
                    problem = await self._send(other)
                    if problem is None:
                        self._note_too_large(refused, refusal, max(worked, other, key=len))
                        return _merge(aside)
            else:
                suspects = first
                aside.append(other)
            if problem is not None:
                suspects = self._select_pending(suspects)
                refused, refusal, error, has_just_failed = suspects, problem, problem, True
        if suspects and not has_just_failed:
            problem = await self._send(suspects)
            if problem is None:
                self._note_too_large(refused, refusal, worked or suspects)
                return _merge(aside)
            error = problem
        self._fail(suspects, error)
        return _merge(aside) if worked else [*_merge(aside[:-1]), *aside[-1:]]

    async def _send(self, part: list[str], error: Exception | None = None) -> Exception | None:
        """Send one request. If the provider says which texts it refuses, send the others again.

        ``error`` is the error of the request if it has been sent already.

        Raises:
            Stop: the error is not about a text, the provider has failed too often in a row, or the request may not be
                sent.
        """
        while True:
            if error is None:
                if self._patience.final_error is not None:
                    raise Stop(self._patience.final_error)
                doubts = self._batches.doubts
                error = await self._request(part)
                if error is not None:
                    self._doubts = doubts
            if error is None:
                self._note_success(part)
                return None
            refused = _read_positions(error, len(part))
            if not refused:
                await self._take_failure(error, part)
                return error
            self._fail([part[i] for i in refused], error)
            part, error = self._select_pending(part), None
            if not part:
                return None

    def _note_success(self, part: Sequence[str]) -> None:
        self._failures = self._overloads = 0
        self._patience.note_success()
        for key in part:
            self.pending.pop(key, None)
        if self._batches.is_in_doubt:
            self._batches.note_success(self._list_texts(part))

    async def _take_failure(self, error: Exception, part: Sequence[str]) -> None:
        cause = find_cause(error, self._list_texts(part))
        if isinstance(error, DriftError):
            self._patience.stop(error)  # all further answers would be of the other model too
        if cause == "rate":
            self._patience.note_rate_limit(error, is_retried=self._is_retried)
        if cause in ("rate", "call"):
            raise Stop(error)
        if self._is_single:
            return  # there is nothing to search, so the request is not an extra one
        self._patience.note_failure(error)
        self._failures += 1
        self._overloads = self._overloads + 1 if cause == "overload" else 0
        if self._failures >= self._most_failures or self._overloads > self._most_overloads:
            self._patience.is_search_futile = True
            raise Stop(error)
        if self._overloads:
            await self._pause(error, self._overloads - 1)

    def _note_too_large(self, refused: Sequence[str], error: Exception, worked: Sequence[str]) -> None:
        if find_cause(error) == "overload":
            return  # the failure was a passing one
        texts = self._list_texts(refused)
        self._batches.learn(
            texts,
            self._list_texts(worked),
            is_sure=is_refusal(error, texts),
            by_size=speaks_of_size(error, texts),
            doubts=self._doubts,
        )

    def _list_texts(self, keys: Iterable[str]) -> list[str]:
        return [self._texts[key] for key in keys]

    def _fail(self, keys: Iterable[str], error: Exception) -> None:
        for key in keys:
            self.failed[key] = error
            self.pending.pop(key, None)

    def _select_pending(self, keys: Iterable[str]) -> list[str]:
        return [key for key in keys if key in self.pending]

    def _cut(self, keys: list[str]) -> list[list[str]]:
        """Cut keys into parts that the provider is known to accept."""
        if not self._batches.has_limit or len(keys) < 2:
            return [keys] if keys else []
        is_accepted = self._batches.get_test()
        parts: list[list[str]] = []
        total = 0
        for key in keys:
            size = count_bytes(self._texts[key])
            if parts and is_accepted(len(parts[-1]) + 1, total + size):
                parts[-1].append(key)
                total += size
            else:
                parts.append([key])
                total = size
        return parts


def _merge(parts: Iterable[Sequence[str]]) -> list[list[str]]:
    """Join parts into one part; return no part if they have no texts."""
    merged = list(chain.from_iterable(parts))
    return [merged] if merged else []


def _read_positions(error: Exception, texts: int) -> list[int]:
    if not isinstance(error, TextRefused):
        return []
    return sorted({i for i in error.positions if type(i) is int and 0 <= i < texts})
