"""What a click on an image means, according to SAM 2."""

import threading

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from ..errors_pdlm import CheckpointError

# As SAM 2's own processor has them. That one needs torchvision, which many installations lack; what it does to a
# image and a point is this little.
_MEAN, _STD = np.array([(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)], dtype=np.float32)


class Segmenter:
    """SAM 2 of transformers.

    Args:
        model (`transformers.Sam2Model`): it is put into evaluation mode.
    """

    def __init__(self, model):
        self.model = model.eval()
        self._lock = threading.Lock()
        self._seen: tuple[Image.Image, list[torch.Tensor]] | None = None

    @classmethod
    def from_pretrained(cls, path: str, device: str | None = None) -> "Segmenter":
        """Load weights.

        Args:
            path (`str`): folder or hub id of a SAM 2 or 2.1, as `facebook/sam2.1-hiera-small`.
            device (`str`, *optional*): default: the GPU if there is one.

        Raises:
            CheckpointError: they are of something else.
        """
        from transformers import AutoConfig, Sam2Model

        kind = AutoConfig.from_pretrained(path).model_type
        if kind not in ("sam2", "sam2_video"):
            raise CheckpointError(
                f"--sam {path}: a {kind} model; expected SAM 2, facebook/sam2.1-hiera-small for example."
            )
        model = Sam2Model.from_pretrained(path)
        # transformers' `to` is typed without its `self`
        return cls(model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")))  # type: ignore[arg-type]

    @torch.inference_mode()
    def mask(self, image: Image.Image, x: int, y: int) -> np.ndarray:
        """The mask it holds for the best of what lies at a pixel.

        Args:
            image (`PIL.Image.Image`): RGB.
            x, y (`int`): column and row.

        Returns:
            bool, `(H, W)`.

        Raises:
            CheckpointError: it finds nothing there.
        """
        height, width = self.model.config.vision_config.backbone_config.image_size
        point = torch.tensor([(x + 0.5) * width / image.width, (y + 0.5) * height / image.height])
        with self._lock:
            out = self.model(
                image_embeddings=self._embeddings(image, width, height),
                input_points=point.view(1, 1, 1, 2).to(self.model.device),
                input_labels=torch.ones(1, 1, 1, dtype=torch.int, device=self.model.device),
            )
        best = out.pred_masks[0, 0, out.iou_scores[0, 0].argmax()]
        size = image.height, image.width
        logits = functional.interpolate(best[None, None].float(), size, mode="bilinear", align_corners=False)
        mask = (logits[0, 0] > 0).cpu().numpy()
        if not mask.any():
            raise CheckpointError("SAM 2 finds nothing there; draw a box instead.")
        return mask

    def _embeddings(self, image: Image.Image, width: int, height: int) -> list[torch.Tensor]:
        """Of the image; those of the last one are kept, for the next click on it."""
        if self._seen is None or self._seen[0] is not image:
            scaled = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR), dtype=np.float32) / 255
            pixels = torch.from_numpy((scaled - _MEAN) / _STD).permute(2, 0, 1)[None]
            pixels = pixels.to(self.model.device, self.model.dtype)
            self._seen = image, self.model.get_image_embeddings(pixels)
        return self._seen[1]
