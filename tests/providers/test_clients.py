"""The clients of a vendor's package: :mod:`embedonce_providers._clients`."""

from __future__ import annotations

import asyncio
import sys
import threading
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from embedonce_providers import _clients
from embedonce_providers._clients import Clients

PACKAGE = "package_that_is_imported_slowly"

begun = threading.Event()
may_end = threading.Event()


def forget_package() -> None:
    sys.modules.pop(PACKAGE, None)
    _clients._imported.discard(PACKAGE)
    begun.clear()
    may_end.clear()


@pytest.fixture
def slow_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make a package whose import ends only when ``may_end`` is set, or after ten seconds."""
    (tmp_path / f"{PACKAGE}.py").write_text(
        f"import sys\ntest = sys.modules[{__name__!r}]\ntest.begun.set()\ntest.may_end.wait(10)\n"
        f"class Client:\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return PACKAGE


def test_prepare_imports_the_package(slow_package: str) -> None:
    may_end.set()

    def make(*_: Any) -> Any:
        raise AssertionError("a client was made")

    clients: Clients[Any, Any] = Clients(slow_package, make=make, amake=make, aclose=make)
    try:
        clients.prepare()
        assert hasattr(sys.modules[slow_package], "Client")
    finally:
        forget_package()


def test_the_event_loop_runs_while_several_first_calls_import_the_package(slow_package: str) -> None:
    async def end(client: Any) -> None:
        pass

    def make() -> Any:
        return import_module(slow_package).Client()

    clients: Clients[Any, Any] = Clients(slow_package, make=make, amake=make, aclose=end)

    async def run() -> list[Any]:
        first = asyncio.create_task(clients.aget())
        while not begun.is_set():
            await asyncio.sleep(0.001)
        others = [asyncio.create_task(clients.aget()) for _ in range(3)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        has_waited_for_the_import = hasattr(sys.modules[slow_package], "Client")
        may_end.set()
        found = await asyncio.gather(first, *others)
        assert not has_waited_for_the_import
        return found

    try:
        found = asyncio.run(run())
    finally:
        may_end.set()
        forget_package()
    assert all(client is found[0] for client in found)
