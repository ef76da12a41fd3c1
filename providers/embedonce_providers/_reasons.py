"""The reason that an API gives for an error, without texts and secrets."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

MAX_CHARACTERS = 200
MAX_READ = 400
"""Number of characters of a message that are read, because comparing them with many long texts takes time."""

MAX_TEXTS = 300_000
"""Number of characters of all texts above which no reason is given. Such a batch is halved in any case, and the error
that reaches the caller is about fewer texts."""

TEXT_RUN = 12
"""Characters of a text that are removed if they stand in a message in the same order."""
SECRET_RUN = 8

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
    texts = list(texts)
    if sum(map(len, texts)) > MAX_TEXTS:
        return ""
    message = " ".join(_unescape(next(_find_messages(body), "")[:MAX_READ]).split())
    # All parts are found before any is replaced, so that what is left of one part still shows where another begins.
    covered = bytearray(len(message))
    for found in CREDENTIALS.finditer(message):
        _cover(covered, *found.span())
    _cover_runs(covered, message, [secret for secret in secrets if secret], SECRET_RUN)
    _cover_runs(covered, message, texts, TEXT_RUN)
    message = "".join(
        HIDDEN if found.group()[0] else message[found.start() : found.end()]
        for found in re.finditer(rb"\x01+|\x00+", bytes(covered))
    )
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


def _cover_runs(covered: bytearray, message: str, hidden: Iterable[str], run: int) -> None:
    """Cover every part of ``message``, at least ``run`` characters long, that stands in one of the ``hidden`` texts.

    A shorter text is covered where it stands as a whole word.
    """
    hidden = [" ".join(text.split()) for text in hidden]
    # Characters other than letters and digits may be escaped in many ways, so the second pass ignores them.
    for ignored in ("", r"[\W_]+"):
        places = [place for place, character in enumerate(message) if not (ignored and re.match(ignored, character))]
        plain = _simplify("".join(message[place] for place in places))
        for text in hidden:
            form = _simplify(re.sub(ignored, "", text) if ignored else text)
            for start in range(len(plain) - run + 1):
                if plain[start : start + run] in form:
                    _cover(covered, places[start], places[start + run - 1] + 1)
    for text in hidden:
        for found in re.finditer(rf"(?<!\w){re.escape(text)}(?!\w)", message, re.IGNORECASE) if text else ():
            _cover(covered, *found.span())


def _cover(covered: bytearray, start: int, end: int) -> None:
    covered[start:end] = b"\1" * (end - start)


def _simplify(text: str) -> str:
    """Return a text without differences of case. The result has the length of ``text``."""
    lower = text.lower()
    if len(lower) == len(text):
        return lower
    return "".join(low if len(low := character.lower()) == 1 else character for character in text)
