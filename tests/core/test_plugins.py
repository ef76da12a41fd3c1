"""Plugins: how they are found by name, loaded one at a time, and named in errors."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from installed_plugins import write_distribution
from patience import hold_lock

import embedonce
from embedonce import config, hookspecs, plugins
from embedonce._plugins import loading
from embedonce.errors import ConfigError, PluginError
from embedonce.testing import BackendContract, ProviderContract
from embedonce.testing.contracts.support import run_in_fork

STRANGER = Path(__file__).parent.parent / "plugin"

Install = Callable[..., str]

_numbers = itertools.count()


@pytest.fixture(scope="session")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the third-party plugin."""
    site = tmp_path_factory.mktemp("site")
    source = tmp_path_factory.mktemp("source")
    for file in STRANGER.rglob("*"):  # copy the sources, because pip may build in place
        if file.is_file() and "__pycache__" not in file.parts:
            target = source / file.relative_to(STRANGER)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    command += ["--disable-pip-version-check", "--target", str(site), str(source)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=110)
    return site


@pytest.fixture
def with_stranger(stranger: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(stranger))
    return stranger


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return a function that puts a distribution with one plugin on the path, and returns the plugin's name."""

    def install(
        code: str,
        *,
        name: str | None = None,
        distribution: str = "acme",
        metadata: str = "",
        group: str = hookspecs.PROJECT,
    ) -> str:
        number = next(_numbers)
        name = name or f"plugin-{number}"
        site = tmp_path / f"site-{number}"
        write_distribution(
            site,
            f"acme_module_{number}",
            code,
            plugins=[name],
            distribution=distribution,
            version=f"1.{number}",
            metadata=metadata,
            group=group,
        )
        monkeypatch.syspath_prepend(str(site))
        return name

    return install


def error_of(name: str) -> str:
    """Return the message of the error that is raised when the backend ``name`` is loaded."""
    with pytest.raises(PluginError) as caught:
        plugins.backend(name)
    return str(caught.value)


# --- builtin plugins --------------------------------------------------------------------------


def test_builtin_plugins_are_found_like_any_other() -> None:
    assert {"memory", "disk", "ngram"} <= set(plugins.names())
    assert plugins.backend("memory").__name__ == "MemoryBackend"
    assert plugins.provider("ngram").__name__ == "NgramProvider"
    own = {plugin.name: plugin for plugin in plugins.installed() if plugin.distribution == "embedonce"}
    for name, kind in {"disk": "backend", "memory": "backend", "ngram": "provider"}.items():
        assert own[name].kinds == (kind,)
        assert own[name].version == embedonce.__version__
        assert own[name].error is None


def test_only_the_plugin_that_is_asked_for_is_imported() -> None:
    code = """
        import sys
        from embedonce import plugins
        plugins.provider("ngram")
        print(any(name.startswith("embedonce_backends") for name in sys.modules))
    """
    done = subprocess.run(
        [sys.executable, "-c", inspect.cleandoc(code)], check=True, capture_output=True, text=True, timeout=100
    )
    assert done.stdout.strip() == "False"


def test_a_misspelled_name_gets_a_suggestion_and_the_installed_names() -> None:
    listed = ", ".join(plugins.names())
    assert error_of("memroy") == f'no plugin "memroy" is installed; did you mean "memory"? Installed: {listed}'
    assert "pip install" in error_of("zzzzzz")


def test_a_provider_is_not_a_backend() -> None:
    assert error_of("ngram").startswith('"ngram" is not a backend; embedonce ')
    assert error_of("ngram").endswith(' provides provider "ngram"')


def test_own_steps_need_no_plugin() -> None:
    assert plugins.normalizer("strip")(" x ") == "x"
    with pytest.raises(
        PluginError, match=r'no normalisation step "stripp"; did you mean "strip"\? embedonce provides nfc,'
    ):
        plugins.normalizer("stripp")


def test_the_docstring_of_each_hook_is_one_line() -> None:
    assert {hook.__name__ for hook in hookspecs.HOOKS} == {*plugins.HOOKS.values(), "embedonce_event"}
    for hook in hookspecs.HOOKS:
        assert len(inspect.getdoc(hook).splitlines()) == 1  # type: ignore[union-attr]


