"""The list of commands, and the exit code and message of every error that a command raises."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from embedonce.errors import ConfigError, EmbedonceError, EraseIncomplete, PluginError, SpaceError

from . import compact as _compact
from . import conformance as _conformance
from . import copy as _copy
from . import embed as _embed
from . import evaluate as _evaluate
from . import export as _export
from . import forget as _forget
from . import import_vectors as _import
from . import init as _init
from . import inspect as _inspect
from . import migrate as _migrate
from . import new as _new
from . import purge as _purge
from . import savings as _savings
from . import serve as _serve
from .options import given_options
from .output import (
    FAILED,
    INTERRUPTED,
    USAGE,
    Failed,
    Refused,
    describe_os_error,
    emit_config_error,
    reserve_stdout,
    say,
    say_config_error,
    tolerate_broken_consoles,
)

EPILOG = """
Examples:

embedonce init

embedonce check

embedonce embed docs/ --out docs.npy

embedonce explain "one text" --json

Exit codes: 0 success, 1 something failed, 2 invalid usage or configuration, 130 interrupted.
"""


class Command(TyperCommand):
    """Runs a command with standard output reserved for its results.

    With ``--json``, the problems of a configuration are a result too.
    """

    def invoke(self, ctx: Any) -> Any:
        is_default = {None, "DEFAULT", "DEFAULT_MAP"}
        sources = {name: getattr(ctx.get_parameter_source(name), "name", None) for name in ctx.params}
        given_options.set(frozenset(name for name, source in sources.items() if source not in is_default))
        with reserve_stdout():
            try:
                return super().invoke(ctx)
            except ConfigError as error:
                if ctx.params.get("json"):
                    emit_config_error(error)
                raise


class Commands(TyperGroup):
    """Turns errors into messages and exit codes, for all commands."""

    def main(self, *arguments: Any, **options: Any) -> Any:
        with tolerate_broken_consoles():
            return super().main(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ConfigError as error:
            say_config_error(error)
            raise typer.Exit(USAGE) from None
        except (Refused, PluginError, SpaceError) as error:
            say(f"error: {error}")
            raise typer.Exit(USAGE) from None
        except EraseIncomplete as error:
            say(f"error: {error}")
            for tier, reason in error.tiers.items():
                say(f"  {tier}: {reason}")
            raise typer.Exit(FAILED) from None
        except Failed as error:
            say(f"error: {error}")
            raise typer.Exit(FAILED) from None
        except EmbedonceError as error:
            say(f"error: {type(error).__name__}: {error}")
            raise typer.Exit(FAILED) from None
        except BrokenPipeError:
            raise  # the reader of the output is gone; typer exits without a message
        except OSError as error:
            say(f"error: {describe_os_error(error)}")
            raise typer.Exit(FAILED) from None
        except KeyboardInterrupt:
            say("interrupted")
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    name="embedonce",
    cls=Commands,
    help="Embed each text once: a tiered cache for text embeddings.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
    # A traceback with local variables would show texts and secrets.
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_requested: bool) -> None:
    if is_requested:
        from importlib.metadata import version

        print(version("embedonce"))
        raise typer.Exit


@app.callback()
def _set_global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None: ...


app.command(cls=Command, epilog=_init.EPILOG)(_init.init)
app.command(cls=Command, epilog=_inspect.CHECK_EPILOG)(_inspect.check)
app.command(cls=Command, epilog=_inspect.CONFIG_EPILOG)(_inspect.config)
app.command(cls=Command, epilog=_embed.EPILOG)(_embed.embed)
app.command("import", cls=Command, epilog=_import.EPILOG)(_import.import_vectors)
app.command(cls=Command, epilog=_export.EPILOG)(_export.export)
app.command(cls=Command, epilog=_copy.EPILOG)(_copy.copy)
app.command(cls=Command, epilog=_inspect.EXPLAIN_EPILOG)(_inspect.explain)
app.command(cls=Command, epilog=_evaluate.EPILOG)(_evaluate.evaluate)
app.command(cls=Command, epilog=_inspect.STATS_EPILOG)(_inspect.stats)
app.command(cls=Command, epilog=_savings.EPILOG)(_savings.savings)
app.command(cls=Command, epilog=_serve.EPILOG)(_serve.serve)
app.command(cls=Command, epilog=_forget.EPILOG)(_forget.forget)
app.command(cls=Command, epilog=_purge.EPILOG)(_purge.purge)
app.command(cls=Command, epilog=_compact.EPILOG)(_compact.compact)
app.command(cls=Command, epilog=_migrate.EPILOG)(_migrate.migrate)
app.command(cls=Command, epilog=_inspect.PLUGINS_EPILOG)(_inspect.plugins)
app.command(cls=Command, epilog=_inspect.SCHEMA_EPILOG)(_inspect.schema)
app.command(cls=Command, epilog=_new.EPILOG)(_new.new)
app.command(cls=Command, epilog=_conformance.EPILOG)(_conformance.conformance)


def run() -> None:
    """Run the command line and exit with its code."""
    if os.environ.get("NO_COLOR"):
        from typer import rich_utils  # typer imports it only for help, and the import takes a quarter of the start-up

        rich_utils.COLOR_SYSTEM = None  # with NO_COLOR alone, rich would still write bold and dim text
    app(prog_name="embedonce")
