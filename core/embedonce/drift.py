"""The drift guard's options: what is done when a provider begins to make other vectors under the same vector space.

A hosted model may be changed behind its name, a function behind its ``space``. The vector space then says the same as
before, and new vectors would be stored among old ones that they do not fit. The guard embeds a few canary texts now and
again and compares them with the vectors that it has for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Gt, Lt, MinLen

from .errors import ConfigError
from .options import Doc, Duration

CANARIES = (
    "The quick brown fox jumps over the lazy dog.",
    "def mean(values):\n    return sum(values) / len(values)",
    "Im Jahr 1905 veröffentlichte Albert Einstein vier Arbeiten.",
    "東京は日本の首都です。",
)
"""Prose, code, another language and another script: a change of tokenizer shows in one of them, any other in all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftGuard:
    """``[drift]``: looks whether the provider still makes the vectors that are stored."""

    action: Annotated[
        Literal["warn", "refuse", "new-space"],
        Doc(
            'On drift "warn" logs it; "refuse" computes nothing more, and a text that no tier has is an error; '
            '"new-space" goes on in a vector space of its own, in which every text is computed again.'
        ),
    ] = "warn"
    every: Annotated[Duration, Gt(0), Doc("Look again after this long, at the next text that is computed.")] = 86400.0
    tolerance: Annotated[
        float, Gt(0), Lt(2), Doc("Drift is a cosine with the stored vector that is below 1 by more than this.")
    ] = 0.001
    texts: Annotated[
        Sequence[str], MinLen(1), Doc("The canary texts; own ones where the built-in ones say nothing to the model.")
    ] = CANARIES

    def __post_init__(self) -> None:
        if self.action not in ("warn", "refuse", "new-space"):
            raise ConfigError(f'action is "warn", "refuse" or "new-space", not {self.action!r}')
        if isinstance(self.texts, str) or not self.texts or not all(isinstance(text, str) for text in self.texts):
            raise ConfigError("texts is a list of at least one text")
        if not all(text and text == text.encode(errors="replace").decode() for text in self.texts):
            raise ConfigError("a canary text of [drift] is empty or not valid Unicode: it cannot be embedded")
        if not self.every > 0 or not 0 < self.tolerance < 2:
            raise ConfigError("every is above 0, and tolerance between 0 and 2")
        object.__setattr__(self, "texts", tuple(self.texts))
