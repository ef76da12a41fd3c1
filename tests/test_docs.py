"""Everything that README.md and docs/ show is run: code, configurations, commands, and their output.

Each page runs on its own, from top to bottom, in one folder with a copy of README.md and docs/:

- ```` ```python ````: is executed; the blocks of a page share their names. ``expression  # -> value`` is compared
  (with repr, or with what ``print`` wrote), as is a ```` ```text ```` block that comes next, where the code printed
  something. A block with ``>>>`` is a doctest.
- ```` ```toml ````: must be valid; a configuration (it has ``[cache]``, ``[key]``, ``[provider]``, ``[[tiers]]`` or
  ``[tool.embedonce]``) must load. Any block whose first line is ``# NAME.EXT`` alone is first written to that file;
  Python that is written into a folder is a module of a package, and left to those who import it.
- ```` ```console ````: what follows ``$`` is executed; what it shows is compared, figures aside (0 stays 0).
- ```` ```sh ````: is executed, its output compared with a ```` ```text ```` block that comes next.
  Commands that set things up (pip, make, git, ...) are left out.
- ``...`` or ``…`` stands for anything, on a line of its own for any lines.

A block that cannot run here says so to its reader: its first line is ``# not run: REASON``. NOT_RUN counts them.
"""

from __future__ import annotations

import ast
import contextlib
import doctest
import inspect
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
import tomllib
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

import embedonce
from embedonce import config

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# How many blocks of a page are not run. Raise a number here only for what no machine of ours can run.
NOT_RUN: dict[str, int] = {"docs/backend-tutorial.md": 1}

FILES_IN_REPOSITORY = "https://github.com/embedonce/embedonce/blob/main/"

SHOWN_ONLY = {"", "text", "json", "jsonl", "csv", "markdown", "md", "ini", "mermaid", "make", "diff", "sql"}
SET_UP = re.compile(r"#|(pip|pipx|uv|make|git|apt|apt-get|brew|docker|cd|source|\.) |python3? -m (venv|pip) ")
CONFIGURATION = {"cache", "key", "provider", "drift", "tiers"}


class Fence(NamedTuple):
    language: str
    content: str
    line: int
    """Of its first line, counted from 1."""

    @property
    def not_run(self) -> bool:
        return re.match(r"(\$ )?# not run: \S", self.content) is not None

    @property
    def file(self) -> str | None:
        match = re.match(r"# ([\w./-]+\.\w+)\n", self.content)
        return match[1] if match else None


class Mismatch(AssertionError):
    """What a page shows is not what happened."""


def fences_of(page: Path) -> list[Fence]:
    tokens = MarkdownIt("commonmark").parse(page.read_text())
    fences = [token for token in tokens if token.type == "fence" and token.map]
    return [
        Fence((token.info.split() or [""])[0].lower(), token.content, token.map[0] + 2)
        for token in fences
        if token.map is not None
    ]


# --- comparing --------------------------------------------------------------------------------


def compare(shown: str, happened: str, *, loosely: bool) -> None:
    """Raise Mismatch unless ``happened`` is what ``shown`` says, with ... for anything."""
    prepare = _without_figures if loosely else str
    wanted = [prepare(line) for line in _lines(shown)]
    found = [prepare(line) for line in _lines(happened)]
    pattern = "".join(".*?" if line in ("...", "…") else _pattern(line) + "\n" for line in wanted)
    if not re.fullmatch(pattern, "".join(line + "\n" for line in found), re.DOTALL):
        raise Mismatch(f"the page shows\n{_indented(shown)}\nbut this happened\n{_indented(happened)}")


def _lines(text: str) -> list[str]:
    lines = (re.sub(r"\s+", " ", line).strip() for line in text.splitlines())
    return [line for line in lines if line]


def _pattern(line: str) -> str:
    return "[^\n]*".join(re.escape(part) for part in re.split(r"\.\.\.|…", line))


def _without_figures(line: str) -> str:
    """Replace numbers but 0, with their unit, and the width of rules: they differ from one run to the next."""
    line = line.replace(str(Path.home()), "~")
    line = re.sub(r"[-─━═╌]{3,}", "---", line)
    line = re.sub(r"\d+([.,:_]\d+)*", lambda match: "0" if match[0] == "0" else "#", line)
    line = re.sub(r"# ?(µs|us|ms|s|min|h|B|[kKMG]i?B)\b", "# unit", line)
    return line.replace("# unit (#)", "# unit")  # pytest adds hours and minutes to a run of over 60 s


