"""The code behind ``embedonce conformance``: it runs the standard tests on a plugin, and times the plugin."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import configuration

from embedonce.contracts import Capabilities
from embedonce.vectors import Entry, encode_frames, freeze

from . import _targets
from ._targets import NEW, SERVER, InvalidTarget, Target
from .contracts.backend import BackendContract
from .contracts.normalizer import NormalizerContract
from .contracts.provider import ProviderContract
from .contracts.support import Recipe
from .contracts.values import key
from .contracts.whole import Contract

DIMENSIONS = 384
"""Number of dimensions of the vectors that are used for timing."""
BATCH = 256
READ_ONLY_REFUSED = (
    "this backend is read-only, so its tests need a function that makes stores for it; write a test file with "
    "embedonce.testing.ReadOnlyContract (see docs/testing.md)"
)
MAX_SECONDS_PER_OPERATION = 3.0
"""Seconds after which the timing of one operation stops."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The outcome of one standard test."""

    test: str
    outcome: Literal["passed", "failed", "skipped"]
    seconds: float
    detail: str = ""
    """The reason for a failure or skip."""


@dataclass(frozen=True, slots=True)
class Timing:
    """The measured times of one operation. ``p50`` and ``p99`` are percentiles, in seconds per call."""

    operation: str
    batch: int
    """Number of keys or texts per call."""
    calls: int
    p50: float
    p99: float


