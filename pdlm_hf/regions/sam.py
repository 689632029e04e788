"""Masks by SAM: of the object at a click, or of the objects in boxes."""

import threading
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from ..errors_pdlm import CheckpointError

# As in SAM 2's processor. That one needs torchvision, which many installations lack, and does little more than this.
_MEAN, _STD = np.array([(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)], dtype=np.float32)


class Segmenter:
    """A SAM model of transformers.

    Args:
        model: a `transformers.Sam2Model`, or another SAM with its processor; put into evaluation mode.
        processor (*optional*): the processor of a model other than SAM 2.
    """

    def __init__(self, model: Any, processor: Any = None):
        self.model, self.processor = model.eval(), processor
        self._lock = threading.Lock()
        self._seen: tuple[Image.Image, list[torch.Tensor]] | None = None

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
        several = "input_points" in prompts
        with self._lock:
            if self.processor is not None:
                inputs = self.processor(
                    images=image, return_tensors="pt", **{name: [p] for name, p in prompts.items()}
                )
                out = self.model(**inputs.to(self.model.device), multimask_output=several)
                sizes = [inputs[name].cpu() for name in ("original_sizes", "reshaped_input_sizes") if name in inputs]
                masks = self.processor.post_process_masks(out.pred_masks.cpu(), *sizes)[0] > 0
            else:
                height, width = self.model.config.vision_config.backbone_config.image_size
                scale = torch.tensor([width / image.width, height / image.height])
                scaled = {name: _scaled(prompt, scale).to(self.model.device) for name, prompt in prompts.items()}
                embeddings = self._embeddings(image, width, height)
                out = self.model(image_embeddings=embeddings, multimask_output=several, **scaled)
                size = image.height, image.width
                logits = functional.interpolate(out.pred_masks[0].float(), size, mode="bilinear", align_corners=False)
                masks = logits > 0
        return masks.cpu().numpy(), out.iou_scores[0].float().cpu().numpy()

    def _embeddings(self, image: Image.Image, width: int, height: int) -> list[torch.Tensor]:
        """SAM 2's embeddings of an image; those of the last image are kept for the next click on it."""
        if self._seen is None or self._seen[0] is not image:
            scaled = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32) / 255
            pixels = torch.from_numpy((scaled - _MEAN) / _STD).permute(2, 0, 1)[None]
            pixels = pixels.to(self.model.device, self.model.dtype)
            self._seen = image, self.model.get_image_embeddings(pixels)
        return self._seen[1]


def _scaled(prompt: list, scale: torch.Tensor) -> torch.Tensor:
    """Points (1, prompts, points, 2) or boxes (1, prompts, 4) in the pixels of the model."""
    prompts = torch.tensor(prompt)
    return (prompts.unflatten(-1, (-1, 2)) * scale).view_as(prompts)[None]
