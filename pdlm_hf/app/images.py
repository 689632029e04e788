"""Opening pictures."""

import io
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from ..image_processing_pdlm import to_rgb


def load_image(source: Any, data: bytes | None = None) -> Image.Image:
    """A picture as RGB. A file is turned the way it is meant to be seen (EXIF orientation applied), as by
    transformers' own `load_image`; what is in memory is taken as it is, as by the processor.

    Args:
        source: path, PIL image, or uint8 array or tensor.
        data (`bytes`, *optional*): what the file holds, if it has been read already.

    Raises:
        ValueError: no such file, not a picture, cut short, or too large to be opened safely.
    """
    if isinstance(source, (str, Path)):
        return to_rgb(open_image(source, data), str(source))
    return to_rgb(source)


def open_image(path: str | Path, data: bytes | None = None) -> Image.Image:
    """A picture file in its own mode, turned the way it is meant to be seen. Raises: ValueError as [`load_image`]."""
    try:
        with Image.open(path if data is None else io.BytesIO(data)) as image:
            image.load()
            return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file.") from None
    except IsADirectoryError:
        raise ValueError(f"{path}: is a folder, not a picture.") from None
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be opened as a picture ({error}).") from error
