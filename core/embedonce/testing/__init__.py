"""Tools for testing plugins and the code that uses plugins: contracts, fakes, injected faults and loopback servers.

A contract is a class of standard tests; a plugin's own test class is a subclass of the contract. The contracts require
pytest and hypothesis (``pip install "embedonce[testing]"``); the other tools require only numpy. The contracts and the
servers are imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._lazy import MODULES, load
from .clocks import ManualClock
from .contracts.support import Recipe
from .fakes import CountingProvider, DictBackend
from .faults import Fault, FaultyBackend, FaultyProvider, ProviderFault
from .proxy import FaultProxy, NetworkFault

if TYPE_CHECKING:
    from .contracts.backend import BackendContract
    from .contracts.importer import ImporterContract
    from .contracts.normalizer import NormalizerContract
    from .contracts.provider import ProviderContract
    from .contracts.read_only import ReadOnlyContract
    from .servers.gemini import GeminiServer
    from .servers.openai import OpenAIServer

__all__ = [
    "BackendContract",
    "CountingProvider",
    "DictBackend",
    "Fault",
    "FaultProxy",
    "FaultyBackend",
    "FaultyProvider",
    "GeminiServer",
    "ImporterContract",
    "ManualClock",
    "NetworkFault",
    "NormalizerContract",
    "OpenAIServer",
    "ProviderContract",
    "ProviderFault",
    "ReadOnlyContract",
    "Recipe",
]


def __getattr__(name: str) -> Any:
    if name not in MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return load(name)
