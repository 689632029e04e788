import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from small import losses, small
from transformers import AutoModelForImageTextToText, AutoProcessor
from typer.testing import CliRunner

from pdlm_hf import CHECKPOINT, PdlmForConditionalGeneration
from pdlm_hf.adapters_pdlm import adapter_base
from pdlm_hf.errors_pdlm import CheckpointError
from pdlm_hf.generation_config_pdlm import PdlmGenerationConfig
from pdlm_hf.shapes.dataset import ShapesDataset
from pdlm_hf.training.collator import PdlmCollator
from pdlm_peft import training
from pdlm_peft.adapters import LANGUAGE_LAYERS, add_adapter, base_name, check_base, fingerprint, load_adapter, merge
from pdlm_peft.cli import app
from pdlm_peft.recipe import Adapter


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Trained with a high learning rate, so that it says something else than its base."""
    out = tmp_path_factory.mktemp("adapter") / "run"
    record = training.train(small("shapes", out, "training.max_steps=4", "training.learning_rate=2e-2"))
    assert len(losses(record["log"])) == 4
    return out


@pytest.fixture(scope="module")
def inputs():
    row = ShapesDataset(3, 2, 2)[0]
    processor = AutoProcessor.from_pretrained(CHECKPOINT)
    return processor(images=row["image"], segmentation_maps=[region["mask"] for region in row["regions"]])


def answers(model, inputs):
    plain = {k: v for k, v in inputs.items() if k not in ("region_order", "image_index")}
    with torch.no_grad():
        return model.eval()(**plain).logits, model.generate(**inputs, max_new_tokens=24).region_tokens


def test_every_way_of_loading_gives_the_same(adapter, inputs, tmp_path):
    expected, tokens = answers(load_adapter(adapter)[0], inputs)
    base = AutoModelForImageTextToText.from_pretrained(CHECKPOINT)
    assert (answers(base, inputs)[0] - expected).abs().max() > 1
    injected = AutoModelForImageTextToText.from_pretrained(CHECKPOINT)
    injected.load_adapter(str(adapter))
    plain = PeftModel.from_pretrained(base, adapter)  # knows nothing of the recipe's settings of `generate`
    assert base.generation_config.acceptance_threshold == 0.8
    base.generation_config = PdlmGenerationConfig.from_pretrained(adapter)
    ways = {
        "peft": plain,
        "load_adapter": injected,
        "auto": AutoModelForImageTextToText.from_pretrained(adapter),
    }
    for name, model in ways.items():
        logits, said = answers(model, inputs)
        assert torch.equal(logits, expected), name
        assert torch.equal(said, tokens), name
        assert model.generation_config.acceptance_threshold == 0.95, name
    assert AutoProcessor.from_pretrained(adapter).tokenizer.get_vocab() == (
        AutoProcessor.from_pretrained(CHECKPOINT).tokenizer.get_vocab()
    )


def test_merged_is_the_adapter(adapter, inputs, tmp_path):
    expected, tokens = answers(load_adapter(adapter)[0], inputs)
    result = CliRunner().invoke(app, ["merge", str(adapter), str(tmp_path / "merged")])
    assert result.exit_code == 0, result.stderr
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    logits, said = answers(merged, inputs)
    torch.testing.assert_close(logits, expected, atol=2e-3, rtol=1e-3)
    assert torch.equal(said, tokens)
    assert merged.generation_config.acceptance_threshold == 0.95
    files = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "processor_config.json"} <= files
    names = set(load_file(tmp_path / "merged" / "model.safetensors"))
    assert names == set(load_file(CHECKPOINT / "model.safetensors"))
    again = CliRunner().invoke(app, ["merge", str(adapter), str(tmp_path / "merged")])
    assert again.exit_code == 2 and "is not empty" in again.stderr
    none = CliRunner().invoke(app, ["merge", str(CHECKPOINT), str(tmp_path / "other")])
    assert none.exit_code == 2 and "there is no pdlm_base.json" in none.stderr


def test_merged_in_bfloat16(adapter, tmp_path):
    merge(adapter, tmp_path / "merged", dtype="bfloat16")
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}


def test_switches_travel(tiny_checkpoint, tmp_path):
    """A checkpoint trained "full" is adapted to "isolated": the adapter and the merged checkpoint know."""
    recipe = small("shapes_isolated", tmp_path / "run", f"model={tiny_checkpoint}")
    assert AutoModelForImageTextToText.from_pretrained(tiny_checkpoint).config.prefix_attention == "full"
    training.train(recipe)
    assert load_adapter(tmp_path / "run")[0].config.prefix_attention == "isolated"
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "run").config.prefix_attention == "isolated"
    merge(tmp_path / "run", tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["prefix_attention"] == "isolated"


# ---------------------------------------------------------------- the base


def copy_with(folder, change):
    shutil.copytree(CHECKPOINT, folder)
    weights = change(load_file(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_fingerprint_is_that_of_the_weights(tmp_path, golden_regions, golden_base):
    mine = fingerprint(CHECKPOINT)
    assert mine == fingerprint(copy_with(tmp_path / "bf16", lambda ws: {k: w.bfloat16() for k, w in ws.items()}))
    assert len({mine, fingerprint(golden_regions), fingerprint(golden_base)}) == 3

    def moved(weights):
        weights["model.language_model.layers.2.mlp.up_proj.weight"][0, 3] += 0.5
        return weights

    assert fingerprint(copy_with(tmp_path / "moved", moved)) != mine


def test_fingerprint_does_not_depend_on_the_format(golden_regions, tmp_path):
    """The reference's own folder, and the same weights written by us in many files."""
    model = AutoModelForImageTextToText.from_pretrained(golden_regions)
    model.save_pretrained(tmp_path / "ours", max_shard_size="50KB")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    assert fingerprint(tmp_path / "ours") == fingerprint(golden_regions)


