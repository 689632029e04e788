"""Put a trained run into the package, with its score on held-out pictures beside it.

python -m pdlm_hf.shapes.ship runs/isolated --images 1000
"""

import json
import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer

from ..modeling_pdlm import PdlmForConditionalGeneration
from ..processing_pdlm import PdlmProcessor
from . import CHECKPOINT
from .evaluate import evaluate


def main(
    run: Annotated[Path, typer.Argument(help="Folder of a finished training run.")],
    images: Annotated[int, typer.Option(help="Held-out pictures to score it on.")] = 1000,
    seed: Annotated[int, typer.Option(help="Which pictures.")] = 11,
    threshold: Annotated[float, typer.Option(help="Its default acceptance threshold.")] = 0.8,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Copy the checkpoint into the package and record its score."""
    torch.set_num_threads(threads)
    CHECKPOINT.mkdir(exist_ok=True)
    for path in CHECKPOINT.iterdir():
        path.unlink()
    for path in run.iterdir():
        if path.is_file():
            shutil.copyfile(path, CHECKPOINT / path.name)
    model = PdlmForConditionalGeneration.from_pretrained(CHECKPOINT).eval()
    # Its default is adaptive: a fixed schedule has to commit so many slots a step, certain or not.
    model.generation_config.acceptance_threshold = threshold
    model.generation_config.save_pretrained(CHECKPOINT)
    with torch.inference_mode():
        report = evaluate(model, PdlmProcessor.from_pretrained(CHECKPOINT), seed, images, show=True)
    record = json.loads((CHECKPOINT / "training.json").read_text()) | {"held_out": report}
    (CHECKPOINT / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    typer.echo(json.dumps(report))


if __name__ == "__main__":
    typer.run(main)
