import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import torch
from PIL import Image
from small import ROOT, SMALL, chat_rows, losses, region_rows, run, small
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.quantizers.quantizers_utils import should_convert_module

import pdlm_hf
from pdlm_hf import BASE_CHECKPOINT, CHECKPOINT, PdlmBaseConfig, PdlmConfig
from pdlm_hf.errors_pdlm import DataError, SettingError
from pdlm_hf.training.collator import PdlmCollator, partition_regions
from pdlm_peft import plan as plan_module
from pdlm_peft import training
from pdlm_peft.adapters import base_name
from pdlm_peft.checks import check_run
from pdlm_peft.data import ChatDataset
from pdlm_peft.memory import estimate_recipe
from pdlm_peft.plan import (
    RowSize,
    StreamedRows,
    TrainingRows,
    chat_sizes,
    cut,
    held_out_rows,
    measure_row,
    plan,
    sizes_of,
)
from pdlm_peft.recipe import Data, load_recipe, recipe_names
from pdlm_peft.shapes import NEW_DOMAIN, PATTERNS, WORDS


@pytest.fixture(scope="module")
def shapes_processor():
    return AutoProcessor.from_pretrained(CHECKPOINT)


@pytest.fixture
def own_rows(monkeypatch):
    """Region and chat rows of ours in place of files."""
    real = training.open_dataset

    def open_dataset(data, held_out=False, **kwargs):
        if data.kind == "drawn":
            return real(data, held_out, **kwargs)
        found = chat_rows() if data.kind == "chat" else region_rows()
        return found[: data.held_out_limit] if held_out else found

    monkeypatch.setattr(training, "open_dataset", open_dataset)


# ---------------------------------------------------------------- rows


def test_plan_covers_every_region_once_an_epoch(shapes_processor):
    data, dataset = Data(kind="regions", train="x"), region_rows()
    counts = [len(row["regions"]) for row in dataset]
    order = plan(dataset, data, shapes_processor, batch=1, steps=-1, epochs=2, seed=0)
    passes = sum(len(partition_regions(n, 6, i, 0)) for i, n in enumerate(counts))
    assert len(order) == 2 * passes
    for epoch, part in enumerate((order[:passes], order[passes:])):
        for index, count in enumerate(counts):
            groups = [step.regions for step in part if step.image == index]
            assert sorted(k for group in groups for k in group) == list(range(count))
            expected = [sorted(group) for group in partition_regions(count, 6, index, epoch)]
            assert sorted(groups) == sorted(expected)
    assert order == plan(dataset, data, shapes_processor, 1, -1, 2, 0)
    assert order != plan(dataset, data, shapes_processor, 1, -1, 2, 1)
    assert len(plan(dataset, data, shapes_processor, 4, 7, 1, 0)) == 28


@pytest.mark.parametrize(("train", "message"), [(None, "`data.train` is missing"), ("none.jsonl", "there is no file")])
def test_a_stream_without_its_file_is_refused_at_once(shapes_processor, train, message):
    with pytest.raises(SettingError, match=message):
        StreamedRows(Data(train=train, streaming=True), shapes_processor, 0)


def test_rows_of_a_batch_have_like_lengths(shapes_processor):
    rng = np.random.default_rng(0)
    sizes = [(64 * int(rng.integers(1, 7)), 64, 2, 60) for _ in range(200)]

    class Sized(list):
        def sizes(self):
            return sizes

    data = Data(train="x", partition="together")
    order = plan(Sized([{}] * 200), data, shapes_processor, 4, -1, 1, 0)
    lengths = [measure_row(sizes[step.image], shapes_processor).tokens for step in order]
    padded = sum(4 * max(lengths[k : k + 4]) for k in range(0, 200, 4))
    assert padded < 1.06 * sum(lengths)
    assert lengths != sorted(lengths, reverse=True)


def test_row_tokens_are_nearly_those_of_the_collator(shapes_processor):
    for slots in (None, 24):
        collator = PdlmCollator(shapes_processor, num_slots=slots)
        for row in region_rows():
            size = sizes_of([row], Data(train="x"))[0]
            found, real = measure_row(size, shapes_processor, slots).tokens, collator([row])["input_ids"].shape[1]
            assert abs(found - real) <= 0.25 * real


