"""The tables ``[serve]``, ``[[serve.models]]`` and ``[[serve.tenants]]``, and the providers that are made from them."""

from __future__ import annotations

import hashlib
import inspect
import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st
from installed_plugins import write_distribution
from typer.testing import CliRunner

from embedonce import config
from embedonce._config.serve_values import OWN_FIELDS
from embedonce._config.tables import ServedModelTable, ServeTable, TenantTable
from embedonce._plugins.options import options_of
from embedonce.cli import app
from embedonce.errors import ConfigError, ProviderError

KEY = "a key of a team!".replace(" ", "-")  # exactly 16 characters
OTHER_KEY = "another-key-of-17"
DIGEST = "sha256:" + hashlib.sha256(KEY.encode()).hexdigest()

TIERS = 'tiers = [{ type = "memory" }]\n'
NGRAM = TIERS + '[provider]\ntype = "ngram"\n'
MODEL = '[[serve.models]]\nname = "small"\nprovider = { type = "ngram" }\n'
NGRAM_MODEL = 'name = "a"\nprovider.type = "ngram"\n'
SENDER_MODEL = 'name = "a"\nprovider.type = "sender"\n'
B = f'name = "b"\nkeys = ["{OTHER_KEY}"]\n'
IN_A = 'in [[serve.models]] "a":'
IN_B = 'in [[serve.tenants]] "b":'
TENANT = f'[[serve.tenants]]\nname = "search"\nkeys = ["{KEY}"]\n'

PLUGIN = '''
"""A provider that can send other fields, and that can fail."""
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import embedonce
from embedonce_providers.ngram import NgramProvider

class Sender(NgramProvider):
    def __init__(
        self, *, dimensions: int = 64, extra_body: Mapping[str, Any] | None = None, api_key: str = "", fail: str = "",
        folder: Path | None = None, trust_remote_code: bool = False,
    ):
        if fail:
            raise OSError(f"{fail} {api_key} {extra_body}")
        super().__init__(dimensions=dimensions)
        self.extra_body, self.api_key, self.folder = extra_body, api_key, folder

@embedonce.hookimpl
def embedonce_providers():
    return {"sender": Sender}
'''


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sender")
    write_distribution(folder, "serve_sender", PLUGIN, plugins=["sender"], distribution="sender")
    return folder


