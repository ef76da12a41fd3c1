"""``growth.py`` measures every store at every size, and refuses sizes for which the disk has no room."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from optional import needs

GROWTH = Path(__file__).parents[2] / "benchmarks" / "growth.py"


def run_growth(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(GROWTH), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@needs("matplotlib")
def test_every_store_is_measured_at_every_size(tmp_path: Path) -> None:
    plot, values = tmp_path / "growth.png", tmp_path / "growth.json"
    done = run_growth("--sizes", "600,300", "--folder", tmp_path, "--plot", plot, "--json", values)
    assert done.returncode == 0, done.stderr
    points = json.loads(values.read_text())
    stores = list(dict.fromkeys(point["store"] for point in points))
    assert [(point["entries"], point["store"]) for point in points] == [
        (n, name) for n in (300, 600) for name in stores
    ]
    assert {"**disk tier**", "minimal SQLite, 8 KiB pages", "minimal SQLite, 16 KiB pages", "diskcache"} <= set(stores)
    for point in points:
        assert all(value > 0 for name, value in point.items() if name != "store")
        assert point["bytes_per_entry"] > 1600
    lines = done.stdout.splitlines()
    assert "| Bytes per entry | 300 | 600 |" in lines
    assert sum(line.startswith("| **disk tier** | ") for line in lines) == 6
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert {*tmp_path.iterdir()} == {plot, values}


@pytest.mark.parametrize("options", [["--sizes", "1000,1000000000000"], ["--full", "--sizes", "1000000000000"]])
def test_a_size_without_room_on_the_disk_is_refused(tmp_path: Path, options: list[str]) -> None:
    done = run_growth(*options, "--folder", tmp_path)
    assert done.returncode == 1
    assert f"{tmp_path} has " in done.stderr
    assert "GB of free space, but 1,000,000,000,000 entries in" in done.stderr
    assert list(tmp_path.iterdir()) == []
