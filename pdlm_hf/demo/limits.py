"""Limits of the page: size and number of uploads, and the routes that are open."""

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

MAX_BYTES = 20 * 2**20  # all files of one upload
MAX_PIXELS = 25_000_000
MAX_MASK_PIXELS = 2**28  # all masks of an image
MAX_PAST_PIXELS = 2 * MAX_PIXELS  # of the images that Undo brings back
MAX_FILES = MAX_REGIONS
SESSIONS = 32  # users whose images are kept; the least recently active is dropped first
IDLE = 3600  # seconds
_MAX_BODY = MAX_BYTES * 4 // 3 + 2**20  # files travel as base64 inside of JSON
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")  # no others: Pillow opens some formats with external programs

# All routes of the page. Uploads travel in events and stay in memory, so gradio's file routes are closed, also the one
# that fetches URLs.
_ROUTES = {"/", "/config", "/theme.css", "/favicon.ico", "/manifest.json", "/robots.txt"}
MODULES = "/board"  # the page's own script
_FOLDERS = ("/assets/", "/static/", "/svelte/", f"{MODULES}/")
_EVENTS = {"queue", "heartbeat", "startup-events", "info", "app_id", "reset", "cancel", "theme.css"}
# Nothing is loaded from other hosts. gradio evaluates scripts of components, hence 'unsafe-eval'.
_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; frame-ancestors 'self'"
)


def read_uploads(items: Any) -> list[tuple[str, bytes]]:
    """Decode uploaded files.

    Args:
        items: the data that the page sent: `[{"name", "data": base64}, ...]`.

    Raises:
        ImageError: there are too many files, they are too large, or the data is damaged.
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
    """Open an uploaded image in its own mode, with its EXIF orientation applied; its size is checked before decoding.

    Args:
        name (`str`): name of the file, for messages.
        data (`bytes`): content of the file.
        size (`tuple[int, int]`, *optional*): the width and height that a mask must have.

    Raises:
        ImageError: the file is no image, is cut short, is too large, or has another size.
    """

    def check(image: Image.Image) -> None:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise ImageError(f"{name}: {width} x {height} pixels; at most {MAX_PIXELS // 10**6} million.")
        if size is not None and image.size != size:
            raise ImageError(f"{name}: {width} x {height} pixels, but the image has {size[0]} x {size[1]}.")

    return open_image(io.BytesIO(data), name, check, _FORMATS)


class Guard:
    """ASGI middleware that closes the routes the page does not need, limits request bodies, and sets a
    Content-Security-Policy.

    Args:
        app: the guarded application.
        most (`int`): largest request body in bytes.
    """

    def __init__(self, app: ASGIApp, most: int = _MAX_BODY):
        self.app, self.most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
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
            if received > self.most:  # sent without a length
                raise _TooLargeError
            return message

        async def with_policy(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if received > self.most:  # the framework has answered the failed read itself
                    message["status"] = 413
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
                message["headers"] = [*message["headers"], (b"content-security-policy", _POLICY.encode())]
                if scope["path"].startswith(f"{MODULES}/"):  # asked for again after an update
                    message["headers"] = [*message["headers"], (b"cache-control", b"no-cache")]
            await send(message)

        try:
            await self.app(scope, bounded, with_policy)
        except _TooLargeError:
            if not started:
                await self._refuse(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send) -> None:
        # closed, otherwise the server waits for the rest of the body
        answer = PlainTextResponse(f"At most {self.most} bytes.", 413, {"connection": "close"})
        await answer(scope, receive, send)


class _TooLargeError(Exception):
    pass


def is_open(path: str) -> bool:
    """Whether the page needs a route."""
    if path.startswith("/gradio_api/"):
        return path.split("/")[2] in _EVENTS
    return path in _ROUTES or path.startswith(_FOLDERS)
