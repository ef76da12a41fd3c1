"""The options of a tier, and the checks that find errors and probable mistakes in a chain of tiers."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from embedonce._messages import join_words
from embedonce.answers import ChainWarning
from embedonce.contracts import EXTRAS, Backend, Capabilities
from embedonce.errors import ConfigError

if TYPE_CHECKING:
    from embedonce.encryption import Encryption

chain_log = logging.getLogger("embedonce.chain")

DEFAULT_LEASE_SECONDS = 2.5
"""Seconds that a default lease lasts unless it is renewed.

If a process is killed, others wait this long, until the end of their pause between two polls, and no longer than 3 s in
all. A process that is suspended for less than this time keeps its leases.
"""

WriteMode: TypeAlias = Literal["inline", "background", "none"]


@dataclass(frozen=True, slots=True)
class Tier:
    """One backend in a chain, and how the chain uses it.

    The defaults of ``timeout`` and ``write`` depend on the backend's scope. A backend in this process gets inline
    writes and no timeout. A backend on this host gets inline writes and a timeout of 2 s. A backend on the network gets
    background writes and a timeout of 250 ms. A tier with leases always gets inline writes.
    """

    backend: Backend
    name: str | None = field(default=None, kw_only=True)
    ttl: float | None = field(default=None, kw_only=True)
    """Seconds until an entry expires. With None an entry never expires, although the backend may evict it."""
    timeout: float | None = field(default=None, kw_only=True)
    """Maximum duration of one call to the backend, in seconds."""
    on_error: Literal["skip", "raise"] = field(default="skip", kw_only=True)
    write: WriteMode | None = field(default=None, kw_only=True)
    encryption: Encryption | None = field(default=None, kw_only=True)
    """Encryption of the frames, applied before the backend sees them."""
    lease: float | Literal["off"] | None = field(default=None, kw_only=True)
    """Seconds that a lease in this tier lasts.

    The process that has the lease of a missing text embeds the text, while other processes wait for the vector. The
    process renews the lease while it computes, so other processes wait this long only if the process has died.

    If no tier of a chain sets ``lease``, one tier has leases of :data:`DEFAULT_LEASE_SECONDS`: of the tiers that are
    shared most widely, the last one. A tier cannot have leases if its backend has no ``add_many``, or if its ``write``
    is ``"background"`` or ``"none"``. With ``"off"``, this tier does not get the default.
    """


class ChainError(ConfigError):
    """A tier cannot be in the chain. ``place`` is the tier's index. ``option`` is the invalid option, if any."""

    def __init__(self, message: str, place: int, option: str | None = None) -> None:
        super().__init__(message)
        self.place = place
        self.option = option


def compose_chain(tiers: Sequence[Tier | Backend], *, keyed: bool = False) -> list[tuple[str, Tier]]:
    """Give every tier a name, and reject a chain that cannot work. ``keyed`` means that the key policy has a secret.

    Raises:
        ChainError: two tiers have the same name, a tier is not a backend, or a backend cannot support an option.
        ConfigError: ``tiers`` is not a list.
    """
    tiers = _read_list(tiers)
    chain: list[tuple[str, Tier]] = []
    for place, given in enumerate(tiers):
        tier = given if isinstance(given, Tier) else Tier(given)
        name = tier.name or _derive_name(tier.backend)
        problem = next(_find_problems(name, tier, chain, keyed=keyed), None)
        if problem is not None:
            option, message = problem
            raise ChainError(message, place, option)
        chain.append((name, tier))
    return chain


def _read_list(tiers: Any) -> list[Any]:
    """Return the tiers as a list.

    Raises:
        ConfigError: ``tiers`` is one tier, or is something else that is not an ordered collection.
    """
    if isinstance(tiers, Tier) or hasattr(tiers, "capabilities"):
        name = tiers.__name__ if isinstance(tiers, type) else type(tiers).__name__
        raise ConfigError(f"tiers must be a list of backends, got one {name}; write it in brackets: [{name}(...)]")
    if isinstance(tiers, str | bytes | Mapping | Set) or not isinstance(tiers, Iterable):
        raise ConfigError(
            f"tiers must be a list of backends, such as [MemoryBackend()], got {type(tiers).__name__}; to store "
            "nothing, leave tiers out"
        )
    return list(tiers)


def _explain_wrong_backend(backend: Any) -> str:
    """Return why something is not a backend, and what to pass instead."""
    if isinstance(backend, type):
        return f"{backend.__name__} is a class; pass an instance of it, {backend.__name__}(...)"
    if isinstance(backend, str | Mapping):
        kind = type(backend).__name__
        return f"a {kind} is not a backend; pass a backend such as MemoryBackend(), or use embedonce.open"
    if isinstance(backend, Tier):
        return "a Tier is not a backend; pass the backend itself to Tier"
    return (
        f"{type(backend).__name__} is not a backend, because it has no `capabilities` "
        "(see embedonce.contracts.FrameBackend)"
    )


