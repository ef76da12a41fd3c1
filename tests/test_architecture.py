"""Imports point one way, plugins stand on public names alone, and what is imported is declared.

The sources are read, not imported, so that an import inside a function counts as well.
"""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Sequence
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NamedTuple

import pytest
from optional import QUICK

import embedonce

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "embedonce": ROOT / "core/embedonce",
    "embedonce_backends": ROOT / "backends/embedonce_backends",
    "embedonce_integrations": ROOT / "integrations/embedonce_integrations",
    "embedonce_providers": ROOT / "providers/embedonce_providers",
    "haystack_integrations": ROOT / "integrations/haystack_integrations/components/embedders/embedonce",
}

PAGE = ROOT / "docs/design.md"

MOST_LINES = 600
"""Lines of a file; a reader sees one idea at a time."""
LONGER = {"core/embedonce/testing/contracts/backend.py": 1100}
"""Every standard test of a backend in one class, where a reader looks for it."""

# Core modules may import these at the top of a file; anything else inside the function that needs it.
# A command line loads its own libraries when a command runs, a conformance kit runs under pytest.
LIGHT = {"annotated_types", "numpy", "typing_extensions", "xxhash"}
ALLOWED_AT_TOP = {
    "hookspecs": {"pluggy"},
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
    return sorted(file for file in folder.rglob("*.py") if file.relative_to(folder).parts[0] != "templates")


@functools.cache
def imports_of(package: str) -> Sequence[Import]:
    return tuple(_imports_of(package))


def _imports_of(package: str) -> Iterator[Import]:
    folder = PACKAGES[package]
    for file in sources(folder):
        inside = [package, *file.relative_to(folder).parts[:-1]]
        tree = ast.parse(file.read_text(), str(file))
        deferred = {id(node) for block in ast.walk(tree) for part in _deferred(block) for node in ast.walk(part)}
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


def _deferred(node: ast.AST) -> Sequence[ast.AST]:
    """Return the parts of a node that do not run when the file is imported."""
    if isinstance(node, ast.If):
        return node.body if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING") else []
    return [node] if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) else []


def core_module(file: Path) -> str:
    """Return the module or package of ``embedonce`` that a file belongs to."""
    return file.relative_to(PACKAGES["embedonce"]).with_suffix("").parts[0]


def module_of(package: str, file: Path) -> str:
    """Return the dotted name of a file's module, without the package; of a package, that of its ``__init__``."""
    return ".".join(file.relative_to(PACKAGES[package]).with_suffix("").parts)


def imported_modules(entry: Import, package: str) -> Iterator[str]:
    """Yield the modules of the package that an import names, as :func:`module_of` does."""
    if entry.package != package:
        return
    below = entry.module.split(".")[1:]
    folder = PACKAGES[package]
    for parts in ([*below, entry.name or ""], below):
        path = folder.joinpath(*parts)
        if parts and parts[-1] and path.with_suffix(".py").is_file():
            yield ".".join(parts)
            return
        if (path / "__init__.py").is_file():
            yield ".".join([*parts, "__init__"]).strip(".")
            return


# --- the layout that docs/design.md shows -------------------------------------------------------


