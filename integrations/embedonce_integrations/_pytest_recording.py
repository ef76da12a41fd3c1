"""What the tests of a session needed, by bundle, and the files by which processes of one session hand it over."""

from __future__ import annotations

import base64
import json
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from embedonce.encryption import Encryption
from embedonce.governing import Answered
from embedonce.keys import CARD_PREFIX
from embedonce.vectors import Entry, decode_frame, encode_frames, freeze, is_plain_frame

Value = Entry | bytes
"""An entry, or an encrypted frame."""

MIN_COSINE = 0.99
"""Cosine below which two vectors of one text are vectors of different models."""

PRECISION = {"int8": 0, "float16": 1, "float32": 2}


@dataclass(slots=True)
class Recorded:
    """What the tests needed from one bundle."""

    needed: set[str] = field(default_factory=set)
    """Keys of all texts."""
    new: dict[str, Value] = field(default_factory=dict)
    """The values of the texts that the bundle does not have."""
    dtypes: dict[str, str] = field(default_factory=dict)
    """The precision of each text."""
    cards: dict[str, Value] = field(default_factory=dict)
    """Space cards by scope."""

    def add(self, other: Recorded) -> None:
        """Add what another process has recorded. If both have a text, the more precise vector counts."""
        for key, value in other.new.items():
            if self.accepts(key, other.dtypes[key]):
                self.new[key] = value
        self.dtypes |= {key: dtype for key, dtype in other.dtypes.items() if self.accepts(key, dtype)}
        self.needed |= other.needed
        self.cards = other.cards | self.cards

    def accepts(self, key: str, dtype: str) -> bool:
        """Return whether a vector is new, or more precise than the one that was recorded before."""
        before = self.dtypes.get(key)
        return before is None or PRECISION[before] < PRECISION[dtype]


class Recording:
    """What the tests of this process needed. Calls may come from any thread."""

    def __init__(self) -> None:
        self.bundles: dict[Path, Recorded] = {}
        self.conflicts: Counter[str] = Counter()
        """Per test, the number of texts that got a vector that is unlike the recorded one."""
        self._unwritten: list[tuple[Path, str, str, Value | None]] = []
        """The bundle, the key, the precision and the value of what was added since the last call of :meth:`hand_over`.
        """
        self._unwritten_conflicts: Counter[str] = Counter()
        self._lock = threading.RLock()

    def take(self, path: Path, test: str, answered: Answered, bundle: Any) -> None:
        """Record the answer of a call. ``bundle`` is the backend of the existing bundle, or None."""
        with self._lock:
            recorded = self.bundles.setdefault(path, Recorded())
            held = {} if bundle is None else bundle.get_many(list(answered.entries))
            conflicts = sum(
                _is_other_vector(recorded.new.get(key) or held.get(key), entry)
                for key, entry in answered.entries.items()
            )
            if conflicts:
                self.conflicts[test] += conflicts
                self._unwritten_conflicts[test] += conflicts
            entries = {key: entry for key, entry in answered.entries.items() if recorded.accepts(key, entry.dtype)}
            for key, entry in entries.items():
                has_it = _is_enough(key, held.get(key), entry, answered.encryption)
                self._add(path, recorded, key, entry.dtype, None if has_it else _seal(key, entry, answered.encryption))
            if answered.scope not in recorded.cards:
                card = Entry(freeze(()), 0.0, metadata=dict(answered.card))
                recorded.cards[answered.scope] = _seal(CARD_PREFIX + answered.scope, card, answered.encryption)
                self._unwritten.append((path, CARD_PREFIX + answered.scope, "int8", recorded.cards[answered.scope]))

    def _add(self, path: Path, recorded: Recorded, key: str, dtype: str, value: Value | None) -> None:
        recorded.needed.add(key)
        recorded.dtypes[key] = dtype
        if value is not None:
            recorded.new[key] = value
        self._unwritten.append((path, key, dtype, value))

    def hand_over(self, file: Path, left_out: Iterable[str]) -> None:
        """Append what was added since the last call to a file, which :meth:`read_file` of another process reads.

        It is called after each test, so that a process that crashes loses nothing of the tests before. ``left_out``
        says why the process did not run all tests that it could run.
        """
        with self._lock:
            lines = [
                *({"left_out": reason} for reason in left_out),
                *({"conflicts": count, "test": test} for test, count in self._unwritten_conflicts.items()),
                *(_describe(*one) for one in self._unwritten),
            ]
            self._unwritten = []
            self._unwritten_conflicts = Counter()
            if lines:
                with file.open("a", encoding="ascii") as stream:
                    stream.writelines(json.dumps(line) + "\n" for line in lines)

    def read_file(self, file: Path) -> set[str]:
        """Add what another process has handed over, and return why it did not run all tests."""
        left_out: set[str] = set()
        others: dict[Path, Recorded] = {}
        for line in _read_whole_lines(file):
            told = json.loads(line)
            if "left_out" in told:
                left_out.add(told["left_out"])
                continue
            if "conflicts" in told:
                self.conflicts[told["test"]] += told["conflicts"]
                continue
            path, key, dtype, value = _read_value(told)
            other = others.setdefault(path, Recorded())
            if key.startswith(CARD_PREFIX):
                if value is not None:
                    other.cards[key.removeprefix(CARD_PREFIX)] = value
                continue
            other.needed.add(key)
            other.dtypes[key] = dtype
            if value is not None:
                other.new[key] = value
        with self._lock:
            for path, other in others.items():
                self.bundles.setdefault(path, Recorded()).add(other)
        return left_out


