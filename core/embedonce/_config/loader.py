"""A document, checked: every table against its options, every problem with its place."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from embedonce._messages import closest, listed, quoted, without_credentials
from embedonce._plugins import entry_points, loading
from embedonce._plugins.options import Option, Refused, list_invalid_parts, options_beside, options_of, read_text
from embedonce.drift import DriftGuard
from embedonce.errors import ConfigError, PluginError, Problem
from embedonce.keys import KeyPolicy
from embedonce.options import BadValue, Doc

from .documents import OVERRIDE, UNUSABLE, Document, Values, is_unicode, overrides, values
from .places import TomlPath
from .resolved import Config, Plugged, Setting, TierConfig
from .secrets import HIDDEN, credentials_in, display, dotted, is_secret, mask, secret_parts, texts_in
from .tables import (
    NOT_IN_PROCESS,
    TIER_NAME,
    CacheTable,
    FallbackTable,
    KeyTable,
    PluginsTable,
    TierTable,
    is_in_process,
)

TABLES = ("cache", "key", "plugins", "provider", "drift", "tiers")


def loaded(document: Document, *, own_provider: bool = False) -> Config:
    """Return what a document configures; with ``own_provider``, without its ``[provider]``, which is not read.

    Raises:
        ConfigError: with everything that is wrong with it, in the order of the file.
    """
    return _Loader(document, own_provider=own_provider).load()


def allowed(document: Document) -> Sequence[str] | None:
    """Return what ``[plugins] allow`` of a document says, whatever else is in it.

    Raises:
        ConfigError: that table is wrong.
    """
    return _Loader(document, own_provider=False).allowed()


@dataclass(slots=True)
class _Table:
    """One table of the configuration while it is read."""

    where: TomlPath
    label: str
    variables: tuple[str, ...]
    """What stands between ``EMBEDONCE__`` and the option in a variable that overrides it."""
    given: Mapping[str, Any]
    options: dict[str, Option] = field(default_factory=dict)
    tables: tuple[str, ...] = ()
    """Names of tables inside it that are read on their own."""
    values: dict[str, Any] = field(default_factory=dict)
    """What is right, by option."""
    resolved: Mapping[str, Any] = field(default_factory=dict)
    """The same, kept as it is when the table is taken apart."""
    secrets: set[str] = field(default_factory=set)

    def variable(self, option: str) -> str:
        """Return the environment variable that overrides an option, without ``EMBEDONCE__``, in small letters."""
        return _form((*self.variables, option))

    @property
    def overridable(self) -> list[str]:
        """The variables that there are; a tier's name cannot be one, since it is what addresses the tier."""
        if "" in self.variables:
            return []
        return [self.variable(name) for name in self.options if (self.where[0], name) != ("tiers", "name")]


