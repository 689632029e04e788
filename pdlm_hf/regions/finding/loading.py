"""Load the models that find regions, and say what is wanted where one is missing."""

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ...errors_pdlm import CheckpointError
from ..sam import Segmenter
from .detector import Detector
from .finder import RegionFinder
from .words import WordSegmenter

SEGMENTER, WORD_SEGMENTER = "facebook/sam2.1-hiera-large", "facebook/sam3"  # the defaults, ids on the hub
STAND_IN = "shapes"

# Segmenters that are no checkpoints: module and class. By name, since they stand above this package.
_BUILT_IN = {STAND_IN: ("pdlm_hf.shapes.segmenter", "ShapesSegmenter")}
# What is downloaded, in GB; facebook/sam3 also asks to accept its licence.
_SIZES = {
    "facebook/sam2.1-hiera-tiny": 0.16,
    "facebook/sam2.1-hiera-small": 0.18,
    "facebook/sam2.1-hiera-base-plus": 0.32,
    SEGMENTER: 0.9,
    WORD_SEGMENTER: 3.4,
    "facebook/sam-vit-base": 0.38,
    "facebook/sam-vit-large": 1.3,
    "facebook/sam-vit-huge": 2.6,
    "facebook/detr-resnet-50": 0.17,
    "google/owlv2-base-patch16-ensemble": 0.62,
    "IDEA-Research/grounding-dino-tiny": 0.69,
    "IDEA-Research/grounding-dino-base": 0.93,
}


def load_finder(
    names: Sequence[str] | None = None,
    segmenter: Any = None,
    detector: Any = None,
    settings: Any = None,
    device: str | None = None,
) -> RegionFinder:
    """Load what finds regions.

    Args:
        names (`list[str]`, *optional*): words for what to find; default: everything.
        segmenter (*optional*): folder or hub id of a SAM; "shapes", the stand-in that knows drawn shapes; or an
            object, see [`Proposer`]. Default: SAM 2.1, for words SAM 3; beside a detector none.
        detector (*optional*): folder or hub id of a detector, or an object. Its boxes are regions; with a segmenter
            they become masks.
        settings (*optional*): see [`SelectionSettings`].
        device (`str`, *optional*): of these models; default: the GPU if there is one.

    Raises:
        CheckpointError: a model is missing or of another kind; the message says which, and what works without.
        SettingError: see [`RegionFinder`].
    """
    if detector is None:
        default = SEGMENTER if names is None else WORD_SEGMENTER
        chosen = default if segmenter is None else segmenter
        return RegionFinder(load_segmenter(chosen, device, words=names is not None), names, settings)
    refiner = None if segmenter is None else load_segmenter(segmenter, device)
    return RegionFinder(load_detector(detector, device), names, settings, refiner)


def load_segmenter(segmenter: Any, device: str | None = None, words: bool = False) -> Any:
    """Load a segmenter.

    Args:
        segmenter: see [`load_finder`].
        device (`str`, *optional*): default: the GPU if there is one.
        words (`bool`): it has to mask what words name.

    Raises:
        CheckpointError: see [`load_finder`].
    """
    if not isinstance(segmenter, (str, Path)):
        return segmenter
    path = str(segmenter)
    if path in _BUILT_IN:
        module, name = _BUILT_IN[path]
        return getattr(import_module(module), name)()
    kind = _load(path, "segmenter", _model_type)
    reader = WordSegmenter if words and kind in ("sam3", "sam3_video") else Segmenter
    if words and reader is Segmenter:
        raise CheckpointError(
            f"{path}: a {kind} takes no words; for words: --segmenter {WORD_SEGMENTER}, or a detector by words, for "
            "example --detector google/owlv2-base-patch16-ensemble."
        )
    return _load(path, "segmenter", reader.from_pretrained, device)


def load_detector(detector: Any, device: str | None = None) -> Any:
    """Load a detector, as [`load_segmenter`] does a segmenter.

    Raises:
        CheckpointError: see [`load_finder`].
    """
    if not isinstance(detector, (str, Path)):
        return detector
    return _load(str(detector), "detector", Detector.from_pretrained, device)


def _model_type(path: str) -> str:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(path).model_type


def _load(path: str, what: str, read: Callable, *args: Any) -> Any:
    """Load by `read`. Raises: CheckpointError, with what was wanted, from where, how large, and what works without."""
    as_folder = path.startswith((".", "~", "/")) or path.count("/") > 1 or not path or Path(path).is_file()
    if as_folder and not Path(path or "-").is_dir():
        raise CheckpointError(f"{path or repr(path)}: there is no such folder. A {what} is a folder or a hub id.")
    try:
        return read(path, *args)
    except CheckpointError:
        raise
    except (OSError, ImportError, RuntimeError, LookupError, TypeError, ValueError) as error:
        if type(error).__name__ == "OutOfMemoryError":
            raise
        reason = " ".join(str(error).split()).split(". ")[0] or type(error).__name__
        place = "this folder" if Path(path).is_dir() else "the hub's cache, else downloaded from the Hugging Face hub"
        size = f", about {_SIZES[path]} GB" if path in _SIZES else ""
        gated = "; accept its licence there and log in (hf auth login)" if path == WORD_SEGMENTER else ""
        raise CheckpointError(
            f"{path}: the {what} cannot be loaded ({reason:.200}). It is wanted from {place}{size}{gated}. Without "
            "it: your own regions (--mask, --box, --regions; in Python `caption`), another model (--segmenter or "
            "--detector FOLDER), or for drawn shapes --segmenter shapes."
        ) from None
