"""Write the tables of docs/faults.md by running the fault matrix of tests/faults.

usage: python docs/generate_faults.py

Starts Redis, Postgres and memcached, and takes a few minutes. tests/faults/test_matrix.py fails where the page lists
other cells, effects, causes or ways to bring a fault about than the matrix has; the figures are of one run.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent.parent / "tests"
if str(TESTS) not in sys.path:
    sys.path.insert(0, str(TESTS))

from faults.cells import FACES, FAULTS, OPERATIONS, Cell, Operation, Outcome, run_cell  # noqa: E402
from faults.stores import STORES  # noqa: E402

PAGE = Path(__file__).parent / "faults.md"
BEGIN = "<!-- From here on this page is written by docs/generate_faults.py: run it instead of changing this. -->\n"

TITLES = {
    "redis": "Redis",
    "cluster": "Redis Cluster",
    "sentinel": "Redis behind sentinels",
    "postgres": "Postgres",
    "memcached": "memcached",
    "disk": "Disk",
}
EFFECTS = {
    ("read", "fails"): "computed",
    ("read", "serves"): "served",
    ("read", "forgets"): "a miss, computed",
    ("read", "partly"): "served or computed",
    ("write", "fails"): "not stored",
    ("write", "serves"): "stored",
    ("write", "partly"): "stored or not",
}
HEAD = (
    "| fault | | texts are | errors counted as | calls that waited | first call, + ms | later calls, + ms |"
    " back after, s |"
    "\n| --- | --- | --- | --- | ---: | ---: | ---: | ---: |"
)
COLUMNS = 8


def page(current: str) -> str:
    """Return the page with its tables as a run of the matrix makes them."""
    head, mark, _ = current.partition(BEGIN)
    if not mark:
        raise SystemExit(f"{PAGE} has no line {BEGIN!r}")
    return head + BEGIN + "\n" + "\n".join(tables())


def tables() -> Iterator[str]:
    """Yield the lines of every store's table."""
    for name, kind in STORES.items():
        store = kind()
        try:
            yield from (f"## {TITLES[name]}", "", HEAD)
            for fault in FAULTS:
                for operation in OPERATIONS if fault in store.faults else ():
                    outcomes = {face: run_cell(store, Cell(name, fault, operation, face)) for face in FACES}
                    print(name, fault, operation, file=sys.stderr)
                    yield row(store, fault, operation, outcomes)
            yield from ("", *explained(store), "")
        finally:
            store.close()


def row(store: Any, fault: str, operation: Operation, outcomes: Mapping[str, Outcome]) -> str:
    """Return the line of a fault, with the figures of both faces."""
    store_fault = store.faults[fault]
    columns = [
        fault,
        operation,
        EFFECTS[operation, store_fault.get_effect(operation)],
        ", ".join(f"`{cause}`" for cause in sorted(store_fault.get_causes(operation))) or "-",
        " / ".join(str(outcome.timeouts) for outcome in outcomes.values()),
        " / ".join(milliseconds(outcome.first_delay) for outcome in outcomes.values()),
        " / ".join(milliseconds(outcome.later_delay) for outcome in outcomes.values()),
        " / ".join(f"{outcome.recovery:.1f}" for outcome in outcomes.values()),
    ]
    return f"| {' | '.join(columns)} |"


def milliseconds(seconds: float) -> str:
    """Return a delay as it stands in the table."""
    return f"{1000 * seconds:.0f}" if seconds >= 0.0005 else "0"


def explained(store: Any) -> Iterator[str]:
    """Yield how each fault was brought about, and why one was not."""
    yield "| fault | how it was brought about |"
    yield "| --- | --- |"
    for fault in FAULTS:
        if fault in store.faults:
            yield f"| {fault} | {store.faults[fault].method} |"
        else:
            yield f"| {fault} | - ({store.not_applicable[fault]}) |"


def listed(text: str) -> dict[tuple[str, str, str], tuple[str, set[str]]]:
    """Return what a page says of each store, fault and operation: the effect, and the causes."""
    names = {title: name for name, title in TITLES.items()}
    effects = {(operation, words): effect for (operation, effect), words in EFFECTS.items()}
    found: dict[tuple[str, str, str], tuple[str, set[str]]] = {}
    store = ""
    for line in text.partition(BEGIN)[2].splitlines():
        if line.startswith("## "):
            store = names[line[3:]]
        columns = [column.strip() for column in line.strip("|").split("|")]
        if len(columns) == COLUMNS and columns[1] in OPERATIONS:
            fault, operation, words, causes = columns[:4]
            named = {cause.strip("`") for cause in causes.split(", ")} - {"-"}
            found[store, fault, operation] = effects[operation, words], named
    return found


if __name__ == "__main__":
    warnings.simplefilter("error")
    PAGE.write_text(page(PAGE.read_text()))
