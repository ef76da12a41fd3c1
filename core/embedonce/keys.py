"""What makes two requests the same: vector space, key policy, scope, key.

Everything that is hashed is first written in a canonical form in which every value carries its type
and its length, so that no two different values have the same bytes. ``docs/keys.md`` gives the form
byte by byte; a test recomputes its worked examples from that page alone.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import struct
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeAlias

from ._reprs import html_table, short
from .errors import ConfigError, SpaceError, TextError

KEY_PREFIX = "eo1."
"""First characters of every key; the 1 is the version of the key format."""

CARD_PREFIX = "eo1.card."
"""First characters of the keys of space cards. A scope is 16 hex digits, so it is never ``card``."""

LEASE_PREFIX = "eo1.lease."
"""First characters of the keys of leases: ``eo1.lease.<scope>.<digest>``."""

Value: TypeAlias = "bool | int | float | str | bytes | Sequence[Value] | Mapping[str, Value] | None"


def canonical(value: Value) -> bytes:
    """Return the canonical bytes of a value: its type, its length, its content.

    ========  ==========================================================
    None      ``n``
    bool      ``t`` or ``f``
    int       ``i`` length ``:`` decimal digits
    float     ``d`` and eight bytes, IEEE 754, big-endian; -0.0 as 0.0
    str       ``s`` length ``:`` UTF-8
    bytes     ``b`` length ``:`` the bytes
    list      ``l`` count ``:`` the items
    mapping   ``m`` count ``:`` key, value, … in order of the keys' UTF-8
    ========  ==========================================================

    Raises:
        SpaceError: a value of another type, NaN, or a string with a lone surrogate.
    """
    if value is None:
        return b"n"
    if value is True:
        return b"t"
    if value is False:
        return b"f"
    if isinstance(value, int):
        return _sized(b"i", _digits(value))
    if isinstance(value, float):
        if math.isnan(value):
            raise SpaceError("a vector space cannot hold NaN: it is not equal to itself")
        return b"d" + struct.pack(">d", value + 0.0)
    if isinstance(value, str):
        return _sized(b"s", _utf8(value))
    if isinstance(value, bytes | bytearray | memoryview):  # the last two would pass for a list of integers
        return _sized(b"b", bytes(value))
    if isinstance(value, Mapping):
        pairs = []
        for key, item in value.items():
            if not isinstance(key, str):
                raise SpaceError(f"a vector space's mappings have strings as keys, not {type(key).__name__}")
            pairs.append((_utf8(key), canonical(item)))
        pairs.sort()
        return b"m%d:" % len(pairs) + b"".join(_sized(b"s", key) + item for key, item in pairs)
    if isinstance(value, Sequence):
        return b"l%d:" % len(value) + b"".join(canonical(item) for item in value)
    raise SpaceError(
        f"a vector space is described with None, bool, int, float, str, bytes, lists and mappings, "
        f"not {type(value).__name__}"
    )


def _sized(tag: bytes, content: bytes) -> bytes:
    return b"%b%d:%b" % (tag, len(content), content)


def _digits(value: int) -> bytes:
    try:
        return b"%d" % value
    except ValueError:  # more digits than Python converts; how many is a setting of the process
        raise SpaceError("a vector space cannot hold an integer of thousands of digits") from None


def _utf8(value: str) -> bytes:
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise SpaceError("a vector space's strings are Unicode without lone surrogates") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorSpace:
    """Everything that decides which vector a text gets, described by the provider.

    A field that is None is left out of the fingerprint, so that a field added later changes no
    existing one. Device, batch size, timeouts, API keys and credentials have no place here.
    """

    provider: str
    model: str
    task: str | None = None
    """Set by a provider that embeds queries and documents differently; None: symmetric."""
    endpoint: str | None = None
    """URL without credentials, or an ``endpoint_name`` that stands for it."""
    revision: str | None = None
    """A fixed one: ``main`` or ``latest`` is resolved before it gets here."""
    precision: str | None = None
    adapters: Sequence[str] | None = None
    dimensions: int | None = None
    """Of the vectors; None where the provider cannot tell without loading its model."""
    pooling: str | None = None
    tokenizer: str | None = None
    max_length: int | None = None
    truncate: str | None = None
    """``"error"`` or ``"provider"``: what happens to a text that is too long."""
    prompt: str | None = None
    prefix: str | None = None
    suffix: str | None = None
    normalize: bool | None = None
    """Whether vectors are scaled to length 1."""
    extra: Mapping[str, Value] | None = None
    """Request fields beyond these that reach the model."""
    space_version: int | str | None = None
    """Raised by a plugin whose vectors change though nothing above does."""

    def __post_init__(self) -> None:
        if not isinstance(self.provider, str) or not self.provider or not isinstance(self.model, str):
            raise SpaceError("a vector space names at least its provider and its model")

    @classmethod
    def of(cls, value: VectorSpace | Mapping[str, Any]) -> VectorSpace:
        """Return ``value`` as a vector space; names that are not fields of it go to ``extra``."""
        if isinstance(value, VectorSpace):
            return value
        if not isinstance(value, Mapping) or not value:
            raise SpaceError('a vector space is a mapping with at least a model, such as {"model": "my-model-v2"}')
        known = {f.name for f in fields(cls)}
        named = {name: item for name, item in value.items() if name in known}
        more = {name: item for name, item in value.items() if name not in known}
        if more:
            named["extra"] = {**(named.get("extra") or {}), **more}
        if not named.get("model"):
            raise SpaceError('a vector space says at least which model made its vectors: {"model": "my-model-v2"}')
        return cls(**{"provider": "callable", **named})

    def described(self) -> dict[str, Value]:
        """Return the fields that are set, by name."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    def __repr__(self) -> str:
        return f"VectorSpace({', '.join(f'{name}={short(value)}' for name, value in self.described().items())})"

    def _repr_html_(self) -> str:
        """Return a table of the fields that are set, for notebooks."""
        return html_table("VectorSpace", ("field", "value"), [(name, short(v)) for name, v in self.described().items()])

    def fingerprint(self) -> bytes:
        """Return the SHA-256 (32 bytes) of the space's canonical form."""
        return hashlib.sha256(b"embedonce/space/1" + canonical(self.described())).digest()