# --- third-party plugins ----------------------------------------------------------------------


def test_a_strangers_plugin_works_like_ours(with_stranger: Path, tmp_path: Path) -> None:
    assert {"folder", "letters", "unaccented", "compressed"} <= set(plugins.names())
    file = tmp_path / "embedonce.toml"
    file.write_text(
        """
        key.normalize = ["unaccented"]
        provider = { type = "letters", first = 3 }
        tiers = [{ type = "memory" }, { type = "folder", path = "vectors" }]
        """
    )
    from embedonce_folder import letters  # type: ignore[import-not-found]

    letters.seen.clear()
    with embedonce.open(file) as cache:
        assert cache.embed("äbc").tolist() == [1, 1, 1, 1]
        assert cache.fetch(["abc"]).sources == ["memory"]
    assert letters.seen, "its event hook was not called"
    assert (tmp_path / "vectors").is_dir()
    with embedonce.open(file) as cache:
        assert cache.fetch(["abc"]).sources == ["folder"]


def test_a_strangers_plugins_are_listed(with_stranger: Path) -> None:
    found = {plugin.name: plugin for plugin in plugins.installed() if plugin.distribution == "embedonce-folder"}
    assert {name: plugin.kinds for name, plugin in found.items()} == {
        "folder": ("backend",),
        "letters": ("provider",),
        "unaccented": ("normalizer",),
        "compressed": (),
    }
    assert {plugin.version for plugin in found.values()} == {"2.5"}
    assert found["compressed"].error == (
        'plugin "compressed" of embedonce-folder 2.5 needs a_codec_that_nobody_has, which is not installed: '
        "pip install 'embedonce-folder[compressed]'"
    )


def test_a_strangers_options_are_checked_and_in_the_schema(with_stranger: Path) -> None:
    tiers = [{"type": "folder", "paht": "x"}]
    with pytest.raises(ConfigError) as caught:
        config.load({"provider": {"type": "letters", "first": 27}, "tiers": tiers})
    assert [problem.message for problem in caught.value.problems] == [
        "first = 27 in [provider]: must be at most 26",
        'unknown key "paht" in [[tiers]] "folder"; did you mean "path"?',
        '"path" is missing in [[tiers]] "folder"; add it: folder of the files',
    ]
    assert '"Folder of the files."' in json.dumps(config.schema())


def test_the_strangers_backend_is_short() -> None:
    source = (STRANGER / "src/embedonce_folder/folder.py").read_text()
    body = source[source.index("class FolderBackend") : source.index("@hookimpl")]
    assert len([line for line in body.splitlines() if line.strip()]) < 30


# --- broken plugins ---------------------------------------------------------------------------


def test_a_missing_package_is_named_with_the_extra_that_provides_it(install: Install) -> None:
    metadata = 'Provides-Extra: fast\nRequires-Dist: no-such.codec>=2; python_version > "3" and extra == "fast"\n'
    name = install("import no_such_codec.inner", metadata=metadata)
    assert error_of(name).endswith("needs no_such_codec, which is not installed: pip install 'acme[fast]'")


def test_a_missing_package_that_no_extra_provides(install: Install) -> None:
    name = install("import no_such_codec")
    assert error_of(name).endswith("needs the module no_such_codec, which is not installed")


def test_a_missing_module(install: Install, tmp_path: Path) -> None:
    name = install("")
    for file in tmp_path.rglob("acme_module_*.py"):
        file.unlink()
    message = error_of(name)
    assert message.endswith("but does not contain this module; reinstall acme: pip install --force-reinstall acme")


@pytest.mark.parametrize("code", ["raise RuntimeError('boom')", "import sys; sys.exit('boom')", "x ="])
def test_an_error_while_importing(install: Install, code: str) -> None:
    name = install(code)
    message = error_of(name)
    assert message.startswith(f'plugin "{name}" of acme 1.')
    assert "cannot be imported: " in message
    assert "boom" in message or "SyntaxError" in message


