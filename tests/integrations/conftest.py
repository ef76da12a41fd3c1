"""Frameworks in tests send no statistics and fetch nothing by themselves."""

from __future__ import annotations

import os

# Read when the frameworks are imported.
os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
