"""``embedonce conformance``: the standard tests on a backend, provider or step, without a test file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import JsonOption
from .output import FAILED, Refused, count, emit, say, show, table

if TYPE_CHECKING:
    from embedonce.testing.conformance import Outcome, Timing

EPILOG = """
Examples:

embedonce conformance disk

embedonce conformance mypackage:MyBackend --option path=./x

embedonce conformance mypackage:MyProvider --tolerance 1e-6 --json

embedonce conformance redis --option url=redis://{server}/0 --option prefix={new} --server localhost:6379

Each test has a store of its own: an option that is a path is that of a folder, in which they are made and removed; in
any other option {new} stands for what is new each time. With {server} in an option, and --server, the network tests
run through a proxy that resets and garbles. Tests of a TTL, of a store that stalls and of a node that is away need a
test file: docs/testing.md.

The exit code is 1 where a test fails.
"""


def conformance(
    plugin: Annotated[
        str, typer.Argument(metavar="PLUGIN", help="A plugin's name, or module:Class (or :function) in this folder.")
    ],
    option: Annotated[
        list[str] | None, typer.Option("--option", "-o", metavar="NAME=VALUE", help="An option of it; repeatable.")
    ] = None,
    test: Annotated[
        list[str] | None, typer.Option("--test", metavar="TEST", help="Run this test alone; repeatable.")
    ] = None,
    server: Annotated[
        str, typer.Option("--server", metavar="HOST:PORT", help="Where its server listens; {server} in an option.")
    ] = "",
    tolerance: Annotated[
        float, typer.Option("--tolerance", metavar="X", help="How far a value may be off when embedded again.")
    ] = 0.0,
    most: Annotated[
        int, typer.Option("--most", metavar="N", min=1, help="Send a provider at most N texts a call.")
    ] = 256,
    examples: Annotated[
        int, typer.Option("--examples", metavar="N", min=1, help="Try N random examples in tests that draw them.")
    ] = 20,
    rounds: Annotated[
        int, typer.Option("--rounds", metavar="N", min=0, help="Time each operation at most N times; 0: time nothing.")
    ] = 200,
    json: JsonOption = False,
) -> None:
    """Run the standard tests on a plugin, and time its operations."""
    with _tested(plugin, option or [], server, tolerance=tolerance, most=most, examples=examples) as tried:
        outcomes = []
        for outcome in tried.outcomes(test or []):
            outcomes.append(outcome)
            if not json:
                show("\n".join(_lines(outcome)))
        timings = [] if test else _timings(tried, rounds)
        kind = tried.target.kind
    counted = Counter(outcome.outcome for outcome in outcomes)
    if json:
        emit(
            {
                "plugin": plugin,
                "kind": kind,
                "passed": counted["passed"],
                "failed": counted["failed"],
                "skipped": counted["skipped"],
                "tests": [asdict(one) for one in outcomes],
                "timings": [asdict(one) for one in timings],
            }
        )
    else:
        show(
            f"\n{plugin}, a {kind}: {', '.join(f'{counted[word]} {word}' for word in ('passed', 'skipped', 'failed'))}"
        )
        _show_timings(timings)
    if counted["failed"]:
        say(f"error: {count(counted['failed'], 'test')} failed")
        raise typer.Exit(FAILED)


@contextmanager
def _tested(plugin: str, options: Sequence[str], server: str, **more: Any) -> Iterator[Any]:
    try:
        from embedonce.testing import BackendContract  # noqa: F401  (says what to install where the extra is not)
    except ImportError as error:
        raise Refused(str(error)) from None
    from embedonce.testing import _targets
    from embedonce.testing.conformance import Conformance

    try:
        target = _targets.find(plugin, _targets.pairs(options))
        _check_server(server, target.options.values())
        with Conformance(target, server=server, **more) as tried:
            yield tried
    except _targets.WrongTarget as error:
        raise Refused(f"{plugin}: {error}") from None


def _check_server(server: str, options: Any) -> None:
    used = any("{server}" in text for text in options)
    if used and not server:
        raise Refused("{server} stands in an option: say where it listens with --server HOST:PORT")
    if server and not used:
        raise Refused("--server has no use: write {server} into the option that says where the server is")
    host, _, port = server.rpartition(":")
    if server and not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise Refused("--server is written as HOST:PORT")


def _timings(tried: Any, rounds: int) -> list[Timing]:
    try:
        timings: list[Timing] = tried.timings(rounds)
    except (Exception, SystemExit) as error:  # noqa: BLE001  (its tests have said what is wrong)
        say(f"not timed: {type(error).__name__}")
        return []
    return timings


def _lines(outcome: Outcome) -> Iterator[str]:
    first, *rest = outcome.detail.splitlines() or [""]
    yield f"{outcome.outcome:9}{outcome.test}{f'  {first}' if outcome.outcome == 'skipped' and first else ''}"
    if outcome.outcome == "failed":
        yield from (f"          {line}" for line in (first, *rest))


def _show_timings(timings: Sequence[Timing]) -> None:
    if timings:
        columns = {"operation": "left", "batch": "right", "calls": "right", "p50 ms": "right", "p99 ms": "right"}
        rows = [[t.operation, t.batch, t.calls, f"{t.p50 * 1000:.3f}", f"{t.p99 * 1000:.3f}"] for t in timings]
        show("", table(columns, rows))