def blocks_of_page() -> list[str]:
    section = PAGE.read_text().partition("\n## Where things live\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```text\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 3, "docs/design.md shows the layout, the order of the core, and that of its engine"
    return blocks


def order_of(block: str) -> dict[str, int]:
    """Return the line of each name; a name imports only from lines above its own."""
    return {name: line for line, names in enumerate(block.splitlines()) for name in names.split()}


def names_in(block: str) -> Iterator[str]:
    """Yield the path of each file and folder of a layout. A description follows two spaces, or has its own line."""
    folders: list[tuple[int, str]] = []
    for line in block.splitlines():
        indent = len(line) - len(line.lstrip())
        if indent > 8:
            continue
        while folders and folders[-1][0] >= indent:
            folders.pop()
        inside = "".join(folder for _, folder in folders)
        for name in re.split(r"\s{2,}", line.strip())[0].split():
            if name.endswith("/"):
                folders.append((indent, name))
            yield f"{inside}{name}".rstrip("/")


def test_the_page_shows_every_module_and_no_other() -> None:
    shown = set(names_in(blocks_of_page()[0]))
    found = {"core/embedonce/templates"}
    for package in ("embedonce", "embedonce_backends"):
        for file in sources(PACKAGES[package]):
            if file.stem != "__main__":
                module = file.parent if file.stem == "__init__" else file.with_suffix("")
                found.add(str(module.relative_to(ROOT)))
    assert sorted(found - shown) == [], f"{PAGE.name} does not name these"
    assert sorted(shown - found) == [], f"{PAGE.name} names these, which are not there"


def test_core_imports_point_one_way() -> None:
    order = order_of(blocks_of_page()[1])
    found = {core_module(file) for file in sources(PACKAGES["embedonce"])}
    assert set(order) == found, "docs/design.md says what each may import"
    wrong = []
    for entry in imports_of("embedonce"):
        own = core_module(entry.file)
        for target in imported_modules(entry, "embedonce"):
            unit = target.partition(".")[0]
            if unit != own and order[unit] >= order[own]:
                wrong.append(f"{entry}: {own} may not import {unit}, which does not stand above it")
    assert not wrong, "\n".join(wrong)


def test_imports_inside_the_engine_point_one_way() -> None:
    order = order_of(blocks_of_page()[2])
    folder = PACKAGES["embedonce"] / "_engine"
    assert set(order) == {file.stem for file in sources(folder)} - {"__init__"}
    wrong = []
    for entry in imports_of("embedonce"):
        if entry.file.parent == folder and entry.file.stem != "__init__":
            for target in imported_modules(entry, "embedonce"):
                package, _, name = target.partition(".")
                if package == "_engine" and order[name] >= order[entry.file.stem]:
                    wrong.append(f"{entry}: {entry.file.stem} may not import {name}, which does not stand above it")
    assert not wrong, "\n".join(wrong)


def test_the_engine_and_its_neighbours_have_empty_packages() -> None:
    """A reader imports the module that has a name, and no import of a package brings all of its modules."""
    for private in ("_config", "_engine", "_format", "_plugins"):
        (docstring,) = ast.parse((PACKAGES["embedonce"] / private / "__init__.py").read_text()).body
        assert isinstance(docstring, ast.Expr), private


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_imports_itself_by_way_of_others(package: str) -> None:
    imports: dict[str, set[str]] = {module_of(package, file): set() for file in sources(PACKAGES[package])}
    for entry in imports_of(package):
        if entry.file.name != "__init__.py":  # a list of names
            imports[module_of(package, entry.file)].update(imported_modules(entry, package))
    TopologicalSorter(imports).prepare()  # raises CycleError, with the modules


@pytest.mark.parametrize("package", PACKAGES)
def test_files_are_short(package: str) -> None:
    long = [
        f"{file.relative_to(ROOT)} has {lines} lines"
        for file in sources(PACKAGES[package])
        if (lines := len(file.read_text().splitlines())) > LONGER.get(str(file.relative_to(ROOT)), MOST_LINES)
    ]
    assert not long, f"cut these where two jobs meet; a file has at most {MOST_LINES} lines: {', '.join(long)}"


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
    folder = PACKAGES[package]
    wrong = []
    for entry in imports_of(package):
        plugin = module_of(package, entry.file).partition(".")[0]
        if plugin == "__init__":  # a list of names
            continue
        for target in imported_modules(entry, package):
            name = target.partition(".")[0]
            if name not in (plugin, *SHARED) and not (name.startswith("_") and (folder / f"{name}.py").is_file()):
                wrong.append(str(entry))
    assert not wrong, (
        "one file or folder, one plugin; what two of them share is a file whose name begins with _:\n"
        + "\n".join(wrong)
    )


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


@pytest.mark.skipif(QUICK, reason="only libraries that are installed say which distribution they belong to")
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
        path = PACKAGES[package] / module
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), f"{name} = {target!r}"


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_typed(package: str) -> None:
    assert (PACKAGES[package] / "py.typed").is_file()


def test_what_is_tested_is_the_wheel() -> None:
    if "WHEEL_UNDER_TEST" not in os.environ:
        pytest.skip("not under `make test`")
    assert embedonce.__file__ is not None
    assert not Path(embedonce.__file__).is_relative_to(ROOT / "core"), "the tree is on the path"
    assert "site-packages" in Path(embedonce.__file__).parts
