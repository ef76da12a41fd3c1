"""``embedonce serve`` refuses what it cannot serve, before it starts anything."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from embedonce import config
from embedonce.cli import app
from embedonce.cli.serve import choose_base_url, describe_server
from embedonce.errors import ConfigError

KEY = "key-of-the-search-team"
TENANT = f'[[serve.tenants]]\nname = "search"\nkeys = ["{KEY}"]\n'
PLAIN = '[provider]\ntype = "ngram"\n[[tiers]]\ntype = "memory"\n'


def run(folder: Path, *arguments: str, text: str = PLAIN) -> tuple[int, str]:
    """Return the exit code and the messages of the command."""
    file = folder / "embedonce.toml"
    file.write_text(text)
    result = CliRunner().invoke(app, ["serve", "--config", str(file), *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stderr


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_port_in_use_is_an_error(tmp_path: Path, workers: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        code, messages = run(tmp_path, "--port", port, "--workers", workers)
    assert code == 1
    assert messages.strip() == (
        f"error: port {port} of 127.0.0.1 is in use by another program; stop that program, or choose another port "
        "with --port (0: any free port)"
    )


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1"])
def test_other_machines_can_connect_only_if_there_are_tenants(tmp_path: Path, host: str) -> None:
    code, messages = run(tmp_path, "--host", host, "--port", "0")
    assert code == 2
    assert f"other machines can connect to {host}, but the configuration has no [[serve.tenants]]" in messages
    assert "add a [[serve.tenants]] with a key, or listen on 127.0.0.1" in messages


def test_a_name_is_safe_only_if_all_its_addresses_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*_: object, **__: object) -> list[object]:
        return [
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0)),
            (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0)),
        ]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    code, messages = run(tmp_path, "--host", "mostly-local", "--port", "0")
    assert code == 2
    assert "other machines can connect to 192.0.2.1" in messages


def test_an_address_of_another_machine_is_an_error(tmp_path: Path) -> None:
    code, messages = run(tmp_path, "--host", "192.0.2.1", "--port", "0", text=PLAIN + TENANT)
    assert code == 1
    assert "this machine does not have the address (192.0.2.1: " in messages
    assert KEY not in messages


def test_an_unknown_host_is_an_error(tmp_path: Path) -> None:
    code, messages = run(tmp_path, "--host", "no-such-host.invalid")
    assert code == 1
    assert "the host 'no-such-host.invalid' has no address" in messages


def test_an_invalid_configuration_is_an_error(tmp_path: Path) -> None:
    code, messages = run(tmp_path, text=PLAIN + "[serve]\nport = 70000\n")
    assert code == 2
    assert "embedonce.toml:6:8: port = 70000 in [serve]" in messages


def test_a_tier_that_cannot_be_created_is_an_error_of_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "vectors").write_text("not a folder")
    code, messages = run(tmp_path, "--port", "0", text=PLAIN.replace('"memory"', '"disk"\npath = "vectors"'))
    assert code == 2
    assert messages.count("error: ") == 1
    assert "embedonce.toml:3:1: [[tiers]]" in messages


@pytest.mark.parametrize("arguments", [["--port", "70000"], ["--workers", "0"]])
def test_options_out_of_range_are_refused(tmp_path: Path, arguments: list[str]) -> None:
    assert run(tmp_path, *arguments)[0] == 2


@pytest.mark.parametrize(("port", "wanted"), [("70000", "at most 65535, got 70000"), ("-1", "at least 0, got -1")])
def test_the_message_about_a_port_is_worded_as_in_the_file(tmp_path: Path, port: str, wanted: str) -> None:
    assert run(tmp_path, "--port", port) == (2, f"error: --port must be {wanted}\n")


def test_the_message_at_startup_says_how_to_use_the_server(tmp_path: Path) -> None:
    file = tmp_path / "embedonce.toml"
    file.write_text(PLAIN + TENANT + TENANT.replace("search", "shop"))
    lines = describe_server(config.load(file), ["http://127.0.0.1:80", "http://[::1]:80"], ["a", "b"], 2)
    assert lines == [
        "listening on http://127.0.0.1:80 and http://[::1]:80 (2 workers)",
        "  models:   a, b",
        "  tiers:    memory",
        "  tenants:  2 tenants; each request needs a key",
        "  base_url: http://127.0.0.1:80/v1",
    ]
    assert choose_base_url(["http://0.0.0.0:80"]) == "http://127.0.0.1:80/v1"
    assert choose_base_url(["http://[::]:80"]) == "http://[::1]:80/v1"


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from embedonce_server import serving

    monkeypatch.setattr(serving, "LIBRARIES", ("orjson", "no_such_library"))
    code, messages = run(tmp_path)
    assert code == 2
    assert messages.strip() == "error: embedonce serve requires no_such_library: pip install 'embedonce[serve]'"


# --- warnings at startup --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tiers", "workers", "is_warned"),
    [
        ('[[tiers]]\ntype = "memory"\n', 2, True),
        ("", 2, True),
        ('[[tiers]]\ntype = "memory"\n', 1, False),
        ('[[tiers]]\ntype = "memory"\n[[tiers]]\ntype = "disk"\npath = "vectors"\n', 2, False),
        ('[[tiers]]\ntype = "redis"\nurl = "redis://localhost"\n', 2, False),
    ],
)
def test_several_workers_without_a_shared_tier_are_a_warning(
    tmp_path: Path, tiers: str, workers: int, is_warned: bool
) -> None:
    from embedonce_server.serving import list_warnings

    file = tmp_path / "embedonce.toml"
    file.write_text(("" if tiers else "tiers = []\n") + '[provider]\ntype = "ngram"\n' + tiers)
    found = list_warnings(config.load(file), workers, [])
    assert len(found) == is_warned
    assert all("no tier is shared by the 2 workers" in warning for warning in found)


def test_an_open_address_without_allowed_hosts_is_a_warning(tmp_path: Path) -> None:
    from embedonce_server.serving import list_warnings

    file = tmp_path / "embedonce.toml"
    file.write_text(PLAIN + TENANT)
    (warning,) = list_warnings(config.load(file), 1, ["0.0.0.0"])
    assert "allowed_hosts in [serve] is empty, so their requests get status 403" in warning
    assert list_warnings(config.load(file), 1, []) == []
    file.write_text(PLAIN + '[serve]\nallowed_hosts = ["embeddings.internal"]\n' + TENANT)
    assert list_warnings(config.load(file), 1, ["0.0.0.0"]) == []


# --- texts of configurations, which a supervisor sends to its workers ---------------------------


def test_a_text_that_was_read_before_is_loaded_as_its_file(tmp_path: Path) -> None:
    file = tmp_path / "embedonce.toml"
    text = '[provider]\ntype = "ngram"\n[[tiers]]\ntype = "disk"\npath = "vectors"\n'
    file.write_text(text)
    before = config.load(file)
    file.write_text("changed")
    after = config.load_text(text, file)
    assert after == before
    assert after.tiers[0].options["path"] == tmp_path / "vectors"
    with pytest.raises(ConfigError) as raised:
        config.load_text("[cache]\nmode = 1\n", file)
    assert {(problem.line, problem.column) for problem in raised.value.problems} >= {(2, 8)}


def test_a_table_of_pyproject_is_loaded_from_its_text(tmp_path: Path) -> None:
    text = '[project]\nname = "x"\n[tool.embedonce]\nprovider = { type = "ngram" }\ntiers = []\n'
    assert config.load_text(text, tmp_path / "pyproject.toml").tiers == ()


# --- sockets ------------------------------------------------------------------------------------


def test_all_addresses_of_a_host_get_the_same_port() -> None:
    from embedonce_server.connections.listening import Address, bind_addresses, format_url

    addresses = [Address(socket.AF_INET, ("127.0.0.1", 0)), Address(socket.AF_INET, ("127.0.0.2", 0))]
    listeners = bind_addresses(addresses, 0)
    try:
        ports = {listener.getsockname()[1] for listener in listeners}
        assert len(listeners) == 2
        assert len(ports) == 1
        assert format_url(listeners[1]) == f"http://127.0.0.2:{ports.pop()}"
    finally:
        for listener in listeners:
            listener.close()


@pytest.mark.parametrize(
    ("ip", "is_loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.9.9", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("::ffff:10.0.0.1", False),
        ("fe80::1%lo", False),
        ("10.0.0.1", False),
    ],
)
def test_only_loopback_addresses_are_out_of_reach(ip: str, is_loopback: bool) -> None:
    from embedonce_server.connections.listening import Address

    assert Address(socket.AF_INET6, (ip, 0)).is_loopback is is_loopback
