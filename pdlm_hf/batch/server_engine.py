"""Caption a data set by a server's route `/v1/region_captions`, many requests at a time."""

import json
from collections.abc import Iterable, Iterator
from itertools import count
from typing import Any

from ..client.captions import MAX_REGIONS, CaptionClient, image_url, request_of
from ..regions.region import MASK_PIXELS, Region
from .engines import ImageEngine, Outcome, Work


class ServerEngine(ImageEngine):
    """An engine that sends requests to a server.

    Args:
        server (`CaptionClient`): the client, with the settings of every request.

    Raises:
        ServerError: the server does not caption a small grey image.
    """

    def __init__(self, server: CaptionClient):
        self.server, self.ahead = server, server.concurrency
        server.probe()

    def run(self, works: Iterable[Work]) -> Iterator[Outcome]:
        """Caption images; outcomes come in the order of the replies.

        Raises:
            ServerError: the server cannot be used any more.
        """
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
            work, regions = sent.pop(index)  # do not hold on to images: they are large
            captions = None
            if reply.text is not None:
                captions = [self.server.caption_of(row) for row in json.loads(reply.text)]
            yield Outcome(work, regions, captions, reply.error)
