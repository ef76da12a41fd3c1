"""Imports point one way, plugins use only public names, and every imported package is declared.

These tests parse the sources instead of importing them, so that imports inside functions count too.
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
    "embedonce_importers": ROOT / "importers/embedonce_importers",
    "embedonce_integrations": ROOT / "integrations/embedonce_integrations",
    "embedonce_providers": ROOT / "providers/embedonce_providers",
    "embedonce_server": ROOT / "server/embedonce_server",
    "haystack_integrations": ROOT / "integrations/haystack_integrations/components/embedders/embedonce",
}

PAGE = ROOT / "docs/design.md"

MAX_LINES = 600
"""Maximum number of lines per file, so that a file holds one idea."""
MAX_LINES_OF = {"core/embedonce/testing/contracts/backend.py": 1300}
"""Exceptions. The contract of backends keeps every standard test in one class, where a reader looks for it."""

# Core modules may import these at the top of a file. Other imports belong in the function that requires them.
# The command line and the conformance kit may import their own libraries at the top.
LIGHT = {"annotated_types", "numpy", "typing_extensions", "xxhash"}
ALLOWED_AT_TOP = {
    "hookspecs": {"pluggy"},
    "metrics": {"prometheus_client"},
    "testing": {"hypothesis", "pytest"},
    "cli": {"typer"},
}

# Modules that all integrations share.
SHARED = {"composite_texts", "describing", "embedder_fields", "openai_answers", "plain_values", "wrapping"}

# Distributions that another distribution installs in the version that it requires.
PART_OF = {"httpx": "chromadb", "pydantic-core": "pydantic", "tokenizers": "sentence-transformers"}

# Each costs tens of milliseconds, or loads a client library that the process may never use.
NOT_IMPORTED_AT_START = (
    "asyncio",
    "cachebox",
    "diskcache",
    "embedonce_backends",
    "embedonce_importers",
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


def list_sources(folder: Path) -> list[Path]:
    """Return the files of a package, without the templates of ``embedonce new``, which are separate packages."""
    return sorted(file for file in folder.rglob("*.py") if file.relative_to(folder).parts[0] != "templates")


@functools.cache
def list_imports(package: str) -> Sequence[Import]:
    return tuple(_parse_imports(package))


def _parse_imports(package: str) -> Iterator[Import]:
    folder = PACKAGES[package]
    for file in list_sources(folder):
        inside = [package, *file.relative_to(folder).parts[:-1]]
        tree = ast.parse(file.read_text(), str(file))
        deferred = {
            id(node) for block in ast.walk(tree) for part in _get_deferred_parts(block) for node in ast.walk(part)
        }
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


def _get_deferred_parts(node: ast.AST) -> Sequence[ast.AST]:
    """Return the parts of a node that do not run when the file is imported."""
    if isinstance(node, ast.If):
        return node.body if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING") else []
    return [node] if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) else []


def get_unit(package: str, file: Path) -> str:
    """Return the module or folder of a package that a file belongs to."""
    return file.relative_to(PACKAGES[package]).with_suffix("").parts[0]


def get_module_name(package: str, file: Path) -> str:
    """Return the dotted name of a file's module without the package; for a package, the name ends in ``__init__``."""
    return ".".join(file.relative_to(PACKAGES[package]).with_suffix("").parts)


def list_imported_modules(entry: Import, package: str) -> Iterator[str]:
    """Yield the modules of ``package`` that an import refers to, named as by :func:`get_module_name`."""
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


