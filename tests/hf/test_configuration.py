import json

import pytest
import torch
from transformers import AutoConfig

from pdlm_hf import PdlmBaseConfig, PdlmConfig, PdlmForConditionalGeneration
from pdlm_hf.configuration_pdlm import special_token_ids
from pdlm_hf.conversion_pdlm import PARAMETER_PREFIXES


def test_reference_json_in_our_spelling(golden_regions):
    config = PdlmConfig.from_pretrained(golden_regions)
    theirs = json.loads((golden_regions / "config.json").read_text())
    language, vision = theirs["language_model_config"], theirs["vision_model_config"]["vision_config"]
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"):
        assert getattr(config.text_config, name) == language[name]
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "image_size", "patch_size"):
        assert getattr(config.vision_config, name) == vision[name]
    assert config.text_config.rope_parameters["rope_theta"] == language["rope_theta"]
    assert config.text_config.is_causal is False
    assert config.vision_feature_layer == theirs["vision_select_layer"]
    assert config.num_region_prompts == theirs["prompt_numbers"]
    assert config.roi_output_size == [theirs["roi_output_size"]] * 2
    assert (config.roi_replay, config.prefix_attention) == ("reference", "full")
    assert not hasattr(config, "language_model_config")
    assert not hasattr(config, "kernel_size")


def test_token_ids_come_from_the_tokenizer(golden_regions):
    config = PdlmConfig.from_pretrained(golden_regions)
    added = json.loads((golden_regions / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    assert config.mask_token_id == ids["<|mdm_mask|>"]
    assert config.eot_token_id == ids["<|eot_id|>"]
    assert config.image_token_id == ids["<IMG_CONTEXT>"]
    assert config.region_token_ids == [ids[f"<|reserved_token_{k}|>"] for k in range(config.num_region_prompts)]
    assert config.caption_token_ids == [ids[f"<|Mask_Cap_{k}|>"] for k in range(config.num_region_prompts)]


def test_tokenizer_without_the_mask_token_is_refused(golden_regions):
    tokenizer = json.loads((golden_regions / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] != "<|mdm_mask|>"]
    with pytest.raises(ValueError, match=r"lacks the special tokens \['<\|mdm_mask\|>'\]"):
        special_token_ids(tokenizer, 2)


def test_base_config_has_no_regions(golden_base):
    for config in (
        PdlmBaseConfig(),
        PdlmBaseConfig.from_pretrained(golden_base),
        AutoConfig.from_pretrained(golden_base),
    ):
        assert type(config) is PdlmBaseConfig
        assert config.num_region_prompts == 0
        assert config.region_token_ids == config.caption_token_ids == []
        assert config.num_roi_tokens == 0


@pytest.mark.parametrize("config_class", [PdlmConfig, PdlmBaseConfig])
def test_saved_config_loads_equal(tmp_path, config_class):
    config = config_class(roi_replay="aligned", prefix_attention="isolated", roi_output_size=[2, 3], max_tiles=4)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is config_class
    differ = {"transformers_version": None, "_name_or_path": None}
    assert loaded.to_dict() | differ == config.to_dict() | differ
    assert (loaded.roi_replay, loaded.prefix_attention) == ("aligned", "isolated")


def test_converted_reference_config_loads_without_tokenizer(tmp_path, golden_regions):
    config = PdlmConfig.from_pretrained(golden_regions)
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert "language_model_config" not in saved
    loaded = PdlmConfig.from_pretrained(tmp_path)
    assert loaded.mask_token_id == config.mask_token_id
    assert loaded.caption_token_ids == config.caption_token_ids
    assert loaded.roi_replay == "reference"


def test_stale_auto_map_is_dropped(golden_regions):
    assert "auto_map" in json.loads((golden_regions / "config.json").read_text())
    auto_map = getattr(PdlmConfig.from_pretrained(golden_regions), "auto_map", None) or {}
    assert not any("pdmllm" in str(value) for value in auto_map.values())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"roi_replay": "exact"}, r"`roi_replay` must be one of \('reference', 'aligned'\), got 'exact'"),
        ({"score_temperature": 0.0}, r"`score_temperature` must be positive, got 0.0"),
        ({"text_config": {"rms_norm_eps": -1e-5}}, r"`text_config.rms_norm_eps` must be positive, got -1e-05"),
        ({"text_config": {"rope_parameters": {"rope_theta": -1, "rope_type": "default"}}}, r"theta` must be positive"),
        ({"vision_config": {"layer_norm_eps": float("nan")}}, r"`vision_config.layer_norm_eps` must be positive, got"),
        ({"prefix_attention": "none"}, r"`prefix_attention` must be one of \('full', 'isolated'\), got 'none'"),
        ({"num_region_prompts": 3, "region_token_ids": [1, 2]}, r"`region_token_ids` .* \(3\), got 2"),
        ({"num_region_prompts": 2, "caption_token_ids": [1]}, r"`caption_token_ids` .* \(2\), got 1"),
        ({"roi_output_size": None}, "`roi_output_size` must be an int"),
        ({"vision_feature_layer": -1}, "`vision_feature_layer` must be -2 or lower, got -1"),
        ({"vision_config": {"image_size": 48, "patch_size": 16}}, "image_size / patch_size = 3 cannot be unshuffled"),
    ],
)
def test_invalid_values_raise(values, message):
    with pytest.raises(ValueError, match=message):
        PdlmConfig(**values)


