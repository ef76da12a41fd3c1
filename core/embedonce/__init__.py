"""Embed each text once: a pluggable, tiered cache for text embeddings."""

from ._engine.chain import Tier
from ._engine.imports import Import
from .answers import Copied, Estimate, Explanation, Exported, Fetched, Held, ProviderCheck, Purged, TierCheck
from .cache import Cache
from .config import open
from .contracts import Capabilities, Embedded, Limits
from .drift import DriftGuard
from .errors import (
    CacheClosed,
    ConfigError,
    DriftError,
    EmbedonceError,
    EraseIncomplete,
    ImportRefused,
    Incomplete,
    PartialAnswer,
    PluginError,
    ProviderError,
    ProviderTimeout,
    ReplayMiss,
    SourceError,
    SpaceError,
    StoreBusy,
    StoreExists,
    TextError,
    TextRefused,
    TierBusy,
    TierError,
    TierTimeout,
    TransferRefused,
    TransferStopped,
)
from .events import Stats
from .hookspecs import hookimpl
from .keys import KeyPolicy, VectorSpace
from .vectors import Cost, Entry, Matrix, Vector

__version__ = "0.1.0"

__all__ = [
    "Cache",
    "CacheClosed",
    "Capabilities",
    "ConfigError",
    "Copied",
    "Cost",
    "DriftError",
    "DriftGuard",
    "Embedded",
    "EmbedonceError",
    "Entry",
    "EraseIncomplete",
    "Estimate",
    "Explanation",
    "Exported",
    "Fetched",
    "Held",
    "Import",
    "ImportRefused",
    "Incomplete",
    "KeyPolicy",
    "Limits",
    "Matrix",
    "PartialAnswer",
    "PluginError",
    "ProviderCheck",
    "ProviderError",
    "ProviderTimeout",
    "Purged",
    "ReplayMiss",
    "SourceError",
    "SpaceError",
    "Stats",
    "StoreBusy",
    "StoreExists",
    "TextError",
    "TextRefused",
    "Tier",
    "TierBusy",
    "TierCheck",
    "TierError",
    "TierTimeout",
    "TransferRefused",
    "TransferStopped",
    "Vector",
    "VectorSpace",
    "hookimpl",
    "open",
]
