"""For tests of plugins and of what uses them: contracts to subclass, fakes that are real, faults on purpose.

The contracts need pytest and hypothesis (``pip install "embedonce[testing]"``); the rest needs numpy alone.
Contracts and servers are imported when they are asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._lazy import MODULES, load
from ._support import Recipe
from .clocks import ManualClock
from .fakes import CountingProvider, DictBackend
from .faults import Fault, FaultyBackend, FaultyProvider, ProviderFault
from .proxy import FaultProxy, NetworkFault

if TYPE_CHECKING:
    from .backend_contract import BackendContract
    from .gemini_server import GeminiServer
    from .normalizer_contract import NormalizerContract
    from .openai_server import OpenAIServer
    from .provider_contract import ProviderContract

__all__ = [
    "BackendContract",
    "CountingProvider",
    "DictBackend",
    "Fault",
    "FaultProxy",
    "FaultyBackend",
    "FaultyProvider",
    "GeminiServer",
    "ManualClock",
    "NetworkFault",
    "NormalizerContract",
    "OpenAIServer",
    "ProviderContract",
    "ProviderFault",
    "Recipe",
]


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return load(name)
