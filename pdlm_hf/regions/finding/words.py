"""Masks by words: SAM 3."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from ...errors_pdlm import SettingError
from .selection import FoundRegion, SelectionSettings


class WordSegmenter:
    """A SAM 3 of transformers, which finds every instance of what a word or a short phrase names.

    Args:
        model: a `transformers.Sam3Model`; put into evaluation mode.
        tokenizer: its tokenizer.
    """

    min_score = 0.5

    def __init__(self, model: Any, tokenizer: Any):
        self.model, self.tokenizer = model.eval(), tokenizer
        self._lock = threading.Lock()

    @classmethod
    def from_pretrained(cls, path: str, device: str | None = None) -> "WordSegmenter":
        """Load a model.

        Args:
            path (`str`): folder or hub id, for example `facebook/sam3`.
            device (`str`, *optional*): default: the GPU if there is one.

        Raises:
            OSError, ValueError, RuntimeError: as of transformers' `from_pretrained`.
        """
        # From its module: by its name transformers offers the class only where torchvision is installed, which boxes
        # as prompts need, and words do not.
        from transformers import AutoTokenizer
        from transformers.models.sam3.modeling_sam3 import Sam3Model

        model = Sam3Model.from_pretrained(path)
        tokenizer = AutoTokenizer.from_pretrained(path)
        # transformers' `to` is typed without its `self`
        return cls(model.to(device or ("cuda" if torch.cuda.is_available() else "cpu")), tokenizer)  # type: ignore[arg-type]

    @torch.inference_mode()
    def propose(
        self, image: Image.Image, names: Sequence[str] | None, settings: SelectionSettings
    ) -> list[FoundRegion]:
        """Propose the instances of every name; the image is encoded once for all of them.

        Args:
            image (`PIL.Image.Image`): RGB.
            names: words or short phrases.
            settings ([`SelectionSettings`]): instances below `min_score` are left out.

        Raises:
            SettingError: there are no names.
        """
        if names is None:
            raise SettingError("SAM 3 masks what words name: pass some (--find), or another segmenter for everything.")
        found: list[FoundRegion] = []
        with self._lock:
            seen = self.model.get_vision_features(self._pixels(image))
            for name in names:
                out = self.model(vision_embeds=seen, **self._words(name))
                scores = out.pred_logits[0].float().sigmoid()
                if out.presence_logits is not None:  # whether the image has any instance at all
                    scores = scores * out.presence_logits[0].float().sigmoid()
                kept = scores >= (settings.min_score or 0)
                shares = out.pred_masks[0][kept].float().sigmoid()
                for share, score in zip(shares, scores[kept].tolist(), strict=True):
                    size = image.height, image.width
                    mask = functional.interpolate(share[None, None], size, mode="bilinear", align_corners=False)[0, 0]
                    found.append(FoundRegion.of_mask((mask > 0.5).cpu().numpy(), score, name=name))
        return found

    def _pixels(self, image: Image.Image) -> torch.Tensor:
        """The image as SAM 3 sees it, (1, 3, height, width), from -1 to 1. Its own processor needs torchvision."""
        side = self.model.config.vision_config.image_size
        rows, columns = (side, side) if isinstance(side, int) else side
        scaled = np.asarray(image.resize((columns, rows), Image.Resampling.BILINEAR), dtype=np.float32) / 255
        pixels = torch.from_numpy((scaled - 0.5) / 0.5).permute(2, 0, 1)[None]
        return pixels.to(self.model.device, self.model.dtype)

    def _words(self, name: str) -> dict[str, torch.Tensor]:
        """The tokens of a name, padded as in training."""
        length = self.model.config.text_config.max_position_embeddings
        words = self.tokenizer(name, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return {part: words[part].to(self.model.device) for part in ("input_ids", "attention_mask")}
