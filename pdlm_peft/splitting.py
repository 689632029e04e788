"""Split region data into two files without a common image."""

import base64
import hashlib
import os
import random
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from pdlm_hf.errors_pdlm import DataError, SettingError
from pdlm_hf.regions.files import without_collection

from .conversion import reference_rows, relocated, write_row, writing
from .sources import find_source


def split(
    source: str | Path, train: Path, held_out: Path, share: float = 0.05, seed: int = 0, images: Path | None = None
) -> tuple[Counter, Counter]:
    """Split region data into two files without a common image. The rows are read twice; only a key of each image is
    kept.

    Args:
        source (`str` or `Path`): any data that [`~data.RegionDataset`] reads.
        train, held_out (`Path`): JSONL files to write.
        share (`float`): share of the images to hold out; at least one image, and not all of them.
        seed (`int`): the same images and seed give the same split, in whatever order the rows are.
        images (`Path`, *optional*): see [`convert`].

    Returns:
        numbers of "rows", "regions" and "images" in the two files.

    Raises:
        SettingError: the share is not possible, or two of the three files are the same.
        DataError: a row cannot be used, or there are fewer than two images.
    """
    if not 0 < share < 1:
        raise SettingError(f"The share to hold out must be between 0 and 1, got {share}.")
    found = find_source(source, images)
    if train.resolve() == held_out.resolve():
        raise SettingError(f"{train}: the two files must differ.")
    for out in (train, held_out):
        if found.path is not None and found.path.resolve() == out.resolve():
            raise SettingError(f"{out}: the split would read the file that it writes; choose another file.")
    counts: tuple[Counter[str], Counter[str]] = Counter(), Counter()
    with without_collection():
        keys = sorted({image_key(row, found.folder) for _, row in reference_rows(found)})
        if len(keys) < 2:
            raise DataError(f"{source}: has {len(keys)} images; a split needs at least two.")
        random.Random(seed).shuffle(keys)
        number = min(max(1, round(share * len(keys))), len(keys) - 1)
        chosen = set(keys[:number])
        with ExitStack() as stack:
            files = [stack.enter_context(writing(out)) for out in (train, held_out)]
            for _, row in reference_rows(found):
                side = image_key(row, found.folder) in chosen
                write_row(files[side], relocated(row, found.own_folder, (train, held_out)[side].parent))
                counts[side]["rows"] += 1
                counts[side]["regions"] += len(row["regions"])
    counts[0]["images"], counts[1]["images"] = len(keys) - number, number
    return counts


def image_key(row: dict, folder: Path | None) -> str:
    """A short key of the image that does not depend on how its path is written; of an encoded image its hash."""
    image = row["image"]
    if isinstance(image, dict):
        if image.get("bytes") is not None:
            return _hash(base64.b64encode(image["bytes"]).decode())
        image = image["path"]
    if image.startswith("data:"):
        return _hash(image.partition("base64,")[2] or image)
    if folder is None:
        return image
    if ".." not in image and not os.path.isabs(image):  # a tenth of the time of the general way
        return os.path.normpath(image)
    return os.path.relpath(folder / image, folder)


def _hash(text: str) -> str:
    return f"data:{hashlib.blake2b(text.encode(errors='replace'), digest_size=16).hexdigest()}"
