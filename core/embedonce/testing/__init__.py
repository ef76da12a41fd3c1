"""For tests of plugins and of what uses them: contracts to subclass, fakes that are real, faults on purpose.

The contracts need pytest and hypothesis (``pip install "embedonce[testing]"``) and are imported when
they are asked for; the rest needs numpy alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._support import Recipe
from .clocks import ManualClock
from .fakes import CountingProvider, DictBackend
from .faults import Fault, FaultyBackend, FaultyProvider, ProviderFault
from .proxy import FaultProxy, NetworkFault

if TYPE_CHECKING:
    from .backend_contract import BackendContract
    from .normalizer_contract import NormalizerContract
    from .provider_contract import ProviderContract

__all__ = [
    "BackendContract",
    "CountingProvider",
    "DictBackend",
    "Fault",
    "FaultProxy",
    "FaultyBackend",
    "FaultyProvider",
    "ManualClock",
    "NetworkFault",
    "NormalizerContract",
    "ProviderContract",
    "ProviderFault",
    "Recipe",
]


def __getattr__(name: str) -> Any:
    if name not in ("BackendContract", "NormalizerContract", "ProviderContract"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ._lazy import contract

    return contract(name)
