"""``embedonce serve``: one cache behind OpenAI's embeddings endpoint, for every program and every language."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from .opened import describe_source
from .options import ConfigOption
from .output import OK, TERMINATED, Failed, Refused

if TYPE_CHECKING:
    from collections.abc import Sequence

    from embedonce.config import Config

EPILOG = """
Examples:

embedonce serve

embedonce serve --port 9000 --workers 4

embedonce serve --config embedonce.toml --host 0.0.0.0 --access-log

The server listens on 127.0.0.1, unless --host or host in \\[serve] is another address. To listen on an address that
other machines can reach, the configuration must have tenants with keys.

SIGHUP reloads \\[serve], its models and its tenants. After SIGTERM or Ctrl-C, the server answers the current requests
for up to drain_timeout and then exits. A second signal stops it at once.

Exit codes: 0: stopped by SIGTERM. 1: cannot use the address, the port or state_dir. 2: invalid usage or configuration.
130: stopped by Ctrl-C. 143: stopped by SIGTERM before it was ready, or at once by a second SIGTERM.
"""


MAX_PORT = 65535


def serve(
    config: ConfigOption = None,
    host: Annotated[
        str | None,
        typer.Option(
            "--host",
            metavar="HOST",
            help="Address or host name to listen on. Default: host in \\[serve], or 127.0.0.1.",
        ),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            "--port",
            metavar="PORT",
            help="Port to listen on; 0: any free port. Default: port in \\[serve], or 8080.",
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option("--workers", metavar="N", min=1, max=256, help="Number of processes that answer requests.")
    ] = 1,
    access_log: Annotated[
        bool, typer.Option("--access-log", help="Log one line per request, without its texts and its key.")
    ] = False,
) -> None:
    """Serve the cache to programs in every language, through OpenAI's API for embeddings."""
    from embedonce.config import load
    from embedonce_server.connections.listening import CannotListen
    from embedonce_server.run_folder import NoStateFolder
    from embedonce_server.serving import Started, Terminated, find_missing_library, serve

    if port is not None and not 0 <= port <= MAX_PORT:
        bound = "at least 0" if port < 0 else f"at most {MAX_PORT}"
        raise Refused(f"--port must be {bound}, got {port}")
    if missing := find_missing_library():
        raise Refused(f"embedonce serve requires {missing}: pip install 'embedonce[serve]'")
    described: list[Config] = []

    def load_and_describe() -> Config:
        loaded = load(config)
        if not described:
            describe_source(loaded)
            described.append(loaded)
        return loaded

    def describe(started: Started) -> list[str]:
        return describe_server(started.config, started.urls, started.models, started.workers)

    try:
        code = serve(
            load_and_describe, host=host, port=port, workers=workers, has_access_log=access_log, describe=describe
        )
    except (CannotListen, NoStateFolder) as error:
        raise Failed(str(error)) from None
    except Terminated:
        raise typer.Exit(TERMINATED) from None
    if code != OK:
        raise typer.Exit(code)


def describe_server(config: Config, urls: Sequence[str], models: Sequence[str], workers: int) -> list[str]:
    """Return the lines that a server shows when it is ready."""
    serve = config.serve
    count = len(serve.tenants)
    tenants = f"{count} tenant{'s' if count > 1 else ''}; each request needs a key" if count else "none; no key needed"
    processes = "1 worker" if workers == 1 else f"{workers} workers"
    return [
        f"listening on {' and '.join(urls)} ({processes})",
        f"  models:   {', '.join(models)}",
        f"  tiers:    {', '.join(tier.name for tier in config.tiers) or 'none'}",
        f"  tenants:  {tenants}",
        f"  base_url: {choose_base_url(urls)}",
    ]


def choose_base_url(urls: Sequence[str]) -> str:
    """Return the URL that programs on this machine use. An address that stands for all addresses cannot be used."""
    url = urls[0].replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")
    return f"{url}/v1"
