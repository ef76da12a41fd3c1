"""The conformance kit finds bugs: every standard test catches a plugin here that is broken in one way."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from contract_runs import Rendezvous, is_failing
from embedonce_nodes import TwoNodesBackend
from embedonce_odd import HashingProvider, words_as_a_set
from embedonce_shelf import (
    AddsUnderALockShelfBackend,
    HashingShelfBackend,
    ListsWhatIsUnfinishedShelfBackend,
    MovesToANewFolderShelfBackend,
    OneConnectionShelfBackend,
    OneFileShelfBackend,
    ShelfBackend,
    WritesAtItsEndShelfBackend,
    WritesInPlaceShelfBackend,
)
from embedonce_single import CommitsRarelyBackend, ForgetsWhenClosedBackend, KeepsItsLockBackend, SingleBackend
from embedonce_wire import EndsTheConnectionOfItsChild, Server, SharesItsConnectionAfterAFork, WireBackend

from embedonce.contracts import Capabilities, Embedded, Limits, StoredSize, time_left
from embedonce.errors import PartialAnswer, TextRefused
from embedonce.testing import (
    BackendContract,
    CountingProvider,
    DictBackend,
    ManualClock,
    NormalizerContract,
    ProviderContract,
    Recipe,
)
from embedonce.testing.contracts.support import CALL_TIMEOUT

# --- broken backends --------------------------------------------------------------------------


class DeclaresInADict(DictBackend):
    """Declares its capabilities as a plain dict."""

    def __init__(self) -> None:
        super().__init__()
        self.capabilities = {"holds": "frames"}


class CountsNothing(DictBackend):
    """Declares `count` but has no such method."""

    count = None


class FailsOnNothing(DictBackend):
    """Sends `IN ()` to its database when it gets no keys."""

    def get_many(self, keys):
        if not keys:
            raise ValueError("syntax error near IN ()")
        return super().get_many(keys)


class AnswersInAForkedChild(DictBackend):
    """Declares that it does not work in a forked child, but answers there."""

    def __init__(self) -> None:
        super().__init__()
        self.capabilities = replace(self.capabilities, fork=False)


class StoresText(DictBackend):
    """Returns hexadecimal text instead of the bytes that were stored."""

    def get_many(self, keys):
        return {key: value.hex() for key, value in super().get_many(keys).items()}


class NoneForMiss(DictBackend):
    """Returns None for a miss."""

    def get_many(self, keys):
        return dict.fromkeys(keys) | super().get_many(keys)


class ShiftsByDuplicates(DictBackend):
    """Matches replies to keys by position, so that a duplicate key shifts the rest."""

    def get_many(self, keys):
        found = super().get_many(keys)
        replies = [found.get(key) for key in dict.fromkeys(keys)]
        return {key: value for key, value in zip(keys, replies, strict=False) if value is not None}


class TellsEverything(DictBackend):
    """Returns every key that it holds, not only the requested ones."""

    def get_many(self, keys):
        return super().get_many(list(self._store))


class WantsLists(DictBackend):
    """Calls `keys.copy()`, which only lists have."""

    def get_many(self, keys):
        return super().get_many(keys.copy())


class LosesAboveFiveHundred(DictBackend):
    """Does not declare that its store takes only 500 keys per call."""

    def get_many(self, keys):
        return super().get_many(keys[:500])


class CutsTheBatch(DictBackend):
    """Silently answers only the first 100 keys of a larger batch."""

    def __init__(self):
        super().__init__(max_batch=100)

    def get_many(self, keys):
        return super().get_many(keys[:100])


class CutsKeys(DictBackend):
    """Truncates keys, as a column of 100 characters does."""

    def get_many(self, keys):
        found = super().get_many([key[:100] for key in keys])
        return {key: found[key[:100]] for key in keys if key[:100] in found}

    def set_many(self, items, ttl):
        super().set_many({key[:100]: value for key, value in items.items()}, ttl)


class KeepsTheFirst(DictBackend):
    """Keeps the first value of a key instead of the last."""

    def set_many(self, items, ttl):
        self.add_many(items, ttl)


class StripsValues(DictBackend):
    """Strips NUL bytes from the end of values."""

    def set_many(self, items, ttl):
        super().set_many({key: value.rstrip(b"\0") for key, value in items.items()}, ttl)


class ThinksEmptyIsAbsent(DictBackend):
    """Drops empty values: `if value` instead of `if value is not None`."""

    def get_many(self, keys):
        return {key: value for key, value in super().get_many(keys).items() if value}


class DoesNotHoldItsLargest(DictBackend):
    """Declares a `max_value_bytes` that is one byte too large."""

    def __init__(self):
        super().__init__(max_value_bytes=1000)

    def set_many(self, items, ttl):
        super().set_many({key: value for key, value in items.items() if len(value) < 1000}, ttl)


class CutsValues(DictBackend):
    """Truncates values above `max_value_bytes`."""

    def __init__(self):
        super().__init__(max_value_bytes=1000)

    def set_many(self, items, ttl):
        super().set_many({key: value[:1000] for key, value in items.items()}, ttl)


class KeepsNoCosts(DictBackend):
    """Has no columns for the tokens and the seconds of an entry."""

    def __init__(self):
        super().__init__(holds="entries")

    def set_many(self, items, ttl):
        super().set_many({key: entry._replace(tokens=None, seconds=None) for key, entry in items.items()}, ttl)


class KeepsTokensAsFloats(DictBackend):
    """Keeps tokens in a column of floats, and returns them as floats."""

    def __init__(self):
        super().__init__(holds="entries")

    def get_many(self, keys):
        found = super().get_many(keys).items()
        return {key: entry._replace(tokens=entry.tokens and float(entry.tokens)) for key, entry in found}


class HasNoUnknownCosts(DictBackend):
    """Returns 0 for tokens and seconds that are unknown."""

    def __init__(self):
        super().__init__(holds="entries")

    def get_many(self, keys):
        found = super().get_many(keys).items()
        return {key: entry._replace(tokens=entry.tokens or 0, seconds=entry.seconds or 0.0) for key, entry in found}


class HasNoFreeTexts(DictBackend):
    """Takes a cost of 0 for an unknown cost."""

    def __init__(self):
        super().__init__(holds="entries")

    def get_many(self, keys):
        found = super().get_many(keys).items()
        return {key: entry._replace(tokens=entry.tokens or None, seconds=entry.seconds or None) for key, entry in found}


class CountsTokensInFourBytes(DictBackend):
    """Keeps tokens in a column of 32 bits."""

    def __init__(self):
        super().__init__(holds="entries")

    def set_many(self, items, ttl):
        items = {key: entry._replace(tokens=entry.tokens and entry.tokens % 2**32) for key, entry in items.items()}
        super().set_many(items, ttl)


class HoldsNoCards(DictBackend):
    """Drops entries with an empty vector, such as space cards."""

    def __init__(self):
        super().__init__(holds="entries")

    def set_many(self, items, ttl):
        super().set_many({key: entry for key, entry in items.items() if entry.vector.size}, ttl)


class WritesLater(DictBackend):
    """Keeps the mapping that it was given, and reads it only in the next `get_many`."""

    later = ({}, None)

    def set_many(self, items, ttl):
        self.later = (items, ttl)

    def get_many(self, keys):
        super().set_many(*self.later)
        return super().get_many(keys)


class EmptiesItsInput(DictBackend):
    """Mutates its input: removes the items from the mapping that it was given."""

    def set_many(self, items, ttl):
        while items:
            super().set_many(dict([items.popitem()]), ttl)


class HandsOutItself(DictBackend):
    """Returns its own dict, which the caller may change."""

    def __init__(self):
        super().__init__()
        self.held = {}

    def set_many(self, items, ttl):
        self.held.update(items)

    def get_many(self, keys):
        return self.held


class HandsOutItsArrays(DictBackend):
    """Returns the writable arrays that it stores."""

    def __init__(self):
        super().__init__(holds="entries")

    def set_many(self, items, ttl):
        items = {key: entry._replace(vector=np.array(entry.vector)) for key, entry in items.items()}
        super().set_many(items, ttl)


class GetRaises(DictBackend):
    """Raises in `get` for a missing key."""

    def get(self, key):
        return self._store[key][0]


class DeletesTooMuch(DictBackend):
    """Deletes the whole scope of a key."""

    def delete_many(self, keys):
        self._store.clear()


class DeletesTheFirstHundred(DictBackend):
    """Deletes only the first 100 keys of a batch, the limit of one request to its store."""

    def delete_many(self, keys):
        super().delete_many(list(keys)[:100])


class ListsTheFirstThousand(DictBackend):
    """Lists 1,000 keys, and never requests the next page from its store."""

    def scan(self, prefix):
        return sorted(super().scan(prefix))[:1000]


class ListsTwice(DictBackend):
    """Lists the last key of a page again as the first key of the next page."""

    def scan(self, prefix):
        keys = sorted(super().scan(prefix))
        for start in range(0, len(keys), 9):
            yield from keys[start : start + 10]


class DeleteRaises(DictBackend):
    """Raises when it deletes a missing key."""

    def delete_many(self, keys):
        for key in keys:
            del self._store[key]


class Buries(DictBackend):
    """Never stores a deleted key again."""

    def delete_many(self, keys):
        super().delete_many(keys)
        self.buried = set(keys)

    def get_many(self, keys):
        return super().get_many([key for key in keys if key not in getattr(self, "buried", ())])


class ScansByPattern(DictBackend):
    """Uses a prefix as a regular expression, in which a dot matches any character."""

    def scan(self, prefix):
        return [key for key in self._store if re.match(prefix, key)]


class ScansALiveDict(DictBackend):
    """Iterates over a dict that changes during the scan."""

    def scan(self, prefix):
        for key in self._store:
            if key.startswith(prefix):
                yield key


class CountsEverything(DictBackend):
    """Counts all keys, whatever the prefix."""

    def count(self, prefix):
        return len(self._store)


class Measures(DictBackend):
    """Has a right `measure`."""

    def measure(self, prefix):
        sizes = [len(value) for key, (value, _) in self._store.items() if key.startswith(prefix)]
        date = 1_700_000_000.0 if sizes else None
        return StoredSize(bytes=sum(sizes), oldest=date, newest=date)


class MeasuresEverything(Measures):
    """Measures the whole store, whatever the prefix."""

    def measure(self, prefix):
        return super().measure("")


class MeasuresInMilliseconds(Measures):
    """Returns the dates of `measure` in milliseconds."""

    def measure(self, prefix):
        size = super().measure(prefix)
        return replace(size, newest=size.newest and size.newest * 1000)


class MeasuresBackwards(Measures):
    """Takes the newest date for the oldest."""

    def measure(self, prefix):
        size = super().measure(prefix)
        return replace(size, oldest=size.newest and size.newest + 1)


class MeasuresPerEntry(Measures):
    """Returns the size of one value instead of the size of all values."""

    def measure(self, prefix):
        size = super().measure(prefix)
        return replace(size, bytes=size.bytes and 64)


class MeasuresInADict(Measures):
    """Returns a dict from `measure`."""

    def measure(self, prefix):
        return {"bytes": super().measure(prefix).bytes}


class Compacts(DictBackend):
    """Has a right `compact`."""

    def compact(self):
        return f"{len(self._store)} entries, nothing to give back"


class DropsTheDictThatIsEmpty(Compacts):
    """Drops its table in `compact` if the table is empty, and never makes the table again."""

    def compact(self):
        if not self._store:
            self._store = None
        return "0 bytes"


class CompactsOnlyTheFirstPage(Compacts):
    """Copies the first 100 entries in `compact`, which is one page of its store."""

    def compact(self):
        self._store = dict(list(self._store.items())[:100])
        return super().compact()


class RestoresOldValues(Compacts):
    """Keeps old versions of each value, and keeps the first instead of the last version in `compact`."""

    def __init__(self):
        super().__init__()
        self.first = {}

    def set_many(self, items, ttl):
        super().set_many(items, ttl)
        self.first = {key: self._store[key] for key in items} | self.first

    def compact(self):
        for key in self._store:
            self._store[key] = self.first[key]
        return super().compact()


class BringsBackWhatWasDeleted(RestoresOldValues):
    """Brings deleted entries back in `compact`."""

    def compact(self):
        self._store.update({key: value for key, value in self.first.items() if key not in self._store})
        return "nothing to give back"


class CompactsOnce(Compacts):
    """Raises in `compact` if there is nothing to give back since the last call."""

    done = False

    def compact(self):
        if self.done:
            raise RuntimeError("nothing to compact")
        self.done = True
        return super().compact()


class CompactsSilently(Compacts):
    """Returns None from `compact`."""

    def compact(self):
        super().compact()


class CompactsInBytes(Compacts):
    """Returns a number from `compact`."""

    def compact(self):
        return len(self._store)


class CompactsWithoutALock(Compacts):
    """Copies its entries in `compact`, and loses what other threads store meanwhile."""

    def __init__(self):
        super().__init__()
        self.wrote = threading.Event()

    def set_many(self, items, ttl):
        super().set_many(items, ttl)
        self.wrote.set()

    def compact(self):
        copy = dict(self._store)
        self.wrote.clear()
        self.wrote.wait(CALL_TIMEOUT)
        self._store = copy
        return super().compact()


class AddsOver(DictBackend):
    """Replaces existing values in `add_many`."""

    def add_many(self, items, ttl):
        self.set_many(items, ttl)
        return set(items)


class AddsInTwoSteps(DictBackend):
    """Looks up which keys are absent, and stores them in a second step."""

    def __init__(self):
        super().__init__()
        self.rendezvous = Rendezvous()

    def add_many(self, items, ttl):
        absent = {key: value for key, value in items.items() if key not in self._store}
        self.rendezvous()
        self.set_many(absent, ttl)
        return set(absent)


class ReadsLongTtlsAsDates(DictBackend):
    """Interprets a TTL above 30 days as a date, as memcached does."""

    def set_many(self, items, ttl):
        super().set_many(items, ttl if ttl is None or ttl <= 30 * 86_400 else ttl - self.clock())


class NeverExpires(DictBackend):
    """Declares `ttl` but ignores it."""

    def set_many(self, items, ttl):
        super().set_many(items, None)


class KeepsTheFirstTtl(DictBackend):
    """Counts the TTL from the first time that a key was stored."""

    def set_many(self, items, ttl):
        ends = {key: self._store[key][1] for key in items if key in self._store}
        super().set_many(items, ttl)
        for key, end in ends.items():
            self._store[key] = (items[key], end)


class LeasesForEver(DictBackend):
    """Ignores the TTL in `add_many`."""

    def add_many(self, items, ttl):
        return super().add_many(items, None)


class ClosesOnce(DictBackend):
    """Raises when it is closed twice."""

    def close(self):
        if self._closed:
            raise ValueError("closed twice")
        super().close()


class NeverCloses(DictBackend):
    """Continues to work after `close`."""

    def close(self):
        return


class AnswersAfterClose(DictBackend):
    """Answers as if every key were missing after `close`."""

    def get_many(self, keys):
        return {} if self._closed else super().get_many(keys)

    def set_many(self, items, ttl):
        if not self._closed:
            super().set_many(items, ttl)


class OnlyInThisProcess(DictBackend):
    """Declares scope `host`, but keeps its entries in a dict of the process."""

    def __init__(self, **options):
        super().__init__(scope="host", **options)


class OnlyInThisProcessToo(DictBackend):
    """Declares scope `single`, but keeps its entries in a dict of the process."""

    def __init__(self, **options):
        super().__init__(scope="single", **options)


class LosesWhatWasLast(ShelfBackend):
    """Writes each batch only in the next call, and not in `close`."""

    def __init__(self, *, path):
        super().__init__(path=path)
        self.last = ({}, None)

    def set_many(self, items, ttl):
        super().set_many(*self.last)
        self.last = (items, ttl)

    def get_many(self, keys):
        super().set_many(*self.last)
        return super().get_many(keys)


class KeepsACopyInMemory(ShelfBackend):
    """Answers from a copy in memory that misses the writes of other clients."""

    def __init__(self, *, path):
        super().__init__(path=path)
        self.copy = {}

    def set_many(self, items, ttl):
        super().set_many(items, ttl)
        self.copy.update(items)

    def get_many(self, keys):
        return super().get_many(keys) | {key: self.copy[key] for key in keys if key in self.copy}


class ForgetsBetweenThreads(DictBackend):
    """Reads all of its entries, and writes them back together with the new ones."""

    def __init__(self):
        super().__init__()
        self.rendezvous = Rendezvous()

    def set_many(self, items, ttl):
        held = dict(self._store)
        self.rendezvous()
        self._store = held | {key: (value, None) for key, value in items.items()}


class WritesInTwoHalves(DictBackend):
    """Writes a value in two steps, so that a reader can see half of it."""

    def __init__(self):
        super().__init__()
        self.looks = 0

    def get_many(self, keys):
        self.looks += 1
        return super().get_many(keys)

    def set_many(self, items, ttl):
        held = super().get_many(list(items))
        super().set_many({key: value[:32] + held.get(key, value)[32:] for key, value in items.items()}, ttl)
        looks, end = self.looks, time.monotonic() + 0.05
        while self.looks == looks and time.monotonic() < end:  # a reader looks, if there is one
            time.sleep(0.0005)
        super().set_many(items, ttl)


class IgnoresItsDeadline(DictBackend):
    """Declares `deadline` but never calls `time_left()`."""

    def __init__(self):
        super().__init__()
        self.capabilities = replace(self.capabilities, deadline=True)

    def _check_call(self, extra=None, count=0):
        return


class LeavesTheReply(DictBackend):
    """Gives up a call in time, but takes its late reply for the reply to the next call."""

    stalled = False
    unread = None

    def __init__(self):
        super().__init__(deadline=True)

    def get_many(self, keys):
        found = super().get_many(keys)
        if self.stalled:
            self.unread = list(found.values())
            while True:
                time_left()
                time.sleep(0.01)
        if self.unread is not None:
            replies, self.unread = self.unread, list(found.values())
            return dict(zip(keys, replies, strict=False))
        return found


class Twin:
    """A correct async client; the broken ones change one thing."""

    def __init__(self, backend):
        self.backend = backend
        self.closed = False

    async def get_many(self, keys):
        if self.closed:
            raise RuntimeError("closed")
        return self.backend.get_many(keys)

    async def set_many(self, items, ttl):
        self.backend.set_many(items, ttl)

    async def close(self):
        self.closed = True


class TwinWithItsOwnStore(DictBackend):
    """Has an async twin with a store of its own."""

    def __init__(self):
        super().__init__(twin=True)

    def twin(self):
        return Twin(DictBackend())


class OneTwinForAllLoops(DictBackend):
    """Shares one async client between all event loops."""

    def __init__(self):
        super().__init__(twin=True)
        self.only = None

    def twin(self):
        if self.only is None:
            self.only = super().twin()
        return self.only


class TwinWithOnePlaceForKeys(DictBackend):
    """Keeps the keys of an async call in a variable that concurrent calls share."""

    def __init__(self):
        super().__init__(twin=True)

    def twin(self):
        class Shared(Twin):
            async def get_many(self, keys):
                self.keys = keys
                await asyncio.sleep(0)
                return await super().get_many(self.keys)

        return Shared(self)


class TwinThatLeavesTheReply(DictBackend):
    """Leaves the reply of a cancelled async call in the connection, where the next call reads it."""

    def __init__(self):
        super().__init__(twin=True)

    def twin(self):
        class Leaves(Twin):
            unread = None

            async def get_many(self, keys):
                mine = list((await super().get_many(keys)).values())
                try:
                    await asyncio.sleep(0)
                except asyncio.CancelledError:
                    self.unread = mine
                    raise
                replies, self.unread = (mine, None) if self.unread is None else (self.unread, mine)
                return dict(zip(keys, replies, strict=False))

        return Leaves(self)


class TwinWithATimerOfItsOwn(DictBackend):
    """Limits an async call with `asyncio.timeout`, which also ends a call whose reply a busy loop could not read."""

    def __init__(self):
        super().__init__(twin=True)

    def twin(self):
        class Timed(Twin):
            async def get_many(self, keys):
                async with asyncio.timeout(time_left()):
                    for _ in range(3):
                        await asyncio.sleep(0)
                    return await super().get_many(keys)

        return Timed(self)


class TwinThatNeverCloses(DictBackend):
    """Has an async twin that continues to work after `close`."""

    def __init__(self):
        super().__init__(twin=True)

    def twin(self):
        class Open(Twin):
            async def close(self):
                return

        return Open(self)


class CannotAddWhatWasDeleted(DictBackend):
    """Never adds a deleted key again."""

    def __init__(self, **options):
        super().__init__(**options)
        self.deleted = set()

    def delete_many(self, keys):
        super().delete_many(keys)
        self.deleted |= set(keys)

    def add_many(self, items, ttl):
        return super().add_many({key: value for key, value in items.items() if key not in self.deleted}, ttl)


class FoldsCase(DictBackend):
    """Folds the case of keys: stores and lists them in upper case."""

    def set_many(self, items, ttl):
        super().set_many({key.upper(): value for key, value in items.items()}, ttl)

    def get_many(self, keys):
        found = super().get_many([key.upper() for key in keys])
        return {key: found[key.upper()] for key in keys if key.upper() in found}

    def scan(self, prefix):
        return super().scan(prefix.upper())


class LeavesOutWhatIsAway(TwoNodesBackend):
    """Answers as if the keys of a node that is down were missing."""

    def get_many(self, keys):
        return self._store.get_many(self._get_reachable_keys(keys))


class FailsAltogether(TwoNodesBackend):
    """Fails the whole call when one node is down."""

    def get_many(self, keys):
        if self.away:
            raise ConnectionError
        return super().get_many(keys)


class NamesTooFew(TwoNodesBackend):
    """Puts only one of the failed keys into `PartialAnswer.failed`."""

    def _raise_if_lost(self, keys, answer):
        lost = [key for key in keys if self._is_lost(key)]
        if lost:
            raise PartialAnswer("a node is down", answer=answer, failed=lost[:1])
        return answer


class NamesWhatItAnswers(TwoNodesBackend):
    """Puts keys that are in its answer into `PartialAnswer.failed`."""

    def get_many(self, keys):
        try:
            return super().get_many(keys)
        except PartialAnswer as partial:
            failed = [*partial.failed, *list(partial.answer)[:3]]
            raise PartialAnswer("a node is down", answer=partial.answer, failed=failed) from partial.__cause__


class StoresNothingBesideANodeThatIsAway(TwoNodesBackend):
    """Stores nothing on any node when one is down, but reports only the keys of that node as failed."""

    def set_many(self, items, ttl):
        self._raise_if_lost(items, None)
        super().set_many(items, ttl)


class SaysAllIsStored(TwoNodesBackend):
    """Returns normally from a write that did not reach a node that is down."""

    def set_many(self, items, ttl):
        self._store.set_many({key: items[key] for key in self._get_reachable_keys(items)}, ttl)


class ForgetsOnHalfTheNodes(TwoNodesBackend):
    """Returns normally from a deletion that did not reach a node that is down."""

    def delete_many(self, keys):
        self._store.delete_many(self._get_reachable_keys(keys))


class SwallowsErrors(WireBackend):
    """Swallows errors, so that an unreachable server looks empty."""

    def get_many(self, keys):
        try:
            return super().get_many(keys)
        except OSError:
            return {}

    def set_many(self, items, ttl):
        with suppress(OSError):
            super().set_many(items, ttl)


class TakesHalfAReply(WireBackend):
    """Treats a reply that ends early as complete."""

    def get_many(self, keys):
        try:
            return super().get_many(keys)
        except (ConnectionError, ValueError) as error:
            if isinstance(error, ConnectionRefusedError):
                raise
            return {}


class KeepsADeadConnection(WireBackend):
    """Keeps using a connection that has not answered."""

    def _connect(self, timeout):
        return super()._connect(min(timeout, 0.1))

    def _drop(self):
        if self._closed:
            super()._drop()


BROKEN_BACKENDS: list[tuple[str, Callable[[], Any]]] = [
    ("test_capabilities_are_declared_and_stay", DeclaresInADict),
    ("test_declared_extras_are_there", CountsNothing),
    ("test_empty_calls_do_nothing", FailsOnNothing),
    ("test_one_entry_comes_back", StoresText),
    ("test_a_miss_is_absent", NoneForMiss),
    ("test_a_key_asked_twice_comes_once", ShiftsByDuplicates),
    ("test_only_what_was_asked_comes_back", TellsEverything),
    ("test_any_sequence_and_any_mapping_will_do", WantsLists),
    ("test_a_full_batch_comes_back", LosesAboveFiveHundred),
    ("test_one_more_than_a_full_batch_is_right_or_refused", CutsTheBatch),
    ("test_keys_that_look_alike_are_different", CutsKeys),
    ("test_a_later_value_replaces_an_earlier_one", KeepsTheFirst),
    ("test_special_values_come_back_exactly", StripsValues),
    ("test_special_values_come_back_exactly", KeepsNoCosts),
    ("test_special_values_come_back_exactly", KeepsTokensAsFloats),
    ("test_special_values_come_back_exactly", HasNoUnknownCosts),
    ("test_special_values_come_back_exactly", HasNoFreeTexts),
    ("test_special_values_come_back_exactly", CountsTokensInFourBytes),
    ("test_any_value_comes_back_exactly", ThinksEmptyIsAbsent),
    ("test_the_largest_value_fits", DoesNotHoldItsLargest),
    ("test_a_value_too_large_is_whole_or_not_there", CutsValues),
    ("test_a_space_card_comes_back", HoldsNoCards),
    ("test_what_is_handed_in_is_left_alone", WritesLater),
    ("test_what_is_handed_in_is_left_alone", EmptiesItsInput),
    ("test_what_is_handed_out_cannot_change_the_store", HandsOutItself),
    ("test_what_is_handed_out_cannot_change_the_store", HandsOutItsArrays),
    ("test_get_agrees_with_get_many", GetRaises),
    ("test_delete_removes_these_keys_alone", DeletesTooMuch),
    ("test_a_full_batch_is_deleted", DeletesTheFirstHundred),
    ("test_delete_of_what_is_not_there_is_no_error", DeleteRaises),
    ("test_what_was_deleted_can_be_stored_again", Buries),
    ("test_scan_finds_what_starts_with_the_prefix", ScansByPattern),
    ("test_scan_finds_what_starts_with_the_prefix", FoldsCase),
    ("test_scan_finds_what_starts_with_the_prefix", ListsTwice),
    ("test_a_long_scan_leaves_nothing_out", ListsTheFirstThousand),
    ("test_scan_goes_on_while_keys_are_deleted", ScansALiveDict),
    ("test_scan_holds_up_no_writer_and_misses_nothing_that_stays", ScansALiveDict),
    ("test_count_agrees_with_what_is_there", CountsEverything),
    ("test_measure_tells_the_size_of_a_scope", MeasuresEverything),
    ("test_measure_tells_the_size_of_a_scope", MeasuresPerEntry),
    ("test_measure_tells_the_size_of_a_scope", MeasuresInMilliseconds),
    ("test_measure_tells_the_size_of_a_scope", MeasuresBackwards),
    ("test_measure_tells_the_size_of_a_scope", MeasuresInADict),
    ("test_compact_of_an_empty_store_does_no_harm", DropsTheDictThatIsEmpty),
    ("test_compact_of_an_empty_store_does_no_harm", CompactsSilently),
    ("test_compact_of_an_empty_store_does_no_harm", CompactsInBytes),
    ("test_compact_keeps_every_entry", CompactsOnlyTheFirstPage),
    ("test_compact_keeps_every_entry", RestoresOldValues),
    ("test_compact_keeps_every_entry", BringsBackWhatWasDeleted),
    ("test_compact_keeps_every_entry", CompactsOnce),
    ("test_compact_keeps_entries_for_other_clients", MovesToANewFolderShelfBackend),
    ("test_compact_loses_no_entry_of_a_writer", CompactsWithoutALock),
    ("test_add_stores_what_is_absent_alone", AddsOver),
    ("test_an_added_key_has_one_winner", AddsInTwoSteps),
    ("test_an_added_key_has_one_winner_among_processes", AddsUnderALockShelfBackend),
    ("test_any_ttl_is_taken", ReadsLongTtlsAsDates),
    ("test_an_entry_goes_when_its_ttl_ends", NeverExpires),
    ("test_storing_again_sets_the_ttl_again", KeepsTheFirstTtl),
    ("test_an_added_key_is_free_again_when_its_ttl_ends", LeasesForEver),
    ("test_close_twice_does_nothing", ClosesOnce),
    ("test_use_after_close_raises", NeverCloses),
    ("test_use_after_close_raises", AnswersAfterClose),
    ("test_what_was_stored_is_there_when_opened_again", OnlyInThisProcess),
    ("test_what_was_stored_is_there_when_opened_again", LosesWhatWasLast),
    ("test_what_was_stored_is_there_when_opened_again", OnlyInThisProcessToo),
    ("test_what_was_stored_is_there_when_opened_again", ForgetsWhenClosedBackend),
    ("test_what_was_stored_is_there_when_opened_again", KeepsItsLockBackend),
    ("test_two_clients_see_one_store", KeepsACopyInMemory),
    ("test_a_forked_child_uses_the_store", OnlyInThisProcess),
    ("test_a_forked_child_is_refused", AnswersInAForkedChild),
    ("test_a_forked_child_uses_the_store", SharesItsConnectionAfterAFork),
    ("test_a_forked_child_goes_on_without_its_parent", EndsTheConnectionOfItsChild),
    ("test_a_forked_child_goes_on_without_its_parent", OneConnectionShelfBackend),
    ("test_other_processes_use_the_store", HashingShelfBackend),
    ("test_other_processes_use_the_store", OneFileShelfBackend),
    ("test_processes_use_the_store_one_after_another", HashingShelfBackend),
    ("test_processes_use_the_store_one_after_another", ForgetsWhenClosedBackend),
    ("test_processes_use_the_store_one_after_another", KeepsItsLockBackend),
    ("test_a_writer_that_is_killed_leaves_whole_values", CommitsRarelyBackend),
    ("test_a_writer_that_is_killed_leaves_whole_values", WritesInPlaceShelfBackend),
    ("test_a_writer_that_is_killed_leaves_whole_values", WritesAtItsEndShelfBackend),
    ("test_a_writer_that_is_killed_leaves_whole_values", ListsWhatIsUnfinishedShelfBackend),
    ("test_threads_keep_their_values_apart", ForgetsBetweenThreads),
    ("test_threads_that_overwrite_leave_one_whole_value", WritesInTwoHalves),
    ("test_a_call_past_its_deadline_raises", IgnoresItsDeadline),
    ("test_a_store_that_stalls_is_left_by_the_deadline", LeavesTheReply),
    ("test_a_server_that_is_gone_is_an_error_and_no_miss", SwallowsErrors),
    ("test_a_reply_that_ends_early_is_an_error", TakesHalfAReply),
    ("test_a_connection_that_died_silently_is_left_by_the_deadline", KeepsADeadConnection),
    ("test_a_node_that_is_away_takes_its_own_keys_alone", LeavesOutWhatIsAway),
    ("test_a_node_that_is_away_takes_its_own_keys_alone", FailsAltogether),
    ("test_a_node_that_is_away_takes_its_own_keys_alone", NamesTooFew),
    ("test_a_node_that_is_away_takes_its_own_keys_alone", NamesWhatItAnswers),
    ("test_a_node_that_is_away_takes_its_own_keys_alone", StoresNothingBesideANodeThatIsAway),
    ("test_a_node_that_is_away_takes_its_own_keys_alone", SaysAllIsStored),
    ("test_a_node_that_is_away_takes_its_own_keys_alone", ForgetsOnHalfTheNodes),
    ("test_the_twin_shares_the_store", TwinWithItsOwnStore),
    ("test_every_loop_has_its_own_twin", OneTwinForAllLoops),
    ("test_the_twin_answers_many_at_once", TwinWithOnePlaceForKeys),
    ("test_a_cancelled_twin_call_shifts_no_reply", TwinThatLeavesTheReply),
    ("test_a_blocked_loop_is_no_timeout_of_the_twin", TwinWithATimerOfItsOwn),
    ("test_use_of_a_closed_twin_raises", TwinThatNeverCloses),
    ("test_it_behaves_as_a_dict", CannotAddWhatWasDeleted),
]


class BackendContractRun(BackendContract):
    """The contract of a broken backend, with every optional method, so that no test is skipped."""

    def __init__(self, broken: Callable[..., Any], folder: Path) -> None:
        self.broken = broken
        self.folder = folder
        self.clock = ManualClock()
        self.wire = Server() if issubclass(broken, WireBackend) else None

    def make(self) -> Any:
        if self.wire is not None:
            return self.through(None, *self.server())
        if issubclass(self.broken, ShelfBackend | SingleBackend):
            return self.broken(path=self.folder if issubclass(self.broken, SingleBackend) else str(self.folder))
        backend = self.broken()
        backend.clock = self.clock
        return backend

    def reopen(self, backend: Any) -> Any:
        return self.make()

    def recipe(self, backend: Any) -> Recipe:
        return Recipe(self.broken, {"path": str(self.folder)})

    def server(self) -> tuple[str, int]:
        assert self.wire is not None
        return self.wire.server_address

    def through(self, backend: Any, host: str, port: int) -> Any:
        return self.broken(host=host, port=port, store="one")

    def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)

    @contextmanager
    def stall(self, backend: Any) -> Iterator[None]:
        backend.stalled = True
        yield
        backend.stalled = False

    @contextmanager
    def lose_a_node(self, backend: Any) -> Iterator[None]:
        backend.away = True
        yield
        backend.away = False


@pytest.mark.parametrize(("name", "broken"), BROKEN_BACKENDS, ids=lambda value: getattr(value, "__name__", value))
def test_the_backend_contract_catches(name: str, broken: Callable[[], Any], tmp_path: Path) -> None:
    run = BackendContractRun(broken, tmp_path)
    try:
        assert is_failing(getattr(run, name)), f"{name} lets {broken.__name__} pass"
    finally:
        if run.wire is not None:
            run.wire.shutdown()
            run.wire.server_close()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (NamesWhatItAnswers, r"3 keys are both in PartialAnswer\.failed and in PartialAnswer\.answer"),
        (NamesTooFew, r"\d+ keys are neither in PartialAnswer\.failed nor in PartialAnswer\.answer"),
        (StoresNothingBesideANodeThatIsAway, r"\d+ keys were not stored and are not in PartialAnswer\.failed"),
        (SaysAllIsStored, r"a call must raise PartialAnswer while a node is down"),
    ],
)
def test_the_message_says_what_is_wrong_with_a_partial_answer(
    broken: Callable[[], Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(AssertionError, match=message):
        BackendContractRun(broken, tmp_path).test_a_node_that_is_away_takes_its_own_keys_alone()


def test_every_test_of_the_backend_contract_catches_something() -> None:
    own = {"test_no_standard_test_is_replaced"}
    assert {name for name, _ in BROKEN_BACKENDS} | own == set(BackendContract.standard_tests)


# --- broken providers -------------------------------------------------------------------------


class TakesNothing(CountingProvider):
    """Declares a `max_batch` of 0."""

    def __init__(self):
        super().__init__()
        self.limits = Limits(max_batch=0)


class LearnsItsRevision(CountingProvider):
    """Describes a different space after its first call."""

    def space(self, task):
        return replace(super().space(task), revision="main" if not self.calls else "4ac1")


class AnotherSpaceEveryTime(CountingProvider):
    """Puts the identity of the instance into its space."""

    def space(self, task):
        return replace(super().space(task), extra={"instance": id(self)})


class SaysSeven(CountingProvider):
    """Declares a different number of dimensions than its vectors have."""

    def space(self, task):
        return replace(super().space(task), dimensions=7)


class OneSpaceForTwoTasks(CountingProvider):
    """Embeds queries differently from documents, but describes one space for both tasks."""

    def __init__(self):
        super().__init__(symmetric=False)

    def space(self, task):
        return super().space("document")


class Changes(CountingProvider):
    """Changes the matrix of vectors before returning it."""

    def __init__(self, **options):
        super().__init__(**options)
        self.honest = self.embed
        self.embed = self.embed_changed

    def embed_changed(self, texts, task):
        return self.change(np.array(self.honest(texts, task).vectors), texts)

    def change(self, vectors, texts):
        return vectors


class AnswersAHundred(Changes):
    """Returns at most 100 vectors, even for more texts."""

    def change(self, vectors, texts):
        return vectors[:100]


class HalfAnIdea(Changes):
    """Returns NaN."""

    def change(self, vectors, texts):
        vectors[-1, 0] = np.nan
        return vectors


class AllTheSame(Changes):
    """Returns the same vector for all texts."""

    def change(self, vectors, texts):
        vectors[:] = 1.0
        return vectors


class Sorts(Changes):
    """Returns the vectors in a different order."""

    def change(self, vectors, texts):
        return vectors[np.argsort(texts)]


class LooksAtItsNeighbours(Changes):
    """Scales vectors by the size of the batch."""

    def change(self, vectors, texts):
        return vectors / len(vectors)


class KnowsABatchByItsFirst(CountingProvider):
    """Caches batches under their length and first text only."""

    def __init__(self) -> None:
        super().__init__()
        self.answers: dict[Any, Any] = {}

    def _embed(self, texts, task):
        return self.answers.setdefault((task, len(texts), texts[0]), super()._embed(texts, task))


class RefusesByThePart(CountingProvider):
    """Splits a batch into parts of 16, and reports the position of a refused text within its part."""

    def _embed(self, texts, task):
        for start in range(0, len(texts), 16):
            empty = [place for place, text in enumerate(texts[start : start + 16]) if not text]
            if empty:
                raise TextRefused("a text is empty", empty)
        return super()._embed(texts, task)


class DropsDuplicates(Changes):
    """Returns one row for a text that occurs twice."""

    def change(self, vectors, texts):
        return np.unique(vectors, axis=0)


class UsesOneBuffer(Changes):
    """Returns the same buffer from every call."""

    def change(self, vectors, texts):
        if not hasattr(self, "buffer"):
            self.buffer = np.zeros((256, self.dimensions), np.float32)
        self.buffer[: len(vectors)] = vectors
        return self.buffer[: len(vectors)]


class StripsTheList(Changes):
    """Changes the list of texts that it is given."""

    def embed_changed(self, texts, task):
        with suppress(TypeError):
            texts[:] = [text.strip() for text in texts]
        return super().embed_changed(texts, task)


class OwesTokens(Changes):
    """Reports a negative number of tokens."""

    def change(self, vectors, texts):
        return Embedded(vectors, tokens=-1)


class TotalsTokensInAList(Changes):
    """Reports the tokens of the whole call as a list of one number."""

    def change(self, vectors, texts):
        return Embedded(vectors, tokens=[sum(map(len, texts))])


class AveragesTokens(Changes):
    """Reports an average number of tokens per text, which is not a whole number."""

    def change(self, vectors, texts):
        return Embedded(vectors, tokens=[sum(map(len, texts)) / len(texts)] * len(texts))


class OwesTokensForAText(Changes):
    """Reports -1 for a text whose tokens it does not know."""

    def change(self, vectors, texts):
        return Embedded(vectors, tokens=[*map(len, texts[:-1]), -1])


class CountsBytes(Changes):
    """Counts bytes as exact tokens, although its answers report words."""

    def change(self, vectors, texts):
        return Embedded(vectors, tokens=sum(len(text.split()) for text in texts))

    def count_exact_tokens(self, texts, task):
        return [len(text.encode()) for text in texts]


class ChecksOnALoop(CountingProvider):
    """Has a coroutine function as `check`, which never runs."""

    async def check(self):
        raise RuntimeError("the API key is missing")


class ChecksTooMuch(CountingProvider):
    """Raises in `check` for a key that has an unusual form, although the service accepts the key."""

    def check(self):
        raise RuntimeError("the API key does not begin with sk-")


class AnswersTheCheck(CountingProvider):
    """Returns False from `check` instead of raising an error."""

    def check(self):
        return False


class PreparesOnALoop(CountingProvider):
    """Has a coroutine function as `prepare`, which never runs."""

    async def prepare(self):
        self.is_prepared = True


class PreparesOnce(CountingProvider):
    """Raises at the second call of `prepare`."""

    is_prepared = False

    def prepare(self):
        if self.is_prepared:
            raise RuntimeError("the model is loaded already")
        self.is_prepared = True


class PreparesAnotherModel(Changes):
    """Loads another model in `prepare` than at the first call."""

    is_prepared = False

    def prepare(self):
        self.is_prepared = True

    def change(self, vectors, texts):
        return -vectors if self.is_prepared else vectors


class NamesEachCall(Changes):
    """Names a different model in each answer."""

    def change(self, vectors, texts):
        return Embedded(vectors, model=f"model-{len(self.calls)}")


class TwoFaces(CountingProvider):
    """Uses different models in `embed` and `aembed`."""

    def __init__(self):
        super().__init__()
        self.aembed = CountingProvider(model="another", asynchronous=True).aembed


class NothingIsZero(Changes):
    """Returns a vector of zeros for an empty text."""

    def change(self, vectors, texts):
        vectors[[not text for text in texts]] = 0.0
        return vectors


class RefusesSomewhere(Changes):
    """Raises its own error instead of `TextRefused` for a text that is too long."""

    limit = 10_000

    def change(self, vectors, texts):
        if any(len(text) > self.limit for text in texts):
            raise RuntimeError("400 Bad Request")
        return vectors


class FearsNul(Changes):
    """Raises its own error for a text that contains NUL."""

    def change(self, vectors, texts):
        if any("\0" in text for text in texts):
            raise ValueError("embedded null character")
        return vectors


class HasOnePlaceForTexts(Changes):
    """Keeps the texts of a call in a variable that threads share."""

    def __init__(self):
        super().__init__()
        self.rendezvous = Rendezvous(times=2)

    def embed_changed(self, texts, task):
        self.texts_now = texts
        self.rendezvous()  # every thread has set its texts
        texts = self.texts_now
        self.rendezvous()  # every thread has read the attribute
        return super().embed_changed(texts, task)


class HasOnePlaceForTextsOnALoop(CountingProvider):
    """Keeps the texts of a call in a variable that tasks share."""

    def __init__(self):
        super().__init__(asynchronous=True)
        self.honest = self.aembed
        self.aembed = self.embed_shared

    async def embed_shared(self, texts, task):
        self.texts_now = texts
        await asyncio.sleep(0)
        return await self.honest(self.texts_now, task)


class ClosesOnceOnly(CountingProvider):
    """Raises when it is closed twice."""

    def close(self):
        super().close()
        if self.closed > 1:
            raise RuntimeError("closed twice")


BROKEN_PROVIDERS: list[tuple[str, Callable[[], Any]]] = [
    ("test_limits_make_sense", TakesNothing),
    ("test_the_space_is_described_and_stays", LearnsItsRevision),
    ("test_two_instances_describe_one_space", AnotherSpaceEveryTime),
    ("test_the_dimensions_are_as_described", SaysSeven),
    ("test_tasks_that_differ_have_different_spaces", OneSpaceForTwoTasks),
    ("test_check_accepts_a_provider_that_can_be_called", ChecksOnALoop),
    ("test_check_accepts_a_provider_that_can_be_called", ChecksTooMuch),
    ("test_check_accepts_a_provider_that_can_be_called", AnswersTheCheck),
    ("test_prepare_can_be_called_again_and_changes_no_vector", PreparesOnALoop),
    ("test_prepare_can_be_called_again_and_changes_no_vector", PreparesOnce),
    ("test_prepare_can_be_called_again_and_changes_no_vector", PreparesAnotherModel),
    ("test_one_vector_per_text", AnswersAHundred),
    ("test_vectors_are_finite_floats", HalfAnIdea),
    ("test_every_text_has_its_own_vector", AllTheSame),
    ("test_order_is_kept", Sorts),
    ("test_alone_as_in_a_batch", LooksAtItsNeighbours),
    ("test_batches_that_are_almost_alike_differ", KnowsABatchByItsFirst),
    ("test_a_text_twice_has_one_vector", DropsDuplicates),
    ("test_a_later_call_leaves_earlier_vectors_alone", UsesOneBuffer),
    ("test_what_is_handed_in_is_left_alone", StripsTheList),
    ("test_tokens_are_numbers_or_none", OwesTokens),
    ("test_tokens_are_numbers_or_none", TotalsTokensInAList),
    ("test_tokens_are_numbers_or_none", AveragesTokens),
    ("test_tokens_are_numbers_or_none", OwesTokensForAText),
    ("test_exact_counts_are_the_tokens_of_the_answer", CountsBytes),
    ("test_the_model_has_one_name", NamesEachCall),
    ("test_sync_and_async_agree", TwoFaces),
    ("test_an_empty_text_is_embedded_or_refused", NothingIsZero),
    ("test_an_empty_text_is_embedded_or_refused", RefusesByThePart),
    ("test_a_long_text_is_embedded_or_refused", RefusesSomewhere),
    ("test_any_unicode_is_embedded_or_refused", FearsNul),
    ("test_threads_get_their_own_vectors", HasOnePlaceForTexts),
    ("test_tasks_of_a_loop_get_their_own_vectors", HasOnePlaceForTextsOnALoop),
    ("test_another_process_makes_the_same_vectors", HashingProvider),
    ("test_close_twice_does_nothing", ClosesOnceOnly),
]


class ProviderContractRun(ProviderContract):
    def __init__(self, broken: Callable[[], Any]) -> None:
        self.broken = broken

    def make(self) -> Any:
        return self.broken()

    def recipe(self) -> Recipe:
        return Recipe(self.broken)


@pytest.mark.parametrize(("name", "broken"), BROKEN_PROVIDERS, ids=lambda value: getattr(value, "__name__", value))
def test_the_provider_contract_catches(name: str, broken: Callable[[], Any]) -> None:
    assert is_failing(getattr(ProviderContractRun(broken), name)), f"{name} lets {broken.__name__} pass"


def test_every_test_of_the_provider_contract_catches_something() -> None:
    own = {"test_no_standard_test_is_replaced"}
    assert {name for name, _ in BROKEN_PROVIDERS} | own == set(ProviderContract.standard_tests)


# --- broken normalisation steps ---------------------------------------------------------------


def returns_bytes(text):
    """Returns bytes."""
    return text.encode()


def counts_its_calls(text, seen=[]):  # noqa: B006 - its fault
    """Returns a different form each time that it gets the same text."""
    seen.append(text)
    return f"{text} ({seen.count(text)})"


def one_space_of_two(text):
    """Replaces two spaces by one in a single pass, so that normalising its result changes it again."""
    return text.replace("  ", " ") if "  " in text else text.replace("\n", "  ")


def looks_at_the_first_character(text):
    """Reads the first character, which an empty text does not have."""
    return text if text[0] != "\ufeff" else text[1:]


def cuts_utf_16(text):
    """Cuts characters above U+FFFF in half."""
    return text.encode("utf-16-le", "surrogatepass")[:30].decode("utf-16-le", "surrogatepass")


def cuts_at_512(text):
    """Truncates texts, so that long texts with the same beginning become equal."""
    return text[:512]


def keeps_ascii_alone(text):
    """Drops all characters outside ASCII, and so all of a Japanese text."""
    return "".join(character for character in text if character.isascii())


def loses_no_case(text):
    """Changes nothing, although it should fold case."""
    return text


class HasOnePlaceForAText:
    """Keeps the text of a call in a variable that threads share."""

    def __init__(self):
        self.rendezvous = Rendezvous(times=2)

    def __call__(self, text):
        self.text = text
        self.rendezvous()  # every thread has set its texts
        text = self.text
        self.rendezvous()  # every thread has read the attribute
        return text


has_one_place_for_a_text = HasOnePlaceForAText()

BROKEN_NORMALIZERS: list[tuple[str, Callable[[str], Any]]] = [
    ("test_a_form_is_text", returns_bytes),
    ("test_a_text_has_one_form", counts_its_calls),
    ("test_a_form_is_its_own_form", one_space_of_two),
    ("test_an_empty_text_has_a_form", looks_at_the_first_character),
    ("test_any_unicode_has_a_form", cuts_utf_16),
    ("test_a_long_text_keeps_its_end", cuts_at_512),
    ("test_texts_that_differ_stay_apart", keeps_ascii_alone),
    ("test_spellings_of_one_text_meet", loses_no_case),
    ("test_threads_get_their_own_forms", has_one_place_for_a_text),
    ("test_another_process_gives_the_same_form", words_as_a_set),
]


class NormalizerContractRun(NormalizerContract):
    same = (("A Text", "a text"),)

    def __init__(self, broken: Callable[[str], Any]) -> None:
        self.broken = broken

    def make(self) -> Any:
        return self.broken

    def recipe(self) -> Recipe:
        return Recipe(self.broken)


@pytest.mark.parametrize(("name", "broken"), BROKEN_NORMALIZERS, ids=[name for name, _ in BROKEN_NORMALIZERS])
def test_the_normalizer_contract_catches(name: str, broken: Callable[[str], Any]) -> None:
    assert is_failing(getattr(NormalizerContractRun(broken), name)), f"{name} lets it pass"


def test_every_test_of_the_normalizer_contract_catches_something() -> None:
    own = {"test_no_standard_test_is_replaced"}
    assert {name for name, _ in BROKEN_NORMALIZERS} | own == set(NormalizerContract.standard_tests)


# --- the contract itself ----------------------------------------------------------------------


def test_a_standard_test_cannot_be_overridden() -> None:
    with pytest.raises(TypeError, match="test_a_miss_is_absent"):
        type("TestMine", (BackendContract,), {"test_a_miss_is_absent": lambda self: None})


def test_a_standard_test_cannot_be_removed() -> None:
    with pytest.raises(TypeError, match="test_order_is_kept"):
        type("TestMine", (ProviderContract,), {"test_order_is_kept": None})


def test_a_standard_test_cannot_be_overridden_by_a_second_base() -> None:
    mixin = type("Mixin", (), {"test_one_entry_comes_back": lambda self: None})
    with pytest.raises(TypeError, match="test_one_entry_comes_back"):
        type("TestMine", (mixin, BackendContract), {})


def test_a_standard_test_that_was_replaced_later_fails_the_suite() -> None:
    class TestMine(BackendContract):
        def make(self) -> DictBackend:
            return DictBackend()

    TestMine().test_no_standard_test_is_replaced()
    TestMine.test_a_miss_is_absent = lambda self: None  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="test_a_miss_is_absent"):
        TestMine().test_no_standard_test_is_replaced()


def test_own_tests_are_welcome() -> None:
    mine = type("TestMine", (BackendContract,), {"test_of_my_own": lambda self: None})
    mine().test_no_standard_test_is_replaced()


@pytest.mark.parametrize("capability", ["get", "delete", "scan", "count", "add", "twin"])
def test_a_capability_that_is_not_there_fails(capability: str) -> None:
    class Bare:
        capabilities = Capabilities(**{capability: True})

        def get_many(self, keys):
            return {}

        def set_many(self, items, ttl):
            return

        def close(self):
            return

    class TestBare(BackendContract):
        def make(self) -> Bare:
            return Bare()

    with pytest.raises(AssertionError, match=capability):
        TestBare().test_declared_extras_are_there()


def test_a_shared_backend_without_reopen_fails_rather_than_skips() -> None:
    class TestShared(BackendContract):
        def make(self) -> DictBackend:
            return DictBackend(scope="host")

    with pytest.raises(AssertionError, match="reopen"):
        TestShared().test_what_was_stored_is_there_when_opened_again()


def test_a_contract_without_make_says_so() -> None:
    with pytest.raises(NotImplementedError, match="make"):
        type("TestNothing", (BackendContract,), {})().test_one_entry_comes_back()
