"""One importer of a running chain: its calls with their deadline, its breaker, its counters and its verification."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from hashlib import blake2b
from operator import index
from typing import Any, Literal

from embedonce.answers import ImporterCheck
from embedonce.contracts import LOOKUP_BATCH, AnyProvider, FoundVectors
from embedonce.errors import EmbedonceError, ImportRefused, LoopBusy, ProviderError, TierBusy
from embedonce.events import Event, Imported, ImporterChanged, ImporterStats, Verification
from embedonce.vectors import Dtype, Vector

from .breaker import Breaker
from .checks import check_rows
from .flights import calls_in_provider
from .import_checks import check_source
from .imports import Import
from .ports import Port
from .repeated_warnings import RepeatedWarnings
from .routes import Route, describe_space
from .scan_index import IndexNotReady, ScanIndex
from .source_calls import call_source, is_running, name_cause
from .verifying import find_difference
from .workers import Workers

log = logging.getLogger("embedonce")

MAX_SPACES = 256
"""Maximum number of vector spaces whose verification an importer remembers."""
MAX_CALLS = 8
"""Maximum number of calls to one importer that run in threads at the same time."""
CHECK_SECONDS = 30.0
"""Timeout of a check of the source."""
MAX_DETAIL = 500
"""Maximum number of characters of an error's message that are kept."""
MAX_PROBE_TEXTS = 64
"""Maximum number of texts in a probe."""


_FROM_BEST_TO_WORST: Sequence[Verification] = ("off", "verified", "unverified", "refused")


class SpaceOfImporter:
    """What is known about the vectors of an importer in one vector space."""

    def __init__(self, verification: Verification) -> None:
        self.verification: Verification = verification
        self.has_read_record = False
        """Whether the tiers were asked for the result of an earlier verification."""
        self.compared: dict[str, tuple[Vector, Vector]] = {}
        """The found and the computed vector of each text that this process has compared so far, by key."""
        self.compared_before = 0
        """Number of texts that earlier processes have compared, or that were compared in all once the result is clear.
        All of them had equal vectors."""
        self.dimensions: int | None = None
        """Dimensions of the vectors that were compared; None if the importer is not verified."""
        self.samples: dict[object, tuple[int, threading.Thread]] = {}
        """Numbers of texts that calls are computing to compare them, and the threads of these calls, by sample."""
        self.ended: Future[None] = Future()
        """Is set when no call is computing a sample any more, or when the result is clear."""


