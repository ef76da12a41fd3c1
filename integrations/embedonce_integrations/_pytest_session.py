"""A session of tests that records or replays: what the plugin does before, during and after the tests."""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import os
import shutil
import tempfile
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

import embedonce
from embedonce.errors import ConfigError, PluginError, ReplayMiss, StoreExists
from embedonce.governing import Answered, Governor, govern_chains
from embedonce.plugins import backend

from ._pytest_misses import describe_misses, summarise_misses
from ._pytest_recording import Recorded, Recording
from ._pytest_settings import choose_bundle, find_bundle
from ._pytest_store import SessionStore, WrittenBundle, find_obstacle, write_bundle

NAME = "embedonce-session"
WORKER_FOLDER = "embedonce_folder"
"""Key of the folder in which the workers of pytest-xdist hand over what they have recorded."""

LEAVING_OUT = ("setuponly", "setupplan", "lf", "ignore", "ignore_glob")
CONFIGURING = ("inifilename", "override_ini", "noconftest")
"""Options with which pytest may find fewer tests."""

PACKAGE = Path(embedonce.__file__).parent
INTEGRATIONS = Path(__file__).parent

Node = pytest.Item | pytest.Collector | pytest.Session


def begin_session(config: pytest.Config, *, replays: bool) -> None:
    """Govern the caches that are made from now on until the session ends. A second call does nothing.

    Raises:
        pytest.UsageError: a package is missing, or the configuration has an invalid ``bundle``.
    """
    if config.pluginmanager.has_plugin(NAME):
        return
    try:
        backend("bundle")
    except PluginError as error:
        raise pytest.UsageError(f"--embedonce cannot be used: {error}") from None
    session = EmbeddingSession(config, replays=replays)
    config.pluginmanager.register(session, NAME)
    stack = contextlib.ExitStack()
    stack.enter_context(govern_chains(session.choose_governor))
    config.add_cleanup(stack.close)


