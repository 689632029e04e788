"""Images of regions with their captions: outlines, numbers, a legend, contact sheets."""

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..errors_pdlm import SettingError
from ..processing_pdlm import RegionCaption, area_order
from ..regions.region import Region

# Colours that stay apart on most images; region k always has colour k modulo their number.
COLOURS = (
    "#e6194b",
    "#3cb44b",
    "#4363d8",
    "#f58231",
    "#911eb4",
    "#42d4f4",
    "#f032e6",
    "#9a6324",
    "#808000",
    "#469990",
)
_MIN_SIDE = 480
_CROWDED = 12  # regions; from here on the image is larger, and the legend has columns
_LINE = 24  # pixels of a line of the legend
_COLUMN = 400  # pixels of a column of the legend, at least


def colour_of(number: int) -> str:
    """Colour of a region by its position, as `#rrggbb`."""
    return COLOURS[number % len(COLOURS)]


def draw_captions(image: Image.Image, regions: list[Region], captions: list[RegionCaption]) -> Image.Image:
    """The image with outlined, numbered regions, and the captions as a numbered legend below.

    Args:
        image (`PIL.Image.Image`): RGB.
        regions (`list[Region]`), captions (`list[RegionCaption]`): in the same order.
    """
    least = _MIN_SIDE if len(regions) <= _CROWDED else 2 * _MIN_SIDE
    factor = max(1, round(least / max(image.size)))  # small images are enlarged, or numbers would hide them
    canvas = draw_regions(image, regions, (image.width * factor, image.height * factor))
    return with_legend(canvas, [caption.text or "(empty)" for caption in captions])


def draw_regions(image: Image.Image, regions: Sequence[Region], size: tuple[int, int] | None = None) -> Image.Image:
    """The image with every region outlined in its colour and numbered. The outline lies outside the region, whose own
    pixels keep their colours except under the number; outlines of small regions lie on those of large ones.

    Args:
        image (`PIL.Image.Image`): RGB.
        regions: of the image.
        size (`tuple[int, int]`, *optional*): width and height of the result in pixels; default: the image's.
    """
    size = size or image.size
    way = Image.Resampling.NEAREST if size[0] >= image.width else Image.Resampling.BICUBIC
    canvas = np.array(image.resize(size, way))
    for k in area_order([region.mask for region in regions]):
        _outline(canvas, regions[k], _rgb(colour_of(k)))
    drawn = Image.fromarray(canvas)
    _write_numbers(drawn, regions)
    return drawn


def _outline(canvas: np.ndarray, region: Region, colour: tuple[int, ...]) -> None:
    """Draw a coloured line around a mask, and a white one around that, which shows where the colour does not.

    Args:
        canvas (`np.ndarray` of shape `(height, width, 3)`): changed in place; may have another size than the mask.
        region (`Region`)
        colour (`tuple[int, ...]`): red, green and blue.
    """
    unit = _unit(canvas.shape[1], canvas.shape[0])
    line, edge = round(2 * unit), round(unit)
    margin = line + edge
    height, width = region.mask.shape
    x, y, w, h = region.bbox
    x0, x1 = x * canvas.shape[1] // width, -(-(x + w) * canvas.shape[1] // width)
    y0, y1 = y * canvas.shape[0] // height, -(-(y + h) * canvas.shape[0] // height)
    mask = Image.fromarray(region.mask[y : y + h, x : x + w]).convert("L").resize((x1 - x0, y1 - y0))
    inside = np.pad(np.asarray(mask) > 127, margin)
    lined = _grown(inside, line)
    edged = _grown(lined, edge)
    part = canvas[max(y0 - margin, 0) : y1 + margin, max(x0 - margin, 0) : x1 + margin]
    top, left = max(margin - y0, 0), max(margin - x0, 0)  # what of the margin lies outside the canvas
    visible = slice(top, top + part.shape[0]), slice(left, left + part.shape[1])
    part[(edged & ~lined)[visible]] = 255
    part[(lined & ~inside)[visible]] = colour


def _grown(mask: np.ndarray, pixels: int) -> np.ndarray:
    """A mask and everything within so many rows and columns of it."""
    mask = mask.copy()
    for _ in range(pixels):
        for grown in (mask, mask.T):
            grown[1:] |= grown[:-1].copy()
            grown[:-1] |= grown[1:].copy()
    return mask


def _unit(width: int, height: int) -> float:
    """How much thicker lines and labels are than on an image of up to 1000 pixels, so that they can be seen."""
    return max(1.0, max(width, height) / 1000)


def ink_on(colour: str) -> str:
    """White if it has a contrast of at least 4.5 on a colour, as WCAG computes it; else black, which has then."""
    shares = [value / 255 for value in _rgb(colour)]
    red, green, blue = (share / 12.92 if share <= 0.04045 else ((share + 0.055) / 1.055) ** 2.4 for share in shares)
    return "white" if 1.05 / (0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05) >= 4.5 else "black"


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))


