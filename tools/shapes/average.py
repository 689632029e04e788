"""Average a trained checkpoint with the one that its training began with.

python -m tools.shapes.average runs/joint --start pdlm_hf/shapes/checkpoint --share 0.7 --out runs/averaged
"""

import json
from pathlib import Path
from typing import Annotated

import torch
import typer

from pdlm_hf.modeling_pdlm import PdlmForConditionalGeneration
from pdlm_hf.processing_pdlm import PdlmProcessor

from .train import record_of, save


def main(
    run: Annotated[Path, typer.Argument(help="Folder of a finished training run.")],
    start: Annotated[Path, typer.Option(help="The checkpoint that it was initialised from.")],
    share: Annotated[float, typer.Option(help="Of the run in every weight.", min=0, max=1)],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
) -> None:
    """Write the average, with a record of how it came about."""
    model, first = (PdlmForConditionalGeneration.from_pretrained(folder) for folder in (run, start))
    before = json.loads((run / "training.json").read_text()).get("initialised_from")
    if before != json.loads((start / "training.json").read_text()):
        raise typer.BadParameter(f"{run} was not initialised from it.", param_hint="--start")
    with torch.no_grad():
        for weight, old in zip(model.parameters(), first.parameters(), strict=True):
            weight.lerp_(old, 1 - share)
    command = f"python -m tools.shapes.average --start {start.name} --share {share:g}"
    save(model, PdlmProcessor.from_pretrained(run), out, record_of(model, command, run, 0, 0, None))


if __name__ == "__main__":
    typer.run(main)