def _seal(key: str, entry: Entry, encryption: Encryption | None) -> Value:
    """Return the value that a bundle stores. Vectors of an encrypted cache are encrypted in the bundle too."""
    return entry if encryption is None else encryption.encrypt(encode_frames({key: entry}))[key]


def _is_enough(key: str, held: Any, entry: Entry, encryption: Encryption | None) -> bool:
    """Return whether the existing bundle has a text in the form and with the precision that the cache needs."""
    if encryption is None:
        return (
            isinstance(held, Entry)
            and held.vector.size == entry.vector.size
            and PRECISION[held.dtype] >= PRECISION[entry.dtype]
        )
    if not isinstance(held, bytes):
        return False
    plain = encryption.decrypt({key: held})[0]
    found = decode_frame(key, plain.get(key, b""), now=0.0, dtype=entry.dtype, dimensions=entry.vector.size)
    return found is not None


def _is_other_vector(held: Any, entry: Entry) -> bool:
    """Return whether an entry is the vector of another model. The same model may return slightly different vectors."""
    if not isinstance(held, Entry):
        return False
    if held.vector.size != entry.vector.size:
        return True
    norms = float(np.linalg.norm(held.vector) * np.linalg.norm(entry.vector))
    return float(held.vector @ entry.vector) < MIN_COSINE * norms


def _describe(path: Path, key: str, dtype: str, value: Value | None) -> Mapping[str, Any]:
    frame = encode_frames({key: value})[key] if isinstance(value, Entry) else value
    text = None if frame is None else base64.b64encode(frame).decode()
    return {"bundle": str(path), "key": key, "dtype": dtype, "frame": text}


def _read_value(told: Mapping[str, Any]) -> tuple[Path, str, str, Value | None]:
    key, value = told["key"], None
    if told["frame"] is not None:
        frame = base64.b64decode(told["frame"])
        is_plain = is_plain_frame(frame)
        value = decode_frame(key, frame, now=0.0, dtype=told["dtype"], dimensions=None) if is_plain else frame
    return Path(told["bundle"]), key, told["dtype"], value


def _read_whole_lines(file: Path) -> Iterable[str]:
    """Return the lines of a file. A process that was killed may have left half a line at the end."""
    return [line for line in file.read_text("ascii").splitlines(keepends=True) if line.endswith("\n")]