def test_a_row_has_its_regions_and_its_seed():
    dataset = region_rows(2)
    rows = TrainingRows(dataset, [plan_module.Step(1, [1]), plan_module.Step(0, None)], seed=3)
    assert rows[0]["regions"] == [dataset[1]["regions"][1]]
    assert rows[1]["regions"] == dataset[0]["regions"]
    assert [rows[k]["seed"] for k in range(2)] == [3 * 2**40, 3 * 2**40 + 1]
    assert "seed" not in dataset[0]


def test_cut():
    assert cut(8, 6, 0, 0, "together") == [[0, 1, 2, 3, 4, 5], [6, 7]]
    assert sorted(sum(cut(8, 6, 0, 0, "shuffle"), [])) == list(range(8))


def test_held_out_rows_never_change(shapes_processor):
    data = Data(train="x")
    first, again = (held_out_rows(region_rows(3), data, shapes_processor) for _ in range(2))
    collator = PdlmCollator(shapes_processor, num_slots=24)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(collator([a])["noise_mask"], collator([b])["noise_mask"])


def test_streamed_rows_go_on_from_the_start(shapes_processor, monkeypatch):
    module = types.SimpleNamespace(stream_rows=lambda source, images=None: iter(region_rows(4)))
    monkeypatch.setitem(sys.modules, "pdlm_peft.data", module)
    stream = iter(StreamedRows(Data(train="hf:x", partition="together", streaming=True, limit=2), shapes_processor, 1))
    rows = [next(stream) for _ in range(5)]
    assert [row["seed"] - 2**40 for row in rows] == [0, 1, 2, 3, 4]
    assert len(rows[0]["regions"]) == len(rows[2]["regions"]) == len(rows[4]["regions"])


def test_streams_have_one_worker(tmp_path):
    """Each of several would read the whole file."""
    settings = ["model=shapes", "data.train=x", "training.dataloader_num_workers=4"]
    for streaming, workers in ((True, 1), (False, 4)):
        recipe = small("lora_8b_80gb", tmp_path, *settings, f"data.streaming={streaming}")
        assert training.arguments(recipe).dataloader_num_workers == workers


def test_the_new_domain_is_new_and_fits_its_slots(shapes_processor):
    from pdlm_hf.shapes import scenes

    assert not set(NEW_DOMAIN.colours) & set(scenes.COLOURS)
    assert not set(WORDS["shape"]) & set(scenes.WORDS["shape"])
    rng = np.random.default_rng(0)
    for _ in range(100):
        figure = scenes.Figure(*(list(WORDS[a])[rng.integers(len(WORDS[a]))] for a in WORDS))
        caption = scenes.describe(figure, rng, domain=NEW_DOMAIN)
        assert scenes.read(caption, NEW_DOMAIN) == figure and scenes.read(caption) is None
        assert len(shapes_processor.tokenizer(caption)["input_ids"]) <= load_recipe("shapes").data.num_slots[0]
    words = [f" {word}" for values in WORDS.values() for words in values.values() for word in words]
    assert {len(shapes_processor.tokenizer(word)["input_ids"]) for word in words} == {3}
    assert len(PATTERNS) == 3


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    training.train(small("shapes", folder))
    return folder


@pytest.fixture
def finished(trained_once, tmp_path):
    """The folder of a run of its own that has come to its end."""
    return shutil.copytree(trained_once, tmp_path / "a")


