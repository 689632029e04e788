"""What the page takes from the people who use it: files of limited size and number, and requests to its own routes."""

import base64
import binascii
import io
from pathlib import PurePath
from typing import Any

from PIL import Image
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..client.captions import MAX_REGIONS
from ..errors_pdlm import ImageError
from ..regions.images import open_image

MAX_BYTES = 20 * 2**20  # of the files of one upload together
MAX_PIXELS = 25_000_000
MAX_MASK_PIXELS = 2**28  # of the masks of an image together
MAX_FILES = MAX_REGIONS
SESSIONS = 32  # people whose images are kept at a time; then the one who did nothing for longest is forgotten
IDLE = 3600  # seconds
_MAX_BODY = MAX_BYTES * 4 // 3 + 2**20  # files travel as base64 inside of JSON
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # no others: some start programs to be opened

# The page's whole surface. Uploads travel in events and stay in memory, so that gradio's routes for files are closed:
# the one that fetches addresses for others too.
_ROUTES = {"/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt"}
_FOLDERS = ("/assets/", "/static/", "/svelte/")
_EVENTS = {"queue", "heartbeat", "startup-events", "info", "app_id", "reset", "cancel", "theme.css"}
# Nothing from elsewhere. gradio evaluates scripts of components, hence 'unsafe-eval'.
_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'self'"
)


def read_uploads(items: Any) -> list[tuple[str, bytes]]:
    """Names and contents of uploaded files.

    Args:
        items: what the page sent: `[{"name", "data": base64}, ...]`.

    Raises:
        ImageError: too many, too large, or something else.
    """
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ImageError("The upload cannot be read; reload the page.")
    if not 0 < len(items) <= MAX_FILES:
        raise ImageError(f"{len(items)} files; at most {MAX_FILES} at a time.")
    try:
        files = [
            (PurePath(str(item["name"])).name[-80:], base64.b64decode(item["data"], validate=True)) for item in items
        ]
    except (KeyError, TypeError, ValueError, binascii.Error):
        raise ImageError("The upload cannot be read; reload the page.") from None
    if (size := sum(len(data) for _, data in files)) > MAX_BYTES:
        raise ImageError(f"{size / 2**20:.1f} MB; at most {MAX_BYTES // 2**20} MB at a time.")
    return files


def open_upload(name: str, data: bytes, size: tuple[int, int] | None = None) -> Image.Image:
    """An uploaded image in its own mode, turned the way it is meant to be seen; looked at before it is decoded.

    Args:
        name (`str`): for messages.
        data (`bytes`): of the file.
        size (`tuple[int, int]`, *optional*): width and height it must have, of a mask.

    Raises:
        ImageError: no image, cut short, too large, or of another size.
    """

    def check(image: Image.Image) -> None:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ImageError(f"{name}: {width} x {height} pixels; at most {MAX_PIXELS // 10**6} million.")
        if size is not None and image.size != size:
            raise ImageError(f"{name}: {width} x {height} pixels, but the image has {size[0]} x {size[1]}.")

    return open_image(io.BytesIO(data), name, check, _FORMATS)


class Guard:
    """ASGI middleware: closes the routes that the page does not need, bounds what is sent to the others, and tells
    browsers to load nothing from elsewhere.

    Args:
        app: what is guarded.
        most (`int`): bytes of a request's body.
    """

    def __init__(self, app: ASGIApp, most: int = _MAX_BODY):
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A request, as ASGI has it."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http" or not is_open(scope["path"]):
            return await PlainTextResponse("This page has no such route.", 404)(scope, receive, send)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if not length.isdigit() or int(length) > self.most:
            return await self._refuse(scope, receive, send)
        received, started = 0, False

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.most:  # sent without its length
                raise _TooLargeError
            return message

        async def with_policy(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if received > self.most:  # frameworks answer by themselves when reading fails
                    message["status"] = 413
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
            await send(message)

        try:
            await self.app(scope, bounded, with_policy)
        except _TooLargeError:
            if not started:
                await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        # closed, or the rest of it would be waited for
        answer = PlainTextResponse(f"At most {self.most} bytes.", 413, {"connection": "close"})
        await answer(scope, receive, send)


class _TooLargeError(Exception):
    pass


def is_open(path: str) -> bool:
    """Whether a route is one the page needs."""
    if path.startswith("/gradio_api/"):
        return path.split("/")[2] in _EVENTS
    return path in _ROUTES or path.startswith(_FOLDERS)
