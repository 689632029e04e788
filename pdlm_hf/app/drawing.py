"""Pictures of regions with their captions (extra `viz`: supervision)."""

import textwrap
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..processing_pdlm import RegionCaption
from .regions import Region

# Colours that stay apart on most pictures; region k always has colour k modulo their number.
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


def _supervision():
    try:
        with warnings.catch_warnings():  # supervision recommends OpenCV; its own fallback does
            warnings.simplefilter("ignore")
            import supervision
    except ImportError as error:
        raise ImportError('Drawing needs supervision: pip install "perceptiondlm[viz]".') from error
    return supervision


def draw_captions(image: Image.Image, regions: list[Region], captions: list[RegionCaption]) -> Image.Image:
    """The picture with coloured, numbered masks, and the captions as a numbered legend below.

    Args:
        image (`PIL.Image.Image`): RGB.
        regions (`list[Region]`), captions (`list[RegionCaption]`): in the same order.

    Raises:
        ImportError: supervision is not installed.
    """
    sv = _supervision()
    factor = max(1, round(_MIN_SIDE / max(image.size)))  # small pictures are enlarged, or numbers would hide them
    canvas = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    masks = np.stack([region.mask.repeat(factor, 0).repeat(factor, 1) for region in regions])
    detections = sv.Detections(xyxy=sv.mask_to_xyxy(masks), mask=masks, class_id=np.arange(len(regions)))
    palette = sv.ColorPalette.from_hex(list(COLOURS))
    canvas = sv.MaskAnnotator(color=palette, opacity=0.25).annotate(canvas, detections)
    canvas = sv.PolygonAnnotator(color=palette, thickness=2).annotate(canvas, detections)
    numbers = [str(k + 1) for k in range(len(regions))]
    labels = sv.LabelAnnotator(
        color=palette, text_scale=0.45, text_padding=4, text_position=sv.Position.CENTER_OF_MASS
    )
    canvas = labels.annotate(canvas, detections, numbers)
    return _with_legend(canvas, [caption.text or "(empty)" for caption in captions])


def _with_legend(picture: Image.Image, texts: list[str]) -> Image.Image:
    """Numbered, coloured lines below the picture."""
    font = ImageFont.load_default(16)
    width = max(picture.width, _MIN_SIDE)
    lines = []
    for k, text in enumerate(texts):
        wrapped = textwrap.wrap(text, max(20, (width - 60) // 9)) or [""]
        lines += [(k, i == 0, line) for i, line in enumerate(wrapped)]
    step = 24
    out = Image.new("RGB", (width, picture.height + 12 + step * len(lines)), "white")
    out.paste(picture, (0, 0))
    draw = ImageDraw.Draw(out)
    for row, (k, first, line) in enumerate(lines):
        y = picture.height + 8 + step * row
        if first:
            draw.rectangle([8, y, 32, y + 19], fill=COLOURS[k % len(COLOURS)])
            draw.text((20, y + 9), str(k + 1), fill="white", font=font, anchor="mm")
        draw.text((42, y), line, fill="black", font=font)
    return out


def check_target(path: Path) -> None:
    """Whether a drawing can be written there. Raises: ValueError, or ImportError if the drawing library is missing."""
    if not path.parent.is_dir():
        raise ValueError(f"--draw {path}: there is no folder {path.parent}.")
    if path.is_dir():
        raise ValueError(f"--draw {path}: is a folder; give a file name, .png for example.")
    Image.init()
    if Image.EXTENSION.get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"--draw {path}: {path.suffix or 'no ending'} is no picture format; use .png for example.")
    _supervision()


def save_drawing(path: Path, image: Image.Image, regions: list[Region], captions: list[RegionCaption]) -> None:
    """Write [`draw_captions`] to a picture file."""
    draw_captions(image, regions, captions).save(path)
