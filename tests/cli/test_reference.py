"""docs/command-line.md describes every command as it is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from embedonce.cli.embedding.run import Summary

DOCS = Path(__file__).parent.parent.parent / "docs"


def test_the_reference_is_current(tmp_path: Path) -> None:
    script, page = tmp_path / "generate_cli.py", tmp_path / "command-line.md"
    script.write_bytes((DOCS / script.name).read_bytes())
    page.write_bytes((DOCS / page.name).read_bytes())
    subprocess.run([sys.executable, "-P", str(script)], check=True)
    assert page.read_text() == (DOCS / page.name).read_text(), "run: python docs/generate_cli.py"


def test_every_count_of_the_summary_is_described() -> None:
    page = (DOCS / "command-line.md").read_text()
    section = page.partition("## The summary of `embed --json`")[2].partition("\n## ")[0]
    assert [name for name in Summary.__dataclass_fields__ if f"`{name}`" not in section] == []
