"""Check each table of a document against the options of the table, and report every problem with its place."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from embedonce._messages import find_closest, join_words, quote, strip_credentials
from embedonce._plugins import entry_points, loading
from embedonce._plugins.options import Option, options_of
from embedonce.drift import DriftGuard
from embedonce.errors import ConfigError, PluginError, Problem
from embedonce.keys import KeyPolicy
from embedonce.store_writers import BUNDLE

from .documents import (
    UNUSABLE,
    Document,
)
from .hints import hide_name, is_table, suggest_tier_name
from .places import TomlPath
from .reader import FoundPlugin, Reader, Table, is_any_inside, make_provider_config
from .resolved import Config, ImportConfig, ProviderConfig, ServeConfig, TierConfig
from .serving import has_served_models, read_serve
from .tables import (
    OWN_TABLES,
    TIER_NAME,
    CacheTable,
    EmbedTable,
    FallbackTable,
    ImportTable,
    KeyTable,
    PluginsTable,
    ProviderTable,
    TierTable,
    TopTable,
    find_unsupported,
)

TABLES = ("cache", "key", "plugins", "provider", "drift", "tiers", "imports", "embed", "serve")

ARRAYS_OF_TABLES = ("tiers", "imports")


def load_document(document: Document, *, own_provider: bool = False) -> Config:
    """Return the configuration that a document describes. With ``own_provider``, ``[provider]`` and
    ``[serve]`` are not read.

    Raises:
        ConfigError: the document has problems; the error lists all of them, in the order of the file.
    """
    return _Loader(document, own_provider=own_provider).load()


def read_allow_list(document: Document) -> Sequence[str] | None:
    """Return the list ``allow`` in ``[plugins]``, even if other tables have problems.

    Raises:
        ConfigError: the ``[plugins]`` table has a problem.
    """
    return _Loader(document, own_provider=False).read_allow_list()


def read_bundle(document: Document) -> Path | None:
    """Return the value of ``bundle`` as a path, even if the tables have problems; None if it is not set.

    Raises:
        ConfigError: the value has a problem.
    """
    return _Loader(document, own_provider=False).read_bundle()


class _Loader:
    def __init__(self, document: Document, *, own_provider: bool) -> None:
        self._document = document
        self._own_provider = own_provider
        self._reader = Reader(document, left_out=("provider", "serve") if own_provider else ())
        self._values = self._reader.values

    def read_allow_list(self) -> Sequence[str] | None:
        allow = self._reader.read_section("plugins", PluginsTable).get("allow")
        problems = [
            problem for where, problem in self._reader.list_unusable() if where[0] == "plugins"
        ] + self._reader.problems
        if problems:
            raise ConfigError(problems)
        return allow

    def read_bundle(self) -> Path | None:
        bundle: Path | None = self._reader.read_top(TopTable).get("bundle")
        problems = [
            problem for where, problem in self._reader.list_unusable() if where[0] == "bundle"
        ] + self._reader.problems
        if problems:
            raise ConfigError(problems)
        return bundle

    def load(self) -> Config:
        self._reader.problems += [problem for _, problem in self._reader.list_unusable()]
        if self._document.is_found:
            self._reader.refuse_remote_code()
        self._check_names()
        cache = self._reader.read_section("cache", CacheTable)
        is_given = "plugins" in self._values.data or self._reader.is_overridden("plugins", "allow")
        # If the list is given but invalid, allow no third-party plugin.
        allow = self._reader.read_section("plugins", PluginsTable).get("allow", () if is_given else None)
        with entry_points.restrict_plugins(allow):
            key = self._read_key()
            provider, fallback, fetch_only = self._read_providers()
            drift = self._read_drift()
            tiers = self._read_tiers()
            imports = self._read_imports(has_provider=self._own_provider or "provider" in self._values.data)
            serve = ServeConfig() if self._own_provider else read_serve(self._reader)
        embed = self._reader.read_section("embed", EmbedTable)
        self._reader.read_top(TopTable)
        self._reader.check_variables()
        if self._reader.problems:
            raise ConfigError(sorted(self._reader.problems, key=_sort_key))
        return Config(
            source=self._document.source,
            file=self._document.file,
            cache=CacheTable(**cache),
            key=key,
            allow=allow,
            provider=provider,
            fallback=fallback,
            fallback_fetch_only=fetch_only,
            drift=None if drift is None else DriftGuard(**drift),
            tiers=tuple(tiers),
            imports=tuple(imports),
            embed=EmbedTable(**embed),
            serve=serve,
            document=self._document,
            _settings=self._reader.list_settings,
        )

    def _check_names(self) -> None:
        for name, given in self._values.data.items():
            if name in TABLES or name in options_of(TopTable):
                continue
            home = next((table for table, cls in OWN_TABLES.items() if name in options_of(cls)), None)
            meant = find_closest(name, TABLES)
            unknown = f"table {self._document.table(name)}" if is_table(given) else f"key {quote(name)}"
            if home and not is_table(given):
                hint = f"; it belongs in {self._document.table(home)}"
            elif meant:
                hint = f"; did you mean {self._document.table(meant, array=meant in ARRAYS_OF_TABLES)}?"
            else:
                tables = join_words(self._document.table(t, array=t in ARRAYS_OF_TABLES) for t in TABLES)
                hint = f"; valid tables are {tables}"
            self._reader.add_problem((name,), f"unknown {unknown}{hint}", key=True)

    def _read_drift(self) -> dict[str, Any] | None:
        """Return the options of the drift guard, or None if no table and no variable configures the guard."""
        is_configured = "drift" in self._values.data or any(
            name.startswith("drift__") for name in self._reader.overrides
        )
        return self._reader.read_section("drift", DriftGuard) if is_configured else None

    def _read_key(self) -> KeyPolicy:
        given = self._reader.read_section("key", KeyTable)
        steps = [
            step
            for index, step in enumerate(given.get("normalize", self._list_steps()))
            if self._check_step(step, ("key", "normalize", index))
        ]
        try:
            return KeyPolicy(**{**given, "normalize": steps})
        except ConfigError as error:
            self._reader.add_own_problem("key", "secret", str(error))
            return KeyPolicy()

    def _list_steps(self) -> list[Any]:
        """Return all items of an invalid ``normalize`` list, so that the problem of every invalid item is reported."""
        table = self._values.data.get("key")
        steps = table.get("normalize") if isinstance(table, Mapping) else None
        is_overridden = self._reader.is_overridden("key", "normalize")
        return steps if isinstance(steps, list) and not is_overridden else []

    def _check_step(self, step: Any, where: TomlPath) -> bool:
        if not isinstance(step, str):
            return False  # reading the table has already reported the problem
        try:
            loading.normalizer(step)
        except PluginError as error:
            is_overridden = self._reader.is_overridden("key", "normalize")
            hidden = is_overridden or is_any_inside(where[:2], self._values.private)
            self._reader.add_own_problem("key", "normalize", hide_name(error, step) if hidden else str(error), where)
            return False
        return True

    # --- plugins ---

    def _read_providers(self) -> tuple[ProviderConfig | None, ProviderConfig | None, bool]:
        if self._own_provider:
            return None, None, False
        if "provider" not in self._values.data:
            if has_served_models(self._reader):
                return None, None, False
            example = f'add one, such as {self._document.table("provider")} type = "ngram"'
            self._reader.problems.append(
                Problem(
                    f"{self._document.table('provider')} is missing; {example}",
                    self._document.relative_name,
                )
            )
            self._reader.unread.append(("provider",))
            return None, None, False
        given = self._reader.require_table(("provider",), self._values.data["provider"])
        if given is None:
            self._reader.unread.append(("provider",))
            return None, None, False
        provider = self._read_provider(("provider",), given, options_of(ProviderTable), tables=("fallback",))
        if "fallback" not in given:
            return make_provider_config(provider), None, False
        inner = self._reader.require_table(("provider", "fallback"), given["fallback"])
        if inner is None:
            self._reader.unread.append(("provider", "fallback"))
            return make_provider_config(provider), None, False
        fallback = self._read_provider(("provider", "fallback"), inner, options_of(FallbackTable))
        fetch_only = fallback is not None and bool(fallback[0].values.pop("fetch_only", False))
        return make_provider_config(provider), make_provider_config(fallback), fetch_only

    def _read_provider(
        self, where: tuple[str, ...], given: Mapping[str, Any], own: Mapping[str, Option], tables: tuple[str, ...] = ()
    ) -> FoundPlugin | None:
        table = Table(where, self._document.table(*where), where, given, tables=tables)
        return self._reader.read_plugin(table, loading.provider, {**own})

    # --- tiers ---

    def _read_tiers(self) -> list[TierConfig]:
        header = self._document.table("tiers", array=True)
        if "tiers" not in self._values.data:
            message = f"{header} is missing; add at least one tier, or write tiers = [] to store nothing"
            self._reader.problems.append(Problem(message, self._document.relative_name))
            self._reader.unread.append(("tiers",))
            return []
        given = self._values.data["tiers"]
        if not isinstance(given, list):
            if given is not UNUSABLE:
                self._reader.add_problem(("tiers",), f"tiers must be a list of tables: write {header}")
            self._reader.unread.append(("tiers",))
            return []
        used_names: dict[str, str] = {}
        tiers = [self._read_tier(index, item, used_names) for index, item in enumerate(given)]
        return [tier for tier in tiers if tier is not None]

    def _read_tier(self, index: int, item: Any, used_names: dict[str, str]) -> TierConfig | None:
        where: TomlPath = ("tiers", index)
        given = self._reader.require_table(where, item)
        if given is None:
            return None
        name = self._read_tier_name(where, given, used_names)
        label = self._reader.format_label(where)
        table = Table(where, label, ("tiers", name or ""), given, is_overridable=name is not None)
        found = self._reader.read_plugin(table, loading.backend, options_of(TierTable))
        if found is None or name is None:
            return None
        _, kind, cls = found
        self._check_supported(table, cls)
        own = {key: table.values.pop(key) for key in options_of(TierTable) if key in table.values}
        return TierConfig(
            type=kind, cls=cls, options=table.values, label=label, path=where, secrets=frozenset(table.secrets),
            **{**own, "name": name},
        )  # fmt: skip

    def _read_tier_name(self, where: TomlPath, given: Mapping[str, Any], used_names: dict[str, str]) -> str | None:
        """Return a tier's name. The default name is the tier's type. Return None if the name is invalid."""
        key = "name" if given.get("name") is not None else "type"
        name = given.get(key)
        if not isinstance(name, str):
            return None  # reading the table will report the problem
        url = strip_credentials(name) if "://" in name else None
        name = entry_points.strip_distribution(name) if key == "type" else name
        if name == "provider" or not re.fullmatch(TIER_NAME, name):
            rule = "it must start with a letter a-z and contain only a-z, 0-9, - and _; for example:"
            reason = f'{rule} "{suggest_tier_name(url or name)}"'
            if name == "provider":
                reason = "it is reserved for the provider"
            message = f"{quote(url or name)} is not a valid tier name: {reason}"
            if (*where, key) in self._values.private:
                message = f"the value of {key} is not a valid tier name"
            self._reader.add_problem((*where, key), message)
            return None
        form = name.replace("-", "_")  # override variables have "_" for "-", so "a-b" and "a_b" count as one name
        if form in used_names:
            message = f'another tier is already named "{used_names[form]}"; choose another name: name = "{name}2"'
            self._reader.add_problem((*where, key), message)
            return None
        used_names[form] = name
        return name

    def _check_supported(self, table: Table, cls: type[Any]) -> None:
        for option, reason in find_unsupported(cls).items():
            if table.values.get(option) is not None:
                message = f'the tier does not support {reason}; remove "{option}"'
                self._reader.add_option_problem(table, option, message, key=True)

    # --- importers ---

    def _read_imports(self, *, has_provider: bool) -> list[ImportConfig]:
        given = self._values.data.get("imports", [])
        header = self._document.table("imports", array=True)
        if not isinstance(given, list):
            if given is not UNUSABLE:
                self._reader.add_problem(("imports",), f"imports must be a list of tables: write {header}")
            self._reader.unread.append(("imports",))
            return []
        found = [self._read_import(("imports", index), item) for index, item in enumerate(given)]
        imports = [one for one in found if one is not None]
        for one in imports if not has_provider else ():
            if not one.verify:
                message = (
                    f"verify in {one.label}: 0 requires {self._document.table('provider')}, because without it the "
                    "importer is asked for the texts of every model, and only a verification can tell whose vectors "
                    "it has"
                )
                self._reader.add_problem((*one.path, "verify"), message)
        return imports

    def _read_import(self, where: TomlPath, item: Any) -> ImportConfig | None:
        given = self._reader.require_table(where, item)
        if given is None:
            return None
        label = self._reader.format_label(where)
        if given.get("type") == BUNDLE:
            message = (
                f"{label}: a bundle is not asked by an importer, because it has the keys of embedonce; use a tier: "
                f'{self._document.table("tiers", array=True)} type = "{BUNDLE}", path = "FOLDER"'
            )
            self._reader.add_problem((*where, "type"), message)
            return None
        names = ("imports", str(where[1]))
        table = Table(where, label, names, given, is_overridable=False)
        found = self._reader.read_plugin(table, loading.importer, options_of(ImportTable))
        if found is None:
            return None
        _, kind, cls = found
        own = {key: table.values.pop(key) for key in options_of(ImportTable) if key in table.values}
        return ImportConfig(
            type=kind, cls=cls, options=table.values, label=label, path=where, secrets=frozenset(table.secrets), **own
        )


def _sort_key(problem: Problem) -> tuple[bool, int, int]:
    return problem.line is None, problem.line or 0, problem.column or 0
