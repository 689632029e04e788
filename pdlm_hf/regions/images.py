"""Reading images."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from ..errors_pdlm import ImageError, PdlmError
from .limits import bomb_error, check_image_pixels

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ORIENTED = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")  # where Pillow looks for the orientation


def orientation_of(image: Image.Image | str | Path) -> int:
    """Return the EXIF orientation of an image or an image file, 1 to 8; 1 if it is missing or damaged."""
    try:
        if not isinstance(image, Image.Image):
            with Image.open(image) as opened:
                return orientation_of(opened)
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises errors of many kinds for damaged EXIF
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def _turned(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation. Pillow's `exif_transpose` fails on tags of a wrong type."""
    turn = _TURNS.get(orientation_of(image))
    if turn is None:
        return image
    turned = image.transpose(turn)
    for name in _ORIENTED:
        turned.info.pop(name, None)
    return turned


def turned_mask(mask: np.ndarray, orientation: int) -> np.ndarray:
    """Turn a mask of an image's pixels as stored in the way that the image's EXIF orientation turns the image.

    Args:
        mask (`np.ndarray` of shape `(H, W)`): bool.
        orientation (`int`): 1 to 8.

    Returns:
        `np.ndarray` of shape `(H, W)`, from orientation 5 on `(W, H)`: bool.
    """
    if orientation == 1:
        return mask
    stored = Image.fromarray(mask.astype(np.uint8))
    return np.asarray(stored.transpose(_TURNS[orientation])).astype(bool)


def load_image(source: Any, data: bytes | None = None) -> Image.Image:
    """Read an image as RGB. As in transformers' `load_image`, the EXIF orientation of a file is applied; as in the
    processor, that of an image in memory is not.

    Args:
        source: path, PIL image, or uint8 array or tensor.
        data (`bytes`, *optional*): the content of the file, if it was read before.

    Raises:
        ImageError: the file does not exist, is not an image, is cut short, or is too large to be opened safely.
    """
    from ..image_processing_pdlm import to_rgb  # imports torch, which reading annotations would wait seconds for

    if isinstance(source, (str, Path)):
        return to_rgb(open_image(source if data is None else io.BytesIO(data), str(source)), str(source))
    return to_rgb(source)


def open_image(
    source: str | Path | BinaryIO,
    name: str | None = None,
    check: Callable[[Image.Image], None] | None = None,
    formats: list[str] | tuple[str, ...] | None = None,
    upright: bool = True,
) -> Image.Image:
    """Read an image file in its own mode; of several frames the first.

    Args:
        source: path, or a file in memory.
        name (`str`, *optional*): the name in messages; default: the path.
        check (*optional*): called with the image before it is decoded; may raise an error to refuse it.
        formats (*optional*): Pillow's names of the formats to try; default: all.
        upright (`bool`): apply the EXIF orientation.

    Raises:
        ImageError: as for [`load_image`].
    """
    name = str(source) if name is None else name
    if name.startswith(("http://", "https://")) and not isinstance(source, io.IOBase):
        raise ImageError(f"{name}: images are read from files only; download this one first.")
    try:
        with Image.open(source, formats=formats) as image:
            if check is not None:
                check(image)
            check_image_pixels(*image.size, name)
            image.load()
        return _turned(image) if upright else image  # not a copy: a large image would take its memory twice
    except PdlmError:
        raise
    except FileNotFoundError:
        raise ImageError(f"{name}: no such file.") from None
    except IsADirectoryError:
        raise ImageError(f"{name}: is a folder, not an image.") from None
    except UnidentifiedImageError as error:
        reason = error if formats is None else f"the formats are {', '.join(formats)}"
        raise ImageError(f"{name}: cannot be opened as an image ({reason}).") from error
    except Image.DecompressionBombError as error:
        raise bomb_error(name, error) from error
    except Exception as error:  # Pillow's readers raise errors of any kind for damaged files
        raise ImageError(f"{name}: cannot be opened as an image ({str(error) or type(error).__name__}).") from error
