"""The tables of a configuration that are embedonce's own; every other option is a plugin's.

Each class is read as a plugin's is: its keyword-only parameters are the keys of the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt

from embedonce.contracts import Capabilities
from embedonce.keys import Hash
from embedonce.options import Doc, Duration
from embedonce.vectors import Dtype

TIER_NAME = r"[a-z][a-z0-9_-]*"
"""What a tier may be called; ``provider`` is taken: it is what ``Fetched.sources`` says of a computed vector."""

NOT_IN_PROCESS: Mapping[str, str] = {
    "timeout": "a timeout: it holds its entries in this process, and nothing waits for it",
    "encryption": "encryption: it keeps vectors as they are, in this process",
    "lease": "a lease: no other process shares it",
}
"""Options of every tier that one which lives in this process cannot honour, and why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheTable:
    """``[cache]``: how the cache as a whole behaves."""

    dtype: Annotated[
        Dtype, Doc("How finely vectors are rounded, once, before they are returned or stored in any tier.")
    ] = "float32"
    mode: Annotated[
        Literal["read-through", "replay"],
        Doc('"replay": a text that no tier has is an error, and nothing is ever computed.'),
    ] = "read-through"
    max_wait: Annotated[
        Duration, Gt(0), Doc("Wait this long for the same text's computation by another call, then compute it.")
    ] = 60.0
    flush_timeout: Annotated[
        Duration, Ge(0), Doc("How long close, and the program's end, wait for writes that are still queued.")
    ] = 5.0
    max_queued: Annotated[int, Gt(0), Doc("Queue at most this many vectors for writing in the background.")] = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyTable:
    """``[key]``: what makes two requests the same."""

    version: Annotated[str, Doc("Raise it to leave all old vectors behind.")] = "v1"
    normalize: Annotated[
        Sequence[str], Doc("Steps that bring a text to its form, in this order. What is embedded is the result.")
    ] = ()
    namespace: Annotated[str, Doc("Keeps tenants or projects apart in one store.")] = ""
    hash: Annotated[Hash, Doc("The hash of the key's digest.")] = "sha256"
    secret: Annotated[
        str | None, Doc("Makes the digest a keyed one, so that nobody who reads the keys can guess short texts.")
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginsTable:
    """``[plugins]``: which plugins of others may be loaded."""

    allow: Annotated[
        Sequence[str] | None,
        Doc(
            "Load no plugins of others than these, by the package that brings them or by name; embedonce's own are "
            "always allowed. Without it all that are installed may be used."
        ),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FallbackTable:
    """``[provider.fallback]``, beside the fallback provider's own options."""

    fetch_only: Annotated[
        bool,
        Doc("Use it in fetch alone: embed and embed_batch raise rather than return the other space's vectors."),
    ] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TierTable:
    """``[[tiers]]``, beside the backend's own options."""

    name: Annotated[str | None, Doc("What the tier is called in stats, metrics and messages; by default its type.")] = (
        None
    )
    ttl: Annotated[
        Duration | None, Gt(0), Doc("Entries of this tier expire after this long; without it they do not.")
    ] = None
    timeout: Annotated[
        Duration | None, Gt(0), Doc("A call to this tier takes at most this long: by default 2s, over a network 250ms.")
    ] = None
    on_error: Annotated[
        Literal["skip", "raise"], Doc('"skip": go on without the tier when it fails; "raise": raise TierError.')
    ] = "skip"
    write: Annotated[
        Literal["inline", "background", "none"] | None,
        Doc("When vectors are written to it: by default inline, over a network in the background."),
    ] = None
    encryption: Annotated[
        str | Sequence[str] | None,
        Doc(
            'Encrypt what the tier stores: 32 random bytes as base64, or "file:PATH". Of several keys the first '
            "one encrypts and all decrypt."
        ),
    ] = None
    lease: Annotated[
        Duration | None,
        Gt(0),
        Doc(
            "Let one process of all that share this tier compute a cold text, and the others wait for its vector at "
            "most this long. One tier of a chain can have it."
        ),
    ] = None


def is_in_process(cls: type[Any]) -> bool:
    """Whether a backend class says that what it holds is this process's alone."""
    capabilities = getattr(cls, "capabilities", None)
    return isinstance(capabilities, Capabilities) and capabilities.scope == "process"
