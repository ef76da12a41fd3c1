"""What ``embedonce serve`` runs: one worker in this process, or a supervisor with several worker processes."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec

from embedonce.config import Config

from .connections.listening import bind_addresses, format_url, list_open_addresses, resolve_host
from .processes.launch import Launch, Source
from .processes.logs import set_up_logging
from .processes.reloading import Reloads, check_reach
from .processes.supervisor import Supervisor
from .run_folder import open_run_folder
from .tenants.budget_file import recover_budgets

LIBRARIES = ("httptools", "orjson", "prometheus_client", "starlette", "uvicorn", "uvloop")
"""What the extra ``serve`` installs."""

log = logging.getLogger("embedonce.serve")


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """A server that answers requests, for the message at startup."""

    config: Config
    urls: Sequence[str]
    models: Sequence[str]
    workers: int


def find_missing_library() -> str | None:
    """Return the name of a library that is not installed; None if all are."""
    return next((name for name in LIBRARIES if find_spec(name) is None), None)


class Terminated(BaseException):
    """SIGTERM arrived before the server was ready."""


def serve(
    load: Callable[[], Config],
    *,
    host: str | None = None,
    port: int | None = None,
    workers: int = 1,
    has_access_log: bool = False,
    describe: Callable[[Started], Sequence[str]],
) -> int:
    """Serve until a signal ends that, and return the exit code.

    ``load`` reads the configuration, at startup and for each reload. ``host`` and ``port`` replace those of
    ``[serve]``. ``describe`` returns the lines that are written to standard error once requests are answered.

    Raises:
        CannotListen: the address or the port cannot be used.
        ConfigError: the configuration cannot be used.
        NoStateFolder: the budgets of tenants cannot be kept.
    """
    template = Launch(source=Source(data={}), host=host, port=port, run="", state="")

    def load_with_options() -> Config:
        return template.apply_options(load())

    config = load_with_options()
    addresses = resolve_host(config.serve.host)
    open_addresses = list_open_addresses(addresses)
    check_reach(config, open_addresses)
    with ExitStack() as stack:
        sockets = bind_addresses(addresses, config.serve.port)
        for listener in sockets:
            stack.callback(listener.close)
        lines = set_up_logging()
        stack.callback(lines.close)
        for warning in list_warnings(config, workers, open_addresses):
            log.warning("%s", warning)
        previous = signal.signal(signal.SIGTERM, _terminate)
        stack.callback(signal.signal, signal.SIGTERM, previous)
        stack.callback(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT))
        stack.callback(signal.signal, signal.SIGHUP, signal.signal(signal.SIGHUP, signal.SIG_IGN))
        folder, locks = stack.enter_context(open_run_folder(config))
        recover_budgets(folder.budgets)
        launch = Launch(
            source=Source.of(config),
            workers=workers,
            host=host,
            port=port,
            run=str(folder.path),
            state=str(folder.state),
            has_access_log=has_access_log,
            listeners=[listener.fileno() for listener in sockets],
            locks=locks,
            supervisor=os.getpid(),
        )
        urls = [format_url(listener) for listener in sockets]
        reloads = Reloads(load_with_options, config, open_addresses, keeps_budgets=folder.is_lasting)

        def announce(models: Sequence[str]) -> None:
            for line in describe(Started(config=config, urls=urls, models=models, workers=workers)):
                lines.write_line(line)

        if workers == 1:
            # It imports the libraries of the extra, which a supervisor and find_missing_library() do without.
            from .processes.lone_worker import LoneWorker

            signals = LoneWorker(launch, config, sockets, reloads, announce).run()
        else:
            signals = Supervisor(launch, config, sockets, reloads, announce).run()
    is_ordered = len(signals) == 1 and signals[0] in (signal.SIGTERM, signal.SIGHUP)
    return 0 if is_ordered else 128 + signals[-1] if signals else 1


def list_warnings(config: Config, workers: int, open_addresses: Sequence[str]) -> list[str]:
    """Return what is probably a mistake in how the server is started, one message each."""
    found = []
    if workers > 1 and all(tier.scope in ("process", "single") or tier.is_read_only for tier in config.tiers):
        found.append(
            f"no tier is shared by the {workers} workers, so each worker computes every text itself; add a disk tier "
            "or a network tier"
        )
    if open_addresses and not config.serve.allowed_hosts:
        found.append(
            f"other machines can connect, but allowed_hosts in {config.document.table('serve')} is empty, so their "
            "requests get status 403; add the names and addresses that clients use"
        )
    return found


def _terminate(number: int, frame: object) -> None:
    raise Terminated
