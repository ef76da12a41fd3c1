"""Imports point one way, plugins stand on public names alone, and what is imported is declared.

The sources are read, not imported, so that an import inside a function counts as well.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest

import embedonce

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "embedonce": ROOT / "core/embedonce",
    "embedonce_backends": ROOT / "backends/embedonce_backends",
    "embedonce_integrations": ROOT / "integrations/embedonce_integrations",
    "embedonce_providers": ROOT / "providers/embedonce_providers",
    "haystack_integrations": ROOT / "integrations/haystack_integrations/components/embedders/embedonce",
}

# A module of `embedonce` imports only from modules above it. A package (testing, cli) is one entry.
ORDER = (
    "errors",
    "_suggest",
    "options",
    "keys",
    "vectors",
    "events",
    "encryption",
    "contracts",
    "drift",
    "functions",
    "model_files",
    "similarity",
    "answers",
    "_checks",
    "hookspecs",
    "background",
    "_ports",
    "_flights",
    "_breaker",
    "_counters",
    "_tiers",
    "_leases",
    "_routes",
    "_upkeep",
    "_engine",
    "_drift",
    "_simple",
    "_options",
    "_sections",
    "plugins",
    "cache",
    "_toml",
    "_documents",
    "_schema",
    "_resolved",
    "_load",
    "config",
    "metrics",
    "__init__",
    "testing",
    "cli",
    "__main__",
)

# Core modules may import these at the top of a file; anything else inside the function that needs it.
# A command line loads its own libraries when a command runs, a conformance kit runs under pytest.
LIGHT = {"annotated_types", "numpy", "typing_extensions", "xxhash"}
ALLOWED_AT_TOP = {
    "hookspecs": {"pluggy"},
    "plugins": {"pluggy"},
    "metrics": {"prometheus_client"},
    "testing": {"hypothesis", "pytest"},
    "cli": {"typer"},
}

# What all integrations stand on.
SHARED = {"wrapping"}

# Distributions that another one brings along in the version it needs.
PART_OF = {"pydantic-core": "pydantic"}

# Each costs tens of milliseconds, or a client library that the process may never use.
NOT_IMPORTED_AT_START = (
    "asyncio",
    "cachebox",
    "diskcache",
    "embedonce_backends",
    "embedonce_providers",
    "importlib.metadata",
    "pydantic",
    "rich",
    "tree_sitter",
    "typer",
)


class Import(NamedTuple):
    """One imported name: ``from module import name``, or ``import module`` where name is None."""

    file: Path
    line: int
    module: str
    name: str | None
    at_top: bool

    @property
    def package(self) -> str:
        return self.module.partition(".")[0]

    def __str__(self) -> str:
        what = f"from {self.module} import {self.name}" if self.name else f"import {self.module}"
        return f"{self.file.relative_to(ROOT)}:{self.line}: {what}"


def sources(folder: Path) -> list[Path]:
    """Return the modules of a package; the templates of ``embedonce new`` are packages in themselves."""
    return sorted(file for file in folder.rglob("*.py") if "templates" not in file.relative_to(folder).parts)


def imports_of(package: str) -> Iterator[Import]:
    folder = PACKAGES[package]
    for file in sources(folder):
        inside = [package, *file.relative_to(folder).parts[:-1]]
        tree = ast.parse(file.read_text(), str(file))
        deferred = {id(node) for block in ast.walk(tree) if _defers(block) for node in ast.walk(block)}
        for node in ast.walk(tree):
            at_top = id(node) not in deferred
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield Import(file, node.lineno, alias.name, None, at_top)
            elif isinstance(node, ast.ImportFrom):
                base = inside[: len(inside) - node.level + 1] if node.level else []
                module = ".".join([*base, *([node.module] if node.module else [])])
                for alias in node.names:
                    yield Import(file, node.lineno, module, alias.name, at_top)


def _defers(node: ast.AST) -> bool:
    """Say whether what is inside does not run when the file is imported."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)


def core_module(file: Path) -> str:
    """Return the entry of ORDER that a file of ``embedonce`` belongs to."""
    return file.relative_to(PACKAGES["embedonce"]).with_suffix("").parts[0]


def imported_core_modules(entry: Import) -> Iterator[str]:
    if entry.package != "embedonce":
        return
    below = entry.module.split(".")[1:]
    if below:
        yield below[0]
    elif entry.name and (entry.name in ORDER or entry.name.startswith("_")):
        yield entry.name
    else:
        yield "__init__"


def test_every_core_module_has_its_place() -> None:
    found = {core_module(file) for file in sources(PACKAGES["embedonce"])}
    assert found <= set(ORDER), f"say in ORDER what {sorted(found - set(ORDER))} may import"


