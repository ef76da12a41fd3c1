"""Records what a chain has computed and saved in one of its tiers, and reads the records of all processes.

A record is an entry with an empty vector, like a space card, under the key
``eo1.savings.<yyyymmdd>.<scope>.<process>``. The metadata of the entry has the numbers. A process writes its record
again and again, with all of its work in this space on this day. Writing a record twice changes nothing. If a record is
lost, only a statistic is lost.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

from embedonce.errors import ConfigError, TierError
from embedonce.events import SpaceStats
from embedonce.keys import SAVINGS_PREFIX
from embedonce.prices import Price
from embedonce.savings import FoundSavings, SavingsRecord
from embedonce.vectors import NO_WORK, Entry, Work, freeze

from .ledger import Account, Ledger
from .ports import Port
from .tiers import LiveTier

log = logging.getLogger("embedonce")

RECORD_SECONDS = 30.0
"""Minimum seconds between two writes of the records while a cache is used. Closing the cache also writes them."""
LIFETIME = 366 * 86_400.0
"""Seconds after which a record expires."""
READ_AT_ONCE = 1024
"""Maximum number of records that are read in one call."""
MAX_COUNT = 2**53
"""Maximum number of texts, tokens and seconds in a record. Larger numbers come from another program or from damage."""
MAX_MAGNITUDE = 100
"""Maximum power of ten of a price in a record."""
CARD_PARTS = ("provider", "model", "task", "version", "namespace")


class SavingsRecorder:
    """Writes the records of one chain. Many threads use it."""

    def __init__(self, tiers: Sequence[LiveTier], ledger: Ledger, clock: Callable[[], float]) -> None:
        self._tiers = tiers
        self._tier = next((tier for tier in reversed(tiers) if _can_keep_records(tier)), None)
        self._ledger = ledger
        self._clock = clock
        self.reset()

    def reset(self) -> None:
        """Start with no records in a forked child. The parent records the work before the fork."""
        self._lock = threading.RLock()  # re-entrant, because a signal handler may use the cache
        self._process = os.urandom(6).hex()
        self._names: dict[Account, str] = {}
        """The name of the process in the records of each account."""
        self._seen: dict[Account, SpaceStats] = self._ledger.read_accounts()
        """The work in the ledger when the records were last updated."""
        self._records: dict[str, SavingsRecord] = {}
        """The records of this process that are not stored yet, or that may still change, by key."""
        self._unwritten: set[str] = set()
        self._next = time.monotonic() + RECORD_SECONDS

    def record_if_due(self) -> None:
        """Write the records in the background, unless they were written a short time ago."""
        if self._tier is not None and time.monotonic() >= self._next:
            self._next = time.monotonic() + RECORD_SECONDS
            self._tier.calls.run_in_background(self.record)

    def record(self) -> None:
        """Write the records that have changed. If the tier fails, the next call writes them."""
        if self._tier is None:
            return
        with self._lock:
            self._update_records()
            if not self._unwritten:
                return
            now = self._clock()
            entries = {
                key: Entry(freeze(()), now, now + LIFETIME, _write_metadata(self._records[key]))
                for key in self._unwritten
            }
            for chunk in self._tier.calls.split_into_chunks(list(entries)):
                items = self._tier.codec.encode({key: entries[key] for key in chunk})
                stored = self._tier.writer.replace(items, LIFETIME)
                if len(stored) < len(chunk):
                    log.info(
                        "tier %r did not store %d savings records; retrying later",
                        self._tier.name,
                        len(chunk) - len(stored),
                    )
                self._unwritten.difference_update(stored)
                if not stored:
                    break  # the tier may hang, and the cache that is closed must not wait for each chunk
            self._next = time.monotonic() + RECORD_SECONDS

    def _update_records(self) -> None:
        """Add the work since the last update to the records of today."""
        day = _format_day(self._clock())
        spaces = self._ledger.read_accounts()
        for account, space in spaces.items():
            scope, before = account[0], self._seen.get(account)
            computed = space.computed - (NO_WORK if before is None else before.computed)
            saved = {
                tier: work - (NO_WORK if before is None else before.saved.get(tier, NO_WORK))
                for tier, work in space.saved.items()
            }
            if computed == NO_WORK and all(work == NO_WORK for work in saved.values()):
                continue
            key = f"{SAVINGS_PREFIX}{day.replace('-', '')}.{scope}.{self._choose_name(account)}"
            self._records[key] = self._extend_record(self._records.get(key), day, account, space, computed, saved)
            self._unwritten.add(key)
        self._seen = spaces
        for key in [key for key, record in self._records.items() if record.day != day and key not in self._unwritten]:
            del self._records[key]

    def _choose_name(self, account: Account) -> str:
        """Return the name of the process for an account. A record has one price, so each price gets another name."""
        if account not in self._names:
            is_first = all(scope != account[0] for scope, _ in self._names)
            self._names[account] = self._process if is_first else os.urandom(6).hex()
        return self._names[account]

    def _extend_record(
        self,
        record: SavingsRecord | None,
        day: str,
        account: Account,
        space: SpaceStats,
        computed: Work,
        saved: Mapping[str, Work],
    ) -> SavingsRecord:
        if record is not None:
            computed += record.computed
            saved = {
                tier: saved.get(tier, NO_WORK) + record.saved.get(tier, NO_WORK) for tier in {**record.saved, **saved}
            }
        card = {part: str(space.card.get(part) or "") for part in CARD_PARTS}
        kept = {tier: work for tier, work in saved.items() if work != NO_WORK}
        return SavingsRecord(
            day=day,
            scope=account[0],
            process=self._choose_name(account),
            **card,
            computed=computed,
            saved=kept,
            price=space.price,
        )

    async def read(self, port: Port, since: float) -> FoundSavings:
        """Return the records of all processes, from the day of the Unix time ``since`` on, and of at most one year."""
        now = self._clock()
        # A date after year 9999 cannot be formatted. No record is from tomorrow or later, except after a clock change.
        first = _format_day(min(max(since, now - LIFETIME), now + LIFETIME)).replace("-", "")
        records: dict[str, SavingsRecord] = {}
        errors: dict[str, str] = {}
        read: list[str] = []
        for tier in self._tiers:
            caps = tier.capabilities
            if caps.scope == "process" or caps.read_only or not caps.scan:
                continue
            try:
                for key, record in (await _read_records(port, tier, first)).items():
                    records.setdefault(key, record)
            except TierError as error:
                errors[tier.name] = str(error)
            else:
                read.append(tier.name)
        return FoundSavings(sorted(records.values(), key=lambda record: (record.day, record.scope)), errors, read)


async def _read_records(port: Port, tier: LiveTier, first: str) -> dict[str, SavingsRecord]:
    """Return the records in a tier, from the day ``first`` on, by key.

    Raises:
        TierError: the tier failed, or cannot list its keys.
    """
    records: dict[str, SavingsRecord] = {}
    keys = [key for key in await tier.scan(port, SAVINGS_PREFIX) if key.removeprefix(SAVINGS_PREFIX) >= first]
    for start in range(0, len(keys), READ_AT_ONCE):
        values = await tier.peek(port, keys[start : start + READ_AT_ONCE])
        # Without a date, the tier's TTL does not matter. It may be shorter than the lifetime of a record.
        entries = tier.decode(values, dtype="int8", dimensions=None, now=-math.inf).entries
        for key, entry in entries.items():
            record = _read_record(key, entry.metadata)
            if record is not None:
                records[key] = record
    return records


def _can_keep_records(tier: LiveTier) -> bool:
    caps = tier.capabilities
    return caps.scan and caps.scope != "process" and tier.writer.mode != "none"


def _format_day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")


def _write_metadata(record: SavingsRecord) -> dict[str, Any]:
    return {
        **{part: getattr(record, part) for part in CARD_PARTS},
        "price": None if record.price is None else _write_price(record.price),
        "computed": record.computed._asdict(),
        "saved": {tier: work._asdict() for tier, work in record.saved.items()},
    }


def _read_record(key: str, metadata: Any) -> SavingsRecord | None:
    """Return the record in the metadata of an entry, or None if another program has written something else."""
    try:
        day, scope, process = key.removeprefix(SAVINGS_PREFIX).split(".")
        card = {part: metadata[part] for part in CARD_PARTS}
        if not all(isinstance(value, str) for value in card.values()):
            return None
        price = metadata["price"]
        return SavingsRecord(
            day=f"{datetime.strptime(day, '%Y%m%d'):%Y-%m-%d}",
            scope=scope,
            process=process,
            **card,
            computed=_read_work(metadata["computed"]),
            saved={str(tier): _read_work(work) for tier, work in metadata["saved"].items()},
            price=None if price is None else _read_price(price),
        )
    except (ValueError, TypeError, KeyError, AttributeError, ArithmeticError, ConfigError):
        return None


def _write_price(price: Price) -> dict[str, str]:
    """Return the parts of a price as texts. A price made in Python may have more digits than its text can have."""
    return {"amount": str(price.amount), "currency": price.currency, "tokens": str(price.tokens)}


def _read_price(value: Any) -> Price:
    if isinstance(value, str):
        return Price.parse(value)
    amount, tokens = Decimal(value["amount"]), int(value["tokens"])
    if amount and abs(amount.adjusted()) > MAX_MAGNITUDE:
        raise ValueError("not an amount of money")
    return Price(amount, value["currency"], tokens)


def _read_work(value: Any) -> Work:
    work = Work(**value)
    counts = (work.texts, work.tokens, work.unknown_tokens, work.unknown_seconds)
    if not all(type(number) is int and 0 <= number <= MAX_COUNT for number in counts):
        raise ValueError("a count is not a whole number from 0 on")
    if max(work.unknown_tokens, work.unknown_seconds) > work.texts:
        raise ValueError("more unknown texts than texts")
    if type(work.seconds) not in (int, float) or not 0 <= work.seconds <= MAX_COUNT:
        raise ValueError("the seconds are not a number from 0 on")
    return work
