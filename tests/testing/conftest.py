"""Puts the plugins of ``shelf/`` on the import path of this process and its children, like installed plugins."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent / "shelf"))
