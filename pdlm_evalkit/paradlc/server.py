"""Captions from an OpenAI-compatible server: our own, which takes regions, or any vision-language model's."""

import json
import time
from collections.abc import Iterator
from typing import Any

from pdlm_hf.client import ChatClient, Reply
from pdlm_hf.client.chat import Request
from pdlm_hf.errors_pdlm import SettingError
from pdlm_hf.regions.crops import crops_message, images_message

from .captioning import CaptionRun, Pass
from .data import decode_masks, open_image

STYLES = ("regions", "crops")
MAX_REGIONS = 64  # of a request to our server, unless it is told otherwise


def server_lines(
    server: ChatClient,
    style: str,
    passes: list[Pass],
    prompt: str,
    max_new_tokens: int,
    run: CaptionRun,
    failed: list[str],
) -> Iterator[dict[str, Any]]:
    """Caption through a server.

    Args:
        server (`ChatClient`): the server and the settings of each request.
        style (`str`): "regions" sends an image and all masks of a pass to our own server; "crops" sends, for a pass
            of one mask, the image with its outline and a part of it, which any vision-language model reads.
        passes: what to caption.
        prompt (`str`): the question.
        max_new_tokens (`int`): slots per caption, to count them where the server says how often it ran.
        run (`CaptionRun`): its lines are not made again.
        failed (`list[str]`): gets the reason of every request that failed for good.

    Yields:
        a line of captions.jsonl per reply. Its seconds are those since the line before, so that they add up to the
        time the run took, however many requests were under way. Requests that failed for good yield nothing.

    Raises:
        ServerError: the server is of no use.
    """
    if style not in STYLES:
        raise SettingError(f"The style must be one of {', '.join(STYLES)}, got {style!r}.")
    known = set(run.captions)
    todo = [work for work in passes if not all(mask.id in known for mask in work[1])]
    if not todo:
        return
    server.probe(chat=style != "regions")
    build = regions_request if style == "regions" else crops_request
    last = time.perf_counter()
    for index, reply in server.ask_many(build(work, prompt) for work in todo):
        texts = read_texts(reply, style, len(todo[index][1]))
        now = time.perf_counter()
        if texts is None:
            failed.append(reply.error or f"the reply is not a list of captions: {reply.text!r:.80}.")
            continue
        captions = {mask.id: text for mask, text in zip(todo[index][1], texts, strict=True)}
        forwards = reply.usage.get("num_forwards")
        yield {
            "captions": captions,
            "seconds": round(now - last, 6),
            "num_forwards": forwards,
            "slots": None if forwards is None else len(captions) * max_new_tokens,
            "text_tokens": reply.completion_tokens,
        }
        last = now


def read_texts(reply: Reply, style: str, count: int) -> list[str] | None:
    """Captions in a reply, None if they are not there: our server's is a JSON list, others' the caption itself."""
    if reply.text is None:
        return None
    if style == "crops":
        return [reply.text.strip()]
    try:
        texts = json.loads(reply.text)
    except ValueError:
        return None
    whole = isinstance(texts, list) and len(texts) == count and all(isinstance(text, str) for text in texts)
    return texts if whole else None


def regions_request(work: Pass, prompt: str) -> Request:
    """An image with all masks of a pass, as our server takes them."""
    image, masks = work
    return {
        "messages": [images_message([open_image(image)], prompt)],
        "mm_processor_kwargs": {"regions": [mask.region for mask in masks]},
    }


def crops_request(work: Pass, prompt: str) -> Request:
    """An image with the outline of its one mask, and the part around the mask."""
    (mask,) = decode_masks(*work)
    return {"messages": [crops_message(open_image(work[0]), mask, prompt)]}
