"""Score a region checkpoint on held-out images of the shapes data set.

    python -m pdlm_hf.shapes.evaluate --seed 7 --images 200 --json

A caption is exact if it is a sentence of the domain, and every attribute in it is that of its region.
"""

import json
import time
from collections import defaultdict
from collections.abc import Iterator
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
from .scenes import SHAPES_DOMAIN, WORDS, Domain, Scene, draw_scene, read


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
        """Return the shares, rounded to four digits."""

        def share(count: int, of: int) -> float:
            return round(count / of, 4)

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


def main(
    seed: Annotated[int, typer.Option(help="Seed of the images.")] = 0,
    images: Annotated[int, typer.Option(help="Number of images.", min=1)] = 200,
    model: Annotated[Path, typer.Option(help="Checkpoint folder.")] = CHECKPOINT,
    batch_size: Annotated[int, typer.Option(help="Images in a batch.", min=1)] = 8,
    max_new_tokens: Annotated[int | None, typer.Option(help="Token positions per caption.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Acceptance threshold of adaptive decoding.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Score a checkpoint on held-out images."""
    network = AutoModelForImageTextToText.from_pretrained(model).eval()
    processor = AutoProcessor.from_pretrained(model)
    given = {"max_new_tokens": max_new_tokens, "max_denoising_steps": steps, "acceptance_threshold": threshold}
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    with torch.inference_mode():
        report = evaluate(network, processor, seed, images, batch_size, show=not as_json, **settings)
    report |= {"settings": settings}
    if as_json:
        print(json.dumps(report))
    else:
        for name, value in report.items():
            print(f"{name:20} {value}")


if __name__ == "__main__":
    typer.run(main)
