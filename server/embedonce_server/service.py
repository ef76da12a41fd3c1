"""What one worker process serves: a chain of tiers, and one generation of settings at a time."""

from __future__ import annotations

import asyncio
import logging
import time
from contextlib import suppress
from dataclasses import replace
from typing import Literal, TypeAlias

from embedonce import Cache, ConfigError
from embedonce.config import Config, compose
from embedonce.events import Stats

from .answered import Asked
from .api.answer_memory import AnswerMemory
from .api.encoding import EncodedVectors
from .api.guards import HostGuard
from .api.incoming import BodyMemory
from .api.recent_items import RecentItems
from .counters import Counters
from .failure_log import FailureLog
from .models import Models
from .provider_totals import ProviderTotals
from .run_folder import RunFolder
from .siblings import Siblings
from .tenants.budgets import Budgets
from .tenants.keyring import Keyring
from .tenants.rates import Rates

log = logging.getLogger("embedonce.serve")

State: TypeAlias = Literal["starting", "ready", "draining"]

CLOSE_POLL_SECONDS = 0.05
MAX_RECENT = 8 * 1024 * 1024
"""Maximum size in bytes of each of the two generations of remembered requests."""
MIN_SETTLE_SECONDS = 0.25
"""Minimum number of seconds to wait for calls that reserve tokens of a budget. A reservation that is left counts as if
the call had cost the most that it can cost."""


class Generation:
    """The settings of ``[serve]`` at one time. A reload replaces them as a whole.

    A request keeps the generation with which it began, so a reload does not disturb it.
    """

    def __init__(self, config: Config, base: Cache, totals: ProviderTotals, earlier: Generation | None = None) -> None:
        self.config = config
        self.settings = config.serve
        self.keyring = Keyring(config.serve.tenants, config.serve.admin_key)
        self.hosts = HostGuard(config.serve.allowed_hosts)
        self.models: Models = Models(base, config, totals, None if earlier is None else earlier.models)
        self.recent: RecentItems[tuple[str, bytes], Asked] = RecentItems(MAX_RECENT, _measure)
        """What short requests have asked for, by tenant and body. A body that comes again is not parsed again."""
        self.active = 0
        """Number of requests that use this generation."""
        try:
            _check_models_of_tenants(config, self.models)
        except ConfigError:
            self.models.close(keep=() if earlier is None else earlier.models)
            raise


def _measure(place: tuple[str, bytes], _: Asked) -> int:
    return 2 * len(place[1]) + 1024  # the body, its texts, and the objects around them


def _check_models_of_tenants(config: Config, models: Models) -> None:
    """Check that the models of each tenant are served.

    Raises:
        ConfigError: a model is not served.
    """
    for tenant in config.serve.tenants:
        for name in tenant.models or ():
            if models.find(name) is None:
                served = ", ".join(f'"{known}"' for known in models.names)
                raise ConfigError(f'tenant "{tenant.name}": models names "{name}", but the models are {served}')


class Service:
    """The caches, models, tenants and counters of one worker.

    Raises:
        ConfigError: the configuration cannot be used.
    """

    def __init__(self, config: Config, *, run: RunFolder, worker: int = 1) -> None:
        self.run = run
        self.worker = worker
        self.state: State = "starting"
        self.started = time.time()
        self.providers = ProviderTotals()
        self.siblings = Siblings(run, worker)
        self._started = config
        self.base = compose(self._adapt(config))
        try:
            self.generation = Generation(self._adapt(config), self.base, self.providers)
            self.rates = Rates(run.rates)
            self.budgets = Budgets(run.budgets, worker)
        except BaseException:
            self.base.close()
            raise
        self.encoded = {"float": EncodedVectors("float"), "base64": EncodedVectors("base64")}
        self.counters = Counters()
        self.failures = FailureLog()
        self.bodies = BodyMemory()
        self.answers = AnswerMemory()
        self._retired: dict[asyncio.Task[None], Generation] = {}
        """The earlier generations that requests may still use, by the tasks that close them."""

    def _adapt(self, config: Config) -> Config:
        """Return the configuration as the server can use it.

        ``[provider]`` is that of the start, because only a restart replaces it. A fallback for ``fetch`` alone is left
        out, because its vectors must not be mixed with others, and a client does not see whose vectors it got.
        """
        started = self._started
        fallback = None if started.fallback_fetch_only else started.fallback
        return replace(config, provider=started.provider, fallback=fallback)

    def list_caches(self) -> list[Cache]:
        """Return each cache that owns a provider."""
        generations = [self.generation, *self._retired.values()]
        roots = [root for generation in generations for model in generation.models for root in model.roots]
        return list(dict.fromkeys([*([self.base] if self.generation.config.provider is not None else []), *roots]))

    def stats(self) -> Stats:
        """Return the counters of all caches of this worker."""
        return replace(self.base.stats(), providers=self.providers.read(self.list_caches()))

    def read_gauges(self) -> dict[str, float]:
        """Return what this worker is doing now, without the request that asks for it."""
        return {"requests_in_progress": max(self.count_active() - 1, 0), "body_bytes": self.bodies.bytes}

    def count_active(self) -> int:
        """Return the number of requests under way."""
        return self.generation.active + sum(generation.active for generation in self._retired.values())

    def reload(self, config: Config) -> None:
        """Use the ``[serve]`` of another configuration from now on. Everything else needs a restart.

        Raises:
            ConfigError: the settings cannot be used. Nothing has changed.
        """
        earlier = self.generation
        self.generation = Generation(self._adapt(config), self.base, self.providers, earlier)
        task = asyncio.get_running_loop().create_task(self._retire(earlier))
        self._retired[task] = earlier
        task.add_done_callback(self._retired.pop)

    async def _retire(self, earlier: Generation) -> None:
        """Close the models that are not served any more, once no request uses them."""
        while earlier.active:
            await asyncio.sleep(CLOSE_POLL_SECONDS)
        # Other generations may have taken models over from this one, or this one from them.
        others = [self.generation, *(one for one in self._retired.values() if one is not earlier)]
        await asyncio.to_thread(earlier.models.close, [model for other in others for model in other.models])

    async def close(self, timeout: float) -> None:
        """Write what is queued, for up to ``timeout`` seconds, and close the caches."""
        for task in list(self._retired):
            task.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(max(timeout, MIN_SETTLE_SECONDS)):
                await self.budgets.drain()
        if not await self.base.aflush(max(timeout, 0.0)):
            log.warning("some vectors were not written before the end, so they will be computed again")
        await self.base.aclose()
        self.budgets.close()
        self.rates.close()