def _indented(text: str) -> str:
    return "\n".join("    " + line for line in text.rstrip().splitlines()) or "    (nothing)"


# --- running a page ---------------------------------------------------------------------------


class Page:
    """Runs the fences of one page in order, in the current folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.relative_to(ROOT).as_posix()
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.problems: list[str] = []
        self.not_run = 0
        self._printed: str | None = None
        self._loosely = False

    def run(self) -> None:
        for fence in fences_of(self.path):
            printed, self._printed = self._printed, None
            if fence.not_run:
                self.not_run += 1
                continue
            try:
                if fence.language == "text" and printed:
                    compare(fence.content, printed, loosely=self._loosely)
                else:
                    self._run(fence)
            except Mismatch as problem:
                self.problems.append(f"{self.name}:{fence.line}: {problem}")
            except Exception:
                self.problems.append(f"{self.name}:{fence.line}: {traceback.format_exc()}")

    def close(self) -> None:
        for value in self.names.values():
            if isinstance(value, embedonce.Cache):
                value.close()

    def _run(self, fence: Fence) -> None:
        if fence.file:
            target = Path(fence.file)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(fence.content)
        match fence.language:
            case "python" | "py" if ">>> " in fence.content:
                self._doctest(fence)
            case "pycon":
                self._doctest(fence)
            case "python" | "py":
                self._python(fence)
            case "toml":
                self._toml(fence)
            case "console":
                self._console(fence)
            case "sh" | "bash" | "shell":
                self._shell(fence)
            case "json":
                json.loads(fence.content)
            case language if language not in SHOWN_ONLY:
                raise Mismatch(f"no rule for a block of {language!r}: see the top of {Path(__file__).name}")

    # python

    def _python(self, fence: Fence) -> None:
        if fence.file and "/" in fence.file:
            ast.parse(fence.content, fence.file)
            return
        before = fence.line - 1
        tree = ast.increment_lineno(ast.parse(fence.content, str(self.path)), before)
        arrows = Arrows({line + before: text for line, text in _arrows(fence.content)})
        tree = ast.fix_missing_locations(arrows.visit(tree))
        if arrows.left:
            raise Mismatch(f"'# ->' ends neither an expression nor an assignment in line {min(arrows.left)}")
        with contextlib.redirect_stdout(io.StringIO()) as output:
            self.names[CHECK] = Check(output)
            exec(compile(tree, str(self.path), "exec"), self.names)
        self.names[CHECK].report()
        self._printed, self._loosely = output.getvalue(), False

    def _doctest(self, fence: Fence) -> None:
        test = doctest.DocTestParser().get_doctest(fence.content, self.names, self.name, str(self.path), fence.line - 1)
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
        report = io.StringIO()
        runner.run(test, out=report.write, clear_globs=False)
        self.names = test.globs
        if runner.failures:
            raise Mismatch(report.getvalue())

    # toml

    def _toml(self, fence: Fence) -> None:
        content = tomllib.loads(fence.content)
        in_pyproject = "embedonce" in content.get("tool", {})
        if not in_pyproject and not content.keys() & CONFIGURATION:
            return
        folder = Path(f"toml-{fence.line}")
        folder.mkdir()
        file = folder / ("pyproject.toml" if in_pyproject else "embedonce.toml")
        file.write_text(fence.content)
        with pytest.MonkeyPatch.context() as patch:
            for name in re.findall(r"\$\{(\w+)\}", fence.content):
                patch.setenv(name, "x" * 32)
            try:
                config.load(file)
            except embedonce.ConfigError as error:
                raise Mismatch(f"the configuration does not load:\n{_indented(str(error))}") from None

    # commands

    def _console(self, fence: Fence) -> None:
        for command, shown in _console_commands(fence.content):
            if not _is_set_up(command):
                self._command(command, shown)

    def _shell(self, fence: Fence) -> None:
        lines = re.sub(r"\\\n", " ", fence.content).splitlines()
        commands = "\n".join(line for line in lines if not _is_set_up(line))
        if commands.strip():
            self._printed, self._loosely = self._command(commands, None), True

    def _command(self, command: str, shown: str | None) -> str:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        done = subprocess.run(
            ["bash", "-c", command],
            env={**os.environ, "PATH": path},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=100,
        )
        if shown:
            compare(shown, done.stdout, loosely=True)
        elif done.returncode:
            raise Mismatch(f"$ {command}\nended with {done.returncode}:\n{_indented(done.stdout)}")
        return done.stdout


CHECK = "__check__"


class Arrows(ast.NodeTransformer):
    """Puts ``__check__(line, shown, value)`` in the place of every ``value  # -> shown``, at any depth."""

    def __init__(self, shown: dict[int, str]) -> None:
        self.left = shown

    def visit_Expr(self, node: ast.Expr) -> Any:
        if node.end_lineno not in self.left:
            return node
        return [self._call(node, "begin"), self._call(node, "__call__", node.value)]

    def visit_Assign(self, node: ast.Assign) -> Any:
        if node.end_lineno not in self.left or not isinstance(node.targets[0], ast.Name):
            return node
        return [node, self._call(node, "__call__", ast.Name(node.targets[0].id, ast.Load()))]

    def _call(self, node: ast.stmt, method: str, *values: ast.expr) -> ast.stmt:
        line = node.end_lineno or 0
        said = [ast.Constant(line), ast.Constant(self.left.pop(line)), *values] if values else []
        call = ast.Call(ast.Attribute(ast.Name(CHECK, ast.Load()), method, ast.Load()), said, [])
        return ast.copy_location(ast.Expr(call), node)


