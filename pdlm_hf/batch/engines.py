"""Engines caption the images of a data set; one of them is the model in this process."""

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Protocol, TypeVar

import torch
from PIL import Image

from ..captioning.captioner import PreparedBatch, RegionCaptioner
from ..errors_pdlm import DataError, SettingError
from ..processing_pdlm import RegionCaption
from ..regions.images import load_image
from ..regions.region import MASK_PIXELS, Region, parse_region, probe_image
from .dataset import Entry, fault, image_size

_WINDOW = 64  # number of batches whose images are sorted by size together
_LOADERS = 4  # threads

_T = TypeVar("_T")
_R = TypeVar("_R")


@dataclass
class Work:
    """An image to caption.

    Args:
        entry (`Entry`): its entry in the data set.
        image (`PIL.Image.Image`, *optional*): RGB; None if there is nothing to caption.
        regions (`list[Region]`): the regions that can be read, with their ids in the data set.
        faults (`list[dict]`): rows about regions that cannot be read, see [`~pdlm_hf.batch.dataset.fault`].
    """

    entry: Entry
    image: Image.Image | None = None
    regions: list[Region] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Outcome:
    """The captions of an image, or of some of its regions.

    Args:
        work (`Work`), regions (`list[Region]`): the image and its regions.
        captions (`list[RegionCaption]`, *optional*): one for each region.
        error (`str`, *optional*): the reason if there are no captions.
    """

    work: Work
    regions: list[Region]
    captions: list[RegionCaption] | None = None
    error: str | None = None


@dataclass
class Answer:
    """The rows to write about an image, or about some of its regions.

    Args:
        image_id: id of the image in the data set.
        rows (`list[dict]`): regions with captions.
        faults (`list[dict]`): images and regions that cannot be read, see [`~pdlm_hf.batch.dataset.fault`].
        failed (`list[dict]`): regions that could be read, but got no caption.
        last (`bool`): no further answer about this image follows.
    """

    image_id: Any
    rows: list[dict[str, Any]] = field(default_factory=list)
    faults: list[dict[str, Any]] = field(default_factory=list)
    failed: list[dict[str, Any]] = field(default_factory=list)
    last: bool = True


class Engine(Protocol):
    """Captions the images of a data set."""

    def caption(
        self, entries: list[Entry], done: Callable[[Entry], Collection[Any]], take: Callable[[Answer], None]
    ) -> None:
        """Caption the regions that have no caption yet.

        Args:
            entries (`list[Entry]`): the images.
            done: returns the ids of the regions of an image that have a caption.
            take: called with every answer as soon as it is complete, in any order.
        """


class ImageEngine(ABC):
    """An engine whose images are opened by this process."""

    ahead: int  # number of images to open in advance

    def order(self, entries: Iterable[Entry]) -> Iterable[Entry]:
        """Return the images in the order that suits the engine."""
        return entries

    @abstractmethod
    def run(self, works: Iterable[Work]) -> Iterator[Outcome]:
        """Caption images, taken as needed; outcomes come in any order."""

    def caption(
        self, entries: list[Entry], done: Callable[[Entry], Collection[Any]], take: Callable[[Answer], None]
    ) -> None:
        """See [`Engine`]."""
        left: dict[Any, int] = {}  # number of regions of an image without outcome

        def load(entry: Entry) -> Work:
            return load_work(entry, done(entry))

        def ready() -> Iterator[Work]:
            for work in prefetch(load, self.order(entries), self.ahead):
                to_do = work.image is not None
                if work.faults or not to_do:
                    take(Answer(work.entry.id, faults=work.faults, last=not to_do))
                if to_do:
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
    place = {"image_id": entry.id, "annotation_id": region.id, "file_name": entry.file_name}
    shape = {"bbox": region.bbox, "segmentation": region.segmentation}
    return place | {key: value for key, value in caption.to_row().items() if key != "id"} | shape


