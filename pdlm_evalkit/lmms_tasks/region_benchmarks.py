"""ParaDLC-Bench and DLC-Bench as tasks of lmms-eval; the judge is asked at the end.

A request has all regions of an image; in DLC-Bench one region, as in the reference and `pdlm-eval paradlc caption`.

Environment:
    PDLM_PARADLC, PDLM_DLC: folder of the benchmark (annotations.json, qa.json, class_names.json, images/).
    PDLM_JUDGE: a judge of `pdlm-eval paradlc judge`, or the name of a model; "none" writes captions only, with NaN
        as scores.
    PDLM_JUDGE_URL, PDLM_JUDGE_KEY_ENV: server of the judge, and the environment variable that holds its key.
    PDLM_JUDGE_CACHE: file of replies, with the captions beside it; default: pdlm_judge.sqlite in the working folder.
"""

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from loguru import logger
from PIL import Image

from pdlm_hf.client import ChatClient, key_in
from pdlm_hf.errors_pdlm import ServerError, SettingError
from pdlm_hf.regions.files import write_json

from ..paradlc.captioning import MASKS_PER_PASS, PROMPTS, passes_of
from ..paradlc.data import Benchmark, check_images, decode_masks, load_benchmark, open_image
from ..paradlc.judging import captions_hash, judge_captions, preset_of
from ..paradlc.scoring import score_answers, totals

FOLDERS = {"paradlc": "PDLM_PARADLC", "dlc": "PDLM_DLC"}
METRICS = ("avg", "avg_pos", "avg_neg", "mean_mask_score", "n_missing", "n_unparsed", "n_failed")


@lru_cache(maxsize=2)
def benchmark_of(name: str) -> Benchmark:
    """Read the benchmark whose folder is set in the environment.

    Raises:
        SettingError: the variable is not set.
        DataError: see [`load_benchmark`].
    """
    folder = os.environ.get(FOLDERS[name])
    if not folder:
        raise SettingError(f"Set {FOLDERS[name]} to the folder of the benchmark (with annotations.json and images/).")
    return load_benchmark(folder, name=name)


@lru_cache(maxsize=1)
def judge_from_environment() -> ChatClient | None:
    """A client for the judge set in the environment, after one request to it; None for "none".

    Raises:
        SettingError: PDLM_JUDGE is not set.
        ServerError: the judge does not answer.
    """
    name = os.environ.get("PDLM_JUDGE")
    if not name:
        raise SettingError(
            'Set PDLM_JUDGE to a judge (`pdlm-eval paradlc judge --help`), or to "none" for captions only.'
        )
    if name == "none":
        return None
    preset = preset_of(name, os.environ.get("PDLM_JUDGE_URL"), os.environ.get("PDLM_JUDGE_KEY_ENV"))
    key = key_in(preset.key_env)
    client = ChatClient(preset.model, preset.base_url, key, preset.settings, cache=judge_cache())
    client.probe()
    return client


def judge_cache() -> Path:
    """The file of replies; the captions are written beside it."""
    return Path(os.environ.get("PDLM_JUDGE_CACHE", "pdlm_judge.sqlite"))


def _documents(name: str) -> datasets.Dataset:
    try:
        judge_from_environment()
        benchmark = benchmark_of(name)
        check_images(benchmark)
    except Exception as error:  # lmms-eval tries five times, and its RetryError does not name the reason
        logger.error(str(error))
        raise
    place = {image.id: i for i, image in enumerate(benchmark.images)}
    rows = [
        {"image": place[image.id], "masks": [mask.id for mask in masks]}
        for image, masks in passes_of(benchmark, MASKS_PER_PASS[name])
    ]
    return datasets.Dataset.from_list(rows)


def _visual(name: str, doc: dict[str, Any]) -> list[Image.Image]:
    image = benchmark_of(name).images[doc["image"]]
    masks = decode_masks(image, [mask for mask in image.masks if mask.id in doc["masks"]])
    return [open_image(image), *(Image.fromarray(mask.astype(np.uint8) * 255) for mask in masks)]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, tuple]:
    """The mask ids and captions of a request, for every metric."""
    captions = json.loads(results[0])
    return dict.fromkeys(METRICS, (doc["masks"], captions))


@lru_cache(maxsize=4)
def _scored(name: str, digest: str, captions: tuple[tuple[str, str], ...]) -> dict[str, Any]:
    judge = judge_from_environment()
    if judge is None:
        logger.warning("PDLM_JUDGE is none: the captions are in the samples, and there is no score.")
        return dict.fromkeys(METRICS, float("nan"))
    benchmark = benchmark_of(name)
    with_images = name == "paradlc"  # as the reference's two scripts
    kept = judge_cache().with_name(f"pdlm_{name}_captions.json")
    write_json(kept, dict(captions))  # lmms-eval writes nothing when a judge gives up
    try:
        answers, _ = judge_captions(judge, benchmark, dict(captions), with_images)
    except ServerError as error:
        raise ServerError(
            f"{error} The captions are in {kept}; `pdlm-eval paradlc judge {kept}` continues."
        ) from error
    asked = dict(captions)  # with --limit not all of them
    questions = {key: mask.questions for key, mask in benchmark.masks.items() if key in asked}
    return totals(score_answers(questions, answers, benchmark=name))


def _aggregate(name: str, metric: str):
    def aggregate(rows: list[tuple[list[str], list[str]]]) -> float:
        captions = {key: text for keys, texts in rows for key, text in zip(keys, texts, strict=True)}
        return float(_scored(name, captions_hash(captions), tuple(captions.items()))[metric])

    return aggregate


def paradlc_documents(dataset: datasets.Dataset) -> datasets.Dataset:
    """The rows: one per request."""
    return _documents("paradlc")


def dlc_documents(dataset: datasets.Dataset) -> datasets.Dataset:
    """The rows: one per request."""
    return _documents("dlc")


def paradlc_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The image, and a mask for each region."""
    return _visual("paradlc", doc)


def dlc_visual(doc: dict[str, Any]) -> list[Image.Image]:
    """The image, and a mask for each region."""
    return _visual("dlc", doc)


def paradlc_text(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """The prompt of the reference."""
    return PROMPTS["paradlc"]


def dlc_text(doc: dict[str, Any], lmms_eval_specific_kwargs: Any = None) -> str:
    """The prompt of the reference."""
    return PROMPTS["dlc"]


def no_target(doc: dict[str, Any]) -> str:
    """There are no reference captions."""
    return ""


for _name in FOLDERS:
    for _metric in METRICS:
        globals()[f"{_name}_{_metric}"] = _aggregate(_name, _metric)
