"""``embedonce new``: the package can be built and installed, passes its tests, and its plugin is found."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest

FILES = {
    "pyproject.toml",
    "README.md",
    ".github/workflows/ci.yml",
    "src/embedonce_my_shelf/__init__.py",
    "src/embedonce_my_shelf/py.typed",
}


def run(*command: str | Path, site: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in ``folder`` with ``site`` on the path of Python."""
    path = os.pathsep.join([str(site), *(part for part in sys.path if part and "site-packages" in part)])
    return subprocess.run(
        [sys.executable, "-P", *map(str, command)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)  # it installs a package and runs the package's own tests, on a machine that may be busy
@pytest.mark.parametrize(
    ("kind", "store", "more"),
    [
        ("backend", "folder", ()),
        ("provider", None, ()),
        ("importer", None, ()),
        ("backend", "network", ("connections", "server")),
    ],
)
def test_the_package_is_built_and_installed_and_passes_its_tests(
    command: Any, folder: Path, kind: str, store: str | None, more: tuple[str, ...]
) -> None:
    done = command("new", kind, "my-shelf", *(("--kind", store) if store else ()), "--json")
    assert done.code == 0
    package = folder / "embedonce-my-shelf"
    modules = {f"src/embedonce_my_shelf/{name}.py" for name in (kind, *more)}
    assert set(done.json["files"]) == FILES | modules | {f"tests/test_{kind}.py"}
    assert {file.relative_to(package).as_posix() for file in package.rglob("*") if file.is_file()} == set(
        done.json["files"]
    )
    for file in package.rglob("*"):
        assert not file.is_file() or re.search(r"\bexample\b|Example", file.read_text()) is None, file

    site, wheels = folder / "site", folder / "wheels"
    built = run("-m", "hatchling", "build", "--target", "wheel", "--directory", wheels, site=site, folder=package)
    assert built.returncode == 0, built.stderr
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        assert f"embedonce_my_shelf/{kind}.py" in opened.namelist()
    installed = run(
        *("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--disable-pip-version-check"),
        *("--target", site, wheel),
        site=site,
        folder=folder,
    )
    assert installed.returncode == 0, installed.stderr

    # With a folder of its own, pytest does not remove the folders that other runs on this machine have left.
    pytest_command = ("-m", "pytest", "-q", "-W", "error", "-p", "no:asyncio", "--basetemp", folder / "temporary")
    tested = run(*pytest_command, site=site, folder=package)
    assert tested.returncode == 0, tested.stdout
    assert " passed" in tested.stdout.splitlines()[-1]

    listed = json.loads(run("-m", "embedonce", "plugins", "--json", site=site, folder=folder).stdout)
    (found,) = [one for one in listed if one["name"] == "my-shelf"]
    assert (found["kinds"], found["distribution"], found["error"]) == ([kind], "embedonce-my-shelf", None)
    schema = json.loads(run("-m", "embedonce", "schema", site=site, folder=folder).stdout)
    option = {"folder": "path", "network": "url", None: "dimensions" if kind == "provider" else "path"}[store]
    properties = schema["properties"]
    table = {
        "backend": properties["tiers"]["items"],
        "provider": properties["provider"],
        "importer": properties["imports"]["items"],
    }[kind]
    (own,) = [one for one in table["oneOf"] if one.get("title") == "my-shelf"]
    assert option in own["properties"]
    readme = (package / "README.md").read_text()
    (folder / "embedonce.toml").write_text(readme.partition("```toml\n")[2].partition("```")[0])
    (folder / "vectors").mkdir(exist_ok=True)  # an importer needs a store
    checked = run("-m", "embedonce", "check", site=site, folder=folder)
    assert (checked.returncode == 0) == (store != "network"), checked.stderr  # the README's server does not run here
    assert ("my-shelf" in checked.stdout) or kind != "provider"


def test_the_metadata_has_entry_point_and_test_extra(command: Any, folder: Path) -> None:
    command("new", "backend", "shelf")
    project = tomllib.loads(Path("embedonce-shelf/pyproject.toml").read_text())["project"]
    assert project["entry-points"]["embedonce"] == {"shelf": "embedonce_shelf.backend"}
    assert project["optional-dependencies"]["test"] == ["embedonce[testing]>=0.1"]
    command("new", "importer", "old-cache")
    project = tomllib.loads(Path("embedonce-old-cache/pyproject.toml").read_text())["project"]
    assert project["entry-points"] == {"embedonce.importers": {"old-cache": "embedonce_old_cache.importer"}}
    assert "class ShelfBackend:" in Path("embedonce-shelf/src/embedonce_shelf/backend.py").read_text()


def test_the_output_names_the_next_commands(command: Any, folder: Path) -> None:
    assert command("new", "backend", "shelf").out == (
        "wrote embedonce-shelf; now try:\n  cd embedonce-shelf\n  pip install -e '.[test]'\n  pytest\n"
    )
    assert command("new", "provider", "shelf", "--folder", "a b/c").code == 0
    assert (folder / "a b/c/src/embedonce_shelf/provider.py").is_file()


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("Shelf", "must start with a letter, contain only a-z, 0-9 and single hyphens"),
        ("my_shelf", "must start with a letter"),
        ("my--shelf", "must start with a letter"),
        ("shelf-", "must start with a letter"),
        ("1shelf", "must start with a letter"),
        ("../shelf", "must start with a letter"),
        ("", "must start with a letter"),
        ("s" * 41, "at most 40 characters"),
        ("embedonce-shelf", "use the name shelf"),
        ("provider", "is reserved by embedonce"),
        ("backends", "is reserved by embedonce"),
        ("importers", "is reserved by embedonce"),
        ("disk", "disk is a plugin of embedonce itself"),
        ("strip", "strip is a plugin of embedonce itself"),
    ],
)
def test_a_bad_name_is_refused(command: Any, folder: Path, name: str, wanted: str) -> None:
    done = command("new", "backend", name)
    assert done.code == 2
    assert wanted in done.err
    assert list(folder.iterdir()) == []


