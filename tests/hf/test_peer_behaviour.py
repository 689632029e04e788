"""What transformers expects of any model: outputs, embeddings as input, capture by torch, round trips of files."""

import pytest
import torch
from safetensors.torch import load_file
from test_modeling import full_inputs, noisy_inputs
from tiny import lively_model, make_image
from transformers import AutoConfig, AutoModelForImageTextToText

from pdlm_hf import PdlmConfig, PdlmForConditionalGeneration, PdlmModel
from pdlm_hf.canvas_pdlm import as_bias
from pdlm_hf.conversion_pdlm import PARAMETER_PREFIXES

# ---------------------------------------------------------------- outputs


@pytest.mark.parametrize("given", ["argument", "configuration"])
def test_return_dict_false(processor, given):
    model = lively_model(processor)
    inputs, _ = full_inputs(model, processor)
    with torch.no_grad():
        expected = model(**inputs).logits
        if given == "configuration":
            model.config.return_dict = False
        found = model(**inputs, **({"return_dict": False} if given == "argument" else {}))
    assert isinstance(found, tuple) and torch.equal(found[0], expected)


def test_return_dict_false_with_labels(model, processor):
    inputs, noise = noisy_inputs(model, processor)
    expected = model(**inputs, **noise)
    loss, samples = model(**inputs, **noise, return_dict=False)
    assert loss == expected.loss and torch.equal(samples, expected.sample_losses)


@torch.no_grad()
def test_image_features_as_transformers_defines_them(model, processor):
    image, masks = make_image(0, 130, 64, 2)
    inputs = processor(images=image, segmentation_maps=masks)
    visual = (inputs["pixel_values"], inputs["region_masks"])
    output = model.get_image_features(*visual, output_hidden_states=True)
    config, tiles = model.config, len(visual[0])
    assert output.pooler_output.shape == (tiles, config.feature_grid**2, config.text_config.hidden_size)
    assert output.last_hidden_state.shape == (tiles, config.patch_grid**2, config.vision_config.hidden_size)
    # the embeddings, and every layer that is built: the last one of the configuration is not
    assert len(output.hidden_states) == config.vision_config.num_hidden_layers
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    last, pooled = model.model.get_image_features(*visual, return_dict=False)[:2]
    assert torch.equal(last, output.last_hidden_state) and torch.equal(pooled, output.pooler_output)


def test_prompts_of_overlapping_masks_add_up_mask_by_mask(processor):
    """In bfloat16, as in the reference, every sum is rounded."""
    model = lively_model(processor).bfloat16()
    side, seen = model.config.patch_grid, []
    masks = torch.ones(1, model.config.num_region_prompts, side, side, dtype=torch.uint8)
    hook = model.model.vision_tower.register_forward_hook(lambda module, args, output: seen.append(args[1]))
    with torch.no_grad():
        model.get_image_features(torch.zeros(1, 3, 64, 64, dtype=torch.bfloat16), masks)
    hook.remove()
    prompts = model.model.region_embedding.weight.detach()
    expected = prompts[0]
    for prompt in prompts[1:]:
        expected = expected + prompt
    assert torch.equal(seen[0][0], expected.expand(side * side, -1))
    assert not torch.equal(expected, prompts.float().sum(0).bfloat16())  # which is what one rounding gives


# ---------------------------------------------------------------- embeddings as input


def test_embeddings_are_read_as_ids_are(model, processor):
    inputs, _ = full_inputs(model, processor, (2, 1))
    ids = inputs.pop("input_ids")
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        expected = model(input_ids=ids, **inputs).logits
        torch.testing.assert_close(model(inputs_embeds=embeds, **inputs).logits, expected, atol=0, rtol=0)
        torch.testing.assert_close(model(input_ids=ids, inputs_embeds=embeds, **inputs).logits, expected)


def test_loss_from_embeddings(model, processor):
    inputs, noise = noisy_inputs(model, processor)
    expected = model(**inputs, **noise).loss
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    torch.testing.assert_close(model(inputs_embeds=embeds, **inputs, **noise).loss, expected, atol=0, rtol=0)


# ---------------------------------------------------------------- capture by torch