class _Loader:
    def __init__(self, document: Document, *, own_provider: bool) -> None:
        self._document = document
        self._own_provider = own_provider
        left_out = ("provider",) if own_provider else ()
        self._values: Values = values({name: item for name, item in document.data.items() if name not in left_out})
        self._problems: list[Problem] = []
        self._tables: list[_Table] = []
        self._variables = {_form(parts): (name, text) for name, parts, text in overrides()}
        self._unread: list[tuple[str, ...]] = []
        """Paths of tables that could not be read: what overrides is in them is not known."""

    def allowed(self) -> Sequence[str] | None:
        allow = self._section("plugins", PluginsTable).get("allow")
        wrong = [problem for where, problem in self._unusable() if where[0] == "plugins"] + self._problems
        if wrong:
            raise ConfigError(wrong)
        return allow

    def load(self) -> Config:
        self._problems += [problem for _, problem in self._unusable()]
        self._check_names()
        cache = self._section("cache", CacheTable)
        written = "plugins" in self._values.data or _form(("plugins", "allow")) in self._variables
        # What cannot be read allows nothing.
        allow = self._section("plugins", PluginsTable).get("allow", () if written else None)
        with entry_points.restrict_plugins(allow):
            key = self._key()
            provider, fallback, fetch_only = self._providers()
            drift = self._drift()
            tiers = self._tiers()
        self._check_variables()
        if self._problems:
            raise ConfigError(sorted(self._problems, key=_in_order))
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
            document=self._document,
            _settings=self._settings,
        )

    # --- problems ---

    def _wrong(self, where: TomlPath, message: str, *, key: bool = False) -> None:
        self._problems.append(self._document.problem(where, message, key=key))

    def _unusable(self) -> Iterable[tuple[TomlPath, Problem]]:
        """Yield each value that nothing can be made of, with what is wrong with it."""
        for where, message in self._values.wrong:
            head, rest = self._split(where)
            name = dotted(rest)
            said = f"{name} in {self._label(head)} {message}" if head else f"{name} {message}"
            yield where, self._document.problem(where, said, key=False)

    def _split(self, where: TomlPath) -> tuple[TomlPath, TomlPath]:
        """Return the path of the table that a value is in, and the rest of its path."""
        depth = 2 if where[:1] == ("tiers",) or where[:2] == ("provider", "fallback") else 1
        depth = min(depth, len(where) - 1)
        return where[:depth], where[depth:]

    def _label(self, where: TomlPath) -> str:
        if len(where) == 2 and isinstance(where[1], int):
            label = self._document.table("tiers", array=True)
            return f"{label} {self._called(where[1])}"
        return self._document.table(*(str(part) for part in where))

    def _called(self, index: int) -> str:
        """Return how a message calls a tier that may have no usable name."""
        tiers = self._values.data["tiers"]
        given = tiers[index] if isinstance(tiers, list) and isinstance(tiers[index], Mapping) else {}
        for key in ("name", "type"):
            if isinstance(given.get(key), str) and ("tiers", index, key) not in self._values.private:
                return quoted(given[key])
        return f"number {index + 1}"

    def _check_names(self) -> None:
        for name, given in self._values.data.items():
            if name in TABLES:
                continue
            home = next((table for table, cls in _OWN.items() if name in options_of(cls)), None)
            meant = closest(name, TABLES)
            what = f"unknown table {self._document.table(name)}" if _is_table(given) else f"unknown key {quoted(name)}"
            if home and not _is_table(given):
                hint = f"; it belongs in {self._document.table(home)}"
            elif meant:
                hint = f"; did you mean {self._document.table(meant, array=meant == 'tiers')}?"
            else:
                hint = f"; there are {listed(self._document.table(t, array=t == 'tiers') for t in TABLES)}"
            self._wrong((name,), what + hint, key=True)

    # --- tables ---

    def _given(self, where: TomlPath, given: Any) -> Mapping[str, Any] | None:
        if isinstance(given, Mapping):
            return given
        if given is not UNUSABLE:
            self._wrong(where, f"{self._label(where)} must be a table")
        return None

    def _section(self, name: str, cls: type[Any]) -> dict[str, Any]:
        given = self._given((name,), self._values.data.get(name, {}))
        if given is None:
            self._unread.append((name,))
            return {}
        table = _Table((name,), self._document.table(name), (name,), given, dict(options_of(cls)))
        self._read(table)
        return table.values

    def _drift(self) -> dict[str, Any] | None:
        """Return the options of the drift guard, or None where neither the table nor a variable asks for one."""
        asked = "drift" in self._values.data or any(name.startswith("drift__") for name in self._variables)
        return self._section("drift", DriftGuard) if asked else None

    def _key(self) -> KeyPolicy:
        given = self._section("key", KeyTable)
        steps = [
            step
            for index, step in enumerate(given.get("normalize", self._written_steps()))
            if self._has_step(step, ("key", "normalize", index))
        ]
        try:
            return KeyPolicy(**{**given, "normalize": steps})
        except ConfigError as error:
            self._wrong_of("key", "secret", str(error))
            return KeyPolicy()

    def _written_steps(self) -> list[Any]:
        """Return the steps of a list in which something is no step at all: the others may be wrong too."""
        table = self._values.data.get("key")
        written = table.get("normalize") if isinstance(table, Mapping) else None
        overridden = _form(("key", "normalize")) in self._variables
        return written if isinstance(written, list) and not overridden else []

    def _has_step(self, step: Any, where: TomlPath) -> bool:
        if not isinstance(step, str):
            return False  # said when the table was read
        try:
            loading.normalizer(step)
        except PluginError as error:
            named = _form(("key", "normalize")) in self._variables or _below(where[:2], self._values.private)
            self._wrong_of("key", "normalize", _unnamed(error, step) if named else str(error), where)
            return False
        return True

    def _wrong_of(self, section: str, option: str, message: str, where: TomlPath | None = None) -> None:
        """Note a problem with one of embedonce's own values, at whatever gave it."""
        variable = self._variables.get(_form((section, option)))
        if variable:
            self._problems.append(Problem(f"{variable[0]}: {message}"))
        else:
            self._wrong(where or (section, option), f"{option} in {self._document.table(section)}: {message}")

    # --- plugins ---

    def _providers(self) -> tuple[Plugged | None, Plugged | None, bool]:
        if self._own_provider:
            self._unread.append(("provider",))
            return None, None, False
        if "provider" not in self._values.data:
            example = f'write one, such as {self._document.table("provider")} type = "ngram"'
            self._problems.append(
                Problem(f"{self._document.table('provider')} is missing; {example}", self._document.shown)
            )
            self._unread.append(("provider",))
            return None, None, False
        given = self._given(("provider",), self._values.data["provider"])
        if given is None:
            self._unread.append(("provider",))
            return None, None, False
        provider = self._provider(("provider",), given, {}, tables=("fallback",))
        if "fallback" not in given:
            return self._plugged(provider), None, False
        inner = self._given(("provider", "fallback"), given["fallback"])
        if inner is None:
            self._unread.append(("provider", "fallback"))
            return self._plugged(provider), None, False
        fallback = self._provider(("provider", "fallback"), inner, options_of(FallbackTable))
        fetch_only = fallback is not None and bool(fallback[0].values.pop("fetch_only", False))
        return self._plugged(provider), self._plugged(fallback), fetch_only

    def _provider(
        self, where: tuple[str, ...], given: Mapping[str, Any], own: Mapping[str, Option], tables: tuple[str, ...] = ()
    ) -> tuple[_Table, str, type[Any]] | None:
        table = _Table(where, self._document.table(*where), where, given, tables=tables)
        return self._plugin(table, loading.provider, {**own})

    def _plugin(self, table: _Table, find: Any, own: Mapping[str, Option]) -> tuple[_Table, str, type[Any]] | None:
        """Read a plugin's table; None where its class, and so its options, are not known."""
        kind = self._type(table)
        if kind is None:
            self._read_own(table, own)
            return None
        try:
            cls: type[Any] = find(kind)
            options = options_beside(cls, own, {"type", *table.tables})
        except PluginError as error:
            named = self._override(table, "type") or _below((*table.where, "type"), self._values.private)
            self._wrong_value(table, "type", _unnamed(error, kind) if named else str(error))
            self._read_own(table, own)
            return None
        table.options = {**table.options, **options}
        self._read(table)
        del table.values["type"]
        return table, kind, cls

    def _read_own(self, table: _Table, own: Mapping[str, Option]) -> None:
        """Check what is embedonce's own in the table of a plugin that is not known."""
        table.options = {**table.options, **own}
        for option in own.values():
            self._value(table, option)
        self._unread.append(table.variables)

    def _type(self, table: _Table) -> str | None:
        example = "ngram" if table.where[0] == "provider" else "memory"
        option = Option("type", Annotated[str, Doc(f'it names a plugin, such as type = "{example}"')])
        table.options = {"type": option}
        value = self._value(table, option)
        return value if isinstance(value, str) else None

    def _plugged(self, found: tuple[_Table, str, type[Any]] | None) -> Plugged | None:
        if found is None:
            return None
        table, kind, cls = found
        return Plugged(
            type=kind,
            cls=cls,
            options=table.values,
            label=table.label,
            path=table.where,
            secrets=frozenset(table.secrets),
        )

    # --- tiers ---

    def _tiers(self) -> list[TierConfig]:
        header = self._document.table("tiers", array=True)
        if "tiers" not in self._values.data:
            message = f"{header} is missing; write at least one, or tiers = [] to store nothing"
            self._problems.append(Problem(message, self._document.shown))
            self._unread.append(("tiers",))
            return []
        given = self._values.data["tiers"]
        if not isinstance(given, list):
            if given is not UNUSABLE:
                self._wrong(("tiers",), f"tiers must be a list of tables: write {header}")
            self._unread.append(("tiers",))
            return []
        taken: dict[str, str] = {}
        tiers = [self._tier(index, item, taken) for index, item in enumerate(given)]
        return [tier for tier in tiers if tier is not None]

    def _tier(self, index: int, item: Any, taken: dict[str, str]) -> TierConfig | None:
        where: TomlPath = ("tiers", index)
        given = self._given(where, item)
        if given is None:
            return None
        name = self._name(where, given, taken)
        label = self._label(where)
        found = self._plugin(_Table(where, label, ("tiers", name or ""), given), loading.backend, options_of(TierTable))
        if found is None or name is None:
            return None
        table, kind, cls = found
        self._check_honoured(table, cls)
        own = {key: table.values.pop(key) for key in options_of(TierTable) if key in table.values}
        return TierConfig(
            type=kind, cls=cls, options=table.values, label=label, path=where, secrets=frozenset(table.secrets),
            **{**own, "name": name},
        )  # fmt: skip

    def _name(self, where: TomlPath, given: Mapping[str, Any], taken: dict[str, str]) -> str | None:
        """Return a tier's name, its type by default, or None where it can have none."""
        key = "name" if given.get("name") is not None else "type"
        name = given.get(key)
        if not isinstance(name, str):
            return None  # what is wrong with it is said when the table is read
        url = without_credentials(name) if "://" in name else None
        name = entry_points.bare(name) if key == "type" else name
        if name == "provider" or not re.fullmatch(TIER_NAME, name):
            wanted = f'a tier\'s name is like "{_slug(url or name)}": a letter a-z, then a-z, 0-9, - and _'
            why = '"provider" is what stands for the provider' if name == "provider" else wanted
            private = (*where, key) in self._values.private
            what = f"what {key} stands for" if private else quoted(url or name)
            self._wrong((*where, key), f"{what} cannot be a tier's name{'' if private else f': {why}'}")
            return None
        form = name.replace("-", "_")  # as in environment variables
        if form in taken:
            message = f'a tier named "{taken[form]}" is there already; give this one another name: name = "{name}2"'
            self._wrong((*where, key), message)
            return None
        taken[form] = name
        return name

    def _check_honoured(self, table: _Table, cls: type[Any]) -> None:
        if not is_in_process(cls):
            return
        for option, why in NOT_IN_PROCESS.items():
            if table.values.get(option) is not None:
                self._wrong_value(table, option, f"the tier cannot honour {why}; leave {option} out", key=True)

    # --- options ---

    def _read(self, table: _Table) -> None:
        """Check a table's keys and values; put those that are right into ``table.values``."""
        self._tables.append(table)
        names = [*table.options, *table.tables]
        for key in table.given:
            if key not in names:
                home = next((name for name, cls in _OWN.items() if key in options_of(cls)), None)
                hint = f"; it belongs in {self._document.table(home)}" if home else _hint(key, names)
                self._wrong((*table.where, key), f"unknown key {quoted(key)} in {table.label}{hint}", key=True)
        for option in table.options.values():
            value = self._value(table, option)
            if value is not UNUSABLE:
                table.values[option.name] = value
        table.resolved = dict(table.values)

    def _value(self, table: _Table, option: Option) -> Any:
        """Return an option's value in its type; UNUSABLE where there is none, or a wrong one."""
        override = self._override(table, option.name)
        if override is not None:
            return self._from_variable(table, option, *override)
        if option.name not in table.given:
            if option.required:
                self._wrong(table.where, f"{quoted(option.name)} is missing in {table.label}{_said(option)}", key=True)
            return UNUSABLE
        return self._from_document(table, option, table.given[option.name])

    def _override(self, table: _Table, option: str) -> tuple[str, str] | None:
        variable = table.variable(option)
        return self._variables.get(variable) if variable in table.overridable else None

    def _from_variable(self, table: _Table, option: Option, variable: str, text: str) -> Any:
        table.secrets.update(secret_parts(text))
        if not is_unicode(text):
            self._problems.append(Problem(f"{variable}: is not valid Unicode"))
            return UNUSABLE
        return self._checked(option, read_text(option, text), variable=variable, table=table)

    def _from_document(self, table: _Table, option: Option, value: Any) -> Any:
        where = (*table.where, option.name)
        if _holds_unusable(value):
            return UNUSABLE
        private = _below(where, self._values.private)
        for text in texts_in(value):
            table.secrets.update(secret_parts(text) if private or is_secret(where[-1:]) else credentials_in(text))
        for place, found in self._values.variables.items():
            if place[: len(where)] == where:
                table.secrets.update(piece for text in found.values() for piece in secret_parts(text))
        if where in self._values.expanded:
            value = read_text(option, value)
        return self._checked(option, value, table=table, hidden=private)

    def _checked(
        self, option: Option, value: Any, *, table: _Table, variable: str | None = None, hidden: bool = False
    ) -> Any:
        hidden = hidden or variable is not None
        try:
            if value == "" and option.is_path:
                raise BadValue('must not be empty; "." is the folder of the configuration')
            return self._placed(option, option.check(value))
        except Refused as refused:
            for wrong in list_invalid_parts(value, refused, hidden=hidden or is_secret((option.name,))):
                where = (*table.where, option.name, *wrong.where)
                name = dotted((option.name, *wrong.where))
                shown = None if hidden or isinstance(wrong.value, dict | list) else display(where, wrong.value)
                what = f"{name} = {shown}" if shown else name
                said = wrong.message + self._from_where((*table.where, option.name))
                self._at(table, where, f"{what} in {table.label}: {said}", wrong.message, variable)
        except (PluginError, ValueError, RuntimeError) as error:
            said = str(error) if isinstance(error, PluginError | BadValue) or not hidden else "is not valid"
            where = (*table.where, option.name)
            self._at(table, where, f"{option.name} in {table.label}: {said}{self._from_where(where)}", said, variable)
        return UNUSABLE

    def _from_where(self, where: TomlPath) -> str:
        """Name the variables that a value is made of; what they hold is not shown."""
        names = [
            name for place, found in self._values.variables.items() if place[: len(where)] == where for name in found
        ]
        return f" (it comes from the environment variable {listed(names)})" if names else ""

    def _at(self, table: _Table, where: TomlPath, message: str, short: str, variable: str | None) -> None:
        if variable is not None:
            self._problems.append(Problem(f"{variable}: {short}"))
        else:
            self._wrong(where, message)

    def _wrong_value(self, table: _Table, option: str, message: str, *, key: bool = False) -> None:
        override = self._override(table, option)
        if override is not None:
            self._problems.append(Problem(f"{override[0]}: {message}"))
        else:
            self._wrong((*table.where, option), f"{option} in {table.label}: {message}", key=key)

    def _placed(self, option: Option, value: Any) -> Any:
        """Return a path as absolute: it is meant from the folder of the file that it is written in."""
        if not option.is_path or not isinstance(value, str | Path):
            return value
        path = self._document.folder / Path(value).expanduser()
        return path if isinstance(value, Path) else str(path)

    # --- variables ---

    def _check_variables(self) -> None:
        known = {name: f"{OVERRIDE}{name.upper()}" for table in self._tables for name in table.overridable}
        unread = tuple(f"{_form(path)}__" for path in self._unread)
        for form, (variable, _) in self._variables.items():
            if form not in known and not form.startswith(unread):
                meant = closest(form, known)
                hint = f"; did you mean {known[meant]}?" if meant else ""
                if form.startswith("tiers__") and form.endswith("__name"):
                    hint = ": a tier's name is what addresses it, and cannot be overridden"
                self._problems.append(Problem(f"the environment variable {variable} overrides nothing{hint}"))

    # --- where values came from ---

    def _settings(self) -> list[Setting]:
        return [setting for table in self._tables for setting in self._settings_of(table)]

    def _settings_of(self, table: _Table) -> Iterable[Setting]:
        for name, option in table.options.items():
            yield self._setting(table, name, option)

    def _setting(self, table: _Table, name: str, option: Option) -> Setting:
        where = (*table.where, name)
        dotted = ".".join((*table.variables, name))
        override = self._override(table, name)
        if override is None and name not in table.given:
            return Setting(dotted, option.default, "default")
        value = table.resolved.get(name)
        from_environment = override is not None or _below(where, self._values.private)
        if is_secret((name,)) or (from_environment and not option.is_closed and any(texts_in(value))):
            value = HIDDEN
        return Setting(dotted, mask(where, value), override[0] if override else self._origin(where))

    def _origin(self, where: TomlPath) -> str:
        place = self._document.place(where, key=True)
        return f"{self._document.shown}:{place.line}" if place else self._document.source