def _shapes_of_the_8b() -> dict[str, tuple[int, ...]]:
    """Names and shapes of the reference's checkpoint, without what we do not build: the text tower, logit_scale and
    bias, the pooling head, the last vision layer and post_layernorm."""
    hidden, mlp, vocabulary = 4096, 12288, 126464
    shapes = {
        "language_model.model.embed_tokens.weight": (vocabulary, hidden),
        "language_model.lm_head.weight": (vocabulary, hidden),
        "language_model.model.norm.weight": (hidden,),
        "vision_abstractor.projection.0.weight": (hidden, 4608),
        "vision_abstractor.projection.0.bias": (hidden,),
        "vision_abstractor.projection.2.weight": (hidden, hidden),
        "vision_abstractor.projection.2.bias": (hidden,),
        "mask_id_embedding.weight": (6, 1152),
        "vision_model.vision_model.embeddings.patch_embedding.weight": (1152, 3, 16, 16),
        "vision_model.vision_model.embeddings.patch_embedding.bias": (1152,),
        "vision_model.vision_model.embeddings.position_embedding.weight": (1024, 1152),
    }
    for i in range(32):
        layer = f"language_model.model.layers.{i}."
        shapes |= {f"{layer}self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{layer}mlp.{name}_proj.weight": (mlp, hidden) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (hidden, mlp)
        shapes |= {f"{layer}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    for i in range(26):  # of 27
        layer = f"vision_model.vision_model.encoder.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{layer}self_attn.{name}.weight": (1152, 1152), f"{layer}self_attn.{name}.bias": (1152,)}
        shapes |= {f"{layer}mlp.fc1.weight": (4304, 1152), f"{layer}mlp.fc1.bias": (4304,)}
        shapes |= {f"{layer}mlp.fc2.weight": (1152, 4304), f"{layer}mlp.fc2.bias": (1152,)}
        shapes |= {f"{layer}layer_norm{k}.{part}": (1152,) for k in (1, 2) for part in ("weight", "bias")}
    return shapes


def test_the_default_is_the_8b():
    with torch.device("meta"):
        model = PdlmForConditionalGeneration(PdlmConfig())
    shapes = {}
    for name, parameter in model.named_parameters():
        theirs, ours = next(pair for pair in PARAMETER_PREFIXES.items() if name.startswith(pair[1]))
        shapes[theirs + name.removeprefix(ours)] = tuple(parameter.shape)
    assert shapes == _shapes_of_the_8b()
    assert model.config.feature_grid**2 == 256
    assert model.config.num_roi_tokens == 16
    assert model.config.text_config.rms_norm_eps == 1e-5
    assert model.config.vision_config.layer_norm_eps == 1e-6
    assert sum(
        p.numel() for p in model.model.language_model.parameters()
    ) + model.lm_head.weight.numel() == pytest.approx(8.015e9, rel=1e-3)


def test_feature_layer_decides_how_many_vision_layers_are_built():
    for layer, built in ((-2, 26), (-5, 23)):
        with torch.device("meta"):
            model = PdlmForConditionalGeneration(PdlmConfig(vision_feature_layer=layer))
        assert len(model.model.vision_tower.encoder.layers) == built