def _find_problems(
    name: str, tier: Tier, earlier: Sequence[tuple[str, Tier]], *, keyed: bool
) -> Iterator[tuple[str | None, str]]:
    """Yield each problem of a tier as a pair: the invalid option or None, and a message.

    ``earlier`` contains the tiers before this tier.
    """
    caps = getattr(tier.backend, "capabilities", None)
    if isinstance(tier.backend, type) or not isinstance(caps, Capabilities):
        yield None, _explain_wrong_backend(tier.backend)
        return
    if not isinstance(name, str):
        yield "name", f"a tier's name must be a str, got {type(name).__name__}"
        return
    for capability, method in EXTRAS.items():
        if getattr(caps, capability) and not callable(getattr(tier.backend, method, None)):
            yield (
                None,
                f'tier {name!r}: its backend declares the capability "{capability}" but has no method "{method}"',
            )
    yield from _find_read_only_problems(name, tier, caps)
    if any(name == other for other, _ in earlier):
        yield "name", f"two tiers are named {name!r}; give each a unique name with name="
    if name == "provider":
        yield "name", 'a tier cannot be named "provider", because Fetched.sources uses that name for the provider'
    if tier.timeout is not None and caps.scope == "process":
        yield "timeout", f'tier {name!r}: "timeout" is not supported for a backend in this process; remove "timeout"'
    if tier.encryption is not None and caps.holds == "entries":
        yield (
            "encryption",
            f"tier {name!r}: encryption requires a backend that stores frames, and this tier's backend stores entries",
        )
    if caps.text_preview and (tier.encryption is not None or keyed):
        yield (
            "encryption" if tier.encryption is not None else None,
            f'tier {name!r}: "text_preview" stores the start of each text, which '
            + ("encryption" if tier.encryption is not None else "the [key] secret")
            + " is meant to hide; remove one of these two options",
        )
    if _get_lease(tier) is not None:
        yield from (("lease", message) for message in _find_lease_problems(name, tier, caps, earlier))
    for option, values in (("on_error", ("skip", "raise")), ("write", ("inline", "background", "none", None))):
        if getattr(tier, option) not in values:
            wanted = join_words([f'"{value}"' for value in values if value is not None], "or")
            yield option, f'tier {name!r}: "{option}" must be {wanted}, got {getattr(tier, option)!r}'
    for option in ("ttl", "timeout", "lease"):
        value = getattr(tier, option)
        is_off = option == "lease" and value == "off"
        if value is not None and not is_off and (isinstance(value, str) or not 0 < value < float("inf")):
            or_off = ' or "off"' if option == "lease" else ""
            yield option, f'tier {name!r}: "{option}" must be a finite number of seconds above 0{or_off}, got {value!r}'


def _find_read_only_problems(name: str, tier: Tier, caps: Capabilities) -> Iterator[tuple[str | None, str]]:
    if not caps.read_only:
        if not callable(getattr(tier.backend, "set_many", None)):
            yield (
                None,
                f'tier {name!r}: its backend has no method "set_many"; a backend without it must declare the '
                'capability "read_only"',
            )
        return
    for capability in ("delete", "add"):
        if getattr(caps, capability):
            yield None, f'tier {name!r}: its backend declares both "read_only" and "{capability}"; it can have only one'
    for option in ("write", "ttl", "lease"):
        if getattr(tier, option) not in (None, "off"):
            yield (
                option,
                f'tier {name!r}: "{option}" is not supported, because its store is read-only and nothing is written to '
                f'it; remove "{option}"',
            )


def _find_lease_problems(
    name: str, tier: Tier, caps: Capabilities, earlier: Sequence[tuple[str, Tier]]
) -> Iterator[str]:
    if caps.scope == "process":
        yield (
            f'tier {name!r}: "lease" requires a backend that several processes share, but the backend of this tier is '
            'private to the process; remove "lease"'
        )
    if caps.scope == "single":
        yield (
            f'tier {name!r}: "lease" requires a backend that several processes share at the same time, but only one '
            'process at a time can use the backend of this tier; remove "lease"'
        )
    if not caps.add:
        yield f'tier {name!r}: "lease" requires a backend with add_many; remove "lease"'
    if tier.write in ("background", "none"):
        yield (
            f'tier {name!r}: "lease" requires write = "inline", because other processes wait for the vectors '
            f'that this tier stores; got "{tier.write}"'
        )
    other = next((other for other, one in earlier if _get_lease(one) is not None), None)
    if other is not None:
        yield (
            f"tiers {other!r} and {name!r} both have a lease; only one tier of a chain may have a lease, so remove one"
        )


