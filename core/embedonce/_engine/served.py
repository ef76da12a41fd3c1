"""The names of models in providers' answers. The first name is kept in the space card; a different name is an error.

A server that answers with another model than before may return vectors of the same dimensions. Only the name in its
answer shows that these vectors cannot be compared with the stored ones.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, MutableMapping, Sequence
from typing import Any

from embedonce._messages import quote
from embedonce.contracts import Embedded
from embedonce.errors import DriftError
from embedonce.keys import CARD_PREFIX, SERVED_MODEL, Value

from .call import Call
from .routes import Route
from .tiers import LiveTier

MAX_NAME = 200
"""Maximum number of characters of a model's name that are compared and kept."""


def read_served_model(reply: Any) -> str | None:
    """Return the name of the model in a provider's answer, or None if the answer names no model."""
    name = reply.model if isinstance(reply, Embedded) else None
    if not isinstance(name, str) or not name:
        return None
    return name[:MAX_NAME].encode(errors="replace").decode()  # a card cannot hold a lone surrogate


class ServedModels:
    """The first name that the answers of each scope had, kept in the space cards of one chain."""

    def __init__(self, tiers: Sequence[LiveTier], cards: MutableMapping[str, dict[str, Value]]) -> None:
        self._tiers = tiers
        self._cards = cards
        self._unread: dict[str, list[LiveTier]] = {}
        """By scope, the tiers whose card this process has not read yet, because they failed."""
        self.reset()

    def reset(self) -> None:
        """Renew the lock in a forked child."""
        self._lock = threading.RLock()  # re-entrant, because a signal handler may use the cache

    async def find_other_model(self, call: Call, name: str) -> DriftError | None:
        """Return None if ``name`` is the model of this scope, or the first name of this scope; else an error.

        The first call for a scope reads the scope's card from the tiers, because another process may have kept a name.
        A tier that fails does not fail the call: its card is read by a later call.
        """
        scope = call.answer.route.keyer.scope
        unread = self._unread.get(scope)
        if unread is None or unread:
            await self._read_cards(call, scope, self._tiers if unread is None else unread)
        with self._lock:
            kept = self._cards.get(scope, {}).get(SERVED_MODEL)
            if kept is None:
                self._keep(scope, name)
        if kept is None or kept == name or _is_alias(call.answer.route, str(kept), name):
            return None
        return _make_error(call.answer.route, str(kept), name)

    def drop(self, scopes: Iterable[str]) -> None:
        """Drop what is known about scopes that nothing uses any more. Their cards are read again if that changes."""
        with self._lock:
            for scope in scopes:
                self._unread.pop(scope, None)

    def forget(self, scopes: Iterable[str]) -> None:
        """Forget the names of these scopes, whose entries were purged."""
        with self._lock:
            for scope in scopes:
                self._unread.pop(scope, None)
                card = self._cards.get(scope, {})
                if SERVED_MODEL in card:
                    self._cards[scope] = {part: value for part, value in card.items() if part != SERVED_MODEL}

    async def _read_cards(self, call: Call, scope: str, tiers: Sequence[LiveTier]) -> None:
        """Read the scope's card from the tiers, and keep the name of the first tier that has one."""
        unread = []
        stored = None
        for tier in tiers:
            if tier.capabilities.scope == "process":
                continue  # such a tier stores no cards
            if tier.reader.breaker.is_open or tier.name in call.answer.failed_tiers:
                unread.append(tier)
                continue
            try:
                names = tier.codec.read_served_models(await tier.peek(call.port, [CARD_PREFIX + scope]))
            except Exception:  # noqa: BLE001  (the tier failed, or returned something else than a mapping)
                unread.append(tier)
            else:
                stored = stored or names.get(scope)
        with self._lock:
            self._unread[scope] = unread
            # This process may have kept a name while the tier did not answer. The stored name is older.
            if stored is not None and self._cards.get(scope, {}).get(SERVED_MODEL) != stored:
                self._keep(scope, stored)

    def _keep(self, scope: str, name: str) -> None:
        # Replace the card instead of changing it, because another thread may be writing it to a tier.
        self._cards[scope] = {**self._cards.get(scope, {}), SERVED_MODEL: name}
        for tier in self._tiers:
            tier.writer.forget_cards([scope])


def _is_alias(route: Route, kept: str, name: str) -> bool:
    """Return whether the provider's ``answers_as`` says that both names stand for the same model."""
    aliases = getattr(route.source.provider, "answers_as", None) or ()
    aliases = (aliases,) if isinstance(aliases, str) else tuple(aliases)
    return name in aliases or (kept in aliases and name == route.space.model)


def _make_error(route: Route, kept: str, name: str) -> DriftError:
    has_option = hasattr(route.source.provider, "answers_as")
    accept = f"add {quote(name)} to answers_as in [provider]" if has_option else 'set action = "warn" in [drift]'
    return DriftError(
        f"provider {route.source.name!r}, model {route.space.model!r}: the answer is from model {quote(name)}, but the "
        f"stored vectors of this vector space are from model {quote(kept)}. If both names stand for the same model, "
        f"{accept}. If the model has changed, change [key] version to embed all "
        'texts again, or set action = "new-space" in [drift]'
    )
