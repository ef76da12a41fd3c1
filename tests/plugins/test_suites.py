"""Run the tests of each example plugin, as installed, in a separate process."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import NAMES, PLUGINS


@pytest.mark.timeout(900)  # each takes 10 to 25 s on an idle machine
@pytest.mark.parametrize("name", NAMES)
def test_the_tests_of_each_example_plugin_pass(
    name: str, environment: dict[str, str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    if name == "keyvalue":
        environment["REDIS_URL"] = request.getfixturevalue("redis_server").url
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "t")]
    done = subprocess.run(
        [*command, str(PLUGINS / name / "tests")], env=environment, capture_output=True, text=True, timeout=840
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout), done.stdout
