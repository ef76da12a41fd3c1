"""Writes distributions with plugins, as an installer leaves them in a folder."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path


def write_distribution(
    site: Path,
    module: str,
    code: str,
    *,
    plugins: Sequence[str],
    distribution: str,
    version: str = "1.0",
    metadata: str = "",
) -> None:
    """Write a distribution with one module to a folder, which is created if it is missing.

    Each name in ``plugins`` is an entry point of the module. The plugins are found once the folder is on the path.
    """
    info = site / f"{distribution}-{version}.dist-info"
    info.mkdir(parents=True)
    (site / f"{module}.py").write_text(inspect.cleandoc(code) + "\n")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n{metadata}")
    entries = "".join(f"{name} = {module}\n" for name in plugins)
    (info / "entry_points.txt").write_text(f"[embedonce]\n{entries}")
