"""What the commands say when something goes wrong: one line on stderr, and the exit code."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import typer

from .replies import JudgeError


def fail(program: str, message: Any, code: int = 2) -> typer.Exit:
    """Say why, and give what is to be raised.

    Args:
        program (`str`): name of the command.
        message: text or exception; line breaks are taken out.
        code (`int`): 2: the call was wrong; 1: it could not be finished; 130: stopped by the user.
    """
    typer.echo(f"{program}: {' '.join(str(message).split())}", err=True)
    return typer.Exit(code)


def says_why(program: str) -> Callable[[Callable], Callable]:
    """Decorator of a command of `program`: errors of its user become [`fail`]."""

    def decorate(command: Callable) -> Callable:
        @wraps(command)
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            try:
                return command(*args, **kwargs)
            except (ValueError, OSError, ImportError, JudgeError) as error:
                raise fail(program, error) from None
            except KeyboardInterrupt:
                raise fail(program, "stopped. What is done is kept; run the same command to go on.", 130) from None

        return wrapped

    return decorate
