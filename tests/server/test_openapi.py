"""The OpenAPI document agrees with the server. schemathesis looks for requests for which it does not."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from api_document import narrow_document
from serve_process import ServeProcess
from serving import ADMIN_KEY, KEY

from embedonce_server.api.openapi import make_document
from embedonce_server.operations.endpoints import Operations, name_endpoint

ROOT = Path(__file__).parents[2]

CONFIG = f"""
[provider]
type = "ngram"

[[tiers]]
type = "memory"

[serve]
admin_key = "{ADMIN_KEY}"
state_dir = "state"

[[serve.tenants]]
name = "search"
keys = ["{KEY}"]
tokens_per_day = 1_000_000
"""

KEYS = f"""
[auth.openapi.tenant_key]
bearer = "{KEY}"

[auth.openapi.tenant_api_key]
api_key = "{KEY}"

[auth.openapi.admin_key]
bearer = "{ADMIN_KEY}"
"""


def test_the_stored_document_is_up_to_date() -> None:
    stored = json.loads((ROOT / "server/openapi.json").read_text())
    assert stored == make_document(), "run: python -m embedonce_server.api.openapi > server/openapi.json"


def list_references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for name, item in value.items():
            if name == "$ref":
                yield item
            else:
                yield from list_references(item)
    elif isinstance(value, list):
        for item in value:
            yield from list_references(item)


def test_each_schema_is_valid_and_used() -> None:
    document = make_document()
    schemas = document["components"]["schemas"]
    assert set(list_references(document)) == {f"#/components/schemas/{name}" for name in schemas}
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_the_document_has_every_path() -> None:
    documented = set(make_document()["paths"])
    assert all(name_endpoint(path) == path for path in documented - {"/v1/embeddings"})
    routes = {route.path.replace(":path", "") for route in Operations.make_routes({})}
    assert documented == {path for path in routes if not path.startswith("/siblings/")} | {"/v1/embeddings"}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    (folder / "embedonce.toml").write_text(CONFIG)
    with ServeProcess("--config", "embedonce.toml", folder=folder) as server:
        yield f"http://127.0.0.1:{server.port}"


def test_schemathesis_finds_nothing(address: str, tmp_path: Path) -> None:
    document = narrow_document(model="char-ngram", dimensions=(64, 128, 256), tenant="search")
    (tmp_path / "document.json").write_text(json.dumps(document))
    (tmp_path / "schemathesis.toml").write_text(KEYS)
    command = [sys.executable, "-m", "schemathesis.cli", "run", "document.json", "--url", address]
    done = subprocess.run(
        [*command, "--max-examples", "6", "--request-timeout", "60", "--no-color"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 selected / 12 total" in done.stdout
    assert "No issues found" in done.stdout
