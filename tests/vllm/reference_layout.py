"""A checkpoint of ours written as the reference writes its own: nested config, its parameter names, its switches."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from pdlm_hf import PdlmForConditionalGeneration, PdlmProcessor
from pdlm_hf.conversion_pdlm import PARAMETER_PREFIXES


def write_reference(source: Path, folder: Path) -> Path:
    """The checkpoint `source` with "reference" RoI replay and "full" prefix attention, in the reference's layout."""
    folder.mkdir(parents=True)
    model, processor = PdlmForConditionalGeneration.from_pretrained(source), PdlmProcessor.from_pretrained(source)
    config = model.config
    names = {ours: theirs for theirs, ours in PARAMETER_PREFIXES.items()}
    weights = {}
    for name, weight in model.state_dict().items():
        ours = next(prefix for prefix in sorted(names, key=len, reverse=True) if name.startswith(prefix))
        weights[names[ours] + name.removeprefix(ours)] = weight.contiguous().clone()
    # what the reference saves and never uses
    last = config.vision_config.num_hidden_layers - 1
    weights[f"vision_model.vision_model.encoder.layers.{last}.layer_norm1.weight"] = torch.ones(8)
    weights["vision_model.text_model.final_layer_norm.weight"] = torch.ones(8)
    weights["vision_model.vision_model.head.probe"] = torch.ones(1, 1, 8)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    text = config.text_config
    language = {key: getattr(text, key) for key in ("hidden_size", "intermediate_size", "vocab_size", "rms_norm_eps")}
    language |= {
        "model_type": "llada",
        "num_hidden_layers": text.num_hidden_layers,
        "num_attention_heads": text.num_attention_heads,
        "num_key_value_heads": text.num_key_value_heads,
        "max_position_embeddings": text.max_position_embeddings,
        "rope_theta": text.rope_parameters["rope_theta"],
        "hidden_act": "silu",
    }
    vision = config.vision_config.to_dict()
    vision["model_type"] = "siglip_vision_model"
    nested = {
        "architectures": ["PDMLLM"],
        "auto_map": {"AutoModel": "modeling_pdmllm.PDMLLM"},
        "model_type": "pdmllm",
        "language_model_config": language,
        "vision_model_config": {"model_type": "siglip", "vision_config": vision},
        "vision_abstractor_config": {"projection_type": "mlp2x_gelu"},
        "image_token_id": config.image_token_id,
        "image_size": config.vision_config.image_size,
        "patch_size": config.vision_config.patch_size,
        "downsample_ratio": config.downsample_ratio,
        "vision_select_layer": config.vision_feature_layer,
        "prompt_numbers": config.num_region_prompts,
        "roi_output_size": config.roi_output_size[0],
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(nested))
    processor.tokenizer.save_pretrained(folder)
    for extra in folder.glob("*.jinja"):  # the reference has no chat template
        extra.unlink()
    (folder / "processor_config.json").write_text(
        json.dumps({"processor_class": "PDMLLMProcessor", "max_sub_img": config.max_tiles, "min_sub_img": 1})
    )
    return folder