@pytest.mark.parametrize("name", [name for name in recipe_names() if not name.startswith("commit")])
def test_every_recipe_in_miniature(name, own_rows, tmp_path):
    """The same YAML with a tiny model; 4 bits and several devices left out."""
    model = str(BASE_CHECKPOINT if name == "chat_8b" else CHECKPOINT)
    extra = ["quantize=null", "training.activation_checkpointing=true", "training.eval_strategy=steps"]
    recipe = small(name, tmp_path / "run", f"model={model}", *extra, "training.eval_steps=2")
    record = training.train(recipe)
    assert [step for step, _ in losses(record["log"])] == [1, 2]
    assert all(np.isfinite(loss) for _, loss in losses(record["log"]))
    files = {path.name for path in (tmp_path / "run").iterdir()}
    weights = "model.safetensors" if recipe.adapter is None else "adapter_model.safetensors"
    assert {weights, "README.md", "recipe.yaml", "training.json", "pdlm_base.json"} <= files
    if recipe.data.kind != "chat":
        assert record["scores"]["before"]["eval_loss"] != record["scores"]["after"]["eval_loss"]
        loaded = pdlm_hf.RegionCaptioner.from_pretrained(tmp_path / "run")
        switches = recipe.switches.model_dump(exclude_none=True)
        assert {k: getattr(loaded.model.config, k) for k in switches} == switches


def test_what_is_trained(tmp_path):
    def trained(*more):
        recipe = small("shapes", tmp_path / "x", *more)
        model, _ = training.load(recipe)
        return {n for n, p in model.named_parameters() if p.requires_grad}

    plain = trained("adapter.vision=false", "adapter.train_embeddings=false")
    assert all("lora_" in n or "region_embedding" in n or "multi_modal_projector" in n for n in plain)
    assert any("region_embedding" in n for n in plain) and any("multi_modal_projector" in n for n in plain)
    assert not any("vision_tower" in n for n in plain)
    assert any("vision_tower" in n for n in trained("adapter.vision=true"))
    embeddings = trained("adapter.train_embeddings=true") - plain
    assert any("embed_tokens" in n for n in embeddings) and any("lm_head" in n for n in embeddings)
    frozen = trained("adapter=null", "freeze=[vision_tower]")
    assert not any("vision_tower" in n for n in frozen) and any("language_model" in n for n in frozen)


def test_bf16_weights_train_in_float32(trained_once, tmp_path):
    bf16 = ["dtype=bfloat16", "training.bf16=true"]
    model, _ = training.load(small("shapes", tmp_path / "x", *bf16))
    dtypes = {p.requires_grad: p.dtype for p in model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    record = training.train(small("shapes", tmp_path / "run", *bf16, "training.activation_checkpointing=true"))
    exact = json.loads((trained_once / "training.json").read_text())
    assert dict(losses(record["log"])) == pytest.approx(dict(losses(exact["log"])), rel=0.05)


def test_new_words(own_rows, tmp_path):
    words = "adapter.new_words=[zebra, giraffe]"
    record = training.train(small("shapes", tmp_path / "run", words, "adapter.train_embeddings=true"))
    assert record["steps"] == 2
    tokenizer = AutoProcessor.from_pretrained(tmp_path / "run").tokenizer
    assert tokenizer.tokenize("zebra") == ["zebra"]
    many = ",".join(f"word{k}" for k in range(20))
    with pytest.raises(SettingError, match="20 are too many: with them the tokenizer has"):
        training.load(small("shapes", tmp_path / "y", f"adapter.new_words=[{many}]"))


def test_four_bits_need_a_gpu(tmp_path, monkeypatch):
    recipe = small("qlora_8b_24gb", tmp_path / "x", "model=shapes")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ImportError, match="pip install bitsandbytes"):
        training.load(recipe)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("transformers.utils.is_bitsandbytes_available", lambda: True)
    monkeypatch.setattr("transformers.utils.import_utils.is_bitsandbytes_available", lambda *a, **k: True)
    config = training.quantization(recipe)
    assert (config.load_in_4bit, config.bnb_4bit_quant_type) == (True, "nf4")
    assert config.llm_int8_skip_modules == training.SKIPPED