_OWN: Mapping[str, type[Any]] = {
    "cache": CacheTable,
    "key": KeyTable,
    "plugins": PluginsTable,
    "drift": DriftGuard,
}


def _form(parts: Sequence[str]) -> str:
    return "__".join(parts).replace("-", "_").lower()


def _in_order(problem: Problem) -> tuple[bool, int, int]:
    return problem.line is None, problem.line or 0, problem.column or 0


def _is_table(value: Any) -> bool:
    return isinstance(value, Mapping) or (isinstance(value, list) and any(isinstance(item, Mapping) for item in value))


def _hint(key: str, names: Sequence[str]) -> str:
    meant = closest(key, names)
    return f'; did you mean "{meant}"?' if meant else f"; it takes {listed(names)}" if names else "; it takes none"


def _said(option: Option) -> str:
    return f"; {option.doc}" if option.doc else ""


def _unnamed(error: PluginError, name: str) -> str:
    """Return what is said of a plugin without repeating its name: it came out of the environment."""
    return str(error).replace(quoted(name), "of that name")


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9_-]+", "-", name.lower()).strip("-_0123456789") or "memory"


def _below(where: TomlPath, places: Iterable[TomlPath]) -> bool:
    return any(place[: len(where)] == where for place in places)


def _holds_unusable(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_holds_unusable(item) for item in value.values())
    if isinstance(value, list):
        return any(_holds_unusable(item) for item in value)
    return value is UNUSABLE


# --- what messages may show -------------------------------------------------------------------
