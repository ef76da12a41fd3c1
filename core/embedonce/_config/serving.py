"""Read ``[serve]`` with its models and tenants, and check that they fit together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from embedonce._messages import find_closest, join_words, quote, quote_toml_key
from embedonce._plugins import loading
from embedonce._plugins.options import options_of

from .documents import UNUSABLE
from .places import TomlPath
from .reader import Reader, Table, is_any_inside, make_provider_config
from .resolved import ProviderConfig, ServeConfig, ServedModel, Tenant
from .tables import ProviderTable, ServedModelTable, ServeTable, TenantTable

_FLAGS = {"workers": "--workers", "access_log": "--access-log"}
"""Settings of a server that only its command has."""


def has_served_models(reader: Reader) -> bool:
    """Return whether the document has a ``[[serve.models]]``, valid or not."""
    serve = reader.values.data.get("serve")
    return isinstance(serve, Mapping) and bool(serve.get("models"))


def read_serve(reader: Reader) -> ServeConfig:
    """Return what ``[serve]`` describes. The reader records all problems."""
    return _ServeReader(reader).read()


class _ServeReader:
    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        self._model_names: list[str] = []
        """Valid names of served models, including those of models with other problems."""
        self._are_names_known = has_served_models(reader)
        """Whether each served model has a valid name, so that an unknown name in a tenant's list is a problem."""
        self._tenant_names: set[str] = set()
        self._owners: dict[str, TomlPath] = {}
        """Path of the tenant that has a key, by the digest of the key."""

    def read(self) -> ServeConfig:
        given = self._reader.require_table(("serve",), self._reader.values.data.get("serve", {}))
        if given is None:
            self._reader.unread.append(("serve",))
            return ServeConfig()
        label = self._reader.document.table("serve")
        table = Table(
            ("serve",),
            label,
            ("serve",),
            given,
            options=dict(options_of(ServeTable)),
            tables=("models", "tenants"),
            not_here={name: f"use the option {flag} of embedonce serve" for name, flag in _FLAGS.items()},
        )
        self._reader.read_table(table)
        models = [self._read_model(index, item) for index, item in enumerate(self._list_items(given, "models"))]
        tenants = [self._read_tenant(index, item) for index, item in enumerate(self._list_items(given, "tenants"))]
        admin_key = table.values.get("admin_key")
        if admin_key in self._owners:
            owner = self._reader.format_label(self._owners[admin_key])
            message = f"{owner} has the same key; choose a key that no tenant has"
            self._reader.add_option_problem(table, "admin_key", message)
        return ServeConfig(
            **{**table.values, "allowed_hosts": tuple(table.values.get("allowed_hosts", ()))},
            models=tuple(model for model in models if model is not None),
            tenants=tuple(tenant for tenant in tenants if tenant is not None),
        )

    def _list_items(self, serve: Mapping[str, Any], name: str) -> list[Any]:
        given = serve.get(name, [])
        if isinstance(given, list):
            return given
        if given is not UNUSABLE:
            header = self._reader.document.table("serve", name, array=True)
            self._reader.add_problem(("serve", name), f"serve.{name} must be a list of tables: write {header}")
        return []

    def _read_item(self, where: TomlPath, item: Any, cls: type[Any], *tables: str) -> Table | None:
        """Read the options of one table in a list. Variables override none of them, because the list has no keys."""
        given = self._reader.require_table(where, item)
        if given is None:
            return None
        name = given.get("name")
        names = (str(where[0]), str(where[1]), quote_toml_key(name) if isinstance(name, str) else "")
        table = Table(
            where,
            self._reader.format_label(where),
            names,
            given,
            is_overridable=False,
            options=dict(options_of(cls)),
            tables=tables,
        )
        self._reader.read_table(table)
        return table

    # --- models ---

    def _read_model(self, index: int, item: Any) -> ServedModel | None:
        where: TomlPath = ("serve", "models", index)
        table = self._read_item(where, item, ServedModelTable, "provider")
        name = None if table is None else table.values.get("name")
        self._are_names_known = self._are_names_known and name is not None
        if table is None:
            return None
        if name in self._model_names:
            self._reader.add_option_problem(table, "name", "another model has this name; choose another name")
        elif name is not None:
            self._model_names.append(name)
        if "provider" not in table.given:
            example = 'add one, such as provider = { type = "ngram" }'
            self._reader.add_problem(where, f'"provider" is missing in {table.label}; {example}', key=True)
            return None
        given = self._reader.require_table((*where, "provider"), table.given["provider"])
        if given is None:
            return None
        provider_table = Table(
            (*where, "provider"),
            self._reader.format_label((*where, "provider")),
            (*table.variables, "provider"),
            given,
            is_overridable=False,
        )
        provider = make_provider_config(
            self._reader.read_plugin(provider_table, loading.provider, {**options_of(ProviderTable)})
        )
        forward = tuple(table.values.get("forward", ()))
        if provider is None:
            return None
        self._check_forward(table, forward, provider)
        return None if name is None else ServedModel(name=name, provider=provider, forward=forward)

    def _check_forward(self, table: Table, forward: Sequence[str], provider: ProviderConfig) -> None:
        if forward and "extra_body" not in options_of(provider.cls):
            is_shown = not is_any_inside((*provider.path, "type"), self._reader.values.private)
            name = f"the provider {provider.type}" if is_shown else "the provider"
            message = f'{name} cannot send other fields; remove "forward"'
            self._reader.add_option_problem(table, "forward", message, key=True)
        for index, name in enumerate(forward):
            if name in forward[:index]:
                self._reader.add_value_problem(table, ("forward", index), None, "the field is already listed", None)

    # --- tenants ---

    def _read_tenant(self, index: int, item: Any) -> Tenant | None:
        where: TomlPath = ("serve", "tenants", index)
        table = self._read_item(where, item, TenantTable)
        if table is None:
            return None
        values = dict(table.values)
        if values.get("name") in self._tenant_names:
            self._reader.add_option_problem(table, "name", "another tenant has this name; choose another name")
        self._tenant_names.update([values["name"]] if "name" in values else [])
        self._check_keys(table)
        models = values.pop("models", None)
        if models is not None:
            self._check_models(table, models)
        if "name" not in values or "keys" not in values:
            return None
        keys = tuple(dict.fromkeys(values.pop("keys")))
        namespace = values.pop("namespace", None)
        return Tenant(
            **values,
            keys=keys,
            namespace=values["name"] if namespace is None else namespace,
            models=None if models is None else tuple(dict.fromkeys(models)),
        )

    def _check_keys(self, table: Table) -> None:
        for index, key in enumerate(table.values.get("keys", ())):
            owner = self._owners.setdefault(key, table.where)
            if owner != table.where:
                message = f"{self._reader.format_label(owner)} has the same key; a key must belong to one tenant"
                self._reader.add_value_problem(table, ("keys", index), None, message, None)

    def _check_models(self, table: Table, models: Sequence[str]) -> None:
        """Check that a tenant's models are served. Without a ``[[serve.models]]``, only the server can check this.

        The name of the model of ``[provider]`` is known after the provider was created.
        """
        for index, name in enumerate(models if self._are_names_known else ()):
            if name not in self._model_names:
                meant = find_closest(name, self._model_names)
                words = (
                    f"did you mean {quote(meant)}?"
                    if meant
                    else f"the models are {join_words(map(quote, self._model_names))}"
                )
                where = (*table.where, "models")
                shown = None if is_any_inside(where, self._reader.values.private) else quote(name)
                message = f"no [[serve.models]] has this name; {words}"
                self._reader.add_value_problem(table, ("models", index), shown, message, None)
