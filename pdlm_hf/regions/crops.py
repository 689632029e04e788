"""Regions for models that take whole images only: the region outlined, and a crop around it."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image, ImageChops, ImageFilter

LEAST_SIDE = 56  # pixels; smaller boxes around a mask are enlarged to this before the margins are added
OUTLINE = (255, 0, 0)
CROPS_PROMPT = (
    "The first image has one region outlined in red; the second shows this region larger, with what surrounds it. "
    "Describe the outlined region in detail, in one or two sentences. Do not mention the outline."
)


def crops_message(image: Image.Image, mask: np.ndarray, prompt: str) -> dict[str, Any]:
    """Make a chat message with two images: the whole image with the region outlined, and a crop around the region.

    Args:
        image (`PIL.Image.Image`): RGB.
        mask (`np.ndarray` of shape `(H, W)`): bool, not empty.
        prompt (`str`): the question.
    """
    outlined = draw_outline(image, Image.fromarray(mask))
    top, bottom, left, right = crop_box(mask)
    return images_message([outlined, outlined.crop((left, top, right, bottom))], prompt)


def images_message(images: list[Image.Image], prompt: str) -> dict[str, Any]:
    """Make a chat message of images and a question about them."""
    parts = [{"type": "image_url", "image_url": {"url": png_url(image)}} for image in images]
    return {"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}


def crop_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Compute the crop around a mask: its bounding box with margins of its own size on every side.

    Args:
        mask (`np.ndarray` of shape `(H, W)`): bool, not empty.

    Returns:
        top, bottom, left and right edge in pixels, within the image.
    """
    bounds = []
    for length, used in zip(mask.shape, (mask.any(1), mask.any(0)), strict=True):
        inside = used.nonzero()[0]
        start, side = int(inside[0]), int(inside[-1]) + 1 - int(inside[0])
        grown = max(side, LEAST_SIDE)
        start = int(start + side / 2 - grown / 2)
        bounds += [max(start - grown, 0), min(start + 2 * grown, length)]
    return tuple(bounds)


def draw_outline(image: Image.Image, mask: Image.Image) -> Image.Image:
    """Draw a line around a mask. The line lies outside, so that the pixels of the region do not change.

    Args:
        image (`PIL.Image.Image`): RGB.
        mask (`PIL.Image.Image`): mode "1" or "L", of the same size.
    """
    width = max(2, round(max(image.size) / 250))
    mask = mask.convert("L").point(lambda value: 255 if value else 0)
    line = ImageChops.subtract(mask.filter(ImageFilter.MaxFilter(2 * width + 1)), mask)
    return Image.composite(Image.new("RGB", image.size, OUTLINE), image, line)


def png_url(image: Image.Image) -> str:
    """Encode an image as a data URL of a PNG file, without loss."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
