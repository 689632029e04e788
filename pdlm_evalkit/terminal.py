"""Tables and progress bars of the commands."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

WIDTH = 160  # characters of a line where the output is not a terminal


def show_table(table: RenderableType) -> None:
    """Print a table on stdout, as wide as the terminal."""
    Console(width=None if Console().is_terminal else WIDTH).print(table)


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a progress bar on stderr, if that is a terminal.

    Args:
        what (`str`): the unit of the counts, for example "questions".

    Yields:
        the function to call with the number of finished ones and of all.
    """
    columns = (TextColumn(what), *Progress.get_default_columns()[1:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what)
        yield lambda done, total: bar.update(task, completed=done, total=total)
