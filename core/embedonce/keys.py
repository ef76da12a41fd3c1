"""Vector spaces, key policies and keys, which determine which requests share a vector.

Values are hashed in a canonical form. Each value carries its type and its length, so different values never have the
same bytes. ``docs/keys.md`` gives the form byte by byte. A test implements the form a second time, from that page
alone, and checks the page's examples.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import struct
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeAlias, get_args

from ._reprs import make_html_table, shorten
from .batch_settings import refuse_batch_settings
from .errors import ConfigError, SpaceError, TextError

KEY_PREFIX = "eo1."
"""First characters of every key; the 1 is the version of the key format."""

CARD_PREFIX = "eo1.card."
"""First characters of the keys of space cards. The key of an entry has 16 hex digits in the place of ``card``."""

SERVED_MODEL = "served_model"
"""Part of a space card: the name of the model according to the first answer of the provider that named one."""

SETTINGS = "settings"
"""The part of a space card that has a digest of each other setting of the space, by name."""

FINGERPRINT = "fingerprint"
"""The part of a space card that has the fingerprint of the space, from which the keys of texts can be made."""

LEASE_PREFIX = "eo1.lease."
"""First characters of the keys of leases: ``eo1.lease.<scope>.<digest>``."""

SAVINGS_PREFIX = "eo1.savings."
"""First characters of the keys of records of savings: ``eo1.savings.<yyyymmdd>.<scope>.<process>``."""

IMPORT_PREFIX = "eo1.import."
"""First characters of the keys of results of verifications: ``eo1.import.<scope>.<hash of the source>``."""

Value: TypeAlias = "bool | int | float | str | bytes | Sequence[Value] | Mapping[str, Value] | None"

SpaceCard: TypeAlias = Mapping[str, Value]
"""What a scope contains: ``provider``, ``model``, ``task``, ``dimensions``, ``version``, ``namespace`` and more."""


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
        SpaceError: a value is NaN, is a string with a lone surrogate, or has a type that is not in this table.
    """
    if value is None:
        return b"n"
    if value is True:
        return b"t"
    if value is False:
        return b"f"
    if isinstance(value, int):
        return _encode_sized(b"i", _encode_digits(value))
    if isinstance(value, float):
        if math.isnan(value):
            raise SpaceError("a vector space cannot contain NaN, because NaN is not equal to itself")
        return b"d" + struct.pack(">d", value + 0.0)
    if isinstance(value, str):
        return _encode_sized(b"s", _encode_utf8(value))
    # All three types are Sequences, so this check comes before the check for Sequence.
    if isinstance(value, bytes | bytearray | memoryview):
        return _encode_sized(b"b", bytes(value))
    if isinstance(value, Mapping):
        pairs = []
        for key, item in value.items():
            if not isinstance(key, str):
                raise SpaceError(f"mappings in a vector space must have string keys, got {type(key).__name__}")
            pairs.append((_encode_utf8(key), canonical(item)))
        pairs.sort()
        return b"m%d:" % len(pairs) + b"".join(_encode_sized(b"s", key) + item for key, item in pairs)
    if isinstance(value, Sequence):
        return b"l%d:" % len(value) + b"".join(canonical(item) for item in value)
    raise SpaceError(
        f"a vector space may contain None, bool, int, float, str, bytes, lists and mappings, got {type(value).__name__}"
    )


def _encode_sized(tag: bytes, content: bytes) -> bytes:
    return b"%b%d:%b" % (tag, len(content), content)


def _encode_digits(value: int) -> bytes:
    try:
        return b"%d" % value
    except ValueError:  # Python converts only a limited number of digits; each process may set the limit
        raise SpaceError("a vector space cannot contain an integer with thousands of digits") from None


