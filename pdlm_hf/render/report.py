"""Captioned images as HTML: one in a notebook, many in a report, one file that opens without a network."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors_pdlm import DataError, RegionError
from ..processing_pdlm import RegionCaption
from ..regions.files import read_rows, replacing
from ..regions.images import load_image
from ..regions.region import Region, parse_region
from ..regions.results import image_rows, result_fault
from .drawing import contact_sheet, draw_captions, draw_regions
from .figure import figure_data
from .html import jpeg_url, render_template, stream_template

IMAGES = 500  # of a report, unless said otherwise
DRAWINGS = 48  # of a contact sheet
_SIDE = 480  # pixels of the longer side of an image in a notebook, and of its width on a sheet
_PAGE_SIDE = 640  # of an image in a report, at most


def image_html(image: Image.Image, regions: list[Region], captions: list[RegionCaption]) -> str:
    """A piece of HTML: the image with outlined, numbered regions, and beside it the captions with their scores.

    Args:
        image (`PIL.Image.Image`): RGB.
        regions (`list[Region]`), captions (`list[RegionCaption]`): in the same order.
    """
    drawn = draw_regions(image, regions, thumbnail_size(image))
    return render_template(
        "image.html", url=jpeg_url(drawn), width=drawn.width, height=drawn.height, captions=captions
    )


def thumbnail_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an image whose longer side is 480 pixels."""
    factor = _SIDE / max(image.size)
    return max(1, round(image.width * factor)), max(1, round(image.height * factor))


# ---------------------------------------------------------------- many images


def write_report(
    rows: Path,
    images: Path,
    out: Path,
    limit: int | None = None,
    damaged: Callable[[int, str], None] | None = None,
    title: str | None = None,
    side: int = _PAGE_SIDE,
) -> tuple[int, int, list[str]]:
    """A report of what `pdlm batch` wrote, or a contact sheet if `out` is an image. One image is open at a time.

    Args:
        rows (`Path`): OUT.jsonl.
        images (`Path`): folder of the images.
        out (`Path`): .html, or an image.
        limit (`int`, *optional*): images at most, those with the lowest score of a region; default 500, of a sheet
            48.
        damaged (*optional*): called with number and fault of a damaged row, which is then left out; see
            [`~pdlm_hf.regions.files.read_rows`].
        title (`str`, *optional*): of the page; default: the name of the file of rows.
        side (`int`): pixels of the longer side of an image in the page, at most.

    Returns:
        numbers of images shown, and there; and why some of those shown could not be read.

    Raises:
        DataError: no rows, or other ones; or none of the images can be shown.
        OSError: the file cannot be written.
    """
    sheet, unread = out.suffix.lower() not in (".html", ".htm"), []
    lowest = _lowest_scores(rows, damaged)
    limit = (DRAWINGS if sheet else IMAGES) if limit is None else limit
    if limit < 1:
        raise DataError(f"The number of images must be positive, got {limit}.")
    worst = sorted(lowest, key=lambda key: (lowest[key], key[0], str(key[1])))[:limit]
    groups = image_rows(rows, set(worst), damaged=lambda *_: None)  # they were named before
    if sheet:
        names, drawn = [], []
        for group in groups:
            image, regions, captions = _open(images, group)
            if isinstance(image, str):
                unread.append(image)
            else:
                names.append(group[0]["file_name"])
                drawn.append(_small(draw_captions(image, regions, captions)))
        _check_readable(rows, images, groups, unread)
        contact_sheet(drawn, names, width=_SIDE).save(out)
    else:
        with replacing(out) as file:
            values = {"title": title or rows.name, "count": len(groups), "total": len(lowest)}
            stream_template("report.html", file, images=_page_images(images, groups, unread, side), **values)
            _check_readable(rows, images, groups, unread)
    return len(worst), len(lowest), unread


def _check_readable(rows: Path, images: Path, groups: list, unread: list[str]) -> None:
    """Raises: DataError if none of the images could be read, or none with its regions."""
    if len(unread) == len(groups):
        raise DataError(f"{rows}: none of its images in {images} can be shown (see --images): {unread[0]}")


def _small(image: Image.Image) -> Image.Image:
    """A drawing in the width that it has on a contact sheet."""
    return image.resize((_SIDE, max(1, round(image.height * _SIDE / image.width))), Image.Resampling.LANCZOS)


def _lowest_scores(path: Path, damaged: Callable[[int, str], None] | None) -> dict[tuple[str, Any], float]:
    """Lowest score of every image, by file name and id."""
    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    lowest: dict[tuple[str, Any], float] = {}
    first = ""

    def note(number: int, fault: str) -> None:
        nonlocal first
        first = first or f" of `pdlm batch`: line {number} {fault}"
        if damaged is not None:
            damaged(number, fault)

    for row in read_rows(path, check=result_fault, damaged=damaged and note):
        key = row["file_name"], row["image_id"]
        lowest[key] = min(row["score"], lowest.get(key, 1.0))
    if not lowest:
        raise DataError(f"{path}: has no rows{first}.")
    return lowest


def _open(images: Path, group: list[dict]) -> tuple[Image.Image | str, list[Region], list[RegionCaption]]:
    """Image, regions and captions of some rows; if they cannot be read, the reason instead of the image."""
    captions = [RegionCaption(row["caption"], row["score"], row["annotation_id"]) for row in group]
    try:
        image = load_image(images / group[0]["file_name"])
        regions = [parse_region(row["segmentation"], *image.size, row["annotation_id"]) for row in group]
    except RegionError as error:
        return f"{group[0]['file_name']}: the rows are damaged, or of another image: {error}", [], captions
    except (ValueError, OSError) as error:
        return str(error), [], captions
    return image, regions, captions


def _page_images(images: Path, groups: list[list[dict]], unread: list[str], side: int) -> Iterator[dict[str, Any]]:
    """What the page shows of each image, one after the other; reasons of those that cannot be read are added."""
    for group in groups:
        image, regions, _ = _open(images, group)
        shown = {"name": group[0]["file_name"], "regions": list(map(_page_region, group)), "unread": None}
        if isinstance(image, str):
            unread.append(image)
            yield shown | {"unread": image, "width": 1, "height": 1, "order": []}
        else:
            yield shown | figure_data(image, regions, side)


def _page_region(row: dict[str, Any]) -> dict[str, Any]:
    """A region of the page; of each attribute the value and its probability."""
    read = row.get("attributes") or {}
    attributes = {name: [own["value"], own["probability"]] for name, own in read.items() if "probability" in own}
    return {"id": row["annotation_id"], "caption": row["caption"], "score": row["score"], "attributes": attributes}