def test_an_importer_may_have_the_name_of_a_backend_but_not_of_an_importer_of_embedonce(
    command: Any, folder: Path
) -> None:
    assert command("new", "importer", "disk").code == 0
    for name in ("langchain", "redis"):
        done = command("new", "importer", name)
        assert (done.code, done.err) == (
            2,
            f"error: {name} is an importer of embedonce itself; choose another name\n",
        )
    assert command("new", "backend", "langchain").code == 0
    assert sorted(path.name for path in folder.iterdir()) == ["embedonce-disk", "embedonce-langchain"]


def test_only_a_backend_has_a_kind_of_store(command: Any, folder: Path) -> None:
    done = command("new", "provider", "shelf", "--kind", "network")
    assert (done.code, done.err) == (2, "error: --kind is valid only for a backend; remove it\n")
    assert command("new", "backend", "shelf", "--kind", "cloud").code == 2
    assert list(folder.iterdir()) == []


def test_an_existing_file_or_folder_is_not_touched(command: Any, folder: Path) -> None:
    (folder / "embedonce-shelf").mkdir()
    (folder / "embedonce-books").symlink_to("nowhere")
    (folder / "file").touch()
    for name, more in (
        ("shelf", []),
        ("books", []),
        ("shelf", ["--folder", "file"]),
        ("shelf", ["--folder", "file/x"]),
    ):
        done = command("new", "backend", name, *more)
        assert done.code == 2
        assert "already exists" in done.err or "cannot write" in done.err
    assert sorted(path.name for path in folder.iterdir()) == ["embedonce-books", "embedonce-shelf", "file"]
    assert list((folder / "embedonce-shelf").iterdir()) == []


def test_ctrl_c_leaves_nothing_behind(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from embedonce.cli import new

    monkeypatch.setattr(new, "_fill_in_name", lambda text, name: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        new._write_package("backend", "shelf", folder / "embedonce-shelf")
    assert list(folder.iterdir()) == []
