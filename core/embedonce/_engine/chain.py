"""The options of a tier, and what is checked when tiers are composed: errors and warnings of a chain."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from embedonce._messages import listed
from embedonce.answers import ChainWarning
from embedonce.contracts import EXTRAS, Backend, Capabilities
from embedonce.errors import ConfigError

if TYPE_CHECKING:
    from embedonce.encryption import Encryption

chain_log = logging.getLogger("embedonce.chain")

WriteMode: TypeAlias = Literal["inline", "background", "none"]


@dataclass(frozen=True, slots=True)
class Tier:
    """One backend in a chain, and how the chain treats it.

    ``timeout`` and ``write`` that are not given follow from who shares the backend: in-process, no
    timeout and inline; on this host, 2 s and inline; on the network, 250 ms and in the background.
    """

    backend: Backend
    name: str | None = field(default=None, kw_only=True)
    ttl: float | None = field(default=None, kw_only=True)
    """Seconds; None: until it is evicted."""
    timeout: float | None = field(default=None, kw_only=True)
    """Seconds that one call to the backend may take, all of it."""
    on_error: Literal["skip", "raise"] = field(default="skip", kw_only=True)
    write: WriteMode | None = field(default=None, kw_only=True)
    encryption: Encryption | None = field(default=None, kw_only=True)
    """Frames are encrypted before the backend sees them."""
    lease: float | None = field(default=None, kw_only=True)
    """Seconds for which one process of those that share the tier may compute a cold text alone; None: all may."""


class ChainError(ConfigError):
    """A tier cannot be in the chain as it is; ``place`` is its place there, ``option`` what is wrong with it."""

    def __init__(self, message: str, place: int, option: str | None = None) -> None:
        super().__init__(message)
        self.place = place
        self.option = option


def compose_chain(tiers: Sequence[Tier | Backend], *, keyed: bool = False) -> list[tuple[str, Tier]]:
    """Name the tiers and refuse a chain that cannot work; ``keyed``: the key policy has a secret.

    Raises:
        ChainError: two tiers have one name, a backend is none, or an option is one that it cannot honour.
    """
    chain: list[tuple[str, Tier]] = []
    for place, given in enumerate(tiers):
        tier = given if isinstance(given, Tier) else Tier(given)
        name = tier.name or _default_name(tier.backend)
        wrong = next(_problems(name, tier, chain, keyed=keyed), None)
        if wrong is not None:
            option, message = wrong
            raise ChainError(message, place, option)
        chain.append((name, tier))
    return chain


def _problems(
    name: str, tier: Tier, above: Sequence[tuple[str, Tier]], *, keyed: bool
) -> Iterator[tuple[str | None, str]]:
    """Yield what is wrong with a tier below those ``above``: the option, if it is one, and why."""
    caps = getattr(tier.backend, "capabilities", None)
    if not isinstance(caps, Capabilities):
        yield (
            None,
            (
                f"{type(tier.backend).__name__} is not a backend: it has no `capabilities` "
                "(see embedonce.contracts.FrameBackend)"
            ),
        )
        return
    for capability, method in EXTRAS.items():
        if getattr(caps, capability) and not callable(getattr(tier.backend, method, None)):
            yield None, f"tier {name!r}: its backend declares {capability} and has no method {method}"
    if any(name == other for other, _ in above):
        yield "name", f"two tiers are called {name!r}; give each a name of its own with name="
    if name == "provider":
        yield "name", 'a tier cannot be called "provider": that is what Fetched.sources calls the provider'
    if tier.timeout is not None and caps.scope == "process":
        yield "timeout", f"tier {name!r} is in this process and never waits: it takes no timeout"
    if tier.encryption is not None and caps.holds == "entries":
        yield "encryption", f"tier {name!r} keeps vectors as they are: it takes no encryption"
    if caps.text_preview and (tier.encryption is not None or keyed):
        yield (
            "encryption" if tier.encryption is not None else None,
            f"tier {name!r} would keep the beginning of texts (text_preview), which an encrypted tier or a [key] "
            "secret is there to prevent: leave one of them out",
        )
    if tier.lease is not None:
        yield from (("lease", message) for message in _lease_problems(name, tier, caps, above))
    for option, values in (("on_error", ("skip", "raise")), ("write", ("inline", "background", "none", None))):
        if getattr(tier, option) not in values:
            wanted = ", ".join(f'"{value}"' for value in values if value is not None)
            yield option, f"tier {name!r}: {option} is one of {wanted}, not {getattr(tier, option)!r}"
    for option in ("ttl", "timeout", "lease"):
        value = getattr(tier, option)
        if value is not None and not 0 < value < float("inf"):
            yield option, f"tier {name!r}: {option} is a number of seconds above 0, not {value!r}"


def _lease_problems(name: str, tier: Tier, caps: Capabilities, above: Sequence[tuple[str, Tier]]) -> Iterator[str]:
    if caps.scope == "process":
        yield f"tier {name!r} is in this process: no other process shares it, and a lease has no use"
    if not caps.add:
        yield f"tier {name!r} cannot hold leases: its backend has no add_many"
    if tier.write in ("background", "none"):
        yield (
            f'tier {name!r} has a lease, so others wait for what it stores: write = "{tier.write}" does not go with it'
        )
    other = next((other for other, one in above if one.lease is not None), None)
    if other is not None:
        yield f"tiers {other!r} and {name!r} both have a lease; one of a chain can have it"


_WARNED: set[str] = set()
"""Warnings that this process has logged: a program that makes many caches of one configuration says it once."""

_SLOWNESS = {"process": 0, "host": 1, "network": 2}
_WHERE = {"process": "in this process", "host": "on this host", "network": "on the network"}


def chain_warnings(chain: Sequence[tuple[str, Tier]]) -> list[ChainWarning]:
    """Return what works in a chain and is hardly meant, each with the tier that it is about."""
    found = []
    for place, (name, tier) in enumerate(chain):
        scope = tier.backend.capabilities.scope
        slower = [(other, one.backend.capabilities.scope) for other, one in chain[:place]]
        above = next(((other, where) for other, where in slower if _SLOWNESS[where] > _SLOWNESS[scope]), None)
        if above is not None:
            found.append(
                ChainWarning(
                    name,
                    f"tier {name!r} is {_WHERE[scope]} and is asked only after {above[0]!r}, which is "
                    f"{_WHERE[above[1]]}: what it has costs as much as what the slower one has; put it first",
                )
            )
    endless = [name for name, tier in chain if tier.backend.capabilities.bounded is False and tier.ttl is None]
    if len(endless) > 1:
        found.append(
            ChainWarning(
                endless[0],
                f"tiers {listed(map(repr, endless))} grow without end, and each keeps all that the other has: give "
                "the faster one a ttl, or a limit if it has an option for one",
            )
        )
    return found


def log_once(warnings: Iterable[ChainWarning]) -> None:
    """Log the warnings that this process has not logged before."""
    for warning in warnings:
        if warning.message not in _WARNED:
            _WARNED.add(warning.message)
            chain_log.warning("%s", warning.message)


def _default_name(backend: Backend) -> str:
    name = type(backend).__name__.removesuffix("Backend").lower()
    return name or "tier"