def _get_lease(tier: Tier) -> float | None:
    """Return the seconds that a tier's own ``lease`` says, or None if it says none."""
    return None if isinstance(tier.lease, str) else tier.lease


class ChainLease(NamedTuple):
    """The leases of a chain."""

    tier: str
    """Name of the tier that stores the leases."""
    seconds: float
    is_default: bool
    """Whether no tier sets ``lease``."""


def choose_lease(chain: Sequence[tuple[str, Tier]], *, allow_default: bool = True) -> ChainLease | None:
    """Return which tier stores leases, and how long they last; None if no tier does.

    Without a tier that sets ``lease``, this is the last tier of the widest scope that can store leases.
    """
    for name, tier in chain:
        seconds = _get_lease(tier)
        if seconds is not None:
            return ChainLease(name, seconds, is_default=False)
    able = [(_SLOWNESS[tier.backend.capabilities.scope], name) for name, tier in chain if _can_have_default_lease(tier)]
    if not able or not allow_default:
        return None
    widest = max(scope for scope, _ in able)
    return ChainLease([name for scope, name in able if scope == widest][-1], DEFAULT_LEASE_SECONDS, is_default=True)


def _can_have_default_lease(tier: Tier) -> bool:
    caps = tier.backend.capabilities
    # Without `ttl`, the backend may keep the lease of a process that has died.
    is_able = caps.scope not in ("process", "single") and caps.add and caps.ttl
    return is_able and tier.lease is None and tier.write in (None, "inline")


_LOGGED: deque[str] = deque(maxlen=1000)
"""Warnings that this process has logged. They are not logged again, even if another cache has the same chain."""

_SLOWNESS = {"process": 0, "single": 1, "host": 1, "network": 2}
_WHERE = {"process": "in this process", "single": "on this host", "host": "on this host", "network": "on the network"}


def find_longest_ttl(chain: Sequence[tuple[str, Tier]]) -> float | None:
    """Return the longest time to live of entries in tiers without a ``ttl`` of their own; None if there is no limit.

    Such a tier may hold entries that were promoted from a tier with a ``ttl``. It may also hold entries of a read-only
    tier. This chain has not written those, so their expiry dates may be any.
    """
    if any(tier.backend.capabilities.read_only for _, tier in chain):
        return None
    return max((tier.ttl for _, tier in chain if tier.ttl is not None), default=None)


def find_chain_warnings(chain: Sequence[tuple[str, Tier]], *, replays: bool = False) -> list[ChainWarning]:
    """Return warnings about probable mistakes in a chain that works. Each warning names a tier.

    With ``replays``, nothing is computed, so no tier needs to store anything.
    """
    found = []
    for place, (name, tier) in enumerate(chain):
        scope = tier.backend.capabilities.scope
        earlier = [(other, one.backend.capabilities.scope) for other, one in chain[:place]]
        slower = next(((other, where) for other, where in earlier if _SLOWNESS[where] > _SLOWNESS[scope]), None)
        if slower is not None:
            found.append(
                ChainWarning(
                    name,
                    f"tier {name!r} ({_WHERE[scope]}) comes after the slower tier {slower[0]!r} "
                    f"({_WHERE[slower[1]]}), so every hit in {name!r} waits for {slower[0]!r} first; move {name!r} up",
                )
            )
    read_only = [name for name, tier in chain if tier.backend.capabilities.read_only]
    if read_only and not replays and not any(_can_store(tier) for _, tier in chain):
        found.append(
            ChainWarning(
                read_only[0],
                f"tier {read_only[0]!r} is read-only and no other tier stores vectors, so every text that it lacks is "
                'computed again each time; add another tier, or set mode = "replay" to compute nothing',
            )
        )
    unlimited = [name for name, tier in chain if _can_grow(tier)]
    if len(unlimited) > 1:
        found.append(
            ChainWarning(
                unlimited[0],
                f"tiers {join_words(map(repr, unlimited))} grow without limit, and each of them stores all "
                "entries; give the faster tier a ttl, or a size limit if its backend supports size limits",
            )
        )
    return found


def _can_store(tier: Tier) -> bool:
    return not tier.backend.capabilities.read_only and tier.write != "none"


def _can_grow(tier: Tier) -> bool:
    """Return whether a tier grows without limit."""
    caps = tier.backend.capabilities
    return caps.bounded is False and tier.ttl is None and not caps.read_only


def log_once(warnings: Iterable[ChainWarning]) -> None:
    """Log the warnings that this process has not logged before."""
    for warning in warnings:
        if warning.message not in _LOGGED:
            _LOGGED.append(warning.message)
            chain_log.warning("%s", warning.message)


def _derive_name(backend: Backend) -> str:
    name = type(backend).__name__.removesuffix("Backend").lower()
    return name or "tier"
