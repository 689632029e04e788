"""Region data of the domain of drawings, as files."""

import json
from pathlib import Path

import numpy as np
from pycocotools import mask as coco

from pdlm_hf.shapes.scenes import describe, draw_scene


def rle(mask):
    value = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": list(value["size"]), "counts": value["counts"].decode()}


def drawn_rows(folder: Path, count: int = 4, seed: int = 0):
    """Images saved into a folder, their rows, and what was drawn."""
    rows, images = [], []
    folder.mkdir(parents=True, exist_ok=True)
    for k in range(count):
        rng = np.random.default_rng((seed, k))
        image = draw_scene(rng)
        image.image.save(folder / f"{k}.png")
        regions = [
            {"id": 10 * k + n, "segmentation": rle(mask), "caption": describe(figure, rng)}
            for n, (mask, figure) in enumerate(zip(image.masks, image.figures, strict=True))
        ]
        rows.append({"image": f"{k}.png", "regions": regions})
        images.append(image)
    return rows, images


def write_jsonl(path: Path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_jsonl(path: Path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def as_coco(rows, scenes):
    """The same as a COCO file; the first annotation as polygons' neighbour, a box."""
    images, annotations = [], []
    for k, (row, scene) in enumerate(zip(rows, scenes, strict=True)):
        width, height = scene.image.size
        images.append({"id": k + 1, "file_name": row["image"], "width": width, "height": height, "license": 3})
        for region, figure in zip(row["regions"], scene.figures, strict=True):
            category = {"category_id": ["circle", "square", "triangle", "star", "cross"].index(figure.shape)}
            annotations.append({**region, "image_id": k + 1, "iscrowd": 0, **category})
    names = ["circle", "square", "triangle", "star", "cross"]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": k, "name": name} for k, name in enumerate(names)],
    }


def tiny_sam(folder: Path) -> Path:
    """A SAM with random weights."""
    import torch
    from transformers import SamConfig, SamImageProcessorPil, SamModel, SamProcessor

    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    grid = {"image_size": 64, "patch_size": 16}
    vision = {**small, **grid, "output_channels": 16, "global_attn_indexes": [0], "window_size": 2, "num_pos_feats": 8}
    config = SamConfig(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": 16, "mask_input_channels": 4, **grid},
        mask_decoder_config={**small, "mlp_dim": 16, "iou_head_hidden_dim": 16},
    )
    torch.manual_seed(0)
    SamModel(config).save_pretrained(folder)
    size = {"size": {"longest_edge": 64}, "pad_size": {"height": 64, "width": 64}}
    SamProcessor(SamImageProcessorPil(**size)).save_pretrained(folder)
    return folder
