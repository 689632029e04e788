"""PEFT's methods on the region model: what is trained is what is saved, loaded and merged."""

import copy
import warnings

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from transformers import AutoModelForImageTextToText, AutoProcessor

from pdlm_hf import CHECKPOINT
from pdlm_hf.shapes.dataset import ShapesDataset
from pdlm_hf.training.collator import PdlmCollator
from pdlm_peft.recipe import load_recipe

LINEAR = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
LORA = {"r": 2, "lora_alpha": 8, "target_modules": LINEAR}
FULL = ["region_embedding", "multi_modal_projector", "embed_tokens", "lm_head"]
METHODS = {
    "lora": LoraConfig(**LORA),
    "causal_lm": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    "dora": LoraConfig(use_dora=True, **LORA),
    "dora_embeddings": LoraConfig(use_dora=True, r=2, target_modules=["embed_tokens", "q_proj"]),
    "rslora": LoraConfig(use_rslora=True, **LORA),
    "all_linear": LoraConfig(r=2, target_modules="all-linear"),
    "modules_to_save": LoraConfig(modules_to_save=FULL, **LORA),
    "trainable_tokens": LoraConfig(trainable_token_indices=[*range(40)], **LORA),
    "ia3": peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "lokr": peft.LoKrConfig(r=2, alpha=8, target_modules=LINEAR),
    "loha": peft.LoHaConfig(r=2, alpha=8, target_modules=LINEAR),
    "oft": peft.OFTConfig(oft_block_size=8, target_modules=LINEAR),
}


@pytest.fixture(scope="module")
def base():
    """The embedded checkpoint. Not to be changed by a test."""
    return load(CHECKPOINT).eval()


@pytest.fixture(scope="module")
def batch():
    row = ShapesDataset(0, 2, 2)[0] | {"seed": 0}
    return PdlmCollator(AutoProcessor.from_pretrained(CHECKPOINT), num_slots=24)([row])


@pytest.fixture(scope="module")
def inputs():
    row = ShapesDataset(3, 2, 2)[0]
    masks = [region["mask"] for region in row["regions"]]
    return AutoProcessor.from_pretrained(CHECKPOINT)(images=row["image"], segmentation_maps=masks)


@pytest.fixture(scope="module")
def untrained(base, inputs):
    return logits(base, inputs), captions(base, inputs)


def load(folder):
    return AutoModelForImageTextToText.from_pretrained(folder)


@torch.no_grad()
def logits(model, inputs):
    return model.eval()(**{k: v for k, v in inputs.items() if k not in ("region_order", "image_index")}).logits


def captions(model, inputs):
    return model.eval().generate(**inputs, max_new_tokens=12, max_denoising_steps=3).region_tokens


def train(base, config, batch, seed=0):
    """A copy of the base with a new adapter, a few steps old."""
    torch.manual_seed(seed)
    wrapped = get_peft_model(copy.deepcopy(base), copy.deepcopy(config)).train()
    batch = batch | {"labels": torch.where(batch["labels"] == -100, -100, 7)}  # what it would never say
    rate = 0.3 if isinstance(config, peft.IA3Config) else 0.02  # IA3 has a factor per channel only
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=rate)
    for _ in range(6):
        wrapped(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return wrapped


def close(got, expected, tolerance=1e-5):
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=1e-5)


MERGED = 5e-5  # of logits up to 10: an adapter is added to weights, which rounds them; 1.7e-5 measured


@pytest.mark.parametrize("name", METHODS)
def test_trained_reloaded_merged(name, base, untrained, batch, inputs, tmp_path):
    trained = train(base, METHODS[name], batch)
    expected, said = logits(trained, inputs), captions(trained, inputs)
    assert (expected - untrained[0]).abs().max() > 0.1
    assert not torch.equal(said, untrained[1])
    trained.save_pretrained(tmp_path)
    wrapped = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    injected = copy.deepcopy(base)
    found = injected.load_adapter(str(tmp_path))
    assert not found.missing_keys and not found.unexpected_keys
    for model in (wrapped, injected, load(tmp_path)):
        close(logits(model, inputs), expected)
        assert torch.equal(captions(model, inputs), said)
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped, inputs), untrained[0])
    wrapped.merge_adapter()
    close(logits(wrapped, inputs), expected, MERGED)
    wrapped.unmerge_adapter()
    close(logits(wrapped, inputs), expected, MERGED)
    merged = wrapped.merge_and_unload()
    assert merged is wrapped.get_base_model() and not any("lora" in name for name, _ in merged.named_modules())
    close(logits(merged, inputs), expected, MERGED)
    assert torch.equal(captions(merged, inputs), said)


def test_auto_peft_for_causal_lm(base, batch, inputs, tmp_path):
    trained = train(base, METHODS["causal_lm"], batch)
    assert type(trained) is peft.PeftModelForCausalLM
    model = trained.get_base_model()
    settings, method = model.generation_config, model.prepare_inputs_for_generation
    said = captions(trained, inputs)
    assert model.generation_config is settings and model.prepare_inputs_for_generation == method
    assert trained.base_model.prepare_inputs_for_generation == method
    trained.save_pretrained(tmp_path)
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, inputs), logits(trained, inputs))
    assert torch.equal(captions(again, inputs), said)


