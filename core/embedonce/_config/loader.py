"""Check each table of a document against the options of the table, and report every problem with its place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from embedonce._messages import find_closest, join_words, quote, strip_credentials
from embedonce._plugins import entry_points, loading
from embedonce._plugins.options import Option, Refused, list_invalid_parts, merge_options, options_of, read_text
from embedonce.drift import DriftGuard
from embedonce.errors import ConfigError, PluginError, Problem
from embedonce.keys import KeyPolicy
from embedonce.options import BadValue, Doc

from .documents import (
    OVERRIDE,
    UNUSABLE,
    Document,
    Values,
    contains_unusable,
    expand_values,
    is_unicode,
    list_overrides,
)
from .found_files import ONLY_NAMED, find_remote_code
from .hints import format_doc, hide_name, is_table, suggest_key, suggest_tier_name
from .places import TomlPath
from .resolved import Config, ProviderConfig, Setting, TierConfig
from .secrets import (
    HIDDEN,
    display,
    find_credentials,
    find_invisible,
    find_secrets,
    find_texts,
    format_path,
    is_secret,
    mask,
)
from .tables import (
    NOT_IN_PROCESS,
    OWN_TABLES,
    TIER_NAME,
    CacheTable,
    EmbedTable,
    FallbackTable,
    KeyTable,
    PluginsTable,
    ProviderTable,
    TierTable,
    is_in_process,
)

TABLES = ("cache", "key", "plugins", "provider", "drift", "tiers", "embed")


def load_document(document: Document, *, own_provider: bool = False) -> Config:
    """Return the configuration that a document describes. With ``own_provider``, ``[provider]`` is not read.

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


@dataclass(slots=True)
class _Table:
    """One table of the configuration, while it is read."""

    where: TomlPath
    label: str
    variables: tuple[str, ...]
    """Middle parts in the names of this table's override variables, between ``EMBEDONCE__`` and the option's name."""
    given: Mapping[str, Any]
    options: dict[str, Option] = field(default_factory=dict)
    tables: tuple[str, ...] = ()
    """Names of inner tables, which are read separately."""
    values: dict[str, Any] = field(default_factory=dict)
    """Valid values by option."""
    resolved: Mapping[str, Any] = field(default_factory=dict)
    """A copy of ``values``. It keeps the values that are later removed from ``values``."""
    secrets: set[str] = field(default_factory=set)

    def override_key(self, option: str) -> str:
        """Return the key under which ``_Loader`` keeps the variable that overrides an option."""
        return _format_variable((*self.variables, option))

    @property
    def override_keys(self) -> list[str]:
        """Names of the variables that can override options.

        No variable can override a tier's name, because the variables use this name to identify the tier.
        """
        if "" in self.variables:
            return []
        return [self.override_key(name) for name in self.options if (self.where[0], name) != ("tiers", "name")]


