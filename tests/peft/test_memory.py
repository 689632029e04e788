import json

import pytest
import torch
from small import small
from typer.testing import CliRunner

from pdlm_hf.errors_pdlm import SettingError
from pdlm_hf.shapes.dataset import ShapesDataset
from pdlm_hf.training.collator import PdlmCollator
from pdlm_peft.adapters import add_adapter
from pdlm_peft.cli import app
from pdlm_peft.memory import GB, activations, device_memory, estimate, load_config, optimizer_bytes, refuse
from pdlm_peft.plan import RowSize
from pdlm_peft.recipe import Adapter, load_recipe, recipe_names
from pdlm_peft.training import load
from tools.shapes.model import build_model


def kept_bytes(model, batch):
    """What autograd keeps of a forward pass, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen, alive = {}, []

    def pack(tensor):
        alive.append(tensor)  # or its storage is used again
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train()(**batch)
    return sum(seen.values())


@pytest.mark.parametrize(("hidden", "mlp", "layers"), [(128, 384, 4), (256, 768, 8), (128, 1536, 4)])
def test_activations_are_what_autograd_keeps(processor, hidden, mlp, layers):
    heads = {"num_attention_heads": hidden // 32, "num_key_value_heads": hidden // 32}
    sizes = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "vocab_size": 512}
    model = add_adapter(build_model(processor, text_config=sizes | heads), processor, Adapter(rank=4))
    dataset = ShapesDataset(3, 8, 8)
    batch = PdlmCollator(processor, num_slots=24, noise_floor=0.99)([dataset[k] for k in range(8)])
    rows, tokens = batch["input_ids"].shape
    row = RowSize(len(batch["pixel_values"]) // rows, tokens, int((batch["labels"] != -100).sum()) // rows)
    ratio = activations(model.config, row, rows, 4, False) / kept_bytes(model, batch)
    assert 1.0 < ratio < 1.35


def test_parameters_of_the_8b():
    recipe = load_recipe("lora_8b_80gb")
    found = estimate(recipe, load_config(recipe))
    layers, hidden, mlp = 32, 4096, 12288
    rank = recipe.adapter.rank
    assert found.trainable["LoRA"] == layers * rank * (4 * 2 * hidden + 3 * (hidden + mlp))
    assert found.trainable["projector"] == 4608 * 4096 + 4096 + 4096 * 4096 + 4096
    assert found.trainable["region prompts"] == 6 * 1152
    assert found.parameters["embeddings and head"] == 2 * 126464 * 4096
    assert found.parameters["language model"] == pytest.approx(6.98e9, rel=1e-3)
    assert found.steps is None and found.hours(100) is None


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_fits_its_hardware(name):
    recipe = load_recipe(name)
    refuse(estimate(recipe, load_config(recipe)), recipe.hardware.memory or 16)


def test_what_a_choice_costs():
    def memory(*overrides):
        recipe = load_recipe("lora_8b_80gb", overrides)
        return estimate(recipe, load_config(recipe)).memory

    plain = memory()
    assert memory("quantize=4bit")["weights"] < 0.45 * plain["weights"]
    assert memory("training.activation_checkpointing=false")["activations"] > 5 * plain["activations"]
    assert memory("adapter.train_embeddings=true")["optimizer"] == pytest.approx(
        plain["optimizer"] + 8 * 2 * 126464 * 4096
    )
    full = memory("adapter=null", "dtype=float32")
    assert full["weights"] + full["gradients"] + full["optimizer"] == pytest.approx(16 * 8.449e9, rel=1e-3)
    shared = memory("hardware.devices=8", "hardware.shard=full")
    assert shared["weights"] == pytest.approx(plain["weights"] / 8)


def test_refusal_says_what_helps():
    recipe = load_recipe("lora_8b_80gb")
    with pytest.raises(SettingError, match=r"needs about \d+\.\d GB .* 24 GB .*batch_size=1 .*qlora_8b_24gb"):
        refuse(estimate(recipe, load_config(recipe)), 24)


def test_each_process_asks_its_own_device(monkeypatch):
    sizes = {0: 24e9, 1: 80e9}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, sizes[device]))
    assert device_memory(load_recipe("lora_8b_80gb"), False) == 24
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device_memory(load_recipe("lora_8b_80gb"), False) == 80


def test_parameters_are_those_of_the_model(tmp_path):
    """The meta model against the one that is trained."""
    recipe = small("shapes", tmp_path)
    model, _ = load(recipe)
    found = estimate(recipe, load_config(recipe))
    assert sum(found.parameters.values()) == sum(p.numel() for p in model.parameters())
    assert sum(found.trainable.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found.total > found.memory["activations"] > 0.01 * GB


def test_the_command(tmp_path):
    dry = CliRunner().invoke(app, ["train", "lora_8b_80gb", "--dry-run"])
    assert dry.exit_code == 0 and "77,609,728" in dry.stderr
    refused = CliRunner().invoke(app, ["train", "lora_8b_80gb", "--dry-run", "--memory", "20"])
    assert refused.exit_code == 2 and refused.stderr.splitlines()[-1].startswith("pdlm-peft: The run needs about")
    shape = CliRunner().invoke(app, ["train", "lora_8b_80gb"])
    assert shape.exit_code == 2 and "is a shape for --dry-run" in shape.stderr
    missing = CliRunner().invoke(app, ["train", "lora_8b_80gb", "model=shapes", f"output={tmp_path}/x"])
    assert missing.exit_code == 2 and "there is no file train.json" in missing.stderr
    assert CliRunner().invoke(app, ["train", "--list"]).stdout.count("\n") == len(recipe_names())


OPTIMIZERS = {
    "adamw_torch": 8,
    "adamw_8bit": 2,
    "paged_adamw_8bit": 2,
    "paged_adamw_32bit": 8,
    "adamw_torch_4bit": 1,
    "adafactor": 0.1,
    "sgd": 0,
    "lion_32bit": 4,
    "lion_8bit": 1,
    "rmsprop": 4,
    "adagrad": 4,
    "ademamix": 12,
    "ademamix_8bit": 3,
    "schedule_free_adamw": 8,
    "lomo": 0.1,
}


@pytest.mark.parametrize(("name", "size"), OPTIMIZERS.items())
def test_memory_of_the_chosen_optimizer(name, size):
    recipe = load_recipe("lora_8b_80gb", [f"training.optim={name}"])
    found = estimate(recipe, load_config(recipe))
    assert found.memory["optimizer"] == pytest.approx(size * sum(found.trainable.values()))


def test_states_that_torch_keeps():
    """What the optimizers of torch really keep per value."""
    kept = {}
    for name, kind in (("adamw_torch", torch.optim.AdamW), ("rmsprop", torch.optim.RMSprop), ("sgd", torch.optim.SGD)):
        weight = torch.nn.Parameter(torch.zeros(1000))
        optimizer = kind([weight], lr=0.1)
        weight.grad = torch.ones(1000)
        optimizer.step()
        states = [t for t in optimizer.state[weight].values() if torch.is_tensor(t) and t.numel() == 1000]
        kept[name] = sum(t.nbytes for t in states) / 1000
    assert kept == {name: OPTIMIZERS[name] for name in kept}
    assert optimizer_bytes({"optim": "sgd", "optim_args": "momentum=0.9"}) == 4 and optimizer_bytes({}) == 8


DRY = [
    "train",
    "lora_8b_80gb",
    "--dry-run",
    "model=shapes",
    "data.held_out=null",
    "dtype=float32",
    "data.train={rows}",
]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["training.deepspeed=none.json"], "`training.deepspeed`: there is no file none.json"),
        (["training.fsdp_config=none.json"], "`training.fsdp_config`: there is no file none.json"),
        (["training.accelerator_config={rows}"], "rows.jsonl is not a JSON file of settings"),
        (["data.train=none.jsonl"], "`data.train`: there is no file none.jsonl"),
        (["data.held_out=none.jsonl"], "`data.held_out`: there is no file none.jsonl"),
        (["data.held_out={bad}"], "row 1: regions[0].caption: got nothing"),
        (["data.train={bad}"], "row 1: regions[0].caption: got nothing"),
        (["data.images=none"], "`data.images`: there is no folder none"),
        (["model=shapes_base"], "is a base (chat) checkpoint without region prompts"),
        (["model=none"], "none has no configuration"),
        (["training.optim=foo"], "`training`: foo is not a valid OptimizerNames"),
        (["training.lr_scheduler_type=foo"], "`training`: foo is not a valid SchedulerType"),
        (["training.report_to=foo"], "`training.report_to`: foo is unknown or not installed"),
        (["samples.every=5", "hardware.shard=full"], "`samples.every` writes captions in one process"),
        (["adapter.train_embeddings=true", "adapter.new_words=[{words}]"], "`adapter.new_words`: 999 are too many"),
        (["output={other}"], "recipe.yaml"),
    ],
)
def test_a_dry_run_finds_what_the_run_would_refuse(tmp_path, changes, message):
    row = {"image": "a.png", "width": 9, "height": 9, "regions": [{"bbox": [0, 0, 5, 5], "caption": "x"}]}
    places = {"rows": tmp_path / "rows.jsonl", "bad": tmp_path / "bad.jsonl", "other": tmp_path / "other"}
    places["words"] = ",".join(f"zz{k}" for k in range(999))
    places["rows"].write_text(json.dumps(row) + "\n" + json.dumps(row) + "\n")
    places["bad"].write_text('{"image": "a.png", "regions": [{"bbox": [0, 0, 9, 9]}]}\n')
    places["other"].mkdir()
    (places["other"] / "notes.txt").write_text("mine")
    fill = lambda texts: [text.format(**places) if "{" in text else text for text in texts]  # noqa: E731
    sound = CliRunner().invoke(app, fill([*DRY, f"output={tmp_path}/run"]))
    assert sound.exit_code == 0, sound.stderr
    result = CliRunner().invoke(app, fill([*DRY, f"output={tmp_path}/run", *changes]))
    assert result.exit_code == 2 and len(result.stderr.splitlines()) == 1, result.stderr
    assert message in result.stderr or message == "recipe.yaml" and "other" in result.stderr
