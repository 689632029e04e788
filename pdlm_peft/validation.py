"""Validation of region data before training: all faults with their rows, and a summary of the data."""

import gc
import hashlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pdlm_hf.attributes.schema import AttributeSchema
from pdlm_hf.errors_pdlm import SettingError
from pdlm_hf.regions.region import region_areas
from pdlm_hf.templates_pdlm import MOST_TOKENS

from .data import decode_row
from .rows import (
    WHOLE,
    Fault,
    RowError,
    check_row,
    known_attributes,
    normal_row,
    open_row_image,
    row_size,
    schema_faults,
    size_fault,
)
from .sources import Source, raw_rows

_BATCH = 32  # rows whose masks and captions are checked together; more of them leave the cache of the processor


@dataclass
class Report:
    """The result of a validation.

    Args:
        faults (`list[Fault]`): all faults, in the order of the rows.
        summary (`dict`): counts and distributions over the rows that could be read.
        samples: number and row, as read, of the first rows without a fault.
    """

    faults: list[Fault]
    summary: dict[str, Any]
    samples: list[tuple[int, Any]] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """Number of faults by kind, the most frequent first."""
        return dict(Counter(fault.kind for fault in self.faults).most_common())


class Validator:
    """Checks region data. Only ids, areas, lengths and faults are kept in memory.

    Args:
        processor (`PdlmProcessor`): tokenizes captions; the summary uses its number of region prompts.
        open_images (`bool`): decode every image; otherwise sizes are taken from the rows and RLEs.
        max_caption_tokens (`int`, *optional*): a longer caption is a fault.
        max_regions (`int`, *optional*): more regions in a row are a fault. More regions than the checkpoint has
            region prompts are not: training splits them into groups.
        samples (`int`): number of rows without a fault to keep for drawing.
        schema (`AttributeSchema`, *optional*): the attributes that regions may have, and their choices.

    Raises:
        SettingError: a limit is not positive.
    """

    def __init__(
        self,
        processor: Any,
        open_images: bool = True,
        max_caption_tokens: int | None = 512,
        max_regions: int | None = None,
        samples: int = 0,
        schema: AttributeSchema | None = None,
    ):
        for name, value in (("max_caption_tokens", max_caption_tokens), ("max_regions", max_regions)):
            if value is not None and value < 1:
                raise SettingError(f"`{name}` must be positive, got {value}.")
        self.processor, self.open_images, self.num_samples = processor, open_images, samples
        self.max_caption_tokens, self.max_regions = max_caption_tokens, max_regions
        self.schema = schema
        self._special_ids = frozenset(processor.tokenizer.added_tokens_decoder)

    def validate(self, source: Source) -> Report:
        """Check all rows.

        Args:
            source ([`~sources.Source`]): where the rows are.

        Raises:
            DataError: the source as a whole cannot be read.
        """
        self.faults: list[Fault] = []
        self.samples: list[tuple[int, Any]] = []
        self.images: set[bytes] = set()
        self.ids: dict[bytes, tuple[int | bytes, ...] | set[int | bytes]] = {}  # by image and question
        self.areas: list[float] = []
        self.lengths: list[int] = []
        self.region_counts: list[int] = []
        self.attributes: dict[str, Counter[str]] = {}  # regions by value
        self._reasons: dict[str, tuple[str, str, str] | None] = {}  # what is wrong with a name or value
        self.rows = 0
        rows = readable_rows(source)
        collecting = gc.isenabled()
        gc.disable()  # rows have no reference cycles; traversing them takes a quarter of the time
        try:
            # the allocator gives a thread a heap of its own; in that of a million annotations, the tokenizer's small
            # allocations fill holes far apart, which takes three times as long
            with ThreadPoolExecutor(1) as self._thread:
                while batch := list(islice(rows, _BATCH)):
                    self._check_batch(batch, source.folder)
        finally:
            if collecting:
                gc.enable()
        if not self.rows:
            self.faults.append(Fault(1, "file", "no rows", "no rows", "at least one"))
        self.faults.sort(key=lambda fault: fault.row)
        return Report(self.faults, self._summary(), self.samples)

    def _check_batch(self, batch: list[tuple[int, Any]], folder: Path | None) -> None:
        shapes: list[tuple[int, int, dict, tuple[int, int]]] = []
        captions: list[tuple[int, int, str]] = []
        first, sound = len(self.faults), []
        for number, raw in batch:
            self.rows += 1
            if isinstance(raw, RowError):
                self.faults.append(raw.fault)
                continue
            row = normal_row(raw)
            found = list(check_row(row, number))
            self.faults += found
            if not isinstance(row, dict):
                continue
            size = self._size(row, number, folder, found)
            self._check_ids(row, number)
            regions = row["regions"] if isinstance(row.get("regions"), list) else []
            self.region_counts.append(len(regions))
            if self.max_regions is not None and len(regions) > self.max_regions:
                self.faults.append(
                    Fault(number, "regions", "too many regions", f"{len(regions)}", f"at most {self.max_regions}")
                )
            wrong = {fault.field for fault in found}
            for k, region in enumerate(regions):
                name = f"regions[{k}]"
                if not isinstance(region, dict):
                    continue
                if size and wrong.isdisjoint((name, f"{name}.segmentation", f"{name}.bbox")):
                    shapes.append((number, k, region, size))
                if f"{name}.caption" not in wrong and region.get("caption") is not None:
                    captions.append((number, k, region["caption"]))
                if "attributes" in region and not any(field.startswith(f"{name}.attributes") for field in wrong):
                    self._check_attributes(number, name, region)
            sound.append((number, raw))
        self._check_masks(shapes)
        self._check_captions(captions)
        if len(self.samples) < self.num_samples:
            faulty = {fault.row for fault in self.faults[first:]}
            good = [pair for pair in sound if pair[0] not in faulty]
            self.samples += good[: self.num_samples - len(self.samples)]

    def _size(self, row: dict, number: int, folder: Path | None, found: list[Fault]) -> tuple[int, int] | None:
        """Width and height of the image; None if they are not known."""
        if any(fault.field in ("image", "width", "height") for fault in found):
            return None
        self.images.add(_digest(row["image"]))
        if not self.open_images:
            return row_size(row)
        try:
            size = open_row_image(row["image"], folder).size
        except ValueError as error:
            self.faults.append(image_fault(number, error))
            return None
        if fault := size_fault(row, number, size):
            self.faults.append(fault)
        return size

    def _check_ids(self, row: dict, number: int) -> None:
        """Find ids that another row with the same image and question has, too."""
        if not isinstance(row.get("regions"), list) or "image" not in row:
            return
        own: dict[int | bytes, int] = {}  # the position of every id
        for k, region in enumerate(row["regions"]):
            if isinstance(region, dict) and "id" in region:
                identifier = region["id"]
                own.setdefault(identifier if type(identifier) is int else _digest(identifier), k)
        place = _digest(row["image"], row.get("question"))
        known = self.ids.get(place)
        if known is None:
            self.ids[place] = tuple(own)  # most images have one row, and a set would take far more memory
            return
        if isinstance(known, tuple):
            known = self.ids[place] = set(known)
        for k in sorted(own[key] for key in own.keys() & known):
            got = f"{row['regions'][k]['id']!r}, which another row with this image has"
            self.faults.append(Fault(number, f"regions[{k}].id", "duplicate id", got, "an id of its own"))
        known.update(own)

    def _check_masks(self, shapes: list[tuple[int, int, dict, tuple[int, int]]]) -> None:
        areas = region_areas([region for *_, region, _ in shapes], [size for *_, size in shapes])
        for (number, k, region, (width, height)), area in zip(shapes, areas, strict=True):
            if not isinstance(area, ValueError):
                self.areas.append(area / (width * height))
                if 0 < area < width * height:
                    continue
            field, shape = f"regions[{k}]", region.get("segmentation")
            image = f"the image of {width} x {height}"
            if isinstance(area, ValueError):
                size = list(shape["size"]) if isinstance(shape, dict) and isinstance(shape.get("size"), list) else None
                if size is not None and size != [height, width]:
                    kind, got = "other size", f"an RLE of size {size}"
                    expected = f"{[height, width]} (height, width), as the image"
                else:
                    kind = "broken " + ("RLE" if isinstance(shape, dict) else "polygons" if shape else "box")
                    got, expected = str(area).partition(": ")[2].rstrip("."), f"a region of {image}"
                self.faults.append(Fault(number, field, kind, got, expected))
            elif area == 0:
                self.faults.append(Fault(number, field, "empty mask", "no pixel", f"some of {image}"))
            elif region.get("bbox") != WHOLE:
                expected = f"a part of {image}; is the mask inverted?"
                self.faults.append(Fault(number, field, "full mask", "every pixel", expected))

    def _check_captions(self, captions: list[tuple[int, int, str]]) -> None:
        if not captions:
            return
        encoded = self._thread.submit(self._token_ids, [text for *_, text in captions]).result()
        for (number, k, text), ids in zip(captions, encoded, strict=True):
            self.lengths.append(len(ids))
            if self.max_caption_tokens is not None and len(ids) > self.max_caption_tokens:
                got, most = f"{len(ids)} tokens", f"at most {self.max_caption_tokens}"
                self.faults.append(Fault(number, f"regions[{k}].caption", "long caption", got, most))
            if not self._special_ids.isdisjoint(ids):
                try:
                    self.processor.refuse_specials(text, "the caption")
                except ValueError as error:
                    self.faults.append(Fault(number, f"regions[{k}].caption", "special tokens", str(error), "text"))

    def _check_attributes(self, number: int, field: str, region: dict) -> None:
        """Find texts that a template cannot hold, and otherwise values that the schema lacks."""
        found = []
        for name, value in known_attributes(region).items():
            self.attributes.setdefault(name, Counter())[value] += 1
            reasons = filter(None, map(self._reason, (name, value)))
            found += [Fault(number, f"{field}.attributes.{name:.60}", *reason) for reason in reasons]
        if self.schema is not None and not found:
            found += schema_faults(region, field, number, self.schema)
        self.faults += found

    def _reason(self, text: str) -> tuple[str, str, str] | None:
        """Kind, what came and what was expected, of a name or value that cannot be used; each is looked at once."""
        if text not in self._reasons:
            ids = self.processor.tokenizer(f" {text}", add_special_tokens=False)["input_ids"]
            reason = None
            if not self._special_ids.isdisjoint(ids):
                reason = "special tokens", f"{text!r:.60}", "a text without special tokens of the model"
            elif len(ids) > MOST_TOKENS:
                reason = "long attribute", f"{text!r:.60} with {len(ids)} tokens", f"at most {MOST_TOKENS}"
            self._reasons[text] = reason
        return self._reasons[text]

    def _token_ids(self, texts: list[str]) -> list[list[int]]:
        # the tokenizer's own call would also compute positions in the text
        encoded = self.processor.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def _summary(self) -> dict[str, Any]:
        prompts = self.processor.image_processor.num_region_prompts
        return {
            "rows": self.rows,
            "images": len(self.images),
            "regions": sum(self.region_counts),
            "regions_per_row": spread(self.region_counts),
            "area_share": spread(self.areas),
            "caption_tokens": spread(self.lengths),
            "attributes": {
                name: {"regions": values.total(), "values": len(values)} for name, values in self.attributes.items()
            },
            "region_prompts": prompts,
            "rows_in_several_groups": sum(count > prompts for count in self.region_counts),
            "images_opened": self.open_images,
        }


