"""Score a region checkpoint on held-out images of the shapes data set.

    python -m pdlm_hf.shapes.evaluate --seed 7 --images 200 --json
    python -m pdlm_hf.shapes.evaluate --seed 7 --images 200 --attributes --json

A caption is exact if it is a sentence of the domain, and every attribute in it is that of its region. With
`--attributes` the four attributes are read by a schema instead.
"""

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForImageTextToText, AutoProcessor

from ..captioning.checkpoints import CHECKPOINT
from .dataset import HELD_OUT
from .scenes import SHAPES_DOMAIN, WORDS, Domain, Figure, Scene, draw_scene, read


def held_out(seed: int, count: int, easy: bool = False, domain: Domain = SHAPES_DOMAIN) -> Iterator[Scene]:
    """Draw images that training never draws.

    Args:
        seed (`int`): seed of the images.
        count (`int`): number of images.
        easy (`bool`): one tile, one or two figures, as at the start of training.
        domain (`Domain`): the figures and words.
    """
    for index in range(count):
        yield held_out_scene(seed, index, easy, domain)


def held_out_scene(seed: int, index: int, easy: bool = False, domain: Domain = SHAPES_DOMAIN) -> Scene:
    """Draw one image of [`held_out`]."""
    return draw_scene(np.random.default_rng((HELD_OUT, seed, index)), easy=easy, domain=domain)


class Tally:
    """Counts right captions: all, by attribute and by number of regions."""

    def __init__(self, domain: Domain = SHAPES_DOMAIN):
        self.domain = domain
        self.captions = self.exact = self.well_formed = 0
        self.by_attribute = dict.fromkeys(WORDS, 0)
        self.by_regions: dict[int, list[int]] = defaultdict(lambda: [0, 0])

    def add(self, scene: Scene, captions: list[str]) -> None:
        """Count the captions of one image, given in the order of its figures."""
        for figure, caption in zip(scene.figures, captions, strict=True):
            said = read(caption, self.domain)
            self.captions += 1
            self.well_formed += said is not None
            self.exact += said == figure
            right = self.by_regions[len(scene.figures)]
            right[0] += said == figure
            right[1] += 1
            for attribute in WORDS:
                self.by_attribute[attribute] += said is not None and getattr(said, attribute) == getattr(
                    figure, attribute
                )

    def report(self) -> dict[str, Any]:
        """Return the shares, rounded to six digits."""

        def share(count: int, of: int) -> float:
            return round(count / of, 6)

        return {
            "captions": self.captions,
            "exact": share(self.exact, self.captions),
            "well_formed": share(self.well_formed, self.captions),
            "by_attribute": {a: share(n, self.captions) for a, n in self.by_attribute.items()},
            "by_regions": {str(n): share(*right) for n, right in sorted(self.by_regions.items())},
        }


def evaluate(
    model,
    processor,
    seed: int,
    images: int,
    batch_size: int = 8,
    show: bool = False,
    easy: bool = False,
    domain: Domain = SHAPES_DOMAIN,
    **generation,
) -> dict:
    """Caption held-out images and count the right captions.

    Args:
        model, processor: a region checkpoint.
        seed, images (`int`): seed and number of the images.
        batch_size (`int`): images in a batch.
        show (`bool`): show a progress bar on stderr.
        easy (`bool`): one tile, one or two figures, as at the start of training.
        domain (`Domain`): the figures and words.
        **generation: settings of `generate`.

    Returns:
        `dict` with exact, well_formed, by_attribute, by_regions, tokens_per_forward, num_forwards (mean of the
        batches) and steps_per_region (mean).
    """
    tally, forwards, slots, batches, steps = Tally(domain), 0, 0, 0, 0
    # images of similar size share a batch, which then needs little padding
    scenes = sorted(held_out(seed, images, easy, domain), key=lambda p: (len(p.masks), p.image.width * p.image.height))
    start = time.perf_counter()
    chunks = [scenes[i : i + batch_size] for i in range(0, images, batch_size)]
    for chunk in track(chunks, "captioning", console=Console(stderr=True), disable=not show):
        inputs = processor(images=[p.image for p in chunk], segmentation_maps=[p.masks for p in chunk])
        output = model.generate(**inputs.to(model.device), **generation)
        forwards += output.num_forwards
        slots += output.tokens_per_forward * output.num_forwards
        batches += 1
        steps += int(output.region_steps.sum())
        for scene, captions in zip(chunk, processor.post_process_region_captions(output), strict=True):
            tally.add(scene, [caption.text for caption in captions])
    return tally.report() | {
        "tokens_per_forward": round(slots / forwards, 2),
        "num_forwards": round(forwards / batches, 2),
        "steps_per_region": round(steps / tally.captions, 2),
        "seconds": round(time.perf_counter() - start, 1),
        "images": images,
        "seed": seed,
        "batch_size": batch_size,
    }


