"""Captions from an OpenAI-compatible server: ours, which accepts regions, or that of any vision-language model."""

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
MAX_REGIONS = 64  # in a request; the default limit of our server


def server_lines(
    server: ChatClient,
    style: str,
    passes: list[Pass],
    prompt: str,
    max_new_tokens: int,
    run: CaptionRun,
    failed: list[str],
) -> Iterator[dict[str, Any]]:
    """Caption by a server.

    Args:
        server (`ChatClient`): the client, with the settings of each request.
        style (`str`): "regions" sends the image and all masks of a pass to our server; "crops" sends, for a pass of
            one mask, the image with the region outlined and the crop of the region, for any vision-language model.
        passes: the passes to caption.
        prompt (`str`): the question.
        max_new_tokens (`int`): token positions per caption, for servers that report their forward passes.
        run (`CaptionRun`): the run; its masks are not captioned again.
        failed (`list[str]`): list to append the reason of every failed request to.

    Yields:
        a line of captions.jsonl per reply. Its seconds are those since the previous line, so that they add up to the
        time of the run for any number of simultaneous requests. A request that fails after all attempts has no line.

    Raises:
        SettingError: the style does not exist.
        ServerError: the server cannot be used.
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
    """The captions in a reply, None without captions: our server replies with a JSON list, others with the caption."""
    if reply.text is None:
        return None
    if style == "crops":
        return [reply.text.strip()]
    try:
        texts = json.loads(reply.text)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(texts, list) and len(texts) == count and all(isinstance(text, str) for text in texts)
    return texts if whole else None


def regions_request(work: Pass, prompt: str) -> Request:
    """The request for all masks of a pass to our server."""
    image, masks = work
    return {
        "messages": [images_message([open_image(image)], prompt)],
        "mm_processor_kwargs": {"regions": [mask.region for mask in masks]},
    }


def crops_request(work: Pass, prompt: str) -> Request:
    """The request for one mask to any vision-language model."""
    (mask,) = decode_masks(*work)
    return {"messages": [crops_message(open_image(work[0]), mask, prompt)]}