def _encode_utf8(value: str) -> bytes:
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise SpaceError("a string in a vector space has a lone surrogate; it is not valid Unicode") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorSpace:
    """Everything that determines which vector a text gets, as described by the provider.

    The fingerprint leaves out fields that are None, so a new field of this class changes no fingerprint while the
    field is None. Device, batch size, timeouts, API keys and credentials do not belong here.
    """

    provider: str
    model: str
    task: str | None = None
    """The task, if the provider embeds queries and documents differently; otherwise None."""
    endpoint: str | None = None
    """URL without credentials, or the ``endpoint_name`` that replaces it."""
    revision: str | None = None
    """A fixed revision. The provider resolves names such as ``main`` or ``latest`` to a fixed revision first."""
    precision: str | None = None
    adapters: Sequence[str] | None = None
    dimensions: int | None = None
    """Number of dimensions; None if the provider would have to load its model to find out."""
    pooling: str | None = None
    tokenizer: str | None = None
    max_length: int | None = None
    truncate: str | None = None
    """How a text that is too long is handled: ``"error"`` refuses the text, ``"provider"`` lets the provider cut it."""
    prompt: str | None = None
    prefix: str | None = None
    suffix: str | None = None
    normalize: bool | None = None
    """Whether vectors are scaled to unit length."""
    extra: Mapping[str, Value] | None = None
    """Other request fields that are passed to the model. A field that makes a vector depend on the other texts of its
    batch raises :class:`~embedonce.errors.SpaceError` (see :mod:`embedonce.batch_settings`)."""
    space_version: int | str | None = None
    """Version that a plugin increases when its vectors change although no other field changes."""

    def __post_init__(self) -> None:
        if not isinstance(self.provider, str) or not self.provider or not isinstance(self.model, str):
            raise SpaceError("a vector space must name its provider and its model")
        refuse_batch_settings(self.extra)

    @classmethod
    def of(cls, value: VectorSpace | Mapping[str, Any]) -> VectorSpace:
        """Return ``value`` as a vector space; names that are not fields go to ``extra``."""
        if isinstance(value, VectorSpace):
            return value
        if not isinstance(value, Mapping) or not value:
            raise SpaceError('a vector space must be a mapping with at least a model, such as {"model": "my-model-v2"}')
        known = {f.name for f in fields(cls)}
        named = {name: item for name, item in value.items() if name in known}
        more = {name: item for name, item in value.items() if name not in known}
        if more:
            named["extra"] = {**(named.get("extra") or {}), **more}
        if not named.get("model"):
            raise SpaceError('a vector space must name the model that made its vectors: {"model": "my-model-v2"}')
        return cls(**{"provider": "callable", **named})

    def described(self) -> dict[str, Value]:
        """Return the fields that are set, by name."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    def __repr__(self) -> str:
        return f"VectorSpace({', '.join(f'{name}={shorten(value)}' for name, value in self.described().items())})"

    def _repr_html_(self) -> str:
        """Return a table of the fields that are set, for notebooks."""
        return make_html_table(
            "VectorSpace", ("field", "value"), [(name, shorten(v)) for name, v in self.described().items()]
        )

    def fingerprint(self) -> bytes:
        """Return the SHA-256 (32 bytes) of the space's canonical form."""
        return hashlib.sha256(b"embedonce/space/1" + canonical(self.described())).digest()


def canonical_url(url: str) -> str:
    """Return a URL without the parts that do not change the endpoint.

    Credentials, the default port and a trailing slash are removed. Scheme and host are converted to lower case.

    Raises:
        ValueError: ``url`` is not the URL of an endpoint.
    """
    from urllib.parse import urlsplit  # this import takes milliseconds, and most programs do not need it

    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise ValueError("an endpoint's URL must have the form https://HOST/PATH, without ? or #")
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


def _surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        # In UTF-16, a pair of surrogates is the same two units as the character that it stands for.
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


NORMALIZERS: dict[str, Callable[[str], str]] = {
    "nfc": _nfc,
    "nfkc": _nfkc,
    "strip": str.strip,
    "collapse-whitespace": _collapse_whitespace,
    "casefold": str.casefold,
    "newlines": _newlines,
    "surrogates": _surrogates,
}
"""The normalisation steps that come with embedonce, by their name in TOML."""


# --- key policy -------------------------------------------------------------------------------

Hash: TypeAlias = Literal["sha256", "blake2b"]

MAX_BLAKE2B_SECRET = 64
"""Maximum number of bytes of a secret with the hash ``"blake2b"``."""


