"""Accuracy and calibration of attributes read by a schema, on held-out images of the shapes data set.

    python -m benchmarks.attributes --out benchmarks/results/attributes_shapes.json

Cases: the four attributes as one-token choices, in the default template, in each of two sentences and in both, in
sentences that no training has seen, one after the other (`jointly`) and calibrated by a block without a region;
choices of two tokens ("striped blue"); colours that no image has, beside those of the images ("dark blue"); images
with dark colours.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import AutoModelForImageTextToText, AutoProcessor

from pdlm_hf.captioning.checkpoints import CHECKPOINT
from pdlm_hf.shapes.evaluate import evaluate_attributes
from pdlm_hf.shapes.scenes import PATTERNS, SHAPES_DOMAIN, WORDS, Domain, Figure
from pdlm_hf.shapes.templates import DARK, DARK_DOMAIN

ONE = {name: list(values) for name, values in WORDS.items()}
TWO = {
    "look": [f"{texture} {colour}" for texture in WORDS["texture"] for colour in WORDS["colour"]],
    "kind": [f"{size} {shape}" for size in WORDS["size"] for shape in WORDS["shape"]],
}
WITH_DARK = ONE | {"colour": [*WORDS["colour"], *(f"dark {name}" for name in DARK)]}
# No training draws these. Lessons repeat phrases too: the form of the first is known, that of the second is not.
UNSEEN = "It is {size}, it is {colour}, it is {texture}, and it is a {shape}."
UNSEEN_FORM = "Somebody painted a {texture} {shape}, rather {size}, using {colour} ink."


def in_pairs(figure: Figure) -> dict[str, str]:
    """The right choices of `TWO`."""
    return {"look": f"{figure.texture} {figure.colour}", "kind": f"{figure.size} {figure.shape}"}


@dataclass
class Case:
    """What to read, and how."""

    choices: dict[str, list[str]] = field(default_factory=lambda: ONE)
    templates: tuple[str, ...] = ()
    truth: Callable[[Figure], dict[str, str]] = vars
    domain: Domain = SHAPES_DOMAIN
    settings: dict[str, Any] = field(default_factory=dict)


CASES = {
    "list": Case(),
    "sentence 1": Case(templates=PATTERNS[:1]),
    "sentence 2": Case(templates=PATTERNS[1:2]),
    "both sentences": Case(templates=PATTERNS[:2]),
    "unseen sentence": Case(templates=(UNSEEN,)),
    "unseen form": Case(templates=(UNSEEN_FORM,)),
    "jointly": Case(settings={"jointly": True}),
    "calibrated": Case(settings={"calibrate": True}),
    "two tokens": Case(TWO, truth=in_pairs),
    "dark colours offered": Case(WITH_DARK),
    "dark colours drawn": Case(WITH_DARK, domain=DARK_DOMAIN),
}


def main(
    seeds: Annotated[list[int] | None, typer.Option("--seed", help="Seed of the images. Repeatable.")] = None,
    images: Annotated[int, typer.Option(help="Images of each seed.", min=1)] = 300,
    batch_size: Annotated[int, typer.Option(help="Images in a batch.", min=1)] = 1,
    model: Annotated[Path, typer.Option(help="Checkpoint folder.")] = CHECKPOINT,
    case: Annotated[list[str] | None, typer.Option(help="Only this case. Repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(help="File of results to write.")] = None,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
    device: Annotated[str, typer.Option(help='Where to compute, for example "cuda".')] = "cpu",
) -> None:
    """Measure every case on every seed."""
    torch.set_num_threads(threads)
    network, processor = (
        AutoModelForImageTextToText.from_pretrained(model).eval().to(device),
        AutoProcessor.from_pretrained(model),
    )
    results: dict[str, list[dict[str, Any]]] = {}
    for name in case or CASES:
        one = CASES[name]
        for seed in seeds or [11, 12, 13]:
            row = evaluate_attributes(
                *(network, processor, seed, images, batch_size, one.choices, one.truth, one.templates, one.domain),
                **one.settings,
            )
            results.setdefault(name, []).append(row)
            typer.echo(
                f"{name:22} seed {seed}  all right {row['all_right']:.4f}  ECE {row['ece']:.4f}  "
                f"forwards {row['num_forwards']}  {row['by_attribute']}"
            )
    if out is not None:
        out.write_text(json.dumps({"torch": torch.__version__, "cases": results}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
