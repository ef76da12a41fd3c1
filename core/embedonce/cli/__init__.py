"""The command line: ``embedonce`` and ``python -m embedonce``."""

from __future__ import annotations

from .main import app, main

__all__ = ["app", "main"]
