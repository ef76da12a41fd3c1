"""Pages, Makefile, workflows and pyproject.toml agree with each other."""

from __future__ import annotations

import re
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import embedonce

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
FOR_DEVELOPERS = [ROOT / "CONTRIBUTING.md", ROOT / "RELEASING.md", ROOT / "SECURITY.md"]
PAGES = [ROOT / "README.md", *FOR_DEVELOPERS, *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob(".github/*.md"))]
REPOSITORY = "https://github.com/embedonce/embedonce"

MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):(?!=)", MAKEFILE, re.MULTILINE))


def read_project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def read_constraints() -> dict[str, str]:
    """Return the version of each distribution in constraints.txt."""
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.MULTILINE))


def find_text(pattern: str, file: str) -> str:
    """Return the text that the group of ``pattern`` matches in a file of the project."""
    match = re.search(pattern, (ROOT / file).read_text("utf-8"), re.MULTILINE)
    assert match is not None, f"{file} has no match for {pattern}"
    return match[1]


def find_workflow_pythons() -> list[str]:
    return re.findall(r"\d\.\d+", find_text(r"^ +python: \[(.+)\]$", ".github/workflows/ci.yml"))


# --- make -------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_target_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text("utf-8")
    code = re.findall(r"`([^`\n]+)`", text)
    for block in re.findall(r"^ *```sh\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        code += [line.strip() for line in block.splitlines()]
    named = {target for part in code for target in re.findall(r"^make ([a-z-]+)", part)}
    assert named <= TARGETS


def test_phony_names_every_target() -> None:
    assert set(find_text(r"^\.PHONY: (.+)$", "Makefile").split()) == TARGETS


def test_help_names_targets_that_exist() -> None:
    shown = set(re.findall(r'@echo "make ([a-z-]+) ', MAKEFILE))
    assert shown <= TARGETS
    assert {"quick", "test", "lint", "types", "format", "bench", "clean"} <= shown


def test_windows_runs_what_make_quick_runs() -> None:
    tests = find_text(r"^QUICK_TESTS := (.+)$", "Makefile")
    assert tests in (ROOT / ".github/workflows/ci.yml").read_text("utf-8")
    assert all((ROOT / path).exists() for path in tests.split())


# --- versions ---------------------------------------------------------------------------------


def test_the_version_is_in_one_place() -> None:
    project = read_project()["project"]
    assert "version" not in project
    assert "version" in project["dynamic"]
    assert version("embedonce") == embedonce.__version__


def test_the_changelog_starts_with_this_version() -> None:
    assert find_text(r"^## (\S+), ", "CHANGELOG.md") == embedonce.__version__


def test_the_hooks_and_make_lint_use_the_same_ruff() -> None:
    hooks = find_text(r"ruff-pre-commit\n +rev: v(\S+)$", ".pre-commit-config.yaml")
    assert hooks == read_constraints()["ruff"], "use the same version in constraints.txt and .pre-commit-config.yaml"


def test_every_supported_python_is_tested() -> None:
    project = read_project()["project"]
    lowest = project["requires-python"].removeprefix(">=")
    promised = re.findall(r"Python :: (\d\.\d+)", "\n".join(project["classifiers"]))
    tested = find_workflow_pythons()
    assert tested[0] == lowest
    assert set(promised) <= set(tested)
    assert find_text(r'^newest_first="(.+)"$', ".ci/run").split() == tested[::-1]


def test_constraints_pin_what_quick_and_lint_install() -> None:
    groups = read_project()["dependency-groups"]
    for group in ("lint", "test"):
        names = [re.split(r"[^\w.-]", line)[0] for line in groups[group]]
        assert set(names) <= set(read_constraints()), group


# --- the repository ---------------------------------------------------------------------------


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.name)
def test_actions_are_pinned_by_commit(workflow: Path) -> None:
    used = re.findall(r"uses: (.+)$", workflow.read_text("utf-8"), re.MULTILINE)
    assert used
    assert [line for line in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40} # v\d+(\.\d+)*", line)] == []


def test_the_repository_has_one_address() -> None:
    files = [ROOT / "pyproject.toml", *PAGES, *ROOT.glob(".github/**/*.yml")]
    text = "\n".join(file.read_text("utf-8") for file in files)
    addresses = set(re.findall(r"https://github\.com/embedonce/[\w.-]+", text))
    assert addresses == {REPOSITORY}
    assert all(url.startswith(REPOSITORY) for url in read_project()["project"]["urls"].values())


@pytest.mark.parametrize("page", FOR_DEVELOPERS, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\((?!https:)([^)#]+)", page.read_text("utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