BACKEND = """
    import embedonce
    class Backend: ...
    @embedonce.hookimpl
    def embedonce_backends():
        return {BODY}
"""


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("1 / 0", "failed in its hook embedonce_backends: ZeroDivisionError: division by zero"),
        ("[Backend]", ": its hook embedonce_backends must return a dict from names to classes"),
        ("{'x': Backend()}", ": its hook embedonce_backends must return a dict from names to classes"),
        ("{}", "is not a backend; acme 1."),
        ("{'another': Backend}", 'provides backend "another"'),
    ],
)
def test_a_hook_that_returns_the_wrong_thing(install: Install, body: str, wanted: str) -> None:
    assert wanted in error_of(install(BACKEND.replace("{BODY}", body)))


def test_a_hook_that_does_not_exist(install: Install) -> None:
    name = install("import embedonce\n@embedonce.hookimpl\ndef embedonce_backend(): return {}")
    assert error_of(name).endswith("there is no hook embedonce_backend; did you mean embedonce_backends?")


def test_a_hook_with_an_unknown_argument(install: Install) -> None:
    name = install("import embedonce\n@embedonce.hookimpl\ndef embedonce_backends(config): return {}")
    assert "Argument(s) {'config'} are declared in the hookimpl" in error_of(name)


@pytest.mark.parametrize("body", ["exit(0)", "raise ValueError('redis://user:hunter2@host/0 is away')"])
def test_a_hook_that_exits_the_program_or_reveals_a_password(install: Install, body: str) -> None:
    message = error_of(install(f"import embedonce\n@embedonce.hookimpl\ndef embedonce_backends(): {body}"))
    assert "failed in its hook embedonce_backends" in message
    assert "hunter2" not in message


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("{}", "it provides nothing"),
        (
            "{'another': Backend}",
            'its entry point is named "one", but it provides no plugin with this name; it provides backend "another"',
        ),
        ("{'NAME': Backend, 'more': Backend}", 'backend "more" cannot be used: add an entry point more = "acme_'),
    ],
)
def test_a_registered_name_without_an_entry_point_is_a_problem(install: Install, body: str, wanted: str) -> None:
    name = install(BACKEND.replace("{BODY}", body).replace("NAME", "one"), name="one")
    (found,) = [one for one in plugins.installed() if one.name == name]
    assert found.broken
    assert wanted in str(found.error)


def test_an_entry_point_without_a_name_breaks_nothing(install: Install) -> None:
    install(BACKEND.replace("{BODY}", "{}"), name="")
    assert "memory" in [one.name for one in plugins.installed()]


def test_a_constructor_that_exits_the_program_is_a_problem_at_its_table(install: Install) -> None:
    methods = "def get_many(self, keys): ...\n        def set_many(self, items, ttl): ...\n        def close(self): ..."
    code = BACKEND.replace(
        "class Backend: ...", f"class Backend:\n        def __init__(self): exit(3)\n        {methods}"
    )
    name = install(code.replace("{BODY}", "{'ends': Backend}"), name="ends")
    with pytest.raises(ConfigError, match="cannot be created: SystemExit: 3"):
        embedonce.open({"provider": {"type": "ngram"}, "tiers": [{"type": name}]})


@pytest.mark.parametrize(
    "table", [{"type": "redis://user:hunter2@host"}, {"type": "memory", "name": "redis://u:hunter2@h"}]
)
def test_a_url_given_as_a_name_does_not_reveal_its_password(table: dict[str, str]) -> None:
    with pytest.raises(ConfigError) as caught:
        embedonce.open({"provider": {"type": "ngram"}, "tiers": [table]})
    assert "hunter2" not in str(caught.value)


