"""Options of embedonce's own tables in a configuration. All other options belong to plugins.

These classes are read like the class of a plugin: their keyword-only parameters are the keys of the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from annotated_types import Ge, Gt, Le, MinLen

from embedonce._arguments import MAX_COALESCE
from embedonce._engine.imports import DEFAULT_TIMEOUT, DEFAULT_VERIFY
from embedonce._globs import compile_globs
from embedonce.contracts import Capabilities
from embedonce.drift import DriftGuard
from embedonce.keys import Hash
from embedonce.options import BadValue, Doc, Duration, Parsed, Size
from embedonce.prices import PATTERN, parse_price_option
from embedonce.vectors import Dtype

from .serve_values import AllowedHost, ForwardedField, HostName, ModelName, Namespace, ServeKey, TenantName

TIER_NAME = r"[a-z][a-z0-9_-]*"
"""Pattern of a tier's name. ``provider`` is reserved, because ``Fetched.sources`` uses it for the provider."""

NOT_IN_PROCESS: Mapping[str, str] = {
    "timeout": "a timeout, because the tier keeps its entries in this process and its calls do not wait",
    "encryption": "encryption, because the tier keeps plain vectors in this process",
    "lease": "a lease, because no other process shares the tier",
}
"""Options that a tier inside this process does not support, and the reason."""

