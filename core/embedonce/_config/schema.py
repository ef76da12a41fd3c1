"""The JSON schema of ``embedonce.toml``, with the options of the plugins that are installed.

Draft 7, since that is what the editors' TOML plugins understand. Tiers are alternatives by ``type``,
each closed, so that an editor completes the options of the one that is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from annotated_types import Gt

from embedonce._plugins import loading
from embedonce._plugins.options import Option, adapter, metadata, options_beside, options_of
from embedonce.drift import DriftGuard
from embedonce.errors import PluginError
from embedonce.keys import NORMALIZERS

from .inspection import installed
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

TIER = {"pattern": rf"^{TIER_NAME}$|\$\{{", "not": {"const": "provider"}}
"""What a tier may be called."""
VARIABLE = {"type": "string", "pattern": r"\$\{"}
"""Text with a ``${VAR}`` in it may stand for any value."""


def schema() -> dict[str, Any]:
    """Return the schema as a dict that ``json.dumps`` takes."""
    return _Schema().build()


class _Schema:
    def __init__(self) -> None:
        self._definitions: dict[str, Any] = {}
        self._installed = installed()

    def build(self) -> dict[str, Any]:
        return {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "title": "embedonce.toml",
            "description": "A cache for text embeddings: a provider, and the tiers that are asked before it.",
            "type": "object",
            "properties": {
                "cache": self._own(CacheTable, "How the cache as a whole behaves."),
                "key": self._key(),
                "plugins": self._own(PluginsTable, "Which plugins of others may be loaded."),
                "provider": self._provider(),
                "drift": self._own(DriftGuard, "Looks whether the provider still makes the vectors that are stored."),
                "tiers": self._tiers(),
            },
            "required": ["provider", "tiers"],
            "additionalProperties": False,
            "definitions": self._definitions,
        }

    def _own(self, cls: type[Any], doc: str) -> dict[str, Any]:
        return {"description": doc, **self._table(cls.__name__, options_of(cls), {})}

    def _key(self) -> dict[str, Any]:
        table = self._own(KeyTable, "What makes two requests the same.")
        steps = sorted({*NORMALIZERS, *self._names("normalizer")})
        table["properties"]["normalize"]["items"] = {"anyOf": [{"enum": steps}, VARIABLE]}
        return table

    def _provider(self) -> dict[str, Any]:
        fallback = {
            "description": "Embeds what the provider fails to; its vectors live in a vector space of their own.",
            "oneOf": self._plugins("provider", "fallback", loading.provider, options_of(FallbackTable), {}),
        }
        self._definitions["fallback"] = fallback
        inner = {"fallback": {"$ref": "#/definitions/fallback"}}
        return {
            "description": "What makes the vectors that no tier has.",
            "oneOf": self._plugins("provider", "provider", loading.provider, {}, inner),
        }

    def _tiers(self) -> dict[str, Any]:
        tier = self._plugins("backend", "tier", loading.backend, options_of(TierTable), {})
        return {
            "description": "Where vectors are kept, fastest first.",
            "type": "array",
            "items": {"oneOf": tier},
        }

    def _names(self, kind: loading.Kind) -> list[str]:
        return [plugin.type for plugin in self._installed if kind in plugin.kinds]

    def _plugins(
        self,
        kind: loading.Kind,
        role: str,
        find: Callable[[str], type[Any]],
        own: Mapping[str, Option],
        more: Mapping[str, Any],
    ) -> list[dict[str, Any]]:
        """Return one closed table per plugin of a kind, and an open one for a type out of a variable."""
        tables = [table for name in self._names(kind) if (table := self._plugin(name, role, find, own, more))]
        return [*tables, {"type": "object", "properties": {"type": VARIABLE}, "required": ["type"]}]

    def _plugin(
        self, name: str, role: str, find: Callable[[str], type[Any]], own: Mapping[str, Option], more: Mapping[str, Any]
    ) -> dict[str, Any] | None:
        try:
            cls = find(name)
            options = options_beside(cls, own, {"type", *more})
        except PluginError:  # embedonce plugins says what is wrong with it
            return None
        if own and is_in_process(cls):
            options = {key: option for key, option in options.items() if key not in NOT_IN_PROCESS}
        table = self._table(f"{role}.{name}", options, more)
        properties = {"type": self._name(name), **table["properties"]}
        if role == "tier":
            properties["name"] = {**properties["name"], **TIER}
        return {**table, "title": name, "properties": properties, "required": ["type", *table.get("required", ())]}

    def _name(self, name: str) -> dict[str, Any]:
        """Return the schema of a plugin's ``type``: its name, also with its distribution before it."""
        described = {"description": "The plugin, by name."}
        (found,) = [plugin for plugin in self._installed if plugin.type == name]
        full = f"{found.distribution}:{found.name}"
        return {**described, "const": name} if full == name else {**described, "enum": [name, full]}

    def _table(self, title: str, options: Mapping[str, Option], more: Mapping[str, Any]) -> dict[str, Any]:
        properties = {
            option.name: described for option in options.values() if (described := self._option(title, option))
        }
        table = {"type": "object", "properties": {**properties, **more}, "additionalProperties": False}
        required = _required(options.values(), properties)
        return {**table, "required": required} if required else table

    def _option(self, title: str, option: Option) -> dict[str, Any] | None:
        """Return an option's schema, or None where TOML cannot write its type."""
        described = self._type(title, option)
        if described is None:
            return None
        if described.get("type") != "string" or "enum" in described or "const" in described or "pattern" in described:
            kinds = described["anyOf"] if set(described) == {"anyOf"} else [described]
            kinds = [_above(kind, option) for kind in kinds]
            alternatives: dict[str, Any] = {"anyOf": [*kinds, VARIABLE]}
            described = alternatives
        if option.is_path and described.get("type") == "string":
            described["minLength"] = 1
        if option.doc:
            described["description"] = option.doc
        if not option.required and isinstance(option.default, bool | int | float | str):
            described["default"] = option.default
        return described

    def _type(self, title: str, option: Option) -> dict[str, Any] | None:
        from pydantic.errors import PydanticInvalidForJsonSchema

        template = f"#/definitions/{title}.{option.name}.{{model}}"
        try:
            described: dict[str, Any] = adapter(option).json_schema(ref_template=template)
        except (PluginError, PydanticInvalidForJsonSchema):
            return None
        for model, definition in described.pop("$defs", {}).items():
            self._definitions[f"{title}.{option.name}.{model}"] = definition
        described.pop("description", None)
        # pydantic writes a bound that it checks by itself under Python's name for it.
        return {key: part for key, part in _without_null(described).items() if key not in ("gt", "ge", "lt", "le")}


def _above(kind: dict[str, Any], option: Option) -> dict[str, Any]:
    """Return a number with the bound that its option has beside its type: a Size or a Duration knows nothing of it."""
    bounds = [part.gt for part in metadata(option.hint) if isinstance(part, Gt)]
    if not bounds or "minimum" not in kind:
        return kind
    return {**{name: value for name, value in kind.items() if name != "minimum"}, "exclusiveMinimum": bounds[0]}


def _required(options: Iterable[Option], properties: Mapping[str, Any]) -> list[str]:
    return [option.name for option in options if option.required and option.name in properties]


def _without_null(described: dict[str, Any]) -> dict[str, Any]:
    """Return a schema without the alternative null: TOML has no such value, an option is left out instead."""
    kept = [part for part in described.get("anyOf", ()) if part.get("type") != "null"]
    if len(kept) == 1:
        return {**{key: value for key, value in described.items() if key != "anyOf"}, **kept[0]}
    return {**described, "anyOf": kept} if kept else described
