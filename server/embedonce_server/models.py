"""The models that the server offers, each with one cache per namespace and per vector space.

All caches have the same tiers. A request with other ``dimensions`` or with forwarded fields belongs to another vector
space, so it gets a provider and a cache of its own.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import orjson

from embedonce import Cache, ConfigError, EmbedonceError, SpaceError, VectorSpace
from embedonce.batch_settings import refuse_batch_settings
from embedonce.config import Config, ProviderConfig, ServedModel, list_options, make_provider
from embedonce.prices import Price

from .api.api_errors import ApiError
from .api.encoding import format_end
from .api.request_body import MAX_SHOWN, show_field
from .provider_totals import ProviderTotals

log = logging.getLogger("embedonce.serve")

MAX_SPACES: Final = 64
"""Number of combinations of ``dimensions``, forwarded fields and kind of input that each model has open. The one used
longest ago is closed when another one is needed; its entries stay in the tiers."""

MAX_FORWARDED: Final = 4096
"""Maximum size of all forwarded fields of a request as JSON, in bytes."""


MAX_DEPTH: Final = 16
"""Maximum depth of objects and lists in a forwarded field."""


class Variation(NamedTuple):
    """What makes the vector space of a request different from that of its model."""

    dimensions: int | None = None
    forwarded: bytes = b""
    """The forwarded fields as canonical JSON."""
    are_tokens: bool = False


PLAIN = Variation()


class Model:
    """One model: its provider, and its caches by variation and namespace."""

    def __init__(
        self,
        base: Cache,
        config: Config,
        name: str,
        provider: ProviderConfig,
        forward: Iterable[str],
        totals: ProviderTotals,
    ) -> None:
        self.name = name
        self._json_name = orjson.dumps(name)
        self.after_hit = format_end(self._json_name, 0)
        """What follows the vector of a hit in an answer."""
        self.created = int(time.time())
        self.forward = frozenset(forward)
        self.provider_config = provider
        self.price = _read_price(provider)
        self.first_tier = next(iter(base.tiers), "")
        fallback = config.fallback if provider is config.provider else None
        self._fallback_price = _read_price(fallback)
        self._base = base
        self._config = config
        self._totals = totals
        self._options = list_options(provider)
        self._plain = base if provider is config.provider else self._open(PLAIN)
        space = self._plain.provider.space("document")
        self.dimensions: int | None = space.dimensions
        self.own_space = (space.provider, space.model)
        """The names of the provider and of the model, which tell its vectors from those of the fallback."""
        self._roots: dict[Variation, Cache] = {PLAIN: self._plain}
        """The cache of each variation, which owns the variation's provider. The one used last is at the end."""
        self._caches: dict[tuple[Variation, str], Cache] = {}
        self._active: Counter[Variation] = Counter()
        """Number of requests that use each variation now."""
        self._useful: set[Variation] = {PLAIN}
        """Variations that have given vectors."""

    def get_json_name(self, space: VectorSpace) -> bytes:
        """Return the name of the model for an answer, as JSON. A fallback answers under the name of its own model."""
        own = (space.provider, space.model) == self.own_space
        return self._json_name if own else orjson.dumps(space.model)

    def get_price(self, space: VectorSpace) -> Price | None:
        """Return the price of the provider that has answered: the model's own provider, or the fallback."""
        return self.price if (space.provider, space.model) == self.own_space else self._fallback_price

    def get_cache(self, namespace: str, variation: Variation = PLAIN) -> Cache:
        """Return the cache of a namespace. ``""`` is the namespace of the configuration.

        Raises:
            ApiError: the model does not have the variation, or has too many of them.
        """
        cache = self._caches.get((variation, namespace))
        if cache is None:
            root = self._roots.get(variation)
            if root is None:
                self._make_room()
                root = self._roots[variation] = self._open(variation)
            cache = root.for_namespace(namespace) if namespace else root
            self._caches[variation, namespace] = cache
        return cache

    def _make_room(self) -> None:
        """Close the idle variation that was used longest ago, if there are as many as there may be.

        Raises:
            ApiError: all of them are in use.
        """
        if len(self._roots) < MAX_SPACES:
            return
        idle = next((one for one in self._roots if one != PLAIN and not self._active[one]), None)
        if idle is None:
            message = f"this model is in use with {MAX_SPACES} combinations of dimensions and other fields; try again"
            raise ApiError(503, message, kind="server_error", code="too_many_spaces", retry_after=1)
        self._useful.discard(idle)
        self._drop(idle)

    def find_variation(
        self, dimensions: int | None, forwarded: Mapping[str, Any], *, are_tokens: bool = False
    ) -> Variation:
        """Return the variation that a request asks for.

        Raises:
            ApiError: the forwarded fields are too large, or make a vector depend on the other inputs.
        """
        if dimensions == self.dimensions:
            dimensions = None
        if dimensions is None and not forwarded and not are_tokens:
            return PLAIN
        try:
            canonical = orjson.dumps(forwarded, option=orjson.OPT_SORT_KEYS) if forwarded else b""
        except TypeError:  # orjson raises it for values that are nested too deep
            canonical = None
        if canonical is None or len(canonical) > MAX_FORWARDED or _is_deep(forwarded):
            message = (
                f"the forwarded fields are larger than {MAX_FORWARDED:,} bytes, or nested more than {MAX_DEPTH} deep"
            )
            raise ApiError(400, message)
        return Variation(dimensions, canonical, are_tokens)

    @property
    def roots(self) -> list[Cache]:
        """The cache of each variation in the namespace of the configuration."""
        return list(self._roots.values())

    @property
    def can_forward(self) -> bool:
        """Whether fields of a request can be sent to the model, if its ``forward`` lists them."""
        return "extra_body" in self._options

    @property
    def accepts_tokens(self) -> bool:
        """Whether inputs may be token numbers. A provider cannot add a prefix to them."""
        has_prefixes = any((self.provider_config.options.get("prefixes") or {}).values())
        return "token_inputs" in self._options and not has_prefixes

    def list_variations(self, *, are_tokens: bool = False) -> list[Variation]:
        """Return the variations that this worker knows and that have this kind of input."""
        return [variation for variation in self._roots if variation.are_tokens == are_tokens]

    @contextmanager
    def use(self, variation: Variation) -> Iterator[None]:
        """Use a variation in the ``with`` block, which raises an error if the variation has given no vectors.

        A variation that has never given a vector does not count after the block. Otherwise requests with invalid
        dimensions would use up the number of variations.
        """
        with self.look_at(variation):
            yield
            self._useful.add(variation)

    @contextmanager
    def look_at(self, variation: Variation) -> Iterator[None]:
        """Use a variation in the ``with`` block, which computes no vectors."""
        self._active[variation] += 1
        if variation in self._roots:
            self._roots[variation] = self._roots.pop(variation)
        try:
            yield
        finally:
            self._active[variation] -= 1
            if not self._active[variation]:
                del self._active[variation]
                if variation not in self._useful:
                    self._drop(variation)

    def _drop(self, variation: Variation) -> None:
        root = self._roots.pop(variation, None)
        for key in [key for key in self._caches if key[0] == variation]:
            del self._caches[key]
        if root is not None:
            self._totals.count(root)
            root.close()

    def _open(self, variation: Variation) -> Cache:
        config = self.provider_config
        changes: dict[str, Any] = {}
        if variation.dimensions is not None:
            if "dimensions" not in self._options:
                known = f"; its vectors have {self.dimensions}" if self.dimensions else ""
                message = f"this model cannot make vectors of other dimensions{known}; leave dimensions out"
                raise ApiError(400, message, param="dimensions")
            changes["dimensions"] = variation.dimensions
        if variation.forwarded:
            forwarded = orjson.loads(variation.forwarded)
            changes["extra_body"] = {**(config.options.get("extra_body") or {}), **forwarded}
            try:
                refuse_batch_settings(forwarded, "the request")
            except (ValueError, SpaceError) as error:
                raise ApiError(400, str(error)) from None
        if variation.are_tokens:
            if not self.accepts_tokens:
                message = (
                    "this model accepts texts only, not token numbers; send texts (in LangChain: "
                    "check_embedding_ctx_length=False)"
                )
                raise ApiError(400, message, param="input")
            changes["token_inputs"] = True
        try:
            provider: Any = make_provider(self._config, config, **changes)
        except EmbedonceError as error:
            if variation == PLAIN:
                raise
            raise _explain_variation(variation) from error
        return self._base.for_provider(provider, price=config.price, coalesce=config.coalesce)

    def prepare(self) -> None:
        """Let the providers do now what their first call would do, such as importing a library. This may take long.

        A failure is logged. A request that needs the provider gets its error.
        """
        for provider in (self._plain.provider, self._plain.fallback):
            prepare = getattr(provider, "prepare", None)
            if callable(prepare):
                try:
                    prepare()
                except Exception as error:  # noqa: BLE001  (a provider may raise anything)
                    log.warning(
                        'model "%s": its provider could not be prepared for the first request (%s)',
                        self.name,
                        type(error).__name__,
                    )

    def close(self) -> None:
        """Close the caches and providers of the model, but no tiers."""
        for cache in self._roots.values():
            if cache is not self._base:
                self._totals.count(cache)
                cache.close()


