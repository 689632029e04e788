"""Tiny models with random weights, and noise images with masks."""

import numpy as np
import torch
from transformers import Sam2Config, Sam2Model

from tools.shapes.model import build_model

# What travels with a checkpoint as remote code
FLAT_FILES = [
    f"{name}_pdlm.py"
    for name in (
        "adapters attributes batching caching canvas_path canvas captions chat_denoising configuration conversion "
        "denoising diffusion errors fused generation_config generation graphs image_processing kernels masking "
        "modeling processing prompts readings templates tiling versions vision"
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


def make_image(seed: int, width: int = 96, height: int = 64, num_masks: int = 2):
    """A noise image, and rectangular masks of different areas (not sorted by area)."""
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


def tiny_sam():
    """SAM 2 with random weights, so small that it runs anywhere."""
    side, width = 64, 16
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": width,
        "image_size": [side, side],
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [width, 2 * width, 4 * width, 8 * width],
        "num_attention_heads_per_stage": [1, 1, 1, 1],
        "window_size_per_stage": [8, 4, 2, 2],
        "global_attention_blocks": [3],
        "window_positional_embedding_background_size": [2, 2],
    }
    vision = {
        "backbone_config": backbone,
        "backbone_channel_list": [8 * width, 4 * width, 2 * width, width],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "fpn_hidden_size": 32,
    }
    prompt = {"hidden_size": 32, "image_size": side, "patch_size": 16, "mask_input_channels": 4}
    decoder = {
        "hidden_size": 32,
        "mlp_dim": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 32,
    }
    torch.manual_seed(0)
    return Sam2Model(
        Sam2Config(vision_config=vision, prompt_encoder_config=prompt, mask_decoder_config=decoder)
    ).eval()
