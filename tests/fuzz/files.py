"""Good files of every format that `read_region_file` reads, of an image of 48 x 32 pixels with two regions."""

import base64
import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image
from strategies import changed_text, damaged, json_bytes

from pdlm_hf.regions.formats.facts import ImageFacts
from pdlm_hf.regions.formats.fiftyone import fiftyone_sample
from pdlm_hf.regions.region import Region

IMAGE, WIDTH, HEIGHT = "photo.png", 48, 32
BOXES = [[4, 6, 20, 10], [30, 2, 12, 24]]  # x, y, width, height
MASKS = np.zeros((2, HEIGHT, WIDTH), bool)
for _mask, (_x, _y, _w, _h) in zip(MASKS, BOXES, strict=True):
    _mask[_y : _y + _h, _x : _x + _w] = True
POLYGONS = [[x, y, x + w, y, x + w, y + h, x, y + h] for x, y, w, h in BOXES]
CORNERS = [[[x, y], [x + w, y + h]] for x, y, w, h in BOXES]
SIZE = {"width": WIDTH, "height": HEIGHT}


def rle(mask: np.ndarray) -> dict[str, Any]:
    """The mask as uncompressed RLE."""
    flat = np.concatenate([[0], mask.T.ravel(), [0]]).astype(int)
    edges = np.flatnonzero(np.diff(flat))
    ends = np.concatenate([[0], edges, [mask.size]])
    return {"size": [HEIGHT, WIDTH], "counts": np.diff(ends).tolist()}


def image_bytes(image: Image.Image, form: str = "PNG", **settings: Any) -> bytes:
    """The image as a file."""
    file = io.BytesIO()
    image.save(file, form, **settings)
    return file.getvalue()


ANNOTATIONS = [
    {"id": 5, "image_id": 1, "category_id": 1, "bbox": BOXES[0], "area": 200, "iscrowd": 0},
    {"id": 6, "image_id": 1, "category_id": 1, "segmentation": [POLYGONS[1]], "area": 288, "iscrowd": 0},
]
COCO = {
    "images": [{"id": 1, "file_name": IMAGE, **SIZE}, {"id": 2, "file_name": "other.png", "width": 9, "height": 9}],
    "annotations": ANNOTATIONS,
    "categories": [{"id": 1, "name": "thing"}],
}
LIST = [{"id": "a", "segmentation": rle(MASKS[0])}, {"id": "b", "bbox": BOXES[1]}]
_PART = base64.b64encode(image_bytes(Image.fromarray(MASKS[1][2:26, 30:42]))).decode()
LABELME = {
    "version": "5.4.1",
    "shapes": [
        {"label": "a", "shape_type": "rectangle", "points": CORNERS[0], "group_id": None},
        {"label": "b", "shape_type": "mask", "points": CORNERS[1], "mask": _PART, "group_id": None},
    ],
    "imagePath": IMAGE,
    "imageData": None,
    "imageWidth": WIDTH,
    "imageHeight": HEIGHT,
}
_YOLO = [[(x + w / 2) / WIDTH, (y + h / 2) / HEIGHT, w / WIDTH, h / HEIGHT] for x, y, w, h in BOXES]
YOLO = "".join(f"{k} {' '.join(f'{value:.6f}' for value in row)}\n" for k, row in enumerate(_YOLO)).encode()
LABELS = image_bytes(Image.fromarray((MASKS[0] * 1 + MASKS[1] * 2).astype(np.uint8)))


VIA = {
    "_via_settings": {},
    "_via_attributes": {},
    "_via_img_metadata": {
        f"{IMAGE}-1": {
            "filename": IMAGE,
            "size": -1,
            "file_attributes": {},
            "regions": [
                {
                    "shape_attributes": dict(
                        zip(("name", "x", "y", "width", "height"), ("rect", *BOXES[0]), strict=True)
                    ),
                    "region_attributes": {},
                },
                {
                    "shape_attributes": {
                        "name": "polygon",
                        "all_points_x": POLYGONS[1][::2],
                        "all_points_y": POLYGONS[1][1::2],
                    },
                    "region_attributes": {"kind": "b"},
                },
            ],
        }
    },
}
_SIDES = {"original_width": WIDTH, "original_height": HEIGHT}
_PERCENT = [
    dict(
        zip(
            ("x", "y", "width", "height"),
            (100 * x / WIDTH, 100 * y / HEIGHT, 100 * w / WIDTH, 100 * h / HEIGHT),
            strict=True,
        )
    )
    for x, y, w, h in BOXES
]
_RESULTS = [
    {"id": f"r{k}", "type": "rectanglelabels", **_SIDES, "value": {**value, "rotation": 0, "rectanglelabels": ["a"]}}
    for k, value in enumerate(_PERCENT)
]
_RESULTS += [
    {"id": "r0", "type": "choices", "from_name": "attribute colour", **_SIDES, "value": {"choices": ["red"]}},
    {"id": "r1", "type": "textarea", "from_name": "attribute note", **_SIDES, "value": {"text": ["bent"]}},
]
STUDIO = [
    {"id": 5, "data": {"image": f"/data/upload/1/0a1b2c3d-{IMAGE}"}, "annotations": [{"id": 9, "result": _RESULTS}]}
]
CVAT = (
    f'<?xml version="1.0" encoding="utf-8"?>\n<annotations><version>1.1</version>\n'
    f'<image id="0" name="{IMAGE}" width="{WIDTH}" height="{HEIGHT}">\n'
    '<box label="a" xtl="4.00" ytl="6.00" xbr="24.00" ybr="16.00">'
    '<attribute name="caption">a kite</attribute><attribute name="colour">red</attribute></box>\n'
    '<polygon label="b" points="30.00,2.00;42.00,2.00;42.00,26.00;30.00,26.00"/>\n</image></annotations>\n'
).encode()
_OBJECTS = "".join(
    f"<object><name>a</name><bndbox><xmin>{x + 1}</xmin><ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax>"
    "</bndbox></object>\n"
    for x, y, w, h in BOXES
)
VOC = (
    f"<annotation><filename>{IMAGE}</filename><source><database>The VOC2012 Database</database></source>\n"
    f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>\n{_OBJECTS}</annotation>\n"
).encode()
LABELME_XML = (
    f"<annotation><filename>{IMAGE}</filename><imagesize><nrows>{HEIGHT}</nrows><ncols>{WIDTH}</ncols></imagesize>\n"
    + "".join(
        "<object><name>a</name><deleted>0</deleted><polygon>"
        + "".join(f"<pt><x>{x}</x><y>{y}</y></pt>" for x, y in zip(points[::2], points[1::2], strict=True))
        + "</polygon></object>\n"
        for points in POLYGONS
    )
    + "</annotation>\n"
).encode()
DOTA = ("gsd:0.1\n" + "".join(f"{' '.join(map(str, points))} ship 0\n" for points in POLYGONS)).encode()
MIN = [
    {"id": 5, "image": IMAGE, "annotator": 1, "annotation_id": 9, "label": [{**_SIDES, **value} for value in _PERCENT]}
]

