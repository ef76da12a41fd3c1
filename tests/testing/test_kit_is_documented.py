"""``docs/testing.md`` lists every standard test and every fault, and nothing that does not exist."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from runpy import run_path
from typing import get_args

import pytest

from embedonce.testing import (
    BackendContract,
    ImporterContract,
    NormalizerContract,
    ProviderContract,
    ReadOnlyContract,
    faults,
    proxy,
)
from embedonce.testing.servers import gemini, openai

DOCS = Path(__file__).parents[2] / "docs"

# The page without its code blocks, because comments in them look like headings.
PAGE = re.sub(
    r"^```.*?^```$", "", (Path(__file__).parents[2] / "docs" / "testing.md").read_text(), flags=re.DOTALL | re.M
)


def find_section(title: str) -> str:
    """Return the part of the page from a heading to the next heading of the same level or above."""
    level = re.search(rf"^(#+) {re.escape(title)}$", PAGE, re.MULTILINE)
    assert level is not None, f"docs/testing.md has no section {title!r}"
    rest = PAGE[level.end() :]
    end = re.search(rf"^#{{1,{len(level[1])}}} ", rest, re.MULTILINE)
    return rest[: end.start()] if end else rest


def find_table_names(text: str) -> set[str]:
    return set(re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE))


@pytest.mark.parametrize(
    ("title", "contract"),
    [
        ("What is checked of a backend", BackendContract),
        ("What is checked of a read-only backend", ReadOnlyContract),
        ("Is my provider right?", ProviderContract),
        ("Is my importer right?", ImporterContract),
        ("Is my step right?", NormalizerContract),
    ],
)
def test_every_standard_test_is_listed(title: str, contract: type) -> None:
    assert find_table_names(find_section(title)) == set(contract.standard_tests)


def test_the_tables_of_bugs_are_current() -> None:
    script = run_path(str(DOCS / "generate_conformance.py"))
    page = (DOCS / "conformance.md").read_text()
    assert script["page"](page) == page, "run: python docs/generate_conformance.py"
    assert all("|  |" not in line and "| |" not in line for line in script["tables"]()), "a bug has no sentence"


def test_every_fault_is_listed() -> None:
    backend, provider = find_section("What happens when the store is down?").split("A provider goes wrong")
    assert find_table_names(backend) == set(get_args(faults.Kind))
    assert find_table_names(provider) == set(get_args(faults.ProviderKind))
    assert find_table_names(find_section("What happens when the network is bad?")) == set(get_args(proxy.NetworkKind))
    assert find_table_names(find_section("What happens when an API misbehaves?")) == {
        *get_args(openai.OpenAIMisbehaviour),
        *get_args(gemini.GeminiMisbehaviour),
    }


@pytest.mark.parametrize(
    ("fault", "kinds"),
    [
        (faults.Fault, faults.Kind),
        (faults.ProviderFault, faults.ProviderKind),
        (proxy.NetworkFault, proxy.NetworkKind),
        (openai.OpenAIServer, openai.OpenAIMisbehaviour),
        (gemini.GeminiServer, gemini.GeminiMisbehaviour),
    ],
)
def test_every_fault_is_in_its_docstring(fault: type, kinds: object) -> None:
    assert set(re.findall(r"^``(\w+)``  ", inspect.cleandoc(fault.__doc__ or ""), re.MULTILINE)) == set(get_args(kinds))
