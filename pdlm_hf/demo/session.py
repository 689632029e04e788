"""The state of one user: an image, the regions marked on it, and their captions."""

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from tempfile import TemporaryDirectory
from threading import RLock
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from ..attributes.results import RegionAttributes, csv_fields, csv_row, write_csv
from ..errors_pdlm import ImageError, PdlmError, RegionError
from ..image_processing_pdlm import to_rgb
from ..processing_pdlm import RegionCaption, area_order
from ..regions.crops import png_url
from ..regions.finding.selection import FoundRegion
from ..regions.readers import from_label_map, read_region_file
from ..regions.region import Region, parse_region, parse_regions
from ..render.drawing import colour_of, draw_captions, draw_regions, ink_on
from ..render.html import jpeg_url
from .gestures import box_mask, nudged_mask, pixel_at, read_numbers, stroke_mask
from .limits import MAX_MASK_PIXELS, MAX_PAST_PIXELS, MAX_REGIONS, open_upload

_SHOWN = 1000  # pixels of the longer side on the page
_UNDO = 50
_REGION_FILES = (".json", ".txt", ".xml")


class Moment(NamedTuple):
    """What Undo brings back: an image, its name, the image as the page shows it, and the regions."""

    image: Image.Image
    name: str
    small: Image.Image
    regions: list[dict[str, Any]]


