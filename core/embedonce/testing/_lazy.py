"""Imports contracts and servers on first use, because these modules are slow to import or require more than numpy."""

from __future__ import annotations

from importlib import import_module
from typing import Any

MODULES = {
    "BackendContract": "contracts.backend",
    "GeminiServer": "servers.gemini",
    "ImporterContract": "contracts.importer",
    "NormalizerContract": "contracts.normalizer",
    "OpenAIServer": "servers.openai",
    "ProviderContract": "contracts.provider",
    "ReadOnlyContract": "contracts.read_only",
}


def load(name: str) -> Any:
    """Import and return the class ``name``, which must be a key of :data:`MODULES`.

    Raises:
        ImportError: the class requires pytest or hypothesis, and that package is not installed. The message says how to
            install it.
    """
    try:
        module = import_module(f".{MODULES[name]}", __package__)
    except ModuleNotFoundError as error:
        if error.name not in ("pytest", "hypothesis"):
            raise
        raise ImportError(
            f'embedonce.testing.{name} requires {error.name}: pip install "embedonce[testing]"'
        ) from error
    return getattr(module, name)
