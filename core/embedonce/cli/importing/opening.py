"""Make the importer of ``embedonce import`` from its arguments, and turn its errors into messages without secrets."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from embedonce import plugins
from embedonce._config.hints import explain_missing, suggest_key
from embedonce._config.secrets import (
    contains_secret,
    display,
    find_credentials,
    find_invisible,
    find_secrets,
    is_secret,
)
from embedonce._config.tables import ImportTable
from embedonce._messages import quote
from embedonce._plugins.entry_points import find_entry_point
from embedonce._plugins.loading import explain_missing_module, group_of
from embedonce._plugins.options import Option, list_invalid_parts, merge_options, options_of, read_text
from embedonce._plugins.options import Refused as RefusedValue
from embedonce.cli.output import Failed, describe_os_error, escape_controls, say
from embedonce.contracts import deadline
from embedonce.errors import ConfigError, EmbedonceError, PluginError, Problem, SourceError, TierTimeout

if TYPE_CHECKING:
    from embedonce.config import Config
    from embedonce.contracts import Source

T = TypeVar("T")

PATIENCE = 300.0
"""Seconds after which a call of an importer fails. The calls of :meth:`OpenedSource.scan` have this time for a part."""


class OpenedSource:
    """An importer and its source. All calls of the importer go through this object, which translates their errors."""

    def __init__(self, name: str, importer: Any, secrets: Collection[str]) -> None:
        self.importer_name = name
        self.importer = importer
        self._secrets = secrets
        self.source: Source = self.call(lambda: importer.source)

    def call(self, call: Callable[[], T]) -> T:
        """Return the result of a call of the importer.

        Raises:
            Failed: the source cannot be read. The message contains no secret.
            PluginError: a library that the importer needs is not installed.
        """
        with self._translate_errors(), deadline(PATIENCE):
            return call()

    def scan(self) -> Iterator[Any]:
        """Yield the parts of the source. Raises the same errors as :meth:`call`."""
        parts = self.call(lambda: iter(self.importer.scan()))
        end = object()
        try:
            while (part := self.call(lambda: next(parts, end))) is not end:
                yield part
        finally:
            close = getattr(parts, "close", None)
            if close is not None:
                self.call(close)

    def close(self) -> None:
        """Close the importer. An error only leads to a message, because everything has been read already."""
        try:
            self.call(self.importer.close)
        except (Failed, PluginError) as error:
            say(f"note: the source could not be closed: {error}")

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except ModuleNotFoundError as error:
            point = find_entry_point(self.importer_name, group_of("importer"))
            raise PluginError(f"importer {quote(self.importer_name)} {explain_missing_module(point, error)}") from error
        except Exception as error:  # noqa: BLE001  (the client of a store may raise anything)
            hides = contains_secret(error, self._secrets)
            reason = "(message hidden, because it contains a secret)" if hides else describe_source_error(error)
            raise Failed(f"importer {quote(self.importer_name)}: {reason}") from (None if hides else error)


def describe_source_error(error: Exception) -> str:
    """Return an importer's error on one line. The message of an unexpected error may contain a text, so it is left out.

    >>> describe_source_error(KeyError("a text"))
    'the importer failed with an unexpected KeyError'
    """
    if isinstance(error, TierTimeout):
        return f"no answer within {PATIENCE:.0f} s"
    if isinstance(error, SourceError):
        return escape_controls(" ".join(str(error).split()))
    if isinstance(error, OSError):
        return escape_controls(describe_os_error(error))
    kind = type(error).__name__
    if type(error).__module__ == "builtins":
        return f"the importer failed with an unexpected {kind}"
    message = escape_controls(" ".join(str(error).split()))
    return f"{kind}: {message}" if message else kind


# --- from arguments to options ----------------------------------------------------------------


def make_importer(name: str, location: str, given: Sequence[str], loaded: Config) -> OpenedSource:
    """Return the importer ``name`` with its options. Nothing is opened.

    ``location`` is where the store is. ``given`` has the other options as texts of the form ``NAME=VALUE``.

    Raises:
        ConfigError: the options are invalid; the error lists all problems.
        PluginError: there is no such importer, or it cannot be loaded.
    """
    with plugins.restrict_plugins(loaded.allow):
        cls = plugins.importer(name)
        own = options_of(ImportTable)
        options = {key: option for key, option in merge_options(cls, own, {"type"}).items() if key not in own}
        arguments = _Arguments(name, options)
        values = arguments.read(location, given)
        if arguments.problems:
            raise ConfigError([Problem(problem) for problem in arguments.problems])
        try:
            importer = cls(**values)
        except ModuleNotFoundError as error:
            point = find_entry_point(name, group_of("importer"))
            raise PluginError(f"importer {quote(name)} {explain_missing_module(point, error)}") from error
        except Exception as error:  # noqa: BLE001  (the class of a plugin may raise anything)
            problem = _describe_refusal(name, error, arguments.secrets)
            raise ConfigError([Problem(problem)]) from (None if contains_secret(error, arguments.secrets) else error)
        return OpenedSource(name, importer, arguments.secrets)


def _describe_refusal(name: str, error: Exception, secrets: Collection[str]) -> str:
    """Return a message for the error of an importer's constructor."""
    if contains_secret(error, secrets):
        return f"importer {quote(name)} cannot be created (message hidden, because it contains a secret)"
    message = escape_controls(" ".join(str(error).split()))
    if isinstance(error, EmbedonceError | ValueError):
        return f"importer {quote(name)}: {message}"
    return f"importer {quote(name)} cannot be created: {type(error).__name__}: {message}"


