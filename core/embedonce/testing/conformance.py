"""The contracts run on a plugin without a test file, and how long its operations take: ``embedonce conformance``."""

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
from ._targets import NEW, SERVER, Target, WrongTarget
from .contracts.backend import BackendContract
from .contracts.normalizer import NormalizerContract
from .contracts.provider import ProviderContract
from .contracts.support import Recipe
from .contracts.values import key
from .contracts.whole import Whole

DIMENSIONS = 384
"""Of the vectors with which operations are timed."""
BATCH = 256
LONGEST = 3.0
"""Seconds after which one operation has been timed often enough."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one standard test."""

    test: str
    outcome: Literal["passed", "failed", "skipped"]
    seconds: float
    detail: str = ""
    """Why it failed or was skipped."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How long calls of one operation took, in seconds."""

    operation: str
    batch: int
    """Keys or texts of one call."""
    calls: int
    p50: float
    p99: float


class Conformance:
    """One plugin, the contract for it, and a place for its stores that is removed at the end.

    Raises:
        WrongTarget: the plugin cannot be made from its options, or all its stores are one.
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
        """Folders that were made to hold those."""
        if target.kind != "normalizer":
            target.read(self._needed(target.filled(new="0", server=server)))

    def __enter__(self) -> Conformance:
        try:
            for name in _targets.paths_of(self.target):
                self._folders[name] = self._folder(self.target.options.get(name))
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
            with contextlib.suppress(OSError):  # somebody else uses it now
                folder.rmdir()

    def outcomes(self, only: Sequence[str] = ()) -> Iterator[Outcome]:
        """Run the standard tests, in the order in which the contract has them, and yield each one's outcome.

        Raises:
            WrongTarget: ``only`` names a test that there is not.
        """
        contract = self._contract()
        names = [name for base in contract.__mro__[::-1] for name in vars(base) if name in contract.standard_tests]
        unknown = set(only) - set(names)
        if unknown:
            raise WrongTarget(f"there is no test {', '.join(sorted(unknown))} for a {self.target.kind}")
        configuration.set_hypothesis_home_dir(tempfile.gettempdir())
        for name in names:
            if not only or name in only:
                yield self._outcome(contract, name)

    def _outcome(self, contract: type[Whole], name: str) -> Outcome:
        start = time.perf_counter()
        said, outcome = "", "passed"
        try:
            with contextlib.redirect_stdout(sys.stderr):
                getattr(contract(), name)()
        except pytest.skip.Exception as skipped:
            said, outcome = str(skipped), "skipped"
        except (Exception, SystemExit, pytest.fail.Exception) as error:
            said, outcome = self._said(error), "failed"
        return Outcome(name, outcome, time.perf_counter() - start, said)  # type: ignore[arg-type]

    def _said(self, error: BaseException) -> str:
        """Return an error with where it was raised, unless it repeats a secret of the options."""
        notes = "\n".join(getattr(error, "__notes__", ()))
        message = f"{error}\n{notes}".strip()
        if not isinstance(error, AssertionError):
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(last.filename).name}:{last.lineno}"
            message = f"{type(error).__name__}: {message}".strip(": ") + f" ({place})"
        if any(secret in message for secret in self.target.secrets):
            return f"{type(error).__name__} (its message is hidden: it repeats a secret)"
        return message

    def timings(self, rounds: int) -> list[Timing]:
        """Time the operations of the plugin, each at most ``rounds`` times."""
        if rounds < 1 or self.target.kind == "normalizer":
            return []
        with contextlib.redirect_stdout(sys.stderr):
            timed = self._time_backend if self.target.kind == "backend" else self._time_provider
            return list(timed(rounds))

    # --- how it is made -----------------------------------------------------------------------

    def _needed(self, options: Mapping[str, str]) -> dict[str, str]:
        """Return options with a path for each that the plugin needs and that was not given."""
        return {**{name: "." for name in _targets.paths_of(self.target)}, **options}

    def _folder(self, given: str | None) -> Path:
        """Return a new folder inside the one that was given, or among temporary files."""
        if given is None:
            return Path(tempfile.mkdtemp(prefix="embedonce-conformance-"))
        parent = Path(given.partition(NEW)[0] or ".").expanduser()
        for folder in reversed((parent, *parent.parents)):
            if not folder.exists():
                folder.mkdir()
                self._parents.append(folder)
        return Path(tempfile.mkdtemp(dir=parent, prefix="conformance-"))

    def options(self, server: str = "") -> dict[str, str]:
        """Return the options of a new store."""
        new = f"{self._run}-{next(self._numbers)}"
        options = self.target.filled(new=new, server=server or self._server)
        return {**options, **{name: str(folder / new) for name, folder in self._folders.items()}}

    def _check_stores(self) -> None:
        """Refuse options with which all stores are one: tests would then meet what others have stored.

        Raises:
            WrongTarget: that, or the backend cannot be made.
        """
        made: list[Any] = []
        try:
            with contextlib.redirect_stdout(sys.stderr):
                made += [self._made(), self._made()]
                one, two = made
                if not isinstance(getattr(one, "capabilities", None), Capabilities):
                    raise WrongTarget("a backend has its capabilities: capabilities = Capabilities(...)")
                if one.capabilities.scope == "process":
                    return
                value = self._values(one, 1)[key(1)]
                one.set_many({key(1): value}, None)
                shared = key(1) in two.get_many([key(1)])
        except WrongTarget:
            raise
        except (Exception, SystemExit) as error:
            raise WrongTarget(f"a first store fails: {self._said(error)}") from error
        finally:
            for backend in made:
                with contextlib.suppress(Exception):
                    backend.close()
        if shared:
            raise WrongTarget(
                f"two stores made with these options are one, and each test needs a new one: write {NEW} into an "
                f"option that tells stores apart, such as --option prefix={NEW}"
            )

    def _made(self, options: Mapping[str, str] | None = None) -> Any:
        return self.target.made(self.options() if options is None else options)

    def _contract(self) -> type[Whole]:
        match self.target.kind:
            case "backend":
                return self._backend_contract()
            case "provider":
                return self._provider_contract()
            case "normalizer":
                return self._normalizer_contract()

    def _backend_contract(self) -> type[Whole]:
        conformance = self

        class OfBackend(BackendContract):
            examples = conformance._examples

            def __init__(self) -> None:
                self.made: list[tuple[Any, dict[str, str]]] = []

            def make(self) -> Any:
                return self._with(conformance.options())

            def reopen(self, backend: Any) -> Any:
                return self._with(self._options(backend))

            def recipe(self, backend: Any) -> Recipe:
                return Recipe(_targets.make, {"written": conformance.target.written, "options": self._options(backend)})

            def _with(self, options: dict[str, str]) -> Any:
                backend = conformance._made(options)
                self.made.append((backend, options))
                return backend

            def _options(self, backend: Any) -> dict[str, str]:
                return next(options for one, options in self.made if one is backend)

        if not any(SERVER in text for text in self.target.options.values()):
            return OfBackend

        class OfServer(OfBackend):
            def server(self) -> tuple[str, int]:
                host, _, port = conformance._server.rpartition(":")
                return host, int(port)

            def through(self, backend: Any, host: str, port: int) -> Any:
                written, mine = conformance.target.options, self._options(backend)
                moved = {name: mine[name].replace(conformance._server, f"{host}:{port}") for name in written}
                return self._with({**mine, **{name: moved[name] for name in written if SERVER in written[name]}})

        return OfServer

    def _provider_contract(self) -> type[Whole]:
        conformance, options = self, self.options()

        class OfProvider(ProviderContract):
            tolerance = conformance._tolerance
            most = conformance._most

            def make(self) -> Any:
                return conformance._made(options)

            def recipe(self) -> Recipe:
                return Recipe(_targets.make, {"written": conformance.target.written, "options": options})

        return OfProvider

    def _normalizer_contract(self) -> type[Whole]:
        step = self.target.plugin

        class OfStep(NormalizerContract):
            examples = self._examples

            def make(self) -> Any:
                return step

            def recipe(self) -> Recipe | None:
                return Recipe(step) if _is_importable(step) else None

        return OfStep

    # --- how long it takes --------------------------------------------------------------------

    def _values(self, backend: Any, count: int, start: int = 0) -> dict[str, Any]:
        """Return entries, or frames, as the engine hands them to the backend, under the keys 1 and on."""
        chance = np.random.default_rng(0)
        rows = chance.standard_normal((count, DIMENSIONS)).astype(np.float32)
        entries = {key(start + n): Entry(freeze(row), time.time()) for n, row in enumerate(rows, 1)}
        return dict(encode_frames(entries)) if backend.capabilities.holds == "frames" else dict(entries)

    def _time_backend(self, rounds: int) -> Iterator[Timing]:
        with contextlib.closing(self._made()) as backend:
            caps = backend.capabilities
            for batch in sorted({1, min(BATCH, caps.max_batch or BATCH)}):
                yield from self._time_batch(backend, batch, rounds)

    def _time_batch(self, backend: Any, batch: int, rounds: int) -> Iterator[Timing]:
        items, caps = self._values(backend, batch), backend.capabilities
        keys, absent = list(items), [key(10**6 + n) for n in range(batch)]
        store = partial(backend.set_many, items, None)
        yield _timed("set_many", batch, rounds, store)
        yield _timed("get_many, all hits", batch, rounds, partial(backend.get_many, keys))
        yield _timed("get_many, all misses", batch, rounds, partial(backend.get_many, absent))
        if caps.get and batch == 1:
            yield _timed("get, a hit", 1, rounds, partial(backend.get, keys[0]))
        if caps.delete:
            yield _timed("delete_many", batch, rounds, partial(backend.delete_many, keys), before=store)

    def _time_provider(self, rounds: int) -> Iterator[Timing]:
        with contextlib.closing(self._made()) as provider, asyncio.Runner() as runner:
            blocking = hasattr(provider, "embed")

            def embed(texts: Sequence[str]) -> None:
                if blocking:
                    provider.embed(texts, "document")
                else:
                    runner.run(provider.aembed(texts, "document"))

            for batch in sorted({1, min(32, self._most, provider.limits.max_batch)}):
                texts = [f"A text to be embedded, number {n} of {batch}." for n in range(batch)]
                yield _timed("embed" if blocking else "aembed", batch, rounds, partial(embed, texts))


def _is_importable(step: Any) -> bool:
    """Whether another process can import a function by its name: a lambda or a method of the interpreter's has none."""
    module, name = getattr(step, "__module__", None), getattr(step, "__qualname__", "<")
    return isinstance(module, str) and "<" not in name


def _timed(
    operation: str, batch: int, rounds: int, call: Callable[[], object], before: Callable[[], object] | None = None
) -> Timing:
    seconds: list[float] = []
    end = time.perf_counter() + LONGEST
    while not seconds or (len(seconds) < rounds and time.perf_counter() < end):
        if before is not None:
            before()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    p50, p99 = np.percentile(seconds, (50, 99))
    return Timing(operation, batch, len(seconds), float(p50), float(p99))