def test_all_linear_is_everything_but_the_head(base):
    """The vision tower and the projector too: PEFT takes the whole model's linear layers."""
    wrapped = get_peft_model(copy.deepcopy(base), METHODS["all_linear"])
    adapted = {name.rpartition(".lora_A")[0] for name, _ in wrapped.named_parameters() if ".lora_A." in name}
    linear = {name for name, module in base.named_modules() if isinstance(module, torch.nn.Linear)}
    assert {name.removeprefix("base_model.model.") for name in adapted} == linear - {"lm_head"}


def two_adapters(base, batch, inputs, folder):
    """Folders of two adapters, and the logits with each."""
    found = []
    for seed in range(2):
        trained = train(base, METHODS["lora"], batch, seed=seed)
        trained.save_pretrained(folder / str(seed))
        found.append(logits(trained, inputs))
    assert (found[0] - found[1]).abs().max() > 0.1
    return [str(folder / "0"), str(folder / "1")], found


def test_several_adapters(base, batch, inputs, tmp_path):
    """Added, switched, combined; each as it is alone."""
    folders, alone = two_adapters(base, batch, inputs, tmp_path)
    both = PeftModel.from_pretrained(copy.deepcopy(base), folders[0], adapter_name="one")
    both.load_adapter(folders[1], adapter_name="two")
    for name, expected in (("two", alone[1]), ("one", alone[0])):
        both.set_adapter(name)
        close(logits(both, inputs), expected)
    both.add_weighted_adapter(["one", "two"], [0.5, 0.25], "mix", combination_type="cat")
    both.set_adapter("mix")
    assert min((logits(both, inputs) - single).abs().max() for single in alone) > 0.1
    layer = both.get_submodule("base_model.model.model.language_model.layers.0.self_attn.q_proj")
    one, two, mix = (layer.get_delta_weight(name) for name in ("one", "two", "mix"))
    close(mix, 0.5 * one + 0.25 * two)
    both.delete_adapter("mix")
    both.set_adapter("one")
    close(logits(both, inputs), alone[0])


def test_hotswap(base, batch, inputs, tmp_path):
    """The weights of another adapter in the place of the first, in both integrations."""
    folders, alone = two_adapters(base, batch, inputs, tmp_path)
    injected = copy.deepcopy(base)
    injected.load_adapter(folders[0])
    injected.load_adapter(folders[1], adapter_name="default", hotswap=True)
    close(logits(injected, inputs), alone[1])
    wrapped = PeftModel.from_pretrained(copy.deepcopy(base), folders[0])
    hotswap_adapter(wrapped, folders[1], adapter_name="default")
    close(logits(wrapped, inputs), alone[1])


def test_weights_without_a_place_are_refused(base, tmp_path):
    get_peft_model(copy.deepcopy(base), METHODS["lora"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text().replace("self_attn", "elsewhere"))  # as if attention were not to be adapted
    with pytest.raises(ValueError, match=r"32 weights of the adapter .* find no place in the model, .*lora_A"):
        copy.deepcopy(base).load_adapter(str(tmp_path))


# ---------------------------------------------------------------- virtual tokens

TOKENS = {"num_virtual_tokens": 4}
VIRTUAL = [
    peft.PromptTuningConfig(**TOKENS),
    peft.PrefixTuningConfig(**TOKENS),
    peft.PromptEncoderConfig(**TOKENS),
    peft.MultitaskPromptTuningConfig(num_tasks=2, **TOKENS),
    peft.CPTConfig(task_type="CAUSAL_LM", cpt_token_ids=[1, 2], cpt_mask=[1, 1], cpt_tokens_type_mask=[1, 1]),
]


@pytest.mark.parametrize("config", VIRTUAL, ids=lambda config: config.peft_type.value)
def test_virtual_tokens_are_refused(config, base):
    for task in ("CAUSAL_LM", "FEATURE_EXTRACTION", "SEQ_2_SEQ_LM"):
        config = copy.deepcopy(config)
        config.task_type = task
        with pytest.raises(ValueError, match=r"virtual tokens \(prompt tuning, prefix tuning, p-tuning.* Use LoRA"):
            get_peft_model(copy.deepcopy(base), config)
    name = config.peft_type.value
    with pytest.raises(ValueError, match=rf"adapted by {name} \({type(config).__name__}\): virtual tokens"):
        copy.deepcopy(base).add_adapter(config)
    for written in (name, name.lower()):
        with pytest.raises(ValueError, match=rf"`adapter`: .*adapted by {written}: virtual tokens"):
            load_recipe("shapes", [f"adapter={{peft_type: {written}}}"])


def test_virtual_tokens_of_a_folder_are_refused(tmp_path):
    peft.PromptTuningConfig(task_type="CAUSAL_LM", base_model_name_or_path=str(CHECKPOINT), **TOKENS).save_pretrained(
        tmp_path
    )
    for way in (load, load(CHECKPOINT).load_adapter):
        with pytest.raises(ValueError, match="virtual tokens .* Use LoRA"):
            way(str(tmp_path))


def test_adaption_prompts_are_refused(base):
    config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="(?i)adaption prompt"):  # PEFT knows the architectures that it works for
        get_peft_model(copy.deepcopy(base), config)
    with pytest.raises(ValueError, match="adapted by ADAPTION_PROMPT .* Use LoRA"):
        copy.deepcopy(base).add_adapter(config)
    with pytest.raises(ValueError, match="recipes train LoRA; remove `peft_type`"):
        load_recipe("shapes", ["adapter={peft_type: OFT}"])


def test_wrapping_warns_of_nothing(base):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model(copy.deepcopy(base), METHODS["causal_lm"])
