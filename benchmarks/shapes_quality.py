"""Accuracy on drawn shapes for every decoding setting: steps, thresholds, prompt cache.

    python benchmarks/shapes_quality.py --images 200 --json benchmarks/results/shapes_quality.json
    python benchmarks/shapes_quality.py --model runs/full2 --json benchmarks/results/shapes_quality_full.json

One image at a time, so that the forward passes are those of an image. The second line scores a checkpoint trained
with `prefix_attention="full"`, where a kept prompt is an approximation.
"""

import json
import platform
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoModelForImageTextToText, AutoProcessor

import pdlm_hf  # noqa: F401  registers the model
from pdlm_hf.captioning.checkpoints import CHECKPOINT
from pdlm_hf.shapes.evaluate import evaluate

STEPS = (1, 2, 4, 8, 16, 32)
THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)
BOUNDS = (0.01, 0.1, 0.5)  # nats


def settings() -> dict[str, dict]:
    """Name -> settings of `generate`."""
    fixed = {"acceptance_threshold": None, "entropy_bound": None}
    table = {f"{n} steps": {"max_denoising_steps": n, "prefix_refresh_interval": 0} for n in STEPS}
    table["32 steps, recomputed"] = {"max_denoising_steps": 32, "prefix_refresh_interval": 1}
    table["32 steps, prompt every 8"] = {"max_denoising_steps": 32, "prefix_refresh_interval": 8}
    adaptive = {"max_denoising_steps": 32, "prefix_refresh_interval": 0}
    table |= {f"threshold {t}": adaptive | {"acceptance_threshold": t} for t in THRESHOLDS}
    table |= {f"entropy bound {b}": adaptive | {"entropy_bound": b} for b in BOUNDS}
    return {name: fixed | generation for name, generation in table.items()}


def main(
    model: Annotated[Path, typer.Option(help="Checkpoint folder.")] = CHECKPOINT,
    images: Annotated[int, typer.Option(help="Held-out images.")] = 200,
    seed: Annotated[int, typer.Option(help="Which images.")] = 5,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table here.")] = None,
) -> None:
    """Score the checkpoint with every setting."""
    torch.set_num_threads(threads)
    network = AutoModelForImageTextToText.from_pretrained(model).eval()
    processor = AutoProcessor.from_pretrained(model)
    rows = {}
    for name, generation in settings().items():
        with torch.inference_mode():
            rows[name] = evaluate(network, processor, seed, images, batch_size=1, **generation) | {
                "settings": generation
            }
        row = rows[name]
        print(
            f"{name:26} exact {row['exact']:.3f}  well formed {row['well_formed']:.3f}  "
            f"forwards {row['num_forwards']:5.1f}  steps a region {row['steps_per_region']:5.1f}  "
            f"{row['seconds']:6.1f} s"
        )
    if json_file:
        record = {
            "what": f"{images} held-out images, seed {seed}, 32 slots a caption, one at a time",
            "prefix_attention": network.config.prefix_attention,
            "machine": f"{platform.machine()}, {threads} thread(s), torch {torch.__version__}",
            "settings": rows,
        }
        json_file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