class EmbeddingSession:
    """The governor of the caches of one session, and the hooks of pytest that it needs."""

    def __init__(self, config: pytest.Config, *, replays: bool) -> None:
        self.replays = replays
        self.default = find_bundle(config.rootpath)
        self.store = SessionStore(self._choose_path, lists_texts=not replays)
        self._config = config
        self._root = config.rootpath
        self._recording = Recording()
        self._item: pytest.Item | None = None
        """The test that runs now. A process runs one test at a time, so the threads of a test belong to it too."""
        self._targets: list[Path | None] = []
        """The bundles of the test and of the fixtures that are being set up; None for mode "off". The last one counts.
        """
        self._checked: dict[Path, str | None] = {}
        """Per bundle, why it cannot be used, or None."""
        self._misses: list[str] = []
        """The messages of the texts that were missing since the last report."""
        self._missed: dict[str, list[str]] = {}
        """All of these messages by test."""
        self._left_out: set[str] = set()
        """Why this session is not a run of all tests."""
        self._collected: set[str] = set()
        self._finished: set[str] = set()
        """The tests that were collected, and those that have ended."""
        self._folder: Path | None = None
        """Where other processes of this session hand over what they have recorded."""
        self._is_worker = False
        self._is_forked = False
        self._pid = os.getpid()
        self._written: list[tuple[Path, WrittenBundle | str, str | None]] = []
        """Per bundle, what was written, or why it could not be written; and why texts that are not needed were kept."""

    # --- the governor -------------------------------------------------------------------------

    def choose_governor(self) -> Governor | None:
        """Return the governor of a new cache; None in a test whose mode is "off"."""
        return None if self._targets and self._targets[-1] is None else self

    def take_answer(self, answered: Answered, /) -> None:
        """Record what a call was answered, for the bundle of the test that runs now."""
        if os.getpid() != self._pid:  # a process that a test has forked, such as one of multiprocessing
            self._pid, self._is_forked, self._recording = os.getpid(), True, Recording()
        path = self._targets[-1] if self._targets else self.default
        if path is not None:
            test = "a fixture or an import" if self._item is None else self._item.nodeid
            self._recording.take(path, test, answered, self.store.open(path))
            if self._is_forked:  # it ends without a call of pytest's hooks
                self._hand_over()

    def explain_misses(self, answered: Answered, /) -> ReplayMiss:
        """Return an error that names the test, the positions of the missing texts, and what to do."""
        path = self._choose_path()
        test = None if self._item is None else self._name_test(self._item.nodeid)
        message = describe_misses(answered, test, self.show(path), self.store.open(path))
        self._misses.append(message)
        return ReplayMiss(message)

    def _name_test(self, nodeid: str) -> str:
        """Return the name of a test for a command in the folder in which pytest was started."""
        file, separator, rest = nodeid.partition("::")
        return os.path.relpath(self._root / file, self._config.invocation_params.dir) + separator + rest

    def _choose_path(self) -> Path:
        return (self._targets[-1] if self._targets else None) or self.default

    def show(self, path: Path) -> str:
        """Return the path of a bundle as messages show it: relative to the root folder if it is inside."""
        return path.relative_to(self._root).as_posix() if path.is_relative_to(self._root) else str(path)

    def find_problem(self, path: Path) -> str | None:
        """Return why a bundle cannot be read or written; None if it can."""
        if path not in self._checked:
            self._checked[path] = self._find_problem(path)
        return self._checked[path]

    def _find_problem(self, path: Path) -> str | None:
        try:
            self.store.open(path)
        except (ConfigError, OSError) as error:
            if self.replays:
                return f"the vectors of the tests cannot be replayed: {error}"
            return (
                f"the vectors of the tests cannot be recorded: {error}. Recording would replace all vectors in "
                f"{self.show(path)}. To compute all of them again, remove this folder"
            )
        # The check locks the folder, so two workers of pytest-xdist would refuse each other. Only their controller
        # writes.
        obstacle = None if self.replays or self._is_worker else find_obstacle(path)
        return obstacle and (
            f"the vectors of the tests cannot be recorded in {self.show(path)}: {obstacle}. Another folder: bundle in "
            "[tool.embedonce] of the pyproject.toml"
        )

    # --- tests --------------------------------------------------------------------------------

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, Any, Any]:
        self._item = item
        with self._use_bundle_of(item):
            try:
                return (yield)
            finally:
                self._item = None
                if self._is_worker:
                    self._hand_over()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_fixture_setup(
        self, fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
    ) -> Generator[None, Any, Any]:
        """Use the bundle of the fixture's scope: a fixture of the session belongs to no single test.

        This holds for its teardown too. Finalizers run in the reverse order, so the first one here runs after it.
        """
        target = self._find_target(request.node)
        fixturedef.addfinalizer(self._targets.pop)
        try:
            with self._use_bundle_of(request.node):
                return (yield)
        finally:
            fixturedef.addfinalizer(functools.partial(self._targets.append, target))

    def _find_target(self, node: Node) -> Path | None:
        try:
            return choose_bundle(node, self.default)
        except ValueError:
            return self.default  # pytest_runtest_setup reports the error

    @contextlib.contextmanager
    def _use_bundle_of(self, node: Node) -> Iterator[None]:
        self._targets.append(self._find_target(node))
        try:
            yield
        finally:
            self._targets.pop()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        try:
            path = choose_bundle(item, self.default)
        except ValueError as error:
            pytest.fail(str(error), pytrace=False)
        problem = None if path is None else self.find_problem(path)
        if problem is not None:
            pytest.fail(problem, pytrace=False)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(self, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
        """Fail a test that needed a missing text, even if the code under test has handled the error."""
        misses, self._misses = self._misses, []
        if misses and call.excinfo is not None:
            _cut_tracebacks(call.excinfo.value, self._root)
        report: pytest.TestReport = yield
        if misses:
            text = "\n\n".join(misses)
            if not report.failed:
                report.outcome = "failed"
                report.longrepr = f"{text}\n\nThe test went on, because the code under test has handled this error."
                if hasattr(report, "wasxfail"):
                    del report.wasxfail
            elif any(miss.partition("\n")[0] not in report.longreprtext for miss in misses):
                report.sections.append(("embedonce", text))
            report.embedonce_misses = misses  # type: ignore[attr-defined]  # pytest-xdist sends it to the controller
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        misses = getattr(report, "embedonce_misses", [])
        if misses:
            self._missed.setdefault(report.nodeid, []).extend(misses)
        if report.skipped:  # pytest says so of a test that failed as expected too, perhaps at its beginning
            self._left_out.add("not all tests passed" if hasattr(report, "wasxfail") else "a test was skipped")
        if report.when == "teardown":
            self._finished.add(report.nodeid)

    # --- whether all tests ran ----------------------------------------------------------------

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> Generator[None, Any, Any]:
        """Notice tests that are removed. Not everything that removes tests calls the hook ``pytest_deselected``."""
        before = len(items)
        result = yield
        if len(items) < before:
            self._left_out.add("tests were deselected")
        return result

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_ignore_collect(self, collection_path: Path) -> Generator[None, Any, Any]:
        """Notice files that ``collect_ignore`` or a hook of the project leaves out, perhaps only on this system."""
        is_ignored = yield
        if is_ignored and self._may_have_tests(collection_path):
            self._left_out.add("tests were left out")
        return is_ignored

    def _may_have_tests(self, path: Path) -> bool:
        if not path.is_dir():
            return _matches(path, self._config.getini("python_files"))
        is_never_collected = path.name == "__pycache__" or (path / "pyvenv.cfg").exists()
        return not is_never_collected and not _matches(path, self._config.getini("norecursedirs"))

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._collected.update(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        self._collected.update(ids)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.skipped:
            self._left_out.add("a test was skipped")

    def _find_missing_part(self, session: pytest.Session, exitstatus: int) -> str | None:
        """Return why this session is not a successful run of all tests; None if it is one."""
        config = session.config
        if exitstatus != pytest.ExitCode.OK:
            return "not all tests passed"
        if any(config.getoption(name, None) for name in LEAVING_OUT):
            return "tests were left out"
        if any(config.getoption(name, None) for name in CONFIGURING):
            return "pytest had another configuration"
        if len(self._finished) < len(self._collected):
            return "not all tests ran"
        source, chosen = config.args_source, pytest.Config.ArgsSource
        if source == chosen.INVOCATION_DIR and config.invocation_params.dir != config.rootpath:
            return "only the tests of one folder ran"
        if source == chosen.ARGS:
            named = {Path(name).absolute() for name in config.args}
            if named not in ({config.rootpath}, {config.rootpath / name for name in config.getini("testpaths")}):
                return "only some tests were named"
        return min(self._left_out, default=None)

    # --- the workers of pytest-xdist ----------------------------------------------------------

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self, session: pytest.Session) -> None:
        """Find out whether this process is a worker. Other processes check the bundle, before the workers start."""
        workerinput = getattr(session.config, "workerinput", None)
        if workerinput is not None:
            self._is_worker = True
            self._folder = Path(workerinput[WORKER_FOLDER])
            return
        problem = self.find_problem(self.default)
        if problem is not None:
            raise pytest.UsageError(problem)
        if not self.replays:
            self._make_folder()

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput[WORKER_FOLDER] = str(self._make_folder())

    def _make_folder(self) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="embedonce-"))
            self._config.add_cleanup(functools.partial(shutil.rmtree, self._folder, ignore_errors=True))
        return self._folder

    def _hand_over(self) -> None:
        if self._folder is not None:
            self._recording.hand_over(self._folder / f"{os.getpid()}.jsonl", self._left_out)

    def _take_over(self) -> None:
        """Read what the workers and forked processes have recorded."""
        if self._folder is not None:
            for file in sorted(self._folder.iterdir()):
                self._left_out |= self._recording.read_file(file)

    # --- the end ------------------------------------------------------------------------------

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Write the bundles, even if tests have failed: their vectors are paid for."""
        if self._is_worker:
            self._hand_over()
            self.store.close()
            return
        self._take_over()
        if not self.replays and not session.config.option.collectonly:
            missing_part = self._find_missing_part(session, exitstatus)
            bundles = dict(self._recording.bundles)
            if missing_part is None:
                bundles.setdefault(self.default, Recorded())
            for path, recorded in sorted(bundles.items()):
                kept_because = missing_part
                if kept_because is None and not path.is_relative_to(self._root):
                    kept_because = "the bundle is outside of this project"  # another project may need them
                written = self._write(path, recorded, removes_unneeded=kept_because is None)
                self._written.append((path, written, kept_because))
            if any(isinstance(result, str) for _, result, _ in self._written):
                session.exitstatus = pytest.ExitCode.INTERNAL_ERROR
        self.store.close()

    def _write(self, path: Path, recorded: Recorded, *, removes_unneeded: bool) -> WrittenBundle | str:
        try:
            return write_bundle(self.store, path, recorded, removes_unneeded=removes_unneeded)
        except (StoreExists, ConfigError, OSError) as error:
            return str(error)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self._missed:
            terminalreporter.section("texts that are not recorded")
            for line in summarise_misses({self._name_test(test): misses for test, misses in self._missed.items()}):
                terminalreporter.line(line)
        for path, result, kept_because in self._written:
            if isinstance(result, str):
                terminalreporter.line(f"embedonce: recording in {self.show(path)} failed: {result}", red=True)
            elif result.texts or result.removed:
                terminalreporter.line(_describe_written(self.show(path), result, kept_because))
        for test, count in sorted(self._recording.conflicts.items()):
            terminalreporter.line(
                f"embedonce: {test} got other vectors for {count:,} text{'s' * (count != 1)} than the recorded ones. "
                'Describe different models as different vector spaces, or mark a test of a fake with mode="off"',
                yellow=True,
            )
        if not self.replays and not any(isinstance(w, str) or w.texts or w.removed for _, w, _ in self._written):
            terminalreporter.line("embedonce: no test needed a vector, so nothing was recorded")


def _matches(path: Path, patterns: Sequence[str]) -> bool:
    """Return whether a file or folder matches a pattern of pytest: a pattern without a separator is one of names."""
    return any(
        fnmatch.fnmatch(str(path), f"*{os.sep}{pattern}") if os.sep in pattern else fnmatch.fnmatch(path.name, pattern)
        for pattern in patterns
    )


def _cut_tracebacks(error: BaseException | None, root: Path) -> None:
    """Cut the traceback of an error that embedonce has raised, and those of the errors that have led to this one."""
    seen: set[int] = set()
    found = [error]
    while found:
        error = found.pop()
        if error is None or id(error) in seen:
            continue
        seen.add(id(error))
        if isinstance(error, ReplayMiss):
            _cut_traceback(error, root)
        found += [error.__cause__, error.__context__, *getattr(error, "exceptions", ())]


def _cut_traceback(error: BaseException, root: Path) -> None:
    """End the traceback of an error at the last line of the project in ``root``, or at the one that called embedonce.

    What a framework and embedonce did then explains nothing, and pytest would show their arguments, which are texts.
    """
    called = project = None
    entry = error.__traceback__
    while entry is not None:
        file = Path(entry.tb_frame.f_code.co_filename)
        if not file.is_relative_to(PACKAGE) and not file.is_relative_to(INTEGRATIONS):
            called = entry
            project = entry if file.is_relative_to(root) and "site-packages" not in file.parts else project
        entry = entry.tb_next
    last = project or called
    if last is not None:
        last.tb_next = None


def _describe_written(shown: str, written: WrittenBundle, kept_because: str | None) -> str:
    texts = f"{written.texts:,} text{'s' * (written.texts != 1)}"
    if not written.new and not written.removed:
        line = f"embedonce: {shown} has all {texts} that the tests need" if not written.unneeded else ""
        line = line or f"embedonce: {shown} has {texts}, and no test needed another one"
    else:
        line = f"embedonce: recorded {texts} in {shown} ({written.new:,} new, {written.removed:,} removed)"
    if written.unneeded and kept_because is not None:
        line += f"; {written.unneeded:,} not needed in this run, and kept because {kept_because}"
    return line