class _Arguments:
    """Reads SOURCE and the options of an importer, and collects the problems and the secrets."""

    def __init__(self, name: str, options: Mapping[str, Option]) -> None:
        self._name = name
        self._options = options
        self.problems: list[str] = []
        self.secrets: set[str] = set()

    def read(self, location: str, given: Sequence[str]) -> dict[str, Any]:
        """Return the valid values by option."""
        texts: dict[str, tuple[str, str]] = {}
        place = self._choose_location(location)
        if place is not None:
            texts[place] = "SOURCE", location
        for item in given:
            self._add_option(item, texts)
        values = {}
        for key, (label, text) in texts.items():
            option = self._options[key]
            self.secrets.update(find_secrets(text) if is_secret((key,)) else find_credentials(text))
            try:
                values[key] = self._read_value(option, text, label)
            except _InvalidValue:
                continue
        for key, option in self._options.items():
            if option.required and key not in texts and place is not None:
                self.problems.append(
                    f"--option {key}=VALUE is missing for the importer {quote(self._name)}{explain_missing(option)}"
                )
        return values

    def _choose_location(self, location: str) -> str | None:
        """Return the option that says where the store is, or None if SOURCE cannot be used."""
        if "://" in location and "url" in self._options:
            return "url"
        if "path" in self._options:
            if "://" not in location:
                return "path"
            self.problems.append(
                f"SOURCE must be a path without ://, because the importer {quote(self._name)} reads files"
            )
            return None
        reads_server = "url" in self._options
        self.problems.append(
            f"SOURCE must be a URL with ://, because the importer {quote(self._name)} reads from a server"
            if reads_server
            else f"the importer {quote(self._name)} has neither an option path nor an option url; report this to its "
            "author"
        )
        return None

    def _add_option(self, item: str, texts: dict[str, tuple[str, str]]) -> None:
        key, equals, text = item.partition("=")
        if not equals or not key:
            # The item is not shown, because it may be a secret.
            self.problems.append("--option must have the form NAME=VALUE, such as --option namespace=notes")
        elif key in ("task", "verify"):
            self.problems.append(f"--option {key} is not an option of an importer; use --{key}")
        elif key not in self._options:
            hint = suggest_key(key, list(self._options)).replace("valid keys", "valid options")
            self.problems.append(f"--option {quote(key)}: the importer {quote(self._name)} has no such option{hint}")
        elif key in texts:
            how = "SOURCE sets it already" if texts[key][0] == "SOURCE" else "it is given twice"
            self.problems.append(f"--option {key}: {how}")
        else:
            texts[key] = f"--option {key}", text

    def _read_value(self, option: Option, text: str, label: str) -> Any:
        value = read_text(option, text)
        hidden = is_secret((option.name,))
        problems = [message for _, message in find_invisible((option.name,), value, {})]
        if value == "" and option.is_path:
            problems = ["must not be empty"]
        if not problems:
            try:
                return option.resolve_path(option.check(value), Path.cwd())
            except RefusedValue as refused:
                problems = [
                    f"{'' if hidden or not _is_plain(part.value) else f'{shown}: '}{part.message}"
                    for part in list_invalid_parts(option, value, refused, hidden=hidden)
                    for shown in [display(("option", option.name, *part.where), part.value)]
                ]
            except (PluginError, ValueError, RuntimeError) as error:
                problems = ["is invalid" if hidden else str(error)]
        self.problems += [f"{label}: {problem}" for problem in problems]
        raise _InvalidValue


class _InvalidValue(Exception):
    """A value is invalid. Its problems are in the list already."""


def _is_plain(value: Any) -> bool:
    return not isinstance(value, dict | list)
