import json
import re

import pytest

from pdlm_hf.errors_pdlm import SettingError
from pdlm_peft.recipe import RECIPES, known_keys, load_recipe, recipe_names

NAMES = [
    "aligned_8b",
    "attributes_8b",
    "attributes_shapes",
    "chat_8b",
    "commit_8b",
    "commit_8b_24gb",
    "commit_chat_8b",
    "commit_shapes",
    "full_8b",
    "isolated_8b",
    "lora_8b_80gb",
    "lora_8b_fsdp",
    "lora_8b_zero3",
    "qlora_8b_24gb",
    "shapes",
    "shapes_isolated",
]


def test_the_packaged_recipes():
    assert recipe_names() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_parses(name):
    recipe = load_recipe(name)
    assert recipe.training["learning_rate"] > 0
    text = (RECIPES / f"{name}.yaml").read_text()
    assert ("Not run on this hardware" in text) == name.endswith(("8b", "gb", "fsdp", "zero3"))


def test_the_papers_setting():
    recipe = load_recipe("full_8b")
    training = recipe.training
    assert recipe.adapter is None and recipe.freeze == []
    assert (training["learning_rate"], training["lr_scheduler_type"], training["warmup_steps"]) == (
        4e-5,
        "cosine",
        0.03,
    )
    rows = training["per_device_train_batch_size"] * training["gradient_accumulation_steps"] * recipe.hardware.devices
    assert rows == 256
    assert recipe.data.prompt_ids == "random" and recipe.data.num_slots is None and recipe.data.partition == "shuffle"


def test_checkpointing_under_either_name(tmp_path):
    """The recipes say it as transformers does from 5.23 on; users' older ones may say it as before."""
    for name in NAMES:
        text = (RECIPES / f"{name}.yaml").read_text()
        assert "gradient_checkpointing" not in text and ("activation_checkpointing: true" in text) == ("8b" in name)
    for key in ("activation_checkpointing", "gradient_checkpointing"):
        recipe = load_recipe(
            "lora_8b_80gb", [f"training.{key}=false", f"training.{key}_kwargs={{use_reentrant: true}}"]
        )
        assert recipe.training["activation_checkpointing"] is False
        assert recipe.training["activation_checkpointing_kwargs"] == {"use_reentrant": True}
        assert not any(name.startswith("gradient_check") for name in recipe.training)
    mine = tmp_path / "mine.yaml"
    mine.write_text("model: shapes\noutput: x\ndtype: float32\ntraining: {gradient_checkpointing: true}\n")
    assert load_recipe(str(mine)).training == {"activation_checkpointing": True}
    mine.write_text(mine.read_text().replace("{", "{activation_checkpointing: false, "))
    with pytest.raises(SettingError, match="`gradient_checkpointing` is the older name of `activation_checkpointing`"):
        load_recipe(str(mine))


def test_what_the_adaptations_switch():
    assert load_recipe("isolated_8b").switches.prefix_attention == "isolated"
    assert load_recipe("aligned_8b").switches.roi_replay == "aligned"
    assert load_recipe("qlora_8b_24gb").quantize == "4bit"