@pytest.mark.parametrize("kind", [PdlmConfig, PdlmBaseConfig])
def test_four_bits_are_for_the_language_model(kind):
    """As transformers itself decides, over the names of the 8B."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(kind())
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    converted = {name for name in linear if should_convert_module(name, training.SKIPPED)}
    assert converted == {name for name in linear if name.startswith("model.language_model.")}
    assert len(converted) == 7 * 32 < len(linear)
    assert not any(should_convert_module(name, training.SKIPPED) for name in ("model.region_embedding", "lm_head"))


def test_reporters_are_asked_for_before_the_start(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "get_available_reporting_integrations", lambda: ["trackio"])
    for name, message in (("tensorboard", r"perceptiondlm\[tensorboard\]"), ("wandb", "pip install wandb")):
        with pytest.raises(ImportError, match=message):
            training.build(small("shapes", tmp_path / "run", f"training.report_to={name}"))
    assert training.arguments(small("shapes", tmp_path, "training.report_to=trackio")).report_to == ["trackio"]
    assert not any(tmp_path.iterdir())
    assert {load_recipe(name).training["report_to"] for name in recipe_names()} == {"none"}


def test_losses_by_level(tmp_path):
    """They are the mean losses of the samples in each bin."""
    trainer = training.build(small("shapes", tmp_path / "x", "training.per_device_train_batch_size=8"))
    batch = trainer.data_collator([trainer.train_dataset[k] for k in range(8)])
    trainer.model.train()
    outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)[1]
    logs = {"loss": 0.0}
    trainer.log(logs)
    levels = (batch["mask_probability"] * 5).long()
    for level in range(5):
        mean = outputs.sample_losses[levels == level].mean().item()
        assert np.isnan(mean) or logs[f"loss_t{level / 5:.1f}"] == pytest.approx(mean, abs=1e-4)


def test_samples_are_drawn(tmp_path):
    training.train(small("shapes", tmp_path / "run", "samples.every=2", "samples.images=2"))
    folder = tmp_path / "run" / "samples" / "step_000002"
    assert {path.name for path in folder.iterdir()} == {"0.png", "1.png", "captions.jsonl"}
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    assert {"image", "region", "caption", "expected", "score"} == set(lines[0])


def test_samples_of_bf16_weights(tmp_path):
    """The projector is trained in float32, the vision tower before it stays bf16."""
    bf16 = ["dtype=bfloat16", "training.bf16=true", "samples.images=1"]
    record = training.train(small("shapes", tmp_path / "run", *bf16, "samples.every=1"))
    lines = (tmp_path / "run" / "samples" / "step_000002" / "captions.jsonl").read_text().splitlines()
    assert lines and all(json.loads(line)["caption"] for line in lines)
    without = training.train(small("shapes", tmp_path / "without", *bf16))
    assert losses(record["log"]) == losses(without["log"])


def test_samples_that_fail_do_not_end_a_run(tmp_path, monkeypatch, caplog):
    def fail(self, step):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(training.CaptionSamples, "write", fail)
    assert training.train(small("shapes", tmp_path / "run", "samples.every=2"))["steps"] == 2
    said = [record.getMessage() for record in caplog.records if record.name == "pdlm_peft.samples"]
    assert said == ["No samples at step 2 (RuntimeError: out of memory)."]
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_shards_are_gathered_for_the_finished_folder(tmp_path):
    """Trainer.save_model of FSDP writes whole weights or nothing."""
    plugin = types.SimpleNamespace(kind="SHARDED_STATE_DICT")
    plugin.set_state_dict_type = lambda kind: setattr(plugin, "kind", kind)

    def trainer(writes):
        def save_model(folder):
            if plugin.kind == writes:
                (tmp_path / "adapter_model.safetensors").touch()

        state = types.SimpleNamespace(state=types.SimpleNamespace(fsdp_plugin=plugin))
        main = {"is_fsdp_enabled": True, "is_world_process_zero": lambda: True}
        return types.SimpleNamespace(accelerator=state, save_model=save_model, **main)

    with pytest.raises(OSError, match="no weights were written; the last saved step is in .*checkpoints"):
        training.save(trainer("another"), tmp_path)
    training.save(trainer("FULL_STATE_DICT"), tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_the_card(own_rows, tmp_path):
    extra = ["training.eval_strategy=steps", "training.eval_steps=2"]
    record = training.train(small("shapes", tmp_path / "run", *extra))
    card = (tmp_path / "run" / "README.md").read_text()
    assert f"base_model: {base_name(CHECKPOINT, tmp_path / 'run')}\n" in card and "rank: 16" in card
    assert "for the embedded checkpoint `shapes`, trained" in card and "model: shapes\n" in card
    assert f"| eval_loss | {record['scores']['before']['eval_loss']:.4f} |" in card
    assert "pdlm-peft merge run MERGED" in card


# ---------------------------------------------------------------- stopping and going on

LONG = ["training.max_steps=6", "training.save_steps=2", "training.eval_strategy=steps", "training.eval_steps=2"]


def test_a_resumed_run_has_the_same_curve(tmp_path, monkeypatch):
    straight = training.train(small("shapes", tmp_path / "a", *LONG, "adapter.dropout=0.1"))

    class Stop(Exception):
        pass

    step = training.RegionTrainer.training_step
    count = []

    def stopping(self, *args, **kwargs):
        count.append(1)
        if len(count) == 6:
            raise Stop
        return step(self, *args, **kwargs)

    monkeypatch.setattr(training.RegionTrainer, "training_step", stopping)
    with pytest.raises(Stop):
        training.train(small("shapes", tmp_path / "b", *LONG, "adapter.dropout=0.1"))
    broken = tmp_path / "b" / "checkpoints" / "checkpoint-5"
    broken.mkdir()
    (broken / "trainer_state.json").write_text('{"half')
    resumed = training.train(small("shapes", tmp_path / "b", *LONG, "adapter.dropout=0.1"))
    assert resumed["resumed_from"] == 4
    for key in ("loss", "eval_loss", "learning_rate"):
        assert losses(resumed["log"], key) == losses(straight["log"], key)
    assert resumed["scores"] == straight["scores"]


def test_other_settings_do_not_go_on(finished, tmp_path):
    with pytest.raises(SettingError, match=r"other settings \(adapter.rank was 16, now 4\).*give another `output`"):
        training.train(small("shapes", finished, "adapter.rank=4"))
    again = training.train(small("shapes", finished, "samples.images=1"))
    assert again["steps"] == 2 and again["resumed_from"] == 2
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("x")
    with pytest.raises(SettingError, match="is not empty and holds no run"):
        training.train(small("shapes", tmp_path / "full"))


def test_a_run_of_the_older_name_goes_on(tmp_path):
    """`gradient_checkpointing` in the recipe.yaml of a run that another version of transformers began."""
    settings = ["training.activation_checkpointing=true"]
    training.train(small("shapes", tmp_path / "run", *settings))
    written = tmp_path / "run/recipe.yaml"
    written.write_text(written.read_text().replace("activation_checkpointing", "gradient_checkpointing"))
    assert training.train(small("shapes", tmp_path / "run", *settings))["resumed_from"] == 2
    with pytest.raises(
        SettingError, match="begun with other settings .*training.activation_checkpointing was True, now None"
    ):
        training.train(small("shapes", tmp_path / "run"))


def test_a_moved_run_goes_on(finished, tmp_path, monkeypatch):
    """Its folder is its own, by whatever name."""
    finished.rename(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    assert training.train(small("shapes", "./b"))["resumed_from"] == 2


def test_a_run_killed_before_our_files_goes_on(finished):
    """Trainer's own files are complete, those that make an adapter folder of the step are not."""
    step = finished / "checkpoints" / "checkpoint-2"
    config = (step / "config.json").read_text()
    (step / "config.json").write_text("")
    (step / "pdlm_base.json").unlink()
    assert training.train(small("shapes", finished))["resumed_from"] == 2
    assert (step / "config.json").read_text() == config and (step / "pdlm_base.json").is_file()


