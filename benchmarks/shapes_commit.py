"""Forward passes against right captions, by acceptance threshold: the careful checkpoint and the one that commits.

    git show COMMIT:pdlm_hf/shapes/checkpoint/model.safetensors > careful/model.safetensors    # and its other files
    python benchmarks/shapes_commit.py --careful careful --json benchmarks/results/shapes_commit.json

One image at a time; the pass over the prompt counts. Every number is the mean of the seeds. The same command goes on
where it stopped.
"""

import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from transformers import AutoModelForImageTextToText, AutoProcessor

import pdlm_hf  # noqa: F401  registers the model
from pdlm_hf.captioning.checkpoints import CHECKPOINT
from pdlm_hf.regions.files import write_json
from pdlm_hf.shapes.evaluate import evaluate

THRESHOLDS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
SEEDS = (21, 22, 23)


def score(model, processor, images: int, **generation: Any) -> dict[str, Any]:
    """Score a checkpoint with one setting, on every seed.

    Returns:
        `dict` with forwards, exact and six_regions (exact at six regions): means, and a list with one per seed.
    """
    rows = [evaluate(model, processor, seed, images, batch_size=1, **generation) for seed in SEEDS]
    found = {
        "forwards": [row["num_forwards"] for row in rows],
        "exact": [row["exact"] for row in rows],
        "six_regions": [row["by_regions"].get("6") for row in rows],
    }
    return {name: round(float(np.mean(values)), 4) for name, values in found.items()} | {"by_seed": found}


def sweep(folder: Path, images: int, rows: dict[str, dict[str, Any]], keep: Callable[[], None]) -> None:
    """Score a checkpoint with every threshold, with and without trimming, and with its fewest steps.

    Args:
        folder (`Path`): the checkpoint.
        images (`int`): images of every seed.
        rows (`dict`): what is known; a setting that is in it is not scored again.
        keep: called after every row.
    """
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    settings: dict[str, dict[str, Any]] = {f"threshold {t}": {"acceptance_threshold": t} for t in THRESHOLDS}
    settings |= {f"{name}, trimmed": generation | {"trim_canvas": True} for name, generation in settings.items()}
    for n in (1, 2, 4):
        settings[f"{n} step{'s' * (n > 1)}"] = {"acceptance_threshold": None, "max_denoising_steps": n}
    for name, generation in settings.items():
        if name in rows:
            continue
        with torch.inference_mode():
            rows[name] = score(model, processor, images, **generation) | {"settings": generation}
        row = rows[name]
        print(f"{folder.name:20} {name:24} exact {row['exact']:.4f}  forwards {row['forwards']:.2f}", flush=True)
        keep()


def main(
    careful: Annotated[Path, typer.Option(help="The checkpoint before `commit`.")],
    model: Annotated[Path, typer.Option(help="The checkpoint that commits.")] = CHECKPOINT,
    images: Annotated[int, typer.Option(help="Held-out images of every seed.")] = 40,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table here.")] = None,
) -> None:
    """Score both checkpoints."""
    torch.set_num_threads(threads)
    record: dict[str, Any] = {
        "what": f"{images} held-out images of each of the seeds {SEEDS}, one at a time",
        "machine": f"{platform.machine()}, {threads} thread(s), torch {torch.__version__}",
        "careful": {},
        "commits": {},
    }
    if json_file and json_file.is_file():
        known = json.loads(json_file.read_text())
        if known["what"] != record["what"]:
            raise typer.BadParameter(f"{json_file.name} is of {known['what']}. Name another file.")
        record |= known
    for name, folder in (("careful", careful), ("commits", model)):
        sweep(folder, images, record[name], lambda: write_json(json_file, record) if json_file else None)


if __name__ == "__main__":
    typer.run(main)
