"""Let annotation tools import the captions that `pdlm convert` has written, correct one, and export them.

Runs in the environment of the tools, `.venv-formats/bin/python tests/formats/correct.py FOLDER`, without this project.
FOLDER has `tasks.json` with `tasks.config.xml`, `cvat/images.xml` beside `cvat/images`, and `dataset`. Of each tool
it gets what was read, TOOL.npz (masks and captions by image and position), and what was exported, TOOL.json or .xml.
With attributes in place of captions, `correct.py FOLDER ATTRIBUTE VALUE` sets this value of each first region.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np

CORRECTED = "corrected by hand"


def label_studio(folder: Path, field: str, corrected: str) -> dict[str, np.ndarray]:
    """The interface validates tasks, predictions and the annotation that a person submits; the converter exports."""
    from label_studio_sdk.converter import Converter
    from label_studio_sdk.converter.brush import decode_rle
    from label_studio_sdk.label_interface import LabelInterface

    config = (folder / "tasks.config.xml").read_text()
    interface = LabelInterface(config)
    interface.validate()
    found, tasks = {}, json.loads((folder / "tasks.json").read_text())
    for number, task in enumerate(tasks, 1):
        (prediction,) = task.pop("predictions")
        assert interface.validate_task(task)
        assert interface.validate_prediction(prediction, return_errors=True) == []
        brushes = [one for one in prediction["result"] if one["type"] == "brushlabels"]
        texts = [one for one in prediction["result"] if one["from_name"] in (field, f"attribute {field}")]
        assert [one["id"] for one in brushes] == [one["id"] for one in texts]
        name = task["data"]["file_name"]
        for k, (brush, text) in enumerate(zip(brushes, texts, strict=True)):
            values = decode_rle(brush["value"]["rle"]).reshape(brush["original_height"], brush["original_width"], 4)
            found[f"{name} {k} mask"] = values[..., 3] > 0
            ((key, (value,)),) = text["value"].items()
            found[f"{name} {k} caption"] = np.array(value)
        texts[0]["value"] = {key: [corrected]}
        annotation = {"id": 100 + number, "completed_by": 1, "was_cancelled": False, "result": prediction["result"]}
        assert interface.validate_annotation(annotation)
        times = {"created_at": "2026-01-01T00:00:00Z", "updated_at": "2026-01-01T00:00:00Z"}
        task |= {"id": number, "annotations": [annotation | times | {"lead_time": 1.0}]} | times
    (folder / "submitted.json").write_text(json.dumps(tasks))
    converter = Converter(config, str(folder), download_resources=False)
    converter.convert(str(folder / "submitted.json"), str(folder / "exported"), "JSON", is_dir=False)
    shutil.copy(folder / "exported" / "result.json", folder / "label-studio.json")
    return found


def cvat(folder: Path, field: str, corrected: str) -> dict[str, np.ndarray]:
    """Datumaro, which CVAT's own formats are made with, reads CVAT's format and writes it."""
    import datumaro as dm

    found, items = {}, []
    data = dm.Dataset.import_from(str(folder / "cvat" / "images.xml"), "cvat")
    for item in data:
        name = os.path.relpath(item.media.path, folder / "cvat" / "images")
        for k, mask in enumerate(item.annotations):
            found[f"{name} {k} mask"] = mask.image.astype(bool)
            found[f"{name} {k} caption"] = np.array(mask.attributes[field])
        first = item.annotations[0]
        attributes = {**first.attributes, field: corrected}
        items.append(item.wrap(annotations=[first.wrap(attributes=attributes), *item.annotations[1:]]))
    corrected = dm.Dataset.from_iterable(items, categories=data.categories())
    corrected.export(str(folder / "datumaro"), "cvat", save_media=False)
    shutil.copy(next((folder / "datumaro").glob("*.xml")), folder / "cvat.xml")
    return found


def fiftyone(folder: Path, field: str, corrected: str) -> dict[str, np.ndarray]:
    """FiftyOne's importer gives samples, and its writer of collections exports them; neither needs the database."""
    os.environ |= {"FIFTYONE_DO_NOT_TRACK": "true", "HOME": str(folder)}
    import fiftyone.core.odm as odm
    from fiftyone.utils.data import LegacyFiftyOneDatasetImporter

    found = {}
    with LegacyFiftyOneDatasetImporter(str(folder / "dataset"), rel_dir=str(folder / "cvat" / "images")) as importer:
        samples = list(importer)
    for sample in samples:
        assert os.path.exists(sample.filepath)
        sides = np.array([sample.metadata.width, sample.metadata.height] * 2)
        for k, detection in enumerate(sample.regions.detections):
            x, y, w, h = np.round(detection.bounding_box * sides).astype(int)
            mask = np.zeros((sample.metadata.height, sample.metadata.width), bool)
            mask[y : y + h, x : x + w] = detection.mask
            found[f"{sample.file_name} {k} mask"] = mask
            found[f"{sample.file_name} {k} caption"] = np.array(detection[field])
        sample.regions.detections[0][field] = corrected
    documents = [sample.to_mongo_dict() for sample in samples]
    odm.export_collection(documents, str(folder / "fiftyone.json"), key="samples", progress=False)
    return found


if __name__ == "__main__":
    at, *given = sys.argv[1:]
    for tool in (label_studio, cvat, fiftyone):
        np.savez(Path(at) / f"{tool.__name__}.npz", **tool(Path(at), *(given or ("caption", CORRECTED))))
