"""The OpenAPI document of all endpoints.

``python -m embedonce_server.api.openapi`` prints it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, TypeAlias

import orjson

from embedonce import __version__

from .request_body import MAX_DIMENSIONS, MAX_INPUTS, MAX_TOKEN_ID
from .task_names import MAX_TASK

Schema: TypeAlias = dict[str, Any]

# --- schemas ----------------------------------------------------------------------------------


def _object(properties: Mapping[str, Schema], *, required: tuple[str, ...] | None = None, **more: Any) -> Schema:
    """Return the schema of an object that has no other properties. By default, all properties are required."""
    names = list(properties) if required is None else list(required)
    needed = {"required": names} if names else {}
    return {"type": "object", "properties": dict(properties), **needed, "additionalProperties": False, **more}


def _map(values: Schema, about: str) -> Schema:
    return {"type": "object", "additionalProperties": values, "description": about}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _text(about: str, **more: Any) -> Schema:
    return {"type": "string", "description": about, **more}


def _or_null(schema: Schema) -> Schema:
    return {**schema, "type": [schema["type"], "null"]}


def _list(items: Schema, about: str | None = None) -> Schema:
    return {"type": "array", "items": items, **({} if about is None else {"description": about})}


TEXT: Final[Schema] = {"type": "string"}
COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
SECONDS: Final[Schema] = {"type": "number", "minimum": 0}
FLAG: Final[Schema] = {"type": "boolean"}
OBJECT: Final[Schema] = {"type": "object"}
MAYBE_TEXT: Final = _or_null(TEXT)
MAYBE_INTEGER: Final[Schema] = {"type": ["integer", "null"]}
MAYBE_NUMBER: Final[Schema] = {"type": ["number", "null"]}
MAYBE_FLAG: Final = _or_null(FLAG)
NAME: Final[Schema] = {**MAYBE_TEXT, "minLength": 1}

_LIST: Final[Schema] = {"const": "list"}
"""The field ``object`` of OpenAI's lists."""
_STATE: Final[Schema] = {"enum": ["starting", "ready", "draining"]}
_WORKERS: Final = _list(COUNT)
"""The numbers of the workers that took part in an operation."""

_TOKENS: Final[Schema] = {
    "type": "array",
    "minItems": 1,
    "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID},
}
_INPUT: Final[Schema] = {
    "description": "A text, a list of texts, a list of token numbers, or a list of such lists.",
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "minItems": 1, "maxItems": MAX_INPUTS, "items": {"type": "string", "minLength": 1}},
        _TOKENS,
        {"type": "array", "minItems": 1, "maxItems": MAX_INPUTS, "items": _TOKENS},
    ],
}
_TASK: Final[Schema] = {
    "type": ["string", "null"],
    "maxLength": MAX_TASK,
    "pattern": "^[ -~]*[!-~][ -~]*$",
    "description": "document (the default), query, or another task that the model knows. If several of input_type, "
    "task and task_type are given, they must mean the same task.",
}
_DIMENSIONS: Final[Schema] = {
    "type": ["integer", "null"],
    "minimum": 1,
    "maximum": MAX_DIMENSIONS,
    "description": "Number of dimensions, if the model can make vectors of several sizes.",
}

_NOT_TENANT_AND_NAMESPACE: Final[Schema] = {
    "not": {
        "required": ["namespace", "tenant"],
        "properties": {"namespace": TEXT, "tenant": TEXT},
    }
}

_SCHEMAS: Final[dict[str, Schema]] = {
    "Error": _object(
        {
            "error": {
                "type": "object",
                "properties": {
                    "message": _text("What is wrong, and what to do."),
                    "type": TEXT,
                    "param": {**MAYBE_TEXT, "description": "The field that is wrong."},
                    "code": MAYBE_TEXT,
                    "positions": _list(
                        COUNT, "With the code not_cached: the positions of the inputs that are missing."
                    ),
                    "tiers": _map(TEXT, "With the code erase_incomplete: the tiers that failed, and why."),
                    "unable": _list(TEXT, "Those of tiers that cannot list or delete keys, whenever they are asked."),
                    "kept": _map(_map(COUNT, "Number by scope."), "Entries that read-only tiers keep, by tier."),
                    "models": _map(TEXT, "The models whose caches could not be used, and why."),
                    "workers": _map(TEXT, "The workers that did not answer, and why."),
                    "scopes": _map(TEXT, "The scopes that were left, and why."),
                },
                "required": ["message", "type", "param", "code"],
            }
        }
    ),
    "EmbeddingRequest": {
        "type": "object",
        "properties": {
            "input": _INPUT,
            "model": _text("The name of a model that /v1/models lists."),
            "dimensions": _DIMENSIONS,
            "encoding_format": {"enum": ["float", "base64", None], "description": "How vectors are written."},
            "user": {**MAYBE_TEXT, "description": "Ignored."},
            "input_type": _TASK,
            "task": _TASK,
            "task_type": _TASK,
        },
        "required": ["input", "model"],
        "additionalProperties": {"type": "null"},
        "description": "Other fields are refused, unless the setting forward of the model lists them.",
    },
    "Embeddings": _object(
        {
            "object": _LIST,
            "data": _list(
                _object(
                    {
                        "object": {"const": "embedding"},
                        "index": COUNT,
                        "embedding": {
                            "anyOf": [
                                _list({"type": "number"}),
                                _text("float32 in little-endian order", contentEncoding="base64"),
                            ]
                        },
                    }
                )
            ),
            "model": TEXT,
            "usage": _object({"prompt_tokens": COUNT, "total_tokens": COUNT}),
        },
        description="usage counts the tokens that this request has cost. Hits cost none.",
    ),
    "Model": _object({"id": TEXT, "object": {"const": "model"}, "created": COUNT, "owned_by": TEXT}),
    "Models": _object({"object": _LIST, "data": _list(_ref("Model"))}),
    "Live": _object({"status": {"const": "ok"}}),
    "Ready": _object(
        {
            "status": _STATE,
            "tiers": _map(
                _object({"status": {"enum": ["ok", "skipped"]}, "last_error": MAYBE_TEXT}),
                "A tier is skipped while its breaker is open.",
            ),
            "providers": _map(
                _object({"status": {"enum": ["ok", "failing"]}, "last_error": MAYBE_TEXT}),
                "A provider is failing from an error of one of its models until this model embeds a text again.",
            ),
        }
    ),
    "Work": _object({"texts": COUNT, "tokens": COUNT, "seconds": SECONDS}),
    "Stats": _object(
        {
            "version": TEXT,
            "status": _STATE,
            "workers": _list(
                _object(
                    {
                        "worker": COUNT,
                        "pid": COUNT,
                        "status": _STATE,
                        "uptime_seconds": SECONDS,
                        "requests_in_progress": COUNT,
                        "body_bytes": COUNT,
                    }
                )
            ),
            "missing_workers": _map(TEXT, "Workers that did not answer. Their counts are missing."),
            "requested": COUNT,
            "found": COUNT,
            "shared": COUNT,
            "computed": _ref("Work"),
            "saved": _ref("Work"),
            "spent": _map(TEXT, "The price of the computed tokens, by currency."),
            "money_saved": _map(TEXT, "The price of the saved tokens, by currency."),
            "tiers": _map(
                _object(
                    {
                        **{
                            name: COUNT
                            for name in ("hits", "misses", "errors", "corrupt", "skipped", "stored", "dropped")
                        },
                        "seconds": SECONDS,
                        "causes": _map(COUNT, "Errors by cause."),
                        "drops": _map(COUNT, "Dropped entries by cause."),
                        "is_skipped": FLAG,
                        "last_cause": MAYBE_TEXT,
                    }
                ),
                "Counters by tier.",
            ),
            "providers": _map(
                _object(
                    {"texts": COUNT, "failed": COUNT, "tokens": COUNT, "seconds": SECONDS, "last_error": MAYBE_TEXT}
                ),
                "Counters by provider.",
            ),
            "models": _list(
                _object(
                    {
                        "name": TEXT,
                        "provider": TEXT,
                        "model": TEXT,
                        "dimensions": MAYBE_INTEGER,
                        "price": MAYBE_TEXT,
                        "forward": _list(TEXT),
                        "spaces": {**COUNT, "description": "Combinations of dimensions and forwarded fields in use."},
                    }
                )
            ),
            "tenants": {
                "type": ["array", "null"],
                "description": "null if the file with the budgets cannot be read.",
                "items": _object(
                    {
                        "name": TEXT,
                        "namespace": TEXT,
                        "models": _or_null(_list(TEXT)),
                        "requests_per_minute": MAYBE_NUMBER,
                        "tokens_per_day": MAYBE_INTEGER,
                        "tokens_used": MAYBE_INTEGER,
                        "tokens_reserved": MAYBE_INTEGER,
                    }
                ),
            },
            "contents": {
                "type": "array",
                "description": "With contents=true: what each tier holds, by scope. Memory tiers are those of the "
                "worker that answers.",
                "items": OBJECT,
            },
        },
        required=(
            *("version", "status", "workers", "missing_workers", "requested", "found", "shared", "computed", "saved"),
            *("spent", "money_saved", "tiers", "providers", "models", "tenants"),
        ),
    ),
    "ExplainRequest": _object(
        {
            "input": _text("The text.", minLength=1),
            "model": {**NAME, "description": "Required if there are several models."},
            "tenant": NAME,
            "task": _TASK,
            "dimensions": _DIMENSIONS,
        },
        required=("input",),
    ),
    "Explanation": _object(
        {
            "model": TEXT,
            "key": TEXT,
            "scope": TEXT,
            "fingerprint": TEXT,
            "task": TEXT,
            "space": OBJECT,
            "policy": OBJECT,
            "normalized": {**FLAG, "description": "Whether normalisation has changed the text."},
            "tiers": _map(TEXT, "What each tier has for the key."),
            "reasons": _list(TEXT),
            "found": {**MAYBE_TEXT, "description": "The first tier that has the text."},
        },
        description="The text itself is not part of it. Memory tiers are those of the worker that answers.",
    ),
    "ForgetRequest": _object(
        {
            "input": _INPUT,
            "model": {**NAME, "description": "Default: all models."},
            "tenant": {**NAME, "description": "Default: all tenants."},
            "namespace": {
                **MAYBE_TEXT,
                "description": "The whole namespace, as the space cards have it. It includes all namespaces in it, "
                "such as team/a in team; the empty namespace includes all. It cannot be combined with tenant.",
            },
            "task": {**_TASK, "description": "Default: all tasks."},
        },
        required=("input",),
        **_NOT_TENANT_AND_NAMESPACE,
    ),
    "Forgotten": _object(
        {
            "inputs": COUNT,
            "models": _list(TEXT),
            "workers": _WORKERS,
        }
    ),
    "PurgeRequest": _object(
        {
            "scope": NAME,
            "model": {**NAME, "description": "A served model, or the name of a model in the space cards."},
            "version": NAME,
            "namespace": {**NAME, "description": "The whole namespace, as the space cards have it."},
            "tenant": {**NAME, "description": "All entries in the namespace of this tenant."},
            "dry_run": {**MAYBE_FLAG, "description": "true (the default): only count."},
        },
        required=(),
        description="All fields that are given must match. At least one other than dry_run is required.",
        anyOf=[
            {"required": [name], "properties": {name: TEXT}}
            for name in ("scope", "model", "version", "namespace", "tenant")
        ],
        **_NOT_TENANT_AND_NAMESPACE,
    ),
    "Purged": _object(
        {
            "dry_run": FLAG,
            "scopes": _map(_or_null(OBJECT), "The scopes that matched, with their space cards."),
            "removed": _map(COUNT, "Number of entries by tier, over all workers."),
            "kept": _map(_map(COUNT, "Number by scope."), "With dry_run: entries that read-only tiers keep, by tier."),
            "unable": _map(TEXT, "With dry_run: the tiers that cannot list or delete keys, and why."),
            "workers": _WORKERS,
        }
    ),
    "CheckRequest": _object(
        {
            "provider": {**MAYBE_FLAG, "description": "Whether to check the providers too, without calling them."},
            "embed": {
                **MAYBE_FLAG,
                "description": "Whether each provider embeds one constant text, which may cost money.",
            },
        },
        required=(),
    ),
    "Checked": _object(
        {
            "ok": FLAG,
            "tiers": _list(
                _object(
                    {
                        "tier": TEXT,
                        "type": TEXT,
                        "ok": FLAG,
                        "seconds": SECONDS,
                        "detail": TEXT,
                        "writes": MAYBE_FLAG,
                        "read_only": FLAG,
                        "verified": MAYBE_FLAG,
                    }
                )
            ),
            "providers": _list(
                _object(
                    {
                        "name": TEXT,
                        "provider": TEXT,
                        "ok": FLAG,
                        "seconds": SECONDS,
                        "dimensions": MAYBE_INTEGER,
                        "model": MAYBE_TEXT,
                        "detail": TEXT,
                    }
                )
            ),
        }
    ),
}

