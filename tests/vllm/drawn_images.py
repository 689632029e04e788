"""Images of the shapes data set with one to eight regions; past six, boxes anywhere."""

import base64
import io

import numpy as np
from pycocotools import mask as coco_mask

from pdlm_hf.regions.region import parse_regions
from pdlm_hf.shapes.evaluate import held_out

SEED = 77


def drawn_images(count: int, seed: int = SEED) -> list[tuple]:
    """(image, regions) pairs; the k-th has 1 + k % 8 regions, drawn figures first."""
    pairs = []
    for k, image in enumerate(held_out(seed, count)):
        regions = list(image.masks)[: 1 + k % 8]
        rng = np.random.default_rng((seed, k))
        width, height = image.image.size
        while len(regions) < 1 + k % 8:
            w, h = (int(n) for n in rng.integers(12, 30, 2))
            regions.append([int(rng.integers(0, width - w)), int(rng.integers(0, height - h)), w, h])
        pairs.append((image.image, regions))
    return pairs


def coco(image, regions) -> list[dict]:
    """Regions as JSON: RLE with ids from 100 on."""
    found = []
    for k, region in enumerate(parse_regions(regions, *image.size)):
        encoded = coco_mask.encode(np.asfortranarray(region.mask.astype(np.uint8)))
        rle = {"size": list(encoded["size"]), "counts": encoded["counts"].decode()}
        found.append({"id": 100 + k, "segmentation": rle})
    return found


def data_url(image) -> str:
    """The image as a PNG in a URL."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def texts(captions) -> list[str]:
    """Texts of captions."""
    return [caption.text for caption in captions]