_VALUES = {"caption": "a cat", "colour": "red"}
_DETECTED = [{"mask": mask, "bbox": Region(0, mask).bbox, "values": _VALUES, "score": 0.5} for mask in MASKS]
FIFTYONE = {"samples": [fiftyone_sample(ImageFacts(IMAGE, WIDTH, HEIGHT), _DETECTED)]}


# name of the file, a good one, and the strategy for others. A new format is one line.
FORMATS: dict[str, tuple[str, bytes, Callable[[], st.SearchStrategy[bytes]]]] = {
    "coco": ("coco.json", json.dumps(COCO).encode(), lambda: json_bytes(COCO)),
    "list": ("list.json", json.dumps(LIST).encode(), lambda: json_bytes(LIST)),
    "regions": ("regions.json", json.dumps({"regions": LIST}).encode(), lambda: json_bytes({"regions": LIST})),
    "labelme": ("photo.json", json.dumps(LABELME).encode(), lambda: json_bytes(LABELME)),
    "yolo": ("photo.txt", YOLO, lambda: changed_text(YOLO)),
    "via": ("via.json", json.dumps(VIA).encode(), lambda: json_bytes(VIA)),
    "label studio": ("studio.json", json.dumps(STUDIO).encode(), lambda: json_bytes(STUDIO)),
    "json-min": ("min.json", json.dumps(MIN).encode(), lambda: json_bytes(MIN)),
    "cvat": ("cvat.xml", CVAT, lambda: changed_text(CVAT)),
    "voc": ("voc.xml", VOC, lambda: changed_text(VOC)),
    "labelme-xml": ("labelme.xml", LABELME_XML, lambda: changed_text(LABELME_XML)),
    "dota": ("dota.txt", DOTA, lambda: changed_text(DOTA)),
    "fiftyone": ("samples.json", json.dumps(FIFTYONE).encode(), lambda: json_bytes(FIFTYONE)),
    "labels": ("photo_labels.png", LABELS, lambda: damaged(LABELS)),
}


def images() -> dict[str, bytes]:
    """Good images in many modes and file formats."""
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 4), np.uint8)
    base = Image.fromarray(noise, "RGBA")
    found = {}
    for form, modes in {
        "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
        "JPEG": ("L", "RGB", "CMYK"),
        "WEBP": ("RGB", "RGBA"),
        "TIFF": ("1", "L", "P", "RGB", "RGBA", "CMYK", "F", "I;16", "LAB"),
        **{"GIF": ("P",), "BMP": ("1", "L", "RGB"), "PPM": ("L", "RGB"), "TGA": ("RGBA",), "ICO": ("RGBA",)},
        **{
            "PCX": ("RGB",),
            "SGI": ("RGB",),
            "DDS": ("RGBA",),
            "JPEG2000": ("RGB",),
            "AVIF": ("RGB",),
            "QOI": ("RGB",),
        },
        **{"IM": ("RGB",), "MSP": ("1",), "SPIDER": ("F",), "XBM": ("1",), "BLP": ("P",), "ICNS": ("RGBA",)},
    }.items():
        for mode in modes:
            try:
                image = Image.fromarray(noise[..., 0].astype(np.uint16)) if mode == "I;16" else _as_mode(base, mode)
                found[f"{form} {mode}"] = image_bytes(image, form)
            except (KeyError, OSError, ValueError):  # this build of Pillow cannot write it
                continue
    found["JPEG turned"] = image_bytes(base.convert("RGB"), "JPEG", exif=_turned())
    found["PNG large"] = image_bytes(Image.new("1", (6000, 6000)))
    return found


def _as_mode(image: Image.Image, mode: str) -> Image.Image:
    if mode == "LAB":
        return Image.merge("LAB", image.split()[:3])
    return image.convert("L").convert(mode) if mode in ("F", "LA") else image.convert("RGB").convert(mode)


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif
