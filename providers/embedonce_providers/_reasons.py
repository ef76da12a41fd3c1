"""The reason that an API gives for an error, without texts and secrets."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

MAX_CHARACTERS = 200
MAX_READ = 400
"""Only this much of a message is read, because comparing it with many long texts takes time."""

TEXT_RUN = 12
"""Characters of a text that are removed if they stand in a message in the same order."""
SECRET_RUN = 6

HIDDEN = "…"

CREDENTIALS = re.compile(
    r"(?<=://)[^/\s@]+@"  # user and password of a URL
    r"|(?<=[?&])(?:[\w-]*key|token|sig|signature|password|secret)=[^&\s'\"]+"
    r"|\b(?:bearer|basic)\s+[\w.~+/=*-]+"
    r"|\beyJ[\w-]+\.[\w.-]+"  # JSON web tokens
    r"|\b(?:sk|pk|pa|rk)-[\w*-]{6,}|\bAIza[\w*-]{10,}",
    re.IGNORECASE,
)


def describe_reason(body: Any, *, texts: Iterable[str], secrets: Iterable[str | None] = ()) -> str:
    """Return the reason that the body of an error gives, to end a message: ``": the reason"``, or "" if there is none.

    ``body`` is a message, or decoded JSON in one of the forms that APIs use. The reason is one line of at most
    :data:`MAX_CHARACTERS` characters. It contains no run of :data:`TEXT_RUN` characters of a text, whether
    written plainly or escaped, no text as a whole word, no secret, and no credentials of a URL. Escaped characters of
    the message are written as characters.
    """
    message = " ".join(_unescape(next(_find_messages(body), "")[:MAX_READ]).split())
    message = CREDENTIALS.sub(HIDDEN, message)
    message = _hide(message, [secret for secret in secrets if secret], SECRET_RUN)
    message = _hide(message, texts, TEXT_RUN)
    if len(message) > MAX_CHARACTERS:
        message = message[: MAX_CHARACTERS - 1].rstrip() + "…"
    return f": {message}" if re.search(r"\w", message) else ""


def _find_messages(body: Any) -> Iterator[str]:
    """Yield the messages in the body of an error, the most specific first."""
    if isinstance(body, str):
        if body.strip():
            yield body
    elif isinstance(body, Mapping):
        for name in ("error", "message", "detail", "details", "msg", "error_message", "reason", "title"):
            if name in body:
                yield from _find_messages(body[name])
    elif isinstance(body, list | tuple):
        for item in body:
            yield from _find_messages(item)


def _unescape(message: str) -> str:
    """Return a message with its escaped characters as characters, however often they were escaped."""
    message = re.sub(r"\\+u([0-9a-fA-F]{4})", lambda found: chr(int(found[1], 16)), message)
    message = re.sub(r"\\+x([0-9a-fA-F]{2})", lambda found: chr(int(found[1], 16)), message)
    message = re.sub(r"\\+[abfnrtv\"'/]", " ", message)
    return html.unescape(html.unescape(message)).encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _hide(message: str, hidden: Iterable[str], run: int) -> str:
    """Replace every part of ``message`` that stands in one of the ``hidden`` texts."""
    covered = bytearray(len(message))
    hidden = [" ".join(text.split()) for text in hidden]
    # Characters other than letters and digits may be escaped in many ways, so the second pass ignores them.
    for ignored in ("", r"[\W_]+"):
        places = [place for place, character in enumerate(message) if not (ignored and re.match(ignored, character))]
        plain = _simplify("".join(message[place] for place in places))
        for text in hidden:
            form = _simplify(re.sub(ignored, "", text) if ignored else text)
            for start in range(len(plain) - run + 1):
                if plain[start : start + run] in form:
                    first, last = places[start], places[start + run - 1]
                    covered[first : last + 1] = b"\1" * (last + 1 - first)
    for text in hidden:
        for found in re.finditer(rf"(?<!\w){re.escape(text)}(?!\w)", message, re.IGNORECASE) if text else ():
            covered[found.start() : found.end()] = b"\1" * len(found.group())
    return "".join(
        HIDDEN if found.group()[0] else message[found.start() : found.end()]
        for found in re.finditer(rb"\x01+|\x00+", bytes(covered))
    )


def _simplify(text: str) -> str:
    """Return a text without differences of case. The result has the length of ``text``."""
    lower = text.lower()
    if len(lower) == len(text):
        return lower
    return "".join(low if len(low := character.lower()) == 1 else character for character in text)
