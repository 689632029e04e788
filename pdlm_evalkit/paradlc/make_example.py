"""Write the small invented benchmark in `example/`; this describes the files of ParaDLC-Bench and DLC-Bench.

    python -m pdlm_evalkit.paradlc.make_example FOLDER

A benchmark folder contains

- `annotations.json`. ParaDLC-Bench: a list of images `{"image_id", "file_name", "height", "width", "annotations":
  [{"index", "category_name", "bbox": [x0, y0, x1, y1], "mask_rle": {"size": [height, width], "counts"}}]}`, and the
  mask ids are `"<image_id>_<index>"`. DLC-Bench: a COCO file; the mask ids are the ids of the annotations.
- `qa.json`: `{mask id: [{"question", "choices": [[text, score], ...], "type": "positive" | "negative"}]}`. A mask may
  have no questions (then it is not part of the benchmark), or no positive ones.
- `class_names.json`: `{mask id: name of the object}`; it may name more masks.
- `images/`.

The images of this example are synthetic scenes. `example/dlc` has the same questions in the form of DLC-Bench, about
the images in `example/images`.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from pdlm_hf.regions.rle import encode
from pdlm_hf.shapes.scenes import WORDS, Figure, Scene, draw_scene

NUM_SCENES = 6
SEED = 2026


def draw_scenes() -> list[Scene]:
    """Scenes of the shapes data set with two to six figures."""
    scenes: list[Scene] = []
    number = 0
    while len(scenes) < NUM_SCENES:
        scene = draw_scene(np.random.default_rng([SEED, number]))
        number += 1
        if len(scene.masks) >= 2:
            scenes.append(scene)
    return scenes


def positive_question(figure: Figure, attribute: str) -> dict[str, Any]:
    """A question whether the caption states an attribute correctly."""
    name, value = figure.shape, getattr(figure, attribute)
    return {
        "question": "Which of the following is applicable to the description?",
        "choices": [
            [f"The {attribute} of the {name} is mentioned in the description and it is {value}.", 1],
            [f"The {name} is not mentioned.", 0],
            [f"The {attribute} of the {name} is mentioned in the description but it is not {value}.", -1],
            [f"The {attribute} is not mentioned, but the {name} is mentioned.", 0.5],
        ],
        "type": "positive",
    }


def negative_question(detail: str) -> dict[str, Any]:
    """A question whether the caption states something that is not in the image."""
    return {
        "question": "Which of the following is applicable to the description?",
        "choices": [
            [f"{detail} is mentioned in the description.", -1],
            [f"{detail} is not mentioned in the description.", 1],
        ],
        "type": "negative",
        "subtype": "negative mislocalization",
    }


def questions_of(figure: Figure, others: list[Figure], with_positives: bool) -> list[dict[str, Any]]:
    """Questions about a figure: its colour, texture and size, and an attribute that only other figures have."""
    asked = [positive_question(figure, name) for name in ("colour", "texture", "size")] if with_positives else []
    foreign = sorted({other.colour for other in others} - {figure.colour})
    colour = foreign[0] if foreign else next(name for name in WORDS["colour"] if name != figure.colour)
    return [*asked, negative_question(f"The colour {colour}"), negative_question("A word written on the surface")]


def build(scenes: list[Scene]) -> dict[str, Any]:
    """The contents of the JSON files by path."""
    paradlc, dlc_images, dlc_annotations = [], [], []
    qa, names, dlc_qa, dlc_names = {}, {}, {}, {}
    for number, scene in enumerate(scenes):
        image = {"file_name": f"{number}.png", "height": scene.image.height, "width": scene.image.width}
        annotations: list[dict[str, Any]] = []
        for index, (mask, figure) in enumerate(zip(scene.masks, scene.figures, strict=True)):
            y, x = mask.nonzero()
            box = [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]
            annotations.append(
                {"index": 2 * index, "category_name": figure.shape, "bbox": box, "mask_rle": encode(mask)}
            )
            key, dlc_key = f"{900 + number}_{2 * index}", 1000 + 10 * number + index
            others = [other for other in scene.figures if other is not figure]
            # as in ParaDLC-Bench, a mask may have no positive question; in DLC-Bench each has some
            qa[key] = questions_of(figure, others, with_positives=(number, index) != (1, 0))
            dlc_qa[str(dlc_key)] = questions_of(figure, others, with_positives=True)
            names[key] = dlc_names[str(dlc_key)] = figure.shape
            dlc_annotations.append(
                {
                    "id": dlc_key,
                    "image_id": number,
                    "category_id": list(WORDS["shape"]).index(figure.shape) + 1,
                    "bbox": [box[0], box[1], box[2] - box[0], box[3] - box[1]],
                    "area": int(mask.sum()),
                    "iscrowd": 0,
                    "segmentation": encode(mask),
                }
            )
        paradlc.append({**image, "image_id": str(900 + number), "annotations": annotations})
        dlc_images.append({"id": number, **image})
    categories = [{"id": number, "name": name} for number, name in enumerate(WORDS["shape"], 1)]
    return {
        "annotations.json": paradlc,
        "qa.json": qa,
        "class_names.json": names,
        "dlc/annotations.json": {"images": dlc_images, "annotations": dlc_annotations, "categories": categories},
        "dlc/qa.json": dlc_qa,
        "dlc/class_names.json": dlc_names,
    }


def main(folder: Path) -> None:
    """Write both forms of the benchmark."""
    scenes = draw_scenes()
    (folder / "images").mkdir(parents=True, exist_ok=True)
    (folder / "dlc").mkdir(exist_ok=True)
    for number, scene in enumerate(scenes):
        scene.image.save(folder / "images" / f"{number}.png", optimize=True)
    for name, value in build(scenes).items():
        (folder / name).write_text(json.dumps(value) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
