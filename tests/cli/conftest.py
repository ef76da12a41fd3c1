"""Running commands: in this process if possible, in a process of their own for signals and pipes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from embedonce.cli import app


@dataclass(frozen=True)
class Done:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Command = Callable[..., Done]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder of the test, which is empty."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def command(folder: Path) -> Command:
    """Run ``embedonce ARGUMENTS`` in this process."""

    def run(*arguments: str | Path, input: str | bytes = b"") -> Done:
        result = CliRunner().invoke(app, list(map(str, arguments)), input=input)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Done(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture
def process(folder: Path) -> Callable[..., subprocess.Popen[str]]:
    """Start ``embedonce ARGUMENTS`` in a process of its own that obeys Ctrl-C, however the tests were started."""
    code = "import signal; signal.signal(2, signal.default_int_handler); from embedonce.cli import main; main()"

    def start(*arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, "-P", "-c", code, *map(str, arguments)], **(pipes | options))

    return start
