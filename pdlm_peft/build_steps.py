"""The steps of `pdlm-peft build`: caption regions, check categories, compare masks with SAM's, filter captions."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby

import numpy as np
from PIL import Image

from pdlm_hf.client.chat import ChatClient, Request
from pdlm_hf.errors_pdlm import DataError, RegionError, SettingError
from pdlm_hf.regions.crops import crops_message, images_message
from pdlm_hf.regions.region import Region, parse_region
from pdlm_hf.regions.sam import Segmenter

from .build import Decide, Task, Verdict
from .rows import Fault, RowError

STYLES = ("crops", "regions")
CHECK_PROMPT = (
    'In an image, one region is annotated with the category "{category}". Somebody described this region without '
    "knowing the category:\n\n{caption}\n\nIs the described thing one of this category, or a kind, a part or a group "
    "of it? Answer with yes or no only."
)
_THOUGHTS = re.compile(r"<think>.*?(?:</think>|$)", re.DOTALL)


def mask_of(task: Task, image: Image.Image) -> np.ndarray:
    """Decode the mask of a region, bool (H, W).

    Raises:
        DataError: the region cannot be decoded; the message has the row.
    """
    try:
        return parse_region(task.region, *image.size, task.k).mask
    except RegionError as error:
        raise DataError(f"row {task.number}: regions[{task.k}]: {error}") from None


def ask(
    server: ChatClient,
    tasks: Iterable[Task],
    request: Callable[[Task], Request | None],
    read: Callable[[Task, str], Verdict],
) -> Iterator[tuple[Task, Verdict]]:
    """Ask a server about each region, with several requests at a time. An image is opened when it is sent.

    Args:
        server (`ChatClient`): caches its replies, so that no question is sent twice, even after kill -9.
        tasks: the regions.
        request: makes the request for a region; None keeps the region unchanged.
        read: turns a reply into a verdict.
    """
    waiting: dict[int, Task] = {}
    settled: list[Task] = []

    def requests() -> Iterator[Request]:
        index = 0
        for task in tasks:
            body = request(task)
            if body is None:
                settled.append(task)
                continue
            waiting[index] = task
            index += 1
            yield body

    for index, reply in server.ask_many(requests()):
        task = waiting.pop(index)
        yield task, Verdict(error=reply.error) if reply.text is None else read(task, reply.text)
        while settled:
            yield settled[-1], Verdict(settled.pop().region)
    for task in settled:
        yield task, Verdict(task.region)


def caption_step(server: ChatClient, prompt: str, style: str = "crops", replace: bool = False) -> Decide:
    """Make a step that captions regions.

    Args:
        server (`ChatClient`): any vision-language model, or our own server.
        prompt (`str`): the question.
        style (`str`): "crops" sends the image with the region outlined, and a crop around the region; "regions" sends
            the region itself, as our own server takes it.
        replace (`bool`): also caption regions that have a caption.

    Raises:
        SettingError: there is no such style.
    """
    if style not in STYLES:
        raise SettingError(f"The style must be one of {', '.join(STYLES)}, got {style!r}.")

    def request(task: Task) -> Request | None:
        if task.region.get("caption") and not replace:
            return None
        image = task.open_image()
        mask = mask_of(task, image)  # checks the region for our own server, too
        if style == "crops":
            return {"messages": [crops_message(image, mask, prompt)]}
        shape = {key: task.region[key] for key in ("id", "segmentation", "bbox") if key in task.region}
        return {"messages": [images_message([image], prompt)], "mm_processor_kwargs": {"regions": [shape]}}

    def read(task: Task, text: str) -> Verdict:
        if style == "regions":
            try:
                (text,) = json.loads(text)
            except (ValueError, TypeError, RecursionError):
                return Verdict(error=f"the reply is not a list of one caption: {text[:80]!r}")
        caption = _THOUGHTS.sub("", str(text)).strip()
        if not caption:
            return Verdict(reason="empty caption")
        return Verdict({**task.region, "caption": caption})

    return lambda tasks: ask(server, tasks, request, read)


def check_step(server: ChatClient, prompt: str = CHECK_PROMPT) -> Decide:
    """Make a step that keeps the regions whose caption agrees with their `category`, according to a language model.

    Args:
        server (`ChatClient`): the language model.
        prompt (`str`): the question, with {category} and {caption} in it.

    Raises:
        SettingError: the prompt lacks one of them.
    """
    if "{category}" not in prompt or "{caption}" not in prompt:
        raise SettingError("The prompt needs {category} and {caption}.")

    def request(task: Task) -> Request:
        category = task.region.get("category")
        if not isinstance(category, str) or not category.strip():
            expected = "the name of its category (COCO files have it; leave out this step for other data)"
            raise RowError(Fault(task.number, f"regions[{task.k}].category", "category", f"{category!r}", expected))
        text = prompt.replace("{category}", category).replace("{caption}", task.region["caption"])
        return [{"role": "user", "content": text}]

    def read(task: Task, text: str) -> Verdict:
        said = re.match(r"\W*(yes|no)\b", _THOUGHTS.sub("", text).strip(), re.IGNORECASE)
        if said is None:
            return Verdict(reason=f"unclear verdict: {' '.join(text.split())[:80]}")
        if said[1].lower() == "yes":
            return Verdict(task.region)
        return Verdict(reason=f"other category: {task.region['category']}")

    return lambda tasks: ask(server, tasks, request, read)


def remask_step(segmenter: Segmenter, min_iou: float, replace: bool = False) -> Decide:
    """Make a step that keeps the regions whose mask agrees with the one that SAM finds in its box.

    Args:
        segmenter (`Segmenter`): gets all regions of an image together.
        min_iou (`float`): least intersection over union of the two masks.
        replace (`bool`): write SAM's mask instead of the region's own.

    Raises:
        SettingError: `min_iou` is not between 0 and 1.
    """
    if not 0 <= min_iou <= 1:
        raise SettingError(f"The least IoU must be between 0 and 1, got {min_iou}.")

    def decide(tasks: Iterable[Task]) -> Iterator[tuple[Task, Verdict]]:
        for _, group in groupby(tasks, key=lambda task: task.number):
            of_row = list(group)
            image = of_row[0].open_image()
            masks = [mask_of(task, image) for task in of_row]
            found = segmenter.masks(image, [box_around(mask) for mask in masks])
            for task, mask, other in zip(of_row, masks, found, strict=True):
                overlap = iou(mask, other)
                if overlap < min_iou:
                    yield task, Verdict(reason=f"low overlap: IoU {overlap:.3f}")
                    continue
                meta = task.region.get("meta") or {}
                meta = meta if isinstance(meta, dict) else {"meta": meta}  # users may keep any value there
                region = {**task.region, "meta": {**meta, "sam_iou": round(overlap, 4)}}
                if replace:
                    region["segmentation"] = Region(None, other).segmentation
                yield task, Verdict(region)

    return decide


def box_around(mask: np.ndarray) -> list[float]:
    """The box around a mask: x, y of its first pixel, and x, y behind its last one."""
    y, x = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    return [float(x[0]), float(y[0]), float(x[-1] + 1), float(y[-1] + 1)]


def iou(mask: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two masks, of which at least one is not empty."""
    return float((mask & other).sum() / (mask | other).sum())


