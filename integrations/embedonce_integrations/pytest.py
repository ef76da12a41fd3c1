"""The pytest plugin: records the vectors that tests need in a bundle, and replays them without a provider.

pytest imports this module in every session, so it imports only what pytest has imported already. Everything else is in
modules beside it, which are imported when a session records or replays, or when a test uses the fixture.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from embedonce import Cache

OPTION = "--embedonce"
VARIABLE = "EMBEDONCE_MODE"
MODES = ("record", "replay", "off")

MARKER = (
    "embedonce(*, path=None, mode=None): record and replay the vectors of these tests in the bundle `path`, relative "
    'to the file of the test; with mode="off", caches that these tests make work as usual'
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.getgroup("embedonce", "vectors of texts (embedonce)").addoption(
        OPTION,
        choices=MODES,
        help="record: caches work as usual, and the vectors that the tests need are written to a bundle, which is "
        "tests/embeddings by default. replay: vectors come only from the bundle; no provider is called, and a test "
        "fails if it needs a text that the bundle does not have. off (default): caches work as usual. Without this "
        f"option, the environment variable {VARIABLE} sets the mode.",
    )


def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    """Begin before conftest files are imported, because they may make caches."""
    _begin(early_config, early_config.known_args_namespace.embedonce)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", MARKER)
    _begin(config, config.getoption("embedonce"))  # if a conftest file has loaded this plugin, the session begins here


def _begin(config: pytest.Config, option: str | None) -> None:
    mode = option or os.environ.get(VARIABLE) or "off"
    if mode not in MODES:
        raise pytest.UsageError(f"the environment variable {VARIABLE} must be record, replay or off, got {mode!r}")
    if mode != "off":
        from ._pytest_session import begin_session

        begin_session(config, replays=mode == "replay")


@pytest.fixture
def embedonce_cache(request: pytest.FixtureRequest) -> Iterator[Cache]:
    """The cache that the configuration in pytest's root folder describes. It is closed after the test."""
    from ._pytest_settings import open_cache

    with open_cache(request.config.rootpath) as cache:
        yield cache