NOT_READ_ONLY: Mapping[str, str] = {
    "ttl": "a ttl, because its store is read-only and nothing is written to it",
    "write": "write, because its store is read-only and nothing is written to it",
    "lease": "a lease, because its store is read-only and nothing is written to it",
}
"""Options that a read-only tier does not support, and the reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TopTable:
    """The keys at the top of a configuration, outside of all tables."""

    bundle: Annotated[Path | None, Doc("Folder of the vectors that the tests need, for pytest --embedonce=record.")] = (
        None
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheTable:
    """``[cache]``: how the cache as a whole behaves."""

    dtype: Annotated[
        Dtype, Doc("Precision of vectors. They are rounded once, before they are returned or stored in any tier.")
    ] = "float32"
    mode: Annotated[
        Literal["read-through", "replay"],
        Doc('"replay": do not call the provider, and raise ReplayMiss if no tier has the vector of a text.'),
    ] = "read-through"
    max_wait: Annotated[
        Duration,
        Gt(0),
        Doc(
            "Wait at most this long for another call that embeds the same text. After that, embed the text in this "
            "call."
        ),
    ] = 60.0
    flush_timeout: Annotated[
        Duration, Ge(0), Doc("Wait at most this long for queued writes when the cache is closed or the program exits.")
    ] = 5.0
    max_queued: Annotated[int, Gt(0), Doc("Queue at most this many vectors for writing in the background.")] = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyTable:
    """``[key]``: what makes the keys of two requests equal."""

    version: Annotated[str, Doc("Part of every key. Change it to stop using all vectors stored so far.")] = "v1"
    normalize: Annotated[
        Sequence[str], Doc("Steps that normalise each text, in this order. The provider embeds the result.")
    ] = ()
    namespace: Annotated[str, Doc("Separates tenants or projects that share a store.")] = ""
    hash: Annotated[Hash, Doc("Hash function of the key's digest.")] = "sha256"
    secret: Annotated[
        str | None,
        Doc("Secret for a keyed digest. Only someone who knows the secret can guess short texts from the stored keys."),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginsTable:
    """``[plugins]``: which third-party plugins may be loaded."""

    allow: Annotated[
        Sequence[str] | None,
        Doc(
            "Names of the third-party plugins that may be loaded, or of their packages. embedonce's own plugins are "
            "always allowed. Without this option, every installed plugin may be loaded."
        ),
    ] = None


def _check_glob(value: object) -> str:
    if not isinstance(value, str):
        raise BadValue("must be a pattern of file names")
    try:
        compile_globs([value])
    except ValueError as error:
        raise BadValue(str(error)) from None
    return value


def _check_field(value: object) -> str:
    if not isinstance(value, str) or not value:
        raise BadValue("must be the name of a field, and must not be empty")
    return value


Glob: TypeAlias = Annotated[str, Parsed(_check_glob, {"type": "string", "minLength": 1})]
FieldName: TypeAlias = Annotated[str, Parsed(_check_field, {"type": "string", "minLength": 1})]


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedTable:
    """``[embed]``: how the command ``embedonce embed`` reads files."""

    fields: Annotated[
        Mapping[Glob, FieldName] | None,
        Doc(
            "Fields or columns with the text, by patterns of file names; the first pattern that matches decides. If "
            "the option --field is given, it is used instead."
        ),
    ] = None
    keep: Annotated[
        Sequence[FieldName],
        Doc(
            "Names of fields or columns whose values are written beside each vector. If the option --keep is given, it "
            "is used instead."
        ),
    ] = ()


PriceText: TypeAlias = Annotated[str, Parsed(parse_price_option, {"type": "string", "pattern": f"^{PATTERN}$"})]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderTable:
    """``[provider]``: embedonce's options, in addition to those of the provider."""

    price: Annotated[
        PriceText | None,
        Doc('Price of the provider\'s tokens, such as "0.02 USD / 1M tokens". With a price, statistics show money.'),
    ] = None
    coalesce: Annotated[
        Duration | None,
        Gt(0),
        Le(MAX_COALESCE),
        Doc(
            'Texts that no tier has wait this long, such as "2ms", for texts of other calls, so that the provider gets '
            "one request instead of many. By default they do not wait."
        ),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FallbackTable(ProviderTable):
    """``[provider.fallback]``: embedonce's options, in addition to those of the fallback provider."""

    fetch_only: Annotated[
        bool,
        Doc(
            "If the main provider fails, only the method fetch uses the fallback. embed and embed_batch then raise an "
            "error instead of returning vectors of the fallback."
        ),
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TierTable:
    """``[[tiers]]``: embedonce's options, in addition to those of the backend."""

    name: Annotated[str | None, Doc("Name of the tier in stats, metrics and messages. Default: its type.")] = None
    ttl: Annotated[
        Duration | None, Gt(0), Doc("Entries of this tier expire after this long. By default they never expire.")
    ] = None
    timeout: Annotated[
        Duration | None, Gt(0), Doc("Timeout of a call to this tier. Default: 250ms over a network, otherwise 2s.")
    ] = None
    on_error: Annotated[
        Literal["skip", "raise"], Doc('"skip": continue without the tier when it fails. "raise": raise TierError.')
    ] = "skip"
    write: Annotated[
        Literal["inline", "background", "none"] | None,
        Doc('When vectors are written. "none" means never. Default: "background" over a network, otherwise "inline".'),
    ] = None
    encryption: Annotated[
        str | Sequence[str] | None,
        Doc(
            'Key that encrypts the tier\'s entries: 32 random bytes as base64, or "file:PATH". In a list of keys, the '
            "first key encrypts and every key decrypts."
        ),
    ] = None
    lease: Annotated[
        Annotated[Duration, Gt(0)] | Literal["off"] | None,
        Doc(
            "If several processes need the vector of the same new text, only one process embeds the text. If that "
            "process dies, another one embeds the text after this long. Only one tier of a chain can have a lease. "
            'Default: 2.5s in the last tier that most processes share. "off": no lease in this tier.'
        ),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportTable:
    """``[[imports]]``: embedonce's options, in addition to those of the importer."""

    task: Annotated[str, MinLen(1), Doc("Task of all vectors that this importer finds.")] = "document"
    verify: Annotated[
        int,
        Ge(0),
        Doc(
            "Compute the first N texts that the importer finds as well, and use no vector of it unless all of them are "
            "equal. 0: trust the source."
        ),
    ] = DEFAULT_VERIFY
    timeout: Annotated[Duration, Gt(0), Doc("Timeout of a call to the importer.")] = DEFAULT_TIMEOUT


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeTable:
    """``[serve]``: how ``embedonce serve`` listens, and what it accepts."""

    host: Annotated[
        HostName, Doc("Address or host name that the server listens on. The option --host overrides it.")
    ] = "127.0.0.1"
    port: Annotated[
        int, Ge(0), Le(65535), Doc("Port that the server listens on; 0: a free port. The option --port overrides it.")
    ] = 8080
    allowed_hosts: Annotated[
        Sequence[AllowedHost],
        Doc("Host names and addresses that clients may use, without a port. Loopback names are always allowed."),
    ] = ()
    admin_key: Annotated[
        ServeKey | None,
        Doc(
            "Key for the paths below /admin and, if there are tenants, for /metrics. It has at least 16 characters, or "
            "is sha256: and the key's SHA-256 digest. Without it, these paths do not exist."
        ),
    ] = field(default=None, repr=False)
    max_body: Annotated[Size, Ge(1024), Doc("Refuse requests whose body is larger than this.")] = 16 * 2**20
    drain_timeout: Annotated[
        Duration, Ge(0), Doc("When the server stops, wait at most this long for requests and queued writes.")
    ] = 20.0
    state_dir: Annotated[
        Path | None, Doc("Folder of the file with the budgets and rates of tenants. Default: the server chooses it.")
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModelTable:
    """``[[serve.models]]``: a model that the server offers. Its provider is an inner table."""

    name: Annotated[ModelName, Doc("Name of the model in requests.")]
    forward: Annotated[
        Sequence[ForwardedField],
        Doc("Fields of a request that are sent to the provider. They are part of the vector space."),
    ] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantTable:
    """``[[serve.tenants]]``: a caller of the server."""

    name: Annotated[TenantName, Doc("Name of the tenant in statistics and messages.")]
    keys: Annotated[
        Sequence[ServeKey],
        MinLen(1),
        Doc("Keys of the tenant. Each has at least 16 characters, or is sha256: and the key's SHA-256 digest."),
    ]
    namespace: Annotated[
        Namespace | None,
        Doc("Namespace of the tenant's vectors. It is appended to that of [key]. Default: the tenant's name."),
    ] = None
    models: Annotated[
        Annotated[Sequence[ModelName], MinLen(1)] | None,
        Doc("Names of the models that the tenant may use. Default: all."),
    ] = None
    requests_per_minute: Annotated[float | None, Gt(0), Doc("Maximum number of requests per minute.")] = None
    tokens_per_day: Annotated[
        int | None,
        Ge(0),
        Doc("Maximum number of tokens that are embedded per day (UTC). Hits cost nothing. 0: only hits are answered."),
    ] = None


def read_scope(cls: type[Any]) -> str | None:
    """Return the scope that a backend class declares; None if the backend declares it only when it is made."""
    capabilities = getattr(cls, "capabilities", None)
    return capabilities.scope if isinstance(capabilities, Capabilities) else None


def is_read_only(cls: type[Any]) -> bool:
    """Return whether a backend class declares that its stores are read-only."""
    capabilities = getattr(cls, "capabilities", None)
    return isinstance(capabilities, Capabilities) and capabilities.read_only


def find_unsupported(cls: type[Any]) -> Mapping[str, str]:
    """Return the options of ``[[tiers]]`` that tiers of a backend class do not support, and the reasons."""
    in_process = NOT_IN_PROCESS if read_scope(cls) == "process" else {}
    return {**in_process, **(NOT_READ_ONLY if is_read_only(cls) else {})}


OWN_TABLES: Mapping[str, type[Any]] = {
    "cache": CacheTable,
    "key": KeyTable,
    "plugins": PluginsTable,
    "provider": ProviderTable,
    "drift": DriftGuard,
    "embed": EmbedTable,
}
"""The tables that have options of embedonce, by name: the class whose arguments are these options.

A message about an unknown key names the table of this list to which the key belongs. ``[serve]`` is not in the list,
because plugins have options of the same names, such as ``host`` and ``port``.
"""
