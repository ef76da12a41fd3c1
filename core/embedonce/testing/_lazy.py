"""Imports what costs time or needs more than numpy when it is asked for: contracts, and servers."""

from __future__ import annotations

from importlib import import_module
from typing import Any

MODULES = {
    "BackendContract": "contracts.backend",
    "GeminiServer": "servers.gemini",
    "NormalizerContract": "contracts.normalizer",
    "OpenAIServer": "servers.openai",
    "ProviderContract": "contracts.provider",
}


def load(name: str) -> Any:
    """Return the class of that name, one of :data:`MODULES`.

    Raises:
        ImportError: pytest or hypothesis, which the contracts need, is not installed; says how to install them.
    """
    try:
        module = import_module(f".{MODULES[name]}", __package__)
    except ModuleNotFoundError as error:
        if error.name not in ("pytest", "hypothesis"):
            raise
        raise ImportError(
            f'embedonce.testing.{name} needs {error.name}; install it with: pip install "embedonce[testing]"'
        ) from error
    return getattr(module, name)
