"""The hooks of plugins. A plugin implements a hook as a function of its module, marked with :func:`hookimpl`.

A plugin's module may also set ``api = 1``, the version of the contract that it was written for.
pluggy is imported when the first plugin is loaded, not with this module, because the import takes 10 ms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar, overload

if TYPE_CHECKING:
    from .contracts import AsyncProvider, EntryBackend, FrameBackend, Importer, Normalizer, Provider
    from .events import Event

PROJECT = "embedonce"
"""The name of the pluggy project, and of the entry-point group of backends, providers and normalisation steps."""

IMPORTERS = "embedonce.importers"
"""The name of the entry-point group of importers."""

Function = TypeVar("Function", bound=Callable[..., Any])


@overload
def hookimpl(function: Function) -> Function: ...


@overload
def hookimpl(*, specname: str | None = ...) -> Callable[[Function], Function]: ...


def hookimpl(function: Any = None, *, specname: str | None = None) -> Any:
    """Mark a function of a plugin's module as the implementation of the hook ``specname``.

    Without ``specname``, the function implements the hook that has the same name as the function.

    pluggy's other options are not supported. They determine how pluggy orders and wraps the calls of several plugins,
    but embedonce calls the hooks of each plugin separately.
    """
    import pluggy

    return pluggy.HookimplMarker(PROJECT)(function, specname=specname)


def embedonce_backends() -> Mapping[str, type[FrameBackend] | type[EntryBackend]]:  # type: ignore[empty-body]
    """Return backend classes by name; TOML uses the name as a tier's ``type``."""


def embedonce_providers() -> Mapping[str, type[Provider] | type[AsyncProvider]]:  # type: ignore[empty-body]
    """Return provider classes by name; TOML uses the name as the provider's ``type``."""


def embedonce_importers() -> Mapping[str, type[Importer]]:  # type: ignore[empty-body]
    """Return importer classes by name; ``embedonce import --from`` and ``[[imports]]`` use the name."""


def embedonce_normalizers() -> Mapping[str, Normalizer]:  # type: ignore[empty-body]
    """Return normalisation steps by name; TOML lists the names in ``[key] normalize``."""


def embedonce_event(event: Event) -> None:
    """Receive one event. The hook runs while the caller waits, so it must be quick and must not raise."""


HOOKS = (embedonce_backends, embedonce_providers, embedonce_importers, embedonce_normalizers, embedonce_event)
