"""The JSON schema of ``embedonce.toml``, with the options of the plugins that are installed.

Draft 7, since that is what the editors' TOML plugins understand. Tiers are alternatives by ``type``,
each closed, so that an editor completes the options of the one that is written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from . import plugins
from ._options import Option, adapter, options_beside, options_of
from ._sections import CacheTable, FallbackTable, KeyTable, PluginsTable, TierTable
from .errors import PluginError
from .keys import NORMALIZERS

VARIABLE = {"type": "string", "pattern": r"\$\{"}
"""Text with a ``${VAR}`` in it may stand for any value."""


def schema() -> dict[str, Any]:
    """Return the schema as a dict that ``json.dumps`` takes."""
    return _Schema().build()


class _Schema:
    def __init__(self) -> None:
        self._definitions: dict[str, Any] = {}
        self._installed = plugins.installed()

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
            "oneOf": self._plugins("provider", "fallback", plugins.provider, options_of(FallbackTable), {}),
        }
        self._definitions["fallback"] = fallback
        inner = {"fallback": {"$ref": "#/definitions/fallback"}}
        return {
            "description": "What makes the vectors that no tier has.",
            "oneOf": self._plugins("provider", "provider", plugins.provider, {}, inner),
        }

    def _tiers(self) -> dict[str, Any]:
        tier = self._plugins("backend", "tier", plugins.backend, options_of(TierTable), {})
        return {
            "description": "Where vectors are kept, fastest first.",
            "type": "array",
            "items": {"oneOf": tier},
        }

    def _names(self, kind: plugins.Kind) -> list[str]:
        return [plugin.type for plugin in self._installed if kind in plugin.kinds]

    def _plugins(
        self,
        kind: plugins.Kind,
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
            options = options_beside(find(name), own, {"type", *more})
        except PluginError:  # embedonce plugins says what is wrong with it
            return None
        table = self._table(f"{role}.{name}", options, more)
        properties = {"type": {"const": name, "description": "The plugin, by name."}, **table["properties"]}
        return {**table, "title": name, "properties": properties, "required": ["type", *table.get("required", ())]}

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
            alternatives: dict[str, Any] = {"anyOf": [*kinds, VARIABLE]}
            described = alternatives
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
        return _without_null(described)


def _required(options: Iterable[Option], properties: Mapping[str, Any]) -> list[str]:
    return [option.name for option in options if option.required and option.name in properties]


def _without_null(described: dict[str, Any]) -> dict[str, Any]:
    """Return a schema without the alternative null: TOML has no such value, an option is left out instead."""
    kept = [part for part in described.get("anyOf", ()) if part.get("type") != "null"]
    if len(kept) == 1:
        return {**{key: value for key, value in described.items() if key != "anyOf"}, **kept[0]}
    return {**described, "anyOf": kept} if kept else described
