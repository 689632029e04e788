"""Captions of a data set from our server's route `/v1/region_captions`, many requests in flight."""

import base64
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from ..client.chat import ChatClient, NoReply, Reply, public_url
from ..errors_pdlm import ServerError
from ..regions.crops import png_url
from ..regions.region import Region, probe_image

MAX_REGIONS = 60  # a request: servers take 64, and 60 is whole passes for 1 to 6 region prompts
_SENT_AS_THEY_ARE = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
_ORIENTATION = 0x0112  # EXIF


class CaptionClient(ChatClient):
    """A server of ours; asked with `{"image", "regions"}`, it replies with a JSON list of captions.

    Args:
        base_url (`str`): its address, with or without `/v1`.
        model (`str`, *optional*): its name there; default: the first one the server has.
        **options: see [`~pdlm_hf.client.ChatClient`].

    Raises:
        ServerError: it cannot be reached, or has no such model.
    """

    keeps_replies = False  # what is captioned is in the rows

    def __init__(self, base_url: str, model: str | None = None, **options: Any):
        if urlsplit(base_url).path in ("", "/"):
            base_url = f"{base_url.rstrip('/')}/v1"
        super().__init__(model or "", base_url, **options)
        where = f"The server at {public_url(self.base_url)}"
        try:
            names = [known.id for known in self._client.models.list()]
        except self._api.OpenAIError as error:
            raise ServerError(f"{where} does not answer: {self._why(error)}") from error
        self.model = model or next(iter(names), "")
        if self.model not in names:
            raise ServerError(f"{where} has no model {self.model!r}, but {', '.join(names) or 'none at all'}.")

    def probe(self, chat: bool = False) -> None:
        """Caption a small grey image. Raises: ServerError if the server does not, for settings it refuses too."""
        image, regions = probe_image()
        reply = self._attempt(self._body(request_of(png_url(image), regions)), threading.Event(), min(self.retries, 2))
        if reply.text is None:
            raise ServerError(f"The server at {public_url(self.base_url)} writes no captions: {reply.error}")
        self._probed = True

    def stream(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Ask once, and follow the denoising.

        Args:
            request (`dict`): see [`request_of`], and settings.

        Yields:
            the server's events: `{"regions": [{"id", "caption", "score"}]}` for every step; the last has all regions
            and "usage".

        Raises:
            ServerError: it fails, refuses, or stops before the end.
        """
        where, event = f"The server at {public_url(self.base_url)}", {}
        options = {"cast_to": object, "stream": True, "stream_cls": self._api.Stream[object]}
        try:
            body = {**self._body(request), "stream": True}
            with self._client.post("/region_captions", body=body, **options) as events:
                for event in events:
                    yield event
        except self._api.OpenAIError as error:
            raise ServerError(f"{where} writes no captions: {self._why(error)}") from error
        if "usage" not in event or len(event.get("regions", [])) != len(request["regions"]):
            raise ServerError(f"{where} stopped before all captions were written.")

    def _send(self, body: dict[str, Any]) -> Reply:
        data: Any = None
        try:
            data = self._client.post("/region_captions", body=body, cast_to=object)
            rows = data["regions"]
            whole = [row["id"] for row in rows] == [region["id"] for region in body["regions"]]
            whole = whole and all(isinstance(row["caption"], str) and 0 <= row["score"] <= 1 for row in rows)
        except (LookupError, TypeError, ValueError):
            whole = False
        if not whole:
            raise NoReply(f"the server's answer is not one caption for each region: {str(data)[:80]!r}.")
        return Reply(json.dumps(rows), usage=data.get("usage") or {})


def request_of(url: str, regions: list[Region]) -> dict[str, Any]:
    """Body of a request, without model and settings; ids are positions."""
    shapes = [{"id": k, "segmentation": region.segmentation} for k, region in enumerate(regions)]
    return {"image": url, "regions": shapes}


def image_url(path: Path | None, read: Image.Image) -> str:
    """An image as a data URL: its file where every reader sees the same in it, else what was read from it, as PNG."""
    try:
        with Image.open(path or "") as image:
            kind = _SENT_AS_THEY_ARE.get(image.format or "")
            plain = image.mode == "RGB" and image.getexif().get(_ORIENTATION, 1) == 1
        if path is not None and kind is not None and plain:
            return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    except OSError:  # moved since; what was read then is in memory
        pass
    return png_url(read)