def test_other_rows_do_not_go_on(tmp_path):
    write_rows(tmp_path)
    data = tmp_path / "regions.jsonl"
    recipe = small("lora_8b_80gb", tmp_path / "run", "model=shapes", f"data.train={data}", "data.held_out=null")
    training.train(recipe)
    rows = data.read_text()
    data.write_text(rows.replace('"caption": "', '"caption": "Now '))
    with pytest.raises(SettingError, match=r"other settings \(content of data.train was '\w{32}', now '\w{32}'\)"):
        training.train(recipe)
    data.write_text(rows)
    assert training.train(recipe)["resumed_from"] == 2


def test_another_number_of_processes_does_not_go_on(finished):
    path = finished / "run.json"
    assert json.loads(path.read_text())["processes"] == 1
    path.write_text('{"processes": 2}')
    with pytest.raises(SettingError, match="processes was 2, now 1"):
        training.train(small("shapes", finished))
    path.unlink()  # as of a run before this was noted
    assert training.train(small("shapes", finished))["resumed_from"] == 2


def test_a_failed_start_does_not_stand_in_the_way(tmp_path, monkeypatch):
    class Bad(list):
        def __getitem__(self, k):
            raise ValueError("row 1: image: got nothing")

    def open_dataset(data, held_out=False, **kwargs):
        return Bad([1]) if held_out else real(data, **kwargs)

    real = training.open_dataset
    monkeypatch.setattr(training, "open_dataset", open_dataset)
    monkeypatch.setattr(training, "load", lambda recipe: pytest.fail("the model was loaded first"))
    with pytest.raises(ValueError, match="row 1: image"):
        training.build(small("shapes", tmp_path / "run", "samples.every=2"))
    monkeypatch.undo()
    assert not (tmp_path / "run").exists()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)  # as Trainer makes it
    assert training.train(small("shapes", tmp_path / "run"))["steps"] == 2


