"""`pdlm check`: is a checkpoint whole, what does it need, how will it run here."""

import json
from typing import Annotated

import typer

from .options import exit_on_error

_SHOWN = 10  # faults of a kind of damage that may have thousands


@exit_on_error
def check(
    model: Annotated[
        str | None, typer.Argument(help="Checkpoint folder or hub id; default: the embedded one.", show_default=False)
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a checkpoint without loading its weights: files, names and shapes, memory, settings chosen here."""
    from ..captioning.checkpoints import CHECKPOINT
    from ..captioning.inspection import inspect_checkpoint

    found = inspect_checkpoint(CHECKPOINT if model is None else model)
    if as_json:
        typer.echo(json.dumps(found.to_dict()))
    else:
        for line in found.lines():
            typer.echo(line)
    for fault in found.faults[:_SHOWN]:
        typer.echo(f"pdlm: {fault}", err=True)
    if (more := len(found.faults) - _SHOWN) > 0:
        typer.echo(f"pdlm: and {more} more faults; --json lists all", err=True)
    if found.faults:
        raise typer.Exit(1)