def test_the_error_names_a_disabled_builtin_plugin_even_if_another_has_its_name(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(BACKEND.replace("{BODY}", "{'memory': Backend}"), name="memory")
    monkeypatch.setenv("EMBEDONCE_DISABLE_PLUGINS", "memory")
    assert error_of("memory").startswith('plugin "memory" of embedonce ')


def test_a_module_without_hooks(install: Install) -> None:
    assert "the module has no hooks; mark functions named embedonce_backends, embedonce_providers" in error_of(
        install("x = 1")
    )


@pytest.mark.parametrize(
    ("api", "upgrade"), [("2", "pip install --upgrade embedonce"), ("0", "pip install --upgrade acme")]
)
def test_a_plugin_for_another_contract(install: Install, api: str, upgrade: str) -> None:
    message = error_of(install(f"api = {api}"))
    assert f"is written for version {api} of the plugin contract, but this embedonce supports version 1" in message
    assert message.endswith(upgrade)


def test_a_plugin_that_only_needs_an_extra_is_not_broken(with_stranger: Path, install: Install) -> None:
    broken, older = install("raise RuntimeError()", distribution="acme_a"), install("api = 0", distribution="acme_b")
    found = {plugin.name: plugin for plugin in plugins.installed()}
    assert found[broken].broken
    assert found[older].broken
    assert not found["compressed"].broken, "a plugin that only needs an extra is not broken"
    assert not found["folder"].broken


def test_two_distributions_with_one_name(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"twice-{next(_numbers)}"
    code = BACKEND.replace("{BODY}", f"{{'{name}': Backend}}")
    install(code, name=name, distribution="acme-one")
    install(code, name=name, distribution="acme_two")
    message = error_of(name)
    assert f'2 distributions provide a plugin "{name}": ' in message
    assert "acme-one 1." in message
    assert "acme_two 1." in message
    assert len([plugin for plugin in plugins.installed() if plugin.name == name and plugin.error]) == 2
    monkeypatch.setenv(plugins.DISABLE, "nothing, ACME.Two")
    assert plugins.backend(name).__name__ == "Backend"


def test_the_distribution_chooses_between_two_plugins_with_one_name(install: Install) -> None:
    name = f"twice-{next(_numbers)}"
    code = BACKEND.replace("{BODY}", f"{{'{name}': Backend}}")
    install(code.replace("class Backend: ...", "class Backend: which = 1"), name=name, distribution="acme-one")
    install(code.replace("class Backend: ...", "class Backend: which = 2"), name=name, distribution="acme_two")
    assert error_of(name).endswith(f'choose one by writing "acme_two:{name}" or "acme-one:{name}"')
    assert [plugins.backend(f"{other}:{name}").which for other in ("ACME-one", "acme.two")] == [1, 2]
    found = {plugin.type for plugin in plugins.installed() if plugin.name == name}
    assert found == {f"acme-one:{name}", f"acme_two:{name}"} <= set(plugins.names())
    assert f'"acme-one:{name}"' in json.dumps(config.schema())


STEP = """
    import embedonce
    @embedonce.hookimpl
    def embedonce_normalizers():
        return {"NAME": lambda text: text + "!"}
    @embedonce.hookimpl
    def embedonce_event(event): ...
"""


def test_a_builtin_name_means_the_builtin_plugin_unless_a_distribution_is_given(
    install: Install, tmp_path: Path
) -> None:
    install(
        """
        import embedonce
        from embedonce_backends.memory import MemoryBackend
        class Stranger(MemoryBackend): ...
        @embedonce.hookimpl
        def embedonce_backends(): return {"memory": Stranger}
        """,
        name="memory",
        distribution="acme-memory",
    )
    assert plugins.backend("memory").__name__ == "MemoryBackend"
    assert plugins.backend("acme-memory:memory").__name__ == "Stranger"
    assert plugins.backend("embedonce:memory").__name__ == "MemoryBackend"
    assert {"memory", "acme-memory:memory"} <= set(plugins.names())
    tiers = [{"type": "memory"}, {"type": "acme-memory:memory", "name": "second"}]
    with embedonce.open({"provider": {"type": "ngram"}, "tiers": tiers}) as cache:
        assert cache.fetch(["a"]).sources == ["provider"]
        assert cache.tiers == ("memory", "second")
    assert not [plugin for plugin in plugins.installed() if plugin.name == "memory" and plugin.error]


def test_a_tier_is_named_without_the_distribution(install: Install) -> None:
    loaded = config.load({"provider": {"type": "embedonce:ngram"}, "tiers": [{"type": "embedonce:memory"}]})
    assert loaded.tiers[0].name == "memory"


def test_the_distribution_chooses_between_two_steps_with_one_name(install: Install) -> None:
    name = f"step{next(_numbers)}"
    install(STEP.replace("NAME", name), name=name, distribution="acme-one")
    install(STEP.replace("NAME", name).replace("!", "?"), name=name, distribution="acme-two")
    key = {"normalize": [f"acme-two:{name}"]}
    with embedonce.open({"provider": {"type": "ngram"}, "key": key, "tiers": []}) as cache:
        assert cache.explain("a").normalized
    assert plugins.normalizer(f"acme-two:{name}")("a") == "a?"


# --- what may be loaded -----------------------------------------------------------------------


def test_what_is_not_allowed_is_not_loaded(install: Install) -> None:
    name = install("raise RuntimeError('loaded')", distribution="acme-loud")
    source: dict[str, Any] = {"plugins": {"allow": []}, "provider": {"type": "ngram"}, "tiers": [{"type": name}]}
    with pytest.raises(ConfigError) as caught:
        config.load(source)
    (problem,) = caught.value.problems
    assert 'is not allowed: add "acme-loud" to the list "allow" in [plugins]' in problem.message
    with plugins.restrict_plugins([]):
        (found,) = [plugin for plugin in plugins.installed() if plugin.name == name]
        assert "is not allowed" in str(found.error)
        assert not found.broken
        assert name not in plugins.names()
    source["tiers"] = [{"type": "memory"}]
    with embedonce.open(source) as cache:
        assert len(cache.embed("embedonce's own are always allowed")) == 256


@pytest.mark.parametrize("written", ["NAME", "acme-fine", "ACME.fine", "acme-fine:NAME"])
def test_what_is_allowed_by_name_or_distribution_is_loaded(install: Install, written: str) -> None:
    name = f"fine-{next(_numbers)}"
    install(STEP.replace("NAME", name), name=name, distribution="acme-fine")
    allow = ["something-else", written.replace("NAME", name)]
    source = {"plugins": {"allow": allow}, "key": {"normalize": [name]}, "provider": {"type": "ngram"}, "tiers": []}
    with embedonce.open(source) as cache:
        assert cache.embed("a").tolist() == cache.embed("a").tolist()


def test_the_allow_list_chooses_between_two_plugins_with_one_name(install: Install) -> None:
    name = f"step{next(_numbers)}"
    install(STEP.replace("NAME", name), name=name, distribution="acme-one")
    install(STEP.replace("NAME", name), name=name, distribution="acme-two")
    source = {"plugins": {"allow": ["acme-two"]}, "key": {"normalize": [name]}, "provider": {"type": "ngram"}}
    with embedonce.open({**source, "tiers": []}) as cache:
        assert cache.embed("a").shape == (256,)


def test_an_invalid_allow_list_allows_nothing(install: Install) -> None:
    name = install("raise RuntimeError('loaded')")
    for allow in (name, [1], "${NOT_SET_ANYWHERE}"):
        source = {"plugins": {"allow": allow}, "provider": {"type": "ngram"}, "tiers": [{"type": name}]}
        with pytest.raises(ConfigError) as caught:
            config.load(source)
        assert "loaded" not in str(caught.value)
        with pytest.raises(ConfigError, match="allow"):
            config.read_allow_list(source)


def test_the_allow_list_is_read_despite_other_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.read_allow_list({"plugins": {"allow": ["acme"]}, "tiers": 3}) == ["acme"]
    assert config.read_allow_list({"provider": {}}) is None
    monkeypatch.setenv("EMBEDONCE__PLUGINS__ALLOW", "one,two")
    assert config.read_allow_list({}) == ["one", "two"]


def test_a_disabled_plugin_is_not_loaded(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    name = install("raise RuntimeError('loaded')")
    monkeypatch.setenv(plugins.DISABLE, name)
    assert name not in plugins.names()
    assert error_of(name).endswith(f"is disabled by EMBEDONCE_DISABLE_PLUGINS={name}")
    assert [plugin.kinds for plugin in plugins.installed() if plugin.name == name] == [()]


def test_a_broken_plugin_breaks_nothing_that_does_not_use_it(install: Install) -> None:
    name = install("raise RuntimeError('boom')")
    with embedonce.open({"provider": {"type": "ngram"}, "tiers": [{"type": "memory"}]}) as cache:
        assert len(cache.embed_batch(["a", "b"])) == 2
    broken = [plugin for plugin in plugins.installed() if plugin.name == name]
    assert "RuntimeError: boom" in str(broken[0].error)
    assert broken[0].distribution == "acme"
    assert name not in json.dumps(config.schema())
    with pytest.raises(ConfigError, match=r"RuntimeError: boom"):
        config.load({"provider": {"type": "ngram"}, "tiers": [{"type": name, "anything": 1}]})


def test_a_plugin_that_is_installed_while_the_program_runs(install: Install) -> None:
    name = f"late-{next(_numbers)}"
    assert "is installed" in error_of(name)
    install(BACKEND.replace("{BODY}", f"{{'{name}': Backend}}"), name=name)
    assert plugins.backend(name).__name__ == "Backend"


def test_one_module_may_provide_several_names(install: Install, tmp_path: Path) -> None:
    name = install(BACKEND.replace("{BODY}", "{'first-name': Backend, 'second-name': Backend}"), name="first-name")
    points = next(tmp_path.rglob("entry_points.txt"))
    points.write_text(points.read_text() + points.read_text().splitlines()[1].replace("first", "second") + "\n")
    assert plugins.backend(name) is plugins.backend("second-name")


@pytest.mark.parametrize(
    ("init", "wanted"),
    [
        ("def __init__(self, client): ...", 'its parameter "client" must be keyword-only'),
        (
            "def __init__(self, *, ttl: int = 1): ...",
            "must not have an option named ttl, because embedonce uses that name in the same table",
        ),
        ("def __init__(self, *, x: 'Nope' = 1): ...", "options cannot be read: name 'Nope' is not defined"),
    ],
)
def test_options_that_toml_cannot_set(install: Install, init: str, wanted: str) -> None:
    name = f"odd-{next(_numbers)}"
    code = BACKEND.replace("{BODY}", f"{{'{name}': Backend}}").replace(
        "class Backend: ...", f"class Backend:\n        {init}"
    )
    install(code, name=name)
    with pytest.raises(ConfigError) as caught:
        config.load({"provider": {"type": "ngram"}, "tiers": [{"type": name}]})
    assert wanted in str(caught.value)
    assert name not in json.dumps(config.schema())


def test_a_folder_that_was_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.entry_points", lambda **_: ())
    monkeypatch.syspath_prepend("/nowhere")
    assert "even its own plugins are found; run this in the source folder: pip install -e ." in error_of("memory")
    assert plugins.installed() == []


# --- the third-party plugin passes the contract tests -----------------------------------------


def from_its_folder(module: str) -> ModuleType:
    """Import a module of the third-party plugin from its source folder."""
    spec = importlib.util.spec_from_file_location(f"stranger_{module}", STRANGER / f"src/embedonce_folder/{module}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


class TestTheStrangersBackend(BackendContract):
    examples = 20
    module = from_its_folder("folder")
    root: Path

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def folders(cls, tmp_path_factory: pytest.TempPathFactory) -> None:
        cls.root = tmp_path_factory.mktemp("folders")

    def make(self) -> Any:
        return self.module.FolderBackend(path=self.root / str(next(_numbers)))

    def reopen(self, backend: Any) -> Any:
        return self.module.FolderBackend(path=backend._folder)


class TestTheStrangersProvider(ProviderContract):
    texts = ("a word", "a cab", "back", "dad", "ebb")
    module = from_its_folder("letters")

    def make(self) -> Any:
        return self.module.LettersProvider(first=5)


def test_problems_of_a_class_are_found_without_an_instance(install: Install) -> None:
    code = """
import embedonce
class Half:
    def __init__(self, *, ttl: int = 1): ...
    def close(self): ...
class Mute:
    def space(self, task): ...
@embedonce.hookimpl
def embedonce_backends():
    return {"half": Half, "table": dict}
@embedonce.hookimpl
def embedonce_providers():
    return {"mute": Mute}
"""
    name = f"half-{next(_numbers)}"
    install(code, name=name)
    (found,) = [plugin for plugin in plugins.installed() if plugin.name == name]
    error = found.error or ""
    assert "Half must define get_many and set_many" in error
    assert "must not have an option named ttl, because embedonce uses that name in the same table" in error
    assert "builtins.dict must define get_many, set_many and close" in error
    assert "Mute must define (embed or aembed) and close" in error


def test_a_child_that_was_forked_while_a_plugin_is_loaded_loads_it() -> None:
    with hold_lock(loading._lock):
        run_in_fork(
            lambda: config.load({"provider": {"type": "ngram"}, "tiers": [{"type": "memory"}]}), "loading plugins"
        )