# --- answers ----------------------------------------------------------------------------------

_ABOUT: Final = {
    "400": "The request is invalid.",
    "401": "The key is missing or wrong.",
    "403": "The Host or the Origin is not allowed.",
    "404": "It does not exist.",
    "405": "The method is not allowed.",
    "413": "The body is too large.",
    "415": "The body is not application/json in UTF-8.",
    "429": "A limit of the tenant, or of the model's endpoint, is reached.",
    "500": "The server failed.",
    "501": "The body has another Transfer-Encoding than chunked.",
    "502": "The model failed.",
    "503": "It is not possible at the moment.",
    "504": "The model did not answer in time.",
}
_HEADERS: Final = {"x-request-id": {"description": "Identifies the request in the log.", "schema": TEXT}}
_RETRY: Final = {"retry-after": {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 1}}}
_ALLOW: Final = {"allow": {"description": "The methods.", "schema": TEXT}}
_CHALLENGE: Final = {"www-authenticate": {"description": "Bearer.", "schema": TEXT}}
_MORE: Final = {"401": _CHALLENGE, "405": _ALLOW, "429": _RETRY, "503": _RETRY}


def _answers(
    schema: Schema, *errors: str, kind: str = "application/json", headers: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the answers of an operation: 200 with a schema, and the errors with these statuses."""
    found = {
        "200": {"description": "OK", "headers": {**_HEADERS, **(headers or {})}, "content": {kind: {"schema": schema}}}
    }
    for status in sorted({*errors, "400", "403", "405", "500"}):
        found[status] = {
            "description": _ABOUT[status],
            "headers": {**_HEADERS, **_MORE.get(status, {})},
            "content": {"application/json": {"schema": _ref("Error")}},
        }
    return found


def _body(name: str) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": _ref(name)}}}


_ADMIN_KEY: Final[list[dict[str, list[str]]]] = [{"admin_key": []}]
_TENANT_KEY: Final[list[dict[str, list[str]]]] = [{"tenant_key": []}, {"tenant_api_key": []}, {}]
"""A server without tenants needs no key."""
_BODY_ERRORS: Final = ("413", "415", "501", "503")


def _administer(name: str, about: str, request: str, answer: str, *errors: str) -> dict[str, Any]:
    return {
        "post": {
            "operationId": name,
            "summary": about,
            "security": _ADMIN_KEY,
            "requestBody": _body(request),
            "responses": _answers(_ref(answer), "401", "404", *_BODY_ERRORS, *errors),
        }
    }


def make_document() -> dict[str, Any]:
    """Return the document. It has no settings of a server, so everybody may read it."""
    count = {"schema": COUNT}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "embedonce serve",
            "version": __version__,
            "summary": "OpenAI's embeddings endpoint with a cache.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": {
            "/v1/embeddings": {
                "post": {
                    "operationId": "embed",
                    "summary": "Return the vectors of texts, from the cache or from the model.",
                    "security": _TENANT_KEY,
                    "parameters": [
                        {
                            "name": "Cache-Control",
                            "in": "header",
                            "schema": {"type": "string", "examples": ["no-store", "no-cache", "only-if-cached"]},
                            "description": "no-store: store nothing. no-cache: compute anew. only-if-cached: compute "
                            "nothing; 404 with the positions of the missing inputs. Other directives are ignored.",
                        }
                    ],
                    "requestBody": _body("EmbeddingRequest"),
                    "responses": _answers(
                        _ref("Embeddings"),
                        *("401", "404", "429", "502", "504", *_BODY_ERRORS),
                        headers={
                            "x-embedonce-cache": {
                                "description": "Whether the cache had all inputs, some, or none.",
                                "schema": {"enum": ["hit", "partial", "miss"]},
                            },
                            "x-embedonce-hits": {"description": "Inputs that the cache had.", **count},
                            "x-embedonce-computed": {"description": "The other inputs.", **count},
                            "x-embedonce-saved-tokens": {"description": "Tokens that the hits have saved.", **count},
                        },
                    ),
                }
            },
            "/v1/models": {
                "get": {
                    "operationId": "list_models",
                    "summary": "Return the models that the tenant can use.",
                    "security": _TENANT_KEY,
                    "responses": _answers(_ref("Models"), "401"),
                }
            },
            "/v1/models/{model}": {
                "get": {
                    "operationId": "show_model",
                    "summary": "Return a model.",
                    "security": _TENANT_KEY,
                    "parameters": [{"name": "model", "in": "path", "required": True, "schema": TEXT}],
                    "responses": _answers(_ref("Model"), "401", "404"),
                }
            },
            "/health/live": {
                "get": {
                    "operationId": "show_live",
                    "summary": "Answer while the process runs.",
                    "responses": _answers(_ref("Live")),
                }
            },
            "/health/ready": {
                "get": {
                    "operationId": "show_ready",
                    "summary": "Return whether requests are answered, and which tiers and providers fail.",
                    "responses": {
                        **_answers(_ref("Ready")),
                        "503": {
                            "description": "The server is starting or stopping.",
                            "headers": _HEADERS,
                            "content": {"application/json": {"schema": _ref("Ready")}},
                        },
                    },
                }
            },
            "/metrics": {
                "get": {
                    "operationId": "show_metrics",
                    "summary": "Return the metrics of all workers for Prometheus.",
                    "description": "With tenants, it needs the admin key, and without an admin key it does not exist.",
                    "security": [*_ADMIN_KEY, {}],
                    "responses": _answers(TEXT, "401", "404", kind="text/plain"),
                }
            },
            "/openapi.json": {
                "get": {
                    "operationId": "show_openapi",
                    "summary": "Return this document.",
                    "responses": _answers(OBJECT),
                }
            },
            "/admin/stats": {
                "get": {
                    "operationId": "show_stats",
                    "summary": "Return the counters of all workers, the models and the tenants.",
                    "security": _ADMIN_KEY,
                    "parameters": [{"name": "contents", "in": "query", "schema": {"const": "true"}}],
                    "responses": _answers(_ref("Stats"), "401", "404"),
                }
            },
            "/admin/explain": _administer(
                "explain",
                "Return how the key of a text is built, and what each tier has.",
                "ExplainRequest",
                "Explanation",
            ),
            "/admin/forget": _administer(
                "forget", "Remove texts from all tiers of all workers.", "ForgetRequest", "Forgotten"
            ),
            "/admin/purge": _administer("purge", "Remove all entries that match.", "PurgeRequest", "Purged"),
            "/admin/check": _administer("check", "Check the tiers and the providers.", "CheckRequest", "Checked"),
        },
        "components": {
            "schemas": _SCHEMAS,
            "securitySchemes": {
                "tenant_key": {"type": "http", "scheme": "bearer", "description": "A key of a tenant."},
                "tenant_api_key": {"type": "apiKey", "in": "header", "name": "api-key"},
                "admin_key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "admin_key of [serve]. Without it, /admin does not exist.",
                },
            },
        },
    }


if __name__ == "__main__":
    print(orjson.dumps(make_document(), option=orjson.OPT_INDENT_2).decode())
