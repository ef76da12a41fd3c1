"""Build the JSON schema of ``embedonce.toml``, including the options of all installed plugins.

The schema uses draft 7, because the TOML plugins of editors support that draft. The schema of a tier
has one alternative per ``type``. Each of these alternatives allows only the options of its type, so that an editor
completes only these options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from annotated_types import Ge, Gt

from embedonce._plugins import loading
from embedonce._plugins.options import Option, list_annotations, merge_options, options_of, type_adapter
from embedonce.drift import DriftGuard
from embedonce.errors import PluginError
from embedonce.keys import NORMALIZERS

from .inspection import installed
from .tables import (
    TIER_NAME,
    CacheTable,
    EmbedTable,
    FallbackTable,
    ImportTable,
    KeyTable,
    PluginsTable,
    ProviderTable,
    ServedModelTable,
    ServeTable,
    TenantTable,
    TierTable,
    TopTable,
    find_unsupported,
)

TIER = {"pattern": rf"^{TIER_NAME}$|\$\{{", "not": {"const": "provider"}}
"""Schema of a tier's name."""
HAS_SERVED_MODELS = {
    "required": ["serve"],
    "properties": {"serve": {"required": ["models"], "properties": {"models": {"minItems": 1}}}},
}
"""Schema of a document that may leave out ``[provider]``."""
VARIABLE = {"type": "string", "pattern": r"\$\{"}
"""Schema of text that contains a ``${VAR}``, which is valid in place of any value."""


def schema() -> dict[str, Any]:
    """Return the schema as a dict that ``json.dumps`` accepts."""
    return _Schema().build()


