"""``bundle_formats.py`` measures every format, and each program reads the files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from optional import needs

FORMATS = Path(__file__).parents[2] / "benchmarks" / "bundle_formats.py"


@needs("polars")
@needs("duckdb")
@needs("pyarrow")
@needs("lmdb")
def test_stores_are_measured_and_other_programs_read_the_files(tmp_path: Path) -> None:
    command = [sys.executable, str(FORMATS), "--rows", "300", "--dimensions", "8", "--repeats", "2", "--batches", "2"]
    command += ["--openings", "1", "--processes", "1", "--only", "Arrow", "alone", "--folder", str(tmp_path)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines() if line[:2] == "| "]
    figures = {cells[0]: cells[1:] for cells in rows if cells[0].startswith(("Arrow", "LMDB"))}
    names = {
        "LMDB, `getmulti` alone",
        "Arrow, mapped, with a checksum per row",
        "Arrow, mapped",
        "Arrow",
    }
    assert set(figures) == names
    for cells in figures.values():
        assert all(float(cell) >= 0 for cell in cells)
    assert [len(cells) for cells in figures.values()] == [10, 10, 10, 3]
    assert list(tmp_path.iterdir()) == []


def test_a_size_of_zero_is_refused() -> None:
    command = [sys.executable, str(FORMATS), "--rows", "0"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "must be at least 1" in done.stderr
