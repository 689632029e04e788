"""Masks by SAM: of the object at a click, of the objects in boxes, or of everything, at a grid of points."""

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from ..errors_pdlm import CheckpointError, SettingError
from .finding.selection import FoundRegion, SelectionSettings

# As in SAM 2's processor. That one needs torchvision, which many installations lack, and does little more than this.
_MEAN, _STD = np.array([(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)], dtype=np.float32)
_OFFSET = 1.0  # of the logits of a mask, up and down, for its stability: SAM's own
_PIXELS = 2**26  # of masks that are enlarged together

Enlarge = Callable[[torch.Tensor], torch.Tensor]


class Segmenter:
    """A SAM model of transformers.

    Args:
        model: a `transformers.Sam2Model`, or another SAM with its processor; put into evaluation mode.
        processor (*optional*): the processor of a model other than SAM 2.

    Attributes:
        points_per_side (`int`): [`propose`] asks for the objects at so many points in a row, and in a column. More
            find smaller objects, and take as much longer as there are more points.
        points_per_batch (`int`): points in a forward pass of the mask decoder; fewer take less memory.
    """

    min_score = 0.8  # SAM's own estimate of its IoU
    points_per_side = 32
    points_per_batch = 64

    def __init__(self, model: Any, processor: Any = None):
        self.model, self.processor = model.eval(), processor
        self._lock = threading.Lock()
        self._seen: tuple[Image.Image, dict[str, Any]] | None = None

    @classmethod
    def from_pretrained(cls, path: str, device: str | None = None) -> "Segmenter":
        """Load a model.

        Args:
            path (`str`): folder or hub id of a SAM of any version, for example `facebook/sam2.1-hiera-small`.
            device (`str`, *optional*): default: the GPU if there is one.

        Raises:
            CheckpointError: the checkpoint cannot be loaded, or is not a SAM model.
        """
        from transformers import AutoConfig, AutoModelForMaskGeneration, AutoProcessor, Sam2Model

        processor = None
        try:
            if AutoConfig.from_pretrained(path).model_type in ("sam2", "sam2_video"):
                model = Sam2Model.from_pretrained(path)
            else:
                model = AutoModelForMaskGeneration.from_pretrained(path)
                processor = AutoProcessor.from_pretrained(path)
        except (OSError, ImportError, RuntimeError, LookupError, TypeError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(
                f"{path}: cannot be loaded as a SAM model, for example facebook/sam2.1-hiera-small ({reason})."
            ) from None
        # transformers' `to` is typed without its `self`
        return cls(model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), processor)  # type: ignore[arg-type]

    def propose(
        self, image: Image.Image, names: Sequence[str] | None, settings: SelectionSettings
    ) -> list[FoundRegion]:
        """Propose the masks of all objects, with their parts: three masks at each point of a grid.

        Args:
            image (`PIL.Image.Image`): RGB.
            names: None, since SAM knows no words before version 3.
            settings ([`SelectionSettings`]): masks below `min_score` are not even enlarged to the image, and those
                below `min_stability` not kept.

        Raises:
            SettingError: there are names.
        """
        if names is not None:
            raise SettingError(
                f"{type(self.model).__name__} finds everything and takes no words; for words: a SAM 3, for example "
                "facebook/sam3, or a detector by words, for example google/owlv2-base-patch16-ensemble."
            )
        side = self.points_per_side
        places = [(k + 0.5) / side for k in range(side)]
        points = [[[x * image.width, y * image.height]] for y in places for x in places]
        together = max(1, _PIXELS // (image.width * image.height))
        found: list[FoundRegion] = []
        with self._lock, torch.inference_mode():
            seen, prompts, enlarge = self._encode(image, input_points=points)
            for batch in prompts["input_points"].split(self.points_per_batch, 1):
                small, scores = self._decode(seen, input_points=batch)
                scores = scores.clamp(0, 1)  # an estimate of an IoU, that may lie outside
                kept = scores >= (settings.min_score or 0)
                for masks, sure in zip(small[kept].split(together), scores[kept].split(together), strict=True):
                    found += _stable_masks(enlarge(masks), sure, settings.min_stability)
        return found

    def mask(self, image: Image.Image, x: int, y: int) -> np.ndarray:
        """Find the mask of the object at a pixel: the best of SAM's proposals.

        Args:
            image (`PIL.Image.Image`): RGB.
            x, y (`int`): column and row of the pixel.

        Returns:
            bool, `(H, W)`.

        Raises:
            CheckpointError: SAM's mask is empty.
        """
        masks, scores = self._predict(image, input_points=[[[x + 0.5, y + 0.5]]])
        mask = masks[0, scores[0].argmax()]
        if not mask.any():
            raise CheckpointError("SAM finds nothing there; draw a box instead.")
        return mask

    def masks(self, image: Image.Image, boxes: list[list[float]]) -> np.ndarray:
        """Find the masks of the objects in boxes.

        Args:
            image (`PIL.Image.Image`): RGB.
            boxes: corners x0, y0, x1, y1 in pixels; x1 and y1 lie outside the box.

        Returns:
            bool, `(boxes, H, W)`, possibly empty masks.
        """
        return self._predict(image, input_boxes=boxes)[0][:, 0]

    @torch.inference_mode()
    def _predict(self, image: Image.Image, **prompts: list) -> tuple[np.ndarray, np.ndarray]:
        """Masks (prompts, proposals, H, W) and scores (prompts, proposals): several proposals for points, one for
        boxes."""
        with self._lock:
            seen, scaled, enlarge = self._encode(image, **prompts)
            small, scores = self._decode(seen, **scaled)
            masks = (enlarge(small.flatten(0, 1)) > 0).unflatten(0, scores.shape)
        return masks.cpu().numpy(), scores.cpu().numpy()

    def _encode(self, image: Image.Image, **prompts: list) -> tuple[dict[str, Any], dict[str, torch.Tensor], Enlarge]:
        """The embeddings of an image, the prompts in the pixels of the model, and what enlarges logits (N, h, w) to
        the image, (N, H, W)."""
        device, width, height = self.model.device, image.width, image.height
        if self.processor is None:
            rows, columns = self.model.config.vision_config.backbone_config.image_size
            scale = torch.tensor([columns / width, rows / height])
            scaled = {name: _scaled(prompt, scale).to(device) for name, prompt in prompts.items()}

            def enlarge(logits: torch.Tensor) -> torch.Tensor:
                size = height, width
                return functional.interpolate(logits[None].float(), size, mode="bilinear", align_corners=False)[0]

            return self._embeddings(image, lambda: _pixels(image, columns, rows)), scaled, enlarge

        inputs = self.processor(images=image, return_tensors="pt", **{name: [p] for name, p in prompts.items()})
        sizes = [inputs[name].cpu() for name in ("original_sizes", "reshaped_input_sizes") if name in inputs]

        def enlarge_by_processor(logits: torch.Tensor) -> torch.Tensor:
            return self.processor.post_process_masks(logits[None, :, None].cpu(), *sizes, binarize=False)[0][:, 0]

        scaled = {name: inputs[name].to(device) for name in prompts}
        return self._embeddings(image, lambda: inputs["pixel_values"]), scaled, enlarge_by_processor

    def _decode(self, seen: dict[str, Any], **prompts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (prompts, proposals, h, w) as small as the model makes them, and scores (prompts, proposals)."""
        out = self.model(**seen, **prompts, multimask_output="input_points" in prompts)
        return out.pred_masks[0], out.iou_scores[0].float()

    def _embeddings(self, image: Image.Image, pixels: Callable[[], torch.Tensor]) -> dict[str, Any]:
        """The embeddings of an image; those of the last image are kept for the next click on it."""
        if self._seen is None or self._seen[0] is not image:
            found = self.model.get_image_embeddings(pixels().to(self.model.device, self.model.dtype))
            names = ("image_embeddings", "intermediate_embeddings")  # the second of SAM-HQ, whose result is a tuple
            seen = dict(zip(names, found, strict=True)) if isinstance(found, tuple) else {names[0]: found}
            self._seen = image, seen
        return self._seen[1]


def _stable_masks(logits: torch.Tensor, scores: torch.Tensor, least: float) -> Iterator[FoundRegion]:
    """The masks (N, H, W) that change little when the threshold of their logits does."""
    inside, outside = ((logits > offset).flatten(1).sum(1) for offset in (_OFFSET, -_OFFSET))
    stabilities = (inside / outside.clamp(min=1)).tolist()
    for mask, score, stability in zip(logits > 0, scores.tolist(), stabilities, strict=True):
        if stability >= least:
            yield FoundRegion.of_mask(mask.cpu().numpy(), score, stability)


def _pixels(image: Image.Image, width: int, height: int) -> torch.Tensor:
    """The image as SAM 2 sees it, (1, 3, height, width)."""
    scaled = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32) / 255
    return torch.from_numpy((scaled - _MEAN) / _STD).permute(2, 0, 1)[None]


def _scaled(prompt: list, scale: torch.Tensor) -> torch.Tensor:
    """Points (1, prompts, points, 2) or boxes (1, prompts, 4) in the pixels of the model."""
    prompts = torch.tensor(prompt)
    return (prompts.unflatten(-1, (-1, 2)) * scale).view_as(prompts)[None]
