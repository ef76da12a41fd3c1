"""``embedonce conformance``: run the standard tests on a plugin. You need no test file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from embedonce._messages import format_count

from .options import JsonOption
from .output import FAILED, Refused, emit, make_table, say, show

if TYPE_CHECKING:
    from embedonce.testing.conformance import Outcome, Timing

EPILOG = """
Examples:

embedonce conformance disk

embedonce conformance mypackage:MyBackend --option path=./x

embedonce conformance mypackage:MyProvider --tolerance 1e-6 --json

embedonce conformance redis --option url=redis://{server}/0 --option prefix={new} --server localhost:6379

Each test uses its own store. If an option of a backend is the path of a folder, the tests create their stores in this
folder. At the end, the stores are removed. The paths of a provider are only read. In any other option, {new} is
replaced by a new value for each test. If an option contains {server}, also give --server. The network tests then use a
proxy that resets connections and garbles replies. To test a TTL, a store that stalls, a node that is down, or an
importer, write a test file: see docs/testing.md.

The exit code is 1 if a test fails.
"""


def conformance(
    plugin: Annotated[
        str,
        typer.Argument(
            metavar="PLUGIN",
            help="A plugin's name, or module:Class or module:function. The module must be installed or in the current "
            "folder.",
        ),
    ],
    option: Annotated[
        list[str] | None,
        typer.Option("--option", "-o", metavar="NAME=VALUE", help="An option of the plugin; repeatable."),
    ] = None,
    test: Annotated[
        list[str] | None, typer.Option("--test", metavar="TEST", help="Run only this test; repeatable.")
    ] = None,
    server: Annotated[
        str, typer.Option("--server", metavar="HOST:PORT", help="The server's address; replaces {server} in an option.")
    ] = "",
    tolerance: Annotated[
        float,
        typer.Option("--tolerance", metavar="X", help="How much a value may differ when a text is embedded again."),
    ] = 0.0,
    most: Annotated[
        int, typer.Option("--most", metavar="N", min=1, help="Send a provider at most N texts per call.")
    ] = 256,
    examples: Annotated[
        int, typer.Option("--examples", metavar="N", min=1, help="Try N random examples in each test that uses them.")
    ] = 20,
    rounds: Annotated[
        int,
        typer.Option("--rounds", metavar="N", min=0, help="Time each operation at most N times; 0 disables timing."),
    ] = 200,
    json: JsonOption = False,
) -> None:
    """Run the standard tests on a plugin, and time its operations."""
    with _open_conformance(plugin, option or [], server, tolerance=tolerance, most=most, examples=examples) as run:
        outcomes = []
        for outcome in run.run_tests(test or []):
            outcomes.append(outcome)
            if not json:
                show("\n".join(_format_outcome(outcome)))
        timings = [] if test else _measure_timings(run, rounds)
        kind = run.target.kind
    counted = Counter(outcome.outcome for outcome in outcomes)
    if json:
        emit(
            {
                "plugin": plugin,
                "kind": kind,
                "passed": counted["passed"],
                "failed": counted["failed"],
                "skipped": counted["skipped"],
                "tests": [asdict(outcome) for outcome in outcomes],
                "timings": [asdict(timing) for timing in timings],
            }
        )
    else:
        show(
            f"\n{plugin}, a {kind}: {', '.join(f'{counted[word]} {word}' for word in ('passed', 'skipped', 'failed'))}"
        )
        _show_timings(timings)
    if counted["failed"]:
        say(f"error: {format_count(counted['failed'], 'test')} failed")
        raise typer.Exit(FAILED)


@contextmanager
def _open_conformance(plugin: str, options: Sequence[str], server: str, **settings: Any) -> Iterator[Any]:
    """Find the plugin and prepare its tests. At the end, remove what the tests created.

    Raises:
        Refused: the extra ``testing`` is not installed, or the plugin, an option or ``server`` is invalid.
    """
    try:
        from embedonce.testing import BackendContract  # noqa: F401  (without the extra, the error says what to install)
    except ImportError as error:
        raise Refused(str(error)) from None
    from embedonce.testing import _targets
    from embedonce.testing.conformance import Conformance

    try:
        target = _targets.find_target(plugin, _targets.parse_options(options))
        _check_server(server, target.options.values())
        with Conformance(target, server=server, **settings) as run:
            yield run
    except _targets.InvalidTarget as error:
        raise Refused(f"{plugin}: {error}") from None


def _check_server(server: str, options: Any) -> None:
    is_used = any("{server}" in text for text in options)
    if is_used and not server:
        raise Refused("an option contains {server}: give the server's address with --server HOST:PORT")
    if server and not is_used:
        raise Refused(
            "--server has no effect, because no option contains {server}; write {server} in place of the "
            "server's address"
        )
    host, _, port = server.rpartition(":")
    if server and not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise Refused("--server must be HOST:PORT, with a port from 1 to 65535")


def _measure_timings(run: Any, rounds: int) -> list[Timing]:
    try:
        timings: list[Timing] = run.measure_times(rounds)
    except (Exception, SystemExit) as error:  # noqa: BLE001  (the tests have reported the details)
        say(f"cannot time the operations: {type(error).__name__}")
        return []
    return timings


def _format_outcome(outcome: Outcome) -> Iterator[str]:
    first, *rest = outcome.detail.splitlines() or [""]
    yield f"{outcome.outcome:9}{outcome.test}{f'  {first}' if outcome.outcome == 'skipped' and first else ''}"
    if outcome.outcome == "failed":
        yield from (f"          {line}" for line in (first, *rest))


def _show_timings(timings: Sequence[Timing]) -> None:
    if timings:
        columns = {"operation": "left", "batch": "right", "calls": "right", "p50 ms": "right", "p99 ms": "right"}
        rows = [[t.operation, t.batch, t.calls, f"{t.p50 * 1000:.3f}", f"{t.p99 * 1000:.3f}"] for t in timings]
        show("", make_table(columns, rows))
