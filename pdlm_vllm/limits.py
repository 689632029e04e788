"""What a request to the server may cost, checked before memory is taken for it."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from PIL import Image

from pdlm_hf.errors_pdlm import ImageError, RegionError, SettingError
from pdlm_hf.regions import limits as reading_limits
from pdlm_hf.templates_pdlm import AttributePlan

ID_LENGTH = 256  # characters of a region's id


@dataclass(frozen=True)
class Limits:
    """Limits of a server, each a key of `--additional-config`, or the environment variable of its name after `PDLM_`.

    Args:
        body_bytes (`int`): body of a request to any route.
        body_values (`int`): commas in it, which bound the numbers and objects of its JSON.
        other_values (`int`): the same on routes without regions, and in a chat beside its regions: vLLM checks each
            value against every form that it may have.
        body_escapes (`int`): backslashes in it, each of which takes as long to read as a dozen other characters.
        url_length (`int`): address of an image, unless it is a data URL.
        max_regions (`int`): regions of a request.
        image_pixels (`int`): one image.
        request_pixels (`int`): image and masks of a request together, or all images of a chat.
        polygon_points (`int`): polygons of one region.
        polygon_length (`int`): their outline, in pixels.
        rle_bytes (`int`): compressed run lengths of one region.
        attribute_rows (`int`): token positions of the blocks that read the attributes of a request.
        attribute_scores (`int`): choices that are scored for a request, those of every region and template.
        parsers (`int`): requests whose images and regions are decoded at a time.
    """

    body_bytes: int = 2**25
    body_values: int = 2**17
    other_values: int = 2**12
    body_escapes: int = 2**19
    url_length: int = 2**13
    max_regions: int = 64
    image_pixels: int = 2**26
    request_pixels: int = 2**29
    polygon_points: int = 2**16
    polygon_length: int = 2**17
    rle_bytes: int = 2**20
    attribute_rows: int = 2**16
    attribute_scores: int = 2**18
    parsers: int = 2

    def check_count(self, regions: int) -> None:
        """Raises: RegionError if there are too many regions."""
        if regions > self.max_regions:
            raise RegionError(
                f"{regions} regions, but this server takes at most {self.max_regions} a request (max_regions); send "
                "several."
            )

    def check_pixels(self, width: int, height: int, regions: int) -> None:
        """Raises: RegionError if the image and the masks have too many pixels together."""
        pixels = width * height * (1 + regions)
        if pixels > self.request_pixels:
            raise RegionError(
                f"An image of {width} x {height} pixels and {regions} masks are {pixels} pixels together; this "
                f"server takes at most {self.request_pixels} a request (request_pixels). Send fewer regions, "
                "or a smaller image."
            )

    def check_attributes(self, plan: AttributePlan, regions: int, calibrate: bool) -> None:
        """Raises: SettingError if a schema asks for too much of this many regions.

        Args:
            plan (`AttributePlan`): of the schema.
            regions (`int`)
            calibrate (`bool`): read once more without a region, for one prompt of regions at least.
        """
        times = (regions + calibrate) * max(1, len(plan.templates))
        scores = times * sum(map(len, plan.choices.values()))
        self._check_attributes("attribute_scores", scores, "choices to score", regions)
        rows = (regions + calibrate) * plan.rows + regions * sum(plan.lengths.values())
        self._check_attributes("attribute_rows", rows, "token positions to compute", regions)

    def _check_attributes(self, name: str, found: int, what: str, regions: int) -> None:
        if found > getattr(self, name):
            raise SettingError(
                f"The schema and {regions} regions have {found} {what}; this server takes at most "
                f"{getattr(self, name)} a request ({name}). Send fewer regions, choices or templates."
            )

    def check_run_lengths(self, regions: Sequence[Any]) -> None:
        """Raises: RegionError if the compressed run lengths of a region are too long."""
        for k, region in enumerate(regions):
            shape = region.get("segmentation", region) if isinstance(region, dict) else None
            counts = shape.get("counts") if isinstance(shape, dict) else None
            if isinstance(counts, str) and len(counts) > self.rle_bytes:
                raise RegionError(
                    f"region {k}: `counts` of its RLE has {len(counts)} characters; this server reads at most "
                    f"{self.rle_bytes} (rle_bytes)."
                )

    def check_ids(self, regions: Sequence[Any]) -> None:
        """Raises: RegionError for an id that is long, or no number or text; each event of a stream repeats it."""
        for k, region in enumerate(regions):
            own = region.get("id") if isinstance(region, dict) else None
            if isinstance(own, (list, dict)):
                raise RegionError(f"region {k}: `id` must be a number or a text, got {type(own).__name__}.")
            if isinstance(own, str) and len(own) > ID_LENGTH:
                raise RegionError(f"region {k}: `id` has {len(own)} characters, at most {ID_LENGTH} are sent back.")

    def check_url(self, url: str) -> None:
        """Raises: ImageError for an address that is too long; parsing it would take seconds."""
        if url[:5].lower() != "data:" and len(url) > self.url_length:
            raise ImageError(
                f"The address of the image has {len(url)} characters; this server takes at most {self.url_length} "
                "(url_length). Send the image itself as a data URL."
            )

    def apply(self) -> None:
        """Make the readers of this process keep to the limits on images and polygons."""
        reading_limits.IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS = self.image_pixels
        reading_limits.MASK_PIXELS = self.request_pixels
        reading_limits.POLYGON_POINTS = self.polygon_points
        reading_limits.POLYGON_LENGTH = self.polygon_length


def read_limits(options: Mapping[str, Any] | None) -> Limits:
    """Limits from `--additional-config` and the environment.

    Raises:
        SettingError: a value that is not a positive integer.
    """
    given = {}
    for field in fields(Limits):
        variable = f"PDLM_{field.name.upper()}"
        name, value = field.name, (options or {}).get(field.name)
        if value is None and variable in os.environ:
            name, value = variable, os.environ[variable]
            value = int(value) if value.isdecimal() and len(value) < 16 else value
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise SettingError(f"`{name}` must be a positive integer, got {value!r:.60}.")
        given[field.name] = value
    return Limits(**given)
