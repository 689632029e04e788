"""Table 7 of the paper on drawn shapes: what region prompts, RoI replay and the region mask are worth.

    python benchmarks/shapes_ablation.py --init runs/vision --out runs/ablation \
        --json benchmarks/results/shapes_ablation.json

Every variant starts from the same vision lesson (tools/shapes/train.py) and learns the second one, words, with the
same seed, images and number of steps: one tile, one or two figures, one wording. It is scored on held-out images
of that lesson. Variants already trained are not trained again.
"""

import json
import platform
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint

from pdlm_hf import PdlmForConditionalGeneration, PdlmProcessor
from pdlm_hf.masking_pdlm import SHARED
from pdlm_hf.shapes.dataset import ShapesDataset
from pdlm_hf.shapes.evaluate import evaluate
from pdlm_hf.training.collator import PdlmCollator
from pdlm_hf.training.trainer import InOrderTrainer
from tools.shapes.train import EASY_SLOTS, arguments, save

# variant -> model inputs that are withheld
VARIANTS = {
    "full model": (),
    "w/o region prompting": ("region_masks",),
    "w/o RoI feature replay": ("region_boxes", "original_sizes"),
    "full attention": (),
}


class Without:
    """A processor or collator whose result lacks some inputs."""

    def __init__(self, inner, names: tuple[str, ...]):
        self.inner, self.names = inner, names

    def __call__(self, *args, **kwargs):
        batch = self.inner(*args, **kwargs)
        for name in self.names:
            del batch[name]
        return batch

    def __getattr__(self, name):
        return getattr(self.inner, name)


def everything_visible(input_ids: torch.Tensor, replayed: bool = True) -> torch.Tensor:
    """Layout in which no row belongs to a region: plain full attention."""
    return torch.full_like(input_ids, SHARED)


def train_variant(name: str, init: Path, out: Path, steps: int, batch_size: int, learning_rate: float, seed: int):
    """Train a variant, or load it, and return it with its processor."""
    set_seed(seed)
    done = (out / "model.safetensors").exists()
    processor = PdlmProcessor.from_pretrained(init)
    model = PdlmForConditionalGeneration.from_pretrained(out if done else init)
    if name == "full attention":
        model.model.region_layout = everything_visible
    if not done:
        collator = PdlmCollator(processor, num_slots=EASY_SLOTS, noise_floor=0.1, prompt_ids="ordered")
        trainer = InOrderTrainer(
            model=model,
            args=arguments(out, steps, batch_size, learning_rate, seed),
            train_dataset=ShapesDataset(seed, steps * batch_size, batch_size, easy=True),
            data_collator=Without(collator, VARIANTS[name]),
        )
        last = get_last_checkpoint(out / "trainer") if (out / "trainer").is_dir() else None
        trainer.train(resume_from_checkpoint=last)
        save(model, processor, out, {"variant": name, "steps": steps, "seed": seed})
    return model.eval(), Without(processor, VARIANTS[name])


def main(
    init: Annotated[Path, typer.Option(help="Run of the vision lesson.")] = Path("runs/vision"),
    steps: Annotated[int, typer.Option(help="Optimiser steps of every variant.")] = 600,
    out: Annotated[Path, typer.Option(help="Folder for the trained variants.")] = Path("runs/ablation"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table here.")] = None,
    images: Annotated[int, typer.Option(help="Held-out images.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 64,
    learning_rate: Annotated[float, typer.Option()] = 1e-3,
    seed: Annotated[int, typer.Option()] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 2,
) -> None:
    """Train and score every variant."""
    torch.set_num_threads(threads)
    rows = {}
    for name in VARIANTS:
        folder = out / name.replace("/", "").replace(" ", "_")
        model, processor = train_variant(name, init, folder, steps, batch_size, learning_rate, seed)
        with torch.inference_mode():
            rows[name] = evaluate(
                model, processor, 5, images, easy=True, max_new_tokens=EASY_SLOTS[1], max_denoising_steps=EASY_SLOTS[1]
            )
        print(name, {key: rows[name][key] for key in ("exact", "well_formed", "by_attribute")})
    if json_file:
        record = {
            "what": f"from the vision lesson, {steps} steps of {batch_size} images in the words lesson, seed {seed}",
            "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
            "variants": rows,
        }
        json_file.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