def read_page_blocks() -> list[str]:
    section = PAGE.read_text().partition("\n## Where things live\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```text\n(.*?)^```$", section, flags=re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4, "docs/design.md must show the layout, and the order of the core, the engine and the server"
    return blocks


def parse_order(block: str) -> dict[str, int]:
    """Return the line number of each name; a module imports only from lines above its own."""
    return {name: line for line, names in enumerate(block.splitlines()) for name in names.split()}


def parse_layout(block: str) -> Iterator[str]:
    """Yield the path of each file and folder of a layout. Descriptions follow two spaces or have their own line."""
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
    shown = set(parse_layout(read_page_blocks()[0]))
    found = {"core/embedonce/templates"}
    for package in ("embedonce", "embedonce_backends", "embedonce_importers", "embedonce_server"):
        for file in list_sources(PACKAGES[package]):
            if file.stem != "__main__":
                module = file.parent if file.stem == "__init__" else file.with_suffix("")
                found.add(str(module.relative_to(ROOT)))
    assert sorted(found - shown) == [], f"{PAGE.name} does not name these modules"
    assert sorted(shown - found) == [], f"{PAGE.name} names these modules, which do not exist"


@pytest.mark.parametrize(("package", "block"), [("embedonce", 1), ("embedonce_server", 3)])
def test_imports_point_one_way(package: str, block: int) -> None:
    order = parse_order(read_page_blocks()[block])
    found = {get_unit(package, file) for file in list_sources(PACKAGES[package])}
    assert set(order) == found, f"docs/design.md must list every module of {package} in the order of imports"
    wrong = []
    for entry in list_imports(package):
        own = get_unit(package, entry.file)
        for target in list_imported_modules(entry, package):
            unit = target.partition(".")[0]
            if unit != own and order[unit] >= order[own]:
                wrong.append(f"{entry}: {own} must not import {unit}, which is not above it in docs/design.md")
    assert not wrong, "\n".join(wrong)


def test_imports_inside_the_engine_point_one_way() -> None:
    order = parse_order(read_page_blocks()[2])
    folder = PACKAGES["embedonce"] / "_engine"
    assert set(order) == {file.stem for file in list_sources(folder)} - {"__init__"}
    wrong = []
    for entry in list_imports("embedonce"):
        if entry.file.parent == folder and entry.file.stem != "__init__":
            for target in list_imported_modules(entry, "embedonce"):
                package, _, name = target.partition(".")
                if package == "_engine" and order[name] >= order[entry.file.stem]:
                    wrong.append(
                        f"{entry}: {entry.file.stem} must not import {name}, which is not above it in the page"
                    )
    assert not wrong, "\n".join(wrong)


def test_the_engine_and_its_neighbours_have_empty_packages() -> None:
    """An empty package makes every import name a module, and importing the package does not load all its modules."""
    for private in ("_config", "_engine", "_format", "_plugins"):
        (docstring,) = ast.parse((PACKAGES["embedonce"] / private / "__init__.py").read_text()).body
        assert isinstance(docstring, ast.Expr), private


@pytest.mark.parametrize("package", PACKAGES)
def test_there_are_no_import_cycles(package: str) -> None:
    imports: dict[str, set[str]] = {get_module_name(package, file): set() for file in list_sources(PACKAGES[package])}
    for entry in list_imports(package):
        if entry.file.name != "__init__.py":  # which only lists names
            imports[get_module_name(package, entry.file)].update(list_imported_modules(entry, package))
    TopologicalSorter(imports).prepare()  # raises CycleError, with the modules


@pytest.mark.parametrize("package", PACKAGES)
def test_files_are_short(package: str) -> None:
    long = [
        f"{file.relative_to(ROOT)} has {lines} lines"
        for file in list_sources(PACKAGES[package])
        if (lines := len(file.read_text().splitlines())) > MAX_LINES_OF.get(str(file.relative_to(ROOT)), MAX_LINES)
    ]
    assert not long, f"split these files; a file must have at most {MAX_LINES} lines: {', '.join(long)}"


def test_core_imports_no_plugin() -> None:
    wrong = [
        str(entry)
        for entry in list_imports("embedonce")
        if entry.package in PACKAGES
        and entry.package != "embedonce"
        and (entry.file.relative_to(ROOT).as_posix(), entry.package)
        != ("core/embedonce/cli/serve.py", "embedonce_server")
    ]
    assert not wrong, "the core must find plugins through entry points, not import them:\n" + "\n".join(wrong)


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "embedonce"])
def test_plugins_use_only_public_names(package: str) -> None:
    wrong = []
    for entry in list_imports(package):
        if entry.package == "embedonce":
            parts = [*entry.module.split("."), entry.name or ""]
            if any(part.startswith("_") and part != "__version__" for part in parts):
                wrong.append(f"{entry}: not a public name of embedonce")
            elif parts[1] in ("cli", "testing"):
                wrong.append(f"{entry}: not part of the plugin contract")
        elif (package, entry.package) == ("haystack_integrations", "embedonce_integrations"):
            continue  # an integration in the folder where its framework looks for it
        elif entry.package in PACKAGES and entry.package != package:
            wrong.append(f"{entry}: backends, providers, importers and integrations must not import each other")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", [name for name in PACKAGES if name not in ("embedonce", "embedonce_server")])
