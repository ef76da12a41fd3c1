"""Importers as plugins: they have an entry-point group of their own, so that a backend may have the same name."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from installed_plugins import write_distribution

from embedonce import config, hookspecs, plugins
from embedonce.errors import PluginError

Install = Callable[..., str]

CODE = """
    import embedonce
    class Importer:
        which = "importer"
        def __init__(self, *, path: str = "", name: str = ""): ...
        def check(self): ...
        def lookup(self, texts, /): ...
        def close(self): ...
    class Backend:
        which = "backend"
        def get_many(self, keys, /): ...
        def set_many(self, items, ttl, /): ...
        def close(self): ...
    @embedonce.hookimpl
    def embedonce_importers():
        return {"NAME": Importer}
"""
BACKENDS = """
    @embedonce.hookimpl
    def embedonce_backends():
        return {"NAME": Backend}
"""

_numbers = itertools.count()


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return a function that puts a distribution with an importer on the path, and returns the importer's name."""

    def install(
        code: str = CODE,
        *,
        name: str = "",
        distribution: str = "acme-import",
        group: str = hookspecs.IMPORTERS,
        more: str = "",
    ) -> str:
        number = next(_numbers)
        name = name or f"importer-{number}"
        site, module = tmp_path / f"site-{number}", f"acme_importers_{number}"
        write_distribution(
            site,
            module,
            code.replace("NAME", name),
            plugins=[name],
            distribution=distribution,
            version=f"1.{number}",
            group=group,
        )
        if more:  # a second entry point of the same module, in another group
            (points,) = site.rglob("entry_points.txt")
            points.write_text(f"{points.read_text()}[{more}]\n{name} = {module}\n")
        monkeypatch.syspath_prepend(str(site))
        return name

    return install


def find(name: str) -> list[plugins.InstalledPlugin]:
    return [plugin for plugin in plugins.installed() if plugin.name == name]


def test_an_importer_is_found_by_its_name_in_its_own_group(install: Install) -> None:
    name = install()
    assert plugins.importer(name).which == "importer"
    assert plugins.importer(f"acme-import:{name}") is plugins.importer(name)
    assert name in plugins.names(hookspecs.IMPORTERS)
    assert name not in plugins.names()
    (found,) = find(name)
    assert (found.kinds, found.error, found.type) == (("importer",), None, name)


def test_an_importer_and_a_backend_may_have_one_name(install: Install) -> None:
    name = install(CODE + BACKENDS, more=hookspecs.PROJECT)
    assert plugins.importer(name).which == "importer"
    assert plugins.backend(name).which == "backend"
    assert [plugin.error for plugin in find(name)] == [None, None]


def test_an_importer_may_have_the_name_of_an_own_backend(install: Install) -> None:
    install(name="memory")
    assert plugins.importer("memory").which == "importer"
    assert plugins.backend("memory").__name__ == "MemoryBackend"
    assert {(plugin.kinds, plugin.error, plugin.type) for plugin in find("memory")} == {
        (("backend",), None, "memory"),
        (("importer",), None, "memory"),
    }


def test_embedonce_has_importers_and_backends_of_the_same_name() -> None:
    both = set(plugins.installed_by_embedonce()) & set(plugins.installed_by_embedonce(hookspecs.IMPORTERS))
    assert {"redis", "postgres"} <= both
    assert "langchain" not in plugins.installed_by_embedonce()


def test_a_misspelled_importer_gets_a_suggestion_and_the_installed_importers() -> None:
    with pytest.raises(PluginError) as caught:
        plugins.importer("langchian")
    listed = ", ".join(plugins.names(hookspecs.IMPORTERS))
    wanted = f'no importer "langchian" is installed; did you mean "langchain"? Installed: {listed}'
    assert str(caught.value) == wanted


def test_an_importer_with_an_entry_point_in_the_group_of_backends_is_a_problem(install: Install) -> None:
    name = install(group=hookspecs.PROJECT)
    with pytest.raises(PluginError, match=f'no importer "{name}" is installed'):
        plugins.importer(name)
    (found,) = find(name)
    assert found.broken
    assert f'importer "{name}" cannot be used: add an entry point {name} = "acme_importers_' in str(found.error)
    assert str(found.error).endswith('to the group "embedonce.importers"')


def test_a_backend_with_an_entry_point_in_the_group_of_importers_is_a_problem(install: Install) -> None:
    name = install(CODE.partition("    @embedonce.hookimpl")[0] + BACKENDS)
    with pytest.raises(PluginError, match=f'"{name}" is not an importer; acme-import 1.* provides backend "{name}"'):
        plugins.importer(name)
    (found,) = find(name)
    assert f'backend "{name}" cannot be used: add an entry point' in str(found.error)


def test_problems_of_an_importer_are_found_without_an_instance(install: Install) -> None:
    code = """
        import embedonce
        class Half:
            def __init__(self, *, verify: int = 1): ...
            def close(self): ...
        @embedonce.hookimpl
        def embedonce_importers():
            return {"NAME": Half}
    """
    (found,) = find(install(code))
    assert found.broken
    assert "Half must define (lookup or scan) and check" in str(found.error)
    assert "must not have an option named verify, because embedonce uses that name in the same table" in str(
        found.error
    )


def test_the_distribution_chooses_between_two_importers_with_one_name(install: Install) -> None:
    name = install(distribution="acme-one")
    install(CODE.replace('"importer"', '"second"'), name=name, distribution="acme-two")
    with pytest.raises(PluginError, match=f'2 distributions provide an importer "{name}"'):
        plugins.importer(name)
    assert plugins.importer(f"acme-two:{name}").which == "second"
    assert all("2 distributions" in str(plugin.error) for plugin in find(name))


def test_an_importer_of_embedonce_cannot_be_replaced(install: Install) -> None:
    install(name="table", distribution="acme-table")
    assert {plugin.type for plugin in find("table")} == {"table", "acme-table:table"}
    assert plugins.importer("acme-table:table").which == "importer"


def test_an_importer_that_is_disabled_or_not_allowed_is_not_loaded(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = install("raise RuntimeError('loaded')")
    with plugins.restrict_plugins([]):
        with pytest.raises(PluginError, match=r'is not allowed: add "acme-import" to the list "allow" in \[plugins\]'):
            plugins.importer(name)
        assert name not in plugins.names(hookspecs.IMPORTERS)
    monkeypatch.setenv(plugins.DISABLE, name)
    with pytest.raises(PluginError, match=f'importer "{name}" of acme-import 1.* is disabled by'):
        plugins.importer(name)


def test_the_options_of_an_importer_are_in_the_schema(install: Install) -> None:
    name = install()
    tables = config.schema()["properties"]["imports"]["items"]["oneOf"]
    (own,) = [table for table in tables if table.get("title") == name]
    assert {"path", "name", "task", "verify", "timeout", "type"} <= set(own["properties"])
    assert name not in json.dumps(config.schema()["properties"]["tiers"])


def test_event_hooks_of_importers_are_listeners(install: Install) -> None:
    hook = "    @embedonce.hookimpl\n    def embedonce_event(event): ...\n"
    name = install(CODE + hook)
    assert len(plugins.listeners([], [name])) == 1
    assert plugins.listeners([]) == []
