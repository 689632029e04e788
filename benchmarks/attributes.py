"""Accuracy and calibration of attributes read by a schema, on held-out images of the shapes data set.

    python -m benchmarks.attributes --out benchmarks/results/attributes_shapes.json

Cases: the four attributes as one-token choices, in the default template, in each of two sentences and in both, in
sentences that no training has seen, one after the other (`jointly`) and calibrated by a block without a region;
choices of two tokens ("striped blue"), also scored from the last token on; colours that no image has, beside those of
the images ("dark blue"); images with dark colours; both also with probabilities normalised by the length of choices.
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
from pdlm_hf.templates_pdlm import AttributePlan, Block, Read

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


def last_first(plan: AttributePlan) -> None:
    """Change a plan: of choices of two tokens the last is read first, with the first open, and then the first."""
    for blocks in plan.blocks({}):
        trees = {block.reads[0].name: block for block in blocks if block.reads[0].is_first}
        blocks.clear()
        for name, root in trees.items():
            at, lasts = root.reads[0].position, {}
            for number, text in enumerate(plan.choices[name]):
                first, last = plan.encode(f" {text}")
                lasts.setdefault(last, {})[first] = number
            blocks.append(
                Block(root.tokens, [Read(name, at + 1, [*lasts], [[*own.values()] for own in lasts.values()])])
            )
            for last, firsts in lasts.items():
                tokens = [*root.tokens[: at + 1], last, *root.tokens[at + 2 :]]
                read = Read(name, at, [*firsts], [[number] for number in firsts.values()], is_first=False)
                blocks.append(Block(tokens, [read]))


def by_length(plan: AttributePlan, output: Any) -> None:
    """Change what was read: probabilities to the power of one over the number of the choice's tokens."""
    powers = {name: [1 / len(plan.encode(f" {text}")) for text in texts] for name, texts in plan.choices.items()}
    for reading in (reading for image in output.readings for reading in image):
        for name, values in reading.probabilities.items():
            weights = [value**power for value, power in zip(values, powers[name], strict=True)]
            reading.probabilities[name] = [weight / sum(weights) for weight in weights]


@dataclass
class Case:
    """What to read, and how; `plan` and `output` change the blocks and what was read of them."""

    choices: dict[str, list[str]] = field(default_factory=lambda: ONE)
    templates: tuple[str, ...] = ()
    truth: Callable[[Figure], dict[str, str]] = vars
    domain: Domain = SHAPES_DOMAIN
    settings: dict[str, Any] = field(default_factory=dict)
    plan: Callable[[AttributePlan], None] | None = None
    output: Callable[[AttributePlan, Any], None] | None = None


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
    "two tokens, last first": Case(TWO, truth=in_pairs, plan=last_first),
    "dark colours offered": Case(WITH_DARK),
    "dark colours offered, by length": Case(WITH_DARK, output=by_length),
    "dark colours drawn": Case(WITH_DARK, domain=DARK_DOMAIN),
    "dark colours drawn, by length": Case(WITH_DARK, domain=DARK_DOMAIN, output=by_length),
}


class Changed:
    """A model and its processor, whose plans and outputs a case changes."""

    def __init__(self, case: Case, model: Any, processor: Any):
        self.case, self.model, self.processor = case, model, processor
        self.device = model.device

    def __call__(self, **inputs: Any) -> Any:
        """Process images and masks."""
        return self.processor(**inputs)

    def attribute_plan(self, *args: Any, **kwargs: Any) -> AttributePlan:
        """The processor's plan, changed."""
        plan = self.processor.attribute_plan(*args, **kwargs)
        if self.case.plan:
            self.case.plan(plan)
        return plan

    def read_attributes(self, *, plan: AttributePlan, **inputs: Any) -> Any:
        """What the model reads, changed."""
        output = self.model.read_attributes(plan=plan, **inputs)
        if self.case.output:
            self.case.output(plan, output)
        return output


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
        changed = Changed(one, network, processor)
        for seed in seeds or [11, 12, 13]:
            row = evaluate_attributes(
                *(changed, changed, seed, images, batch_size, one.choices, one.truth, one.templates, one.domain),
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
