"""Backends that write the captions of the page: the model in this process, or a server."""

import threading
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Protocol

from PIL import Image

from ..attributes.results import RegionAttributes
from ..attributes.schema import AttributeSchema
from ..captioning.captioner import MODES, RegionCaptioner
from ..captioning.streaming import RegionStreamer
from ..client.captions import CaptionClient, caption_of, request_of
from ..errors_pdlm import ServerError, SettingError
from ..processing_pdlm import RegionCaption
from ..regions.crops import png_url
from ..regions.region import Region, probe_image


@dataclass
class Draft:
    """The captions after a denoising step.

    Args:
        step (`int`): number of the step, from 1.
        texts (`list[str]`): one draft per region.
        seconds (`float`): time since the start.
    """

    step: int
    texts: list[str]
    seconds: float


@dataclass
class Written:
    """The finished captions.

    Args:
        captions (`list[RegionCaption]`): in the order of the regions.
        forwards (`int`, *optional*): forward passes of the model, if known.
        seconds (`float`): time since the start.
    """

    captions: list[RegionCaption]
    forwards: int | None
    seconds: float


class Backend(Protocol):
    """Writes captions.

    Args:
        name (`str`): name of the model.
        modes (`tuple[str, ...]`): the speed modes it supports, see [`settings_of`].
        at_a_time (`int`): images that it captions at the same time.
    """

    name: str
    modes: tuple[str, ...]
    at_a_time: int

    def write(
        self, image: Image.Image, regions: list[Region], settings: dict, on_step: Callable[[int, list[str]], None]
    ) -> tuple[list[RegionCaption], int | None]:
        """Return the captions of the regions and the number of forward passes; call `on_step` with every draft."""

    def attributes(
        self, image: Image.Image, regions: list[Region], schema: AttributeSchema
    ) -> tuple[list[RegionAttributes], int | None]:
        """Return the attributes of the regions and the number of forward passes."""


def settings_of(mode: str, steps: int, threshold: float) -> dict[str, Any]:
    """Translate the page's controls into settings of `generate`.

    Args:
        mode (`str`): "adaptive" accepts tokens above the threshold, "fast" tokens of a small joint entropy, "fixed"
            the same number of tokens at every step.
        steps (`int`): largest number of denoising steps.
        threshold (`float`): probability between 0 and 1.

    Raises:
        SettingError: no such mode.
    """
    rules = {
        "adaptive": {"acceptance_threshold": float(threshold)},
        "fast": MODES["fast"],
        "fixed": {"acceptance_threshold": None},
    }
    if mode not in rules:
        raise SettingError(f"There is no mode {mode!r}; choose one of {', '.join(rules)}.")
    return {**rules[mode], "max_denoising_steps": int(steps)}


class LocalBackend:
    """The model in this process; it captions one image at a time.

    Args:
        captioner ([`~pdlm_hf.captioning.RegionCaptioner`]): the model.
        name (`str`): name of its checkpoint.
        max_new_tokens (`int`): token positions per caption.

    Raises:
        SettingError: the model cannot write captions; it is tried on a small grey image.
    """

    modes = ("adaptive", "fast", "fixed")
    at_a_time = 1

    def __init__(self, captioner: RegionCaptioner, name: str, max_new_tokens: int = 32):
        self.captioner, self.name, self.max_new_tokens = captioner, name, max_new_tokens
        self._lock = threading.Lock()
        captioner.caption(*probe_image(), max_new_tokens=max_new_tokens)

    def write(self, image, regions, settings, on_step):
        """See [`Backend`]."""
        fixed = {} if settings.get("entropy_bound") else {"entropy_bound": None}
        with self._lock:
            streamer = RegionStreamer(self.captioner.processor, lambda step, drafts: on_step(step, drafts[0]))
            captions, output = self.captioner.generate(
                [(image, regions)], streamer=streamer, max_new_tokens=self.max_new_tokens, **fixed, **settings
            )
        return captions[0], output.num_forwards

    def attributes(self, image, regions, schema):
        """See [`Backend`]. Raises: SettingError: the checkpoint's tokenizer cannot write a choice."""
        with self._lock:
            found, output = self.captioner.read_attributes([(image, regions)], schema)
        return found[0], output.num_forwards


class ServerBackend:
    """A vLLM server with the region route.

    Args:
        server ([`~pdlm_hf.client.CaptionClient`]): client of the server.
        max_new_tokens (`int`): token positions per caption.

    Raises:
        ServerError: the server writes no captions; it is tried on a small grey image.
    """

    modes = ("adaptive", "fixed")
    at_a_time = 8

    def __init__(self, server: CaptionClient, max_new_tokens: int = 32):
        self.server, self.name, self.max_new_tokens = server, server.model, max_new_tokens
        server.probe()

    def write(self, image, regions, settings, on_step):
        """See [`Backend`]. Raises: ServerError."""
        request = {**request_of(png_url(image), regions), **settings, "max_new_tokens": self.max_new_tokens}
        found: dict[int, RegionCaption] = {}
        usage: dict[str, Any] = {}
        try:
            for step, event in enumerate(self.server.stream(request), 1):
                found |= {row["id"]: caption_of(row) for row in event["regions"]}
                usage = event.get("usage") or usage
                if not usage:
                    on_step(step, [found[k].text if k in found else "" for k in range(len(regions))])
            captions = [found[k] for k in range(len(regions))]
        except (LookupError, TypeError, AttributeError) as error:
            raise ServerError(f"The server's answer is not one caption for each region ({error!r}).") from error
        for region, caption in zip(regions, captions, strict=True):
            caption.id, caption.bbox = region.id, region.bbox
        return captions, usage.get("num_forwards")

    def attributes(self, image, regions, schema):
        """See [`Backend`]. Raises: ServerError."""
        with closing(self.server.with_schema(schema)) as reader:
            return reader.attributes(image, regions)


class _StoppedError(Exception):
    """The consumer stopped reading."""


_News = Generator[Draft | Written, None, None]


def follow(backend: Backend, image: Image.Image, regions: list[Region], settings: dict) -> _News:
    """Yield the drafts of the captions, and at the end [`Written`]. Closing the generator stops the backend.

    Args:
        backend (`Backend`): writes the captions.
        image (`PIL.Image.Image`): RGB.
        regions (`list[Region]`): regions of the image.
        settings (`dict`): see [`settings_of`].

    Raises:
        Exception: any error of the backend.
    """
    news: SimpleQueue = SimpleQueue()
    stopped = threading.Event()
    start = time.perf_counter()

    def on_step(step: int, texts: list[str]) -> None:
        if stopped.is_set():
            raise _StoppedError
        whole = texts + [""] * (len(regions) - len(texts))  # the regions of later passes have no draft yet
        news.put(Draft(step, whole, time.perf_counter() - start))

    def work() -> None:
        try:
            captions, forwards = backend.write(image, regions, settings, on_step)
            news.put(Written(captions, forwards, time.perf_counter() - start))
        except _StoppedError:
            pass
        except BaseException as error:
            news.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            item = news.get()
            if isinstance(item, BaseException):
                raise item
            yield item
            if isinstance(item, Written):
                return
    finally:
        stopped.set()
