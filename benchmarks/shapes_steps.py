"""Accuracy on drawn shapes against the number of denoising steps.

python benchmarks/shapes_steps.py --images 200 --json benchmarks/results/shapes_steps.json
"""

import json
import platform
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForImageTextToText, AutoProcessor

import pdlm_hf  # noqa: F401  registers the model
from pdlm_hf.shapes import CHECKPOINT
from pdlm_hf.shapes.evaluate import evaluate


def main(
    model: Annotated[Path, typer.Option(help="Checkpoint folder.")] = CHECKPOINT,
    images: Annotated[int, typer.Option(help="Held-out pictures.")] = 200,
    seed: Annotated[int, typer.Option()] = 5,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table here.")] = None,
) -> None:
    """Score the checkpoint with 1, 2, 4, 8, 16 and 32 steps."""
    torch.set_num_threads(1)
    network = AutoModelForImageTextToText.from_pretrained(model).eval()
    processor = AutoProcessor.from_pretrained(model)
    rows = {}
    for steps in (1, 2, 4, 8, 16, 32):
        with torch.inference_mode():
            rows[steps] = evaluate(network, processor, seed, images, max_denoising_steps=steps)
        print(f"{steps:3} steps  exact {rows[steps]['exact']:.3f}  well formed {rows[steps]['well_formed']:.3f}")
    if json_file:
        machine = f"{platform.machine()}, 1 thread, torch {torch.__version__}"
        json_file.write_text(json.dumps({"machine": machine, "max_new_tokens": 32, "steps": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