def test_one_plugin_does_not_need_another(package: str) -> None:
    folder = PACKAGES[package]
    wrong = []
    for entry in list_imports(package):
        plugin = get_module_name(package, entry.file).partition(".")[0]
        if plugin == "__init__":  # which only lists names
            continue
        for target in list_imported_modules(entry, package):
            name = target.partition(".")[0]
            if name not in (plugin, *SHARED) and not (name.startswith("_") and (folder / f"{name}.py").is_file()):
                wrong.append(str(entry))
    assert not wrong, (
        "a plugin must not import another one; put shared code into a file whose name starts with _:\n"
        + "\n".join(wrong)
    )


def test_core_defers_what_is_heavy() -> None:
    wrong = []
    for entry in list_imports("embedonce"):
        allowed = LIGHT | ALLOWED_AT_TOP.get(get_unit("embedonce", entry.file), set())
        if entry.at_top and is_third_party(entry) and entry.package not in allowed:
            wrong.append(str(entry))
    assert not wrong, "import these inside the function that requires them:\n" + "\n".join(wrong)


def test_import_embedonce_stays_light() -> None:
    show = "import numpy, sys; before = set(sys.modules); import embedonce; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-P", "-c", show], check=True, capture_output=True, text=True)
    loaded = set(done.stdout.split()) & set(NOT_IMPORTED_AT_START)
    assert not loaded, f"`import embedonce` imports {sorted(loaded)}"


def is_third_party(entry: Import) -> bool:
    return entry.package not in PACKAGES and entry.package not in sys.stdlib_module_names


def get_distribution(requirement: str) -> str:
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match is not None
    name = re.sub(r"[-_.]+", "-", match[0]).lower()
    return PART_OF.get(name, name)


@pytest.mark.skipif(QUICK, reason="requires all libraries, because only an installed one names its distribution")
def test_imports_and_declared_dependencies_match() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    default = {get_distribution(line) for line in project["dependencies"]}
    extras = {get_distribution(line) for lines in project["optional-dependencies"].values() for line in lines}
    by_import = packages_distributions()
    used: set[str] = set()
    wrong = []
    for package in PACKAGES:
        for entry in filter(is_third_party, list_imports(package)):
            names = {get_distribution(name) for name in by_import.get(entry.package, [entry.package])}
            used |= names
            if not names & (default | extras):
                wrong.append(f"{entry}: declare {' or '.join(sorted(names))} in pyproject.toml")
    assert not wrong, "\n".join(wrong)
    unused = (default | extras) - used - {"embedonce"}
    assert not unused, f"pyproject.toml declares {sorted(unused)}, which nothing imports"


def test_entry_points_name_modules_that_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name, target in project["entry-points"]["embedonce"].items():
        package, _, module = target.partition(".")
        path = PACKAGES[package] / module
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), f"{name} = {target!r}"


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_are_typed(package: str) -> None:
    assert (PACKAGES[package] / "py.typed").is_file()


def test_the_tests_run_against_the_wheel() -> None:
    if "WHEEL_UNDER_TEST" not in os.environ:
        pytest.skip("runs only in `make test`")
    assert embedonce.__file__ is not None
    assert not Path(embedonce.__file__).is_relative_to(ROOT / "core"), "the source tree is on the import path"
    assert "site-packages" in Path(embedonce.__file__).parts