class Conformance:
    """Runs the standard tests on one plugin, and measures how long the plugin's operations take.

    On exit, it removes the folders that were created for the plugin's stores.

    Raises:
        InvalidTarget: the plugin cannot be made from its options, or the options give every test the same store.
    """

    def __init__(
        self, target: Target, *, server: str = "", tolerance: float = 0.0, most: int = 256, examples: int = 20
    ) -> None:
        self.target = target
        self._server = server
        self._tolerance, self._most, self._examples = tolerance, most, examples
        self._numbers = itertools.count(1)
        self._run = f"{os.getpid()}-{time.time_ns():x}"
        self._folders: dict[str, Path] = {}
        self._parents: list[Path] = []
        """Folders that did not exist, so this run created them to put its stores into. ``__exit__`` removes each of
        these folders if it is empty by then."""
        if target.kind == "backend" and _is_read_only(target.plugin):
            raise InvalidTarget(READ_ONLY_REFUSED)
        if target.kind != "normalizer":
            target.read(self._add_missing_paths(target.fill_placeholders(new="0", server=server)))

    def __enter__(self) -> Conformance:
        try:
            for name in _targets.list_store_folders(self.target):
                self._folders[name] = self._make_folder(self.target.options.get(name))
            if self.target.kind == "backend":
                self._check_stores()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for folder in self._folders.values():
            shutil.rmtree(folder, ignore_errors=True)
        for folder in reversed(self._parents):
            with contextlib.suppress(OSError):  # the folder is not empty if something else has put files into it
                folder.rmdir()

    def run_tests(self, only: Sequence[str] = ()) -> Iterator[Outcome]:
        """Run the standard tests in the order of the contract, and yield the outcome of each test.

        Raises:
            InvalidTarget: ``only`` names a test that the contract does not have.
        """
        contract = self._make_contract()
        names = [name for base in contract.__mro__[::-1] for name in vars(base) if name in contract.standard_tests]
        unknown = set(only) - set(names)
        if unknown:
            raise InvalidTarget(f"the contract of a {self.target.kind} has no test {', '.join(sorted(unknown))}")
        configuration.set_hypothesis_home_dir(tempfile.gettempdir())
        for name in names:
            if not only or name in only:
                yield self._run_test(contract, name)

    def _run_test(self, contract: type[Contract], name: str) -> Outcome:
        start = time.perf_counter()
        detail, outcome = "", "passed"
        try:
            with contextlib.redirect_stdout(sys.stderr):
                getattr(contract(), name)()
        except pytest.skip.Exception as skipped:
            detail, outcome = str(skipped), "skipped"
        except (Exception, SystemExit, pytest.fail.Exception) as error:
            detail, outcome = self._describe_error(error), "failed"
        return Outcome(name, outcome, time.perf_counter() - start, detail)  # type: ignore[arg-type]

    def _describe_error(self, error: BaseException) -> str:
        """Return the message of an error, or hide the message if it contains a secret.

        If the error is not an AssertionError, the result also has the place where the error was raised.
        """
        notes = "\n".join(getattr(error, "__notes__", ()))
        message = f"{error}\n{notes}".strip()
        if not isinstance(error, AssertionError):
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(last.filename).name}:{last.lineno}"
            message = f"{type(error).__name__}: {message}".strip(": ") + f" ({place})"
        if any(secret in message for secret in self.target.secrets):
            return f"{type(error).__name__} (message hidden because it contains the value of a secret option)"
        return message

    def measure_times(self, rounds: int) -> list[Timing]:
        """Time the operations of the plugin, each at most ``rounds`` times."""
        if rounds < 1 or self.target.kind == "normalizer":
            return []
        with contextlib.redirect_stdout(sys.stderr):
            timed = self._time_backend if self.target.kind == "backend" else self._time_provider
            return list(timed(rounds))

    # --- making the plugin --------------------------------------------------------------------

    def _add_missing_paths(self, options: Mapping[str, str]) -> dict[str, str]:
        """Add a path for each required path option that is missing."""
        return {**{name: "." for name in _targets.list_store_folders(self.target)}, **options}

    def _make_folder(self, given: str | None) -> Path:
        """Create a new folder inside ``given``, or inside the system's temporary folder if ``given`` is None."""
        if given is None:
            return Path(tempfile.mkdtemp(prefix="embedonce-conformance-"))
        parent = Path(given.partition(NEW)[0] or ".").expanduser()
        for folder in reversed((parent, *parent.parents)):
            if not folder.exists():
                folder.mkdir()
                self._parents.append(folder)
        return Path(tempfile.mkdtemp(dir=parent, prefix="conformance-"))

    def make_options(self, server: str = "") -> dict[str, str]:
        """Return the options for a new store."""
        new = f"{self._run}-{next(self._numbers)}"
        options = self.target.fill_placeholders(new=new, server=server or self._server)
        return {**options, **{name: str(folder / new) for name, folder in self._folders.items()}}

    def _check_stores(self) -> None:
        """Check that two backends made with the options have separate stores, because tests must not share entries.

        Raises:
            InvalidTarget: the two backends share a store, or a backend cannot be made or used.
        """
        made: list[Any] = []
        try:
            with contextlib.redirect_stdout(sys.stderr):
                made.append(self._make_plugin())
                one = made[0]
                if not isinstance(getattr(one, "capabilities", None), Capabilities):
                    raise InvalidTarget("a backend must declare its capabilities: capabilities = Capabilities(...)")
                if _is_read_only(one):
                    raise InvalidTarget(READ_ONLY_REFUSED)
                if one.capabilities.scope == "process":
                    return
                value = self._make_values(one, 1)[key(1)]
                one.set_many({key(1): value}, None)
                if one.capabilities.scope == "single":
                    one.close()  # if the options give the same store again, it can be opened only now
                made.append(self._make_plugin())
                shared = key(1) in made[1].get_many([key(1)])
        except InvalidTarget:
            raise
        except (Exception, SystemExit) as error:
            raise InvalidTarget(f"making and using a store failed: {self._describe_error(error)}") from error
        finally:
            for backend in made:
                with contextlib.suppress(Exception):
                    backend.close()
        if shared:
            raise InvalidTarget(
                f"two stores made with these options share their entries, but each test requires a new store: "
                f"write {NEW} into an option that separates stores, such as --option prefix={NEW}"
            )

    def _make_plugin(self, options: Mapping[str, str] | None = None) -> Any:
        return self.target.make_plugin(self.make_options() if options is None else options)

    def _make_recipe(self, options: dict[str, str]) -> Recipe:
        return Recipe(_targets.make_from_recipe, {"written": self.target.written, "options": options})

    def _make_contract(self) -> type[Contract]:
        match self.target.kind:
            case "backend":
                return self._make_backend_contract()
            case "provider":
                return self._make_provider_contract()
            case "normalizer":
                return self._make_normalizer_contract()

    def _make_backend_contract(self) -> type[Contract]:
        conformance = self

        class BackendRun(BackendContract):
            examples = conformance._examples

            def __init__(self) -> None:
                self.made: list[tuple[Any, dict[str, str]]] = []

            def make(self) -> Any:
                return self._make_with(conformance.make_options())

            def reopen(self, backend: Any) -> Any:
                return self._make_with(self._find_options(backend))

            def recipe(self, backend: Any) -> Recipe:
                return conformance._make_recipe(self._find_options(backend))

            def _make_with(self, options: dict[str, str]) -> Any:
                backend = conformance._make_plugin(options)
                self.made.append((backend, options))
                return backend

            def _find_options(self, backend: Any) -> dict[str, str]:
                return next(options for one, options in self.made if one is backend)

        if not any(SERVER in text for text in self.target.options.values()):
            return BackendRun

        class ServerRun(BackendRun):
            def server(self) -> tuple[str, int]:
                host, _, port = conformance._server.rpartition(":")
                return host, int(port)

            def through(self, backend: Any, host: str, port: int) -> Any:
                written, mine = conformance.target.options, self._find_options(backend)
                moved = {name: mine[name].replace(conformance._server, f"{host}:{port}") for name in written}
                return self._make_with({**mine, **{name: moved[name] for name in written if SERVER in written[name]}})

        return ServerRun

    def _make_provider_contract(self) -> type[Contract]:
        conformance, options = self, self.make_options()

        class ProviderRun(ProviderContract):
            tolerance = conformance._tolerance
            most = conformance._most

            def make(self) -> Any:
                return conformance._make_plugin(options)

            def recipe(self) -> Recipe:
                return conformance._make_recipe(options)

        return ProviderRun

    def _make_normalizer_contract(self) -> type[Contract]:
        step = self.target.plugin

        class NormalizerRun(NormalizerContract):
            examples = self._examples

            def make(self) -> Any:
                return step

            def recipe(self) -> Recipe | None:
                return Recipe(step) if _is_importable(step) else None

        return NormalizerRun

    # --- timing -------------------------------------------------------------------------------

    def _make_values(self, backend: Any, count: int, start: int = 0) -> dict[str, Any]:
        """Return ``count`` values of the kind that the backend holds, under keys numbered from ``start + 1``."""
        chance = np.random.default_rng(0)
        rows = chance.standard_normal((count, DIMENSIONS)).astype(np.float32)
        entries = {key(start + n): Entry(freeze(row), time.time()) for n, row in enumerate(rows, 1)}
        return dict(encode_frames(entries)) if backend.capabilities.holds == "frames" else dict(entries)

    def _time_backend(self, rounds: int) -> Iterator[Timing]:
        with contextlib.closing(self._make_plugin()) as backend:
            caps = backend.capabilities
            for batch in sorted({1, min(BATCH, caps.max_batch or BATCH)}):
                yield from self._time_batch(backend, batch, rounds)

    def _time_batch(self, backend: Any, batch: int, rounds: int) -> Iterator[Timing]:
        items, caps = self._make_values(backend, batch), backend.capabilities
        keys, absent = list(items), [key(10**6 + n) for n in range(batch)]
        store = partial(backend.set_many, items, None)
        yield _measure("set_many", batch, rounds, store)
        yield _measure("get_many, all hits", batch, rounds, partial(backend.get_many, keys))
        yield _measure("get_many, all misses", batch, rounds, partial(backend.get_many, absent))
        if caps.get and batch == 1:
            yield _measure("get, a hit", 1, rounds, partial(backend.get, keys[0]))
        if caps.delete:
            yield _measure("delete_many", batch, rounds, partial(backend.delete_many, keys), before=store)

    def _time_provider(self, rounds: int) -> Iterator[Timing]:
        with contextlib.closing(self._make_plugin()) as provider, asyncio.Runner() as runner:
            blocking = hasattr(provider, "embed")

            def embed(texts: Sequence[str]) -> None:
                if blocking:
                    provider.embed(texts, "document")
                else:
                    runner.run(provider.aembed(texts, "document"))

            for batch in sorted({1, min(32, self._most, provider.limits.max_batch)}):
                texts = [f"A text to be embedded, number {n} of {batch}." for n in range(batch)]
                yield _measure("embed" if blocking else "aembed", batch, rounds, partial(embed, texts))


def _is_read_only(backend: Any) -> bool:
    """Return whether a backend, or all backends of a class, are read-only."""
    capabilities = getattr(backend, "capabilities", None)
    return isinstance(capabilities, Capabilities) and capabilities.read_only


def _is_importable(step: Any) -> bool:
    """Return whether another process can import ``step`` by name. A lambda or nested function is not importable."""
    module, name = getattr(step, "__module__", None), getattr(step, "__qualname__", "<")
    return isinstance(module, str) and "<" not in name


def _measure(
    operation: str, batch: int, rounds: int, call: Callable[[], object], before: Callable[[], object] | None = None
) -> Timing:
    seconds: list[float] = []
    end = time.perf_counter() + MAX_SECONDS_PER_OPERATION
    while not seconds or (len(seconds) < rounds and time.perf_counter() < end):
        if before is not None:
            before()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    p50, p99 = np.percentile(seconds, (50, 99))
    return Timing(operation, batch, len(seconds), float(p50), float(p99))