def test_another_base_is_refused(adapter, tiny_checkpoint, tmp_path):
    with pytest.raises(CheckpointError, match="was trained on other weights than those of"):
        check_base(adapter, tiny_checkpoint)
    with pytest.raises(CheckpointError, match="other weights"):
        merge(adapter, tmp_path / "merged", base=tiny_checkpoint)
    assert not (tmp_path / "merged").exists()
    with pytest.raises(CheckpointError, match="other weights"):
        load_adapter(adapter, tiny_checkpoint)


def test_adapter_and_base_move_together(tiny_checkpoint, inputs, tmp_path):
    """The files name the base from where they are, and nothing of this machine."""
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(tiny_checkpoint, here / "base")
    training.train(small("shapes", here / "run", f"model={here / 'base'}", "training.learning_rate=1e-2"))
    for folder, base in ((here / "run", "../base"), (here / "run/checkpoints/checkpoint-2", "../../../base")):
        assert json.loads((folder / "pdlm_base.json").read_text())["base"] == base
        assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == base
        for path in folder.glob("*.*"):
            named = path.name in ("recipe.yaml", "training.json", "training_args.bin")  # the run as it was asked for
            assert named or str(tmp_path).encode() not in path.read_bytes(), path
    assert "base_model: ../base\n" in (here / "run/README.md").read_text()
    assert not (here / "run/checkpoints/checkpoint-2/README.md").exists()
    expected, tokens = answers(load_adapter(here / "run")[0], inputs)
    here.rename(there)
    ways = {
        "ours": load_adapter(there / "run")[0],
        "auto": AutoModelForImageTextToText.from_pretrained(there / "run"),
        "class": PdlmForConditionalGeneration.from_pretrained(there / "run"),
        "step": AutoModelForImageTextToText.from_pretrained(there / "run/checkpoints/checkpoint-2"),
    }
    for name, model in ways.items():
        logits, said = answers(model, inputs)
        assert torch.equal(logits, expected) and torch.equal(said, tokens), name


def test_a_missing_base_is_named(tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "base")
    training.train(small("shapes", tmp_path / "run", f"model={tmp_path / 'base'}"))
    (tmp_path / "base").rename(tmp_path / "moved")
    merging = ["merge", str(tmp_path / "run"), str(tmp_path / "merged")]
    refused = CliRunner().invoke(app, merging)
    assert refused.exit_code == 2
    assert "The base of the adapter" in refused.stderr and "is not at ../base" in refused.stderr
    assert f"`pdlm-peft merge {tmp_path / 'run'} OUT --base BASE`" in refused.stderr.replace("\n", " ")
    with pytest.raises(CheckpointError, match=r"is not at \.\./base.* --base BASE"):
        AutoModelForImageTextToText.from_pretrained(tmp_path / "run")
    wrong = CliRunner().invoke(app, [*merging, "--base", "no/such"])
    assert wrong.exit_code == 2 and "no/such" in wrong.stderr and "--base BASE" in wrong.stderr
    done = CliRunner().invoke(app, [*merging, "--base", str(tmp_path / "moved")])
    assert done.exit_code == 0, done.stderr


def test_names_of_bases(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models/8b").mkdir(parents=True)
    assert base_name("owner/name", tmp_path / "run") == "owner/name"
    assert base_name("models/8b", tmp_path / "runs/a") == base_name(str(tmp_path / "models/8b"), "runs/a")
    assert base_name("models/8b", tmp_path / "runs/a") == "../../models/8b"
    assert base_name("models/8b", tmp_path / "models") == "./8b"


def test_the_embedded_base_is_found_wherever_the_package_is(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "elsewhere/deep/run", ignore=shutil.ignore_patterns("checkpoints"))
    path = tmp_path / "elsewhere/deep/run/pdlm_base.json"
    noted = json.loads(path.read_text())
    assert noted["embedded"] == "checkpoint" and not noted["base"].startswith("/")
    path.write_text(json.dumps(noted | {"base": "../not/here"}))
    assert adapter_base(path.parent) == str(CHECKPOINT)


# ---------------------------------------------------------------- loss and gradients


def test_lora_starts_as_the_base_does(processor, model):
    """B = 0: the same loss, and the same gradients in what is trained in full."""
    import copy

    dataset = ShapesDataset(0, 4, 4)
    batch = PdlmCollator(processor, num_slots=24)([dataset[k] for k in range(4)])
    plain, wrapped = copy.deepcopy(model), copy.deepcopy(model)
    loss = plain(**batch).loss
    loss.backward()
    wrapped = add_adapter(wrapped, processor, Adapter(rank=4, train_embeddings=True))
    again = wrapped(**batch).loss
    again.backward()
    assert torch.equal(loss, again)
    gradients = dict(plain.named_parameters())
    compared = 0
    for name, parameter in wrapped.named_parameters():
        if ".modules_to_save.default." in name:
            own = name.removeprefix("base_model.model.").replace(".modules_to_save.default.", ".")
            torch.testing.assert_close(parameter.grad, gradients[own].grad)
            compared += 1
    assert compared == 1 + 4 + 2  # region prompts, projector, embeddings and head
    assert sum("lora_B" in name for name, _ in wrapped.named_parameters()) == 7 * 4
    assert wrapped.peft_config["default"].target_modules == LANGUAGE_LAYERS