def test_another_base_does_not_go_on(finished):
    path = finished / "pdlm_base.json"
    noted = json.loads(path.read_text())
    path.write_text(json.dumps(noted | {"fingerprint": "0" * 32}))
    with pytest.raises(SettingError, match="on other weights"):
        training.train(small("shapes", finished))


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_same_curve(tmp_path):
    """kill -9 in the middle, in a process of its own."""
    settings = [*SMALL, *LONG, "training.max_steps=12"]
    command = ["-m", "pdlm_peft.cli", "train", "shapes", *settings]
    assert run([*command, f"output={tmp_path}/a"]).returncode == 0
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    victim = subprocess.Popen([sys.executable, *command, f"output={tmp_path}/b"], cwd=ROOT, env=environment)
    while not (tmp_path / "b/checkpoints/checkpoint-4/trainer_state.json").is_file():
        assert victim.poll() is None
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not (tmp_path / "b/training.json").exists()
    result = run([*command, f"output={tmp_path}/b"])
    assert result.returncode == 0, result.stderr
    logs = [json.loads((tmp_path / name / "training.json").read_text())["log"] for name in "ab"]
    assert losses(logs[0]) == losses(logs[1]) and len(losses(logs[0])) == 12
    assert losses(logs[0], "eval_loss") == losses(logs[1], "eval_loss")


# ---------------------------------------------------------------- from files


