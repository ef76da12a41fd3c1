"""Run every example in README.md and docs/: code, configurations and commands, and compare their output.

Each page runs on its own, from top to bottom, in one folder with a copy of README.md and docs/:

- ```` ```python ````: The block is executed; the blocks of a page share their names. ``expression  # -> value`` is
  compared with the value's repr or with what it printed. If the code printed something and a ```` ```text ```` block
  comes next, that is compared too. A block with ``>>>`` is a doctest.
- ```` ```toml ````: The block must be valid. A configuration (with ``[cache]``, ``[key]``, ``[provider]``,
  ``[[tiers]]`` or ``[tool.embedonce]``) must load. Only ``[[imports]]`` may be alone.
- ```` ```console ````: The commands after ``$`` are executed, and their output is compared, ignoring figures (except
  0, which stays 0). A server that `embedonce serve` starts runs until the end of the page. The port 8080 stands for a
  free port.
- ```` ```sh ````: The block is executed, and its output is compared with a ```` ```text ```` block that comes next.
  Set-up commands (pip, make, git, ...) are not executed.
- A block of any language whose first line is only ``# NAME.EXT`` is first written to that file. Python in a folder is
  a module of a package, and is only parsed.
- ``...`` or ``…`` matches anything; on a line of its own it matches any lines.

A block that cannot run here says why: its first line is ``# not run: REASON``. NOT_RUN has their number per page.
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
import signal
import subprocess
import sys
import tokenize
import tomllib
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from servers import find_free_port, wait_until

import embedonce
from embedonce import config
from embedonce_providers.ngram import NgramProvider

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

# Number of blocks per page that are not run. Raise a number only for a block that no test machine can run.
NOT_RUN: dict[str, int] = {"docs/backend-tutorial.md": 1, "docs/using.md": 1}

FILES_IN_REPOSITORY = "https://github.com/embedonce/embedonce/blob/main/"

SHOWN_ONLY = {"", "text", "json", "jsonl", "csv", "markdown", "md", "ini", "mermaid", "make", "diff", "sql"}
SET_UP = re.compile(r"#|(pip|pipx|uv|make|git|apt|apt-get|brew|docker|cd|source|\.) |python3? -m (venv|pip) ")
CONFIGURATION = {"cache", "key", "provider", "drift", "tiers", "imports", "embed"}
FOR_IMPORTS = '[provider]\ntype = "ngram"\n\n[[tiers]]\ntype = "memory"\n\n'
"""What a block needs that shows only ``[[imports]]``."""


class Fence(NamedTuple):
    language: str
    content: str
    line: int
    """Number of its first line, from 1."""

    @property
    def not_run(self) -> bool:
        return re.match(r"(\$ )?# not run: \S", self.content) is not None

    @property
    def file(self) -> str | None:
        match = re.match(r"# ([\w./-]+\.\w+)\n", self.content)
        return match[1] if match else None


class Mismatch(AssertionError):
    """The output on a page differs from the real output."""


def parse_fences(page: Path) -> list[Fence]:
    tokens = MarkdownIt("commonmark").parse(page.read_text())
    fences = [token for token in tokens if token.type == "fence" and token.map]
    return [
        Fence((token.info.split() or [""])[0].lower(), token.content, token.map[0] + 2)
        for token in fences
        if token.map is not None
    ]


# --- comparing --------------------------------------------------------------------------------


def compare(shown: str, happened: str, *, is_loose: bool) -> None:
    """Raise Mismatch unless ``happened`` matches ``shown``, in which ... matches anything."""
    prepare = _remove_figures if is_loose else str
    wanted = [prepare(line) for line in _split_lines(shown)]
    found = [prepare(line) for line in _split_lines(happened)]
    pattern = "".join(".*?" if line in ("...", "…") else _make_pattern(line) + "\n" for line in wanted)
    if not re.fullmatch(pattern, "".join(line + "\n" for line in found), re.DOTALL):
        raise Mismatch(f"the page shows\n{_indent(shown)}\nbut the output is\n{_indent(happened)}")


def _split_lines(text: str) -> list[str]:
    lines = (re.sub(r"\s+", " ", line).strip() for line in text.splitlines())
    return [line for line in lines if line]


def _make_pattern(line: str) -> str:
    return "[^\n]*".join(re.escape(part) for part in re.split(r"\.\.\.|…", line))


def _remove_figures(line: str) -> str:
    """Replace numbers except 0, their units, and the width of rules, because they differ between runs."""
    line = line.replace(str(Path.home()), "~")
    line = re.sub(r"[-─━═╌]{3,}", "---", line)
    line = re.sub(r"\d+([.,:_]\d+)*", lambda match: "0" if match[0] == "0" else "#", line)
    line = re.sub(r"# ?(µs|us|ms|s|min|h|B|[kKMG]i?B)\b", "# unit", line)
    return line.replace("# unit (#)", "# unit")  # pytest adds hours and minutes if a run takes over 60 s


def _indent(text: str) -> str:
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
        self._is_loose = False
        self._port = find_free_port()
        self._servers: list[subprocess.Popen[bytes]] = []

    def run(self) -> None:
        for written in parse_fences(self.path):
            fence = written._replace(content=written.content.replace(":8080", f":{self._port}"))
            printed, self._printed = self._printed, None
            if fence.not_run:
                self.not_run += 1
                continue
            try:
                if fence.language == "text" and printed:
                    compare(fence.content, printed, is_loose=self._is_loose)
                else:
                    self._run_fence(fence)
            except Mismatch as problem:
                self.problems.append(f"{self.name}:{fence.line}: {problem}")
            except Exception:
                self.problems.append(f"{self.name}:{fence.line}: {traceback.format_exc()}")

    def close(self) -> None:
        for value in self.names.values():
            if isinstance(value, embedonce.Cache):
                value.close()
        for server in self._servers:
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0

    def _run_fence(self, fence: Fence) -> None:
        if fence.file:
            target = Path(fence.file)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(fence.content)
        match fence.language:
            case "python" | "py" if ">>> " in fence.content:
                self._run_doctest(fence)
            case "pycon":
                self._run_doctest(fence)
            case "python" | "py":
                self._run_python(fence)
            case "toml":
                self._check_toml(fence)
            case "console":
                self._run_console(fence)
            case "sh" | "bash" | "shell":
                self._run_shell(fence)
            case "json":
                json.loads(fence.content)
            case language if language not in SHOWN_ONLY:
                raise Mismatch(f"there is no rule for a {language!r} block; see the top of {Path(__file__).name}")

    # python

    def _run_python(self, fence: Fence) -> None:
        if fence.file and "/" in fence.file:
            ast.parse(fence.content, fence.file)
            return
        before = fence.line - 1
        tree = ast.increment_lineno(ast.parse(fence.content, str(self.path)), before)
        arrows = Arrows({line + before: text for line, text in _find_arrows(fence.content)})
        tree = ast.fix_missing_locations(arrows.visit(tree))
        if arrows.remaining:
            raise Mismatch(f"'# ->' in line {min(arrows.remaining)} does not follow an expression or an assignment")
        with contextlib.redirect_stdout(io.StringIO()) as output:
            self.names[CHECK] = Check(output)
            exec(compile(tree, str(self.path), "exec"), self.names)
        self.names[CHECK].report()
        self._printed, self._is_loose = output.getvalue(), False

    def _run_doctest(self, fence: Fence) -> None:
        test = doctest.DocTestParser().get_doctest(fence.content, self.names, self.name, str(self.path), fence.line - 1)
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
        report = io.StringIO()
        runner.run(test, out=report.write, clear_globs=False)
        self.names = test.globs
        if runner.failures:
            raise Mismatch(report.getvalue())

    # toml

    def _check_toml(self, fence: Fence) -> None:
        content = tomllib.loads(fence.content)
        in_pyproject = "embedonce" in content.get("tool", {})
        if not in_pyproject and not content.keys() & CONFIGURATION:
            return
        folder = Path(f"toml-{fence.line}")
        folder.mkdir()
        file = folder / ("pyproject.toml" if in_pyproject else "embedonce.toml")
        file.write_text(FOR_IMPORTS * (content.keys() == {"imports"}) + fence.content)
        with pytest.MonkeyPatch.context() as patch:
            for name in re.findall(r"\$\{(\w+)\}", fence.content):
                patch.setenv(name, "x" * 32)
            try:
                config.load(file)
            except embedonce.ConfigError as error:
                raise Mismatch(f"the configuration does not load:\n{_indent(str(error))}") from None

    # commands

    def _run_console(self, fence: Fence) -> None:
        for command, shown in _split_console(fence.content):
            if command.startswith("embedonce serve"):
                self._start_server(command, shown)
            elif not _is_set_up(command):
                self._run_command(command, shown)

    def _run_shell(self, fence: Fence) -> None:
        lines = re.sub(r"\\\n", " ", fence.content).splitlines()
        commands = "\n".join(line for line in lines if not _is_set_up(line))
        if commands.strip():
            self._printed, self._is_loose = self._run_command(commands, None), True

    def _start_server(self, command: str, shown: str) -> None:
        """Start a server, and compare what it prints until it answers."""
        log = Path(f"serve-{self._port}.log")
        with log.open("wb") as output:
            server = subprocess.Popen(
                ["bash", "-c", f"exec {command} --port {self._port}"],
                env=self._make_environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self._servers.append(server)
        wait_until(lambda: server.poll() is not None or "base_url:" in log.read_text(), "the server answers")
        compare(shown, log.read_text(), is_loose=True)

    def _make_environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        # The tests of this project load no plugins of pytest, and one page shows the plugin of embedonce.
        plugins = ",".join(filter(None, [os.environ.get("PYTEST_PLUGINS"), "embedonce_integrations.pytest"]))
        return {**os.environ, "PATH": path, "PYTEST_PLUGINS": plugins}

    def _run_command(self, command: str, shown: str | None) -> str:
        done = subprocess.run(
            ["bash", "-c", command],
            env=self._make_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=100,
        )
        if shown:
            compare(shown, done.stdout, is_loose=True)
        elif done.returncode:
            raise Mismatch(f"$ {command}\nexited with status {done.returncode}:\n{_indent(done.stdout)}")
        return done.stdout


CHECK = "__check__"


class Arrows(ast.NodeTransformer):
    """Replaces every ``value  # -> shown``, at any depth, by ``__check__(line, shown, value)``."""

    def __init__(self, shown: dict[int, str]) -> None:
        self.remaining = shown

    def visit_Expr(self, node: ast.Expr) -> Any:
        if node.end_lineno not in self.remaining:
            return node
        return [self._make_call(node, "begin"), self._make_call(node, "__call__", node.value)]

    def visit_Assign(self, node: ast.Assign) -> Any:
        if node.end_lineno not in self.remaining or not isinstance(node.targets[0], ast.Name):
            return node
        return [node, self._make_call(node, "__call__", ast.Name(node.targets[0].id, ast.Load()))]

    def _make_call(self, node: ast.stmt, method: str, *values: ast.expr) -> ast.stmt:
        line = node.end_lineno or 0
        arguments = [ast.Constant(line), ast.Constant(self.remaining.pop(line)), *values] if values else []
        call = ast.Call(ast.Attribute(ast.Name(CHECK, ast.Load()), method, ast.Load()), arguments, [])
        return ast.copy_location(ast.Expr(call), node)


