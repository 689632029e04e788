"""Errors of the commands: one line on stderr, and the exit code."""

import sys
from collections.abc import Callable
from functools import wraps
from io import TextIOWrapper
from typing import Annotated, Any

import typer

from ..errors_pdlm import MissingPackageError, RefusedError, ServerError

# What a package that is not there belongs to, where nobody asks before it is imported.
EXTRAS = {"peft": "peft", "accelerate": "peft", "yaml": "peft"}


def fail(program: str, message: Any, code: int | None = None) -> typer.Exit:
    """Print the error and return the exception that ends the command.

    Args:
        program (`str`): name of the command.
        message: text or exception; line breaks are taken out.
        code (`int`, *optional*): 2: the call was wrong; 1: it could not be finished; 130: stopped by the user.
            Default: 1 for a server that does not work, or not any more, else 2.
    """
    if code is None:
        code = 1 if isinstance(message, ServerError) and not isinstance(message, RefusedError) else 2
    if isinstance(message, ModuleNotFoundError) and message.name in EXTRAS:
        message = MissingPackageError(message.name, EXTRAS[message.name])
    elif isinstance(message, OSError) and message.filename is not None:
        message = f"{message.filename}: {message.strerror}"
    typer.echo(f"{program}: {' '.join(str(message).split())}", err=True)
    return typer.Exit(code)


def make_app(program: str, text: str) -> typer.Typer:
    """A command of this project: one look, help when called without arguments, and `--version`.

    Args:
        program (`str`): its name.
        text (`str`): its help.
    """
    app = typer.Typer(help=text, no_args_is_help=True, rich_markup_mode=None)

    def show(asked: bool) -> None:
        if asked:
            from .. import __version__

            typer.echo(f"{program} {__version__}")
            raise typer.Exit()

    @app.callback()
    def options(
        version: Annotated[
            bool, typer.Option("--version", help="Print the version and exit.", callback=show, is_eager=True)
        ] = False,
    ) -> None:
        """The options of the command itself; they do their work while they are parsed."""
        if isinstance(sys.stdout, TextIOWrapper):  # file names may be no Unicode, captions no letters of the terminal
            sys.stdout.reconfigure(errors="backslashreplace")

    return app


def exit_on_error(program: str) -> Callable[[Callable], Callable]:
    """Decorator of a command of `program`: errors of its user become [`fail`]."""

    def decorate(command: Callable) -> Callable:
        @wraps(command)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            try:
                return command(*args, **kwargs)
            except (ValueError, OSError, ImportError) as error:  # PdlmError, and what libraries raise for bad input
                raise fail(program, error) from None
            except MemoryError as error:
                raise fail(program, f"out of memory: {error}", 1) from None
            except RuntimeError as error:
                if type(error).__name__ != "OutOfMemoryError":  # torch's, which costs seconds to import
                    raise
                raise fail(program, f"out of memory: {error}", 1) from None
            except KeyboardInterrupt:
                raise fail(program, "stopped. What is done is kept; run the same command to go on.", 130) from None

        return wrapped

    return decorate
