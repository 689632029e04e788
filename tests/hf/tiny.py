"""Tiny models with random weights, and noise images with masks."""

import numpy as np
import torch
from transformers import (
    CLIPTokenizer,
    OwlViTConfig,
    OwlViTForObjectDetection,
    Sam2Config,
    Sam2Model,
    Sam3Config,
    YolosConfig,
    YolosForObjectDetection,
)
from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil
from transformers.models.sam3.modeling_sam3 import Sam3Model
from transformers.models.yolos.image_processing_pil_yolos import YolosImageProcessorPil

from tools.shapes.model import build_model

# What travels with a checkpoint as remote code
FLAT_FILES = [
    f"{name}_pdlm.py"
    for name in (
        "adapters attributes batching caching canvas_path canvas captions chat_denoising configuration conversion "
        "denoising diffusion errors fused generation_config generation graphs image_processing kernels linear masking "
        "modeling processing prompts readings stopping templates tiling versions vision"
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


def shallow_model(processor):
    """The lively model with two layers, whose prompts do not see captions."""
    network = lively_model(processor, "isolated")
    network.model.language_model.layers = network.model.language_model.layers[:2]
    network.config.text_config.num_hidden_layers = 2
    return network


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


def tiny_sam3(folder):
    """A folder with a SAM 3 with random weights, and its tokenizer."""
    small = {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    backbone = {
        "model_type": "sam3_vit_model",
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "window_size": 2,
        "global_attn_indexes": [1],
        "pretrain_image_size": 28,
    }
    text = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "projection_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
    }
    config = Sam3Config(
        vision_config={
            "backbone_config": backbone,
            "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        },
        text_config={**text, **tiny_clip_tokenizer(folder)},
        geometry_encoder_config=small,
        detr_encoder_config=small,
        detr_decoder_config={**small, "num_queries": 6},
        mask_decoder_config={"hidden_size": 32, "num_attention_heads": 2},
    )
    torch.manual_seed(0)
    Sam3Model(config).eval().save_pretrained(folder)
    return folder


def tiny_clip_tokenizer(folder):
    """Save a CLIP tokenizer that knows single letters. Returns: what a text configuration says about it."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {word: k for k, word in enumerate(words)}
    CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(folder)
    end = vocabulary["<|endoftext|>"]
    return {"vocab_size": len(words), "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}


def tiny_detector(folder):
    """A folder with a detector of the classes cat, dog and car, with random weights that prefer some."""
    names = {0: "cat", 1: "dog", 2: "car"}
    config = YolosConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=[32, 32],
        patch_size=16,
        num_detection_tokens=5,
        id2label=names,
        label2id={name: k for k, name in names.items()},
    )
    torch.manual_seed(0)
    model = YolosForObjectDetection(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.7)
    model.save_pretrained(folder)
    YolosImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def tiny_word_detector(folder):
    """A folder with a detector by words, with random weights."""
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**text, "image_size": 32, "patch_size": 8}
    ids = tiny_clip_tokenizer(folder)
    config = OwlViTConfig(
        text_config={**text, **ids, "max_position_embeddings": 16}, vision_config=vision, projection_dim=16
    )
    torch.manual_seed(0)
    model = OwlViTForObjectDetection(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.5)
    model.save_pretrained(folder)
    OwlViTImageProcessorPil(size={"height": 32, "width": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(
        folder
    )
    return folder
