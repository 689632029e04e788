"""Train the vision tower: classify every attribute of a region from its RoI tokens, without the language model or
beside its loss.

The 8B starts from the pretrained SigLIP2. The tiny tower starts from random weights, and from captions alone it learns
shapes very slowly.
"""

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pdlm_hf.modeling_pdlm import PdlmForConditionalGeneration
from pdlm_hf.processing_pdlm import PdlmProcessor, area_order
from pdlm_hf.shapes.scenes import WORDS, read
from pdlm_hf.shapes.templates import DARK_DOMAIN
from pdlm_hf.training.collator import PdlmCollator


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
            hidden = _mean(tokens)
        else:
            hidden = F.gelu(self.mix(F.gelu(tokens + self.position).mean(1)))
        return attribute_loss(self.score(hidden), attributes, WORDS)


class JointCollator(PdlmCollator):
    """A [`PdlmCollator`] of rows of `JointDataset` that adds `attributes`, as [`AttributeCollator`] does, in the order
    of the region prompts: indices into the values of each attribute in `DARK_DOMAIN`.

    Args:
        processor (`PdlmProcessor`)
        **kwargs: of [`PdlmCollator`].
    """

    def __init__(self, processor: PdlmProcessor, **kwargs: Any):
        quick = copy.copy(processor)  # a copy: what is saved has no cache
        quick.region_ids = lru_cache(processor.region_ids)  # the prompts of all images are a few
        super().__init__(quick, **kwargs)

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Make a batch, see [`PdlmCollator`]."""
        known = [
            row["regions"][k]["attributes"] for row in rows for k in area_order([r["mask"] for r in row["regions"]])
        ]
        values = [[list(words).index(figure[name]) for name, words in DARK_DOMAIN.words.items()] for figure in known]
        return super().__call__(rows) | {"attributes": torch.tensor(values)}


class JointModel(nn.Module):
    """The loss of the captions and templates, plus that of a linear classifier of the RoI tokens which the language
    model sees: from one pass of the vision tower, which so learns from every attribute of every region.

    Args:
        model (`PdlmForConditionalGeneration`): all of it is trained.
    """

    accepts_loss_kwargs = False  # the loss averages over samples itself
    SCALE = 10.0  # of the scores: the classifier, which begins anew in every run, learns so many times faster

    def __init__(self, model: PdlmForConditionalGeneration):
        super().__init__()
        self.model = model
        self.score = nn.Linear(model.config.text_config.hidden_size, sum(map(len, DARK_DOMAIN.words.values())))
        nn.init.zeros_(self.score.weight)  # before it has learned something it changes nothing in the tower
        nn.init.zeros_(self.score.bias)

    def forward(
        self,
        input_ids: torch.Tensor,
        pixel_values: torch.Tensor,
        image_grids: torch.Tensor,
        region_masks: torch.Tensor,
        region_boxes: torch.Tensor,
        original_sizes: torch.Tensor,
        attributes: torch.Tensor,
        **inputs: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Sum of both losses, as `loss`, and the `right` answers of the classifier, bool (regions, 4)."""
        visual = (pixel_values, image_grids, region_masks, region_boxes, original_sizes)
        embeds = self.model.model.embed(input_ids, *visual, training_geometry=True)
        prompts = torch.tensor(self.model.config.region_token_ids, device=input_ids.device)
        tokens = embeds[torch.isin(input_ids, prompts)].unflatten(0, (-1, self.model.config.num_roi_tokens))
        seen = attribute_loss(self.SCALE * self.score(_mean(tokens)), attributes, DARK_DOMAIN.words)
        layout = self.model.model.region_layout(input_ids, replayed=True)
        written = self.model(input_ids=input_ids, inputs_embeds=embeds, layout=layout, **inputs)
        return {"loss": written.loss + seen["loss"], "right": seen["right"]}


def _mean(tokens: torch.Tensor) -> torch.Tensor:
    """Plain mean of the normalised tokens (regions, tokens, channels), which a head with even attention sees."""
    return F.rms_norm(tokens, tokens.shape[-1:]).mean(1)


def attribute_loss(
    scores: torch.Tensor, attributes: torch.Tensor, words: dict[str, dict[str, tuple[str, ...]]]
) -> dict[str, torch.Tensor]:
    """Sum over the attributes of the mean cross entropy, as `loss`, and the `right` answers, bool (regions, 4).

    Args:
        scores (`torch.Tensor` of shape `(regions, values of all attributes)`)
        attributes (`torch.Tensor` of shape `(regions, 4)`): indices of the right values.
        words (`dict`): the values of each attribute, see `WORDS`.
    """
    parts = scores.split([len(values) for values in words.values()], -1)
    losses = [F.cross_entropy(part, target) for part, target in zip(parts, attributes.T, strict=True)]
    right = torch.stack([part.argmax(-1) for part in parts], 1) == attributes
    return {"loss": torch.stack(losses).sum(), "right": right}