def filter_step(min_words: int, max_words: int, max_repetition: float) -> Decide:
    """Make a step that keeps captions of moderate length without repetition.

    Args:
        min_words, max_words (`int`): least and largest number of words.
        max_repetition (`float`): largest [`repetition`].

    Raises:
        SettingError: a limit is not possible.
    """
    if not 0 < min_words <= max_words or not 0 <= max_repetition <= 1:
        raise SettingError("--min-words must be positive, --max-words at least as large, --max-repetition in [0, 1].")

    def decide(tasks: Iterable[Task]) -> Iterator[tuple[Task, Verdict]]:
        for task in tasks:
            words, repeated = len(task.region["caption"].split()), repetition(task.region["caption"])
            if words < min_words:
                yield task, Verdict(reason=f"too short: {words} words")
            elif words > max_words:
                yield task, Verdict(reason=f"too long: {words} words")
            elif repeated > max_repetition:
                yield task, Verdict(reason=f"repetition: {repeated:.2f} of its word groups")
            else:
                yield task, Verdict(task.region)

    return decide


def repetition(text: str, length: int = 3) -> float:
    """Share of the groups of `length` consecutive words that occurred before in the text; 0 without repetition."""
    words = re.findall(r"\w+", text.lower())
    groups = [tuple(words[k : k + length]) for k in range(len(words) - length + 1)]
    return 1 - len(set(groups)) / len(groups) if groups else 0.0
