"""Puts the plugins of ``shelf/`` where this process and its children can import them, as an installed one is."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "shelf"))
