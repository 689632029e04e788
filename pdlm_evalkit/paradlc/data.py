"""Read and check a benchmark folder: annotations.json, qa.json, class_names.json and images."""

import hashlib
import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pdlm_hf.errors_pdlm import DataError, ImageError, RegionError
from pdlm_hf.regions.coco import CocoIndex, is_coco
from pdlm_hf.regions.files import load_json

BENCHMARKS = ("paradlc", "dlc")
TYPES = ("positive", "negative")
MAX_CHOICES = 5  # the letters A to E
MAX_SCORE = 1e6  # of a choice, either sign; the benchmarks have -1 to 1
MAX_SIDE = 2**20  # pixels of an image


@dataclass(frozen=True)
class Question:
    """A multiple-choice question about a caption.

    Args:
        text (`str`): the question.
        choices (`tuple[str, ...]`): two to five choices.
        scores (`tuple[float, ...]`): the score of each choice.
        type (`str`): "positive" (does the caption state a detail correctly?) or "negative" (does it state something
            wrong?).
    """

    text: str
    choices: tuple[str, ...]
    scores: tuple[float, ...]
    type: str


@dataclass(frozen=True)
class Mask:
    """A region with its questions.

    Args:
        id (`str`): the key in all files: "<image_id>_<index>" in ParaDLC-Bench, the id of the annotation in DLC-Bench.
        class_name (`str`): the class of the object in the region.
        questions (`tuple[Question, ...]`): the questions in the order of qa.json.
        region (`dict`): `{"id", "segmentation"}` in COCO's form; the segmentation is an RLE (or polygons).
    """

    id: str
    class_name: str
    questions: tuple[Question, ...]
    region: dict[str, Any] = field(repr=False)


