"""Writes distributions with plugins, as an installer leaves them in a folder."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path

from embedonce import hookspecs


def write_distribution(
    site: Path,
    module: str,
    code: str,
    *,
    plugins: Sequence[str],
    distribution: str,
    version: str = "1.0",
    metadata: str = "",
    group: str = hookspecs.PROJECT,
) -> None:
    """Write a distribution with one module to a folder, which is created if it is missing.

    Each name in ``plugins`` is an entry point of the module, in the entry-point group ``group``. The plugins are found
    once the folder is on the path.
    """
    # As installers do it: importlib.metadata takes what precedes the first hyphen for the name of the distribution.
    info = site / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (site / f"{module}.py").write_text(inspect.cleandoc(code) + "\n")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n{metadata}")
    entries = "".join(f"{name} = {module}\n" for name in plugins)
    (info / "entry_points.txt").write_text(f"[{group}]\n{entries}")
