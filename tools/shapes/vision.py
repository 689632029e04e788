"""Pretrain the vision tower: classify every attribute of a region from its RoI tokens, without the language model.

The 8B starts from the pretrained SigLIP2. The tiny tower starts from random weights, and from captions alone it learns
shapes very slowly.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pdlm_hf.modeling_pdlm import PdlmForConditionalGeneration
from pdlm_hf.processing_pdlm import PdlmProcessor
from pdlm_hf.shapes.scenes import WORDS, read


class AttributeCollator:
    """Makes the inputs of the vision tower and the attributes of every region from rows of `ShapesDataset`.

    `attributes` has shape `(regions of all images, 4)`: indices into the values of each attribute in `WORDS`.
    """

    def __init__(self, processor: PdlmProcessor):
        self.image_processor = processor.image_processor

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Cut images and masks into tiles, and parse the captions."""
        inputs = self.image_processor.preprocess(
            [row["image"] for row in rows],
            segmentation_maps=[[region["mask"] for region in row["regions"]] for row in rows],
            return_tensors="pt",
        )
        figures = [read(region["caption"]) for row in rows for region in row["regions"]]
        values = [[list(words).index(getattr(figure, name)) for name, words in WORDS.items()] for figure in figures]
        names = ("pixel_values", "region_masks", "region_boxes", "image_grids", "original_sizes")
        return {name: inputs[name] for name in names} | {"attributes": torch.tensor(values)}


class RegionClassifier(nn.Module):
    """Classifies attributes of regions from their RoI tokens.

    Args:
        model (`PdlmForConditionalGeneration`): its vision tower, projector and region embeddings are trained.
        linear (`bool`): classify the plain mean of the normalised tokens, which a head of the language model with even
            attention sees; otherwise a small network of the tokens, which learns faster, but with features that are
            harder to use for the language model.
    """

    def __init__(self, model: PdlmForConditionalGeneration, linear: bool = False):
        super().__init__()
        self.model, self.linear = model, linear
        hidden = model.config.text_config.hidden_size
        if not linear:
            self.position = nn.Parameter(torch.zeros(model.config.num_roi_tokens, hidden))
            self.mix = nn.Linear(hidden, hidden)
        self.score = nn.Linear(hidden, sum(map(len, WORDS.values())))

    def forward(
        self,
        pixel_values: torch.Tensor,
        region_masks: torch.Tensor,
        region_boxes: torch.Tensor,
        image_grids: torch.Tensor,
        original_sizes: torch.Tensor,
        attributes: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Sum over the attributes of the mean cross entropy, as `loss`, and the `right` answers, bool (regions, 4)."""
        features = self.model.model.get_image_features(pixel_values, region_masks).pooler_output
        tokens = self.model.model.get_region_features(features, image_grids, region_boxes, original_sizes)
        if self.linear:
            hidden = F.rms_norm(tokens, tokens.shape[-1:]).mean(1)
        else:
            hidden = F.gelu(self.mix(F.gelu(tokens + self.position).mean(1)))
        scores = self.score(hidden).split([len(words) for words in WORDS.values()], -1)
        losses = (F.cross_entropy(s, target) for s, target in zip(scores, attributes.T, strict=True))
        loss = sum(losses, scores[0].new_zeros(()))
        return {"loss": loss, "right": torch.stack([s.argmax(-1) for s in scores], 1) == attributes}
