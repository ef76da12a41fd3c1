"""``bundle_speed.py`` measures a bundle beside LMDB and the disk tier, and checks that all have the same vectors."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from optional import needs

SPEED = Path(__file__).parents[2] / "benchmarks" / "bundle_speed.py"


@needs("lmdb")
@needs("polars")
@needs("pyarrow")
def test_every_store_is_measured(tmp_path: Path) -> None:
    command = [sys.executable, str(SPEED), "--entries", "300", "--dimensions", "8", "--opening", "300"]
    command += ["--repeats", "1", "--openings", "1", "--processes", "1", "--folder", str(tmp_path)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for name in ("LMDB, `getmulti` alone", "disk tier", "**bundle**", "plugin `lmdb` as a tier"):
        assert shown.count(f"\n| {name} | ") == 3, "in the tables of batch hits, of single hits and of opening"
    assert "\n| count | 300 | " in shown
    assert "\n| mean length of the vectors | 1.0" in shown or "\n| mean length of the vectors | 0.99" in shown
    assert "\n### Opening a bundle of 300 entries" in shown
