"""The hooks that a plugin may have, as functions of its module marked with :func:`hookimpl`.

A plugin's module may also say ``api = 1``, the version of the contract that it was written for.
pluggy is imported when the first plugin is loaded, not when ``hookimpl`` is: it costs 10 ms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, overload

if TYPE_CHECKING:
    from .contracts import AsyncProvider, EntryBackend, FrameBackend, Normalizer, Provider
    from .events import Event

PROJECT = "embedonce"
"""The name of the pluggy project and of the entry-point group."""

Function = TypeVar("Function", bound=Callable[..., Any])


@overload
def hookimpl(function: Function) -> Function: ...


@overload
def hookimpl(*, specname: str | None = ...) -> Callable[[Function], Function]: ...


def hookimpl(function: Any = None, *, specname: str | None = None) -> Any:
    """Mark a function of a plugin's module as the implementation of a hook: that of its name, or of ``specname``.

    pluggy's other options are about the order of plugins and calls around calls. There are none here:
    each plugin is asked for itself alone.
    """
    import pluggy

    return pluggy.HookimplMarker(PROJECT)(function, specname=specname)


def embedonce_backends() -> Mapping[str, type[FrameBackend] | type[EntryBackend]]:  # type: ignore[empty-body]
    """Return backend classes by the name that TOML gives as a tier's ``type``."""


def embedonce_providers() -> Mapping[str, type[Provider] | type[AsyncProvider]]:  # type: ignore[empty-body]
    """Return provider classes by the name that TOML gives as the provider's ``type``."""


def embedonce_normalizers() -> Mapping[str, Normalizer]:  # type: ignore[empty-body]
    """Return normalisation steps by the name that TOML lists in ``[key] normalize``."""


def embedonce_event(event: Event) -> None:
    """See what happened, a batch at a time; runs on the caller's path, so do little and raise nothing."""


HOOKS = (embedonce_backends, embedonce_providers, embedonce_normalizers, embedonce_event)