def readable_rows(source: Source) -> Iterator[tuple[int, Any]]:
    """Rows of a source; if the file is not UTF-8 text, a [`RowError`] is the last one."""
    number = 0
    try:
        for number, row in raw_rows(source):
            yield number, row
    except UnicodeDecodeError as error:
        yield number + 1, RowError(Fault(number + 1, "file", "broken JSON", str(error), "text in UTF-8"))


def image_fault(number: int, error: ValueError) -> Fault:
    """The fault of a row whose image could not be opened."""
    kind = "missing image" if "no such file" in str(error) else "broken image"
    return Fault(number, "image", kind, str(error).rstrip("."), "an image that can be decoded")


def _digest(*values: Any) -> bytes:
    """A short hash of long values, so that millions of them fit into memory."""
    return hashlib.blake2b(repr(values).encode(), digest_size=12).digest()


def spread(values: list) -> dict[str, float] | None:
    """Minimum, median, 95th percentile and maximum; None for an empty list."""
    if not values:
        return None
    array = np.asarray(values, dtype=np.float64)
    names = {"min": 0, "median": 50, "p95": 95, "max": 100}
    return {name: round(float(np.percentile(array, q)), 6) for name, q in names.items()}


def _text_of(region: dict[str, Any]) -> str:
    """The caption of a decoded region, or its attributes in a list."""
    return region["caption"] or ", ".join(f"{name}: {value}" for name, value in region["attributes"].items())


def draw_samples(samples: list[tuple[int, Any]], folder: Path | None, out: Path) -> list[Path]:
    """Draw rows with their regions and captions.

    Args:
        samples: those of a [`Report`].
        folder (`Path`, *optional*): folder that relative paths of images start from.
        out (`Path`): image file for all rows, one below the other, or a folder for one file per row.

    Returns:
        the files.

    Raises:
        DataError: an image cannot be opened.
    """
    from pdlm_hf.processing_pdlm import RegionCaption
    from pdlm_hf.regions.region import Region
    from pdlm_hf.render.drawing import contact_sheet, draw_captions

    drawn = []
    for number, raw in samples:
        row = decode_row(number, raw, folder)
        regions = [Region(region["id"], region["mask"]) for region in row["regions"]]
        captions = [RegionCaption(_text_of(region), 1.0) for region in row["regions"]]
        drawn.append((number, draw_captions(row["image"], regions, captions)))
    if out.is_dir():
        paths = [out / f"row_{number}.png" for number, _ in drawn]
        for path, (_, image) in zip(paths, drawn, strict=True):
            image.save(path)
        return paths
    images = [image for _, image in drawn]
    contact_sheet(images, columns=1, width=max(image.width for image in images)).save(out)
    return [out]
