"""A client for our own server's route `/v1/region_captions`."""

import base64
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from PIL import ExifTags, Image

from ..attributes.captions import AttributeCaption, read_row
from ..attributes.results import RegionAttributes
from ..attributes.schema import AttributeSchema
from ..captions_pdlm import RegionCaption
from ..errors_pdlm import ServerError
from ..regions.crops import png_url
from ..regions.region import Region, probe_image
from .cache import Reply
from .server import NoReplyError, ServerClient

MAX_REGIONS = 60  # per request: servers take 64, and 60 fills the prompts of models with 1 to 6 of them
_SENT_UNCHANGED = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}


class CaptionClient:
    """A client for a server that runs our model.

    Args:
        base_url (`str`): address of the server, with or without `/v1`.
        model (`str`, *optional*): name of the model at the server; default: the first one.
        schema (`AttributeSchema`, *optional*): attributes to read in place of captions.
        **options: see [`~pdlm_hf.client.server.ServerClient`].

    Raises:
        ServerError: the server cannot be reached, or has no such model.
    """

    def __init__(self, base_url: str, model: str | None = None, schema: AttributeSchema | None = None, **options: Any):
        if urlsplit(base_url).path in ("", "/"):
            base_url = f"{base_url.rstrip('/')}/v1"
        image, regions = probe_image()
        trial = request_of(png_url(image), regions)
        self.schema, self._options = schema, dict(options)
        if schema is not None:
            options["settings"] = {**(options.get("settings") or {}), "schema": schema.to_json()}
        # without a cache: captions are kept in the rows that are written
        self.server = ServerClient(model or "", base_url, send=self._send, trial=trial, **options)
        self.server.check_model()

    @property
    def model(self) -> str:
        """Name of the model at the server."""
        return self.server.model

    @property
    def concurrency(self) -> int:
        """Number of requests at a time."""
        return self.server.concurrency

    def with_schema(self, schema: AttributeSchema) -> "CaptionClient":
        """A client of the same model that reads attributes in place of captions; to be closed.

        Raises:
            ServerError: the server cannot be reached.
        """
        return CaptionClient(self.server.base_url, self.model, schema, **self._options)

    def probe(self) -> None:
        """Caption a small grey image.

        Raises:
            ServerError: the server does not work, or refuses the settings.
        """
        self.server.probe()

    def ask_many(self, requests: Iterable[dict[str, Any]]) -> Iterator[tuple[int, Reply]]:
        """Send requests, several at a time.

        Args:
            requests: see [`request_of`]; read as needed.

        Yields:
            (position of the request, [`Reply`] with a JSON list of captions as text), in the order of arrival.

        Raises:
            ServerError: the server cannot be used any more.
        """
        return self.server.ask_many(requests)

    def stream(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Send one request and follow the denoising.

        Args:
            request (`dict`): see [`request_of`], and settings.

        Yields:
            the server's events: `{"regions": [{"id", "caption", "score"}]}` for every step; the last one has all
            regions and "usage".

        Raises:
            ServerError: the server fails, refuses the request, or stops before the end.
        """
        from openai import OpenAIError, Stream

        event: dict[str, Any] = {}
        body = {"model": self.model, **self.server.settings, **request, "stream": True}
        connection: Any = self.server.connection  # its stream is typed without the events
        try:
            with connection.post(
                "/region_captions", body=body, cast_to=object, stream=True, stream_cls=Stream[object]
            ) as events:
                for event in events:
                    yield event
        except OpenAIError as error:
            raise self.server.error("writes no captions", error) from error
        if "usage" not in event or len(event.get("regions", [])) != len(request["regions"]):
            raise ServerError(f"{self.server.name} stopped before all captions were written.")

    def attributes(self, image: Image.Image, regions: list[Region]) -> tuple[list[RegionAttributes], int]:
        """Read the attributes of the regions of one image.

        Args:
            image (`PIL.Image.Image`): RGB.
            regions (`list[Region]`): any number.

        Returns:
            the attributes of every region, and the number of the server's forward passes.

        Raises:
            ServerError: the server fails, or refuses the request or the schema.
        """
        url, forwards = image_url(None, image), 0
        parts = [regions[start : start + MAX_REGIONS] for start in range(0, len(regions), MAX_REGIONS)]
        found: dict[int, list[RegionAttributes]] = {}
        for number, reply in self.ask_many(request_of(url, part) for part in parts):
            if reply.text is None:
                raise ServerError(f"{self.server.name} reads no attributes: {reply.error}")
            captions = [self.caption_of(row) for row in json.loads(reply.text)]
            rows = zip(captions, parts[number], strict=True)
            found[number] = [RegionAttributes(caption.attributes, own.id, own.bbox) for caption, own in rows]
            forwards += int(reply.usage.get("num_forwards") or 0)
        return [region for number in sorted(found) for region in found[number]], forwards

    def caption_of(self, row: dict[str, Any]) -> Any:
        """The caption in a row of the server's answer, with a schema an [`AttributeCaption`]."""
        caption = caption_of(row)
        if self.schema is None:
            return caption
        return AttributeCaption(caption.text, caption.score, attributes=read_row(self.schema, row))

    def _send(self, connection: Any, body: dict[str, Any]) -> Reply:
        data: Any = None
        try:
            data = connection.post("/region_captions", body=body, cast_to=object)
            rows = data["regions"]
            complete = [row["id"] for row in rows] == [region["id"] for region in body["regions"]]
            complete = complete and all(isinstance(row["caption"], str) and 0 <= row["score"] <= 1 for row in rows)
            if complete and self.schema is not None:
                [read_row(self.schema, row) for row in rows]
        except (LookupError, TypeError, ValueError):
            complete = False
        if not complete:
            what = "caption" if self.schema is None else "set of attributes"
            raise NoReplyError(f"the server's answer is not one {what} for each region: {str(data)[:80]!r}.")
        return Reply(json.dumps(rows), usage=data.get("usage") or {})

    def close(self) -> None:
        """Close the connections."""
        self.server.close()


def caption_of(row: dict[str, Any]) -> RegionCaption:
    """Make a caption of a row of the server's answer."""
    return RegionCaption(row["caption"], row["score"], truncated=row.get("truncated") is True)


def request_of(url: str, regions: list[Region]) -> dict[str, Any]:
    """Make the body of a request, without model and settings; the ids of the regions are their positions.

    Args:
        url (`str`): the image, as a data URL.
        regions (`list[Region]`): at most [`MAX_REGIONS`].
    """
    shapes = [{"id": k, "segmentation": region.segmentation} for k, region in enumerate(regions)]
    return {"image": url, "regions": shapes}


def image_url(path: Path | None, image: Image.Image) -> str:
    """Make a data URL of an image: of its file if every reader sees the same in it, else of its pixels as PNG.

    Args:
        path (`Path`, *optional*): the file.
        image (`PIL.Image.Image`): the image as it was read from the file.
    """
    try:
        with Image.open(path or "") as file:
            kind = _SENT_UNCHANGED.get(file.format or "")
            plain = file.mode == "RGB" and file.getexif().get(ExifTags.Base.Orientation, 1) == 1
        if path is not None and kind is not None and plain:
            return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    except Exception:  # moved since, or with EXIF data that Pillow cannot read; the pixels are in memory
        pass
    return png_url(image)