class _Loader:
    def __init__(self, document: Document, *, own_provider: bool) -> None:
        self._document = document
        self._own_provider = own_provider
        data = {name: item for name, item in document.data.items() if name != "provider" or not own_provider}
        self._values: Values = expand_values(data)
        self._problems: list[Problem] = []
        self._tables: list[_Table] = []
        self._variables = {_format_variable(parts): (name, text) for name, parts, text in list_overrides()}
        self._unread: list[tuple[str, ...]] = []
        """Paths of tables that could not be read. Variables that override options of these tables cannot be checked."""

    def read_allow_list(self) -> Sequence[str] | None:
        allow = self._read_section("plugins", PluginsTable).get("allow")
        problems = [problem for where, problem in self._list_unusable() if where[0] == "plugins"] + self._problems
        if problems:
            raise ConfigError(problems)
        return allow

    def load(self) -> Config:
        self._problems += [problem for _, problem in self._list_unusable()]
        if self._document.is_found:
            self._refuse_remote_code()
        self._check_names()
        cache = self._read_section("cache", CacheTable)
        is_given = "plugins" in self._values.data or _format_variable(("plugins", "allow")) in self._variables
        # If the list is given but invalid, allow no third-party plugin.
        allow = self._read_section("plugins", PluginsTable).get("allow", () if is_given else None)
        with entry_points.restrict_plugins(allow):
            key = self._read_key()
            provider, fallback, fetch_only = self._read_providers()
            drift = self._read_drift()
            tiers = self._read_tiers()
        embed = self._read_section("embed", EmbedTable)
        self._check_variables()
        if self._problems:
            raise ConfigError(sorted(self._problems, key=_sort_key))
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
            embed=EmbedTable(**embed),
            document=self._document,
            _settings=self._list_settings,
        )

    # --- problems ---

    def _add_problem(self, where: TomlPath, message: str, *, key: bool = False) -> None:
        self._problems.append(self._document.problem(where, message, key=key))

    def _list_unusable(self) -> Iterable[tuple[TomlPath, Problem]]:
        """Yield the path and the problem of each value that cannot be used."""
        for where, message in self._values.errors:
            head, rest = self._split_path(where)
            name = format_path(rest) + (f" in {self._format_label(head)}" if head else "")
            yield where, self._document.problem(where, f"{name} {message}", key=False)

    def _refuse_remote_code(self) -> None:
        for where in find_remote_code(self._values.data):
            head, rest = self._split_path(where)
            name = f"{format_path(rest)} in {self._format_label(head)}"
            self._add_problem(where, f"{name} runs code from the model's repository, so {ONLY_NAMED}")

    def _split_path(self, where: TomlPath) -> tuple[TomlPath, TomlPath]:
        """Split the path of a value into the path of its table and the rest."""
        depth = 2 if where[:1] == ("tiers",) or where[:2] == ("provider", "fallback") else 1
        depth = min(depth, len(where) - 1)
        return where[:depth], where[depth:]

    def _format_label(self, where: TomlPath) -> str:
        if len(where) == 2 and isinstance(where[1], int):
            label = self._document.table("tiers", array=True)
            return f"{label} {self._format_tier(where[1])}"
        return self._document.table(*(str(part) for part in where))

    def _format_tier(self, index: int) -> str:
        """Return a tier's label for messages: the first of name, type and number that can be shown."""
        tiers = self._values.data["tiers"]
        given = tiers[index] if isinstance(tiers, list) and isinstance(tiers[index], Mapping) else {}
        for key in ("name", "type"):
            if isinstance(given.get(key), str) and ("tiers", index, key) not in self._values.private:
                return quote(given[key])
        return f"number {index + 1}"

    def _check_names(self) -> None:
        for name, given in self._values.data.items():
            if name in TABLES:
                continue
            home = next((table for table, cls in OWN_TABLES.items() if name in options_of(cls)), None)
            meant = find_closest(name, TABLES)
            unknown = f"table {self._document.table(name)}" if is_table(given) else f"key {quote(name)}"
            if home and not is_table(given):
                hint = f"; it belongs in {self._document.table(home)}"
            elif meant:
                hint = f"; did you mean {self._document.table(meant, array=meant == 'tiers')}?"
            else:
                hint = f"; valid tables are {join_words(self._document.table(t, array=t == 'tiers') for t in TABLES)}"
            self._add_problem((name,), f"unknown {unknown}{hint}", key=True)

    # --- tables ---

    def _require_table(self, where: TomlPath, given: Any) -> Mapping[str, Any] | None:
        if isinstance(given, Mapping):
            return given
        if given is not UNUSABLE:
            self._add_problem(where, f"{self._format_label(where)} must be a table")
        return None

    def _read_section(self, name: str, cls: type[Any]) -> dict[str, Any]:
        given = self._require_table((name,), self._values.data.get(name, {}))
        if given is None:
            self._unread.append((name,))
            return {}
        table = _Table((name,), self._document.table(name), (name,), given, dict(options_of(cls)))
        self._read_table(table)
        return table.values

    def _read_drift(self) -> dict[str, Any] | None:
        """Return the options of the drift guard, or None if no table and no variable configures the guard."""
        is_configured = "drift" in self._values.data or any(name.startswith("drift__") for name in self._variables)
        return self._read_section("drift", DriftGuard) if is_configured else None

    def _read_key(self) -> KeyPolicy:
        given = self._read_section("key", KeyTable)
        steps = [
            step
            for index, step in enumerate(given.get("normalize", self._list_steps()))
            if self._check_step(step, ("key", "normalize", index))
        ]
        try:
            return KeyPolicy(**{**given, "normalize": steps})
        except ConfigError as error:
            self._add_own_problem("key", "secret", str(error))
            return KeyPolicy()

    def _list_steps(self) -> list[Any]:
        """Return all items of an invalid ``normalize`` list, so that the problem of every invalid item is reported."""
        table = self._values.data.get("key")
        steps = table.get("normalize") if isinstance(table, Mapping) else None
        is_overridden = _format_variable(("key", "normalize")) in self._variables
        return steps if isinstance(steps, list) and not is_overridden else []

    def _check_step(self, step: Any, where: TomlPath) -> bool:
        if not isinstance(step, str):
            return False  # reading the table has already reported the problem
        try:
            loading.normalizer(step)
        except PluginError as error:
            is_overridden = _format_variable(("key", "normalize")) in self._variables
            hidden = is_overridden or _is_any_inside(where[:2], self._values.private)
            self._add_own_problem("key", "normalize", hide_name(error, step) if hidden else str(error), where)
            return False
        return True

    def _add_own_problem(self, section: str, option: str, message: str, where: TomlPath | None = None) -> None:
        """Report a problem in an option of embedonce's own tables, at the variable or the line that sets the option."""
        variable = self._variables.get(_format_variable((section, option)))
        if variable:
            self._problems.append(Problem(f"{variable[0]}: {message}"))
        else:
            self._add_problem(where or (section, option), f"{option} in {self._document.table(section)}: {message}")

    # --- plugins ---

    def _read_providers(self) -> tuple[ProviderConfig | None, ProviderConfig | None, bool]:
        if self._own_provider:
            self._unread.append(("provider",))
            return None, None, False
        if "provider" not in self._values.data:
            example = f'add one, such as {self._document.table("provider")} type = "ngram"'
            self._problems.append(
                Problem(f"{self._document.table('provider')} is missing; {example}", self._document.relative_name)
            )
            self._unread.append(("provider",))
            return None, None, False
        given = self._require_table(("provider",), self._values.data["provider"])
        if given is None:
            self._unread.append(("provider",))
            return None, None, False
        provider = self._read_provider(("provider",), given, options_of(ProviderTable), tables=("fallback",))
        if "fallback" not in given:
            return self._make_provider(provider), None, False
        inner = self._require_table(("provider", "fallback"), given["fallback"])
        if inner is None:
            self._unread.append(("provider", "fallback"))
            return self._make_provider(provider), None, False
        fallback = self._read_provider(("provider", "fallback"), inner, options_of(FallbackTable))
        fetch_only = fallback is not None and bool(fallback[0].values.pop("fetch_only", False))
        return self._make_provider(provider), self._make_provider(fallback), fetch_only

    def _read_provider(
        self, where: tuple[str, ...], given: Mapping[str, Any], own: Mapping[str, Option], tables: tuple[str, ...] = ()
    ) -> tuple[_Table, str, type[Any]] | None:
        table = _Table(where, self._document.table(*where), where, given, tables=tables)
        return self._read_plugin(table, loading.provider, {**own})

    def _read_plugin(self, table: _Table, find: Any, own: Mapping[str, Option]) -> tuple[_Table, str, type[Any]] | None:
        """Read a plugin's table. Return None if the plugin's class or its options cannot be determined."""
        kind = self._read_type(table)
        if kind is None:
            self._read_own_options(table, own)
            return None
        try:
            cls: type[Any] = find(kind)
            options = merge_options(cls, own, {"type", *table.tables})
        except PluginError as error:
            hidden = self._find_override(table, "type") or _is_any_inside((*table.where, "type"), self._values.private)
            self._add_option_problem(table, "type", hide_name(error, kind) if hidden else str(error))
            self._read_own_options(table, own)
            return None
        table.options = {**table.options, **options}
        self._read_table(table)
        del table.values["type"]
        return table, kind, cls

    def _read_own_options(self, table: _Table, own: Mapping[str, Option]) -> None:
        """Check embedonce's own options in the table of an unknown plugin."""
        table.options = {**table.options, **own}
        for option in own.values():
            self._read_option(table, option)
        self._unread.append(table.variables)

    def _read_type(self, table: _Table) -> str | None:
        example = "ngram" if table.where[0] == "provider" else "memory"
        option = Option("type", Annotated[str, Doc(f'set it to the name of a plugin, such as type = "{example}"')])
        table.options = {"type": option}
        value = self._read_option(table, option)
        return value if isinstance(value, str) else None

    def _make_provider(self, found: tuple[_Table, str, type[Any]] | None) -> ProviderConfig | None:
        if found is None:
            return None
        table, kind, cls = found
        price, coalesce = (table.values.pop(name, None) for name in ("price", "coalesce"))
        return ProviderConfig(
            type=kind, cls=cls, options=table.values, label=table.label, path=table.where,
            secrets=frozenset(table.secrets), price=price, coalesce=coalesce,
        )  # fmt: skip

    # --- tiers ---

    def _read_tiers(self) -> list[TierConfig]:
        header = self._document.table("tiers", array=True)
        if "tiers" not in self._values.data:
            message = f"{header} is missing; add at least one tier, or write tiers = [] to store nothing"
            self._problems.append(Problem(message, self._document.relative_name))
            self._unread.append(("tiers",))
            return []
        given = self._values.data["tiers"]
        if not isinstance(given, list):
            if given is not UNUSABLE:
                self._add_problem(("tiers",), f"tiers must be a list of tables: write {header}")
            self._unread.append(("tiers",))
            return []
        used_names: dict[str, str] = {}
        tiers = [self._read_tier(index, item, used_names) for index, item in enumerate(given)]
        return [tier for tier in tiers if tier is not None]

    def _read_tier(self, index: int, item: Any, used_names: dict[str, str]) -> TierConfig | None:
        where: TomlPath = ("tiers", index)
        given = self._require_table(where, item)
        if given is None:
            return None
        name = self._read_tier_name(where, given, used_names)
        label = self._format_label(where)
        table = _Table(where, label, ("tiers", name or ""), given)
        found = self._read_plugin(table, loading.backend, options_of(TierTable))
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
            self._add_problem((*where, key), message)
            return None
        form = name.replace("-", "_")  # override variables have "_" for "-", so "a-b" and "a_b" count as one name
        if form in used_names:
            message = f'another tier is already named "{used_names[form]}"; choose another name: name = "{name}2"'
            self._add_problem((*where, key), message)
            return None
        used_names[form] = name
        return name

    def _check_supported(self, table: _Table, cls: type[Any]) -> None:
        if not is_in_process(cls):
            return
        for option, reason in NOT_IN_PROCESS.items():
            if table.values.get(option) is not None:
                message = f'the tier does not support {reason}; remove "{option}"'
                self._add_option_problem(table, option, message, key=True)

    # --- options ---

    def _read_table(self, table: _Table) -> None:
        """Check a table's keys and values, and store the valid values in ``table.values``."""
        self._tables.append(table)
        names = [*table.options, *table.tables]
        for key in table.given:
            if key not in names:
                home = next((name for name, cls in OWN_TABLES.items() if key in options_of(cls)), None)
                hint = f"; it belongs in {self._document.table(home)}" if home else suggest_key(key, names)
                self._add_problem((*table.where, key), f"unknown key {quote(key)} in {table.label}{hint}", key=True)
        for option in table.options.values():
            value = self._read_option(table, option)
            if value is not UNUSABLE:
                table.values[option.name] = value
        table.resolved = dict(table.values)

    def _read_option(self, table: _Table, option: Option) -> Any:
        """Return an option's value, converted to the option's type, or UNUSABLE if no valid value is given."""
        override = self._find_override(table, option.name)
        if override is not None:
            return self._read_variable(table, option, *override)
        if option.name not in table.given:
            if option.required:
                self._add_problem(
                    table.where, f"{quote(option.name)} is missing in {table.label}{format_doc(option)}", key=True
                )
            return UNUSABLE
        return self._read_value(table, option, table.given[option.name])

    def _find_override(self, table: _Table, option: str) -> tuple[str, str] | None:
        name = table.override_key(option)
        return self._variables.get(name) if name in table.override_keys else None

    def _read_variable(self, table: _Table, option: Option, variable: str, text: str) -> Any:
        table.secrets.update(find_secrets(text))
        if not is_unicode(text):
            self._problems.append(Problem(f"{variable}: the value is not valid Unicode"))
            return UNUSABLE
        return self._check_value(option, read_text(option, text), variable=variable, table=table)

    def _read_value(self, table: _Table, option: Option, value: Any) -> Any:
        where = (*table.where, option.name)
        if contains_unusable(value):
            return UNUSABLE
        private = _is_any_inside(where, self._values.private)
        for text in find_texts(value):
            table.secrets.update(find_secrets(text) if private or is_secret(where[-1:]) else find_credentials(text))
        for place, found in self._values.variables.items():
            if place[: len(where)] == where:
                table.secrets.update(piece for text in found.values() for piece in find_secrets(text))
        if where in self._values.expanded:
            value = read_text(option, value)
        return self._check_value(option, value, table=table, hidden=private)

    def _check_value(
        self, option: Option, value: Any, *, table: _Table, variable: str | None = None, hidden: bool = False
    ) -> Any:
        hidden = hidden or variable is not None
        try:
            if value == "" and option.is_path:
                raise BadValue('must not be empty; write "." for the folder of the configuration')
            invisible = list(find_invisible((option.name,), value, self._list_variables(table, option)))
            for where, message in invisible:
                self._add_value_problem(table, where, None, message, variable)
            if not invisible:
                return option.resolve_path(option.check(value), self._document.folder)
        except Refused as refused:
            for part in list_invalid_parts(value, refused, hidden=hidden or is_secret((option.name,))):
                where = (option.name, *part.where)
                can_show = not hidden and not isinstance(part.value, dict | list)
                shown = display((*table.where, *where), part.value) if can_show else None
                self._add_value_problem(table, where, shown, part.message, variable)
        except (PluginError, ValueError, RuntimeError) as error:
            message = str(error) if isinstance(error, PluginError | BadValue) or not hidden else "is invalid"
            self._add_value_problem(table, (option.name,), None, message, variable)
        return UNUSABLE

    def _list_variables(self, table: _Table, option: Option) -> dict[TomlPath, dict[str, str]]:
        """Return the environment variables in an option's value, by the path that starts with the option's name."""
        depth, where = len(table.where), (*table.where, option.name)
        return {place[depth:]: found for place, found in self._values.variables.items() if place[: len(where)] == where}

    def _add_value_problem(
        self, table: _Table, where: TomlPath, shown: str | None, message: str, variable: str | None
    ) -> None:
        """Report that a part of an option's value is invalid.

        If a variable overrides the option, the message names the variable. Otherwise, the message has the part's line.

        ``where`` is the path from the table to the part. ``shown`` is the part's value as text, or None if the message
        must not show the value.
        """
        if variable is not None:
            self._problems.append(Problem(f"{variable}: {message}"))
            return
        name = format_path(where) + (f" = {shown}" if shown else "")
        source = self._describe_variables((*table.where, where[0]))
        self._add_problem((*table.where, *where), f"{name} in {table.label}: {message}{source}")

    def _describe_variables(self, where: TomlPath) -> str:
        """List the environment variables that the value at ``where`` uses; do not show their values."""
        found = (names for place, names in self._values.variables.items() if place[: len(where)] == where)
        names = [name for names in found for name in names]
        return f" (from the environment variable {join_words(names)})" if names else ""

    def _add_option_problem(self, table: _Table, option: str, message: str, *, key: bool = False) -> None:
        override = self._find_override(table, option)
        if override is not None:
            self._problems.append(Problem(f"{override[0]}: {message}"))
        else:
            self._add_problem((*table.where, option), f"{option} in {table.label}: {message}", key=key)

    # --- variables ---

    def _check_variables(self) -> None:
        known = {name: f"{OVERRIDE}{name.upper()}" for table in self._tables for name in table.override_keys}
        unread = tuple(f"{_format_variable(path)}__" for path in self._unread)
        for form, (variable, _) in self._variables.items():
            if form not in known and not form.startswith(unread):
                meant = find_closest(form, known)
                hint = f"; did you mean {known[meant]}?" if meant else ""
                if form.startswith("tiers__") and form.endswith("__name"):
                    hint = ": a tier's name cannot be overridden, because the name identifies the tier"
                self._problems.append(Problem(f"the environment variable {variable} overrides nothing{hint}"))

    # --- settings and their sources ---

    def _list_settings(self) -> list[Setting]:
        return [
            self._make_setting(table, name, option) for table in self._tables for name, option in table.options.items()
        ]

    def _make_setting(self, table: _Table, name: str, option: Option) -> Setting:
        where = (*table.where, name)
        full_name = ".".join((*table.variables, name))
        override = self._find_override(table, name)
        if override is None and name not in table.given:
            return Setting(full_name, option.default, "default")
        value = table.resolved.get(name)
        from_environment = override is not None or _is_any_inside(where, self._values.private)
        if is_secret((name,)) or (from_environment and not option.is_choice and any(find_texts(value))):
            value = HIDDEN
        return Setting(full_name, mask(where, value), override[0] if override else self._format_origin(where))

    def _format_origin(self, where: TomlPath) -> str:
        place = self._document.place(where, key=True)
        return f"{self._document.relative_name}:{place.line}" if place else self._document.source


def _format_variable(parts: Sequence[str]) -> str:
    """Return the name of an override variable without ``EMBEDONCE__``, in lowercase and with ``_`` instead of ``-``."""
    return "__".join(parts).replace("-", "_").lower()


def _sort_key(problem: Problem) -> tuple[bool, int, int]:
    return problem.line is None, problem.line or 0, problem.column or 0


def _is_any_inside(where: TomlPath, places: Iterable[TomlPath]) -> bool:
    """Return whether any of ``places`` is at or below the path ``where``."""
    return any(place[: len(where)] == where for place in places)
