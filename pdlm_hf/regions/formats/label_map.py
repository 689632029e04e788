"""Label maps: images in which every region has its own value; COCO's panoptic images; folders of masks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...errors_pdlm import NoRegionsError, RegionError
from ..images import open_image
from ..rle import encode
from .facts import ImageFacts, note

VOID = 255  # the outlines and unlabelled parts of PASCAL VOC's palette images
MAX_LABELS = 1000
MAX_PIXELS = 2**30  # of the masks of all labels together
_FEW = 8  # so many labels may be small
_TINY = 16  # pixels, of the soft edges of a drawing
_IMAGES = {".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".jpg", ".jpeg", ".pgm", ".ppm"}
_SYSTEM = {"thumbs.db", "desktop.ini", "__macosx"}


def from_label_map(source: Any, every: bool = False, image: ImageFacts | None = None) -> list[dict[str, Any]]:
    """Convert a label map: an image in which every region has its own value, and 0 is no region. The ids are the
    values; of colours they are R + 256 G + 65536 B, as in COCO's panoptic images. In palette images 255 is no region
    either (the void outlines of PASCAL VOC), unless there is no other.

    Args:
        source: path, PIL image, or array of integers `(H, W)` or `(H, W, 3)`.
        every (`bool`): read every value but 0: also 255 of a palette image, and what looks like a photograph.
        image (`ImageFacts`, *optional*): the image, whose size is compared before the map is decoded.

    Returns:
        regions with "id" and "segmentation".

    Raises:
        ImageError: the file cannot be opened.
        RegionError: the map has transparency or fractions, another size, or no region; it has more labels than can
            be held as masks, or labels as a photograph has them.
    """
    name = str(source) if isinstance(source, (str, Path)) else "label map"
    check = None if image is None else _size_check(name, image)
    opened = open_image(source, check=check) if isinstance(source, (str, Path)) else source
    labels = _labels(opened, name)
    values, counts = np.unique(labels, return_counts=True)
    values, counts = values[values != 0], counts[values != 0]
    is_palette = isinstance(opened, Image.Image) and opened.mode in ("P", "PA")
    if is_palette and not every and VOID in values and len(values) > 1:
        note("void", f"{name}: the value 255 of a palette image is no region (void); --format label-map keeps it")
        values, counts = values[values != VOID], counts[values != VOID]
    if not len(values):
        raise NoRegionsError(f"{name}: holds no regions; every pixel is 0.")
    if len(values) > MAX_LABELS or len(values) * labels.size > MAX_PIXELS:
        raise RegionError(
            f"{name}: has {len(values)} values in {labels.shape[1]} x {labels.shape[0]} pixels, more than can be "
            f"masks (at most {min(MAX_LABELS, MAX_PIXELS // labels.size)}). A photograph is not a label map."
        )
    if not every and (reason := _unlike_labels(labels, counts)):
        raise RegionError(
            f"{name}: looks like a photograph or a drawing, not like a label map: {reason}. If each of its "
            f"{len(values)} values is a region: --format label-map"
        )
    return [{"id": int(value), "segmentation": encode(labels == value)} for value in values]


def _size_check(name: str, image: ImageFacts) -> Callable[[Image.Image], None]:
    """A check of the size before the file is decoded; an orientation of its own may swap its sides."""

    def check(opened: Image.Image) -> None:
        if opened.size != image.size and opened.getexif().get(0x0112, 1) < 5:
            image.check_size(name, *opened.size)

    return check


def _unlike_labels(labels: np.ndarray, counts: np.ndarray) -> str | None:
    """What speaks against a label map: labels of a few pixels, or neighbours that mostly differ."""
    tiny = int((counts < _TINY).sum())
    if len(counts) > _FEW and tiny * 2 > len(counts):
        return f"{tiny} of its {len(counts)} values have fewer than {_TINY} pixels"
    differ = (labels[:, 1:] != labels[:, :-1]).mean()
    if differ > 0.3:
        return f"{100 * differ:.0f} % of neighbouring pixels differ"
    return None


def from_panoptic(path: str | Path, segments: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Read the regions of one image of a COCO panoptic file.

    Args:
        path: the PNG file of the annotation, whose colours are the ids of the segments.
        segments (`list[dict]`): `segments_info` of the annotation.

    Returns:
        the segments with their RLE as "segmentation", without those that have no pixel.

    Raises:
        ImageError: the PNG file cannot be opened.
        RegionError: the PNG file has transparency, a segment has no id, or two have the same.
    """
    labels = _labels(open_image(path), str(path))
    ids = [segment.get("id") if isinstance(segment, dict) else None for segment in segments]
    if not all(isinstance(own, int) for own in ids):
        raise RegionError(f"{path}: each of `segments_info` must be an object with an `id`.")
    if len(set(ids)) < len(ids):
        twice = next(own for own in ids if ids.count(own) > 1)
        raise RegionError(f"{path}: two of `segments_info` have the id {twice}.")
    masks = ((segment, labels == segment["id"]) for segment in segments)
    return [{**segment, "segmentation": encode(mask)} for segment, mask in masks if mask.any()]


def _labels(source: Any, name: str) -> np.ndarray:
    """Labels (H, W) of an image or array; colours as R + 256 G + 65536 B."""
    labels = np.asarray(source)
    if labels.ndim == 3 and labels.shape[2] == 3 and labels.dtype.kind in "iu":
        red, green, blue = (labels[..., k].astype(np.uint32) for k in range(3))
        labels = red | green << 8 | blue << 16
    if labels.ndim != 2 or labels.dtype.kind not in "biu":
        raise RegionError(
            f"{name}: a label map has integers of shape (H, W) or colours (H, W, 3), got {labels.dtype} "
            f"{labels.shape}."
        )
    return labels


def mask_files(folder: Path) -> list[Path]:
    """The mask images of a folder, one for each region. Other files, SAM's `metadata.csv` and what systems leave, are
    passed over, and named once.

    Raises:
        RegionError: it is no folder, or has no mask images.
    """
    if not folder.is_dir():
        raise RegionError(f"{folder}: expected a folder of mask images; a single mask is given with --mask.")
    files = sorted(path for path in folder.iterdir() if path.is_file())
    masks = [path for path in files if path.suffix.lower() in _IMAGES and not is_hidden(path)]
    if others := [path.name for path in files if path not in masks]:
        shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
        note("no masks", f"{folder}: passed over what is no mask image: {shown}; likewise in other folders")
    if not masks:
        raise RegionError(f"{folder}: holds no mask images.")
    return masks


def is_hidden(path: Path) -> bool:
    """Whether a file or folder is a system's own: `.DS_Store`, `._mask.png`, `Thumbs.db`, `__MACOSX`."""
    return path.name.startswith(".") or path.name.lower() in _SYSTEM