class LiveImporter:
    """An importer of a running chain.

    ``provider`` is the provider whose vectors it finds. None means every provider that is used with this chain, because
    the chain was opened for its tiers alone. Each of their vector spaces is verified separately.
    """

    def __init__(
        self,
        one: Import,
        name: str,
        *,
        provider: AnyProvider | None,
        namespace: str,
        dtype: Dtype,
        emit: Callable[[Event], None],
    ) -> None:
        self.name = name
        self.importer: Any = one.importer
        self.task = one.task
        self.verify = one.verify
        self.source = one.importer.source
        self._origin = None if provider is None else describe_space(provider, one.task).fingerprint()
        self._namespace = namespace
        self._timeout = one.timeout
        self._dtype: Dtype = dtype
        self._emit = emit
        self._warnings = RepeatedWarnings()
        self._index: ScanIndex | None = None if hasattr(self.importer, "lookup") else ScanIndex(self.importer)
        self._spaces: dict[bytes, SpaceOfImporter] = {}
        self._counts: Counter[str] = Counter()
        self._causes: Counter[str] = Counter()
        self._seconds = 0.0
        self._last_cause: str | None = None
        self.reset()

    def reset(self) -> None:
        """Start over in a forked child."""
        self._lock = threading.RLock()  # re-entrant, because a signal handler may use the cache
        self._warnings.renew_lock()
        self._workers = Workers(MAX_CALLS)
        self._breaker = Breaker(self._note_change)
        for space in self._spaces.values():
            space.samples, space.ended = {}, Future()
        if self._index is not None:
            self._index.reset()

    def find_space(self, route: Route) -> SpaceOfImporter | None:
        """Return the state of the importer in the space of a route, or None if its vectors do not belong there."""
        if route.generation or route.source.fallback or route.policy.namespace != self._namespace:
            return None
        if self._origin is not None and route.origin != self._origin:
            return None
        if is_running(self.importer):  # the importer itself uses the cache
            return None
        with self._lock:
            space = self._spaces.get(route.origin)
            if space is None and self._origin is None and not self._is_task_of(route):
                return None
            if space is None:
                space = self._spaces[route.origin] = SpaceOfImporter(self._begin_space(route))
                if len(self._spaces) > MAX_SPACES:
                    del self._spaces[next(iter(self._spaces))]
            return space

    def _is_task_of(self, route: Route) -> bool:
        try:
            return describe_space(route.source.provider, self.task).fingerprint() == route.origin
        except Exception:  # noqa: BLE001  (the provider does not know the task)
            return False

    def _begin_space(self, route: Route) -> Verification:
        """Return the first state of the importer in a space. Hold the lock."""
        try:
            check_source(self.source, route.source.provider, self.task)
        except ImportRefused as error:
            log.warning("importer %r: %s", self.name, error)
            return "refused"
        if self.verify:
            return "unverified"
        if self._spaces:
            log.warning(
                "importer %r: nothing is imported for model %r, because verify = 0 trusts the source for one vector "
                "space only, and the first one was another; set verify above 0",
                self.name,
                route.space.model,
            )
            return "refused"
        return "off"

    def close(self) -> None:
        if self._index is not None:
            self._index.close()
        self.importer.close()

    # --- finding ------------------------------------------------------------------------------

    async def find(
        self, port: Port, texts: Mapping[str, str], route: Route, dimensions: int | None
    ) -> dict[str, Vector]:
        """Return the vectors that the source has for some texts, by key. ``texts`` has the normalised texts by key.

        The vectors are float32, of shape (d,), and not rounded. Texts whose vector is invalid are left out and counted.
        A source that fails or hangs has no vectors.
        """
        keys = {text: key for key, text in texts.items()}
        found: dict[str, Vector] = {}
        ordered = list(keys)
        for start in range(0, len(ordered), LOOKUP_BATCH):
            found |= await self._find_batch(port, ordered[start : start + LOOKUP_BATCH], route, dimensions)
        return {keys[text]: row for text, row in found.items()}

    async def _find_batch(
        self, port: Port, texts: Sequence[str], route: Route, dimensions: int | None
    ) -> dict[str, Vector]:
        admitted = self._breaker.admit()
        if admitted != "go":
            if admitted == "probe":
                self._probe(texts[:MAX_PROBE_TEXTS])
            self._count(route, skipped=len(texts))
            return {}
        start = time.perf_counter()
        try:
            answer = await port.call(
                partial(self._look_up, texts), self._timeout, self._workers, inline=False, quick=False
            )
            found, invalid = self._read_answer(answer, texts, dimensions)
        except IndexNotReady:
            self._count(route, skipped=len(texts), seconds=time.perf_counter() - start)
            return {}
        except Exception as error:  # noqa: BLE001  (an importer may raise anything)
            cause = self._note_failure(error)
            self._count(route, errors=len(texts), cause=cause, seconds=time.perf_counter() - start)
            return {}
        self._breaker.record_success()
        missing = len(texts) - len(found) - invalid
        self._count(route, found=len(found), missing=missing, invalid=invalid, seconds=time.perf_counter() - start)
        return found

    def _look_up(self, texts: Sequence[str]) -> Any:
        """Ask the importer for some texts.

        Raises:
            IndexNotReady: the source is still being read.
            Exception: the importer has failed.
        """
        if self._index is not None:
            return self._index.lookup(texts)
        return call_source(self.importer, partial(self.importer.lookup, texts))

    def _read_answer(self, answer: Any, texts: Sequence[str], dimensions: int | None) -> tuple[dict[str, Vector], int]:
        """Return the valid vectors by text, and the number of values that are unreadable or invalid.

        Raises:
            ProviderError: the answer has not exactly one row per text.
        """
        if not isinstance(answer, FoundVectors):
            raise ProviderError(f"importer {self.name!r} returned {type(answer).__name__}; expected FoundVectors")
        unreadable = max(0, sum(map(index, answer.unreadable.values())))
        number = len(answer.texts)
        if not number:
            return {}, min(unreadable, len(texts))
        who = f"importer {self.name!r} returned"
        if len(answer.vectors) != number:
            raise ProviderError(f"{who} {len(answer.vectors):,} vectors for {number:,} texts")
        try:
            rows, bad = check_rows(answer.vectors, number, dimensions=dimensions, dtype="float32", who=who)
        except ProviderError as error:
            self._warnings.warn("invalid", "%s", error)
            return {}, min(number + unreadable, len(texts))
        asked = set(texts)
        good = [text for i, text in enumerate(answer.texts) if i not in bad]
        found = {text: row for text, row in zip(good, rows, strict=True) if text in asked}
        repeated = len(good) - len(set(good))
        if repeated:  # nothing tells which of a text's vectors is right
            once = Counter(good)
            found = {text: row for text, row in found.items() if once[text] == 1}
        return found, min(len(bad) + repeated + unreadable, len(texts) - len(found))

    def _probe(self, texts: Sequence[str]) -> None:
        """Ask for some texts in the background, and report the result to the breaker."""

        def probe() -> None:
            try:
                self._look_up(texts)
            except IndexNotReady:
                pass
            except Exception as error:  # noqa: BLE001  (the breaker gets every failure)
                self._note_failure(error)
            else:
                self._breaker.record_success()

        try:
            self._workers.submit(probe)
        except RuntimeError:  # the interpreter is shutting down
            return

    async def check(self, port: Port) -> ImporterCheck:
        """Return whether the importer can read its source."""
        start = time.perf_counter()
        detail = ""
        try:
            await port.call(
                partial(call_source, self.importer, self.importer.check),
                CHECK_SECONDS,
                self._workers,
                inline=False,
                quick=False,
            )
        except TimeoutError:
            detail = f"no answer within {CHECK_SECONDS:.0f} s"
        except Exception as error:  # noqa: BLE001  (an importer may raise anything)
            said = " ".join(str(error).split())[:MAX_DETAIL]
            is_ours = isinstance(error, EmbedonceError) and bool(said)
            detail = said if is_ours else ": ".join(filter(None, (type(error).__name__, said)))
        seconds = time.perf_counter() - start
        return ImporterCheck(self.name, self.source.name, not detail, seconds, self.summarize_verification(), detail)

    # --- failures and counts ------------------------------------------------------------------

    def _note_failure(self, error: Exception) -> str:
        """Report a failed call to the breaker, and return the cause of the failure."""
        if isinstance(error, LoopBusy) and not self._breaker.record_busy_loop(error.started):
            return "busy_loop"
        cause = name_cause(error)
        if not isinstance(error, TierBusy):
            self._breaker.record_failure(cause)
        return cause

    def _note_change(self, state: Literal["open", "closed"], cause: str | None) -> None:
        if state == "open":
            log.warning(
                "importer %r is failing (%s); skipping it until a probe succeeds. `embedonce check` shows the reason",
                self.name,
                cause,
            )
        else:
            log.warning("importer %r works again", self.name)
        self._emit(ImporterChanged(importer=self.name, state=state, cause=cause))

    def _count(self, route: Route, *, seconds: float = 0.0, cause: str | None = None, **counts: int) -> None:
        with self._lock:
            for name, number in counts.items():
                self._counts[name] += number
            if cause is not None:
                self._causes[cause] += counts["errors"]
                self._last_cause = cause
            self._seconds += seconds
        event = Imported(
            importer=self.name, task=route.task, scope=route.keyer.scope, seconds=seconds, cause=cause, **counts
        )
        self._emit(event)

    def count_imported(self, number: int) -> None:
        """Count texts whose vector a call got from this importer."""
        with self._lock:
            self._counts["imported"] += number

    def count_invalid(self, number: int) -> None:
        """Count texts whose vectors were found, but do not fit the vector space."""
        with self._lock:
            self._counts["found"] -= number
            self._counts["invalid"] += number

    def stats(self) -> ImporterStats:
        with self._lock:
            names = ("imported", "found", "missing", "invalid", "errors", "skipped")
            return ImporterStats(
                **{name: self._counts[name] for name in names},
                seconds=self._seconds,
                causes=dict(self._causes),
                verification=self.summarize_verification(),
                is_skipped=self._breaker.is_open,
                last_cause=self._last_cause,
            )

    def summarize_verification(self) -> Verification:
        """Return the best result in any vector space."""
        states: dict[Verification, None] = {space.verification: None for space in list(self._spaces.values())}
        best: Verification = "unverified" if self.verify else "off"
        for state in _FROM_BEST_TO_WORST:
            if state in states:
                return state
        return best

    # --- verification -------------------------------------------------------------------------

    def hash_source(self) -> str:
        """Return the name under which the result of the verification is kept, as 32 hex digits.

        It depends on the dtype of the cache, because lost precision matters only if the cache keeps it.
        """
        name = f"{self.task}\n{self._dtype}\n{self.source.name}"
        return blake2b(name.encode(errors="replace"), digest_size=16).hexdigest()

    def take_result(self, space: SpaceOfImporter, *, is_equal: bool, compared: int, dimensions: int) -> None:
        """Take over the result of an earlier verification, or how far it has come.

        A refusal counts only if as many texts were to be compared as now.
        """
        with self._lock:
            if space.verification != "unverified":
                return
            if is_equal:
                space.compared_before, space.dimensions = max(0, compared), dimensions
                if compared >= self.verify:
                    space.verification = "verified"
                return
            if compared < self.verify:
                return
            space.verification = "refused"
        log.warning(
            "importer %r: nothing is imported from %s, because a verification less than a day ago has found that its "
            "vectors are not those of the provider; to verify it again now, set verify to a larger number",
            self.name,
            self.source.name,
        )

    def count_compared(self, space: SpaceOfImporter) -> int:
        """Return how many texts were compared. For a refusal, this is the number that was to be compared."""
        with self._lock:
            return self.verify if space.verification == "refused" else space.compared_before + len(space.compared)

    def begin_sample(self, space: SpaceOfImporter, sample: object, found: int) -> int:
        """Return how many of the found texts a call has to compare, besides those that other calls are computing.

        The call must end the sample with :meth:`end_sample`.
        """
        with self._lock:
            missing = self.verify - self.count_compared(space) - sum(size for size, _ in space.samples.values())
            size = min(max(0, missing), found)
            if size:
                space.samples[sample] = size, threading.current_thread()
            return size

    def end_sample(self, space: SpaceOfImporter, sample: object) -> None:
        """End a sample, if it has not ended yet, and wake the calls that wait for the result."""
        with self._lock:
            space.samples.pop(sample, None)
            if space.samples and space.verification == "unverified":
                return
            ended, space.ended = space.ended, Future()
        ended.set_result(None)

    async def wait_for_samples(self, port: Port, space: SpaceOfImporter) -> None:
        """Wait until other calls have compared their samples, but not longer than for a call to the importer."""
        with self._lock:
            ended = space.ended
            if not space.samples or space.verification != "unverified":
                return
            # Do not wait for a call that waits for this one: that of the provider, or one on this thread's event loop.
            is_own = port.loop is None and any(one is threading.current_thread() for _, one in space.samples.values())
        if is_own or calls_in_provider.get():
            return
        if not await port.wait(ended, self._timeout):
            with self._lock:
                space.samples.clear()  # the next calls take samples of their own

    def compare(self, space: SpaceOfImporter, pairs: Mapping[str, tuple[Vector, Vector]]) -> bool:
        """Compare found vectors with computed vectors, by key. Return whether this call has made the result clear."""
        with self._lock:
            if space.verification != "unverified":
                return False
            space.compared |= pairs
            found, computed = zip(*space.compared.values(), strict=True)
            space.dimensions = computed[0].size
            difference = find_difference(found, computed, self._dtype)
            if difference is not None:
                space.verification = "refused"
            elif self.count_compared(space) >= self.verify:
                space.compared_before = self.count_compared(space)
                space.verification = "verified"
            else:
                return False
            space.compared = {}
        if difference is not None:
            log.warning(
                "importer %r: nothing is imported from %s, because its vectors are not those of the provider: %s",
                self.name,
                self.source.name,
                difference,
            )
        return True
