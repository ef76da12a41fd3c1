"""``embedonce import --from bundle``: copy the entries of a bundle to the tiers.

A bundle has embedonce's own keys, so nothing needs to be proven, and the same code as for ``embedonce copy`` stores
its entries.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import typer

from embedonce import plugins
from embedonce._engine.chain import Tier
from embedonce.cli.opened import list_persistent_tiers, open_for_upkeep
from embedonce.cli.options import given_options
from embedonce.cli.output import FAILED, INTERRUPTED, TERMINATED, Refused, emit, say, write
from embedonce.cli.signals import raise_on_sigterm
from embedonce.cli.transfers import (
    Ended,
    TransferDisplay,
    copy_entries,
    describe_copy,
    list_copy_notes,
    make_document,
)
from embedonce.encryption import Encryption
from embedonce.errors import ConfigError
from embedonce.keys import KEY_PREFIX
from embedonce.store_writers import BUNDLE
from embedonce.vectors import open_frame

if TYPE_CHECKING:
    from embedonce.answers import Copied
    from embedonce.config import Config

ALLOWED: Final = frozenset({"location", "importer", "dry_run", "config", "quiet", "json"})
"""Parameters of ``embedonce import`` that a bundle supports."""
REASONS: Final = {
    "verify": "nothing needs to be verified, because a bundle has the keys that embedonce made for its texts",
    "task": "a bundle says itself for which task each of its entries is",
    "option": "a bundle has no options",
}
MAX_PEEKED: Final = 64
"""Number of entries that show whether a bundle is encrypted."""


def import_bundle(location: str, config: str | None, *, dry_run: bool, quiet: bool, json: bool) -> None:
    """Copy the entries of a bundle to each tier that outlives the process and lacks them.

    Raises:
        Refused: an option is not supported, there is no such bundle, or no tier keeps the entries.
    """
    _check_options()
    with raise_on_sigterm(), open_for_upkeep(config) as (loaded, cache):
        targets = list_persistent_tiers(loaded)
        if not targets:
            raise Refused(
                "no tier that stores entries outlives this process, so the entries would be lost; add a disk tier"
            )
        source, ended, done = _open_bundle(location, loaded), dict[str, "Ended[Copied]"](), 0
        try:
            for target in targets:
                with TransferDisplay(f"importing to {target}", is_shown=not (json or quiet)) as display:
                    ended[target] = copy_entries(cache, loaded, source, target, display, dry_run=dry_run)
                done += display.done
                if ended[target].code in (INTERRUPTED, TERMINATED):
                    break
        finally:
            source.backend.close()
    code = _report(ended, location)
    if json:
        emit(_make_document(ended, location, dry_run=dry_run) | {"done": done})
    elif not quiet:
        for copied in _list_results(ended):
            if copied.found:
                for line in describe_copy(copied, dry_run=dry_run):
                    write(line)
        if dry_run:
            write("nothing was stored")
    if code:
        raise typer.Exit(code)


def _check_options() -> None:
    for name in sorted(given_options.get() - ALLOWED):
        reason = REASONS.get(
            name,
            "all entries of a bundle are imported; to select some, make the bundle a tier and use `embedonce copy`",
        )
        raise Refused(f"--{name.replace('_', '-')} cannot be used with --from {BUNDLE}: {reason}")


def _open_bundle(location: str, loaded: Config) -> Tier:
    """Open a bundle as a tier. An encrypted one is decrypted with the keys of the configuration's tiers.

    Raises:
        Refused: there is no bundle, or no key for it.
    """
    with plugins.restrict_plugins(loaded.allow):
        cls = plugins.backend(BUNDLE)
    try:
        backend = cls(path=Path(location))
    except ConfigError as error:
        raise Refused(f"{error}") from error
    try:
        if not _is_encrypted(backend):
            return Tier(backend)
        keys: list[str] = []
        for tier in loaded.tiers:
            keys += [tier.encryption] if isinstance(tier.encryption, str) else tier.encryption or ()
        if not keys:
            raise Refused(f"{location} is encrypted, and no tier has a key: add encryption to the tiers with its key")
        return Tier(backend, encryption=Encryption(keys))
    except BaseException:
        backend.close()
        raise


def _is_encrypted(backend: Any) -> bool:
    keys = list(islice(backend.scan(KEY_PREFIX), MAX_PEEKED))
    return any(open_frame(value) is not None for value in backend.get_many(keys).values() if isinstance(value, bytes))


def _list_results(ended: dict[str, Ended[Copied]]) -> list[Copied]:
    return [one.result for one in ended.values() if one.result is not None]


def _report(ended: dict[str, Ended[Copied]], location: str) -> int:
    """Report what the user should know, and return the exit code."""
    results = _list_results(ended)
    code = max((one.code for one in ended.values()), default=0)
    for line in dict.fromkeys(line for copied in results for line in list_copy_notes(copied)):
        say(line)
    if not code and not any(copied.found for copied in results):
        say(f"error: {location} has no entries")
        return FAILED
    return code or (FAILED if any(copied.too_large for copied in results) else 0)


def _make_document(ended: dict[str, Ended[Copied]], location: str, *, dry_run: bool) -> dict[str, Any]:
    return {
        "source": location,
        "importer": BUNDLE,
        "dry_run": dry_run,
        "tiers": {
            target: ({} if one.result is None else make_document(one.result)) | {"stopped": one.stopped}
            for target, one in ended.items()
        },
    }
