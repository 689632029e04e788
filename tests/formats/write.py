"""Let the formats' own tools write the regions of `scene.py`: OUT/TOOL-VERSION/FORMAT-KIND.*

Runs in the environment of the tools, `.venv-formats/bin/python tests/formats/write.py OUT`, without this project. The
kind is "boxes", "polygons" (the slanted one too) or "masks".
"""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image
from scene import BOXES, CLASSES, HEIGHT, LABELS, MASKS, NAME, OUTLINES, SCORE, SLANTED, UPLOADED, WIDTH, corners

STEM = Path(NAME).stem
POLYGONS = [*zip(LABELS, OUTLINES, strict=True), ("cat", SLANTED)]
NUMBERS = [CLASSES.index(label) for label in LABELS]


def write_datumaro(out: Path, work: Path) -> None:
    """CVAT, COCO, PASCAL VOC, YOLO, LabelMe's older XML files, DOTA, SA-1B, MOTS and KITTI."""
    import datumaro as dm
    from datumaro.components.annotation import RotatedBbox

    ids = [{"label": number, "id": k, "group": k, "object_id": k} for k, number in enumerate(NUMBERS, 1)]
    regions = {
        "boxes": [dm.Bbox(*box, **own) for box, own in zip(BOXES, ids, strict=True)],
        "polygons": [
            dm.Polygon(np.ravel(points).tolist(), label=CLASSES.index(label), id=k, group=k)
            for k, (label, points) in enumerate(POLYGONS, 1)
        ],
        "masks": [
            dm.Mask(mask, attributes={"track_id": own["id"]}, **own) for mask, own in zip(MASKS, ids, strict=True)
        ],
        "turned": [
            RotatedBbox.from_rectangle(corners(*box), label=number) for box, number in zip(BOXES, NUMBERS, strict=True)
        ],
    }

    def export(kind: str, format: str, path: str, target: str, **options) -> None:
        images = [
            dm.DatasetItem(
                STEM,
                subset=subset,
                media=dm.Image.from_file(str(work / NAME)),
                annotations=regions[kind],
                attributes={"id": 7, "image_id": 7},
            )
            for subset in (("train", "val") if format == "yolo_ultralytics" else ("train",))
        ]
        folder = work / f"{kind}-{format}"
        dm.Dataset.from_iterable(images, categories=CLASSES).export(str(folder), format, save_media=False, **options)
        shutil.copy(folder / path, out / target)

    coco = "annotations/instances_train.json"
    export("boxes", "coco_instances", coco, "coco-boxes.json")
    export("polygons", "coco_instances", coco, "coco-polygons.json")
    export("masks", "coco_instances", coco, "coco-masks.json", segmentation_mode="mask")
    export("masks", "coco_panoptic", "annotations/panoptic_train.json", "panoptic-masks.json")
    (out / "panoptic-masks").mkdir()
    shutil.copy(work / f"masks-coco_panoptic/annotations/panoptic_train/{NAME}", out / "panoptic-masks")
    for kind in ("boxes", "polygons", "masks"):
        export(kind, "cvat", "train.xml", f"cvat-{kind}.xml")
    export("boxes", "voc_detection", f"Annotations/{STEM}.xml", "voc-boxes.xml")
    export("masks", "voc_segmentation", f"SegmentationObject/{NAME}", "voc-masks.png")
    export("masks", "mots_png", f"train/instances/{NAME}", "mots-masks.png")
    export("masks", "kitti_segmentation", f"train/instance/{NAME}", "kitti-masks.png")
    export("masks", "segment_anything", f"{STEM}.json", "sa-1b-masks.json")
    export("boxes", "yolo", f"obj_train_data/{STEM}.txt", "yolo-boxes.txt")
    export("boxes", "yolo_ultralytics", f"labels/train/{STEM}.txt", "yolo-ultralytics-boxes.txt")
    export("boxes", "label_me", f"Annotations/train/{STEM}.xml", "labelme-boxes.xml")
    export("polygons", "label_me", f"Annotations/train/{STEM}.xml", "labelme-polygons.xml")
    export("turned", "dota", f"train/labelTxt/{STEM}.txt", "dota-boxes.txt")


