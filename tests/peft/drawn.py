"""Region data of the drawing world, as files."""

import json
from pathlib import Path

import numpy as np
from pycocotools import mask as coco

from pdlm_hf.shapes.world import describe, draw_picture


def rle(mask):
    value = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(value["size"]), "counts": value["counts"].decode()}


def drawn_rows(folder: Path, count: int = 4, seed: int = 0):
    """Pictures saved into a folder, their rows, and what was drawn."""
    rows, pictures = [], []
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        rng = np.random.default_rng((seed, k))
        picture = draw_picture(rng)
        picture.image.save(folder / f"{k}.png")
        regions = [
            {"id": 10 * k + n, "segmentation": rle(mask), "caption": describe(figure, rng)}
            for n, (mask, figure) in enumerate(zip(picture.masks, picture.figures, strict=True))
        ]
        rows.append({"image": f"{k}.png", "regions": regions})
        pictures.append(picture)
    return rows, pictures


def write_jsonl(path: Path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def as_coco(rows, pictures):
    """The same as a COCO file; the first annotation as polygons' neighbour, a box."""
    images, annotations = [], []
    for k, (row, picture) in enumerate(zip(rows, pictures, strict=True)):
        width, height = picture.image.size
        images.append({"id": k + 1, "file_name": row["image"], "width": width, "height": height, "license": 3})
        for region, figure in zip(row["regions"], picture.figures, strict=True):
            category = {"category_id": ["circle", "square", "triangle", "star", "cross"].index(figure.shape)}
            annotations.append({**region, "image_id": k + 1, "iscrowd": 0, **category})
    names = ["circle", "square", "triangle", "star", "cross"]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": k, "name": name} for k, name in enumerate(names)],
    }
