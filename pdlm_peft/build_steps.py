"""The steps of building: caption, check the category, compare with SAM's mask, filter."""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import groupby
from typing import Any

import numpy as np
from PIL import Image

from pdlm_hf.client.chat import ChatClient, Request
from pdlm_hf.errors_pdlm import DataError
from pdlm_hf.regions.crops import crops_message, images_message
from pdlm_hf.regions.region import Region, parse_region

from .build import Decide, Task, Verdict
from .rows import Fault, RowError

STYLES = ("crops", "regions")
CHECK_PROMPT = (
    'In an image, one region is annotated with the category "{category}". Somebody described this region without '
    "knowing the category:\n\n{caption}\n\nIs the described thing one of this category, or a kind, a part or a group "
    "of it? Answer with yes or no only."
)
_THOUGHTS = re.compile(r"<think>.*?</think>", re.DOTALL)


def mask_of(task: Task, image: Image.Image) -> np.ndarray:
    """The mask of a region, bool (H, W). Raises: DataError with the row."""
    try:
        return parse_region(task.region, *image.size, task.k).mask
    except ValueError as error:
        raise DataError(f"row {task.number}: regions[{task.k}]: {error}") from None


def ask(
    server: ChatClient,
    tasks: Iterable[Task],
    request: Callable[[Task], Request | None],
    read: Callable[[Task, str], Verdict],
) -> Iterator[tuple[Task, Verdict]]:
    """Ask a server about each region; several requests at a time, images opened as they are sent.

    Args:
        server (`ChatClient`): keeps its replies, so that nothing is asked twice, also after kill -9.
        tasks: the regions.
        request: what to ask; None if the region stays as it is.
        read: what a reply means.
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
    """Describe regions.

    Args:
        server (`ChatClient`): any vision-language model, or our own server.
        prompt (`str`): the question.
        style (`str`): "crops" shows the image with the region outlined and the part around it; "regions" sends the
            region itself, as our own server takes it.
        replace (`bool`): also describe regions that have a caption.
    """
    if style not in STYLES:
        raise DataError(f"The style must be one of {', '.join(STYLES)}, got {style!r}.")

    def request(task: Task) -> Request | None:
        if task.region.get("caption") and not replace:
            return None
        image = task.open_image()
        mask = mask_of(task, image)  # also checks the region for our own server
        if style == "crops":
            return {"messages": [crops_message(image, mask, prompt)]}
        shape = {key: task.region[key] for key in ("id", "segmentation", "bbox") if key in task.region}
        return {"messages": [images_message([image], prompt)], "mm_processor_kwargs": {"regions": [shape]}}

    def read(task: Task, text: str) -> Verdict:
        if style == "regions":
            try:
                (text,) = json.loads(text)
            except (ValueError, TypeError):
                return Verdict(error=f"the reply is not a list of one caption: {text[:80]!r}")
        caption = _THOUGHTS.sub("", str(text)).strip()
        if not caption:
            return Verdict(reason="empty caption")
        return Verdict({**task.region, "caption": caption})

    return lambda tasks: ask(server, tasks, request, read)


def check_step(server: ChatClient, prompt: str = CHECK_PROMPT) -> Decide:
    """Keep regions whose caption agrees with their `category`, as a language model sees it.

    Args:
        server (`ChatClient`): the language model.
        prompt (`str`): with {category} and {caption}.
    """
    if "{category}" not in prompt or "{caption}" not in prompt:
        raise DataError("The prompt needs {category} and {caption}.")

    def request(task: Task) -> Request:
        category = task.region.get("category")
        if not isinstance(category, str) or not category.strip():
            expected = "the name of its category (COCO files have it; leave this step out for others)"
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


class Segmenter:
    """A SAM model of transformers that gives the mask of a box.

    Args:
        model (`str`): folder or hub id of a Sam, Sam2 or similar model.
        device (`str`, *optional*): default: the GPU if there is one.

    Raises:
        DataError: it cannot be loaded.
    """

    def __init__(self, model: str, device: str | None = None):
        import torch
        from transformers import AutoModelForMaskGeneration, AutoProcessor

        try:
            self.processor = AutoProcessor.from_pretrained(model)
            self.model = AutoModelForMaskGeneration.from_pretrained(model).eval()
        except (OSError, ImportError, RuntimeError, KeyError, TypeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise DataError(f"{model}: cannot be loaded as a SAM model ({reason}).") from None
        self.model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))

    def masks(self, image: Any, boxes: list[list[float]]) -> np.ndarray:
        """Masks of objects in boxes.

        Args:
            image (`PIL.Image.Image`): RGB.
            boxes: x, y, x, y in pixels, the last two outside.

        Returns:
            bool (boxes, H, W)
        """
        import torch

        inputs = self.processor(images=image, input_boxes=[boxes], return_tensors="pt")
        with torch.no_grad():
            masks = self.model(**inputs.to(self.model.device), multimask_output=False).pred_masks
        sizes = [inputs[name].cpu() for name in ("original_sizes", "reshaped_input_sizes") if name in inputs]
        return self.processor.post_process_masks(masks.cpu(), *sizes)[0][:, 0].numpy() > 0


def remask_step(segmenter: Segmenter, min_iou: float, replace: bool = False) -> Decide:
    """Keep regions whose mask SAM finds again from its box.

    Args:
        segmenter (`Segmenter`): all regions of an image go through it together.
        min_iou (`float`): intersection over union of the two masks, at least.
        replace (`bool`): keep SAM's mask instead of the region's own.
    """
    if not 0 <= min_iou <= 1:
        raise DataError(f"The least IoU must be between 0 and 1, got {min_iou}.")

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
                meta = meta if isinstance(meta, dict) else {"meta": meta}  # whatever its owner keeps there
                region = {**task.region, "meta": {**meta, "sam_iou": round(overlap, 4)}}
                if replace:
                    region["segmentation"] = Region(None, other).segmentation
                yield task, Verdict(region)

    return decide


def box_around(mask: np.ndarray) -> list[float]:
    """x, y, x, y of a mask, the last two outside."""
    y, x = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    return [float(x[0]), float(y[0]), float(x[-1] + 1), float(y[-1] + 1)]


def iou(mask: np.ndarray, other: np.ndarray) -> float:
    """Intersection over union of two masks, one of them not empty."""
    return float((mask & other).sum() / (mask | other).sum())


def filter_step(min_words: int, max_words: int, max_repetition: float) -> Decide:
    """Keep captions of a length between two numbers of words that do not repeat themselves.

    Args:
        min_words, max_words (`int`): both still good.
        max_repetition (`float`): most [`repetition`] that is good.
    """
    if not 0 < min_words <= max_words or not 0 <= max_repetition <= 1:
        raise DataError("--min-words must be positive, --max-words not below it, --max-repetition between 0 and 1.")

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
    """Share of the groups of `length` words in a row that were there before; 0 for a text without loops."""
    words = re.findall(r"\w+", text.lower())
    groups = [tuple(words[k : k + length]) for k in range(len(words) - length + 1)]
    return 1 - len(set(groups)) / len(groups) if groups else 0.0
