"""The hooks that a plugin may have, as functions of its module marked with :data:`hookimpl`.

A plugin's module may also say ``api = 1``, the version of the contract that it was written for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from .contracts import AsyncProvider, EntryBackend, FrameBackend, Normalizer, Provider
    from .events import Event

PROJECT = "embedonce"
"""The name of the pluggy project and of the entry-point group."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks a function of a plugin's module as the implementation of the hook of its name."""


@hookspec
def embedonce_backends() -> Mapping[str, type[FrameBackend] | type[EntryBackend]]:  # type: ignore[empty-body]
    """Return backend classes by the name that TOML gives as a tier's ``type``."""


@hookspec
def embedonce_providers() -> Mapping[str, type[Provider] | type[AsyncProvider]]:  # type: ignore[empty-body]
    """Return provider classes by the name that TOML gives as the provider's ``type``."""


@hookspec
def embedonce_normalizers() -> Mapping[str, Normalizer]:  # type: ignore[empty-body]
    """Return normalisation steps by the name that TOML lists in ``[key] normalize``."""


@hookspec
def embedonce_event(event: Event) -> None:
    """See what happened, a batch at a time; runs on the caller's path, so do little and raise nothing."""