def calibration_error(probabilities: Sequence[float], right: Sequence[bool], bins: int = 10) -> float:
    """Expected calibration error: mean distance of probability and share of right answers over bins of equal width.

    Args:
        probabilities (`Sequence[float]`): of answers.
        right (`Sequence[bool]`): whether they are right.
        bins (`int`)
    """
    values, hits = np.asarray(probabilities, float), np.asarray(right, float)
    place = np.minimum((values * bins).astype(int), bins - 1)
    gaps = [abs((values - hits)[place == k].sum()) for k in range(bins)]
    return float(sum(gaps) / len(values))


def evaluate_attributes(
    model,
    processor,
    seed: int,
    images: int,
    batch_size: int = 8,
    choices: dict[str, list[str]] | None = None,
    truth: Callable[[Figure], dict[str, str]] = vars,
    templates: Sequence[str] = (),
    domain: Domain = SHAPES_DOMAIN,
    **settings: Any,
) -> dict[str, Any]:
    """Read attributes of held-out images by a schema, and count the right ones.

    Args:
        model, processor: a region checkpoint.
        seed, images (`int`): seed and number of the images.
        batch_size (`int`): images in a batch.
        choices (`dict[str, list[str]]`, *optional*): of every attribute; default: the values of the shapes data set.
        truth (`Callable`): returns the right choice of every attribute of a figure.
        templates (`Sequence[str]`): default: a list of the attributes.
        domain (`Domain`): the figures.
        **settings: of `read_attributes`.

    Returns:
        `dict` with regions, all_right, by_attribute, ece (calibration error of all attributes), ece_by_attribute,
        num_forwards (mean of the batches).
    """
    choices = choices or {name: list(values) for name, values in WORDS.items()}
    plan = processor.attribute_plan(choices, templates=templates)
    said: dict[str, list[tuple[float, bool]]] = {name: [] for name in choices}
    forwards = batches = 0
    scenes = sorted(
        held_out(seed, images, domain=domain), key=lambda p: (len(p.masks), p.image.width * p.image.height)
    )
    start = time.perf_counter()
    for first in range(0, images, batch_size):
        chunk = scenes[first : first + batch_size]
        inputs = processor(images=[p.image for p in chunk], segmentation_maps=[p.masks for p in chunk])
        output = model.read_attributes(**inputs.to(model.device), plan=plan, **settings)
        forwards, batches = forwards + output.num_forwards, batches + 1
        for scene, readings in zip(chunk, output.readings, strict=True):
            for figure, reading in zip(scene.figures, readings, strict=True):
                for name, values in reading.probabilities.items():
                    best = max(values)
                    right = choices[name][values.index(best)] == truth(figure)[name]
                    said[name].append((best, right))
    errors = {name: [*zip(*answers, strict=True)] for name, answers in said.items()}
    probabilities, hits = ([value for one in errors.values() for value in one[k]] for k in range(2))
    whole = [all(right for _, right in answers) for answers in zip(*said.values(), strict=True)]
    return {
        "regions": len(whole),
        "all_right": round(sum(whole) / len(whole), 6),
        "by_attribute": {n: round(sum(right for _, right in a) / len(a), 6) for n, a in said.items()},
        "ece": round(calibration_error(probabilities, hits), 4),
        "ece_by_attribute": {n: round(calibration_error(p, r), 4) for n, (p, r) in errors.items()},
        "num_forwards": round(forwards / batches, 2),
        "seconds": round(time.perf_counter() - start, 1),
        "images": images,
        "seed": seed,
        "batch_size": batch_size,
    }


def main(
    seed: Annotated[int, typer.Option(help="Seed of the images.")] = 0,
    images: Annotated[int, typer.Option(help="Number of images.", min=1)] = 200,
    model: Annotated[Path, typer.Option(help="Checkpoint folder.")] = CHECKPOINT,
    batch_size: Annotated[int, typer.Option(help="Images in a batch.", min=1)] = 8,
    max_new_tokens: Annotated[int | None, typer.Option(help="Token positions per caption.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Acceptance threshold of adaptive decoding.")] = None,
    attributes: Annotated[bool, typer.Option("--attributes", help="Read attributes by a schema instead.")] = False,
    template: Annotated[
        list[str] | None, typer.Option(help="With --attributes: sentence with {size} {colour} {texture} {shape}.")
    ] = None,
    device: Annotated[str, typer.Option(help='Where to compute, for example "cuda".')] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Score a checkpoint on held-out images."""
    network = AutoModelForImageTextToText.from_pretrained(model).eval().to(device)
    processor = AutoProcessor.from_pretrained(model)
    given = {"max_new_tokens": max_new_tokens, "max_denoising_steps": steps, "acceptance_threshold": threshold}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    with torch.inference_mode():
        if attributes:
            report = evaluate_attributes(network, processor, seed, images, batch_size, templates=template or ())
        else:
            report = evaluate(network, processor, seed, images, batch_size, show=not as_json, **settings)
    report |= {"settings": settings}
    if as_json:
        print(json.dumps(report))
    else:
        for name, value in report.items():
            print(f"{name:20} {value}")


if __name__ == "__main__":
    typer.run(main)
