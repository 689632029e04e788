"""What writes the captions of the page: the model in this process, or a server; and how to follow it live."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any, Protocol

from PIL import Image

from ..captioning.captioner import MODES, RegionCaptioner
from ..captioning.streaming import RegionStreamer
from ..client.captions import CaptionClient, request_of
from ..errors_pdlm import ServerError, SettingError
from ..processing_pdlm import RegionCaption
from ..regions.crops import png_url
from ..regions.region import Region, probe_image


@dataclass
class Draft:
    """How far the captions are.

    Args:
        step (`int`): from 1.
        texts (`list[str]`): of every region.
        seconds (`float`): since the start.
    """

    step: int
    texts: list[str]
    seconds: float


@dataclass
class Written:
    """The end of it.

    Args:
        captions (`list[RegionCaption]`): in the order of the regions.
        forwards (`int`, *optional*): passes of the model, where known.
        seconds (`float`): from the start to here.
    """

    captions: list[RegionCaption]
    forwards: int | None
    seconds: float


class Backend(Protocol):
    """Writes captions, one image at a time or several.

    Args:
        name (`str`): of the model.
        modes (`tuple[str, ...]`): speed modes it has, see [`settings_of`].
        at_a_time (`int`): images.
    """

    name: str
    modes: tuple[str, ...]
    at_a_time: int

    def write(
        self, image: Image.Image, regions: list[Region], settings: dict, on_step: Callable[[int, list[str]], None]
    ) -> tuple[list[RegionCaption], int | None]:
        """Captions of the regions and the passes they took; calls `on_step` with every draft."""


def settings_of(mode: str, steps: int, threshold: float) -> dict[str, Any]:
    """Settings of `generate` for the page's controls.

    Args:
        mode (`str`): "adaptive" commits what is more probable than the threshold, "fast" what tells little about the
            rest, "fixed" as many tokens at every step.
        steps (`int`): denoising steps at most.
        threshold (`float`): between 0 and 1.

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
    """The model in this process; one image at a time.

    Args:
        captioner ([`~pdlm_hf.captioning.RegionCaptioner`])
        name (`str`): of its checkpoint.
        max_new_tokens (`int`): slots per caption.

    Raises:
        SettingError: it cannot be used; found out on a small grey image.
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


class ServerBackend:
    """A server of ours.

    Args:
        server ([`~server.CaptionClient`])
        max_new_tokens (`int`): slots per caption.

    Raises:
        ServerError: it writes no captions; found out on a small grey image.
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
                found |= {row["id"]: RegionCaption(row["caption"], row["score"]) for row in event["regions"]}
                usage = event.get("usage") or usage
                if not usage:
                    on_step(step, [found[k].text if k in found else "" for k in range(len(regions))])
            captions = [found[k] for k in range(len(regions))]
        except (LookupError, TypeError, AttributeError) as error:
            raise ServerError(f"The server's answer is not one caption for each region ({error!r}).") from error
        for region, caption in zip(regions, captions, strict=True):
            caption.id, caption.bbox = region.id, region.bbox
        return captions, usage.get("num_forwards")


class _StoppedError(Exception):
    """Nobody follows any more."""


def follow(writer: Backend, image: Image.Image, regions: list[Region], settings: dict) -> Iterator[Draft | Written]:
    """Captions while they are written: drafts, at last [`Written`]. Who stops to ask for more stops the writing.

    Args:
        writer (`Backend`)
        image (`PIL.Image.Image`): RGB.
        regions (`list[Region]`): of the image.
        settings (`dict`): see [`settings_of`].

    Raises:
        what the writer raises.
    """
    news: SimpleQueue = SimpleQueue()
    stopped = threading.Event()
    start = time.perf_counter()

    def on_step(step: int, texts: list[str]) -> None:
        if stopped.is_set():
            raise _StoppedError
        whole = texts + [""] * (len(regions) - len(texts))  # of passes that come later
        news.put(Draft(step, whole, time.perf_counter() - start))

    def work() -> None:
        try:
            captions, forwards = writer.write(image, regions, settings, on_step)
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
