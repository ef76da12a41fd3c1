"""Makes the keys of another program's cache from texts, as a template says.

A template is a sum of strings and hashes, with fields in the strings, as in an f-string of Python:

    sha256("{model}|{text}")[:16]
    "embed:{model}:" + sha256("{text}")

The whole grammar is::

    key      = part { "+" part }
    part     = string | function "(" key ")" [ "[:" number "]" ]
    string   = '"' { character | field } '"', or with ' in place of "
    field    = "{text}" | "{model}"
    function = "md5" | "sha1" | "sha224" | "sha256" | "sha384" | "sha512" | "blake2b" | "blake2s"

A function returns hexadecimal digits. ``[:16]`` keeps the first 16 of them. In a string, ``{{`` and ``}}`` are braces.
The escapes are ``\\\\``, ``\\"``, ``\\'``, ``\\n``, ``\\t`` and ``\\0``. Nothing in a template is evaluated as code.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal, TypeAlias

from embedonce.errors import ConfigError
from embedonce.options import Doc

Step: TypeAlias = Literal["strip", "lower", "squeeze"]

KeyOption: TypeAlias = Annotated[
    str,
    Doc(
        'How the other program makes a key from a text, such as sha256("{model}|{text}")[:16] or '
        '"embed:{model}:" + sha256("{text}"). Functions: md5, sha1, sha224, sha256, sha384, sha512, blake2b, blake2s. '
        "Fields: {text}, {model}."
    ),
]
ModelOption: TypeAlias = Annotated[
    str | None, Doc("Name of the model as the other program writes it into its keys, for {model} in the option key.")
]
StepsOption: TypeAlias = Annotated[
    Sequence[Step],
    Doc(
        "What the other program does to a text before it makes the key. strip: text.strip(). lower: text.lower(). "
        'squeeze: " ".join(text.split()). Texts that differ only in this get the same vector, as in that program.'
    ),
]

LEAST_DIGITS = 16
"""Minimum number of hexadecimal digits of a hash that a key must keep. With 16 digits and a million vectors, a text
gets the vector of another text once in 10**13 lookups. With 8 digits, this would happen once in 4,000 lookups."""

_HASHES: Mapping[str, Callable[[bytes], str]] = {
    "md5": lambda data: hashlib.md5(data, usedforsecurity=False).hexdigest(),
    "sha1": lambda data: hashlib.sha1(data, usedforsecurity=False).hexdigest(),
    "sha224": lambda data: hashlib.sha224(data).hexdigest(),
    "sha256": lambda data: hashlib.sha256(data).hexdigest(),
    "sha384": lambda data: hashlib.sha384(data).hexdigest(),
    "sha512": lambda data: hashlib.sha512(data).hexdigest(),
    "blake2b": lambda data: hashlib.blake2b(data).hexdigest(),
    "blake2s": lambda data: hashlib.blake2s(data).hexdigest(),
}
_STEPS: Mapping[str, Callable[[str], str]] = {
    "strip": str.strip,
    "lower": str.lower,
    "squeeze": lambda text: " ".join(text.split()),
}
_ESCAPES: Mapping[str, str] = {"\\": "\\", '"': '"', "'": "'", "n": "\n", "t": "\t", "0": "\0"}

_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SLICE = re.compile(r"\[\s*:\s*([0-9]{1,3})\s*\]")
_FIELD = re.compile(r"\{([^{}\"']*)\}")
_SPACE = re.compile(r"[ \t]*")

MAX_LENGTH = 1000
MAX_DEPTH = 8
"""Maximum numbers of characters, and of functions inside functions, in a template."""


@dataclass(frozen=True, slots=True)
class _Literal:
    value: str

    def build(self, text: str) -> str:
        return self.value


@dataclass(frozen=True, slots=True)
class _Text:
    def build(self, text: str) -> str:
        return text


@dataclass(frozen=True, slots=True)
class _Hash:
    function: Callable[[bytes], str]
    parts: tuple[_Part, ...]
    digits: int | None

    def build(self, text: str) -> str:
        content = "".join([part.build(text) for part in self.parts])
        # A text that has no UTF-8 form has no key in the other program either. Its key here is that of no text.
        return self.function(content.encode("utf-8", "surrogatepass"))[: self.digits]


_Part: TypeAlias = _Literal | _Text | _Hash


class KeyTemplate:
    """A parsed template, which makes the key of a text."""

    def __init__(self, template: str, *, model: str | None = None, steps: Sequence[Step] = ()) -> None:
        """Parse the options ``key``, ``model`` and ``steps``.

        Raises:
            ConfigError: one of them is invalid; the message has the column in the template.
        """
        if isinstance(steps, str) or not all(step in _STEPS for step in steps):
            raise ConfigError("steps must be a list of these names: strip, lower, squeeze")
        parser = _Parser(template, model)
        parts = parser.parse()
        if model is not None and not parser.has_model:
            raise ConfigError("key does not use {model}; remove the option model, or add {model} to key")
        if not parser.has_text:
            raise ConfigError("key does not use {text}, so all texts would have the same key; add {text}")
        self._parts = parts
        self._steps = tuple(_STEPS[step] for step in steps)
        self._name = f"key {template}" + (f", model {model}" if model else "")
        self._name += f", steps {', '.join(steps)}" if steps else ""

    @property
    def has_steps(self) -> bool:
        """Whether several texts may have the same key."""
        return bool(self._steps)

    @property
    def is_hash(self) -> bool:
        """Whether the key is one hash and nothing else."""
        return len(self._parts) == 1 and isinstance(self._parts[0], _Hash)

    @property
    def ends_with_text(self) -> bool:
        """Whether the last characters of the key are those of the text."""
        return isinstance(self._parts[-1], _Text)

    @property
    def name(self) -> str:
        """The options that determine the keys, for the name of a source."""
        return self._name

    def make_key(self, text: str) -> str:
        """Return the key of a text."""
        for step in self._steps:
            text = step(text)
        return "".join([part.build(text) for part in self._parts])

    def group_by_key(self, texts: Sequence[str]) -> dict[str, list[str]]:
        """Return the texts by their keys. With steps, several texts may have the same key.

        Texts with a lone surrogate are left out: they have no UTF-8, so the other program cannot have stored them.
        """
        groups: dict[str, list[str]] = {}
        for text in texts:
            if has_utf8(text):
                groups.setdefault(self.make_key(text), []).append(text)
        return groups


def has_utf8(text: str) -> bool:
    """Return whether a text can be encoded. A text with a lone surrogate cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Parser:
    def __init__(self, template: str, model: str | None) -> None:
        if not isinstance(template, str) or not template.strip():
            raise ConfigError('key must be a template such as sha256("{text}")')
        if len(template) > MAX_LENGTH:
            raise ConfigError(f"key must have at most {MAX_LENGTH:,} characters")
        self.template = template
        self.model = model
        self.position = 0
        self.has_text = False
        self.has_model = False

    def parse(self) -> tuple[_Part, ...]:
        parts = self._parse_sum(0)
        if self.position < len(self.template):
            raise self._report("expected + or the end")
        return parts

    def _parse_sum(self, depth: int) -> tuple[_Part, ...]:
        if depth > MAX_DEPTH:
            raise self._report(f"at most {MAX_DEPTH} functions may be inside each other")
        parts = list(self._parse_part(depth))
        while self._skip("+"):
            parts += self._parse_part(depth)
        return tuple(parts)

    def _parse_part(self, depth: int) -> Sequence[_Part]:
        self._skip_space()
        quote = self.template[self.position : self.position + 1]
        if quote in ('"', "'"):
            self.position += 1
            strings = self._parse_string(quote)
            if self._peek("["):
                raise self._report("only a hash can be cut: a key from a part of the text would fit several texts")
            return strings
        word = _WORD.match(self.template, self.position)
        if word is None:
            raise self._report('expected a string in quotes such as "{text}", or a hash function')
        function = _HASHES.get(word[0])
        if function is None:
            if word[0] in ("text", "model"):
                raise self._report(f'write "{{{word[0]}}}", in quotes and braces')
            raise self._report(f"unknown function; use one of {', '.join(_HASHES)}")
        self.position = word.end()
        if not self._skip("("):
            raise self._report("expected ( after the function")
        parts = self._parse_sum(depth + 1)
        if not self._skip(")"):
            raise self._report("expected + or )")
        return [_Hash(function, tuple(parts), self._parse_slice(len(function(b""))))]

    def _parse_slice(self, size: int) -> int | None:
        if not self._peek("["):
            return None
        found = _SLICE.match(self.template, self.position)
        if found is None:
            raise self._report("expected a slice such as [:16]")
        digits = int(found[1])
        if digits < LEAST_DIGITS:
            raise self._report(
                f"keep at least {LEAST_DIGITS} digits of a hash: with fewer, a text may get the vector of another text"
            )
        if digits > size:
            raise self._report(f"this hash has only {size} digits")
        self.position = found.end()
        return digits

    def _parse_string(self, quote: str) -> list[_Part]:
        start = self.position - 1
        parts: list[_Part] = []
        while (character := self.template[self.position : self.position + 1]) != quote:
            if not character:
                self.position = start
                raise self._report("this string has no end")
            if character == "\\":
                escape = self.template[self.position + 1 : self.position + 2]
                if escape not in _ESCAPES or not escape:
                    raise self._report(r"unknown escape; known are \\, \", \', \n, \t and \0")
                parts.append(_Literal(_ESCAPES[escape]))
                self.position += 2
            elif self.template.startswith(("{{", "}}"), self.position):
                parts.append(_Literal(character))
                self.position += 2
            elif character == "{":
                parts.append(self._parse_field())
            elif character == "}":
                raise self._report("a single }; write }} for a brace")
            else:
                parts.append(_Literal(character))
                self.position += 1
        self.position += 1
        return _merge(parts)

    def _parse_field(self) -> _Part:
        field = _FIELD.match(self.template, self.position)
        if field is None or field[1] not in ("text", "model"):
            raise self._report("unknown field; the fields are {text} and {model}. Write {{ for a brace")
        if field[1] == "model":
            if self.model is None:
                raise self._report("{model} needs the option model, which is the name of the model in the keys")
            self.has_model = True
        self.has_text = self.has_text or field[1] == "text"
        self.position = field.end()
        return _Text() if field[1] == "text" else _Literal(self.model or "")

    def _skip_space(self) -> None:
        found = _SPACE.match(self.template, self.position)
        self.position = found.end() if found else self.position

    def _peek(self, symbol: str) -> bool:
        self._skip_space()
        return self.template.startswith(symbol, self.position)

    def _skip(self, symbol: str) -> bool:
        if self._peek(symbol):
            self.position += len(symbol)
            return True
        return False

    def _report(self, problem: str) -> ConfigError:
        return ConfigError(f"key, column {self.position + 1}: {problem}")


def _merge(parts: Sequence[_Part]) -> list[_Part]:
    """Join literals that follow each other."""
    merged: list[_Part] = []
    for part in parts:
        last = merged[-1] if merged else None
        if isinstance(part, _Literal) and isinstance(last, _Literal):
            merged[-1] = _Literal(last.value + part.value)
        else:
            merged.append(part)
    return merged