def _write_numbers(image: Image.Image, regions: Sequence[Region]) -> None:
    """A label on every region, small regions first; one that would hide another moves aside."""
    unit = _unit(*image.size)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(14 * unit)
    taken: list[tuple[float, ...]] = []
    for k in reversed(area_order([region.mask for region in regions])):
        text, mask = str(k + 1), regions[k].mask
        y, x = (float(places.mean()) + 0.5 for places in mask.nonzero())
        x, y = x * image.width / mask.shape[1], y * image.height / mask.shape[0]
        half = draw.textlength(text, font) / 2 + 4 * unit, 9 * unit
        box = next((box for box in _places(x, y, half, image.size) if not _hits(box, taken)), None)
        box = box or next(_places(x, y, half, image.size))
        taken.append(box)
        draw.rectangle(box, fill=colour_of(k))
        place = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        draw.text(place, text, fill=ink_on(colour_of(k)), font=font, anchor="mm")


def _places(x: float, y: float, half: tuple[float, float], size: tuple[int, int]):
    """Boxes around a point and then around points further and further off, all within the image."""
    for ring in range(7):
        for turn in range(max(1, 8 * ring)):
            angle = 2 * math.pi * turn / max(1, 8 * ring)
            cx, cy = x + 1.2 * half[0] * ring * math.cos(angle), y + 1.2 * half[1] * ring * math.sin(angle)
            cx = min(max(cx, half[0]), max(half[0], size[0] - 1 - half[0]))
            cy = min(max(cy, half[1]), max(half[1], size[1] - 1 - half[1]))
            yield cx - half[0], cy - half[1], cx + half[0], cy + half[1]


def _hits(box: tuple[float, ...], others: list[tuple[float, ...]]) -> bool:
    return any(box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in others)


def with_legend(image: Image.Image, texts: list[str], height: int = 0) -> Image.Image:
    """The image with numbered, coloured lines below it, in columns where there are many.

    Args:
        image (`PIL.Image.Image`): RGB.
        texts (`list[str]`): one per region.
        height (`int`): pixels of the result at least.
    """
    font = ImageFont.load_default(16)
    width = max(image.width, _MIN_SIDE)
    count = 1 if len(texts) <= _CROWDED else max(1, width // _COLUMN)
    room = width // count
    wrapped = [textwrap.wrap(text, max(20, (room - 60) // 8)) or [""] for text in texts]
    most = -(-sum(map(len, wrapped)) // count)  # lines of a column, about
    columns: list[list[int]] = [[]]
    for k, lines in enumerate(wrapped):
        if len(columns) < count and sum(len(wrapped[i]) for i in columns[-1]) + len(lines) > most and columns[-1]:
            columns.append([])
        columns[-1].append(k)
    longest = max(sum(len(wrapped[k]) for k in column) for column in columns)
    out = Image.new("RGB", (width, max(height, image.height + 12 + _LINE * longest)), "white")
    out.paste(image, (0, 0))
    draw = ImageDraw.Draw(out)
    for number, column in enumerate(columns):
        x, y = room * number, image.height + 8
        for k in column:
            draw.rectangle([x + 8, y, x + 34, y + 19], fill=colour_of(k))
            draw.text((x + 21, y + 9), str(k + 1), fill=ink_on(colour_of(k)), font=font, anchor="mm")
            for line in wrapped[k]:
                draw.text((x + 42, y), line, fill="black", font=font)
                y += _LINE
    return out


def contact_sheet(
    drawings: Sequence[Image.Image], names: Sequence[str] = (), columns: int = 3, width: int = 480
) -> Image.Image:
    """Several images on one sheet, row by row.

    Args:
        drawings: images, see [`draw_captions`].
        names (*optional*): what to write above each.
        columns (`int`): images beside each other.
        width (`int`): of an image on the sheet, in pixels.

    Raises:
        SettingError: no images, or columns or width below 1.
    """
    if not drawings or columns < 1 or width < 1:
        raise SettingError(f"A contact sheet needs images, and columns and width of at least 1: {columns}, {width}.")
    gap, top = 8, _LINE if names else 0
    small = [d.resize((width, max(1, round(d.height * width / d.width))), Image.Resampling.LANCZOS) for d in drawings]
    rows = [small[start : start + columns] for start in range(0, len(small), columns)]
    heights = [max(image.height for image in row) + top for row in rows]
    wide = min(columns, len(small))
    sheet = Image.new("RGB", (wide * (width + gap) + gap, sum(heights) + gap * (len(rows) + 1)), "#dddddd")
    draw, font, y = ImageDraw.Draw(sheet), ImageFont.load_default(16), gap
    for number, (row, height) in enumerate(zip(rows, heights, strict=True)):
        for k, image in enumerate(row):
            x = gap + k * (width + gap)
            sheet.paste(image, (x, y + top))
            if names:
                draw.text((x, y), textwrap.shorten(names[number * columns + k], width // 8), fill="black", font=font)
        y += height + gap
    return sheet


def check_target(path: Path, option: str = "--draw") -> None:
    """Whether a drawing can be written there. Raises: SettingError."""
    if not path.parent.is_dir():
        raise SettingError(f"{option} {path}: there is no folder {path.parent}.")
    if path.is_dir():
        raise SettingError(f"{option} {path}: is a folder; give a file name, .png for example.")
    Image.init()
    if Image.EXTENSION.get(path.suffix.lower()) not in Image.SAVE:
        raise SettingError(f"{option} {path}: {path.suffix or 'no ending'} is no image format; use .png for example.")


def save_drawing(path: Path, image: Image.Image, regions: list[Region], captions: list[RegionCaption]) -> None:
    """Write [`draw_captions`] to an image file."""
    draw_captions(image, regions, captions).save(path)
