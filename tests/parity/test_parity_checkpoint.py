"""config.json, tokenizer.json and the two checkpoint folders in the reference's layout."""

import pytest
import torch
from parity_golden import FOLDER, each, load, our_name, record, stems, subset_holds
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
)

from pdlm_hf.configuration_pdlm import special_token_ids

KINDS = [name.removeprefix("checkpoint_") for name in stems("checkpoint_*")]
RECORDED = [kind for kind in KINDS if kind in record("config")]
TOKENIZERS = stems("tokenizer.json")


def test_found():
    subset_holds(kinds=KINDS, recorded=RECORDED, tokenizers=TOKENIZERS)


@each("kind", KINDS)
@pytest.mark.parametrize(
    "auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM]
)
def test_checkpoint_loads_completely(kind, auto_class):
    loaded = load(kind)
    model, info = auto_class.from_pretrained(loaded.path, dtype=torch.float32, output_loading_info=True)
    assert type(model) is type(loaded.model)
    assert not any(info.values()), info
    with safe_open(loaded.path / "model.safetensors", "pt") as file:
        theirs = {our_name(name): name for name in file.keys()}
        for name, value in model.state_dict().items():
            assert torch.equal(value, file.get_tensor(theirs[name])), name


@each("kind", RECORDED)
def test_config_values(kind):
    config, theirs = load(kind).config, record("config")[kind]
    for ours, recorded in ((config.text_config, theirs["language"]), (config.vision_config, theirs["vision"])):
        for name, value in recorded.items():
            if name == "rope_theta":
                assert ours.rope_parameters == {"rope_type": "default", "rope_theta": value}
            else:
                assert getattr(ours, name) == value, name
    assert config.image_token_id == theirs["image_token_id"]
    assert config.mask_token_id == theirs["mask_token_id"]
    assert config.downsample_ratio == theirs["downsample_ratio"]
    assert config.vision_feature_layer == theirs["vision_select_layer"]
    assert config.feature_grid**2 == theirs["num_image_token"]
    assert config.num_region_prompts == theirs.get("prompt_numbers", 0)
    if "roi_output_size" in theirs:
        size = theirs["roi_output_size"]
        assert config.roi_output_size == ([size, size] if isinstance(size, int) else size)
    banned = [config.mask_token_id, config.start_header_token_id, config.end_header_token_id]
    assert {*banned, config.bos_token_id, config.eos_token_id} == set(theirs["banned_token_ids_base_sampler"])
    assert (config.roi_replay, config.prefix_attention) == ("reference", "full")


@each("kind", RECORDED)
def test_processor_values(kind):
    processor, theirs = load(kind).processor, record("config")[kind]
    image_processor = processor.image_processor
    assert image_processor.size["height"] == image_processor.size["width"] == theirs["image_size"]
    assert image_processor.patch_size == theirs["patch_size"]
    assert (image_processor.min_tiles, image_processor.max_tiles) == (theirs["min_sub_img"], theirs["max_sub_img"])
    assert processor.tokens_per_tile == theirs["num_image_token"]


@each("kind", RECORDED)
def test_special_token_ids(kind):
    loaded, theirs = load(kind), record("config")["special_token_ids"]
    vocabulary = loaded.processor.tokenizer.get_vocab()
    names = [name for name in theirs if kind == "pdmllm" or name in vocabulary]
    assert {name: vocabulary[name] for name in names} == {name: theirs[name] for name in names}
    config = loaded.config
    assert config.eot_token_id == loaded.processor.tokenizer.pad_token_id == theirs["<|eot_id|>"]
    assert (config.bos_token_id, config.eos_token_id) == (theirs["<|startoftext|>"], theirs["<|endoftext|>"])
    for k in range(config.num_region_prompts):
        assert config.region_token_ids[k] == theirs[f"<|reserved_token_{k}|>"]
        assert config.caption_token_ids[k] == theirs[f"<|Mask_Cap_{k}|>"]
    assert loaded.processor.tokenizer.decode([config.newline_token_id]) == "\n"


@each("kind", [kind for kind in KINDS if kind == record("config").get("upstream_style_config", {}).get("model_type")])
def test_nested_config_is_read(kind):
    ours = AutoConfig.for_model(kind).from_dict(record("config")["upstream_style_config"])
    loaded = load(kind).config
    assert ours.text_config.to_dict() == loaded.text_config.to_dict() | {"dtype": ours.text_config.dtype}
    assert ours.vision_config.to_dict() == loaded.vision_config.to_dict() | {"dtype": ours.vision_config.dtype}


@each("name", TOKENIZERS)
@pytest.mark.parametrize("kind", KINDS)
def test_tokenizer(name, kind):
    vocabulary = Tokenizer.from_file(str(FOLDER / f"{name}.json")).get_vocab()
    assert load(kind).processor.tokenizer.get_vocab().items() <= vocabulary.items()
    if kind == "pdmllm":
        assert load(kind).processor.tokenizer.get_vocab() == vocabulary
        assert len(vocabulary) == record("config").get("tokenizer_len", len(vocabulary))
        config = load(kind).config
        ids = special_token_ids(record(name), config.num_region_prompts)
        assert ids == {key: getattr(config, key) for key in ids}