def extend_namespace(namespace: str, name: str) -> str:
    """Return the namespace ``name`` inside of another namespace.

    Raises:
        ValueError: ``name`` is empty, has a ``/`` (two different pairs could then be equal), or is not valid Unicode.
    """
    if not isinstance(name, str) or not name:
        raise ValueError("a namespace must be a str that is not empty")
    if "/" in name:
        raise ValueError('a namespace must not contain "/", which separates it from the namespace of the key policy')
    if not _is_unicode(name):
        raise ValueError("the namespace has a lone surrogate; it is not valid Unicode")
    return f"{namespace}/{name}" if namespace else name


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyPolicy:
    """The settings that, with the vector space and the text, determine which requests share a vector.

    ``normalize`` changes the text that is embedded, not only the key. A key depends on the normalised text, but not on
    the steps. So two policies that differ only in their steps share an entry if both policies normalise the text to the
    same result.
    """

    normalize: Sequence[str] = ()
    """Names of the steps, in the order in which they are applied. See :data:`NORMALIZERS`; plugins add more."""
    version: str = "v1"
    """Part of every key. With a new version, all vectors that were stored under the old version are ignored."""
    namespace: str = ""
    """Part of every key. It separates tenants or projects that share a store."""
    hash: Hash = "sha256"
    secret: str | bytes | None = field(default=None, repr=False)
    """Secret of a keyed hash. Only someone who knows the secret can guess short texts from the keys in a store."""

    def __post_init__(self) -> None:
        if isinstance(self.normalize, str):
            raise ConfigError(f'normalize must be a list of steps, such as ["{self.normalize}"]')
        object.__setattr__(self, "normalize", tuple(self.normalize))
        if self.hash not in ("sha256", "blake2b"):
            raise ConfigError(f'hash must be "sha256" or "blake2b", got {self.hash!r}')
        for name, value in (("version", self.version), ("namespace", self.namespace)):
            if not isinstance(value, str):
                raise ConfigError(f"{name} must be a string, got {type(value).__name__}")
            if not _is_unicode(value):
                raise ConfigError(f"{name} has a lone surrogate; it is not valid Unicode")
        if isinstance(self.secret, str) and not _is_unicode(self.secret):
            raise ConfigError("secret has a lone surrogate; give bytes for a secret that is not text")
        if self.secret is not None and len(self._secret_bytes()) == 0:
            raise ConfigError("secret must not be empty; to use no secret, remove the option")
        if self.secret is not None and self.hash == "blake2b" and len(self._secret_bytes()) > MAX_BLAKE2B_SECRET:
            raise ConfigError('secret must be at most 64 bytes with hash = "blake2b"; shorten it or use "sha256"')

    def _secret_bytes(self) -> bytes:
        return self.secret.encode() if isinstance(self.secret, str) else (self.secret or b"")

    def secret_id(self) -> bytes | None:
        """Return 16 bytes that identify the secret without revealing it; None without a secret."""
        if self.secret is None:
            return None
        # The secret is the message, not the HMAC key: HMAC pads its key with NUL bytes, so a secret that ends in NUL
        # would have the same id as the secret without this NUL.
        return hmac.digest(b"embedonce/secret-id/1", self._secret_bytes(), "sha256")[:16]

    def scope(self, space: VectorSpace) -> str:
        """Return the scope of this policy and ``space``, as 16 hex digits.

        All keys of this policy and space contain the scope. Entries are listed and purged by scope.
        """
        return _make_scope(self, self.namespace, self.version, space.fingerprint())


def _make_scope(policy: KeyPolicy, namespace: Value, version: Value, fingerprint: bytes) -> str:
    parts = {"namespace": namespace, "version": version, "secret": policy.secret_id(), "space": fingerprint}
    return hashlib.sha256(b"embedonce/scope/1" + canonical(parts)).hexdigest()[:16]


class Keyer:
    """Turns texts into keys for one policy and one vector space.

    The digest is the policy's hash of three parts, joined: ``embedonce/text/1``, the space's fingerprint (32 bytes),
    and the normalised text in UTF-8. With a secret, the hash is HMAC-SHA-256, or BLAKE2b in its keyed mode.
    """

    __slots__ = ("_digest", "_digest_all", "_steps", "fingerprint", "prefix", "scope", "space")

    def __init__(self, policy: KeyPolicy, space: VectorSpace, steps: Sequence[Callable[[str], str]] = ()) -> None:
        self.space = space
        self.scope = policy.scope(space)
        self.fingerprint = space.fingerprint()
        self.prefix = f"{KEY_PREFIX}{self.scope}."
        self._steps = tuple(steps)
        self._digest, self._digest_all = _make_digest(policy, b"embedonce/text/1" + self.fingerprint)

    @property
    def card_key(self) -> str:
        """The key of this scope's space card."""
        return CARD_PREFIX + self.scope

    def normalize(self, text: str) -> str:
        """Return the normalised text, which is embedded in place of ``text``."""
        for step in self._steps:
            text = step(text)
        return text

    @property
    def changes_texts(self) -> bool:
        """Whether there are normalisation steps. Without steps, a text is its own normalised text."""
        return bool(self._steps)

    def keys(self, normalized: Iterable[str]) -> list[str]:
        """Return the key of each normalised text. This takes less time than :meth:`key` for each text.

        Raises:
            UnicodeEncodeError: a text has a lone surrogate.
        """
        prefix = self.prefix
        return [prefix + digest for digest in self._digest_all(map(str.encode, normalized))]

    def key(self, normalized: str) -> str:
        """Return the key of a normalised text: ``eo1.<scope>.<digest>``, 85 characters.

        Raises:
            TextError: the text has a lone surrogate, which UTF-8 cannot encode.
        """
        try:
            return self.prefix + self._digest(normalized.encode())
        except UnicodeEncodeError as error:
            raise TextError(
                f"the text has a lone surrogate at character {error.start}; it is not valid Unicode. "
                'Read its source with the right encoding, or add "surrogates" to [key] normalize to replace every lone '
                "surrogate"
            ) from None