def write_globox(out: Path, work: Path) -> None:
    """VIA, CVAT, PASCAL VOC, COCO, LabelMe and text files; some with a confidence, which is the first or the last."""
    from globox import Annotation, AnnotationSet, BoundingBox, BoxFormat

    def regions(confidence: float | None) -> AnnotationSet:
        boxes = [
            BoundingBox(label=label, xmin=x, ymin=y, xmax=x + w, ymax=y + h, confidence=confidence)
            for label, (x, y, w, h) in zip(LABELS, BOXES, strict=True)
        ]
        return AnnotationSet([Annotation(NAME, (WIDTH, HEIGHT), boxes)])

    plain, scored = regions(None), regions(SCORE)
    plain.save_coco(out / "coco-boxes.json", auto_ids=True)
    plain.save_cvat(out / "cvat-boxes.xml")
    plain.save_via_json(out / "via-boxes.json", image_folder=work)
    numbers = {"label_to_id": {label: k for k, label in enumerate(CLASSES)}}
    folders: dict[str, Callable[[Path], None]] = {
        "voc-boxes.xml": plain.save_pascal_voc,
        "labelme-boxes.json": plain.save_labelme,
        "yolo-boxes.txt": lambda path: plain.save_yolo_v5(path, **numbers),
        "yolo-scored-boxes.txt": lambda path: scored.save_yolo_v5(path, **numbers),
        "text-corners-scored-boxes.txt": lambda path: scored.save_txt(path, **numbers),
        "text-sides-scored-boxes.txt": lambda path: scored.save_txt(path, box_format=BoxFormat.LTWH, **numbers),
        "text-centres-scored-boxes.txt": lambda path: scored.save_txt(
            path, box_format=BoxFormat.XYWH, conf_last=True, **numbers
        ),
    }
    for target, save in folders.items():
        save(work / target)
        shutil.copy(next((work / target).iterdir()), out / target)


def write_label_studio(out: Path, work: Path) -> None:
    """Tasks as Label Studio has them, their brush marks by its own encoder, and what its converter makes of them."""
    from label_studio_sdk.converter import Converter
    from label_studio_sdk.converter.brush import mask2rle

    def per_cent(x: float, y: float) -> list[float]:
        return [x * 100 / WIDTH, y * 100 / HEIGHT]

    boxes = [dict(zip(("x", "y", "width", "height"), (*per_cent(x, y), *per_cent(w, h)), strict=True), rotation=0)
             for x, y, w, h in BOXES]  # fmt: skip
    regions = {
        "Rectangle": zip(LABELS, boxes, strict=True),
        "Polygon": [(label, {"points": [per_cent(*point) for point in points]}) for label, points in POLYGONS],
        "Brush": [
            (label, {"format": "rle", "rle": mask2rle(mask.astype(np.uint8) * 255)})
            for label, mask in zip(LABELS, MASKS, strict=True)
        ],
    }
    fixed = {"from_name": "label", "to_name": "image", "image_rotation": 0}
    fixed |= {"original_width": WIDTH, "original_height": HEIGHT}
    times = {"created_at": "2026-01-01T00:00:00Z", "updated_at": "2026-01-01T00:00:00Z"}
    for tag, shapes in regions.items():
        key, kind = f"{tag.lower()}labels", {"Rectangle": "boxes", "Polygon": "polygons", "Brush": "masks"}[tag]
        results = [{"id": f"r{k}", "type": key, **fixed, "value": {**shape, key: [label]}}
                   for k, (label, shape) in enumerate(shapes)]  # fmt: skip
        annotation = {"id": 9, "completed_by": 1, "was_cancelled": False, "result": results, "lead_time": 1.0, **times}
        task = {"id": 5, "data": {"image": f"/data/upload/1/{UPLOADED}"}, "annotations": [annotation], **times}
        tasks = work / f"{kind}.json"
        tasks.write_text(json.dumps([task]))
        labels = "".join(f'<Label value="{name}"/>' for name in CLASSES)
        config = f'<Image name="image" value="$image"/><{tag}Labels name="label" toName="image">{labels}</{tag}Labels>'
        converter = Converter(f"<View>{config}</View>", str(work), download_resources=False)

        def convert(format: str, path: str, target: str, converter=converter, tasks=tasks, kind=kind) -> None:
            folder = work / f"{kind}-{format}"
            folder.mkdir()
            converter.convert(str(tasks), str(folder), format, is_dir=False)
            shutil.copy(folder / path, out / target)

        convert("JSON", "result.json", f"json-{kind}.json")
        convert("JSON_MIN", "result.json", f"json-min-{kind}.json")
        if kind == "masks":
            continue  # BRUSH_TO_COCO makes outlines of them, which lack the last row and column
        convert("COCO", "result.json", f"coco-{kind}.json")
        convert("YOLO", f"labels/{Path(UPLOADED).stem}.txt", f"yolo-{kind}.txt")
        if kind == "boxes":
            convert("YOLO_OBB", f"labels/{Path(UPLOADED).stem}.txt", "yolo-turned-boxes.txt")
            convert("VOC", f"Annotations/{Path(UPLOADED).stem}.xml", "voc-boxes.xml")


