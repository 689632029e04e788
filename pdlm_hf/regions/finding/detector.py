"""Boxes by a detector: of fixed classes, or of words."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...errors_pdlm import SettingError
from .selection import FoundRegion, SelectionSettings

_TASKS = "object-detection", "zero-shot-object-detection"


class Detector:
    """A detector of transformers: lighter than a segmenter, and its regions are boxes.

    Args:
        pipe: a pipeline `object-detection` or `zero-shot-object-detection`.
    """

    def __init__(self, pipe: Any):
        self.pipe = pipe
        self.by_words = pipe.task == _TASKS[1]
        self.min_score = 0.1 if self.by_words else 0.5

    @classmethod
    def from_pretrained(cls, path: str, device: str | None = None) -> "Detector":
        """Load a model.

        Args:
            path (`str`): folder or hub id, for example `facebook/detr-resnet-50` of fixed classes, or
                `google/owlv2-base-patch16-ensemble` of words.
            device (`str`, *optional*): default: the GPU if there is one.

        Raises:
            OSError, ValueError, RuntimeError: as of transformers' `from_pretrained`.
        """
        from transformers import AutoConfig, pipeline
        from transformers.models.auto.modeling_auto import MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION_MAPPING_NAMES as WORDS

        task: Any = _TASKS[AutoConfig.from_pretrained(path).model_type in WORDS]
        return cls(pipeline(task, model=path, device=device or ("cuda" if torch.cuda.is_available() else "cpu")))

    @property
    def classes(self) -> list[str]:
        """The names it knows, of a detector of fixed classes."""
        return list(dict.fromkeys(self.pipe.model.config.id2label.values()))

    def propose(
        self, image: Image.Image, names: Sequence[str] | None, settings: SelectionSettings
    ) -> list[FoundRegion]:
        """Propose boxes, each with the name of its class or the word that found it.

        Args:
            image (`PIL.Image.Image`): RGB.
            names: words, which a detector of words needs; of one of fixed classes those to keep.
            settings ([`SelectionSettings`]): boxes below `min_score` are left out.

        Raises:
            SettingError: a detector of words got none, or one of fixed classes does not know a name.
        """
        known = {} if self.by_words else {name.lower(): name for name in self.classes}
        if self.by_words and names is None:
            raise SettingError("This detector finds what words name: pass some, for example --find dog.")
        if not self.by_words and (unknown := [name for name in names or () if name.lower() not in known]):
            raise SettingError(
                f"This detector does not know {unknown[0]!r}. Its classes: {', '.join(known.values()):.300}. One of "
                "words, for example google/owlv2-base-patch16-ensemble, takes any."
            )
        words = {"candidate_labels": list(names or ())} if self.by_words else {}
        boxes = self.pipe(
            image, threshold=self.min_score if settings.min_score is None else settings.min_score, **words
        )
        wanted = None if names is None else {name.lower(): name for name in names}
        return [
            FoundRegion.of_mask(_box_mask(found["box"], image), found["score"], name=name)
            for found in boxes
            if (name := found["label"] if wanted is None else wanted.get(found["label"].lower())) is not None
        ]


def _box_mask(box: dict[str, int], image: Image.Image) -> np.ndarray:
    """The box as a mask, clipped to the image."""
    mask = np.zeros((image.height, image.width), bool)
    mask[max(0, box["ymin"]) : max(0, box["ymax"]), max(0, box["xmin"]) : max(0, box["xmax"])] = True
    return mask
