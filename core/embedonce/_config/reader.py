"""Read the tables of a document: check keys and values against options, and record every problem with its place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeAlias

from embedonce._messages import find_closest, join_words, quote
from embedonce._plugins.options import Option, Refused, list_invalid_parts, merge_options, options_of, read_text
from embedonce.errors import PluginError, Problem
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
from .hints import explain_missing, hide_name, suggest_key
from .places import TomlPath
from .resolved import ProviderConfig, Setting
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
from .tables import OWN_TABLES, ProviderTable

ARRAYS: Sequence[TomlPath] = (("tiers",), ("imports",), ("serve", "models"), ("serve", "tenants"))
"""Paths of the lists of tables."""


@dataclass(slots=True)
class Table:
    """One table of the configuration, while it is read."""

    where: TomlPath
    label: str
    variables: tuple[str, ...]
    """Names that lead to the table in the names of settings and of override variables, such as ``tiers``, ``redis``."""
    given: Mapping[str, Any]
    is_overridable: bool = True
    """Whether environment variables can override the options of this table."""
    options: dict[str, Option] = field(default_factory=dict)
    tables: tuple[str, ...] = ()
    """Names of inner tables, which are read separately."""
    not_here: Mapping[str, str] = field(default_factory=dict)
    """Keys that users expect in this table although they belong elsewhere, and what to do instead."""
    values: dict[str, Any] = field(default_factory=dict)
    """Valid values by option."""
    resolved: Mapping[str, Any] = field(default_factory=dict)
    """A copy of ``values``. It keeps the values that are later removed from ``values``."""
    secrets: set[str] = field(default_factory=set)

    def override_key(self, option: str) -> str:
        """Return the key under which ``Reader`` keeps the variable that overrides an option."""
        return format_variable((*self.variables, option))

    @property
    def override_keys(self) -> list[str]:
        """Names of the variables that can override options.

        No variable can override a tier's name, because the variables use this name to identify the tier.
        """
        if not self.is_overridable:
            return []
        is_tier = self.where[:1] == ("tiers",)
        return [self.override_key(name) for name in self.options if not (is_tier and name == "name")]


FoundPlugin: TypeAlias = tuple[Table, str, type[Any]]
"""A plugin's table that was read, the plugin's type, and its class."""


class Reader:
    """Reads tables, and keeps the problems, the tables that were read, and the override variables.

    ``left_out`` are names of tables at the top of the document that are not read.
    """

    def __init__(self, document: Document, *, left_out: Sequence[str] = ()) -> None:
        self.document = document
        self.values: Values = expand_values(
            {name: item for name, item in document.data.items() if name not in left_out}
        )
        self.problems: list[Problem] = []
        self.overrides = {format_variable(parts): (name, text) for name, parts, text in list_overrides()}
        """Name and text of each override variable, by its name in the form of :func:`format_variable`."""
        self.unread: list[tuple[str, ...]] = [(name,) for name in left_out]
        """Paths of tables that could not be read. Variables that override options of these tables cannot be checked."""
        self._tables: list[Table] = []

    def is_overridden(self, section: str, option: str) -> bool:
        """Return whether an environment variable overrides an option of one of embedonce's own tables."""
        return format_variable((section, option)) in self.overrides

    # --- problems ---

    def add_problem(self, where: TomlPath, message: str, *, key: bool = False) -> None:
        self.problems.append(self.document.problem(where, message, key=key))

    def list_unusable(self) -> Iterable[tuple[TomlPath, Problem]]:
        """Yield the path and the problem of each value that cannot be used."""
        for where, message in self.values.errors:
            head, rest = self._split_path(where)
            name = format_path(rest) + (f" in {self.format_label(head)}" if head else "")
            yield where, self.document.problem(where, f"{name} {message}", key=False)

    def refuse_remote_code(self) -> None:
        for where in find_remote_code(self.values.data):
            head, rest = self._split_path(where)
            name = f"{format_path(rest)} in {self.format_label(head)}"
            self.add_problem(where, f"{name} runs code from the model's repository, so {ONLY_NAMED}")

    def _split_path(self, where: TomlPath) -> tuple[TomlPath, TomlPath]:
        """Split the path of a value into the path of its table and the rest."""
        depth = 2 if where[:2] == ("provider", "fallback") else 1
        for array in ARRAYS:
            if where[: len(array)] == array:
                depth = len(array) + 1
                if array == ("serve", "models") and where[depth : depth + 1] == ("provider",):
                    depth += 1
        depth = min(depth, len(where) - 1)
        return where[:depth], where[depth:]

    def format_label(self, where: TomlPath) -> str:
        """Return a table's name for messages, such as ``[key]`` or ``[[tiers]] "redis"``."""
        *inside, last = where
        if inside and last == "provider":
            return f"the provider of {self.format_label(tuple(inside))}"
        if isinstance(last, int):
            return f"{self.document.table(*map(str, inside), array=True)} {self._format_item(where)}"
        return self.document.table(*map(str, where))

    def _format_item(self, where: TomlPath) -> str:
        """Return what identifies a table in a list: the first of its name, type and number that can be shown."""
        given: Any = self.values.data
        for step in where:
            given = given[step]
        for key in ("name", "type"):
            name = given.get(key) if isinstance(given, Mapping) else None
            if isinstance(name, str) and (*where, key) not in self.values.private:
                return quote(name)
        return f"number {int(where[-1]) + 1}"

    # --- tables ---

    def require_table(self, where: TomlPath, given: Any) -> Mapping[str, Any] | None:
        if isinstance(given, Mapping):
            return given
        if given is not UNUSABLE:
            self.add_problem(where, f"{self.format_label(where)} must be a table")
        return None

    def read_section(self, name: str, cls: type[Any]) -> dict[str, Any]:
        given = self.require_table((name,), self.values.data.get(name, {}))
        if given is None:
            self.unread.append((name,))
            return {}
        table = Table((name,), self.document.table(name), (name,), given, options=dict(options_of(cls)))
        self.read_table(table)
        return table.values

    def read_top(self, cls: type[Any]) -> dict[str, Any]:
        """Read the keys that are in no table. The tables, and unknown keys, are not looked at."""
        label = self.document.table() if self.document.prefix else "the configuration"
        options = dict(options_of(cls))
        given = {name: item for name, item in self.values.data.items() if name in options}
        table = Table((), label, (), given, options=options)
        self.read_table(table)
        return table.values

    def add_own_problem(self, section: str, option: str, message: str, where: TomlPath | None = None) -> None:
        """Report a problem in an option of embedonce's own tables, at the variable or the line that sets the option."""
        variable = self.overrides.get(format_variable((section, option)))
        if variable:
            self.problems.append(Problem(f"{variable[0]}: {message}"))
        else:
            self.add_problem(where or (section, option), f"{option} in {self.document.table(section)}: {message}")

    def read_plugin(self, table: Table, find: Any, own: Mapping[str, Option]) -> FoundPlugin | None:
        """Read a plugin's table. Return None if the plugin's class or its options cannot be determined."""
        kind = self._read_type(table)
        if kind is None:
            self._read_own_options(table, own)
            return None
        try:
            cls: type[Any] = find(kind)
            options = merge_options(cls, own, {"type", *table.tables})
        except PluginError as error:
            hidden = self._find_override(table, "type") or is_any_inside((*table.where, "type"), self.values.private)
            self.add_option_problem(table, "type", hide_name(error, kind) if hidden else str(error))
            self._read_own_options(table, own)
            return None
        table.options = {**table.options, **options}
        self.read_table(table)
        del table.values["type"]
        return table, kind, cls

    def _read_own_options(self, table: Table, own: Mapping[str, Option]) -> None:
        """Check embedonce's own options in the table of an unknown plugin."""
        table.options = {**table.options, **own}
        for option in own.values():
            self._read_option(table, option)
        self.unread.append(table.variables)

    def _read_type(self, table: Table) -> str | None:
        example = {"tiers": "memory", "imports": "langchain"}.get(str(table.where[0]), "ngram")
        option = Option("type", Annotated[str, Doc(f'name of a plugin, such as type = "{example}"')])
        table.options = {"type": option}
        value = self._read_option(table, option)
        return value if isinstance(value, str) else None

    # --- options ---

    def read_table(self, table: Table) -> None:
        """Check a table's keys and values, and store the valid values in ``table.values``."""
        self._tables.append(table)
        names = [*table.options, *table.tables]
        for key in table.given:
            if key not in names:
                is_own = table.where[0] != "serve"  # a model or a tenant has keys that other tables also have
                home = next((name for name, cls in OWN_TABLES.items() if is_own and key in options_of(cls)), None)
                hint = f"; it belongs in {self.document.table(home)}" if home else suggest_key(key, names)
                hint = f"; {table.not_here[key]}" if key in table.not_here else hint
                self.add_problem((*table.where, key), f"unknown key {quote(key)} in {table.label}{hint}", key=True)
        for option in table.options.values():
            value = self._read_option(table, option)
            if value is not UNUSABLE:
                table.values[option.name] = value
        table.resolved = dict(table.values)

    def _read_option(self, table: Table, option: Option) -> Any:
        """Return an option's value, converted to the option's type, or UNUSABLE if no valid value is given."""
        override = self._find_override(table, option.name)
        if override is not None:
            return self._read_variable(table, option, *override)
        if option.name not in table.given:
            if option.required:
                self.add_problem(
                    table.where, f"{quote(option.name)} is missing in {table.label}{explain_missing(option)}", key=True
                )
            return UNUSABLE
        return self._read_value(table, option, table.given[option.name])

    def _find_override(self, table: Table, option: str) -> tuple[str, str] | None:
        name = table.override_key(option)
        return self.overrides.get(name) if name in table.override_keys else None

    def _read_variable(self, table: Table, option: Option, variable: str, text: str) -> Any:
        table.secrets.update(find_secrets(text))
        if not is_unicode(text):
            self.problems.append(Problem(f"{variable}: the value is not valid Unicode"))
            return UNUSABLE
        return self._check_value(option, read_text(option, text), variable=variable, table=table)

    def _read_value(self, table: Table, option: Option, value: Any) -> Any:
        where = (*table.where, option.name)
        if contains_unusable(value):
            return UNUSABLE
        private = is_any_inside(where, self.values.private)
        for text in find_texts(value):
            table.secrets.update(find_secrets(text) if private or is_secret(where[-1:]) else find_credentials(text))
        for place, found in self.values.variables.items():
            if place[: len(where)] == where:
                table.secrets.update(piece for text in found.values() for piece in find_secrets(text))
        if where in self.values.expanded:
            value = read_text(option, value)
        return self._check_value(option, value, table=table, hidden=private)

    def _check_value(
        self, option: Option, value: Any, *, table: Table, variable: str | None = None, hidden: bool = False
    ) -> Any:
        hidden = hidden or variable is not None
        try:
            if value == "" and option.is_path:
                raise BadValue('must not be empty; write "." for the folder of the configuration')
            invisible = list(find_invisible((option.name,), value, self._list_variables(table, option)))
            for where, message in invisible:
                self.add_value_problem(table, where, None, message, variable)
            if not invisible:
                return option.resolve_path(option.check(value), self.document.folder)
        except Refused as refused:
            for part in list_invalid_parts(option, value, refused, hidden=hidden or is_secret((option.name,))):
                where = (option.name, *part.where)
                can_show = not hidden and not isinstance(part.value, dict | list)
                shown = display((*table.where, *where), part.value) if can_show else None
                self.add_value_problem(table, where, shown, part.message, variable)
        except (PluginError, ValueError, RuntimeError) as error:
            message = str(error) if isinstance(error, PluginError | BadValue) or not hidden else "is invalid"
            self.add_value_problem(table, (option.name,), None, message, variable)
        return UNUSABLE

    def _list_variables(self, table: Table, option: Option) -> dict[TomlPath, dict[str, str]]:
        """Return the environment variables in an option's value, by the path that starts with the option's name."""
        depth, where = len(table.where), (*table.where, option.name)
        return {place[depth:]: found for place, found in self.values.variables.items() if place[: len(where)] == where}

    def add_value_problem(
        self, table: Table, where: TomlPath, shown: str | None, message: str, variable: str | None
    ) -> None:
        """Report that a part of an option's value is invalid.

        If a variable overrides the option, the message names the variable. Otherwise, the message has the part's line.

        ``where`` is the path from the table to the part. ``shown`` is the part's value as text, or None if the message
        must not show the value.
        """
        if variable is not None:
            self.problems.append(Problem(f"{variable}: {message}"))
            return
        name = format_path(where) + (f" = {shown}" if shown else "")
        source = self._describe_variables((*table.where, *where))
        self.add_problem((*table.where, *where), f"{name} in {table.label}: {message}{source}")

    def _describe_variables(self, where: TomlPath) -> str:
        """List the environment variables that the value at ``where`` uses; do not show their values.

        If a text with variables was read as a list, the value is a part of this text.
        """
        found = (
            names
            for place, names in self.values.variables.items()
            if place[: len(where)] == where or where[: len(place)] == place
        )
        names = [name for names in found for name in names]
        return f" (from the environment variable {join_words(names)})" if names else ""

    def add_option_problem(self, table: Table, option: str, message: str, *, key: bool = False) -> None:
        override = self._find_override(table, option)
        if override is not None:
            self.problems.append(Problem(f"{override[0]}: {message}"))
        else:
            self.add_problem((*table.where, option), f"{option} in {table.label}: {message}", key=key)

    # --- variables ---

    def check_variables(self) -> None:
        known = {name: f"{OVERRIDE}{name.upper()}" for table in self._tables for name in table.override_keys}
        unread = tuple(f"{format_variable(path)}__" for path in self.unread)
        for form, (variable, _) in self.overrides.items():
            if form not in known and not form.startswith(unread):
                meant = find_closest(form, known)
                hint = f"; did you mean {known[meant]}?" if meant else ""
                if form.startswith("tiers__") and form.endswith("__name"):
                    hint = ": a tier's name cannot be overridden, because the name identifies the tier"
                if form.startswith(("serve__models", "serve__tenants")):
                    hint = ": models and tenants cannot be overridden; write ${NAME} in their tables instead"
                if form.startswith("imports__"):
                    hint = ": importers cannot be overridden; write ${NAME} in their tables instead"
                self.problems.append(Problem(f"the environment variable {variable} overrides nothing{hint}"))

    # --- settings and their sources ---

    def list_settings(self) -> list[Setting]:
        return [
            self._make_setting(table, name, option) for table in self._tables for name, option in table.options.items()
        ]

    def _make_setting(self, table: Table, name: str, option: Option) -> Setting:
        where = (*table.where, name)
        full_name = ".".join((*table.variables, name))
        override = self._find_override(table, name)
        if override is None and name not in table.given:
            return Setting(full_name, option.default, "default")
        value = table.resolved.get(name)
        from_environment = override is not None or is_any_inside(where, self.values.private)
        if is_secret((name,)) or (from_environment and not option.is_choice and any(find_texts(value))):
            value = HIDDEN
        return Setting(full_name, mask(where, value), override[0] if override else self._format_origin(where))

    def _format_origin(self, where: TomlPath) -> str:
        place = self.document.place(where, key=True)
        return f"{self.document.relative_name}:{place.line}" if place else self.document.source


def format_variable(parts: Sequence[str]) -> str:
    """Return the name of an override variable without ``EMBEDONCE__``, in lowercase and with ``_`` instead of ``-``."""
    return "__".join(parts).replace("-", "_").lower()


def is_any_inside(where: TomlPath, places: Iterable[TomlPath]) -> bool:
    """Return whether any of ``places`` is at or below the path ``where``."""
    return any(place[: len(where)] == where for place in places)


def make_provider_config(found: FoundPlugin | None) -> ProviderConfig | None:
    """Return the configuration of a provider whose table was read; None if the table has no usable type."""
    if found is None:
        return None
    table, kind, cls = found
    own = {name: table.values.pop(name) for name in options_of(ProviderTable) if name in table.values}
    return ProviderConfig(
        type=kind, cls=cls, options=table.values, label=table.label, path=table.where,
        secrets=frozenset(table.secrets), **own,
    )  # fmt: skip