@pytest.mark.slow  # `export` below captures the same forward
@pytest.mark.parametrize("replay", ["reference", "aligned"])
def test_whole_forward_in_one_graph(processor, replay):
    model = lively_model(processor, roi_replay=replay)
    inputs, _ = full_inputs(model, processor, (2, 3))
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)


def test_export_of_the_whole_forward(processor):
    model = lively_model(processor)
    inputs, _ = full_inputs(model, processor, (2, 3))
    with torch.no_grad():
        program = torch.export.export(model, (), dict(inputs), strict=False)
        torch.testing.assert_close(program.module()(**inputs).logits, model(**inputs).logits)


def test_export_of_the_language_model(processor):
    model = lively_model(processor)
    inputs, _ = full_inputs(model, processor)
    with torch.no_grad():
        given = {"inputs_embeds": model.model.embed(**{k: v for k, v in inputs.items() if k != "attention_mask"})}
        given["position_ids"] = torch.arange(given["inputs_embeds"].shape[1])[None]
        text = model.model.language_model
        program = torch.export.export(text, (), given, strict=False)
        torch.testing.assert_close(program.module()(**given).last_hidden_state, text(**given).last_hidden_state)


# ---------------------------------------------------------------- files


def test_model_from_a_configuration_and_a_state_dict(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = PdlmForConditionalGeneration.from_pretrained(None, config=model.config, state_dict=state)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert other.generation_config.max_new_tokens is None


@pytest.mark.parametrize("folder", ["golden_regions", "tiny_checkpoint"])
def test_configuration_round_trip(request, folder, tmp_path):
    config = PdlmConfig.from_pretrained(request.getfixturevalue(folder))
    assert config._name_or_path == ""
    by_auto_class = AutoConfig.from_pretrained(request.getfixturevalue(folder))  # notes the path, for any model
    assert by_auto_class.to_dict() | {"_name_or_path": ""} == config.to_dict()
    config.save_pretrained(tmp_path)
    assert PdlmConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()


@pytest.mark.parametrize("folder", ["golden_regions", "tiny_checkpoint"])
def test_original_format_has_the_names_of_the_reference(request, folder, tmp_path):
    model = AutoModelForImageTextToText.from_pretrained(request.getfixturevalue(folder))
    model.save_pretrained(tmp_path / "theirs", save_original_format=True)
    theirs = load_file(tmp_path / "theirs" / "model.safetensors")
    assert all(name.startswith(tuple(PARAMETER_PREFIXES)) for name in theirs)
    model.save_pretrained(tmp_path / "ours")
    assert load_file(tmp_path / "ours" / "model.safetensors").keys() == model.state_dict().keys()
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "theirs")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_model_without_its_head(golden_regions):
    whole = AutoModelForImageTextToText.from_pretrained(golden_regions)
    model = PdlmModel.from_pretrained(golden_regions)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, whole.model.state_dict()[name]), name


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("keys", [1, 7, 8, 13])
def test_bias_of_a_mask(keys):
    mask = torch.rand(2, 1, 5, keys, generator=torch.Generator().manual_seed(keys)) > 0.4
    bias = as_bias(mask, torch.bfloat16)
    assert bias.dtype == torch.bfloat16 and bias.shape == mask.shape
    assert torch.equal(bias == 0, mask) and torch.equal(bias == -torch.inf, ~mask)
    assert bias.stride(2) % 8 == 0


def test_chat_makes_its_mask_once(golden_base, monkeypatch):
    from pdlm_hf import chat_denoising_pdlm

    model, calls = AutoModelForImageTextToText.from_pretrained(golden_base), []
    original = chat_denoising_pdlm.create_bidirectional_mask
    monkeypatch.setattr(
        chat_denoising_pdlm, "create_bidirectional_mask", lambda **kwargs: calls.append(1) or original(**kwargs)
    )
    ids = torch.tensor([[5, 6, 7], [5, 6, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    output = model.generate(ids, attention_mask=mask, max_new_tokens=8, block_length=4, return_dict_in_generate=True)
    assert output.num_forwards == 8 and len(calls) == 1
