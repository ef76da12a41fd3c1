"""``import_speed.py`` reads every text of each case, with the floor and with the importer."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import optional

SPEED = Path(__file__).parents[2] / "benchmarks" / "import_speed.py"


@optional.needs("pyarrow")
def test_each_case_is_measured(tmp_path: Path) -> None:
    command = [sys.executable, str(SPEED), "--rows", "30", "--dimensions", "8", "--repeats", "1"]
    command += ["--folder", str(tmp_path)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for name in ("parquet", "langchain"):
        assert f"### {name}: 30 texts" in shown
    assert all(shown.count(f"| {way} |") == 2 for way in ("start", "floor", "importer", "store", "command"))
