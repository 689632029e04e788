"""LoRA adapters at run time: the captions of the merged checkpoint, beside those of the base."""

import json

import pytest
import torch
from drawn_images import drawn_images, texts
from engines import engine
from peft import LoraConfig, get_peft_model
from test_attributes import LONG, assert_equal
from transformers import AutoModelForImageTextToText, AutoProcessor
from vllm.lora.request import LoRARequest

from pdlm_hf import CHECKPOINT, RegionCaptioner
from pdlm_peft.adapters import EMBEDDINGS, LANGUAGE_LAYERS, VISION_LAYERS
from pdlm_vllm import attributes_many, caption_many, read_captions, region_requests
from pdlm_vllm.adapters import check_adapter


def adapter(folder, seed: int, **settings):
    """A random adapter, and the checkpoint merged with it."""
    torch.manual_seed(seed)
    config = LoraConfig(**{"r": 8, "target_modules": LANGUAGE_LAYERS, "init_lora_weights": False, **settings})
    model = get_peft_model(AutoModelForImageTextToText.from_pretrained(CHECKPOINT), config)
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    model.merge_and_unload().save_pretrained(folder / "merged")
    AutoProcessor.from_pretrained(CHECKPOINT).save_pretrained(folder / "merged")
    return folder / "adapter", RegionCaptioner.from_pretrained(folder / "merged", device="cpu")


def test_adapters_beside_the_base(captioner, tmp_path):
    captioners, requests = [captioner], [None]
    for number in (1, 2):
        folder, merged = adapter(tmp_path / str(number), number, lora_alpha=4)
        captioners.append(merged)
        requests.append(LoRARequest(f"adapter{number}", number, str(folder)))
    pairs = drawn_images(8)
    expected = [
        [texts(captions) for captions in one.caption_many(pairs, prefix_refresh_interval=0)] for one in captioners
    ]
    assert len({json.dumps(captions) for captions in expected}) == 3
    attributes = [one.attributes(*pairs[5], LONG) for one in captioners]
    with engine(enable_lora=True, max_loras=2, max_lora_rank=8) as llm:
        for request, captions, read in zip(requests, expected, attributes, strict=True):
            assert [texts(one) for one in caption_many(llm, pairs, lora_request=request)] == captions
            assert_equal(next(attributes_many(llm, pairs[5:6], LONG, lora_request=request)), read)
        check_side_by_side(llm, captioner, pairs, requests, expected)


def check_side_by_side(llm, captioner, pairs, requests, expected) -> None:
    """A third of the images with each."""
    config = llm.llm_engine.vllm_config.model_config.hf_config
    defaults = captioner.model.generation_config
    works = [region_requests(captioner.processor, config, defaults, *pair) for pair in pairs]
    flat = [(work, requests[k % 3], k) for k, passes in enumerate(works) for work in passes]
    outputs = llm.generate(
        [work.prompt for work, *_ in flat],
        [work.params for work, *_ in flat],
        lora_request=[request for _, request, _ in flat],
        use_tqdm=False,
    )
    for k, passes in enumerate(works):
        mine = [output for output, (*_, owner) in zip(outputs, flat, strict=True) if owner == k]
        assert texts(read_captions(passes, mine, captioner.processor, config)[0]) == expected[k % 3][k]


@pytest.mark.parametrize(
    "settings, names",
    [
        ({"modules_to_save": ["region_embedding"]}, "region_embedding"),
        ({"target_modules": VISION_LAYERS}, "vision_tower"),
        ({"target_modules": r".*lm_head"}, EMBEDDINGS[1]),
    ],
)
def test_an_adapter_of_more_than_the_language_model_is_to_be_merged(tmp_path, settings, names):
    folder, _ = adapter(tmp_path, 0, **settings)
    with pytest.raises(ValueError, match=f"also changes .*{names}.*pdlm-peft merge"):
        check_adapter(str(folder))


def test_an_adapter_that_is_none(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        check_adapter(str(tmp_path))