def write_rows(folder):
    """A region file, and a chat file, beside their images."""
    from pycocotools import mask as coco_mask

    regions, chats = [], []
    for k, row in enumerate(region_rows()):
        row["image"].save(folder / f"{k}.png")
        codes = [coco_mask.encode(np.asfortranarray(r["mask"].astype(np.uint8))) for r in row["regions"]]
        parts = [
            {"segmentation": code | {"counts": code["counts"].decode()}, "caption": region["caption"]}
            for code, region in zip(codes, row["regions"], strict=True)
        ]
        regions.append({"image": f"{k}.png", "regions": parts})
        turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "A drawing."}]
        chats.append({"image": f"{k}.png", "conversations": turns})
    for name, rows in (("regions.jsonl", regions), ("chat.jsonl", chats)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("streaming", [False, True])
def test_from_a_file(tmp_path, streaming, own_rows, monkeypatch):
    """The same rows from a file and from memory give the same losses."""
    pytest.importorskip("pdlm_peft.data")
    write_rows(tmp_path)
    expected = None if streaming else training.train(small("lora_8b_80gb", tmp_path / "memory", "model=shapes"))
    monkeypatch.undo()
    source = [f"data.train={tmp_path}/regions.jsonl", "data.held_out=null", f"data.streaming={streaming}"]
    record = training.train(small("lora_8b_80gb", tmp_path / "file", "model=shapes", *source))
    if expected:
        assert losses(record["log"]) == losses(expected["log"])
    assert len(losses(record["log"])) == 2


def test_attributes_of_a_file_are_taught_and_can_be_read(tmp_path):
    write_rows(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "regions.jsonl").read_text().splitlines()]
    for k, row in enumerate(rows):
        for region in row["regions"]:
            region |= {"attributes": {"colour": "red" if k % 2 else "dark red", "whole": True}}
            if k > 2:
                del region["caption"]
    (tmp_path / "regions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [f"data.train={tmp_path}/regions.jsonl", f"data.held_out={tmp_path}/regions.jsonl", "model=shapes"]
    recipe = small("attributes_8b", tmp_path / "run", *data)
    check_run(recipe)
    record = training.train(recipe)
    assert [step for step, _ in losses(record["log"])] == [1, 2]
    schema = tmp_path / "run" / "attributes.json"
    assert json.loads(schema.read_text()) == {"attributes": {"colour": ["dark red", "red"], "whole": ["yes"]}}
    with pytest.raises(DataError, match=r"row 1: regions\[0\].attributes.colour: got 'dark red', expected one of red"):
        check_run(small("attributes_8b", tmp_path / "other", *data, "data.attributes={colour: [red, blue]}"))
    with pytest.raises(SettingError, match=f"attribute 'colour'.*{'x' * 20}"):
        check_run(small("attributes_8b", tmp_path / "other", *data, f"data.attributes={{colour: [{'x' * 300}]}}"))


def write_talks(folder, count=24):
    """Conversations of very different lengths, about none, one and two images of different sizes."""
    for k, size in enumerate([(40, 40), (160, 70)]):
        Image.new("RGB", size).save(folder / f"{k}.png")
    rows = []
    for k in range(count):
        images = [["0.png"], ["1.png"], [], ["0.png", "1.png"]][k % 4]
        turns = [
            {"from": "human", "value": "<image>" * len(images) + "What is it?"},
            {"from": "gpt", "value": "box " * (1 + 7 * (k % 24))},
        ]
        rows.append({"image": images, "conversations": turns * (1 + k % 2) if not images else turns})
    path = folder / "talks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def chat_processor():
    return AutoProcessor.from_pretrained(BASE_CHECKPOINT)


def test_lengths_of_conversations_are_those_of_the_collator(tmp_path, chat_processor):
    dataset = ChatDataset(write_talks(tmp_path))
    sizes = list(chat_sizes(dataset, chat_processor))
    assert sizes == list(chat_sizes([dataset[k] for k in range(len(dataset))], chat_processor))  # opened or not
    collator = PdlmCollator(chat_processor)
    for k, size in enumerate(sizes):
        encoded = collator.encode_chat(dataset[k])
        tiles = len(encoded["pixel_values"]) if "pixel_values" in encoded else 0
        answer = sum(label != -100 for label in encoded["labels"])
        assert size == RowSize(tiles, len(encoded["input_ids"]), answer)
    assert {size.tiles for size in sizes} >= {0, 1, 2} and sizes[23].answer > 150


def test_batches_of_conversations_have_one_length(tmp_path, chat_processor):
    dataset = ChatDataset(write_talks(tmp_path, 240))
    sizes = list(chat_sizes(dataset, chat_processor))
    data = Data(kind="chat", train="x")
    order = plan(dataset, data, chat_processor, batch=4, steps=-1, epochs=1, seed=0)
    assert sorted(step.image for step in order) == list(range(240))

    def padding(images):
        return sum(4 * max(sizes[image].tokens for image in images[k : k + 4]) for k in range(0, 240, 4))

    total = sum(size.tokens for size in sizes)
    assert padding([step.image for step in order]) < 1.1 * total < padding(list(range(240)))
    limit = sorted(size.tokens for size in sizes)[119]
    short = plan(dataset, Data(kind="chat", train="x", max_length=limit), chat_processor, 4, -1, 1, 0)
    assert sorted(step.image for step in short) == [k for k, size in enumerate(sizes) if size.tokens <= limit]
    least = min(size.tokens for size in sizes)
    with pytest.raises(DataError, match=f"`data.max_length` is 5, but the shortest conversation has {least} tokens"):
        plan(dataset, Data(kind="chat", train="x", max_length=5), chat_processor, 4, -1, 1, 0)


@pytest.mark.slow
def test_the_estimate_of_conversations_is_from_the_data(tmp_path, chat_processor):
    path = write_talks(tmp_path)
    sizes = list(chat_sizes(ChatDataset(path), chat_processor))
    limit = sorted(size.tokens for size in sizes)[15]
    changes = ["model=shapes_base", f"data.train={path}", "training.max_steps=-1", f"data.max_length={limit}"]
    found = estimate_recipe(small("chat_8b", tmp_path / "run", *changes), dry_run=True)
    assert (found.tokens, found.left_out, found.steps, found.rows) == (limit, 8, 8, 2)
    result = run(["-m", "pdlm_peft.cli", "train", "chat_8b", "--dry-run", *SMALL, *changes])
    assert result.returncode == 0 and "8 longer conversations are left out" in " ".join(result.stderr.split())


def test_one_rule_of_generate_replaces_another(tmp_path):
    """The embedded checkpoint accepts tokens by their probability; with a bound of entropy it must not do both."""
    for settings, expected in (
        ("generation={entropy_bound: 0.1}", (None, 0.1, None)),  # in place of the checkpoint's rule
        ("generation.entropy_bound=0.1", (None, 0.1, None)),  # and of the recipe's
        ("generation.acceptance_threshold=0.5", (0.5, None, None)),
        ("generation={remasking: random}", (0.8, None, "random")),
        ("generation={max_new_tokens: 9}", (0.8, None, None)),
    ):
        model, _ = training.load(small("shapes", tmp_path, settings))
        found = model.generation_config
        found.validate()
        assert (found.acceptance_threshold, found.entropy_bound, found.remasking) == expected


@pytest.mark.parametrize("sharded", ["fsdp", "zero3"])
def test_samples_of_sharded_weights_are_refused(tmp_path, monkeypatch, sharded):
    """Also if only `accelerate launch` shards them."""
    if sharded == "fsdp":
        real = training.RegionTrainer.__init__

        def init(self, *args, **kwargs):
            real(self, *args, **kwargs)
            self.is_fsdp_enabled = True

        monkeypatch.setattr(training.RegionTrainer, "__init__", init)
    else:
        monkeypatch.setattr(training, "is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(SettingError, match="the run would hang. Set samples.every=0"):
        training.build(small("shapes", tmp_path / "run", "samples.every=1"))


def test_chat_from_a_file(tmp_path):
    pytest.importorskip("pdlm_peft.data")
    write_rows(tmp_path)
    record = training.train(
        small("chat_8b", tmp_path / "run", "model=shapes_base", f"data.train={tmp_path}/chat.jsonl")
    )
    assert len(losses(record["log"])) == 2


@pytest.mark.slow
def test_the_command_says_steps_and_time(tmp_path):
    pytest.importorskip("pdlm_peft.data")
    write_rows(tmp_path)
    source = [f"data.train={tmp_path}/regions.jsonl", "model=shapes", "training.max_steps=-1", "data.held_out=null"]
    result = run(["-m", "pdlm_peft.cli", "train", "lora_8b_80gb", "--dry-run", *SMALL, *source])
    assert result.returncode == 0, result.stderr
    passes = sum(len(partition_regions(len(row["regions"]), 6, k, 0)) for k, row in enumerate(region_rows()))
    assert f"{-(-passes // 2)} steps of 2 rows per device" in result.stderr
    (tmp_path / "regions.jsonl").write_text('{"image": "0.png", "regions": [{"bbox": [0, 0, 9, 9]}]}\n')
    bad = run(["-m", "pdlm_peft.cli", "train", "lora_8b_80gb", *SMALL, *source, f"output={tmp_path}/x"])
    assert bad.returncode == 2 and bad.stderr.splitlines()[-1].startswith("pdlm-peft: row 1: ")
