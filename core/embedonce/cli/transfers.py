"""What ``embedonce copy``, ``embedonce export`` and the import of a bundle share: selection, progress and end."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeAlias, TypeVar

import typer

from embedonce._messages import format_count, join_words
from embedonce.errors import StoreExists, TransferRefused, TransferStopped

from .embedding.reading_options import check_inputs, find_conflict, find_stream
from .file_texts import TextFiles
from .inspect import describe_card
from .options import decode_argument
from .output import FAILED, INTERRUPTED, OK, TERMINATED, Failed, Refused, describe_os_error, emit, say
from .signals import Terminated

if TYPE_CHECKING:
    from embedonce._engine.chain import Tier
    from embedonce.answers import Copied, Exported
    from embedonce.cache import Cache
    from embedonce.config import Config
    from embedonce.keys import SpaceCard

    from .embedding.formats import Format
    from .embedding.progress import Display

R = TypeVar("R")

MOST_NAMED = 5
"""Maximum number of scopes that the end of a command names."""


def _check_scope(value: str | None) -> str | None:
    value = decode_argument(value)
    if value is not None and not re.fullmatch("[0-9a-f]{16}", value):
        raise typer.BadParameter("must be 16 hex digits, as `embedonce stats` shows them")
    return value


def _check_scopes(values: list[str] | None) -> list[str] | None:
    for value in values or ():
        _check_scope(value)
    return values


ScopeOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--scope",
        metavar="SCOPE",
        callback=_check_scope,
        help="Only entries of the scope with this ID, 16 hex digits, as stats shows it.",
    ),
]
ModelOption: TypeAlias = Annotated[
    str | None,
    typer.Option("--model", metavar="MODEL", callback=decode_argument, help="Only entries of this model."),
]
VersionOption: TypeAlias = Annotated[
    str | None,
    typer.Option("--version", metavar="VERSION", callback=decode_argument, help="Only entries of this key version."),
]
NamespaceOption: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--namespace",
        metavar="NAME",
        callback=decode_argument,
        help='Only entries of this namespace; "" is the default namespace.',
    ),
]
TextsOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--texts",
        metavar="PATH",
        help="Only entries of the texts in this file or folder. Can be repeated. A tier that cannot list its keys "
        "(memcached) needs it.",
        show_default=False,
    ),
]
ExceptScopeOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--except-scope",
        metavar="SCOPE",
        callback=_check_scopes,
        help="Leave out the entries of the scope with this ID. Can be repeated.",
        show_default=False,
    ),
]
ExceptTextsOption: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--except-texts",
        metavar="PATH",
        help="Leave out the entries of the texts in this file or folder. Can be repeated.",
        show_default=False,
    ),
]
QuietOption: TypeAlias = Annotated[bool, typer.Option("--quiet", help="Show no progress and no summary.")]


# --- what is selected -------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Selected:
    """The options that say which entries are wanted."""

    scope: str | None
    model: str | None
    version: str | None
    namespace: str | None
    texts: Sequence[str]
    except_scopes: Sequence[str]
    except_texts: Sequence[str]
    field: str | None
    format: Format
    delimiter: str | None
    quote: str | None
    encoding: str | None

    def check(self) -> None:
        """Check the paths of texts.

        Raises:
            Refused: a path does not exist or can be read only once, or options exclude each other.
        """
        paths = [*self.texts, *self.except_texts]
        check_inputs(paths)
        stream = find_stream(paths)
        if stream is not None:
            raise Refused(f"texts cannot be read from {stream}, because they are read several times; use a file")
        if problem := find_conflict(self.format, self.delimiter, self.quote, paths):
            raise Refused(problem)

    def read(self, loaded: Config) -> dict[str, Any]:
        """Return the arguments of ``Cache.copy`` and ``Cache.export``. This reads the texts.

        Raises:
            Failed: a text cannot be read. Nothing must be copied then, because a text to leave out may be missing.
        """
        texts, broken = self._read_texts(self.texts, loaded)
        left_out, more = self._read_texts(self.except_texts, loaded)
        if broken or more:
            raise Failed(
                f"{format_count(broken + more, 'record')} could not be read, as reported above. Nothing was done"
            )
        return {
            "scope": self.scope,
            "model": self.model,
            "version": self.version,
            "namespace": self.namespace,
            "texts": texts if self.texts else None,
            "except_scopes": list(self.except_scopes),
            "except_texts": left_out,
        }

    def _read_texts(self, paths: Sequence[str], loaded: Config) -> tuple[list[str], int]:
        if not paths:
            return [], 0
        files = TextFiles(
            paths=paths,
            field=self.field,
            fields=loaded.embed.fields,
            format=self.format,
            delimiter=self.delimiter,
            quote=self.quote,
            encoding=self.encoding,
            leave_out=[str(loaded.file)] if loaded.file else [],
        )
        return files.read_texts()


def check_lasting_tier(loaded: Config, name: str) -> None:
    """Refuse a tier that keeps its entries in this process, and a name that no tier has.

    Raises:
        Refused: the message lists the tiers that can be named.
    """
    lasting = [tier.name for tier in loaded.tiers if tier.scope != "process"]
    names = join_words(lasting) or "none"
    if name not in {tier.name for tier in loaded.tiers}:
        raise Refused(f"{name!r} is not a tier of the configuration; the tiers are: {names}")
    if name not in lasting:
        raise Refused(
            f"tier {name!r} is in the memory of a process, so this command cannot use its entries; the tiers that "
            f"outlive a process are: {names}"
        )


# --- the progress -----------------------------------------------------------------------------


class TransferDisplay:
    """The ``progress`` of a copy or an export. It shows nothing before the first window is done."""

    def __init__(self, action: str, *, is_shown: bool) -> None:
        self._action = action
        self._is_shown = is_shown
        self._display: Display | None = None
        self.done = 0
        """Number of keys that are done."""

    def __enter__(self) -> TransferDisplay:
        return self

    def __call__(self, done: int, total: int) -> None:
        keys, self.done = done - self.done, done
        if self._display is None:
            from .importing.progress import make_display

            self._display = make_display(self._action, total=total, is_shown=self._is_shown, unit="entries")
            self._display.__enter__()
        self._display.start_window(keys, done)
        self._display.add_results(hits=0, others=keys, failed=0)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._display is not None:
            with suppress(Exception):
                self._display.__exit__(kind, error, trace)


# --- the run and its end ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Ended(Generic[R]):
    """How a copy or an export ended."""

    code: int
    result: R | None
    """The counts; None if it was interrupted or refused."""
    stopped: str | None = None
    """Why it ended early, or None."""


def run_transfer(call: Callable[[], R], secrets: Collection[str], advice: str) -> Ended[R]:
    """Make a copy or an export, and report why it ended early. ``advice`` says what is left then, and what to do.

    Raises:
        Refused: the tiers or the folder cannot be used for this.
    """
    from .opened import describe_tier_error

    try:
        return Ended(OK, call())
    except (TransferRefused, StoreExists) as error:
        raise Refused(str(error)) from error
    except TransferStopped as error:
        reason = describe_tier_error(error, secrets)
        say(f"error: {reason.removesuffix('.')}. {advice}.")
        result: Any = error.result
        return Ended(FAILED, result, reason)
    except OSError as error:
        reason = describe_os_error(error)
        say(f"error: {reason}. {advice}.")
        return Ended(FAILED, None, reason)
    except KeyboardInterrupt as error:
        say(f"interrupted. {advice}.")
        return Ended(TERMINATED if isinstance(error, Terminated) else INTERRUPTED, None, "interrupted")


def copy_entries(
    cache: Cache, loaded: Config, source: str | Tier, target: str, display: TransferDisplay, **options: Any
) -> Ended[Copied]:
    """Copy entries, and report why the copy ended early. The arguments are those of ``Cache.copy``."""
    from .opened import list_secrets

    advice = "What was copied until then is stored. Run the same command again to continue"
    return run_transfer(lambda: cache.copy(source, target, progress=display, **options), list_secrets(loaded), advice)


def describe_copy(copied: Copied, *, dry_run: bool) -> Iterator[str]:
    """Yield the lines of the summary of a copy."""
    if not copied.found:
        yield f"no matching entries in {copied.source}"
        return
    verb = "would be copied" if dry_run else "copied"
    entries = format_count(copied.copied, "entry", "entries")
    yield f"{entries} {verb} from {copied.source} to {copied.target}"
    for count, what in (
        (copied.already_there, f"already in {copied.target}"),
        (copied.expired, "expired"),
        (copied.corrupt, f"damaged in {copied.source}, or not readable with its keys"),
        (copied.too_large, f"too large for {copied.target}"),
    ):
        if count:
            yield f"  {count:,} {what}"


def list_copy_notes(copied: Copied) -> Iterator[str]:
    """Yield what the user should know about a copy."""
    if copied.decrypted and copied.copied:
        yield f"note: {copied.source} is encrypted and {copied.target} is not, so the copies can be read without a key"
    yield from list_unknown_scopes(copied.unknown)
    if copied.unused and copied.unused == copied.scopes.keys():
        held = join_words(describe_scopes(copied.scopes), "and")
        yield f"note: the configuration uses none of these spaces: {held}"


def list_unknown_scopes(unknown: Mapping[str, str]) -> Iterator[str]:
    """Yield a note about the scopes in which texts cannot be found."""
    if unknown:
        scopes = format_count(len(unknown), "scope")
        yield f"note: the texts could not be looked up in {scopes}, because {next(iter(unknown.values()))}"


def describe_scopes(scopes: Mapping[str, SpaceCard | None]) -> list[str]:
    """Return a phrase for each scope, as `embedonce purge` describes it; at most :data:`MOST_NAMED`."""
    phrases = []
    for scope, card in list(scopes.items())[:MOST_NAMED]:
        phrases.append(f"{scope} ({describe_card(card) or 'its space card is missing'})")
    if len(scopes) > MOST_NAMED:
        phrases.append(format_count(len(scopes) - MOST_NAMED, "more scope"))
    return phrases


def emit_result(result: Copied | Exported | None, stopped: str | None, *, dry_run: bool, done: int) -> None:
    """Write the JSON document of a copy or an export. ``done`` is the number of keys that are done."""
    if result is None:
        emit({"dry_run": dry_run, "stopped": stopped, "done": done})
        return
    emit(make_document(result) | {"dry_run": dry_run, "stopped": stopped})


def make_document(result: Copied | Exported) -> dict[str, Any]:
    """Return the counts as values for JSON."""
    document = asdict(result) | {"found": result.found}
    return {name: sorted(value) if isinstance(value, set | frozenset) else value for name, value in document.items()}