def test_overrides():
    changes = ["adapter.rank=4", "data.num_slots=[8, 12]", "training.learning_rate=2e-4", "training.run_name=x"]
    recipe = load_recipe("shapes", [*changes, "samples.every=0", "hardware.memory=null"])
    assert recipe.adapter.rank == 4
    assert recipe.data.num_slots == (8, 12)
    assert recipe.training["learning_rate"] == 2e-4
    assert recipe.training["run_name"] == "x"
    assert load_recipe("shapes", ["adapter=null"]).adapter is None
    assert load_recipe("shapes", ["training.eval_strategy=no"]).training["eval_strategy"] == "no"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.rnk=4", "unknown key `adapter.rnk`; did you mean `adapter.rank`?"),
        ("training.learning_rte=1", "did you mean `training.learning_rate`?"),
        ("learning_rate=1", "did you mean `training.learning_rate`?"),
        ("adapter.rank=0", "`adapter.rank`: Input should be greater than or equal to 1, got 0"),
        ("data.kind=video", "`data.kind`: Input should be 'regions', 'chat' or 'drawn', got 'video'"),
        ("adapter.rank", "expected key=value"),
        ("training.seed=3", "`training.seed` cannot be set here: set `seed`"),
        ("training.save_steps=7", "must be a multiple of `training.logging_steps`"),
        ("training.logging_steps=0", "`training.logging_steps` (0), both at least 1"),
        ("quantize=4bit adapter=null", "4-bit weights cannot be trained"),
        ("dtype=bfloat16", "needs `training.bf16: true`"),
        ("dtype=bfloat16 training.bf16=true adapter=null", "set dtype=float32"),
        ("adapter.new_words=[zebra] adapter.train_embeddings=false", "`adapter.new_words` need"),
        ("data.num_slots=[9,3]", "from low to high"),
        ("freeze=[vision_tower]", "`freeze` is for runs without `adapter`"),
        ("data.train=x.json", "`data.kind: drawn` draws its images"),
        ("generation.acceptance_threshold=2", "`generation`: `acceptance_threshold` must be in"),
        ("generation.treshold=0.9", "unknown key `generation.treshold`"),
        ("data.streaming=true training.max_steps=-1", "needs `training.max_steps`"),
        ("data.streaming=true data.kind=drawn", "`data.streaming` is for `data.kind: regions`, got drawn"),
        ("training.learning_rate=fast", "`training.learning_rate`: expected float, got 'fast'."),
        ("training.max_steps=2.5", "`training.max_steps`: expected int, got 2.5."),
        ("training.max_steps=true", "`training.max_steps`: expected int, got True."),
        ("training.bf16=maybe", "`training.bf16`: expected bool, got 'maybe'."),
        ("training.warmup_steps=[1]", "`training.warmup_steps`: expected float, got [1]."),
        ("training.weight_decay=.nan", "`training.weight_decay`: expected float, got nan."),
        ("training.save_total_limit=x", "`training.save_total_limit`: expected int or null, got 'x'."),
        (
            "training.per_device_train_batch_size=0",
            "`training.per_device_train_batch_size` must be at least 1, got 0.",
        ),
        ("training.gradient_accumulation_steps=-1", "must be at least 1, got -1."),
        ("samples.every=5 training.fsdp=full_shard", "`samples.every` writes captions in one process"),
        ("samples.every=5 training.deepspeed={zero_optimization: {stage: 3}}", "Set samples.every=0"),
        ("data.max_length=10", "`data.max_length` is for `data.kind: chat`, got drawn"),
        ("data.streaming=true data.kind=chat", "`data.streaming` is for `data.kind: regions`, got chat"),
    ],
)
def test_bad_overrides(override, message):
    with pytest.raises(SettingError) as error:
        load_recipe("shapes", re.split(r" (?=[\w.]+=)", override))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_files(tmp_path):
    with pytest.raises(SettingError, match="no recipe 'shape'. Give a YAML file or one of: aligned_8b"):
        load_recipe("shape")
    path = tmp_path / "mine.yaml"
    for text, message in (
        ("model: [", "not valid YAML"),
        ("- 1", "expected a mapping of keys to values, got list"),
        ("model: shapes", "`output` is missing"),
        ("model: shapes\noutput: x\nadaptor: null", "unknown key `adaptor`; did you mean `adapter`?"),
        ("model: shapes\noutput: x\ntraining: {lr: 1}", "unknown key `training.lr`"),
    ):
        path.write_text(text)
        with pytest.raises(SettingError) as error:
            load_recipe(str(path))
        assert message in str(error.value)


@pytest.mark.parametrize(("name", "kind"), [("fsdp", "FSDP"), ("zero3", "DEEPSPEED")])
def test_accelerate_reads_its_configuration(name, kind):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(RECIPES / "accelerate" / f"{name}.yaml"))
    assert config.distributed_type == kind
    assert config.num_processes == load_recipe(f"lora_8b_{name}").hardware.devices


def test_known_keys():
    assert {"model", "adapter.rank", "data.num_slots", "training.fsdp", "hardware.memory"} <= set(known_keys())


def test_numbers_as_texts_are_numbers(tmp_path):
    changes = ["training.learning_rate='3e-4'", "training.num_train_epochs='2'", "training.save_steps=300"]
    training = load_recipe("shapes", changes).training
    assert (training["learning_rate"], training["num_train_epochs"], training["save_steps"]) == (3e-4, 2.0, 300)


@pytest.mark.parametrize("stage", [2, 3])
def test_samples_with_a_file_of_deepspeed(tmp_path, stage):
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    changes = [f"training.deepspeed={path}", "samples.every=5"]
    if stage == 2:
        assert load_recipe("shapes", changes).samples.every == 5
    else:
        with pytest.raises(SettingError, match="FSDP or ZeRO-3: the run would hang"):
            load_recipe("shapes", changes)