class Check:
    """Compares values, or the output since ``begin``, with what the page shows."""

    def __init__(self, output: io.StringIO) -> None:
        self._output = output
        self._begin = 0
        self._problems: list[str] = []

    def begin(self) -> None:
        self._begin = self._output.tell()

    def __call__(self, line: int, shown: str, value: object) -> None:
        printed = self._output.getvalue()[self._begin :]
        try:
            compare(shown, printed if value is None and printed else repr(value), is_loose=False)
        except Mismatch as problem:
            self._problems.append(f"in line {line}, {problem}")

    def report(self) -> None:
        if self._problems:
            raise Mismatch("\n".join(self._problems))


def _find_arrows(source: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of every ``# -> text``."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.string.startswith("# -> "):
            yield token.start[0], token.string.removeprefix("# -> ")


def _split_console(content: str) -> Iterator[tuple[str, str]]:
    """Yield each command with the output shown below it."""
    for part in re.split(r"^\$ ", content, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        length = 1
        while lines[length - 1].endswith("\\") or (length < len(lines) and lines[length].startswith("> ")):
            length += 1
        command = "\n".join([lines[0], *(line.removeprefix("> ") for line in lines[1:length])])
        yield command, "\n".join(lines[length:])


def _is_set_up(command: str) -> bool:
    return SET_UP.match(command) is not None


def write_langchain_cache() -> None:
    """Write the cache that README.md imports, and the file with its texts."""
    from langchain_classic.embeddings import CacheBackedEmbeddings
    from langchain_classic.storage import LocalFileStore
    from langchain_core.embeddings import Embeddings

    class Ngram(Embeddings):
        def embed_documents(self, texts: list[str]) -> list[list[float]]:
            with embedonce.Cache(NgramProvider()) as cache:
                vectors: list[list[float]] = cache.embed_batch(texts).tolist()
                return vectors

        def embed_query(self, text: str) -> list[float]:
            return self.embed_documents([text])[0]

    chunks = [f"Chunk {number} of a document." for number in range(1000)]
    Path("chunks.jsonl").write_text("".join(json.dumps({"text": chunk}) + "\n" for chunk in chunks))
    store = LocalFileStore("langchain-cache")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using default key encoder")
        cached = CacheBackedEmbeddings.from_bytes_store(Ngram(), store, namespace="text-embedding-3-small")
    cached.embed_documents(chunks)


@pytest.mark.timeout(300)  # a page of many commands, on a busy machine
@pytest.mark.parametrize("page", PAGES, ids=[path.relative_to(ROOT).as_posix() for path in PAGES])
def test_page(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "here"
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copy(ROOT / "README.md", folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # the pages embed the same texts
    if page.name == "README.md":
        write_langchain_cache()
    runner = Page(page)
    try:
        runner.run()
    finally:
        runner.close()
    _report(runner.problems)
    assert runner.not_run == NOT_RUN.get(runner.name, 0), "set NOT_RUN to the number of blocks that are not run"


def _report(problems: Sequence[str]) -> None:
    if problems:
        pytest.fail("\n\n".join(problems), pytrace=False)


def test_links_lead_somewhere() -> None:
    """Every relative link of a page must lead to an existing file, and to an existing heading if it has an anchor."""
    problems = []
    for page in PAGES:
        for link in _find_links(page):
            target, _, anchor = link.partition("#")
            file = (page.parent / target) if target else page
            if not file.exists():
                problems.append(f"{page.relative_to(ROOT)}: the file of {link} does not exist")
            elif anchor and file.suffix == ".md" and anchor not in _find_anchors(file):
                problems.append(f"{page.relative_to(ROOT)}: the heading of {link} does not exist")
    _report(problems)


def test_readme_links_are_absolute_and_name_files_of_the_repository() -> None:
    """A package index shows README.md without the files beside it, so a relative link is broken there."""
    readme = ROOT / "README.md"
    problems = [f"{link} is relative: write {FILES_IN_REPOSITORY}{link}" for link in _find_links(readme)]
    for link in _find_all_links(readme):
        if link.startswith(FILES_IN_REPOSITORY):
            path, _, anchor = link.removeprefix(FILES_IN_REPOSITORY).partition("#")
            if not (ROOT / path).is_file():
                problems.append(f"{link}: there is no file {path}")
            elif anchor and anchor not in _find_anchors(ROOT / path):
                problems.append(f"{link} names no heading")
    texts = (token.content for token in _parse_inline(readme) if token.type == "text")
    problems += [f"{text!r}: define the link at the end of the page" for text in texts if re.search(r"\[\w.+\]", text)]
    _report(problems)


def _find_links(page: Path) -> Iterator[str]:
    """Yield the relative links of a page."""
    return (link for link in _find_all_links(page) if not re.match(r"\w+:", link))


def _find_all_links(page: Path) -> Iterator[str]:
    return (str(token.attrs["href"]) for token in _parse_inline(page) if token.type == "link_open")


def _parse_inline(page: Path) -> Iterator[Token]:
    for block in MarkdownIt("commonmark").parse(page.read_text()):
        yield from block.children or ()


def _find_anchors(page: Path) -> set[str]:
    tokens = MarkdownIt("commonmark").parse(page.read_text())
    titles = (tokens[i + 1].content for i, token in enumerate(tokens) if token.type == "heading_open")
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_pages_install_from_a_clone() -> None:
    """Nothing is on a package index yet: ``pip install embedonce`` finds nothing, or somebody else's package."""
    # The output of `embedonce init` names the package, because it is right from the first release on.
    by_name = re.compile(r"(?<!install what it requires: )pip install [^`\n]*(?<![/\w-])embedonce(?![\w/-])")
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
    rows = _rows("docs/using.md", "Making a cache", "argument")
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
        compare(shown, happened, is_loose=True)