def write_labelme(out: Path, work: Path) -> None:
    """LabelMe's JSON files."""
    from labelme._label_file import write_label_file
    from labelme.utils import img_arr_to_b64

    def crop(mask: np.ndarray, box: list[int]) -> str:
        x, y, w, h = box
        return img_arr_to_b64(mask[y : y + h, x : x + w])

    shapes = {
        "polygons": [{"shape_type": "polygon", "label": label, "points": points} for label, points in POLYGONS],
        "boxes": [
            {"shape_type": "rectangle", "label": label, "points": corners(*box)[::2]}
            for label, box in zip(LABELS, BOXES, strict=True)
        ],
        "masks": [
            {"shape_type": "mask", "label": label, "points": [[x, y], [x + w - 1, y + h - 1]],
             "mask": crop(mask, [x, y, w, h])}
            for label, mask, (x, y, w, h) in zip(LABELS, MASKS, BOXES, strict=True)
        ],
    }  # fmt: skip
    image = {
        "image_path": NAME,
        "image_width": WIDTH,
        "image_height": HEIGHT,
        "image_data": (work / NAME).read_bytes(),
    }
    empty = {"group_id": None, "description": "", "flags": {}, "mask": None}
    for kind, found in shapes.items():
        write_label_file(str(out / f"labelme-{kind}.json"), shapes=[{**empty, **shape} for shape in found], **image)


def write_supervision(out: Path, work: Path) -> None:
    """YOLO, COCO and PASCAL VOC."""
    import supervision as sv

    image = str(work / NAME)
    turned = np.array([corners(*box) for box in BOXES], dtype=np.float32)
    for kind, data in {"boxes": {}, "turned-boxes": {"xyxyxyxy": turned}}.items():
        detections = sv.Detections(
            xyxy=np.array([[x, y, x + w, y + h] for x, y, w, h in BOXES], dtype=float),
            class_id=np.array(NUMBERS),
            data=data,
        )
        found = sv.DetectionDataset(classes=CLASSES, images=[image], annotations={image: detections})
        found.as_yolo(annotations_directory_path=str(work / kind), is_obb=bool(data))
        shutil.copy(work / kind / f"{STEM}.txt", out / f"yolo-{kind}.txt")
    found.as_coco(annotations_path=str(out / "coco-boxes.json"))
    found.as_pascal_voc(annotations_directory_path=str(work / "voc"))
    shutil.copy(work / "voc" / f"{STEM}.xml", out / "voc-boxes.xml")


def write_ultralytics(out: Path, work: Path) -> None:
    """The text files of predictions: boxes, tracks, turned boxes and keypoints, with and without the confidence."""
    import torch
    from ultralytics.engine.results import Results

    def save(name: str, save_conf: bool = False, **parts: torch.Tensor) -> None:
        image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
        Results(image, NAME, dict(enumerate(CLASSES)), **parts).save_txt(str(out / name), save_conf)

    corners = [[x, y, x + w, y + h] for x, y, w, h in BOXES]
    ends = [[SCORE, number] for number in NUMBERS]
    boxes = torch.tensor([[*box, *end] for box, end in zip(corners, ends, strict=True)])
    tracks = torch.tensor([[*box, k, *end] for k, (box, end) in enumerate(zip(corners, ends, strict=True), 1)])
    turned = torch.tensor([[x + w / 2, y + h / 2, w, h, 0.0, *end]
                           for (x, y, w, h), end in zip(BOXES, ends, strict=True)])  # fmt: skip
    points = torch.tensor([[[x + 2, y + 2, 0.9], [x + w - 2, y + h - 2, 0.8], [x + w - 3, y + 3, 0.4]]
                           for x, y, w, h in BOXES])  # fmt: skip
    save("yolo-boxes.txt", boxes=boxes)
    save("yolo-scored-boxes.txt", True, boxes=boxes)
    save("yolo-track-boxes.txt", boxes=tracks)
    save("yolo-track-scored-boxes.txt", True, boxes=tracks)
    save("yolo-turned-boxes.txt", obb=turned)
    save("yolo-turned-scored-boxes.txt", True, obb=turned)
    save("yolo-keypoints-boxes.txt", boxes=boxes, keypoints=points)


WRITERS = {
    "datumaro": write_datumaro,
    "globox": write_globox,
    "label-studio-sdk": write_label_studio,
    "labelme": write_labelme,
    "supervision": write_supervision,
    "ultralytics": write_ultralytics,
}


def main(out: Path) -> None:
    """Write the files of all tools."""
    for tool, write in WRITERS.items():
        folder = out / f"{tool}-{version(tool)}"
        folder.mkdir(parents=True)
        with tempfile.TemporaryDirectory() as work:
            Image.new("RGB", (WIDTH, HEIGHT), "grey").save(Path(work) / NAME)
            write(folder, Path(work))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