def canonical_url(url: str) -> str:
    """Return a URL without what makes no other endpoint of it: credentials, case, a default port, a last slash.

    Raises:
        ValueError: it is no URL of an endpoint.
    """
    from urllib.parse import urlsplit  # some milliseconds, which most programs need not spend

    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError("an endpoint's URL is https://HOST/PATH, without ? and #")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    usual = {"http": 80, "https": 443}[parts.scheme]
    port = "" if parts.port in (None, usual) else f":{parts.port}"
    return f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}"


def _is_unicode(value: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in value)


# --- normalisation ----------------------------------------------------------------------------


def _nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def _nfkc(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def _collapse_whitespace(text: str) -> str:
    return " ".join(text.split())


def _newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


NORMALIZERS: dict[str, Callable[[str], str]] = {
    "nfc": _nfc,
    "nfkc": _nfkc,
    "strip": str.strip,
    "collapse-whitespace": _collapse_whitespace,
    "casefold": str.casefold,
    "newlines": _newlines,
}
"""The normalisation steps that come with embedonce, by the name that TOML says."""


# --- key policy -------------------------------------------------------------------------------

Hash: TypeAlias = Literal["sha256", "blake2b"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyPolicy:
    """What makes two requests the same, beside the vector space and the text.

    ``normalize`` changes the text that is embedded, not the key alone: equal keys mean equal embedded
    text. It is therefore not part of the key: two policies that bring a text to the same form share
    the entry.
    """

    normalize: Sequence[str] = ()
    """Steps by name, applied in this order. See :data:`NORMALIZERS`; plugins add more."""
    version: str = "v1"
    """Raise it to leave all old vectors behind."""
    namespace: str = ""
    """Keeps tenants or projects apart in one store."""
    hash: Hash = "sha256"
    secret: str | bytes | None = field(default=None, repr=False)
    """Makes the digest a keyed one, so that nobody who reads the keys can guess short texts."""

    def __post_init__(self) -> None:
        if isinstance(self.normalize, str):
            raise ConfigError(f'normalize is a list of steps: ["{self.normalize}"]')
        object.__setattr__(self, "normalize", tuple(self.normalize))
        if self.hash not in ("sha256", "blake2b"):
            raise ConfigError(f'hash is "sha256" or "blake2b", not {self.hash!r}')
        for name, value in (("version", self.version), ("namespace", self.namespace)):
            if not isinstance(value, str):
                raise ConfigError(f"{name} is a string, not {type(value).__name__}")
            if not _is_unicode(value):
                raise ConfigError(f"{name} has a lone surrogate; it is not valid Unicode")
        if isinstance(self.secret, str) and not _is_unicode(self.secret):
            raise ConfigError("secret has a lone surrogate; give bytes for a secret that is not text")
        if self.secret is not None and len(self._secret()) == 0:
            raise ConfigError("secret is empty; leave it out for keys without one")
        if self.secret is not None and self.hash == "blake2b" and len(self._secret()) > 64:
            raise ConfigError('hash = "blake2b" takes a secret of at most 64 bytes')

    def _secret(self) -> bytes:
        return self.secret.encode() if isinstance(self.secret, str) else (self.secret or b"")

    def secret_id(self) -> bytes | None:
        """Return 16 bytes that name the secret without telling it; None where there is none."""
        if self.secret is None:
            return None
        # The secret is the message here: as an HMAC key, one that ends in NUL would have the id of a shorter one.
        return hmac.digest(b"embedonce/secret-id/1", self._secret(), "sha256")[:16]

    def scope(self, space: VectorSpace) -> str:
        """Return the 16 hex digits under which everything of this policy and space is listed and purged."""
        parts = {
            "namespace": self.namespace,
            "version": self.version,
            "secret": self.secret_id(),
            "space": space.fingerprint(),
        }
        return hashlib.sha256(b"embedonce/scope/1" + canonical(parts)).hexdigest()[:16]


class Keyer:
    """Turns texts into keys for one policy and one vector space.

    The digest is the policy's hash over ``embedonce/text/1``, the space's fingerprint (32 bytes) and
    the normalised text (UTF-8, the rest). With a secret it is HMAC-SHA-256, or BLAKE2b's own keyed mode.
    """

    __slots__ = ("_digest", "_steps", "fingerprint", "prefix", "scope", "space")

    def __init__(self, policy: KeyPolicy, space: VectorSpace, steps: Sequence[Callable[[str], str]] = ()) -> None:
        self.space = space
        self.scope = policy.scope(space)
        self.fingerprint = space.fingerprint()
        self.prefix = f"{KEY_PREFIX}{self.scope}."
        self._steps = tuple(steps)
        self._digest = _digest(policy, b"embedonce/text/1" + self.fingerprint)

    @property
    def card_key(self) -> str:
        """The key of this scope's space card."""
        return CARD_PREFIX + self.scope

    def normalize(self, text: str) -> str:
        """Return what is embedded for ``text``."""
        for step in self._steps:
            text = step(text)
        return text

    def key(self, normalized: str) -> str:
        """Return the key of a normalised text: ``eo1.<scope>.<digest>``, 85 characters.

        Raises:
            TextError: the text has a lone surrogate, which no encoding and no provider takes.
        """
        try:
            return self.prefix + self._digest(normalized.encode())
        except UnicodeEncodeError as error:
            raise TextError(
                f"the text has a lone surrogate at character {error.start}; it is not valid Unicode. "
                "Read its source with the right encoding, or replace such characters before embedding"
            ) from None


def _digest(policy: KeyPolicy, prefix: bytes) -> Callable[[bytes], str]:
    """Return the function from a text's bytes to 64 hex digits; one closure per policy keeps it at one call."""
    secret = policy._secret()
    if policy.hash == "blake2b":
        start = hashlib.blake2b(prefix, digest_size=32, key=secret)

        def blake2b(data: bytes) -> str:
            hasher = start.copy()
            hasher.update(data)
            return hasher.hexdigest()

        return blake2b
    if policy.secret is not None:
        return lambda data: hmac.digest(secret, prefix + data, "sha256").hex()
    sha256 = hashlib.sha256
    return lambda data: sha256(prefix + data).hexdigest()


def card(policy: KeyPolicy, space: VectorSpace) -> dict[str, Any]:
    """Return the space card of a scope: what ``stats`` and ``purge`` need to name it, and no text."""
    described = space.described()
    return {
        "provider": described.get("provider"),
        "model": described.get("model"),
        "task": described.get("task"),
        "dimensions": described.get("dimensions"),
        "version": policy.version,
        "namespace": policy.namespace,
    }
