"""Tiny models with random weights, and noise pictures with masks."""

import numpy as np
import torch

from pdlm_hf.shapes.model import build_model


def lively_model(processor, prefix_attention: str = "full", seed: int = 0, **overrides):
    """The tiny model with random weights, scaled up so that drafts differ between slots, regions and steps."""
    torch.manual_seed(seed)
    model = build_model(processor, prefix_attention, **overrides).eval()
    with torch.no_grad():
        for layer in model.model.language_model.layers:
            for parameter in layer.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(3)
        model.model.multi_modal_projector.linear_2.weight.mul_(20)
        model.lm_head.weight.mul_(6)
    return model


def make_picture(seed: int, width: int = 96, height: int = 64, num_masks: int = 2):
    """A noise picture, and rectangular masks of different areas (not sorted by area)."""
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    masks = []
    for k in rng.permutation(num_masks):
        mask = np.zeros((height, width), dtype=bool)
        h, w = 10 + 6 * int(k), 12 + 7 * int(k)
        y, x = rng.integers(0, height - h), rng.integers(0, width - w)
        mask[y : y + h, x : x + w] = True
        masks.append(mask)
    return image, masks
