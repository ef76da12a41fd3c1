"""The fields of the bodies of ``/admin/*``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from embedonce import Cache
from embedonce.config import Tenant
from embedonce_server.api.api_errors import ApiError, list_positions
from embedonce_server.models import Model

if TYPE_CHECKING:
    from embedonce_server.service import Generation


def read_text(fields: Mapping[str, Any], name: str, *, may_be_empty: bool = False) -> str | None:
    value = fields.get(name)
    if value is None:
        return None
    if type(value) is not str or not (value or may_be_empty):
        raise ApiError(400, f"{name} must be a string{' that is not empty' * (not may_be_empty)}", param=name)
    return value


def read_flag(fields: Mapping[str, Any], name: str, default: bool) -> bool:
    value = fields.get(name)
    if value is None:
        return default
    if type(value) is not bool:
        raise ApiError(400, f"{name} must be true or false", param=name)
    return value


def find_tenant(generation: Generation, fields: Mapping[str, Any]) -> Tenant | None:
    name = read_text(fields, "tenant")
    if name is None:
        return None
    for tenant in generation.settings.tenants:
        if tenant.name == name:
            return tenant
    known = ", ".join(tenant.name for tenant in generation.settings.tenants) or "none"
    message = f"the tenant does not exist; the tenants are: {known}"
    raise ApiError(404, message, param="tenant", code="tenant_not_found")


def find_models(generation: Generation, fields: Mapping[str, Any]) -> list[Model]:
    """Return the model that the fields name, or all models."""
    name = read_text(fields, "model")
    if name is None:
        return list(generation.models)
    model = generation.models.find(name)
    if model is None:
        known = ", ".join(generation.models.names)
        raise ApiError(404, f"the model does not exist; the models are: {known}", param="model", code="model_not_found")
    return [model]


def check_texts(base: Cache, texts: Sequence[str]) -> None:
    """Check that the texts have keys.

    Raises:
        ApiError: a text has a lone surrogate that ``normalize`` does not repair. The message names its position.
    """
    positions = [i for i, text in enumerate(texts) if not _is_unicode(base.normalize(text))]
    if positions:
        where = "the input" if len(texts) == 1 else f"input {list_positions(positions)}"
        message = (
            f'{where} has a lone surrogate, and [key] normalize has no step "surrogates", so no entry can have this '
            "text; remove it, or send the text that was stored in its place"
        )
        raise ApiError(400, message, param="input")


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
