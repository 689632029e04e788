"""`pdlm check`: is a checkpoint whole, what does it need, how will it run here."""

import json
from typing import Annotated, Any

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
        for line in _lines(found):
            typer.echo(line)
    for fault in found.faults[:_SHOWN]:
        typer.echo(f"pdlm: {fault}", err=True)
    if (more := len(found.faults) - _SHOWN) > 0:
        typer.echo(f"pdlm: and {more} more faults; --json lists all", err=True)
    if found.faults:
        raise typer.Exit(1)


def _lines(found: Any) -> list[str]:
    """What was found, for people."""
    lines = [f"model     {found.model}"]
    if found.kind is not None:
        what = {"regions": "PerceptionDLM (captions of regions)", "chat": "PerceptionDLM-Base (chat)"}[found.kind]
        lines[0] += f": {what}" + (", names of the reference" if found.layout == "reference" else "")
    if weights := found.weights:
        types = ", ".join(f"{_size(size)} {dtype}" for dtype, size in weights["bytes"].items())
        lines.append(f"weights   {weights['parameters']:,} parameters; {types} in {_files(weights['files'])}")
    if memory := found.memory:
        lines.append(
            f"memory    about {_size(memory['one_image'])} for one image: weights {_size(memory['weights'])}, "
            f"prefix cache {_size(memory['prefix_cache'])}, activations {_size(memory['activations'])}"
        )
    own = found.machine
    gpus = "; ".join(f"{gpu['name']}, {_size(gpu['free'])} of {_size(gpu['memory'])} free" for gpu in own["gpus"])
    ram = f", {_size(own['free_ram'])} of {_size(own['ram'])} free" if own["free_ram"] else ""
    lines.append(f"machine   torch {own['torch']}, {own['cpus']} CPUs{ram}; {gpus or 'no GPU'}")
    if settings := found.settings:
        lines.append(f"runs on   {settings['device']} in {settings['dtype']}")
        chosen = ", ".join(f"{name}={value!r}" for name, value in settings["generate"].items())
        lines.append(f"generate  {chosen or 'defaults'}")
        if "canvas" in settings:
            lines.append(f"passes    {settings['canvas']}")
    lines += [f"note      {note}" for note in found.notes]
    count = len(found.faults)
    return [*lines, "whole     yes" if not count else f"whole     no: {count} fault{'s' * (count > 1)}"]


def _files(count: int) -> str:
    return f"{count} file{'s' * (count > 1)}"


def _size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"
