"""Imports a contract when it is asked for, since it needs pytest and hypothesis."""

from __future__ import annotations

from importlib import import_module
from typing import Any

MODULES = {
    "BackendContract": "backend_contract",
    "NormalizerContract": "normalizer_contract",
    "ProviderContract": "provider_contract",
}


def contract(name: str) -> Any:
    """Return the contract of that name.

    Raises:
        ImportError: pytest or hypothesis is not installed; says how to install them.
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
