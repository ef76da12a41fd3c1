"""The example plugins import only public modules of embedonce, as every plugin must."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from .conftest import PLUGINS

CONTRACT = {"embedonce", "embedonce.background", "embedonce.contracts", "embedonce.errors", "embedonce.options"}


@pytest.mark.parametrize(
    "file", sorted(PLUGINS.glob("*/src/**/*.py")), ids=lambda file: file.relative_to(PLUGINS).as_posix()
)
def test_only_the_contract_is_imported(file: Path) -> None:
    own = file.relative_to(PLUGINS).parts[2]
    for node in ast.walk(ast.parse(file.read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules = [node.module or ""]
            assert not any(alias.name.startswith("_") for alias in node.names)
        for module in modules:
            package = module.partition(".")[0]
            assert not package.startswith("embedonce") or package == own or module in CONTRACT, module
