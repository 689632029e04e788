import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForImageTextToText

from pdlm_hf import PdlmForConditionalGeneration, PdlmGenerationConfig
from pdlm_hf.conversion_pdlm import PARAMETER_PREFIXES

UNUSED = ("vision_model.text_model.", "vision_model.logit_", "vision_model.vision_model.head.")


def load(path, **kwargs):
    return AutoModelForImageTextToText.from_pretrained(path, **kwargs)


def assert_same_weights(model, other):
    left, right = model.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize("folder", ["golden_regions", "golden_base"])
def test_reference_names_load_completely(request, folder):
    path = request.getfixturevalue(folder)
    model, info = load(path, output_loading_info=True)
    assert {name: list(found) for name, found in info.items() if found} == {}
    file = load_file(path / "model.safetensors")
    state = model.state_dict()
    used = 0
    for theirs, tensor in file.items():
        prefix = next((p for p in PARAMETER_PREFIXES if theirs.startswith(p)), None)
        ours = prefix and PARAMETER_PREFIXES[prefix] + theirs.removeprefix(prefix)
        if ours in state:
            used += 1
            assert torch.equal(state[ours], tensor), theirs
        else:
            last = model.config.vision_config.num_hidden_layers - 1
            unused = (*UNUSED, "vision_model.vision_model.post_layernorm.")
            assert theirs.startswith((*unused, f"vision_model.vision_model.encoder.layers.{last}.")), theirs
    assert used == len(list(model.parameters()))


@pytest.mark.parametrize("missing", ["mask_id_embedding.weight", "language_model.lm_head.weight"])
def test_a_missing_weight_is_reported(golden_regions, tmp_path, missing):
    path = shutil.copytree(golden_regions, tmp_path / "cut", copy_function=shutil.copyfile)
    weights = load_file(path / "model.safetensors")
    del weights[missing]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    _, info = load(path, output_loading_info=True)
    assert len(info["missing_keys"]) == 1


@pytest.mark.parametrize("original_format", [True, False])
def test_saved_model_reloads_bit_equal(golden_regions, tmp_path, original_format):
    model = load(golden_regions)
    model.save_pretrained(tmp_path, save_original_format=original_format)
    names = load_file(tmp_path / "model.safetensors").keys()
    assert ("mask_id_embedding.weight" in names) == original_format
    assert ("model.region_embedding.weight" in names) == (not original_format)
    assert not any("text_model" in name or "head.probe" in name for name in names)
    again, info = load(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert_same_weights(again, model)
    assert again.config.roi_replay == "reference"
    # no pickle anywhere
    assert not list(tmp_path.glob("*.bin")) and not list(tmp_path.glob("*.pt"))


def test_sharded_save_reloads_bit_equal(golden_regions, tmp_path):
    model = load(golden_regions)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert_same_weights(load(tmp_path), model)


def test_sharded_reference_folder_loads(golden_regions, tmp_path):
    path = shutil.copytree(golden_regions, tmp_path / "sharded", copy_function=shutil.copyfile)
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    index = {}
    names = sorted(weights)
    for shard in range(3):
        file = f"model-{shard + 1:05d}-of-00003.safetensors"
        part = {name: weights[name] for name in names[shard::3]}
        save_file(part, path / file, metadata={"format": "pt"})
        index |= dict.fromkeys(part, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    model, info = load(path, output_loading_info=True)
    assert not any(info.values())
    assert_same_weights(model, load(golden_regions))


def test_device_map_auto(golden_regions):
    assert_same_weights(load(golden_regions, device_map="auto").cpu(), load(golden_regions))


def test_dtype(golden_regions, tmp_path):
    half = load(golden_regions, dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    half.save_pretrained(tmp_path)
    assert load(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert load(tmp_path, dtype=torch.float32).dtype == torch.float32
    assert load(golden_regions, dtype="auto").dtype == torch.float32


@pytest.mark.parametrize("auto_class", [AutoModel, AutoModelForImageTextToText, PdlmForConditionalGeneration])
@pytest.mark.parametrize("kwargs", [{}, {"use_safetensors": None}, {"use_safetensors": False}])
def test_pickled_weights_are_refused(golden_regions, tmp_path, auto_class, kwargs):
    path = shutil.copytree(golden_regions, tmp_path / "pickle", copy_function=shutil.copyfile)
    torch.save(load_file(path / "model.safetensors"), path / "pytorch_model.bin")
    (path / "model.safetensors").unlink()
    with pytest.raises((OSError, ValueError), match="safetensors"):
        auto_class.from_pretrained(path, **kwargs)


def test_generation_config_survives(golden_regions, tmp_path):
    model = load(golden_regions)
    assert type(model.generation_config) is PdlmGenerationConfig
    assert model.generation_config.to_diff_dict().keys() <= {"transformers_version"}
    model.generation_config = PdlmGenerationConfig(max_new_tokens=7, acceptance_threshold=0.5, remasking="random")
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path).generation_config
    assert type(loaded) is PdlmGenerationConfig
    assert (loaded.max_new_tokens, loaded.acceptance_threshold, loaded.remasking) == (7, 0.5, "random")
    assert loaded.temperature is None


def test_a_generation_config_of_transformers_does_not_stop_the_loading(golden_regions, tmp_path):
    folder = tmp_path / "released"
    shutil.copytree(golden_regions, folder)
    written = {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2, "use_cache": False, "num_beams": 4}
    (folder / "generation_config.json").write_text(json.dumps(written | {"transformers_version": "4.51.0"}))
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert model.generation_config.eos_token_id == 2
    assert not hasattr(model.generation_config, "num_beams")


def test_offloaded_region_embedding(golden_regions, tmp_path):
    """`device_map` may put any module on the disk; all must be used through their hooks."""
    whole = AutoModelForImageTextToText.from_pretrained(golden_regions)
    parts = dict.fromkeys(("model.vision_tower", "model.multi_modal_projector", "model.language_model"), "cpu")
    parts |= {"model.region_embedding": "disk", "lm_head": "disk"}
    offloaded = AutoModelForImageTextToText.from_pretrained(
        golden_regions, device_map=parts, offload_folder=tmp_path / "offload"
    )
    pixels = torch.randn(1, 3, *[whole.config.vision_config.image_size] * 2)
    masks = torch.zeros(1, whole.config.num_region_prompts, *[whole.config.patch_grid] * 2)
    masks[0, 1, :2, :2] = 1
    with torch.no_grad():
        expected = whole.model.get_image_features(pixels, masks).pooler_output
        torch.testing.assert_close(offloaded.model.get_image_features(pixels, masks).pooler_output, expected)


def test_offloaded_embeddings(golden_regions, tmp_path):
    """Patch and position embeddings are used through the module that holds them, and so through its hook."""
    whole = AutoModelForImageTextToText.from_pretrained(golden_regions)
    parts = dict.fromkeys(("model.multi_modal_projector", "model.language_model", "model.region_embedding"), "cpu")
    parts |= {"model.vision_tower.encoder": "cpu", "model.vision_tower.post_layernorm": "cpu", "lm_head": "cpu"}
    parts |= {"model.vision_tower.embeddings": "disk"}
    offloaded = AutoModelForImageTextToText.from_pretrained(
        golden_regions, device_map=parts, offload_folder=tmp_path / "offload"
    )
    pixels = torch.randn(1, 3, *[whole.config.vision_config.image_size] * 2)
    with torch.no_grad():
        expected = whole.model.get_image_features(pixels).pooler_output
        torch.testing.assert_close(offloaded.model.get_image_features(pixels).pooler_output, expected)
