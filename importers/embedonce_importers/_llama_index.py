"""What the importers of LlamaIndex's stores share."""

from __future__ import annotations

import re
from typing import Annotated, Final, Literal, TypeAlias

from embedonce.options import Doc

from ._values import DecodedVector, decode_json

_BEFORE_LIST: Final = re.compile(rb'\{\s*"[^"\\]*+(?:\\.[^"\\]*+)*+"\s*:\s*', re.DOTALL)
_AFTER_LIST: Final = re.compile(rb"\s*\}")

LineBreaks: TypeAlias = Annotated[
    Literal["kept", "replaced"] | None,
    Doc(
        "What the embedding class of LlamaIndex did with line breaks. OpenAIEmbedding and its subclasses embed a text "
        'with a space in place of each line break: "replaced" means that a vector belongs to that text. "kept" means '
        "that the text was embedded as it is, as HuggingFaceEmbedding does. By default, texts with a line break are "
        "left out."
    ),
]
"""The option ``line_breaks``."""

UNKNOWN_LINE_BREAKS: Final = (
    "texts with a line break, because OpenAIEmbedding of LlamaIndex embeds a space in its place and other classes do "
    'not: set line_breaks to "replaced" or "kept"'
)
"""Why a text is left out if the option ``line_breaks`` is not set."""


def check_line_breaks(line_breaks: str | None) -> None:
    """Raise :class:`ValueError` if the option has another value."""
    if line_breaks not in (None, "kept", "replaced"):
        raise ValueError(f'line_breaks must be "kept" or "replaced", got {line_breaks!r}')


def find_embedded_text(text: str, line_breaks: str | None) -> str | None:
    """Return the text that was embedded for a stored text; None if this is not known.

    LlamaIndex stores a text as it got it, and OpenAIEmbedding changes it after that.
    """
    if "\n" not in text or line_breaks == "kept":
        return text
    return text.replace("\n", " ") if line_breaks == "replaced" else None


def decode_entry(raw: bytes) -> DecodedVector:
    """Return the vector of an entry, which is an object with one member.

    Raises:
        ValueError: the entry is something else. The message is a short reason.
    """
    before = _BEFORE_LIST.match(raw)
    end = raw.rfind(b"]") + 1
    if before is None or not end or _AFTER_LIST.fullmatch(raw, end) is None:
        raise ValueError("not an object with exactly one list of numbers")
    return decode_json(raw[before.end() : end])