@dataclass(frozen=True)
class BenchmarkImage:
    """An image with its masks, in the order of qa.json.

    Args:
        id (`str`): the image_id.
        path (`Path`): the image file.
        width, height (`int`): annotated size in pixels.
        masks (`tuple[Mask, ...]`): the masks that have questions.
    """

    id: str
    path: Path
    width: int
    height: int
    masks: tuple[Mask, ...]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark.

    Args:
        name (`str`): "paradlc" or "dlc".
        images (`tuple[BenchmarkImage, ...]`): the images with questions, in the order of qa.json.
        order (`tuple[str, ...]`): mask ids in the order of qa.json.
        fingerprint (`str`): fingerprint of annotations, questions and class names.
    """

    name: str
    images: tuple[BenchmarkImage, ...]
    order: tuple[str, ...]
    fingerprint: str

    @property
    def masks(self) -> dict[str, Mask]:
        """Masks by id, in the order of qa.json."""
        found = {mask.id: mask for image in self.images for mask in image.masks}
        return {mask_id: found[mask_id] for mask_id in self.order}


def load_benchmark(folder: str | Path, images: str | Path | None = None, name: str | None = None) -> Benchmark:
    """Read a benchmark folder.

    Args:
        folder: folder with annotations.json, qa.json and class_names.json.
        images (*optional*): folder of the images; default: `images` in the folder. [`check_images`] checks it.
        name (`str`, *optional*): "paradlc" or "dlc"; default: the form of annotations.json decides.

    Raises:
        DataError: a file is missing, cut short or of another form, a question has no annotation, or an annotation
            occurs twice.
    """
    folder = Path(folder)
    annotations, qa, names = (load_json(folder / f"{file}.json") for file in ("annotations", "qa", "class_names"))
    questions = parse_questions(qa, folder / "qa.json")
    if not isinstance(names, dict):
        raise DataError(f"{folder / 'class_names.json'}: expected an object {{mask_id: class name}}.")
    path = folder / "annotations.json"
    found = form_of(annotations, path)
    if name is not None and name != found:
        raise DataError(f"{path}: is in the form of {found}, not of {name}.")
    try:
        entries: dict[str, tuple[dict, Any]] = {}
        masks = _paradlc_masks(annotations) if found == "paradlc" else _dlc_masks(annotations, path)
        for mask_id, image, segmentation in masks:
            if mask_id in entries:
                raise DataError(f"{path}: {mask_id} is annotated twice.")
            entries[mask_id] = image, segmentation
        fingerprint = hashlib.sha256(json.dumps([annotations, qa, names]).encode()).hexdigest()[:16]
    except DataError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise DataError(f"{path}: not in the form of {found} ({type(error).__name__}: {error}).") from None
    images_by_id: dict[str, dict] = {}
    for mask_id, asked in questions.items():
        if mask_id not in entries:
            raise DataError(f"{folder / 'qa.json'}: {mask_id} has questions, but no annotation in {path.name}.")
        if not isinstance(names.get(mask_id), str) or not names[mask_id].strip():
            raise DataError(f"{folder / 'class_names.json'}: there is no class name for {mask_id}.")
        image, segmentation = entries[mask_id]
        region = {"id": mask_id, "segmentation": segmentation}
        mask = Mask(mask_id, names[mask_id], asked, region)
        images_by_id.setdefault(image["id"], {**image, "masks": []})["masks"].append(mask)
    root = Path(images) if images is not None else folder / "images"
    return Benchmark(
        found,
        tuple(
            BenchmarkImage(p["id"], root / p["file_name"], p["width"], p["height"], tuple(p["masks"]))
            for p in images_by_id.values()
        ),
        tuple(questions),
        fingerprint,
    )


def load_questions(folder: str | Path) -> dict[str, tuple[Question, ...]]:
    """Read the questions of a benchmark folder, which is all that scoring needs.

    Returns:
        questions by mask id.

    Raises:
        DataError: qa.json is missing, cut short or of another form.
    """
    path = Path(folder) / "qa.json"
    return parse_questions(load_json(path), path)


def form_of(annotations: Any, path: Path) -> str:
    """Find the benchmark by the form of annotations.json. Raises: DataError: it has neither form."""
    if isinstance(annotations, list):
        return "paradlc"
    if is_coco(annotations):
        return "dlc"
    raise DataError(
        f"{path}: expected a list of images (ParaDLC-Bench), or a COCO file with images and annotations (DLC-Bench)."
    )


def parse_questions(qa: Any, path: Path) -> dict[str, tuple[Question, ...]]:
    """Read the questions of every mask.

    Raises:
        DataError: a question has another form; the message names the mask and the number of the question (from 1).
    """
    if not isinstance(qa, dict) or not qa:
        raise DataError(f"{path}: expected an object {{mask_id: [questions]}}.")
    questions = {}
    for mask_id, entries in qa.items():
        if not isinstance(entries, list) or not entries:
            raise DataError(f"{path}: {mask_id}: expected a list of questions.")
        questions[mask_id] = tuple(
            _question(entry, f"{path}: {mask_id}, question {number}") for number, entry in enumerate(entries, 1)
        )
    return questions


def _question(entry: Any, where: str) -> Question:
    if not isinstance(entry, dict) or not isinstance(entry.get("question"), str):
        raise DataError(f"{where}: expected `question`, `choices` and `type`.")
    if entry.get("type") not in TYPES:
        raise DataError(f"{where}: `type` must be one of {', '.join(TYPES)}, got {entry.get('type')!r}.")
    choices = entry.get("choices")
    if not isinstance(choices, list) or not 2 <= len(choices) <= MAX_CHOICES:
        raise DataError(f"{where}: `choices` must be a list of 2 to {MAX_CHOICES} pairs [text, score].")
    for choice in choices:
        pair = choice if isinstance(choice, list) and len(choice) == 2 else (None, None)
        number = isinstance(pair[1], (int, float)) and not isinstance(pair[1], bool) and abs(pair[1]) < MAX_SCORE
        if not isinstance(pair[0], str) or not pair[0].strip() or not number:
            raise DataError(f"{where}: a choice must be a pair [text, score], got {_shown(choice)}.")
    texts, scores = zip(*choices, strict=True)
    return Question(entry["question"], texts, scores, entry["type"])


def _paradlc_masks(annotations: list) -> Iterator[tuple[str, dict, dict]]:
    """Mask id, image and RLE of every annotation."""
    for image in annotations:
        entry = _image(image, image["image_id"])
        for annotation in image["annotations"]:
            yield f"{entry['id']}_{annotation['index']}", entry, annotation["mask_rle"]


def _dlc_masks(annotations: dict, path: Path) -> Iterator[tuple[str, dict, dict]]:
    index = CocoIndex(annotations, path, ("id",))
    index.check()
    for image_id, found in index.annotations.items():
        entry = _image(index.images[image_id], image_id)
        for annotation in found:
            yield str(annotation["id"]), entry, annotation["segmentation"]


def _image(image: dict, identifier: Any) -> dict[str, Any]:
    for side in ("width", "height"):
        value = image[side]
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and 1 <= value <= MAX_SIDE
        if not number or value != math.floor(value):
            raise ValueError(f"image {identifier}: `{side}` must be a number of pixels, got {_shown(value)}")
    # without folders: a benchmark file must not name files outside its folder
    name = Path(image["file_name"]).name
    if not name or "\0" in name:
        raise ValueError(f"image {identifier}: `file_name` must be the name of a file, got {_shown(name)}")
    return {"id": str(identifier), "file_name": name, "width": int(image["width"]), "height": int(image["height"])}


def _shown(value: Any) -> str:
    """The start of a value, for messages; lists within lists need not be readable."""
    try:
        return f"{value!r:.60}"
    except RecursionError:
        return "a list nested too deeply"


def open_image(entry: BenchmarkImage) -> Any:
    """The image as RGB (`PIL.Image`), without EXIF orientation: the masks are drawn on the stored pixels.

    Raises:
        ImageError: the file does not exist, is damaged, or has another size than annotated.
    """
    from pdlm_hf.image_processing_pdlm import to_rgb
    from pdlm_hf.regions import images

    image = to_rgb(images.open_image(entry.path, upright=False), str(entry.path))
    if image.size != (entry.width, entry.height):
        raise ImageError(
            f"{entry.path}: has {image.width} x {image.height} pixels, annotations.json says "
            f"{entry.width} x {entry.height}."
        )
    return image


def decode_masks(entry: BenchmarkImage, masks: Sequence[Mask] | None = None) -> list[Any]:
    """Masks of an image as bool arrays (H, W).

    Args:
        entry (`BenchmarkImage`): the image.
        masks (*optional*): some of its masks; default: all of them, in its order.

    Raises:
        RegionError: a mask is broken or empty.
    """
    from pdlm_hf.regions.region import parse_region

    found = []
    for mask in entry.masks if masks is None else masks:
        try:
            found.append(parse_region(mask.region, entry.width, entry.height).mask)
        except RegionError as error:
            raise RegionError(f"annotations.json: {error}") from None
    return found


def area_shares(benchmark: Benchmark) -> dict[str, float]:
    """The share of its image that each mask covers, by mask id; the masks are not decoded for this.

    Raises:
        RegionError: a mask is broken or empty.
    """
    from pdlm_hf.regions.region import region_areas

    pairs = [(mask, image) for image in benchmark.images for mask in image.masks]
    areas = region_areas([mask.region for mask, _ in pairs], [(image.width, image.height) for _, image in pairs])
    shares: dict[str, float] = {}
    for (mask, image), area in zip(pairs, areas, strict=True):
        if isinstance(area, RegionError):
            raise RegionError(f"annotations.json: {area}")
        if not area:
            raise RegionError(f"annotations.json: region {mask.id}: the mask is empty.")
        shares[mask.id] = area / (image.width * image.height)
    return shares


def check_images(benchmark: Benchmark) -> None:
    """Open every image and read every mask, before anything expensive.

    Raises:
        ImageError: an image cannot be used, see [`open_image`].
        RegionError: a mask cannot be used, see [`area_shares`].
    """
    if missing := [image for image in benchmark.images if not os.path.isfile(image.path)]:
        raise ImageError(f"{missing[0].path}: no such file ({len(missing)} of {len(benchmark.images)} are missing).")
    for image in benchmark.images:
        open_image(image)
    area_shares(benchmark)


def read_captions(path: Path, masks: dict[str, Any] | tuple[str, ...], allow_missing: bool = False) -> dict[str, str]:
    """Read and check a file `{mask_id: caption}`.

    Args:
        path (`Path`): the file.
        masks: the mask ids of the benchmark.
        allow_missing (`bool`): whether masks may have no caption.

    Raises:
        DataError: the file has another form, an unknown or missing id, or a caption that is not a string.
    """
    captions = load_json(path)
    if not isinstance(captions, dict):
        raise DataError(f"{path}: expected an object {{mask_id: caption}}.")
    if unknown := [key for key in captions if key not in masks]:
        raise DataError(f"{path}: {len(unknown)} ids are not in the benchmark: {', '.join(unknown[:5])}.")
    if wrong := [key for key, caption in captions.items() if not isinstance(caption, str)]:
        raise DataError(f"{path}: {len(wrong)} captions are not strings: {', '.join(wrong[:5])}.")
    if not allow_missing and (missing := [key for key in masks if key not in captions]):
        raise DataError(
            f"{path}: {len(missing)} masks have no caption: {', '.join(missing[:5])}; --allow-missing scores them 0."
        )
    return {key: captions[key] for key in masks if key in captions}
