"""Images of requests: vLLM fetches the bytes, our reader decodes them; so captions are those of transformers."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pybase64
from PIL import Image
from vllm import envs
from vllm.multimodal.image import ALLOWED_IMAGE_FORMATS
from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.multimodal.media.base import MediaIO, MediaWithBytes

from pdlm_hf.errors_pdlm import ImageError
from pdlm_hf.image_processing_pdlm import to_rgb
from pdlm_hf.regions import limits as reading_limits
from pdlm_hf.regions.images import open_image
from pdlm_hf.regions.limits import bomb_error, check_image_pixels

from .limits import Limits

CONNECTOR = "pdlm"
_NAME = "the image"


def read_image(data: bytes, check: Callable[[Image.Image], None] | None = None) -> Image.Image:
    """Decode the bytes of an image file as RGB, as transformers' `load_image` and our processor do.

    Args:
        data (`bytes`): the file.
        check (*optional*): called with the image before it is decoded; may raise an error to refuse it.

    Raises:
        ImageError: it is not an image, is cut short, or has too many pixels.
    """
    return to_rgb(open_image(io.BytesIO(data), _NAME, check, ALLOWED_IMAGE_FORMATS), _NAME)


def decode_all(items: list[Any]) -> list[Image.Image]:
    """Images of vLLM's parsed inputs as RGB: of their files where they came as such, else the PIL images or arrays.

    Raises:
        ImageError: one of them cannot be read, or those of files have too many pixels together.
    """
    sizes = [item.media.size for item in items if isinstance(item, MediaWithBytes)]
    pixels = sum(width * height for width, height in sizes)
    if pixels > reading_limits.MASK_PIXELS:
        raise ImageError(
            f"{len(sizes)} images have {pixels} pixels together; at most {reading_limits.MASK_PIXELS} are read "
            "(request_pixels). Send fewer, or scale them down."
        )
    return [_decoded(item) for item in items]


def _decoded(item: Any) -> Image.Image:
    if not isinstance(item, MediaWithBytes):
        return to_rgb(item)
    item.media = read_image(item.original_bytes)  # vLLM hashes the bytes; what it decoded itself may go
    return item.media


class EncodedImage(MediaIO[bytes]):
    """The bytes of an image, not decoded.

    Args:
        limits (`Limits`)
    """

    def __init__(self, limits: Limits):
        self.limits = limits

    def get_max_bytes(self) -> int:
        """For vLLM's downloads."""
        return self.limits.body_bytes

    def load_bytes(self, data: bytes) -> Any:
        """Bytes of a file."""
        return data

    def load_base64(self, media_type: str, data: str) -> Any:
        """Bytes of a data URL."""
        return self.load_bytes(pybase64.b64decode(data, validate=True))

    def load_file(self, filepath: Path) -> Any:
        """Bytes of a local file."""
        return self.load_bytes(filepath.read_bytes())


class OpenedImage(EncodedImage):
    """An image whose header was read; [`decoded`] decodes it when it is its turn."""

    def load_bytes(self, data: bytes) -> MediaWithBytes[Image.Image]:
        """Bytes of a file. Raises: ImageError if it is no image, or has too many pixels."""
        try:
            image = Image.open(io.BytesIO(data), formats=ALLOWED_IMAGE_FORMATS)
        except Image.DecompressionBombError as error:
            raise bomb_error(_NAME, error) from error
        except Exception as error:  # Pillow's readers raise errors of any kind for damaged files
            raise ImageError(f"{_NAME}: cannot be opened as an image ({error}).") from error
        check_image_pixels(*image.size, _NAME)
        return MediaWithBytes(image, data)


@MEDIA_CONNECTOR_REGISTRY.register(CONNECTOR)
class PdlmConnector(MediaConnector):
    """vLLM's connector without its decoding, for the routes of vLLM itself. `limits` are set by the server."""

    limits = Limits()

    def load_from_url(self, url: str, *args: Any, **kwargs: Any) -> Any:
        """What an address holds. Raises: ImageError if it is too long."""
        self.limits.check_url(url)
        return super().load_from_url(url, *args, **kwargs)

    async def load_from_url_async(self, url: str, *args: Any, **kwargs: Any) -> Any:
        """What an address holds. Raises: ImageError if it is too long."""
        self.limits.check_url(url)
        return await super().load_from_url_async(url, *args, **kwargs)

    def fetch_image(self, image_url: str, **unused: Any) -> Any:
        """An image by its address. Raises: ValueError if it cannot be read."""
        timeout = envs.VLLM_IMAGE_FETCH_TIMEOUT
        return self.load_from_url(image_url, OpenedImage(self.limits), fetch_timeout=timeout)

    async def fetch_image_async(self, image_url: str, **unused: Any) -> Any:
        """An image by its address. Raises: ValueError if it cannot be read."""
        timeout = envs.VLLM_IMAGE_FETCH_TIMEOUT
        return await self.load_from_url_async(image_url, OpenedImage(self.limits), fetch_timeout=timeout)