@pytest.fixture
def sender(site: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of the provider ``sender``, which has the option ``extra_body``."""
    monkeypatch.syspath_prepend(str(site))
    import serve_sender  # type: ignore[import-not-found]

    module: ModuleType = serve_sender
    return module


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def load_text(text: str) -> config.Config:
    Path("embedonce.toml").write_text(text)
    return config.load("embedonce.toml")


def problems_of(source: str | Mapping[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_text(source) if isinstance(source, str) else config.load(source)
    return [str(problem) for problem in caught.value.problems]


# --- what is read -----------------------------------------------------------------------------


def test_without_a_table_there_are_defaults() -> None:
    found = load_text(NGRAM).serve
    assert found == config.ServeConfig()
    assert (found.host, found.port, found.allowed_hosts, found.admin_key) == ("127.0.0.1", 8080, (), None)
    assert (found.max_body, found.drain_timeout, found.state_dir) == (16 * 1024 * 1024, 20.0, None)
    assert (found.models, found.tenants) == ((), ())


def test_every_option_is_read(sender: ModuleType, here: Path) -> None:
    found = load_text(
        f"""
        {TIERS}
        [serve]
        host = "0.0.0.0"
        port = 0
        allowed_hosts = ["Embeddings.internal", "[::1]", "10.0.0.1"]
        admin_key = "{OTHER_KEY}"
        max_body = "1 MiB"
        drain_timeout = "1m"
        state_dir = "state"
        [[serve.models]]
        name = "owner/small model"
        provider = {{ type = "sender", dimensions = 32, folder = "f", price = "1 USD / 1M tokens" }}
        forward = ["truncate"]
        [[serve.models]]
        name = "large"
        [serve.models.provider]
        type = "ngram"
        [[serve.tenants]]
        name = "search"
        keys = ["{KEY}", "SHA256:{"AB" * 32}", "{KEY}"]
        namespace = "a namespace"
        models = ["large", "large"]
        requests_per_minute = 600
        tokens_per_day = 0
        [[serve.tenants]]
        name = "second"
        keys = ["{"x" * 500}"]
        """
    ).serve
    assert (found.host, found.port) == ("0.0.0.0", 0)
    assert found.allowed_hosts == ("embeddings.internal", "::1", "10.0.0.1")
    assert found.admin_key == "sha256:" + hashlib.sha256(OTHER_KEY.encode()).hexdigest()
    assert (found.max_body, found.drain_timeout, found.state_dir) == (2**20, 60.0, here / "state")
    small, large = found.models
    assert (small.name, small.forward, small.provider.price) == (
        "owner/small model",
        ("truncate",),
        "1 USD / 1M tokens",
    )
    assert small.provider.cls is sender.Sender
    assert small.provider.options == {"dimensions": 32, "folder": here / "f"}
    assert (large.name, large.forward, large.provider.type) == ("large", (), "ngram")
    search, second = found.tenants
    assert (search.name, search.namespace, search.models) == ("search", "a namespace", ("large",))
    assert search.keys == (DIGEST, "sha256:" + "ab" * 32)
    assert (search.requests_per_minute, search.tokens_per_day) == (600.0, 0)
    assert (second.namespace, second.models) == ("second", None)
    assert (second.requests_per_minute, second.tokens_per_day) == (None, None)


def test_two_tenants_may_share_a_namespace() -> None:
    second = f'[[serve.tenants]]\nname = "b"\nnamespace = "search"\nkeys = ["{OTHER_KEY}"]\n'
    assert [tenant.namespace for tenant in load_text(NGRAM + TENANT + second).serve.tenants] == ["search", "search"]


def test_models_of_a_tenant_cannot_be_checked_without_served_models() -> None:
    (tenant,) = load_text(NGRAM + TENANT + 'models = ["any"]').serve.tenants
    assert tenant.models == ("any",)


def test_keys_come_from_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONE", KEY)
    monkeypatch.setenv("ALL", f"{KEY}, {OTHER_KEY}")
    text = NGRAM + '[serve]\nadmin_key = "${ADMIN:-an-administrator}"\n[[serve.tenants]]\nname = "a"\nkeys = '
    assert load_text(text + '["${ONE}"]').serve.tenants[0].keys == (DIGEST,)
    assert len(load_text(text + '"${ALL}"').serve.tenants[0].keys) == 2


def test_the_environment_overrides_the_table_but_no_model_and_no_tenant(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"PORT": "0", "ALLOWED_HOSTS": "a,b", "MAX_BODY": "2 kB", "ADMIN_KEY": KEY}.items():
        monkeypatch.setenv(f"EMBEDONCE__SERVE__{name}", text)
    found = load_text(NGRAM).serve
    assert (found.port, found.allowed_hosts, found.max_body, found.admin_key) == (0, ("a", "b"), 2000, DIGEST)
    monkeypatch.setenv("EMBEDONCE__SERVE__ADMIN_KEY", "too short")
    monkeypatch.setenv("EMBEDONCE__SERVE__TENANTS__SEARCH__KEYS", OTHER_KEY)
    monkeypatch.setenv("EMBEDONCE__SERVE__MODELS__SMALL__NAME", "x")
    monkeypatch.setenv("EMBEDONCE__SERVE__PROT", "1")
    assert problems_of(NGRAM + TENANT + MODEL) == [
        "EMBEDONCE__SERVE__ADMIN_KEY: must contain only printable ASCII characters, and no spaces",
        "the environment variable EMBEDONCE__SERVE__MODELS__SMALL__NAME overrides nothing: models and tenants cannot "
        "be overridden; write ${NAME} in their tables instead",
        "the environment variable EMBEDONCE__SERVE__PROT overrides nothing; did you mean EMBEDONCE__SERVE__PORT?",
        "the environment variable EMBEDONCE__SERVE__TENANTS__SEARCH__KEYS overrides nothing: models and tenants cannot "
        "be overridden; write ${NAME} in their tables instead",
    ]


def test_a_caller_with_an_own_provider_needs_neither_the_plugins_nor_the_keys() -> None:
    text = TIERS + '[serve]\nadmin_key = "${NOT_SET}"\n[[serve.models]]\nprovider = { type = "not installed" }'
    Path("embedonce.toml").write_text(text)
    assert config.load("embedonce.toml", own_provider=True).serve == config.ServeConfig()


# --- [provider] -------------------------------------------------------------------------------


def test_the_provider_may_be_missing_if_models_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    found = load_text(TIERS + MODEL)
    assert found.provider is None
    with config.compose(found) as cache, pytest.raises(ProviderError, match=r"add \[provider\]"):
        cache.embed("a")
    for text in (TIERS + TENANT, TIERS + "[serve]\nmodels = []"):
        assert problems_of(text)[0].startswith("embedonce.toml: [provider] is missing; add one")
    monkeypatch.setenv("EMBEDONCE__PROVIDER__DIMENSIONS", "3")
    assert problems_of(TIERS + MODEL) == ["the environment variable EMBEDONCE__PROVIDER__DIMENSIONS overrides nothing"]


@pytest.mark.parametrize("arguments", [["check"], ["embed", "-", "--out", "x.npy"], ["explain", "a"], ["forget", "a"]])
def test_a_command_that_embeds_names_the_missing_provider(arguments: list[str]) -> None:
    Path("embedonce.toml").write_text(TIERS + MODEL)
    done = CliRunner().invoke(app, arguments, input="a")
    assert done.exit_code == 2
    assert (
        "embedonce.toml: [provider] is missing, and only embedonce serve can use the providers of [[serve.models]]; "
        + ("check the file with `embedonce config`" if arguments == ["check"] else "add [provider]")
        in " ".join(done.stderr.split())
    )


@pytest.mark.parametrize("more", [MODEL, TENANT])
def test_purge_unused_is_refused_because_the_server_has_scopes_of_its_own(more: str) -> None:
    Path("embedonce.toml").write_text(NGRAM + more)
    done = CliRunner().invoke(app, ["purge", "--unused", "--yes"])
    assert done.exit_code == 2
    assert "would also remove vectors that embedonce serve uses" in done.stderr
    assert CliRunner().invoke(app, ["purge", "--namespace", "x", "--yes"]).exit_code == 0


# --- problems ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('hots = "a"', '5:1: unknown key "hots" in [serve]; did you mean "host"?'),
        ('host = ""', '5:8: host = "" in [serve]: must be a host name or an IP address, and must not be empty'),
        ('host = "http://x"', '5:8: host = "http://x" in [serve]: must be a host name or an IP address, without'),
        ("port = 65536", "5:8: port = 65536 in [serve]: must be at most 65535"),
        ("port = -1", "5:8: port = -1 in [serve]: must be at least 0"),
        ('port = "80"', '5:8: port = "80" in [serve]: must be a whole number'),
        ('allowed_hosts = ["a", "b:80"]', '5:23: allowed_hosts[1] = "b:80" in [serve]: must be a host name or an IP'),
        ('allowed_hosts = ["*"]', '5:18: allowed_hosts[0] = "*" in [serve]: wildcards and networks are not supported'),
        ('allowed_hosts = ["fd00::/8"]', '5:18: allowed_hosts[0] = "fd00::/8" in [serve]: wildcards and networks'),
        ('allowed_hosts = ["host/8"]', '5:18: allowed_hosts[0] = "host/8" in [serve]: must be a host name'),
        ("workers = 2", '5:1: unknown key "workers" in [serve]; use the option --workers of embedonce serve'),
        ('admin_key = "0123456789abcde"', "5:13: admin_key in [serve]: must have at least 16 characters"),
        ("max_body = 0", "5:12: max_body = 0 in [serve]: must be at least 1 KiB"),
        ('max_body = "1 zb"', '5:12: max_body = "1 zb" in [serve]: has an unknown unit'),
        ('max_body = "1 B"', '5:12: max_body = "1 B" in [serve]: must be at least 1 KiB'),
        ("drain_timeout = -1", "5:17: drain_timeout = -1 in [serve]: must be at least 0"),
        ('state_dir = ""', '5:13: state_dir in [serve]: must not be empty; write "."'),
        ("models = 3", "5:10: serve.models must be a list of tables: write [[serve.models]]"),
        ("models = [3]", "5:11: [[serve.models]] number 1 must be a table"),
        ("tenants = {}", "5:11: serve.tenants must be a list of tables: write [[serve.tenants]]"),
        ("price = 1", '5:1: unknown key "price" in [serve]; valid keys are host, port'),
        ("[[serve.tenant]]", '5:1: unknown key "tenant" in [serve]; did you mean "tenants"?'),
    ],
)
def test_the_message_of_each_problem_of_the_server(text: str, wanted: str) -> None:
    assert [problem[: len(wanted) + 15] for problem in problems_of(f"{NGRAM}[serve]\n{text}")] == [
        f"embedonce.toml:{wanted}"
    ]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('provider.type = "ngram"', '5:1: "name" is missing in [[serve.models]] number 1; add it: name of the model'),
        ('name = "a"', '5:1: "provider" is missing in [[serve.models]] "a"; add one, such as provider = { type ='),
        ('name = "a"\nprovider = "ngram"', '7:12: the provider of [[serve.models]] "a" must be a table'),
        (
            'name = "a"\nprovider = {}',
            '7:1: "type" is missing in the provider of [[serve.models]] "a"; add it: '
            'name of a plugin, such as type = "ngram"',
        ),
        (
            'name = "a"\nprovider.type = "ngrm"',
            '7:17: type in the provider of [[serve.models]] "a": no plugin "ngrm" is installed; did you mean "ngram"?',
        ),
        (
            'name = "a"\nprovider = { type = "ngram", dimension = 3 }',
            '7:30: unknown key "dimension" in the provider of [[serve.models]] "a"; did you mean "dimensions"?',
        ),
        (
            'name = "a"\nprovider = { type = "ngram", price = 1 }',
            '7:38: price = 1 in the provider of [[serve.models]] "a": must be written like',
        ),
        ('name = "a"\nprovider = { type = "ngram", fallback = {} }', '7:30: unknown key "fallback" in the provider of'),
        (
            'name = " a"\nprovider.type = "ngram"',
            '6:8: name = " a" in [[serve.models]] " a": must contain only printable',
        ),
        ('name = "a\\u0007"\nprovider.type = "ngram"', '6:8: name = "a\\u0007" in [[serve.models]] "a\\u0007": must'),
        ('name = ""\nprovider.type = "ngram"', '6:8: name = "" in [[serve.models]] "": must be the name of a model'),
        (
            f'name = "{"a" * 257}"\nprovider.type = "ngram"',
            f'6:8: name = "{"a" * 59}…" in [[serve.models]] "{"a" * 59}…": must have at most 256 characters',
        ),
        (
            'name = "a"\ntype = "ngram"\nprovider.type = "ngram"',
            '7:1: unknown key "type" in [[serve.models]] "a"; valid keys are name, forward and provider',
        ),
        (
            NGRAM_MODEL + 'forward = ["b"]',
            '8:1: forward in [[serve.models]] "a": the provider ngram cannot send other fields; remove "forward"',
        ),
        (
            SENDER_MODEL + 'forward = ["b", "b"]',
            '8:17: forward[1] in [[serve.models]] "a": the field is already listed',
        ),
        (
            SENDER_MODEL + 'forward = ["late_chunking"]',
            '8:12: forward[0] = "late_chunking" in '
            '[[serve.models]] "a": cannot be forwarded, because with this field the vector of a text depends on',
        ),
        (SENDER_MODEL + 'forward = [""]', '8:12: forward[0] = "" in [[serve.models]] "a": must be'),
        (SENDER_MODEL + 'forward = "b"', '8:11: forward = "b" in [[serve.models]] "a": must be a list'),
        (
            'name = "small"\nprovider.type = "ngram"\n' + MODEL,
            '9:8: name in [[serve.models]] "small": another model has this name',
        ),
    ],
)
def test_the_message_of_each_problem_of_a_model(sender: ModuleType, text: str, wanted: str) -> None:
    found = problems_of(f"{NGRAM}\n[[serve.models]]\n{text}")
    assert [problem[: len(wanted) + 15] for problem in found] == [f"embedonce.toml:{wanted}"]


@pytest.mark.parametrize("field", OWN_FIELDS)
def test_fields_that_the_server_reads_are_not_forwarded(sender: ModuleType, field: str) -> None:
    model = {"name": "a", "provider": {"type": "sender"}, "forward": [field]}
    assert problems_of({"tiers": [], "serve": {"models": [model]}}) == [
        f'forward[0] = "{field}" in [[serve.models]] "a": is a field that the server itself reads, so it cannot be '
        "forwarded"
    ]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (
            f'keys = ["{OTHER_KEY}"]',
            '11:1: "name" is missing in [[serve.tenants]] number 2; add it: name of',
        ),
        ('name = "b"', '11:1: "keys" is missing in [[serve.tenants]] "b"; add it: keys of the tenant.'),
        (
            f'name = "b"\nkeys = "{OTHER_KEY}"',
            '13:8: keys in [[serve.tenants]] "b": must be a list, such as ["${NAME}"]',
        ),
        ('name = "b"\nkeys = []', '13:8: keys in [[serve.tenants]] "b": must not be empty'),
        ('name = "b"\nkeys = ["0123456789abcde"]', '13:9: keys[0] in [[serve.tenants]] "b": must have at least 16'),
        ('name = "b"\nkeys = ["0123456789 abcdef"]', '13:9: keys[0] in [[serve.tenants]] "b": must contain only'),
        ('name = "b"\nkeys = ["0123456789äabcdef"]', '13:9: keys[0] in [[serve.tenants]] "b": must contain only'),
        (
            'name = "b"\nkeys = ["sha256:0123456789"]',
            '13:9: keys[0] in [[serve.tenants]] "b": must have 64 hexadecimal',
        ),
        ('name = "b"\nkeys = ["0123456789abcdef\\n"]', '13:9: keys[0] in [[serve.tenants]] "b": ends with a line end'),
        ('name = "b"\nkeys = [1234567890123456]', '13:9: keys[0] in [[serve.tenants]] "b": must be text'),
        (
            f'name = "b"\nkeys = ["{OTHER_KEY}", "{KEY}"]',
            '13:30: keys[1] in [[serve.tenants]] "b": [[serve.tenants]] '
            '"search" has the same key; a key must belong to one tenant',
        ),
        (
            f'name = "b"\nkeys = ["{DIGEST}"]',
            '13:9: keys[0] in [[serve.tenants]] "b": [[serve.tenants]] "search" has the',
        ),
        (
            f'name = "search"\nkeys = ["{OTHER_KEY}"]',
            '12:8: name in [[serve.tenants]] "search": another tenant has this',
        ),
        (f'name = "B"\nkeys = ["{OTHER_KEY}"]', '12:8: name = "B" in [[serve.tenants]] "B": must start with a letter'),
        (B + 'namespace = ""', '14:13: namespace = "" in [[serve.tenants]] "b": must be'),
        (
            B + 'namespace = "a/b"',
            '14:13: namespace = "a/b" in [[serve.tenants]] "b": must contain only printable characters, and no "/"',
        ),
        (B + "models = []", '14:10: models in [[serve.tenants]] "b": must not be empty'),
        (
            B + 'models = ["small", "smal"]',
            '14:20: models[1] = "smal" in '
            '[[serve.tenants]] "b": no [[serve.models]] has this name; did you mean "small"?',
        ),
        (
            B + 'models = ["other"]',
            '14:11: models[0] = "other" in [[serve.tenants]] '
            '"b": no [[serve.models]] has this name; the models are "small"',
        ),
        (B + "requests_per_minute = 0", "14:23: requests_per_minute = 0 in "),
        (B + "tokens_per_day = -1", "14:18: tokens_per_day = -1 in "),
        (B + "tokens_per_day = 1.5", "14:18: tokens_per_day = 1.5 in "),
        (B + "limit = 1", '14:1: unknown key "limit" in [[serve.tenants]] "b"'),
    ],
)
def test_the_message_of_each_problem_of_a_tenant(text: str, wanted: str) -> None:
    found = problems_of(f"{NGRAM}{MODEL}{TENANT}\n[[serve.tenants]]\n{text}")
    assert [problem[: len(wanted) + 15] for problem in found] == [f"embedonce.toml:{wanted}"]


@pytest.mark.parametrize("form", [KEY, DIGEST])
def test_the_admin_key_is_not_the_key_of_a_tenant(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    message = '[[serve.tenants]] "search" has the same key; choose a key that no tenant has'
    found = problems_of(f'{NGRAM}[serve]\nadmin_key = "{form}"\n{TENANT}')
    assert found == [f"embedonce.toml:5:13: admin_key in [serve]: {message}"]
    monkeypatch.setenv("EMBEDONCE__SERVE__ADMIN_KEY", form)
    assert problems_of(NGRAM + TENANT) == [f"EMBEDONCE__SERVE__ADMIN_KEY: {message}"]


def test_a_model_without_a_valid_name_hides_no_problem_and_causes_none() -> None:
    unnamed = '[[serve.models]]\nname = ""\nprovider.type = "ngram"\n'
    assert len(problems_of(NGRAM + MODEL + unnamed + TENANT + 'models = ["other"]')) == 1


def test_in_a_pyproject_tables_are_named_as_they_are_written() -> None:
    Path("pyproject.toml").write_text(
        '[tool.embedonce]\ntiers = []\n[[tool.embedonce.serve.models]]\nname = "a"\nprovider = { type = "ngrm" }\n'
    )
    with pytest.raises(ConfigError, match=r"the provider of \[\[tool\.embedonce\.serve\.models\]\] \"a\": no plugin"):
        config.load("pyproject.toml")


def test_code_of_a_models_repository_runs_only_in_a_file_that_is_named(sender: ModuleType) -> None:
    load_text(TIERS + '[[serve.models]]\nname = "a"\nprovider = { type = "sender", trust_remote_code = true }')
    with pytest.raises(ConfigError) as caught:
        config.load()
    assert str(caught.value).startswith(
        'embedonce.toml:4:51: trust_remote_code in the provider of [[serve.models]] "a" runs code from the model\'s'
    )


def test_a_plugin_that_is_not_allowed_serves_no_model(sender: ModuleType) -> None:
    text = '[plugins]\nallow = []\n[[serve.models]]\nname = "a"\nprovider = { type = "sender" }'
    (problem,) = problems_of(TIERS + text)
    assert problem.startswith('embedonce.toml:6:21: type in the provider of [[serve.models]] "a": ')
    assert "allow" in problem


# --- secrets ----------------------------------------------------------------------------------

SECRET = "hunter2-and-more-secrets"


@pytest.mark.parametrize(
    "serve",
    [
        {"admin_key": SECRET + " x"},
        {"admin_key": [SECRET]},
        {"admin_key": "sha256:" + SECRET},
        {"tenants": [{"name": "a", "keys": [SECRET, SECRET + " x"]}]},
        {"tenants": [{"name": "a", "keys": SECRET}]},
        {"tenants": [{"name": "a", "keys": {"a": SECRET}}]},
        {"tenants": [{"name": "a", "keys": [SECRET]}, {"name": "b", "keys": [SECRET]}]},
        {"tenants": [{"name": "a", "keys": ["${THE_SECRET} "]}]},
        {"tenants": [{"name": "${THE_SECRET} !", "keys": [KEY]}]},
        {"tenants": [{"name": "a", "keys": [KEY], "models": ["${THE_SECRET}"]}]},
        {"models": [{"name": "${THE_SECRET}\n", "provider": {"type": "ngram"}}]},
        {"models": [{"name": "a", "provider": {"type": "${THE_SECRET}"}}]},
        {"models": [{"name": "a", "provider": {"type": "sender", "api_key": [SECRET]}}]},
        {"models": [{"name": "a", "provider": {"type": "sender"}, "forward": ["${THE_SECRET}", "${THE_SECRET}"]}]},
    ],
)
def test_no_message_contains_a_secret(
    sender: ModuleType, monkeypatch: pytest.MonkeyPatch, serve: Mapping[str, Any]
) -> None:
    monkeypatch.setenv("THE_SECRET", SECRET)
    models = [{"name": "other", "provider": {"type": "ngram"}}, *serve.get("models", [])]
    assert SECRET not in str(problems_of({"tiers": [], "serve": {**serve, "models": models}}))


def test_keys_are_neither_shown_nor_part_of_a_repr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_NAMESPACE", "from outside")
    found = load_text(
        f'{NGRAM}[serve]\nadmin_key = "{OTHER_KEY}"\n{MODEL}{TENANT}namespace = "${{MY_NAMESPACE}}"\nmodels = ["small"]'
    )
    shown = {setting.name: (setting.value, setting.origin) for setting in found.settings()}
    assert shown["serve.admin_key"] == ("(hidden)", "embedonce.toml:5")
    assert shown["serve.port"] == (8080, "default")
    assert shown["serve.models.small.provider.type"] == ("ngram", "embedonce.toml:8")
    assert shown["serve.tenants.search.keys"] == ("(hidden)", "embedonce.toml:11")
    assert shown["serve.tenants.search.namespace"] == ("(hidden)", "embedonce.toml:12")
    assert shown["serve.tenants.search.models"] == (["small"], "embedonce.toml:13")
    for text in (repr(found), str(found.settings()), CliRunner().invoke(app, ["config"]).output):
        assert all(secret not in text for secret in (KEY, OTHER_KEY, DIGEST, *found.serve.tenants[0].keys))


def test_keys_count_as_secrets_of_a_document() -> None:
    serve = {"admin_key": KEY, "port": 1, "tenants": [{"name": "a", "keys": [KEY, "${A_KEY}"], "tokens_per_day": 1}]}
    assert config.secrets_in({"serve": serve}) == ["serve.admin_key", "serve.tenants[0].keys[0]"]


# --- equality ---------------------------------------------------------------------------------


def test_a_model_that_did_not_change_is_equal_after_it_moved(sender: ModuleType) -> None:
    sending = '[[serve.models]]\nname = "b"\nprovider = { type = "sender", dimensions = 8 }\nforward = ["x"]\n'
    before = load_text(TIERS + MODEL + sending + TENANT).serve
    after = load_text(TIERS + sending + MODEL + TENANT).serve
    assert before.models == after.models[::-1]
    assert before.tenants == after.tenants
    assert before != after
    assert before == load_text("# a comment\n" + TIERS + MODEL + sending + TENANT).serve
    changed = load_text(TIERS + MODEL + sending.replace("8", "9") + TENANT).serve
    assert changed.models[0] == before.models[0]
    assert changed.models[1] != before.models[1]
    assert load_text(TIERS + MODEL + TENANT.replace(KEY, OTHER_KEY)).serve.tenants != before.tenants


def test_configurations_of_the_same_cache_are_equal_whatever_is_served() -> None:
    assert load_text(NGRAM) == load_text(NGRAM + MODEL + TENANT)


# --- making providers -------------------------------------------------------------------------


def test_a_provider_is_made_with_changed_options(sender: ModuleType) -> None:
    found = load_text(
        TIERS + '[[serve.models]]\nname = "a"\nprovider = { type = "sender", dimensions = 8, extra_body = { a = 1 } }'
    )
    wanted = found.serve.models[0].provider
    assert config.list_options(wanted) == {
        "dimensions", "extra_body", "api_key", "fail", "folder", "trust_remote_code",
    }  # fmt: skip
    plain: Any = config.make_provider(found, wanted)
    changed: Any = config.make_provider(found, wanted, dimensions=16, extra_body={"b": 2})
    assert (plain.space("document").dimensions, plain.extra_body) == (8, {"a": 1})
    assert (changed.space("document").dimensions, changed.extra_body) == (16, {"b": 2})
    assert wanted.options == {"dimensions": 8, "extra_body": {"a": 1}}
    with pytest.raises(TypeError, match=r"the provider 'sender' does not have the option 'dimension'"):
        config.make_provider(found, wanted, dimension=4)


def test_a_provider_that_refuses_an_option_is_a_problem_at_its_table(sender: ModuleType) -> None:
    found = load_text(TIERS + '[[serve.models]]\nname = "a"\nprovider = { type = "sender" }')
    with pytest.raises(ConfigError) as caught:
        config.make_provider(found, found.serve.models[0].provider, fail="no route to host")
    assert str(caught.value) == (
        'embedonce.toml:4:1: the provider of [[serve.models]] "a" cannot be created: OSError: no route to host  None'
    ).replace("  ", " ")
    assert isinstance(caught.value.__cause__, OSError)


def test_the_error_of_a_provider_hides_its_secrets(sender: ModuleType) -> None:
    model = {"name": "a", "provider": {"type": "sender", "api_key": SECRET}}
    found = config.load({"tiers": [], "serve": {"models": [model]}})
    with pytest.raises(ConfigError) as caught:
        config.make_provider(found, found.serve.models[0].provider, fail="cannot reach")
    assert str(caught.value) == (
        'the provider of [[serve.models]] "a" cannot be created: OSError: (message hidden, because it '
        "contains a secret)"
    )
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_the_main_provider_can_be_made_again_with_changed_options() -> None:
    found = load_text(NGRAM)
    assert found.provider is not None
    provider = config.make_provider(found, found.provider, dimensions=16)
    assert provider.space("document").dimensions == 16


# --- keys as hashes ---------------------------------------------------------------------------


@given(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=16, max_size=40))
def test_a_key_and_its_digest_are_the_same_key(key: str) -> None:
    if key.lower().startswith("sha256:"):
        return
    digest = "SHA256:" + hashlib.sha256(key.encode()).hexdigest().upper()
    tenants = [
        config.load(
            {"tiers": [], "provider": {"type": "ngram"}, "serve": {"tenants": [{"name": "a", "keys": [each]}]}}
        ).serve.tenants
        for each in (key.replace("$", "$$"), digest)
    ]
    assert tenants[0] == tenants[1]
    assert key not in repr(tenants)


# --- the schema -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def validator() -> Any:
    schema = config.schema()
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(json.loads(json.dumps(schema)))


SAMPLES: list[tuple[str, bool]] = [
    (NGRAM + '[serve]\nhost = "::1"\nport = 0\nmax_body = "1 MiB"\ndrain_timeout = "1m"\nstate_dir = "x"', True),
    (NGRAM + '[serve]\nallowed_hosts = ["a.b"]\nadmin_key = "${NO_SUCH:-0123456789abcdef}"', True),
    (NGRAM + TENANT + f'models = ["small"]\nrequests_per_minute = 0.5\ntokens_per_day = 0\n{MODEL}', True),
    (NGRAM + f'[[serve.tenants]]\nname = "a"\nkeys = ["{DIGEST}", "${{X:-0123456789abcdef}}"]\nnamespace = "é"', True),
    (TIERS + MODEL + "forward = []", True),
    (TIERS, False),
    (TIERS + TENANT, False),
    (TIERS + "[serve]\nmodels = []", False),
    (NGRAM + "[serve]\nport = 65536", False),
    (NGRAM + '[serve]\nhost = ""', False),
    (NGRAM + '[serve]\nhots = "a"', False),
    (NGRAM + '[serve]\nadmin_key = "short"', False),
    (NGRAM + f'[serve]\nadmin_key = "{DIGEST[:-1]}"', False),
    (NGRAM + "[serve]\nmax_body = 1024", True),
    (NGRAM + "[serve]\nmax_body = 1023", False),
    (NGRAM + '[serve]\nstate_dir = ""', False),
    (NGRAM + '[[serve.models]]\nname = "a"', False),
    (NGRAM + '[[serve.models]]\nprovider.type = "ngram"', False),
    (NGRAM + '[[serve.models]]\nname = "a"\nprovider.type = "memory"', False),
    (NGRAM + '[[serve.models]]\nname = "a"\nprovider = { type = "ngram", fallback = { type = "ngram" } }', False),
    (NGRAM + '[[serve.models]]\nname = "a"\nprovider = { type = "ngram", price = 1 }', False),
    (NGRAM + MODEL + 'forward = ["input"]', False),
    (NGRAM + MODEL + "prices = 1", False),
    (NGRAM + '[[serve.tenants]]\nname = "a"', False),
    (NGRAM + '[[serve.tenants]]\nname = "a"\nkeys = []', False),
    (NGRAM + '[[serve.tenants]]\nname = "a"\nkeys = ["0123456789 abcdef"]', False),
    (NGRAM + TENANT.replace("search", "Search"), False),
    (NGRAM + TENANT + 'namespace = "a/b"', False),
    (NGRAM + TENANT + "models = []", False),
    (NGRAM + TENANT + "requests_per_minute = 0", False),
    (NGRAM + TENANT + "tokens_per_day = -1", False),
]


@pytest.mark.parametrize(("text", "is_valid"), SAMPLES)
def test_the_schema_and_the_loader_agree(validator: Any, text: str, is_valid: bool) -> None:
    document = tomllib.loads(text)
    try:
        config.load(document)
    except ConfigError:
        is_accepted = False
    else:
        is_accepted = True
    assert (is_accepted, validator.is_valid(document)) == (is_valid, is_valid)


def test_the_schema_describes_every_option(validator: Any) -> None:
    serve = validator.schema["properties"]["serve"]["properties"]
    tables = [serve, serve["models"]["items"]["properties"], serve["tenants"]["items"]["properties"]]
    assert [set(table) - {"models", "tenants", "provider"} for table in tables] == [
        set(options_of(cls)) - {"models"} for cls in (ServeTable, ServedModelTable, TenantTable)
    ]
    assert all("description" in option or "$ref" in option for table in tables for option in table.values())


# --- the docs page ----------------------------------------------------------------------------

PAGE = Path(__file__).parent.parent.parent / "docs" / "configuration.md"


@pytest.mark.parametrize("table", [ServeTable, ServedModelTable, TenantTable])
def test_the_page_lists_every_option(table: type[Any]) -> None:
    page = PAGE.read_text()
    for name in options_of(table):
        assert f"| `{name}` | " in page


def test_the_value_types_hold_no_defaults_that_differ_from_the_table() -> None:
    parameters = inspect.signature(config.ServeConfig).parameters
    assert {name: option.default for name, option in options_of(ServeTable).items()} == {
        name: parameters[name].default for name in options_of(ServeTable)
    }