class _Schema:
    def __init__(self) -> None:
        self._definitions: dict[str, Any] = {}
        self._installed = installed()

    def build(self) -> dict[str, Any]:
        return {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "title": "embedonce.toml",
            "description": "A cache for text embeddings: a provider, and tiers that store its vectors.",
            "type": "object",
            "properties": {
                **self._describe_table(TopTable.__name__, options_of(TopTable), {})["properties"],
                "cache": self._describe_own(CacheTable, "Options of the cache as a whole."),
                "key": self._describe_key(),
                "plugins": self._describe_own(PluginsTable, "Which third-party plugins may be loaded."),
                "provider": self._describe_provider(),
                "drift": self._describe_own(
                    DriftGuard, "Checks whether the provider still returns the same vectors as those stored."
                ),
                "tiers": self._describe_tiers(),
                "imports": self._describe_imports(),
                "embed": self._describe_own(EmbedTable, "How the command embedonce embed reads files."),
                "serve": self._describe_serve(),
            },
            "required": ["tiers"],
            "anyOf": [{"required": ["provider"]}, HAS_SERVED_MODELS],
            "additionalProperties": False,
            "definitions": self._definitions,
        }

    def _describe_own(self, cls: type[Any], doc: str) -> dict[str, Any]:
        return {"description": doc, **self._describe_table(cls.__name__, options_of(cls), {})}

    def _describe_key(self) -> dict[str, Any]:
        table = self._describe_own(
            KeyTable, "What the keys of vectors depend on. Requests with equal keys share a vector."
        )
        steps = sorted({*NORMALIZERS, *self._list_names("normalizer")})
        table["properties"]["normalize"]["items"] = {"anyOf": [{"enum": steps}, VARIABLE]}
        return table

    def _describe_provider(self) -> dict[str, Any]:
        fallback = {
            "description": "Embeds texts that the main provider fails to embed. It has a vector space of its own.",
            "oneOf": self._describe_plugins("provider", "fallback", loading.provider, options_of(FallbackTable), {}),
        }
        self._definitions["fallback"] = fallback
        inner = {"fallback": {"$ref": "#/definitions/fallback"}}
        return {
            "description": "Plugin that computes the vectors that no tier has.",
            "oneOf": self._describe_plugins("provider", "provider", loading.provider, options_of(ProviderTable), inner),
        }

    def _describe_tiers(self) -> dict[str, Any]:
        tier = self._describe_plugins("backend", "tier", loading.backend, options_of(TierTable), {})
        return {
            "description": "Stores of vectors, fastest first.",
            "type": "array",
            "items": {"oneOf": tier},
        }

    def _describe_imports(self) -> dict[str, Any]:
        importer = self._describe_plugins("importer", "import", loading.importer, options_of(ImportTable), {})
        return {
            "description": "Stores of other programs that may have the vectors that no tier has.",
            "type": "array",
            "items": {"oneOf": importer},
        }

    def _describe_serve(self) -> dict[str, Any]:
        self._definitions["served_provider"] = {
            "description": "Plugin that computes the vectors of this model.",
            "oneOf": self._describe_plugins("provider", "served", loading.provider, options_of(ProviderTable), {}),
        }
        table = self._describe_own(ServeTable, "What the command embedonce serve serves, and to whom.")
        model = self._describe_own(ServedModelTable, "A model that is served.")
        model["properties"]["provider"] = {"$ref": "#/definitions/served_provider"}
        model["required"].append("provider")
        tenant = self._describe_own(TenantTable, "A caller of the server, known by its keys.")
        table["properties"]["models"] = {
            "description": "The models that are served. Without any, the model of [provider] is served.",
            "type": "array",
            "items": model,
        }
        table["properties"]["tenants"] = {
            "description": "The callers of the server. Without any, the server has no keys.",
            "type": "array",
            "items": tenant,
        }
        return table

    def _list_names(self, kind: loading.Kind) -> list[str]:
        return [plugin.type for plugin in self._installed if kind in plugin.kinds]

    def _describe_plugins(
        self,
        kind: loading.Kind,
        role: str,
        find: Callable[[str], type[Any]],
        own: Mapping[str, Option],
        more: Mapping[str, Any],
    ) -> list[dict[str, Any]]:
        """Return one table per plugin of a kind, and one table for a ``type`` that comes from a variable.

        The table for a ``type`` from a variable allows any key, because the plugin is unknown.
        """
        tables = [
            table
            for name in self._list_names(kind)
            if (table := self._describe_plugin(kind, name, role, find, own, more))
        ]
        return [*tables, {"type": "object", "properties": {"type": VARIABLE}, "required": ["type"]}]

    def _describe_plugin(
        self,
        kind: loading.Kind,
        name: str,
        role: str,
        find: Callable[[str], type[Any]],
        own: Mapping[str, Option],
        more: Mapping[str, Any],
    ) -> dict[str, Any] | None:
        try:
            cls = find(name)
            options = merge_options(cls, own, {"type", *more})
        except PluginError:  # `embedonce plugins` reports the error
            return None
        unsupported = find_unsupported(cls) if kind == "backend" else {}
        options = {key: option for key, option in options.items() if key not in unsupported}
        table = self._describe_table(f"{role}.{name}", options, more)
        properties = {"type": self._describe_type_option(kind, name), **table["properties"]}
        if role == "tier":
            properties["name"] = {**properties["name"], **TIER}
        return {**table, "title": name, "properties": properties, "required": ["type", *table.get("required", ())]}

    def _describe_type_option(self, kind: loading.Kind, name: str) -> dict[str, Any]:
        """Return the schema of a plugin's ``type``: the plugin's name, with or without the distribution."""
        described = {"description": "Name of the plugin."}
        (found,) = [plugin for plugin in self._installed if plugin.type == name and kind in plugin.kinds]
        full = f"{found.distribution}:{found.name}"
        return {**described, "const": name} if full == name else {**described, "enum": [name, full]}

    def _describe_table(self, title: str, options: Mapping[str, Option], more: Mapping[str, Any]) -> dict[str, Any]:
        properties = {
            option.name: described for option in options.values() if (described := self._describe_option(title, option))
        }
        table = {"type": "object", "properties": {**properties, **more}, "additionalProperties": False}
        required = _list_required(options.values(), properties)
        return {**table, "required": required} if required else table

    def _describe_option(self, title: str, option: Option) -> dict[str, Any] | None:
        """Return an option's schema, or None if TOML has no values of its type."""
        described = self._describe_type(title, option)
        if described is None:
            return None
        if described.get("type") != "string" or "enum" in described or "const" in described or "pattern" in described:
            kinds = described["anyOf"] if set(described) == {"anyOf"} else [described]
            kinds = [_add_lower_bound(kind, option) for kind in kinds]
            alternatives: dict[str, Any] = {"anyOf": [*kinds, VARIABLE]}
            described = alternatives
        if option.is_path and described.get("type") == "string":
            described["minLength"] = 1
        if option.doc:
            described["description"] = option.doc
        if not option.required and isinstance(option.default, bool | int | float | str):
            described["default"] = option.default
        return described

    def _describe_type(self, title: str, option: Option) -> dict[str, Any] | None:
        from pydantic.errors import PydanticInvalidForJsonSchema

        template = f"#/definitions/{title}.{option.name}.{{model}}"
        try:
            described: dict[str, Any] = type_adapter(option).json_schema(ref_template=template)
        except (PluginError, PydanticInvalidForJsonSchema):
            return None
        for model, definition in described.pop("$defs", {}).items():
            self._definitions[f"{title}.{option.name}.{model}"] = definition
        described.pop("description", None)
        # For some bounds, pydantic writes a key such as "gt", which is not a keyword of JSON schema. Drop these keys.
        return {key: part for key, part in _remove_null(described).items() if key not in ("gt", "ge", "lt", "le")}


def _add_lower_bound(kind: dict[str, Any], option: Option) -> dict[str, Any]:
    """Return the schema ``kind`` with the lower bound of the option's ``Gt`` or ``Ge``. pydantic omits this bound."""
    annotations = list_annotations(option.hint)
    least = [part.ge for part in annotations if isinstance(part, Ge)]
    if least and "minimum" in kind:
        return {**kind, "minimum": least[0]}
    bounds = [part.gt for part in annotations if isinstance(part, Gt)]
    if not bounds or "minimum" not in kind:
        return kind
    return {**{name: value for name, value in kind.items() if name != "minimum"}, "exclusiveMinimum": bounds[0]}


def _list_required(options: Iterable[Option], properties: Mapping[str, Any]) -> list[str]:
    return [option.name for option in options if option.required and option.name in properties]


def _remove_null(described: dict[str, Any]) -> dict[str, Any]:
    """Return a schema without its ``null`` alternative, because TOML has no null."""
    kept = [part for part in described.get("anyOf", ()) if part.get("type") != "null"]
    if len(kept) == 1:
        return {**{key: value for key, value in described.items() if key != "anyOf"}, **kept[0]}
    return {**described, "anyOf": kept} if kept else described
