"""Admission: a function of the caller of ``fetch`` decides which texts are computed, and learns what they have cost."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeAlias

from .keys import VectorSpace
from .vectors import Work

Settle: TypeAlias = Callable[[Work, Work], Awaitable[None] | None]
"""Takes what a request has cost: the work that gave vectors, and the work that gave none.

The two arguments are parts of :attr:`Fetched.computed <embedonce.Fetched.computed>` and
:attr:`Fetched.wasted <embedonce.Fetched.wasted>`. If this function raises an exception, the call raises it after the
vectors are stored.
"""

Admit: TypeAlias = Callable[[Sequence[str], VectorSpace], Awaitable[Settle | None] | Settle | None]
"""Decides whether texts may be sent to the provider, and returns a function that takes their cost, or None.

The engine calls it just before a request would be sent, so never for texts that a tier has or that another call is
computing. The arguments are the normalised texts and the vector space. To refuse the texts, it raises an exception. It
may be an async function, and async methods await it on their own event loop.

Requests are sent at the same time, up to the provider's ``concurrency``, so it may be called again before the first
texts are settled; in blocking methods, from another thread. If a request fails and is sent again in parts, it is
settled first, and each part is asked about.
"""