def _make_digest(
    policy: KeyPolicy, prefix: bytes
) -> tuple[Callable[[bytes], str], Callable[[Iterable[bytes]], list[str]]]:
    """Return a function that turns a text's bytes into 64 hex digits, and a function that does so for many texts.

    The hash is chosen here and not for each text, so that hashing a text is one call.
    """
    secret = policy._secret_bytes()
    if policy.hash == "blake2b":
        start = hashlib.blake2b(prefix, digest_size=32, key=secret)

        def blake2b(data: bytes) -> str:
            hasher = start.copy()
            hasher.update(data)
            return hasher.hexdigest()

        return blake2b, lambda items: list(map(blake2b, items))
    if policy.secret is not None:
        return (
            lambda data: hmac.digest(secret, prefix + data, "sha256").hex(),
            lambda items: [hmac.digest(secret, prefix + data, "sha256").hex() for data in items],
        )
    sha256 = hashlib.sha256
    return (
        lambda data: sha256(prefix + data).hexdigest(),
        lambda items: [sha256(prefix + data).hexdigest() for data in items],
    )


def card(policy: KeyPolicy, space: VectorSpace) -> dict[str, Any]:
    """Return the space card, which describes a scope for ``stats``, ``purge`` and ``explain``. It contains no text.

    The engine adds :data:`SERVED_MODEL` as soon as an answer names its model.
    """
    described = space.described()
    return {
        "provider": described.get("provider"),
        "model": described.get("model"),
        "task": described.get("task"),
        "dimensions": described.get("dimensions"),
        "version": policy.version,
        "namespace": policy.namespace,
        SETTINGS: _digest_settings(policy, described),
        FINGERPRINT: _hide_fingerprint(policy, policy.scope(space), space.fingerprint()).hex(),
    }


def _hide_fingerprint(policy: KeyPolicy, scope: str, fingerprint: bytes) -> bytes:
    """Return the fingerprint as it stands in a card. Applied twice, the function returns the fingerprint itself.

    With a secret in the policy, only someone who knows it can read the fingerprint. Others could otherwise check
    whether they have guessed the settings of the space.
    """
    if policy.secret is None:
        return fingerprint
    mask = hmac.digest(policy._secret_bytes(), b"embedonce/fingerprint/1" + scope.encode(), "sha256")
    return bytes(a ^ b for a, b in zip(fingerprint, mask, strict=True))


def read_fingerprint(policy: KeyPolicy, scope: str, card: Mapping[str, Value]) -> bytes | None:
    """Return the fingerprint (32 bytes) of a scope's vector space, according to the scope's card.

    Return None if the card does not show it: an earlier embedonce has written the card, or the scope belongs to another
    secret than that of the policy. The policy's namespace and version do not matter.
    """
    hidden, namespace, version = card.get(FINGERPRINT), card.get("namespace"), card.get("version")
    try:
        fingerprint = _hide_fingerprint(policy, scope, bytes.fromhex(hidden if isinstance(hidden, str) else ""))
        is_own = _make_scope(policy, namespace, version, fingerprint) == scope
    except (ValueError, SpaceError):  # another program may have stored anything as a card
        return None
    return fingerprint if is_own else None


def make_digests(policy: KeyPolicy, fingerprint: bytes, normalized: Iterable[str]) -> list[str]:
    """Return the last part of every key that the texts may have in scopes with this fingerprint.

    Policies that differ only in their hash have the same scopes, so there are keys of each hash.
    """
    encoded = [text.encode(errors="surrogatepass") for text in normalized]
    digests: list[str] = []
    for name in get_args(Hash):
        if name == "sha256" or len(policy._secret_bytes()) <= MAX_BLAKE2B_SECRET:
            _, digest_all = _make_digest(replace(policy, hash=name), b"embedonce/text/1" + fingerprint)
            digests += digest_all(encoded)
    return digests


def _digest_settings(policy: KeyPolicy, described: Mapping[str, Value]) -> dict[str, Value]:
    """Return a short digest of each setting of a vector space that has no part of its own in the card.

    With the digests, ``explain`` can name the settings in which two spaces differ. The values themselves do not belong
    in a card, because they may be long. With a secret in the policy, only someone who knows it can guess them.
    """
    start = b"embedonce/setting/1" + (policy.secret_id() or b"")
    settings = {name: value for name, value in described.items() if name not in ("provider", "model", "task", "extra")}
    extra = described.get("extra")
    for name, value in (extra if isinstance(extra, Mapping) else {}).items():
        inner = value if isinstance(value, Mapping) and value else {"": value}
        settings |= {f"{name}.{key}" if key else name: item for key, item in inner.items()}
    return {
        name: hashlib.sha256(start + canonical(value)).hexdigest()[:8]
        for name, value in settings.items()
        if name != "dimensions"
    }