def _explain_variation(variation: Variation) -> ApiError:
    """Return the answer to a request whose fields the provider refuses."""
    if variation == Variation(are_tokens=True):
        return ApiError(400, "the model does not accept token numbers; send texts", param="input")
    if not variation.forwarded:
        message = f"the model does not accept dimensions = {variation.dimensions}"
        return ApiError(400, message, param="dimensions")
    names = [*(["dimensions"] if variation.dimensions is not None else []), *orjson.loads(variation.forwarded)]
    message = f"the model does not accept these values: {', '.join(show_field(name) for name in names)}"
    return ApiError(400, message, param=names[0][:MAX_SHOWN] if len(names) == 1 else None)


def _read_price(provider: ProviderConfig | None) -> Price | None:
    return None if provider is None or provider.price is None else Price.parse(provider.price)


def _is_deep(value: Any, depth: int = 0) -> bool:
    """Return whether objects and lists are nested too deep."""
    if not isinstance(value, dict | list):
        return False
    if depth > MAX_DEPTH:
        return True
    return any(_is_deep(item, depth + 1) for item in (value.values() if isinstance(value, dict) else value))


class Models:
    """The models of one generation of settings, by name.

    Raises:
        ConfigError: a provider cannot be created, or there is no model.
    """

    def __init__(self, base: Cache, config: Config, totals: ProviderTotals, earlier: Models | None = None) -> None:
        self._models: dict[str, Model] = {}
        self._served = {served.name: served for served in config.serve.models}
        """The configuration of each model. The model of ``[provider]`` has none."""
        try:
            for name, served in self._served.items():
                kept = None if earlier is None else earlier._find_kept(name, served)
                self._models[name] = kept or Model(base, config, name, served.provider, served.forward, totals)
            if not self._served and config.provider is not None:
                name = base.provider.space("document").model or config.provider.type
                kept = None if earlier is None else earlier._find_kept(name, None)
                self._models[name] = kept or Model(base, config, name, config.provider, (), totals)
            if not self._models:
                raise ConfigError("there is no model to serve; add a [[serve.models]], or add [provider] and restart")
        except BaseException:
            self.close(keep=() if earlier is None else earlier)
            raise

    def _find_kept(self, name: str, served: ServedModel | None) -> Model | None:
        """Return the model of this name, if it has the same configuration; None stands for ``[provider]``."""
        return self._models.get(name) if self._served.get(name) == served else None

    @property
    def names(self) -> list[str]:
        return list(self._models)

    def __iter__(self) -> Iterator[Model]:
        return iter(self._models.values())

    def find(self, name: str) -> Model | None:
        return self._models.get(name)

    def prepare(self) -> None:
        """Prepare all models for their first requests, one after the other."""
        for model in self._models.values():
            model.prepare()

    def close(self, keep: Iterable[Model] = ()) -> None:
        """Close the models, except those that are in use elsewhere."""
        used = set(map(id, keep))
        for model in self._models.values():
            if id(model) not in used:
                model.close()
