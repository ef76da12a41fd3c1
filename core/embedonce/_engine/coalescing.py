"""Coalescing: misses of several calls become one request to the provider.

A chunk of misses waits for a short time in a *window*, and chunks of other calls join it there. When the time is over,
or as soon as the chunks fill a request, the window sends one request with all texts. Each call then stores, counts and
returns only its own entries and errors.

A window belongs to one route, so it never joins texts of different providers, tasks, vector spaces or namespaces. It
also belongs to one port: blocking calls join blocking calls, and async calls join calls on the same event loop.

No call makes the request of a window that several calls have joined: it is made in a task or a thread of its own. So
no call depends on another one, and any of them may be cancelled or interrupted. Nor does the window depend on a call:
it waits for nothing but its own time and the provider. A window with a single chunk makes no request. Its call makes
the request itself, as if there were no window.

The code takes no lock, because a signal handler may use the cache at any line, and would wait for ever for a window
whose thread needs the lock. Instead, it uses steps that are atomic: those of a deque and of a dict.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from functools import partial

from embedonce.vectors import NO_WORK, Entry, Work

from . import ahead
from .admitting import Admitted, ask_to_send, settle_request
from .batch_sizes import count_bytes
from .call import PROVIDER, Answer, Call, copy_error
from .flights import Claims, InFlight, calls_in_provider
from .isolation import Patience, Stop
from .ports import Port
from .provider_calls import find_token_limit
from .provider_requests import Errors, ProviderRequests, Take
from .refusals import is_about_provider
from .routes import LiveProvider, Route


async def request_together(
    requests: ProviderRequests,
    in_flight: InFlight,
    call: Call,
    keys: list[str],
    texts: Mapping[str, str],
    take: Take,
    patience: Patience,
) -> tuple[Errors, Errors]:
    """Do the same as :meth:`ProviderRequests.request_chunk`, but together with chunks of other calls if there are any.

    The function ``admit`` of the call is asked before the chunk joins, so no other call waits for its answer. If there
    is nobody to join, the call sends the first request with this permission.
    """
    if _goes_alone(call, patience):
        return await requests.request_chunk(call, keys, texts, take, patience)
    part = _Part(call, {key: texts[key] for key in keys})
    if _Load(part.route.source, [part]).is_full():
        return await requests.request_chunk(call, keys, texts, take, patience)
    admitted: Admitted | None = None
    if part.is_asked_for:
        try:
            admitted = await ask_to_send(call, list(part.texts.values()))
        except Stop as stop:
            return {}, dict.fromkeys(keys, stop.error)
    await _wait_in_window(part, call.port, requests, in_flight)
    call.answer.spent.append((PROVIDER, part.seconds))
    call.answer.waste += part.waste
    if part.entries or part.invalid:
        await take(part.entries, part.invalid)
    if admitted is not None and part.is_sent:
        await settle_request(call, admitted, part.entries.values(), sum((work for _, work in part.waste), NO_WORK))
        admitted = None
    left = part.list_open()
    if not left:
        return part.alone, part.together
    alone, together = await requests.request_chunk(call, left, texts, take, patience, admitted)
    return {**part.alone, **alone}, {**part.together, **together}


def _goes_alone(call: Call, patience: Patience) -> bool:
    """Return whether the chunks of a call do not wait for other calls."""
    answer = call.answer
    if not answer.is_joinable or patience.final_error is not None:
        return True
    # A run has enough texts to fill its requests. While its chunk waited, it would occupy a turn of the provider.
    if ahead.window_turns.get() is not None:
        return True
    # The tiers have returned vectors whose dimensions the route does not know yet. Only this call checks for them.
    return answer.dimensions != answer.route.dimensions


async def _wait_in_window(part: _Part, port: Port, requests: ProviderRequests, in_flight: InFlight) -> None:
    """Wait until the window of a chunk is done with it. What is still open then, the call has to request itself."""
    while True:
        window = _open_window(part.route, port, requests, in_flight)
        if window is None:
            return
        if window.load.accepts(part):
            window.parts.append(part)
            if window.is_sealed and window.withdraw(part):
                window.seal()  # again, because Ctrl-C may have interrupted the first time
                continue
            window.load.add(part)
            if window.load.is_full():
                window.seal()
            await port.wait(part.done, None, partial(window.keep_or_withdraw, part))
            return
        window.seal()


def _open_window(route: Route, port: Port, requests: ProviderRequests, in_flight: InFlight) -> _Window | None:
    """Return the window of a route, which begins now if there is none. Return None if no thread can be started."""
    found: _Window | None = port.windows.get(route)
    if found is not None:
        return found
    mine = _Window(route, port, requests, in_flight)
    window: _Window = port.windows.setdefault(route, mine)
    if window is mine:
        try:
            port.start(mine.run)
        except RuntimeError:
            mine.seal()
            return None
    return window


class _Part:
    """The chunk of one call in a window, and what the window has found for it.

    A part does not keep the call's ticket, because it may outlive the call.
    """

    def __init__(self, call: Call, texts: Mapping[str, str]) -> None:
        self.route = call.answer.route
        self.texts = texts
        self.failed_tiers = frozenset(call.answer.failed_tiers)
        self.size = sum(map(count_bytes, texts.values()))
        limit = find_token_limit(self.route.source.provider)
        self.tokens = 0.0 if limit is None else sum(map(limit[1], texts.values()))
        self.outer_calls = calls_in_provider.get() | {call.ticket.number}
        """The calls that wait for this chunk."""
        self.entries: dict[str, Entry] = {}
        self.invalid: Errors = {}
        """Errors of texts whose vector is invalid."""
        self.alone: Errors = {}
        """Errors of texts that failed alone."""
        self.together: Errors = {}
        """The error of the texts that were given up together."""
        self.seconds = 0.0
        """Seconds of the requests that were made until the chunk was done."""
        self.waste: list[tuple[str, Work]] = []
        """The work that gave no vectors for its texts, like :attr:`Answer.waste`."""
        self.is_asked_for = call.answer.admit is not None
        """Whether the call asks before each of its requests."""
        self.is_sent = False
        """Whether the window has begun to send the chunk together with others."""
        self.done: Future[None] = Future()

    def list_open(self) -> list[str]:
        """Return the keys that have neither an entry nor an error."""
        found = (self.entries, self.invalid, self.alone, self.together)
        return [key for key in self.texts if not any(key in part for part in found)]

    def finish(self, seconds: float = 0.0) -> None:
        """Let the call go on, unless it does already."""
        if not self.done.done():
            self.seconds = seconds
            self.done.set_result(None)


class _Load:
    """How much of one request some chunks fill."""

    def __init__(self, source: LiveProvider, parts: Iterable[_Part] = ()) -> None:
        self._source = source
        limit = find_token_limit(source.provider)
        self._max_tokens = float("inf") if limit is None else limit[0]
        self._keys: set[str] = set()
        self._texts = 0
        self._size = 0
        self._tokens = 0.0
        for part in parts:
            self.add(part)

    def add(self, part: _Part) -> None:
        self._keys.update(part.texts)
        texts = len(part.texts)  # a call within the next line would let another thread change the number meanwhile
        self._texts += texts
        self._size += part.size
        self._tokens += part.tokens

    def accepts(self, part: _Part) -> bool:
        """Return whether one request can have this chunk too.

        Two calls rarely have the same text here, because one of them follows the flight of the other.
        """
        if not self._keys:
            return True
        is_new = self._keys.isdisjoint(part.texts)
        return is_new and self._fits(len(part.texts), part.size, part.tokens)

    def is_full(self) -> bool:
        """Return whether not even a text of one byte fits."""
        return not self._fits(1, 1, 1)

    def _fits(self, texts: int, size: int, tokens: float) -> bool:
        texts += self._texts
        size += self._size
        if texts > self._source.provider.limits.max_batch or self._tokens + tokens > self._max_tokens:
            return False
        batches = self._source.batches
        return not batches.has_limit or batches.get_test()(texts, size)


class _Window:
    """Chunks that wait for each other."""

    def __init__(self, route: Route, port: Port, requests: ProviderRequests, in_flight: InFlight) -> None:
        self.parts: deque[_Part] = deque()
        self.load = _Load(route.source)
        """What the chunks fill. Threads that join at the same moment may count wrongly, so it is only a hint."""
        self.is_sealed = False
        """Whether no more chunks may join."""
        self._route = route
        self._port = port
        self._in_flight = in_flight
        self._requests = requests
        self._has_begun = False
        self._wake: Future[None] = Future()

    def seal(self) -> None:
        """Let no more chunks join, and send the request."""
        self.is_sealed = True
        if self._port.windows.get(self._route) is self:
            self._port.windows.pop(self._route, None)
        with suppress(InvalidStateError):  # another thread has sealed the window too
            self._wake.set_result(None)

    def withdraw(self, part: _Part) -> bool:
        """Take a chunk out of the window. Return False if the window is working on it already."""
        try:
            self.parts.remove(part)
        except ValueError:
            return False
        return True

    def keep_or_withdraw(self, part: _Part) -> bool:
        """Return True if the window has begun. Otherwise take the chunk out, and return whether that was too late.

        Ctrl-C may have ended the call that would have started the window. Or there are not enough threads.
        """
        if self._has_begun:
            return True
        self.seal()
        return not self.withdraw(part)

    async def run(self) -> None:
        """Wait until the time is over or the window is full. Then make the requests."""
        self._has_begun = True
        parts: list[_Part] = []
        try:
            try:
                await self._port.wait(self._wake, self._route.source.coalesce)
            finally:
                self.seal()
                while self.parts:
                    parts.append(self.parts.popleft())
            groups = self._group(parts)
            for group in groups:
                if len(group) == 1:
                    group[0].finish()
            jobs = [partial(self._request_group, group) for group in groups if len(group) > 1]
            await self._port.run_all(jobs, len(jobs))
        finally:
            for part in parts:
                part.finish()

    def _group(self, parts: Iterable[_Part]) -> list[list[_Part]]:
        """Return chunks in groups, each of which fits into one request."""
        groups: list[list[_Part]] = []
        load = _Load(self._route.source)
        for part in parts:
            if groups and load.accepts(part):
                groups[-1].append(part)
            else:
                groups.append([part])
                load = _Load(self._route.source)
            load.add(part)
        return groups

    async def _request_group(self, parts: list[_Part]) -> None:
        """Send the texts of several chunks together, and give each chunk its own entries and errors."""
        # The provider's code may use a cache. It must not wait there for a call that waits for this request.
        calls_in_provider.set(frozenset[int]().union(*(part.outer_calls for part in parts)))
        for part in parts:
            part.is_sent = True
        texts = {key: text for part in parts for key, text in part.texts.items()}
        owners = {key: part for part in parts for key in part.texts}
        answer = Answer(self._route, list(texts), list(texts.values()), store=False)
        answer.failed_tiers.update(*(part.failed_tiers for part in parts))

        def assign_waste() -> None:
            """Give each chunk what was wasted for its texts since the last call."""
            for key, work in answer.waste:
                owners[key].waste.append((key, work))
            answer.waste.clear()

        async def take(entries: dict[str, Entry], invalid: Mapping[str, Exception]) -> None:
            assign_waste()
            for key, entry in entries.items():
                owners[key].entries[key] = entry
            for key, error in invalid.items():
                owners[key].invalid[key] = error
            for part in {owners[key] for key in (*entries, *invalid)}:
                if not part.list_open():
                    part.finish(answer.sum_seconds()[PROVIDER])

        with self._in_flight.new_ticket() as ticket:
            self._in_flight.claim(ticket, (), self._port.loop, Claims())  # the request waits for no flight
            call = Call(self._port, ticket, answer)
            alone, together = await self._send(call, texts, take, is_divisible=not any(p.is_asked_for for p in parts))
        assign_waste()
        copies: dict[tuple[int, int], Exception] = {}

        def copy_for(part: _Part, error: Exception) -> Exception:
            """Return the copy of an error that all texts of one chunk share."""
            place = id(part), id(error)
            if place not in copies:
                copies[place] = copy_error(error)
                copies[place].__cause__ = error.__cause__
                copies[place].__traceback__ = error.__traceback__
            return copies[place]

        for key, error in alone.items():
            owners[key].alone[key] = copy_for(owners[key], error)
        for key, error in together.items():
            if is_about_provider(error):  # otherwise, the texts of one call may be the reason, so each call tries alone
                owners[key].together[key] = copy_for(owners[key], error)
        seconds = answer.sum_seconds().get(PROVIDER, 0.0)
        for part in parts:
            part.finish(seconds)

    async def _send(
        self, call: Call, texts: Mapping[str, str], take: Take, *, is_divisible: bool
    ) -> tuple[Errors, Errors]:
        """Send texts together. If they fail, send them in parts if they are divisible; else each call does that.

        Return what :meth:`ProviderRequests.request_chunk` returns.
        """
        keys = list(texts)
        if is_divisible:
            return await self._requests.request_chunk(call, keys, texts, take, Patience(len(keys)))
        error = await self._requests.request_once(call, keys, texts, take, [], repeats_failures=False)
        if error is not None:
            return {}, dict.fromkeys(keys, error)
        batches = self._route.source.batches
        if batches.is_in_doubt:
            batches.note_success(list(texts.values()))
        return {}, {}