class LocalEngine(ImageEngine):
    """The model in this process, several images of about the same size in a batch.

    Args:
        captioner ([`~pdlm_hf.captioning.RegionCaptioner`]): the model.
        batch_size (`int`): images in a batch at most; an image with more regions than the checkpoint has region
            prompts counts several times.
        question (`str`, *optional*): as in [`~pdlm_hf.captioning.RegionCaptioner.caption`].
        **generation: settings of `generate`.

    Raises:
        SettingError: a setting cannot be used, according to a test with a small grey image.
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
        """Caption images in the given order; an image with very many regions is captioned in several parts. A batch is
        prepared while the model computes the one before it."""
        for batch, prepared in prefetch(self._prepare, self._batches(works), 1):
            yield from self._caption(batch, prepared)

    def _batches(self, works: Iterable[Work]) -> Iterator[list[Outcome]]:
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
                    yield batch
                    batch, passes, pixels = [], 0, 0
                batch.append(part)
                passes, pixels = passes + more[0], pixels + more[1]
        if batch:
            yield batch

    def _prepare(self, batch: list[Outcome]) -> tuple[list[Outcome], PreparedBatch | None]:
        """A batch, and the model's inputs for it; without them where that fails, which [`_caption`] looks into."""
        try:
            return batch, self.captioner.prepare([(part.work.image, part.regions) for part in batch], self.question)
        except (ValueError, torch.OutOfMemoryError):
            return batch, None

    def _caption(self, batch: list[Outcome], prepared: PreparedBatch | None = None) -> Iterator[Outcome]:
        """Caption a batch. A batch that fails, for example for lack of memory, is halved until one image is left."""
        try:
            pairs = prepared or [(part.work.image, part.regions) for part in batch]
            found = self.captioner.generate(pairs, self.question, **self.generation)[0]
        except (ValueError, torch.OutOfMemoryError) as error:
            if len(batch) == 1:
                yield replace(batch[0], error=str(error))
                return
        else:
            yield from (replace(part, captions=captions) for part, captions in zip(batch, found, strict=True))
            return
        del pairs, prepared
        half = len(batch) // 2  # outside of `except`, whose traceback keeps the tensors of the batch alive
        yield from self._caption(batch[:half])
        yield from self._caption(batch[half:])


def largest_first(
    entries: Iterable[Entry], image_processor: Any, batch_size: int, look: bool = True
) -> Iterator[Entry]:
    """Sort images by size within the next few batches, the largest first. Images of one size need little padding, and
    images that do not fit into memory fail early.

    Args:
        entries: the images.
        image_processor: the checkpoint's, which computes the number of tiles of an image.
        batch_size (`int`): images in a batch.
        look (`bool`): read the size from the file if the data set does not have it; otherwise such images come last.
    """

    def size(entry: Entry) -> tuple[int, int]:
        """Tiles and regions of an image."""
        try:
            look_into = entry.path if look and entry.data is None else None
            found = entry.size or (image_size(look_into) if look_into is not None else None)
        except ValueError:  # reported when the image is opened
            found = None
        if found is None:
            return 0, 0
        columns, rows = image_processor.grid(*found)
        return columns * rows, len(entry.ids or ())

    entries = iter(entries)
    while window := list(islice(entries, _WINDOW * batch_size)):
        yield from sorted(window, key=size, reverse=True)


def load_work(entry: Entry, done: Collection[Any]) -> Work:
    """Open an image and read its regions, if any region has no caption yet. Files that cannot be read become faults.

    Args:
        entry (`Entry`): the image.
        done: ids of the regions that have a caption. They are captioned again with the others of their image, so that
            a resumed run writes the same captions as one that was never stopped.
    """
    work = Work(entry)
    try:
        values = entry.read()
        if all(own in done for own, _ in values):
            return work
        image = load_image(entry.path or entry.file_name, entry.data)
        if entry.size is not None and tuple(entry.size) != image.size:
            raise DataError(
                f"the data set says {entry.size[0]} x {entry.size[1]} pixels, the image has {image.size[0]} x "
                f"{image.size[1]} (EXIF orientation applied); its regions would lie elsewhere."
            )
    except Exception as error:  # image readers raise errors of many kinds, and one image must not end the run
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
    """`map` by a few threads, computed some items in advance."""
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
