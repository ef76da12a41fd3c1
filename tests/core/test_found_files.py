"""A configuration that is found, and not named: where the search ends, and whose file is used."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from installed_plugins import write_distribution
from optional import needs

import embedonce
from embedonce import config
from embedonce.errors import ConfigError

PLAIN = '[provider]\ntype = "ngram"\ndimensions = 64\n[[tiers]]\ntype = "memory"\n'
PYPROJECT = PLAIN.replace("[provider]", "[tool.embedonce.provider]").replace("[[tiers]]", "[[tool.embedonce.tiers]]")

pytestmark = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows has no such owners")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, two folders below ``tmp_path``."""
    folder = tmp_path / "top" / "here"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def give_away(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Make a path belong to another user. A test that does not run as root makes this process another user instead."""

    def give(path: Path) -> None:
        if os.geteuid() == 0:
            os.chown(path, 12345, 12345, follow_symlinks=False)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: 12345)

    return give


def complaint(source: str | None = None) -> str:
    """Return the problems of a configuration, or an empty string."""
    try:
        config.load(source)
    except ConfigError as error:
        return str(error)
    return ""


def refusal(source: str | None = None) -> str:
    said = complaint(source)
    assert said, "the configuration was not refused"
    return said


@pytest.mark.parametrize(("name", "text"), [("embedonce.toml", PLAIN), ("pyproject.toml", PYPROJECT)])
@pytest.mark.parametrize("above", [False, True])
def test_the_file_of_another_user_is_used_only_if_it_is_named(
    here: Path, give_away: Callable[[Path], None], name: str, text: str, above: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = (here.parent if above else here) / name
    file.write_text(text)
    assert config.load().file == file
    give_away(file)
    said = refusal()
    for part in (name, "it belongs to the user", f"--config {file}", f"EMBEDONCE_CONFIG={file}"):
        assert part in said
    assert config.load(str(file)).file == file
    monkeypatch.setenv("EMBEDONCE_CONFIG", str(file))
    assert config.load().file == file


def test_an_unrelated_file_of_another_user_is_passed_by(here: Path, give_away: Callable[[Path], None]) -> None:
    (here / "embedonce.toml").parent.parent.joinpath("embedonce.toml").write_text(PLAIN)
    (here / "pyproject.toml").write_text("[tool.black]\n")
    if os.geteuid() == 0:  # otherwise, the other file would belong to another user too
        give_away(here / "pyproject.toml")
    assert config.load().file == here.parent / "embedonce.toml"


def test_a_table_that_only_names_the_bundle_of_tests_configures_no_cache(here: Path) -> None:
    (here.parent / "pyproject.toml").write_text(PYPROJECT)
    (here / "pyproject.toml").write_text('[tool.embedonce]\nbundle = "vectors"\n')
    assert config.load().file == here.parent / "pyproject.toml"
    (here.parent / "pyproject.toml").unlink()
    assert config.load().file is None


@pytest.mark.slow
@pytest.mark.parametrize("name", ["embedonce.toml", "pyproject.toml"])
def test_what_is_not_a_regular_file_never_hangs(here: Path, name: str) -> None:
    code = "import embedonce.config as c\ntry: print(c.load().source)\nexcept Exception as e: print(e)"
    file = here / name

    def load() -> str:
        return subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=60).stdout

    with socket.socket(socket.AF_UNIX) as listening:
        os.mkfifo(file)
        fifo = load()
        file.unlink()
        listening.bind(name)
        bound = load()
    file.unlink()
    file.symlink_to("/dev/zero")
    device = load()
    if name == "pyproject.toml":  # it belongs to another tool, so it is passed by
        assert {said.startswith("defaults") for said in (fifo, bound, device)} == {True}
    else:
        assert "not a regular file but a FIFO" in fifo
        assert "not a regular file but a socket" in bound
        assert "not a regular file but a device" in device


@pytest.mark.parametrize("mode", [0o777, 0o1777])
def test_a_folder_that_every_user_may_write_to_is_refused(here: Path, mode: int) -> None:
    (here / "embedonce.toml").write_text(PLAIN)
    here.chmod(mode)
    assert f"every user may write to its folder {here}" in refusal()


def test_a_folder_that_every_user_may_rename_is_refused(here: Path) -> None:
    (here / "embedonce.toml").write_text(PLAIN)
    here.parent.chmod(0o777)
    assert f"they may write to {here.parent}" in refusal()
    here.parent.chmod(0o1777)  # sticky, as /tmp is
    assert config.load().file == here / "embedonce.toml"


def test_a_file_that_every_user_may_write_to_is_refused(here: Path) -> None:
    (here / "embedonce.toml").write_text(PLAIN)
    (here / "embedonce.toml").chmod(0o666)
    assert "every user may write to it" in refusal()


def test_the_users_own_group_may_write(here: Path) -> None:
    (here / "embedonce.toml").write_text(PLAIN)
    (here / "embedonce.toml").chmod(0o664)
    here.chmod(0o775)
    assert config.load().file == here / "embedonce.toml"


def test_a_link_and_its_target_are_checked(here: Path, tmp_path: Path, give_away: Callable[[Path], None]) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    target = elsewhere / "mine.toml"
    target.write_text(PLAIN)
    link = here / "embedonce.toml"
    link.symlink_to(target)
    assert config.load().file == link
    elsewhere.chmod(0o777)
    assert f"every user may write to its folder {elsewhere}" in refusal()
    elsewhere.chmod(0o755)
    if os.geteuid() == 0:
        give_away(link)
        assert f"the link {link} belongs to" in refusal()
        link.unlink()
        link.symlink_to(target)
    give_away(target)
    assert "it belongs to the user" in refusal()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs to give files away")
def test_a_second_name_in_a_strangers_folder_is_refused(here: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(PLAIN)
    os.link(tmp_path / "mine.toml", here / "embedonce.toml")
    assert config.load().file == here / "embedonce.toml"
    os.chown(here, 12345, 12345)
    assert "it has a second name" in refusal()


def test_root_accepts_the_user_who_called_sudo(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = here / "embedonce.toml"
    file.write_text(PLAIN)
    if os.geteuid() == 0:
        os.chown(file, 12345, 12345)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.delenv("SUDO_UID", raising=False)
    if file.stat().st_uid:
        assert "it belongs to the user" in refusal()
    monkeypatch.setenv("SUDO_UID", str(file.stat().st_uid))
    assert config.load().file == file


@pytest.mark.parametrize("root", ["folder", "file"])
def test_the_search_ends_at_a_repositorys_root(here: Path, tmp_path: Path, root: str) -> None:
    (tmp_path / "embedonce.toml").write_text(PLAIN)
    assert config.load().file == tmp_path / "embedonce.toml"
    mark = here.parent / ".git"
    mark.mkdir() if root == "folder" else mark.write_text("gitdir: elsewhere\n")
    assert config.load().file is None
    (here.parent / "embedonce.toml").write_text(PLAIN)
    assert config.load().file == here.parent / "embedonce.toml"


def test_the_search_ends_at_the_home_folder(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "embedonce.toml").write_text(PLAIN)
    (tmp_path / "link").symlink_to(here.parent)
    monkeypatch.setenv("HOME", str(tmp_path / "link"))
    assert config.load().file is None
    (here.parent / "embedonce.toml").write_text(PLAIN)
    assert config.load().file == here.parent / "embedonce.toml"


@needs("sentence_transformers")
@pytest.mark.parametrize("options", ["trust_remote_code = true", "model_kwargs = { trust_remote_code = true }"])
def test_remote_code_is_trusted_only_in_a_file_that_is_named(here: Path, options: str) -> None:
    text = PLAIN.replace('type = "ngram"', f'type = "sentence-transformers"\nmodel = "m"\n{options}')
    (here / "embedonce.toml").write_text(text)
    said = refusal()
    assert said.startswith("embedonce.toml:4:")
    assert "works only in a file that you name" in said
    # There may be another problem, such as an option that the provider does not have.
    assert "file that you name" not in complaint("embedonce.toml")
    (here / "embedonce.toml").write_text(text.replace("true", "false"))
    assert "file that you name" not in complaint()


def test_a_removed_current_folder_is_reported(here: Path) -> None:
    here.rmdir()
    assert "the current folder was removed" in refusal()


# --- the cache folder -------------------------------------------------------------------------


def test_without_a_home_folder_the_default_is_memory_alone_and_this_is_logged_once(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from embedonce._config import documents

    monkeypatch.setattr(documents, "_WARNED", set())
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "")
    for _ in range(2):
        loaded = config.load()
        assert [tier.type for tier in loaded.tiers] == ["memory"]
        assert "the home folder is unknown" in loaded.source
        with embedonce.open() as cache:
            assert cache.tiers == ("memory",)
    assert sum("no disk tier" in record.message for record in caplog.records) == 1


def test_a_cache_folder_that_cannot_be_created_means_memory_alone(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (here / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(here / "file" / "cache"))
    loaded = config.load()
    assert [tier.type for tier in loaded.tiers] == ["memory"]
    assert "is not a folder" in loaded.source


def test_a_relative_cache_folder_is_ignored(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    path = Path(config.load().tiers[1].options["path"])
    assert path.is_relative_to(tmp_path)
    assert path.is_absolute()
    assert "relative" not in path.parts


def test_a_path_below_an_unknown_home_folder_is_reported(here: Path) -> None:
    (here / "x.toml").write_text(PLAIN.replace('"memory"', '"disk"\npath = "~no-such-user/x"'))
    assert refusal("x.toml").startswith("x.toml:6:8: path in [[tiers]]")


# --- modules in the current folder ------------------------------------------------------------


def test_the_module_does_not_load_plugins_of_the_current_folder(here: Path) -> None:
    code = "open('loaded', 'w').close()"
    write_distribution(here, "evil_plugin", code, plugins=["evil"], distribution="evil")
    done = subprocess.run([sys.executable, "-m", "embedonce", "plugins"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "evil" not in done.stdout
    assert not (here / "loaded").exists()