@dataclass
class Session:
    """The state of one user. Regions are kept as COCO annotations, because the masks of large images take much memory.

    Only the thread that holds `lock` may change it.

    Args:
        image (`PIL.Image.Image`, *optional*): RGB.
        name (`str`): name of its file.
        small (`PIL.Image.Image`, *optional*): the image at the size of the page, if that is smaller; else the image.
        regions (`list[dict]`): "id", "segmentation" (RLE), and "shown", the RLE at that size; "brushed" if it was
            painted, so that a stroke can extend it.
        captions (`list[RegionCaption]`, *optional*): captions of these regions.
        attributes (`list[RegionAttributes]`, *optional*): attributes of these regions.
        version (`int`): number that grows whenever image or regions change.
        past (`list[Moment]`): what Undo brings back, the newest last.
    """

    image: Image.Image | None = None
    name: str = ""
    small: Image.Image | None = None
    regions: list[dict[str, Any]] = field(default_factory=list)
    captions: list[RegionCaption] | None = None
    attributes: list[RegionAttributes] | None = None
    version: int = 0
    past: list[Moment] = field(default_factory=list, repr=False)

    def __post_init__(self):
        self.lock = RLock()  # not a field: gradio serializes the fields of the initial state
        self._nudged: Any = None  # id of the region that the last change moved

    def __deepcopy__(self, memo: dict) -> "Session":
        """Return an empty session: gradio copies the initial state for every user."""
        return Session()

    def open(self, name: str, data: bytes) -> None:
        """Begin with an uploaded image. Raises: ImageError, and the session is unchanged."""
        self.start(to_rgb(open_upload(name, data), name), name)

    def start(self, image: Image.Image, name: str, masks: Any = ()) -> None:
        """Begin with an image (RGB) and masks."""
        self._remember()
        self.image, self.name = image, name
        self.small = image.resize(_shown_size(image)) if max(image.size) > _SHOWN else image
        self._set([self._row(Region(k, mask), k) for k, mask in enumerate(masks, 1)])

    def drop(self, files: list[tuple[str, bytes]]) -> dict[str, Any] | None:
        """Take files that were dropped on the page: masks and files of regions are added, an image is opened.

        Args:
            files: names and contents.

        Returns:
            None; or, if an image would replace regions, and nothing happened, what to ask: its "name", and whether it
            "fits", so that it may be meant as a mask.

        Raises:
            PdlmError: a file cannot be used; the session is unchanged.
        """
        images = [file for file in files if not _is_region_file(file[0])]
        if self._adds_regions(images):
            self.load_masks(files)
            return None
        if len(files) > 1:
            raise ImageError("Drop the image alone first, then its masks or its file of regions.")
        name, data = files[0]
        size = open_upload(name, data).size
        if self.image is not None and self.regions:
            return {"name": name, "fits": size == self.image.size}
        self.open(name, data)
        return None

    def _adds_regions(self, images: list[tuple[str, bytes]]) -> bool:
        """Whether dropped files, of which these are images, are masks and files of regions of the image."""
        if not images or self.image is None:
            return not images
        if len(images) > 1:
            return True
        image = open_upload(*images[0])
        return image.size == self.image.size and _is_mask(image)

    def mark(self, gesture: dict[str, Any], segmenter: Any = None) -> None:
        """Add a region that a user marked; coordinates are fractions of the image's width and height.

        Args:
            gesture: `{"kind": "box", "box": [x0, y0, x1, y1]}`; `{"kind": "brush", "points": [[x, y], ...], "radius":
                fraction of the width}`, which extends the painted region it starts in, if any; or `{"kind": "click",
                "point": [x, y]}`.
            segmenter ([`~pdlm_hf.regions.Segmenter`], *optional*): turns a click into a region.

        Raises:
            ImageError: there is no image yet.
            RegionError: the gesture cannot be read, its region is empty, or there are too many regions.
        """
        image = self.current_image()
        width, height = image.size
        kind = gesture.get("kind")
        if kind == "box":
            self._add([Region(None, box_mask(read_numbers(gesture.get("box"), (4,)), width, height))])
        elif kind == "brush":
            points, radius = read_numbers(gesture.get("points"), (-1, 2)), read_numbers(gesture.get("radius"), ())
            self._paint(stroke_mask(points, float(radius), width, height), points[0])
        elif kind == "click" and segmenter is not None:
            x, y = pixel_at(read_numbers(gesture.get("point"), (2,)), width, height)
            self._add([Region(None, segmenter.mask(image, x, y))])
        else:
            raise RegionError("Mark a region with a box or the brush.")

    def load_masks(self, files: list[tuple[str, bytes]]) -> None:
        """Add regions from files: a label map, several masks (white inside), or a file of regions as
        [`~pdlm_hf.regions.read_region_file`] reads them.

        Args:
            files: names and contents.

        Raises:
            PdlmError: a file cannot be used; then no region is added.
        """
        size = self.current_image().size
        found: list[Region] = []
        for name, data in files:
            if _is_region_file(name):
                values = _read_regions(name, data, self.name, size)
            else:
                image = _without_alpha(open_upload(name, data, size))
                if image.mode == "P":  # numbers of a palette are labels
                    image = Image.fromarray(np.asarray(image))
                if len(files) == 1 and image.getcolors(MAX_REGIONS + 1) is None:  # each would be a mask
                    raise RegionError(
                        f"{name}: more than {MAX_REGIONS} values; expected a label map, or several masks."
                    )
                values = from_label_map(image) if len(files) == 1 else [image]
            self._check(len(self.regions) + len(found) + len(values))
            found += [parse_region(value, *size, k) for k, value in enumerate(values)]
        self._add(found)

    def find(self, finder: Callable[[Image.Image], list[FoundRegion]]) -> None:
        """Take all regions that are found, at most as many as an image may have, in place of those that are marked.

        Args:
            finder ([`~pdlm_hf.regions.RegionFinder`]): finds them.

        Raises:
            PdlmError: there is no image yet, nothing is found, or the finder cannot read this image.
        """
        found = finder(self.current_image())[: self._most()]
        if not found:
            raise RegionError("Nothing was found here; mark regions with a box or the brush.")
        self._change([self._row(region.as_region(k), k) for k, region in enumerate(found, 1)])

    def nudge(self, own: Any, right: Any, down: Any, resize: bool) -> None:
        """Move a region, or the right and lower side of a box, by steps, see [`~gestures.nudged_mask`]. Undo brings
        back where the region was before it was moved, however many times."""
        k = next((k for k, row in enumerate(self.regions) if row["id"] == own), None)
        if k is None:  # deleted before
            return
        row = self.regions[k]
        mask = nudged_mask(parse_region(row, *self.current_image().size).mask, right, down, resize)
        if self._nudged != own:
            self._remember()
        moved = self._row(Region(own, mask), own, **{key: row[key] for key in ("brushed",) if key in row})
        self._set([*self.regions[:k], moved, *self.regions[k + 1 :]])
        self._nudged = own

    def undo(self) -> None:
        """Undo the last change of the regions, or of the image."""
        if self.past:
            self.image, self.name, self.small, regions = self.past.pop()
            self._set(regions)

    def delete(self, own: Any) -> None:
        """Delete the region with an id."""
        rest = [row for row in self.regions if row["id"] != own]
        if len(rest) < len(self.regions):  # else it was deleted before
            self._change(rest)

    def clear(self) -> None:
        """Delete all regions."""
        self._change([])

    def current_image(self) -> Image.Image:
        """Return the image. Raises: ImageError if there is none."""
        if self.image is None:
            raise ImageError("Drop an image first, or take one of the examples.")
        return self.image

    def parsed(self) -> list[Region]:
        """Return the regions with their masks. Raises: RegionError if there are none."""
        image = self.current_image()
        if not self.regions:
            raise RegionError("Mark a region first: drag a box on the image.")
        return parse_regions(self.regions, *image.size)

    def view(self) -> dict[str, Any] | None:
        """Return the data of the page: the image with its regions drawn, and a label map for the pointer."""
        if self.image is None or self.small is None:
            return None
        shown = [{"id": row["id"], "segmentation": row["shown"]} for row in self.regions]
        regions = parse_regions(shown, *self.small.size) if shown else []
        size = _shown_size(self.image)
        labels = np.zeros(size[::-1], np.uint8)
        for k in area_order([region.mask for region in regions]):  # small above large, as they are drawn
            mask = Image.fromarray(regions[k].mask).resize(size, Image.Resampling.NEAREST)
            labels[np.asarray(mask)] = k + 1
        boxes = [np.divide(region.bbox, [*self.small.size, *self.small.size]).tolist() for region in regions]
        return {
            "version": self.version,
            "image": jpeg_url(draw_regions(self.small, regions, size)),
            "labels": png_url(Image.fromarray(labels)),
            "size": size,
            "undo": bool(self.past),
            "regions": [
                {"id": row["id"], "box": box, "colour": colour_of(k), "ink": ink_on(colour_of(k))}
                for k, (row, box) in enumerate(zip(self.regions, boxes, strict=True))
            ],
        }

    def coco(self) -> bytes:
        """Make a COCO file with `caption` and `score` on each annotation, and `attributes` if they were read. Raises:
        RegionError without captions."""
        rows: list[dict[str, Any]] = []
        for region, caption in zip(self.parsed(), self._captions(), strict=True):
            place = {"id": region.id, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": int(region.mask.sum())}
            said = {"caption": caption.text, "score": round(caption.score, 4)}
            rows.append({**place, "bbox": region.bbox, "segmentation": region.segmentation, **said})
        for row, own in zip(rows, self.attributes or (), strict=False):
            row["attributes"] = {name: attribute.value for name, attribute in own.items()}
        width, height = self.current_image().size
        image = {"id": 1, "file_name": self.name, "width": width, "height": height}
        data = {"images": [image], "annotations": rows, "categories": [{"id": 1, "name": "region"}]}
        return json.dumps(data, indent=1).encode()

    def drawing(self) -> bytes:
        """Draw the numbered regions and their captions as PNG. Raises: RegionError if there are no captions."""
        buffer = io.BytesIO()
        draw_captions(self.current_image(), self.parsed(), self._captions()).save(buffer, format="PNG")
        return buffer.getvalue()

    def table(self) -> bytes:
        """Make a CSV file of the attributes, a row per region. Raises: RegionError if there are none."""
        if not self.attributes:
            raise RegionError("No attributes of these regions were read yet; press Read attributes.")
        text = io.StringIO()
        rows = (csv_row(self.name, region) for region in self.attributes)
        write_csv(text, [csv_fields(self.attributes[0]), *rows])
        return text.getvalue().encode()

    def _captions(self) -> list[RegionCaption]:
        if self.captions is None:
            raise RegionError("There are no captions of these regions yet; press Describe.")
        return self.captions

    def _add(self, regions: list[Region]) -> None:
        """Add regions. An id that is no integer, or is in use, is replaced by a new one."""
        self._check(len(self.regions) + len(regions))
        taken = {region["id"] for region in self.regions}
        rows = []
        for region in regions:
            if not isinstance(region.id, int) or region.id in taken:
                region.id = max(taken, default=0) + 1
            taken.add(region.id)
            rows.append(self._row(region, region.id))
        self._change(self.regions + rows)

    def _row(self, region: Region, own: int, **more: Any) -> dict[str, Any]:
        """The stored form of a region."""
        whole = shown = region.segmentation
        if self.small is not None and self.small is not self.image:
            shown = Region(own, _shrunk(region.mask, self.small.size)).segmentation
        return {"id": own, "segmentation": whole, "shown": shown, **more}

    def _paint(self, mask: np.ndarray, start: np.ndarray) -> None:
        size = self.current_image().size
        x, y = pixel_at(start, *size)
        for k, row in reversed(list(enumerate(self.regions))):
            if row.get("brushed") and (whole := parse_region(row, *size).mask)[y, x]:
                grown = self._row(Region(row["id"], whole | mask), row["id"], brushed=True)
                return self._change([*self.regions[:k], grown, *self.regions[k + 1 :]])
        self._add([Region(None, mask)])
        self.regions[-1]["brushed"] = True

    def _check(self, count: int) -> None:
        width, height = self.current_image().size
        if count > self._most():
            raise RegionError(f"{count} regions; at most {self._most()} on an image of {width} x {height} pixels.")

    def _most(self) -> int:
        """Regions that this image may have."""
        width, height = self.current_image().size
        return min(MAX_REGIONS, MAX_MASK_PIXELS // (width * height))

    def _change(self, regions: list[dict[str, Any]]) -> None:
        self._remember()
        self._set(regions)

    def _set(self, regions: list[dict[str, Any]]) -> None:
        self.regions, self.captions, self.attributes = regions, None, None
        self.version, self._nudged = self.version + 1, None

    def _remember(self) -> None:
        """Keep image and regions for Undo, as long as the images are not too large together."""
        if self.image is None or self.small is None:
            return
        self.past = [*self.past, Moment(self.image, self.name, self.small, self.regions)][-_UNDO:]
        while _pixels([moment.image for moment in self.past]) > MAX_PAST_PIXELS:
            self.past.pop(0)


def _pixels(images: Sequence[Image.Image]) -> int:
    """Pixels of images together; of each only once."""
    return sum(image.width * image.height for image in {id(image): image for image in images}.values())


def _is_region_file(name: str) -> bool:
    return PurePath(name).suffix.lower() in _REGION_FILES


def _without_alpha(image: Image.Image) -> Image.Image:
    """The image; if it has transparency that is used nowhere, without that."""
    if image.mode in ("LA", "RGBA") and image.getchannel("A").getextrema()[0] == 255:
        return image.convert(image.mode[:-1])
    return image


def _is_mask(image: Image.Image) -> bool:
    """Whether an image is a label map or a mask: numbers of a palette, or grey with few values."""
    image = _without_alpha(image)
    colours = image.getcolors(MAX_REGIONS + 1)
    if colours is None or image.mode not in ("1", "L", "P", "RGB", "I", "I;16"):
        return False
    return image.mode != "RGB" or all(isinstance(colour, tuple) and len(set(colour)) == 1 for _, colour in colours)


def _shown_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of the image on the page."""
    factor = _SHOWN / max(image.size)
    return max(1, round(image.width * factor)), max(1, round(image.height * factor))


def _shrunk(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a mask; a region that would vanish keeps a pixel."""
    shares = np.asarray(Image.fromarray(mask).convert("L").resize(size, Image.Resampling.BOX))
    return shares >= min(128, shares.max())


def _read_regions(name: str, data: bytes, image_name: str, size: tuple[int, int]) -> list[Any]:
    """Read regions from the content of a file, which is written to a temporary folder for the reader."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"regions{PurePath(name).suffix.lower()}"
        path.write_bytes(data)
        try:
            return read_region_file(path, image_name, *size)
        except PdlmError as error:
            raise RegionError(str(error).replace(str(path), name)) from None
