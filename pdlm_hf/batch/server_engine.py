"""Captions of a data set from our server's route `/v1/region_captions`, many requests in flight."""

import json
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

from ..client.captions import MAX_REGIONS, CaptionClient, image_url, request_of
from ..processing_pdlm import RegionCaption
from ..regions.region import MASK_PIXELS, Region
from .engines import ImageEngine, Outcome, Work


class ServerEngine(ImageEngine):
    """An engine of [`batch`] that asks a server.

    Args:
        server (`CaptionClient`): with the settings of every request.

    Raises:
        ServerError: it writes no captions; found out on a small grey image.
    """

    def __init__(self, server: CaptionClient):
        self.server, self.ahead = server, server.concurrency
        server.probe()

    def run(self, works: Iterable[Work]) -> Iterator[Outcome]:
        """Caption images; outcomes come as the server replies. Raises: ServerError if it is of no use any more."""
        sent: dict[int, tuple[Work, list[Region]]] = {}
        numbers = count()

        def requests() -> Iterator[dict[str, Any]]:
            for work in works:
                if work.image is None:
                    continue
                url = image_url(work.entry.path, work.image)
                most = max(1, min(MAX_REGIONS, MASK_PIXELS // (work.image.width * work.image.height)))
                for start in range(0, len(work.regions), most):
                    regions = work.regions[start : start + most]
                    sent[next(numbers)] = work, regions
                    yield request_of(url, regions)

        for index, reply in self.server.ask_many(requests()):
            work, regions = sent.pop(index)  # images are large
            captions = None
            if reply.text is not None:
                captions = [RegionCaption(row["caption"], row["score"]) for row in json.loads(reply.text)]
            yield Outcome(work, regions, captions, reply.error)
