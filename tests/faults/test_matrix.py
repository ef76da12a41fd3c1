"""Runs each fault on each store, for reads and writes, sync and async. ``docs/faults.md`` shows the results."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from faults.cells import FAULTS, Cell, run_cell
from faults.stores import CELLS, STORES

SCRIPT = Path(__file__).parent.parent.parent / "docs" / "generate_faults.py"
spec = importlib.util.spec_from_file_location("generate_faults", SCRIPT)
assert spec is not None
assert spec.loader is not None
generate_faults = importlib.util.module_from_spec(spec)
spec.loader.exec_module(generate_faults)


@pytest.fixture(scope="module")
def get_store() -> Iterator[Callable[[str], Any]]:
    """Return a function that starts a store on its first use."""
    stores: dict[str, Any] = {}

    def start_once(name: str) -> Any:
        if name not in stores:
            stores[name] = STORES[name]()
        return stores[name]

    yield start_once
    for each in stores.values():
        each.close()


@pytest.mark.parametrize("cell", CELLS, ids="-".join)
def test_a_fault_has_no_effect_but_a_bounded_delay(cell: Cell, get_store: Callable[[str], Any]) -> None:
    run_cell(get_store(cell.store), cell)


def test_the_page_matches_the_matrix() -> None:
    """The page must match the matrix, except for the figures, which come from one run."""
    listed = generate_faults.listed(generate_faults.PAGE.read_text())
    assert set(listed) == {cell[:3] for cell in CELLS}, "run: python docs/generate_faults.py"
    for (store, name, operation), found in listed.items():
        fault = STORES[store].faults[name]
        assert found == (fault.get_effect(operation), fault.get_causes(operation)), (
            "run: python docs/generate_faults.py"
        )


@pytest.mark.parametrize("store", STORES.values(), ids=STORES)
def test_no_fault_is_left_out_without_a_reason(store: Any) -> None:
    assert {*store.faults, *store.not_applicable} == set(FAULTS)
    page = generate_faults.PAGE.read_text()
    for line in generate_faults.explained(store):
        assert line in page, "run: python docs/generate_faults.py"
