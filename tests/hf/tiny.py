"""Tiny models with random weights, and noise pictures with masks."""

import numpy as np
import torch

from pdlm_hf.shapes.model import build_model

# What travels with a checkpoint as remote code
FLAT_FILES = [
    f"{name}_pdlm.py"
    for name in (
        "caching canvas chat_denoising configuration conversion denoising diffusion generation_config generation "
        "graphs image_processing masking modeling processing split_attention"
    ).split()
]


def lively_model(processor, prefix_attention: str = "full", seed: int = 0, **overrides):
    """The tiny model with random weights so large that drafts differ between slots, regions and steps."""
    model = build_model(processor, prefix_attention, **overrides).eval()
    generator = torch.Generator().manual_seed(seed)
    scales = {"language_model.layers": 0.15, "linear_2": 0.4, "lm_head": 0.3, "region_embedding": 1.0}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                scale = next((scale for part, scale in scales.items() if part in name), 0.05)
                parameter.normal_(0, scale, generator=generator)
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
