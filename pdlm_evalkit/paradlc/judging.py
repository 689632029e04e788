"""Requests to the judge, in the exact wording of the reference: published scores depend on it."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from pdlm_hf.client import ChatClient, Reply, public_url
from pdlm_hf.client.chat import Request
from pdlm_hf.errors_pdlm import MissingPackageError, SettingError
from pdlm_hf.regions.crops import crop_box, png_url
from pdlm_hf.regions.files import write_json

from .data import Benchmark, Mask, Question, decode_masks, open_image
from .scoring import RECOGNITION

RULES = """Answer the multiple-choice question based on the text description of an object in {image} image. You need to follow these rules:
1. Do not output any reasoning. Do not perform correction. Please output exactly one answer from the choices for each question. Do not repeat the question.
2. There is no need for exact matching. Please choose the closest option based on the description.

The description is:
{caption}

From the description above, please answer the following question with one of the choices:
{question}
"""  # noqa: E501
IMAGE = {"paradlc": "this", "dlc": "an"}


@dataclass(frozen=True)
class Preset:
    """A judge of the paper.

    Args:
        model (`str`): name of the model at the server.
        base_url (`str`): usual address of the server.
        key_env (`str`, *optional*): environment variable that holds the key; None if the server needs no key.
        settings (`dict`): fields of every request.
    """

    model: str
    base_url: str
    key_env: str | None
    settings: dict[str, Any] = field(default_factory=dict)


GREEDY = {"temperature": 0, "top_p": 1}  # the reference's two penalties of 0 are every server's default
LOCAL = "http://127.0.0.1:8000/v1"
PRESETS = {
    # gpt-5 models refuse `max_tokens`, which the reference sends
    "gpt-5.2": Preset(
        "gpt-5.2-2025-12-11", "https://api.openai.com/v1", "OPENAI_API_KEY", GREEDY | {"max_completion_tokens": 300}
    ),
    # it always thinks, and thoughts count as tokens: with 300 tokens the replies would be empty
    "gemini-3.1-pro": Preset(
        "gemini-3.1-pro-preview",
        "https://generativelanguage.googleapis.com/v1beta/openai/",
        "GEMINI_API_KEY",
        GREEDY | {"max_tokens": 4096, "reasoning_effort": "low"},
    ),
    "qwen3.5-27b": Preset(
        "Qwen/Qwen3.5-27B",
        LOCAL,
        None,
        GREEDY | {"max_tokens": 300, "chat_template_kwargs": {"enable_thinking": False}},
    ),
    "llama-3.1-8b": Preset("meta-llama/Llama-3.1-8B-Instruct", LOCAL, None, GREEDY | {"max_tokens": 300}),
}


def preset_of(judge: str, base_url: str | None = None, key_env: str | None = None) -> Preset:
    """The preset with this name, or one for a model of another name.

    Args:
        judge (`str`): a name in [`PRESETS`], or a model's name at its server.
        base_url, key_env (`str`, *optional*): replace those of the preset.

    Raises:
        SettingError: the name is not a preset, and there is no base_url.
    """
    preset = PRESETS.get(judge)
    if preset is None and base_url is None:
        raise SettingError(f"{judge} is not a known judge ({', '.join(PRESETS)}); for another model give --base-url.")
    preset = preset or Preset(judge, "", None, GREEDY | {"max_tokens": 300})
    # a key for one address is not sent to another unless asked for
    env = key_env or (preset.key_env if base_url in (None, preset.base_url) else None)
    return Preset(preset.model, base_url or preset.base_url, env, preset.settings)


def recognition_question(class_name: str, benchmark: str) -> Question:
    """The first question of every mask.

    Raises:
        MissingPackageError: DLC-Bench needs the inflect package.
    """
    if benchmark == "paradlc":
        text = (
            f"The object in the image is {class_name}. Based on the image, is it likely that the object in the "
            f"description is given class: {class_name} or object of a similar type?"
        )
    elif _is_plural(class_name):
        text = (
            f"Is it likely that the objects in the description are {class_name} or objects of a similar type? Again, "
            "It does not have to be an exact match."
        )
    else:
        text = (
            f"Is it likely that the object in the description is {_inflect().a(class_name)} or an object of a similar "
            "type? Again, It does not have to be an exact match."
        )
    return Question(text, RECOGNITION, (0, 0), "recognition")


def _is_plural(name: str) -> bool:
    # the exception is the reference's
    return name != "bus" and _inflect().singular_noun(name) is not False


@lru_cache(maxsize=1)
def _inflect() -> Any:
    try:
        import inflect
    except ImportError:
        raise MissingPackageError("the inflect package (wording of DLC-Bench)", "eval") from None
    return inflect.engine()


def prompt_of(question: Question, caption: str, benchmark: str) -> str:
    """The text of one request."""
    lines = [question.text, *(f"{letter}. {text}" for letter, text in zip("ABCDE", question.choices, strict=False))]
    return RULES.format(image=IMAGE[benchmark], caption=caption, question="\n".join(lines).strip())


def crops_of(image: Any, mask: Any) -> tuple[str, str]:
    """Crop the image and the mask around a region, as data URLs.

    Args:
        image (`PIL.Image`): the image, RGB.
        mask (`np.ndarray` of shape `(H, W)`): the mask, bool.
    """
    from PIL import Image

    top, bottom, left, right = crop_box(mask)
    part = Image.fromarray(mask[top:bottom, left:right].astype("uint8") * 255)
    return png_url(image.crop((left, top, right, bottom))), png_url(part)


def messages_of(prompt: str, crops: tuple[str, str] | None) -> Request:
    """The messages of one request: text alone, or both crops and the text."""
    if crops is None:
        return [{"role": "user", "content": prompt}]
    image, mask = ({"type": "image_url", "image_url": {"url": url}} for url in crops)
    heads = "The image:\n", "\nThe mask of the image:\n", f"\n{prompt}\n"
    first, second, last = ({"type": "text", "text": text} for text in heads)
    return [{"role": "user", "content": [first, image, second, mask, last]}]


def asked_of(mask: Mask, benchmark: str) -> list[Question]:
    """All questions about a mask, the recognition question first."""
    return [recognition_question(mask.class_name, benchmark), *mask.questions]


def judge_requests(
    benchmark: Benchmark, captions: Mapping[str, str], with_images: bool
) -> Iterator[tuple[str, int, Request]]:
    """Yields: for every request the mask id, the position of the question, and the messages. Images are read once."""
    for entry in benchmark.images:
        masks = [mask for mask in entry.masks if mask.id in captions]
        if not masks:
            continue
        crops = {}
        if with_images:
            image = open_image(entry)
            decoded = zip(masks, decode_masks(entry, masks), strict=True)
            crops = {mask.id: crops_of(image, array) for mask, array in decoded}
        for mask in masks:
            for position, question in enumerate(asked_of(mask, benchmark.name)):
                prompt = prompt_of(question, captions[mask.id], benchmark.name)
                yield mask.id, position, messages_of(prompt, crops.get(mask.id))


def judge_captions(
    client: ChatClient,
    benchmark: Benchmark,
    captions: Mapping[str, str],
    with_images: bool,
    progress: Callable[[int, Reply], None] | None = None,
) -> tuple[dict[str, list[str | None]], dict[str, int]]:
    """Ask the judge every question about every caption.

    Args:
        client (`ChatClient`): the server of the judge.
        benchmark (`Benchmark`): the questions, and the images if the judge sees them.
        captions: captions by mask id; masks without a caption are left out.
        with_images (`bool`): whether the judge sees the region, as in ParaDLC-Bench, or reads the caption only.
        progress (*optional*): see [`ChatClient.ask_many`].

    Returns:
        the list of replies by mask id, in the order of the benchmark, with None for requests that failed after all
        retries; and the counts `n_calls` (replies received now), `n_cached`, `n_failed`; `prompt_tokens` and
        `completion_tokens` of all replies, those of earlier attempts too.

    Raises:
        ServerError: the server cannot be used; the replies so far are in its cache.
    """
    where: list[tuple[str, int]] = []

    def requests() -> Iterator[Request]:
        for mask_id, position, request in judge_requests(benchmark, captions, with_images):
            where.append((mask_id, position))
            yield request

    counts = {name: 0 for name in ("n_calls", "n_cached", "n_failed", "prompt_tokens", "completion_tokens")}
    masks = benchmark.masks
    answers: dict[str, list[str | None]] = {
        key: [None] * (1 + len(masks[key].questions)) for key in benchmark.order if key in captions
    }
    for index, reply in client.ask_many(requests(), progress):
        mask_id, position = where[index]
        answers[mask_id][position] = reply.text
        counts["n_failed" if reply.text is None else "n_cached" if reply.cached else "n_calls"] += 1
        if reply.text is not None:  # of kept replies too: an earlier attempt paid for them
            counts["prompt_tokens"] += reply.prompt_tokens or 0
            counts["completion_tokens"] += reply.completion_tokens or 0
    return answers, counts


def count_requests(benchmark: Benchmark, captions: Mapping[str, str]) -> int:
    """Number of requests, with the recognition questions."""
    return sum(1 + len(mask.questions) for mask in benchmark.masks.values() if mask.id in captions)


def captions_hash(captions: Mapping[str, str]) -> str:
    """Fingerprint of captions, which tells whether answers belong to them."""
    return hashlib.sha256(json.dumps(dict(captions), sort_keys=True).encode()).hexdigest()[:16]


def write_answers(
    folder: Path,
    run: Path | None,
    name: str,
    client: ChatClient,
    benchmark: Benchmark,
    captions: Mapping[str, str],
    with_images: bool,
    answers: dict[str, list[str | None]],
    counts: dict[str, int],
) -> None:
    """Write answers.json and judge.json.

    Args:
        folder (`Path`): folder of both files.
        run (`Path`, *optional*): the run folder of the captions.
        name (`str`): the name of `--judge`: a preset, or a model.
        client, benchmark, captions, with_images: arguments of [`judge_captions`].
        answers, counts: results of [`judge_captions`].
    """
    write_json(folder / "answers.json", answers)
    record = {
        "judge": name,
        "model": client.model,
        "base_url": public_url(client.base_url),
        "settings": client.settings,
        "with_images": with_images,
        "benchmark": benchmark.name,
        "fingerprint": benchmark.fingerprint,
        "run": None if run is None else os.path.relpath(run, folder),
        "captions": captions_hash(captions),
        "n_masks": len(answers),
        **counts,
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    write_json(folder / "judge.json", record)
