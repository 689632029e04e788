"""What captions a data set: images with regions in, captions out. The model in this process is one such engine."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Protocol, TypeVar

import torch
from PIL import Image

from ..captioning.captioner import RegionCaptioner
from ..errors_pdlm import SettingError
from ..processing_pdlm import RegionCaption
from ..regions.images import load_image
from ..regions.region import MASK_PIXELS, Region, parse_region, probe_image
from .dataset import Entry, fault, image_size

_WINDOW = 64  # batches among which images are sorted by size
_LOADERS = 4  # threads

_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass
class Work:
    """An image to caption.

    Args:
        entry (`Entry`): where it comes from.
        image (`PIL.Image.Image`, *optional*): RGB; None: there is nothing to caption.
        regions (`list[Region]`): all that can be read, with their ids in the data set.
        faults (`list[dict]`): the others.
    """

    entry: Entry
    image: Image.Image | None = None
    regions: list[Region] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Outcome:
    """What came of an image, or of some of its regions.

    Args:
        work (`Work`), regions (`list[Region]`): which.
        captions (`list[RegionCaption]`, *optional*): one for each of the regions.
        error (`str`, *optional*): why there are none.
    """

    work: Work
    regions: list[Region]
    captions: list[RegionCaption] | None = None
    error: str | None = None


@dataclass
class Answer:
    """What is to be written of an image, or of some of its regions.

    Args:
        image_id: the image's id in the data set.
        rows (`list[dict]`): regions with captions.
        faults (`list[dict]`): what cannot be read, see [`~pdlm_hf.batch.fault`].
        failed (`list[dict]`): regions that could be read, and got no caption.
        last (`bool`): nothing more comes of this image.
    """

    image_id: Any
    rows: list[dict[str, Any]] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    last: bool = True


class Engine(Protocol):
    """Writes captions for a data set."""

    def caption(
        self, entries: list[Entry], done: Callable[[Entry], Collection[Any]], take: Callable[[Answer], None]
    ) -> None:
        """Caption what has no caption yet.

        Args:
            entries (`list[Entry]`): images.
            done: gives the ids of the regions of an image that have theirs.
            take: called with every answer, in any order, as soon as there is one.
        """


class ImageEngine(ABC):
    """An engine that is given images, opened by this process."""

    ahead: int  # images to open while it works

    def order(self, entries: Iterable[Entry]) -> Iterable[Entry]:
        """The order in which it likes to have them."""
        return entries

    @abstractmethod
    def run(self, works: Iterable[Work]) -> Iterator[Outcome]:
        """Caption images, read as needed; outcomes come in any order."""

    def caption(
        self, entries: list[Entry], done: Callable[[Entry], Collection[Any]], take: Callable[[Answer], None]
    ) -> None:
        """See [`Engine`]."""
        left: dict[Any, int] = {}  # regions of an image whose outcome is awaited

        def load(entry: Entry) -> Work:
            return load_work(entry, done(entry))

        def ready() -> Iterator[Work]:
            for work in prefetch(load, self.order(entries), self.ahead):
                there_is_work = work.image is not None
                if work.faults or not there_is_work:
                    take(Answer(work.entry.id, faults=work.faults, last=not there_is_work))
                if there_is_work:
                    left[work.entry.id] = len(work.regions)
                    yield work

        for outcome in self.run(ready()):
            entry = outcome.work.entry
            left[entry.id] -= len(outcome.regions)
            answer = Answer(entry.id, last=not left[entry.id])
            if outcome.captions is None:
                answer.failed = [fault(entry.id, r.id, entry.file_name, outcome.error) for r in outcome.regions]
            else:
                pairs = zip(outcome.regions, outcome.captions, strict=True)
                answer.rows = [_row(entry, region, caption) for region, caption in pairs]
            if answer.last:
                del left[entry.id]
            take(answer)


def _row(entry: Entry, region: Region, caption: RegionCaption) -> dict[str, Any]:
    return {
        "image_id": entry.id,
        "annotation_id": region.id,
        "file_name": entry.file_name,
        "caption": caption.text,
        "score": round(caption.score, 4),
        "bbox": region.bbox,
        "segmentation": region.segmentation,
    }


class LocalEngine(ImageEngine):
    """The model in this process, several images of about the same size a forward.

    Args:
        captioner ([`~pdlm_hf.captioning.RegionCaptioner`]): what captions.
        batch_size (`int`): images a forward at most; one with more regions than the checkpoint has region prompts
            counts several times.
        question (`str`, *optional*): as in [`~pdlm_hf.captioning.RegionCaptioner.caption`].
        **generation: settings of `generate`.

    Raises:
        SettingError: a setting that cannot be used; found out on a small grey image.
    """

    def __init__(
        self, captioner: RegionCaptioner, batch_size: int = 8, question: str | None = None, **generation: Any
    ):
        if batch_size < 1:
            raise SettingError(f"`batch_size` must be positive, got {batch_size}.")
        self.captioner, self.batch_size, self.ahead = captioner, batch_size, 2 * batch_size
        self.question, self.generation = question, generation
        captioner.caption(*probe_image(), question, **generation)

    def order(self, entries: Iterable[Entry]) -> Iterator[Entry]:
        """See [`largest_first`]."""
        return largest_first(entries, self.captioner.processor.image_processor, self.batch_size)

    def run(self, works: Iterable[Work]) -> Iterator[Outcome]:
        """Caption images in the order given; one with very many regions in several parts."""
        prompts = self.captioner.model.config.num_region_prompts
        batch: list[Outcome] = []
        passes = pixels = 0
        for work in works:
            if work.image is None:
                continue
            most = self.batch_size * prompts
            for start in range(0, len(work.regions), most):
                part = Outcome(work, work.regions[start : start + most])
                more = -(-len(part.regions) // prompts), len(part.regions) * work.image.width * work.image.height
                if batch and (passes + more[0] > self.batch_size or pixels + more[1] > MASK_PIXELS):
                    yield from self._caption(batch)
                    batch, passes, pixels = [], 0, 0
                batch.append(part)
                passes, pixels = passes + more[0], pixels + more[1]
        yield from self._caption(batch)

    def _caption(self, batch: list[Outcome]) -> Iterator[Outcome]:
        """Caption a batch; one that fails, for want of memory say, is halved until it is known which image it is."""
        if not batch:
            return
        try:
            pairs = [(part.work.image, part.regions) for part in batch]
            found = self.captioner.generate(pairs, self.question, **self.generation)[0]
        except (ValueError, torch.OutOfMemoryError) as error:
            if len(batch) == 1:
                yield replace(batch[0], error=str(error))
                return
        else:
            yield from (replace(part, captions=captions) for part, captions in zip(batch, found, strict=True))
            return
        half = len(batch) // 2  # not above: the traceback would keep the batch's tensors alive
        yield from self._caption(batch[:half])
        yield from self._caption(batch[half:])


def largest_first(
    entries: Iterable[Entry], image_processor: Any, batch_size: int, look: bool = True
) -> Iterator[Entry]:
    """Largest first among the next few batches: rows are padded to the longest of a batch, and what does not fit into
    memory fails early.

    Args:
        entries: images.
        image_processor: of the checkpoint; knows how many tiles an image has.
        batch_size (`int`): images a batch.
        look (`bool`): look into the files of images whose size the data set does not say; else they come last.
    """

    def size(entry: Entry) -> tuple[int, int]:
        """Tiles and regions of an image."""
        try:
            look_into = entry.path if look and entry.data is None else None
            found = entry.size or (image_size(look_into) if look_into is not None else None)
        except ValueError:  # is told when it is opened
            found = None
        if found is None:
            return 0, 0
        columns, rows = image_processor.grid(*found)
        return columns * rows, len(entry.ids or ())

    entries = iter(entries)
    while window := list(islice(entries, _WINDOW * batch_size)):
        yield from sorted(window, key=size, reverse=True)


def load_work(entry: Entry, done: Collection[Any]) -> Work:
    """Open an image and read its regions, as far as any of them is to be captioned. Never raises for bad files.

    Args:
        entry (`Entry`): the image.
        done: ids of the regions that have their caption. They are captioned again with the others of their image,
            so that a run that was stopped gives what one that was not does.
    """
    work = Work(entry)
    try:
        values = entry.read()
        if all(own in done for own, _ in values):
            return work
        image = load_image(entry.path or entry.file_name, entry.data)
        if entry.size is not None and tuple(entry.size) != image.size:
            raise SettingError(
                f"the data set says {entry.size[0]} x {entry.size[1]} pixels, the image has {image.size[0]} x "
                f"{image.size[1]} (EXIF orientation applied); its regions would lie elsewhere."
            )
    except Exception as error:  # readers of images raise what they like; one image must not end a run
        work.faults.append(fault(entry.id, None, entry.file_name, error))
        return work
    for own, value in values:
        try:
            work.regions.append(Region(own, parse_region(value, *image.size, own).mask))
        except (ValueError, OSError) as error:
            work.faults.append(fault(entry.id, own, entry.file_name, error))
    if not all(region.id in done for region in work.regions):
        work.image = image
    return work


def prefetch(function: Callable[[_T], _R], items: Iterable[_T], ahead: int) -> Iterator[_R]:
    """`map`, computed by a few threads, some items ahead of the one that is asked for."""
    with ThreadPoolExecutor(_LOADERS) as pool:
        pending: deque = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
