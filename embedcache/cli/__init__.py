"""The command line: parse, call, print. Every heavy import is inside the command that needs it.

Results go to stdout, progress and notes to stderr. Exit status: 0 done, 1 a failed check or run with a one-line
reason, 2 usage.
"""

from __future__ import annotations

import io
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click

from embedcache.cli import audits, caches, checks, completion, elsewhere, heads, predictions, sweeps
from embedcache.errors import EmbedcacheError, EmbedcacheWarning, Interrupted
from embedcache.version import __version__
from embedcache.wording import did_you_mean, shown


class Commands(click.Group):
    """A group that lists commands in the order in which they are used, and prints our errors on one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands' names in the order in which they were added."""
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, or name the nearest one there is."""
        name = args[0] if args else ""
        if name and not name.startswith("-") and self.get_command(ctx, name) is None:
            raise click.UsageError(f"There is no command {name!r}{did_you_mean(name, self.commands)}", ctx)
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="embedcache")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Run a frozen backbone once, cache its features, train heads on them in seconds."""
    if os.environ.get("NO_COLOR"):
        ctx.color = False


GROUPS = (caches, elsewhere, heads, predictions, sweeps, audits, checks, completion)
for command in (command for group in GROUPS for command in group.COMMANDS):
    completion.complete_more(command)
    cli.add_command(command)


def _usage(error: click.ClickException) -> str:
    """Return a usage error as one line that ends with where the options are listed."""
    message = " ".join(error.format_message().split()).rstrip(".")
    context = error.ctx if isinstance(error, click.UsageError) else None
    return f"{message}; see {context.command_path} --help" if context is not None else message


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status; a user's mistake costs one line on stderr."""
    given = None if arguments is None else list(arguments)
    return reported(lambda: cli.main(args=given, prog_name="embedcache", standalone_mode=False))


def reported(work: Callable[[], object]) -> int:
    """Do the work of a program and return its exit status, as the commands do: for scripts that use the API.

    Notes and what a user can mend are one line each on stderr, and so is Ctrl-C. ``work`` may return a status.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a name may hold what a terminal that is not UTF-8 cannot show
            stream.reconfigure(errors="backslashreplace")
    with _notes():
        return _status(work)


@contextmanager
def _notes() -> Iterator[None]:
    """Print our own warnings as ``note: ...``, each once."""
    told = set()
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if not issubclass(category, EmbedcacheWarning):
                if "PIL" not in str(where[0]).split(os.sep):  # of broken files we tell ourselves
                    usual(message, category, *where, **more)
            elif (note := str(message)) not in told:
                told.add(note)
                click.echo(f"note: {note}", err=True)

        warnings.showwarning = show
        warnings.simplefilter("always", EmbedcacheWarning)
        yield


def _status(work: Callable[[], object]) -> int:
    try:
        result = work()
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        click.echo(f"error: {shown(_usage(error))}", err=True)
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted: what was finished is kept; run the same command again to go on", err=True)
        return 1
    except Interrupted as error:
        click.echo(f"\n{error}", err=True)
        return error.exit_code
    except EmbedcacheError as error:
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError:
        click.echo(
            "error: out of memory: use fewer feature sets, shorter rows (extract --max-length) or more memory",
            err=True,
        )
        return 1
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, without importing torch
            raise
        click.echo("error: the device is out of memory: use smaller batches, or another device such as cpu", err=True)
        return 1
    except OSError as error:
        click.echo(shown(f"error: {error.filename or 'a file'}: {error.strerror or error}"), err=True)
        return 1
