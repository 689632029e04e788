"""Opening pictures."""

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

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
        return to_rgb(open_image(source if data is None else io.BytesIO(data), str(source)), str(source))
    return to_rgb(source)


def open_image(
    source: str | Path | BinaryIO,
    name: str | None = None,
    check: Callable[[Image.Image], None] | None = None,
    formats: Sequence[str] | None = None,
) -> Image.Image:
    """A picture file in its own mode, turned the way it is meant to be seen.

    Args:
        source: path, or a file in memory.
        name (`str`, *optional*): for messages; default: the path.
        check (*optional*): called before the picture is decoded; raises what is to be raised.
        formats (*optional*): names of the formats to try, as Pillow has them; default: all it knows.

    Raises:
        ValueError: as [`load_image`].
    """
    name = str(source) if name is None else name
    try:
        with Image.open(source, formats=formats) as image:
            if check is not None:
                check(image)
            image.load()
            return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise ValueError(f"{name}: no such file.") from None
    except IsADirectoryError:
        raise ValueError(f"{name}: is a folder, not a picture.") from None
    except UnidentifiedImageError as error:
        reason = error if formats is None else f"known are {', '.join(formats)}"
        raise ValueError(f"{name}: cannot be opened as a picture ({reason}).") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: cannot be opened as a picture ({error}).") from error
