"""Options of the drift guard, which notices when a provider starts to return different vectors for the same texts.

A hosted model can change while its name stays the same, and a function can change while its ``space`` stays the same.
New vectors would then be stored together with old vectors, although new and old vectors cannot be compared. The guard
embeds a few canary texts at intervals, and compares their new vectors with the stored vectors of the same texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
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
"""English prose, Python code, German prose and Japanese prose. A change of the tokenizer changes the vector of at least
one of these texts. Any other change of the model changes the vectors of all four texts."""


TOLERANCE = 0.001
"""Default tolerance. A hosted model returns slightly different vectors for the same text from call to call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftGuard:
    """``[drift]``: checks at intervals whether the provider still returns the vectors that are stored."""

    action: Annotated[
        Literal["warn", "refuse", "new-space"],
        Doc(
            'What to do on drift: "warn" logs a warning; "refuse" raises an error for every text that no tier has; '
            '"new-space" continues in a new vector space, in which every text is embedded again.'
        ),
    ] = "warn"
    every: Annotated[
        Duration,
        Gt(0),
        Doc("Time between two checks. After this time, a check starts as soon as a text is missing from every tier."),
    ] = 86400.0
    tolerance: Annotated[
        float,
        Gt(0),
        Lt(2),
        Doc("A canary has drifted if the cosine of its new and its stored vector is less than 1 minus this value."),
    ] = TOLERANCE
    texts: Annotated[
        Sequence[str],
        MinLen(1),
        Doc("The canary texts. Set your own texts if the built-in texts do not suit the model."),
    ] = field(default=CANARIES, repr=False)

    def __post_init__(self) -> None:
        if self.action not in ("warn", "refuse", "new-space"):
            raise ConfigError(f'[drift] "action" must be "warn", "refuse" or "new-space", got {self.action!r}')
        if isinstance(self.texts, str) or not self.texts or not all(isinstance(text, str) for text in self.texts):
            raise ConfigError('[drift] "texts" must be a list of at least one str')
        if not all(text and text == text.encode(errors="replace").decode() for text in self.texts):
            raise ConfigError(
                '[drift] "texts" must not contain an empty str or invalid Unicode, which cannot be embedded'
            )
        if not self.every > 0:
            raise ConfigError(f'[drift] "every" must be more than 0 seconds, got {self.every!r}')
        if not 0 < self.tolerance < 2:
            raise ConfigError(f'[drift] "tolerance" must be between 0 and 2, got {self.tolerance!r}')
        object.__setattr__(self, "texts", tuple(self.texts))
