"""The messages about texts that a session needs and its bundle does not have. No message contains a text."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from embedonce.encryption import Encryption
from embedonce.governing import Answered
from embedonce.keys import CARD_PREFIX, KEY_PREFIX
from embedonce.vectors import Entry, decode_frame

MAX_POSITIONS = 10
MAX_SPACES = 5
MAX_TESTS = 3
PARTS = ("provider", "model", "task", "version", "namespace", "dimensions")


def describe_misses(answered: Answered, test: str | None, shown: str, bundle: Any) -> str:
    """Return the message about the missing texts of one call. ``shown`` is the path of the bundle as it is shown."""
    where = test or "outside of a test"
    return (
        f"{where}: {_name_positions(list(answered.missing.values()))} not in the bundle {shown}.\n"
        f"{_explain(answered, bundle)}\n"
        f"Record what the tests need: {make_command([test] if test else [])}"
    )


def summarise_misses(missed: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the lines of the summary: one per call, and the command that records everything."""
    lines = [message.partition("\n")[0] for messages in missed.values() for message in dict.fromkeys(messages)]
    return [*lines, "", f"Record what the tests need: {make_command(list(missed))}"]


def make_command(tests: Sequence[str]) -> str:
    """Return the command that records some tests. Of many tests, it names the files, or nothing."""
    files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
    named = tests if len(tests) <= MAX_TESTS else files if len(files) <= MAX_TESTS else []
    return shlex.join(["pytest", "--embedonce=record", *named])


def _name_positions(positions: list[int]) -> str:
    if len(positions) == 1:
        return f"the text at position {positions[0]} of its call is"
    named = ", ".join(map(str, positions[:MAX_POSITIONS]))
    more = ", …" if len(positions) > MAX_POSITIONS else ""
    return f"{len(positions):,} texts of one call (positions {named}{more}) are"


def _explain(answered: Answered, bundle: Any) -> str:
    """Return a sentence about the reason, as far as the bundle shows it."""
    if bundle is None:
        return "There is no bundle in this folder yet."
    held = bundle.get_many(list(answered.missing))
    if held:
        return _explain_unusable(next(iter(held.values())))
    others = bundle.count(f"{KEY_PREFIX}{answered.scope}.")
    if others:
        return (
            f"The bundle has {others:,} other text{'s' * (others != 1)} of the same vector space, so this text is new "
            "or has changed."
        )
    cards = _read_cards(bundle, answered.encryption)
    if not cards:
        return f"The bundle has no vectors of {_name_space(answered.card)}."
    named = list(dict.fromkeys(_name_space(card) for card in cards))
    listed = "; ".join(named[:MAX_SPACES]) + ("; …" if len(named) > MAX_SPACES else "")
    wanted = _name_space(answered.card)
    if wanted in named:
        return f"The bundle has vectors of {wanted}, but with other settings of the provider or of [key]."
    return f"The test needs vectors of {wanted}. The bundle has vectors of {listed}."


def _explain_unusable(value: Any) -> str:
    if isinstance(value, Entry):
        return (
            f"The bundle has the vector of this text as {value.dtype} with {value.vector.size} dimensions, which is "
            "less than this cache needs."
        )
    return "The bundle has this text, but its row is damaged, or is encrypted with another key."


def _read_cards(bundle: Any, encryption: Encryption | None) -> list[Mapping[str, Any]]:
    stored = bundle.get_many(list(bundle.scan(CARD_PREFIX)))
    frames = {key: value for key, value in stored.items() if isinstance(value, bytes)}
    plain = {} if encryption is None else encryption.decrypt(frames)[0]
    decoded = [decode_frame(key, frame, now=0.0, dtype="int8", dimensions=None) for key, frame in plain.items()]
    entries = [*(value for value in stored.values() if isinstance(value, Entry)), *decoded]
    return [entry.metadata for entry in entries if entry is not None and entry.metadata is not None]


def _name_space(card: Mapping[str, Any]) -> str:
    """Return a vector space as its card describes it."""
    said = {part: card[part] for part in PARTS if card.get(part) not in (None, "")}
    name = " ".join(str(said.pop(part)) for part in ("provider", "model") if part in said)
    rest = ", ".join(f"{part} {value}" for part, value in said.items())
    return f"{name} ({rest})" if rest else name