def test_core_imports_point_one_way() -> None:
    place = {name: number for number, name in enumerate(ORDER)}
    wrong = [
        f"{entry}: {core_module(entry.file)} may not import {target}, which comes after it in ORDER"
        for entry in imports_of("embedonce")
        for target in imported_core_modules(entry)
        if place.get(target, 0) > place.get(core_module(entry.file), len(ORDER))
    ]
    assert not wrong, "\n".join(wrong)


def test_core_imports_no_plugin() -> None:
    wrong = [
        str(entry) for entry in imports_of("embedonce") if entry.package in PACKAGES and entry.package != "embedonce"
    ]
    assert not wrong, "core finds plugins by name, through their entry points:\n" + "\n".join(wrong)


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "embedonce"])
def test_plugins_stand_on_public_names_alone(package: str) -> None:
    wrong = []
    for entry in imports_of(package):
        if entry.package == "embedonce":
            parts = [*entry.module.split("."), entry.name or ""]
            if any(part.startswith("_") for part in parts):
                wrong.append(f"{entry}: not a public name of embedonce")
            elif parts[1] in ("cli", "testing"):
                wrong.append(f"{entry}: no part of the plugin contract")
        elif (package, entry.package) == ("haystack_integrations", "embedonce_integrations"):
            continue  # an integration that lies where its framework looks for it
        elif entry.package in PACKAGES and entry.package != package:
            wrong.append(f"{entry}: backends, providers and integrations know nothing of each other")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "embedonce"])
def test_one_plugin_does_not_need_another(package: str) -> None:
    shared = {file.stem for file in PACKAGES[package].glob("_*.py")} | SHARED
    wrong = []
    for entry in imports_of(package):
        if entry.package == package and entry.file != PACKAGES[package] / "__init__.py":  # a list of names
            module = entry.module.partition(".")[2] or entry.name
            if module not in shared:
                wrong.append(str(entry))
    assert not wrong, "one file, one plugin; what two of them share has a name that begins with _:\n" + "\n".join(wrong)


def test_core_defers_what_is_heavy() -> None:
    wrong = []
    for entry in imports_of("embedonce"):
        allowed = LIGHT | ALLOWED_AT_TOP.get(core_module(entry.file), set())
        if entry.at_top and is_third_party(entry) and entry.package not in allowed:
            wrong.append(str(entry))
    assert not wrong, "import these inside the function that needs them:\n" + "\n".join(wrong)


def test_import_embedonce_stays_light() -> None:
    show = "import numpy, sys; before = set(sys.modules); import embedonce; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-P", "-c", show], check=True, capture_output=True, text=True)
    loaded = set(done.stdout.split()) & set(NOT_IMPORTED_AT_START)
    assert not loaded, f"`import embedonce` imports {sorted(loaded)}"


def is_third_party(entry: Import) -> bool:
    return entry.package not in PACKAGES and entry.package not in sys.stdlib_module_names


def distribution(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None
    name = re.sub(r"[-_.]+", "-", match[0]).lower()
    return PART_OF.get(name, name)


def test_what_is_imported_is_declared_and_the_other_way_round() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    default = {distribution(line) for line in project["dependencies"]}
    extras = {distribution(line) for lines in project["optional-dependencies"].values() for line in lines}
    by_import = packages_distributions()
    used: set[str] = set()
    wrong = []
    for package in PACKAGES:
        for entry in filter(is_third_party, imports_of(package)):
            names = {distribution(name) for name in by_import.get(entry.package, [entry.package])}
            used |= names
            if not names & (default | extras):
                wrong.append(f"{entry}: declare {' or '.join(sorted(names))} in pyproject.toml")
    assert not wrong, "\n".join(wrong)
    unused = (default | extras) - used - {"embedonce"}
    assert not unused, f"pyproject.toml declares {sorted(unused)}, which nothing imports"


def test_entry_points_name_modules_that_are_there() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name, target in project["entry-points"]["embedonce"].items():
        package, _, module = target.partition(".")
        assert (PACKAGES[package] / f"{module}.py").is_file(), f"{name} = {target!r}"


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_typed(package: str) -> None:
    assert (PACKAGES[package] / "py.typed").is_file()


def test_what_is_tested_is_the_wheel() -> None:
    if "WHEEL_UNDER_TEST" not in os.environ:
        pytest.skip("not under `make test`")
    assert embedonce.__file__ is not None
    assert not Path(embedonce.__file__).is_relative_to(ROOT / "core"), "the tree is on the path"
    assert "site-packages" in Path(embedonce.__file__).parts
