"""Tasks on synthetic scenes: nothing to download, exact match, no judge. Scenes are drawn when they are needed."""

import json
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image

from pdlm_hf.prompts_pdlm import DEFAULT_QUESTION
from pdlm_hf.shapes.evaluate import held_out_scene
from pdlm_hf.shapes.evaluate_base import held_out_question
from pdlm_hf.shapes.questions import Question, is_right
from pdlm_hf.shapes.scenes import Scene, describe, read

SEED = 11  # the seed of the published scores


@lru_cache(maxsize=64)
def _scene(index: int) -> Scene:
    return held_out_scene(SEED, index)


def region_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The image, and a mask for each region."""
    scene = _scene(doc["index"])
    return [scene.image, *(Image.fromarray(mask.astype(np.uint8) * 255) for mask in scene.masks)]


def region_text(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """The question about all regions of an image."""
    return DEFAULT_QUESTION


def region_target(doc: dict[str, Any]) -> list[str]:
    """One of the right captions of each region."""
    rng = np.random.default_rng(0)
    return [describe(figure, rng) for figure in _scene(doc["index"]).figures]


def region_results(doc: dict[str, Any], results: list[str]) -> dict[str, tuple[int, int]]:
    """Numbers of exact and of well-formed captions of an image, each with the number of its regions."""
    figures = _scene(doc["index"]).figures
    said = [read(caption) for caption in json.loads(results[0])]
    exact = sum(one == figure for one, figure in zip(said, figures, strict=True))
    return {"exact": (exact, len(figures)), "well_formed": (sum(one is not None for one in said), len(figures))}


def share(rows: list[tuple[int, int]]) -> float:
    """Share of right captions among all regions, not the mean over images."""
    return sum(right for right, _ in rows) / sum(total for _, total in rows)


@lru_cache(maxsize=64)
def _question(kind: str, index: int) -> tuple[Image.Image, Question]:
    return held_out_question(SEED, index, kind)


def of_kind(kind: str) -> tuple:
    """Make the functions of a task on questions of one kind: visual, text, target, results."""

    def visual(doc: dict[str, Any]) -> list[Image.Image]:
        return [_question(kind, doc["index"])[0]]

    def text(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
        return _question(kind, doc["index"])[1].text

    def target(doc: dict[str, Any]) -> str:
        return _question(kind, doc["index"])[1].answer

    def results(doc: dict[str, Any], said: list[str]) -> dict[str, float]:
        return {"right": float(is_right(_question(kind, doc["index"])[1], said[0]))}

    return visual, text, target, results


choice_visual, choice_text, choice_target, choice_results = of_kind("choice")
yes_no_visual, yes_no_text, yes_no_target, yes_no_results = of_kind("yes_no")
count_visual, count_text, count_target, count_results = of_kind("count")
open_visual, open_text, open_target, open_results = of_kind("open")
reasoning_visual, reasoning_text, reasoning_target, reasoning_results = of_kind("reasoning")
describe_visual, describe_text, describe_target, describe_results = of_kind("describe")