class Check:
    """Compares values, or what was printed since ``begin``, with what the page shows."""

    def __init__(self, output: io.StringIO) -> None:
        self._output = output
        self._begin = 0
        self._problems: list[str] = []

    def begin(self) -> None:
        self._begin = self._output.tell()

    def __call__(self, line: int, shown: str, value: object) -> None:
        printed = self._output.getvalue()[self._begin :]
        try:
            compare(shown, printed if value is None and printed else repr(value), loosely=False)
        except Mismatch as problem:
            self._problems.append(f"in line {line}, {problem}")

    def report(self) -> None:
        if self._problems:
            raise Mismatch("\n".join(self._problems))


def _arrows(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of every ``# -> text``."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.string.startswith("# -> "):
            yield token.start[0], token.string.removeprefix("# -> ")


def _console_commands(content: str) -> Iterator[tuple[str, str]]:
    """Yield each command with what is shown below it."""
    for part in re.split(r"^\$ ", content, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        length = 1
        while lines[length - 1].endswith("\\") or (length < len(lines) and lines[length].startswith("> ")):
            length += 1
        command = "\n".join([lines[0], *(line.removeprefix("> ") for line in lines[1:length])])
        yield command, "\n".join(lines[length:])


def _is_set_up(command: str) -> bool:
    return SET_UP.match(command) is not None


@pytest.mark.timeout(300)  # a page of many commands, on a busy machine
@pytest.mark.parametrize("page", PAGES, ids=[path.relative_to(ROOT).as_posix() for path in PAGES])
def test_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "here"
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copy(ROOT / "README.md", folder)
    monkeypatch.chdir(folder)
    runner = Page(page)
    try:
        runner.run()
    finally:
        runner.close()
    _report(runner.problems)
    assert runner.not_run == NOT_RUN.get(runner.name, 0), "say in NOT_RUN how many blocks are not run"


def _report(problems: Sequence[str]) -> None:
    if problems:
        pytest.fail("\n\n".join(problems), pytrace=False)


def test_links_lead_somewhere() -> None:
    """Every relative link of a page names a file that is there, and a heading where it names one."""
    problems = []
    for page in PAGES:
        for link in _links(page):
            target, _, anchor = link.partition("#")
            file = (page.parent / target) if target else page
            if not file.exists():
                problems.append(f"{page.relative_to(ROOT)}: {link} is not there")
            elif anchor and file.suffix == ".md" and anchor not in _anchors(file):
                problems.append(f"{page.relative_to(ROOT)}: {link} names no heading")
    _report(problems)


def test_readme_links_are_absolute_and_name_files_of_the_repository() -> None:
    """A package index shows README.md without the files beside it, so a relative link is broken there."""
    readme = ROOT / "README.md"
    problems = [f"{link} is relative: write {FILES_IN_REPOSITORY}{link}" for link in _links(readme)]
    for link in _all_links(readme):
        if link.startswith(FILES_IN_REPOSITORY):
            path, _, anchor = link.removeprefix(FILES_IN_REPOSITORY).partition("#")
            if not (ROOT / path).is_file():
                problems.append(f"{link}: there is no file {path}")
            elif anchor and anchor not in _anchors(ROOT / path):
                problems.append(f"{link} names no heading")
    texts = (token.content for token in _inline_tokens(readme) if token.type == "text")
    problems += [f"{text!r}: define the link at the end of the page" for text in texts if re.search(r"\[\w.+\]", text)]
    _report(problems)


def _links(page: Path) -> Iterator[str]:
    """Yield the relative links of a page."""
    return (link for link in _all_links(page) if not re.match(r"\w+:", link))


def _all_links(page: Path) -> Iterator[str]:
    return (str(token.attrs["href"]) for token in _inline_tokens(page) if token.type == "link_open")


def _inline_tokens(page: Path) -> Iterator[Token]:
    for block in MarkdownIt("commonmark").parse(page.read_text()):
        yield from block.children or ()


def _anchors(page: Path) -> set[str]:
    tokens = MarkdownIt("commonmark").parse(page.read_text())
    titles = (tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open")
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_pages_install_from_a_clone() -> None:
    """Nothing is on a package index yet: ``pip install embedonce`` finds nothing, or somebody else's package."""
    by_name = re.compile(r"pip install [^`\n]*(?<![/\w-])embedonce(?![\w/-])")
    problems = []
    for page in [*PAGES, *ROOT.glob("benchmarks/*.md"), *ROOT.glob("examples/**/*.md")]:
        problems += [f"{page.relative_to(ROOT)}: {match[0]}" for match in by_name.finditer(page.read_text())]
    _report(problems)


# --- the tables of docs/using.md --------------------------------------------------------------


def test_the_tables_of_methods_and_properties_are_complete() -> None:
    """docs/using.md names every public method and property of Cache, and of each method its twin for asyncio."""
    public = {name: value for name, value in inspect.getmembers(embedonce.Cache) if not name.startswith("_")}
    twins = {f"a{name}" for name in public} & set(public)
    methods = {name for name, value in public.items() if callable(value)} - twins
    properties = {name for name, value in public.items() if not callable(value)}

    rows = _rows("docs/using.md", "All methods", "method")
    shown = {re.split(r"\W", row[0].strip("`"))[0]: row for row in rows}
    problems = [f"the table lacks {name}" for name in sorted(methods - set(shown))]
    problems += [f"{name} is no method of Cache" for name in sorted(set(shown) - methods)]
    for name in sorted(methods & set(shown)):
        call, _, last = shown[name]
        twin = f"a{name}"
        if (twin in twins) != (f"`{twin}`" in last) or (twin not in twins and not last.startswith("none")):
            problems.append(f"{name}: the twin is {twin if twin in twins else 'none'}, and the table says {last}")
        arguments = re.findall(r"(\w+)(?:=[^,)]+)?[,)]", call.partition("(")[2])
        known = inspect.signature(public[name]).parameters
        problems += [f"{name} has no argument {argument}" for argument in arguments if argument not in known]

    named = {row[0].strip("`") for row in _rows("docs/using.md", "All methods", "property")}
    problems += [f"the tables differ from Cache in {name}" for name in sorted(named ^ properties)]
    _report(problems)


def test_the_table_of_arguments_is_complete() -> None:
    rows = _rows("docs/using.md", "Making one", "argument")
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
    assert named == list(inspect.signature(embedonce.Cache).parameters)


def _rows(page: str, heading: str, first_cell: str) -> list[list[str]]:
    """Return the cells of each row of a table: the one below a heading whose first cell is ``first_cell``."""
    section = (ROOT / page).read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    table = section.partition(f"| {first_cell} |")[2].partition("\n\n")[0]
    assert table, f"{page} has no table of this form below {heading!r}"
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


WRONG_PAGE = """
```python
for n in (1, 2):
    n + 1  # -> 2
```
```python
print("one")
```
```text
two
```
```toml
[[tiers]]
type = "memry"
```
```console
$ embedonce --no-such-option
usage: something else
```
```python
raise ValueError("is not swallowed")
```
```fortran
STOP
```
"""


def test_a_wrong_page_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(WRONG_PAGE)
    runner = Page(page)
    runner.run()
    assert [problem.split(": ")[0] for problem in runner.problems] == [f"page.md:{n}" for n in (3, 10, 13, 17, 21, 24)]


@pytest.mark.parametrize(
    ("shown", "happened", "same"),
    [
        ("a\nb", "a\nb", True),
        ("a\nb", "b\na", False),
        ("a\n...\nd", "a\nb\nc\nd", True),
        ("a … d", "a b c d", True),
        ("12 hits in 0.3 s", "14 hits in 210 ms", True),
        ("0 computed", "3 computed", False),
        ("a", "a\nb", False),
    ],
)
def test_compare_loosely(shown: str, happened: str, same: bool) -> None:
    with contextlib.nullcontext() if same else pytest.raises(Mismatch):
        compare(shown, happened, loosely=True)
