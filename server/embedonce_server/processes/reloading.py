"""Reading the configuration again on SIGHUP."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence

from embedonce.config import Config
from embedonce.errors import ConfigError, EmbedonceError

from .terminal import Terminal

log = logging.getLogger("embedonce.serve")

_NAMES = {
    "allow": "[plugins]",
    "cache": "[cache]",
    "drift": "[drift]",
    "fallback": "[provider.fallback]",
    "key": "[key]",
    "provider": "[provider]",
    "tiers": "[[tiers]]",
}
"""Fields of a configuration that a reload does not apply, and their tables."""
_SERVE_NAMES = ("host", "port", "state_dir")


def check_reach(config: Config, open_addresses: Sequence[str]) -> None:
    """Check that a server which other machines can reach has tenants.

    Raises:
        ConfigError: it has none, so everybody could use it.
    """
    if open_addresses and not config.serve.tenants:
        tenants = config.document.table("serve", "tenants", array=True)
        raise ConfigError(
            f"other machines can connect to {' and '.join(open_addresses)}, but the configuration has no {tenants}, so "
            f"everybody could use the server; add a {tenants} with a key, or listen on 127.0.0.1 (--host, or host in "
            f"{config.document.table('serve')})"
        )


def check_budgets(config: Config) -> None:
    """Check that no tenant has a budget, because the server has no folder that outlives it.

    Raises:
        ConfigError: a tenant has one.
    """
    names = [tenant.name for tenant in config.serve.tenants if tenant.tokens_per_day is not None]
    if names:
        raise ConfigError(
            f'tenant "{names[0]}" has tokens_per_day, but the server was started without a folder for budgets, so they '
            f"would be lost at its end; set state_dir in {config.document.table('serve')}, and restart the server"
        )


class Reloads:
    """Reads the configuration again, and logs what came of it."""

    def __init__(
        self,
        load: Callable[[], Config],
        started: Config,
        open_addresses: Sequence[str],
        *,
        keeps_budgets: bool,
    ) -> None:
        self._load = load
        self._started = started
        self._open_addresses = tuple(open_addresses)
        self._keeps_budgets = keeps_budgets
        self._has_tenants = bool(started.serve.tenants)
        """Whether the settings in use have tenants."""

    async def follow(self, hung_up: asyncio.Event, terminal: Terminal) -> AsyncIterator[Config]:
        """Yield the configuration after each SIGHUP that finds it valid.

        ``hung_up`` is set by each SIGHUP. The iterator ends when SIGHUP means that the terminal was closed.
        """
        while True:
            await hung_up.wait()
            hung_up.clear()
            if terminal.is_closed:
                return
            config = await self.load()
            if config is not None:
                yield config

    async def load(self) -> Config | None:
        """Return the configuration; None if it is invalid. Then the log says why."""
        try:
            config = await asyncio.to_thread(self._load)
            check_reach(config, self._open_addresses)
            if not self._keeps_budgets:
                check_budgets(config)
        except EmbedonceError as error:
            self.report_refusal(error)
            return None
        return config

    def report_refusal(self, error: EmbedonceError) -> None:
        """Log why a configuration cannot be used."""
        for problem in error.problems if isinstance(error, ConfigError) else [error]:
            log.error("%s", problem)
        log.error(
            "the reload failed; the previous settings stay in effect. Correct the configuration and send SIGHUP again"
        )

    def report_success(self, config: Config) -> None:
        """Log that ``[serve]`` is in use, and which other changes are not."""
        tenants = len(config.serve.tenants)
        counts = f"{_count(len(config.serve.models) or 1, 'model')}, {_count(tenants, 'tenant')}"
        log.info("reloaded %s of %s: %s", config.document.table("serve"), config.source, counts)
        if self._has_tenants and not tenants:
            log.warning("the configuration has no tenants any more, so requests need no key")
        self._has_tenants = bool(tenants)
        changed = self.list_ignored_changes(config)
        if changed:
            verb, what = ("has", "the change") if len(changed) == 1 else ("have", "the changes")
            log.warning("%s %s changed; restart the server to apply %s", " and ".join(changed), verb, what)

    def list_ignored_changes(self, config: Config) -> list[str]:
        """Return the names of settings that have changed since the start, and that only a restart applies."""
        names = [name for field, name in _NAMES.items() if getattr(self._started, field) != getattr(config, field)]
        before, now = self._started.serve, config.serve
        return names + [f"{name} in [serve]" for name in _SERVE_NAMES if getattr(before, name) != getattr(now, name)]


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
