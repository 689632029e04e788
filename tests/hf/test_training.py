import pytest
import torch
from tiny import lively_model
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from pdlm_hf import PdlmForConditionalGeneration
from pdlm_hf.shapes.dataset import ShapesDataset
from pdlm_hf.training.collator import PdlmCollator
from pdlm_hf.training.trainer import Clock
from pdlm_hf.versions_pdlm import CHECKPOINTING
from tools.shapes.model import build_model
from tools.shapes.train import TimedTrainer, arguments, record_of

LORA_TARGETS = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


def trainer(model, processor, folder, **arguments):
    arguments = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3} | arguments
    settings = TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        report_to="none",
        remove_unused_columns=False,
        logging_steps=1,
        **arguments,
    )
    collator = PdlmCollator(processor, num_slots=20, noise_floor=0.1, prompt_ids="ordered")
    return Trainer(model=model, args=settings, train_dataset=ShapesDataset(0, 64, 4), data_collator=collator)


def test_trainer_trains_every_weight(processor, tmp_path):
    torch.manual_seed(0)
    model = build_model(processor)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    run = trainer(model, processor, tmp_path, save_steps=2)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(loss > 0 for loss in losses)
    unchanged = [name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])]
    assert unchanged == []


def test_a_resumed_run_is_the_run_that_was_not_stopped(processor, tmp_path):
    straight = build_model(processor)
    run = trainer(straight, processor, tmp_path, max_steps=4, save_steps=2)
    run.train()
    resumed = build_model(processor)
    again = trainer(resumed, processor, tmp_path / "again", max_steps=4, save_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    losses, repeated = ([e["loss"] for e in r.state.log_history if "loss" in e] for r in (run, again))
    assert repeated == losses and len(losses) == 4
    for (name, weight), other in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(weight, other), name


class StepClock(Clock):
    """A clock on which every step takes a second."""

    steps = 0
    elapsed = property(lambda self: float(self.steps))

    def on_train_begin(self, args, state, control, **kwargs):
        self.steps = state.global_step

    def on_step_begin(self, args, state, control, **kwargs):
        self.steps = state.global_step + 1


@pytest.mark.parametrize(("limit", "steps"), [(None, 3), (9, 3), (2, 2)])
def test_the_rate_falls_to_zero_by_the_steps_or_the_time(processor, tmp_path, limit, steps):
    clock = StepClock(limit)
    run = TimedTrainer(
        clock=clock,
        model=build_model(processor),
        args=arguments(tmp_path, 3, 2, 1e-3, 0, workers=0, device="cpu"),
        train_dataset=ShapesDataset(0, 6, 2, easy=True),
        data_collator=PdlmCollator(processor, num_slots=9, prompt_ids="ordered"),
        callbacks=[clock],
    )
    run.train()
    assert run.state.global_step == steps and (tmp_path / f"trainer/checkpoint-{steps}").is_dir()
    assert run.lr_scheduler.get_last_lr()[0] == pytest.approx(0, abs=1e-9)


def test_the_record_says_where_and_from_what(processor, tmp_path):
    (tmp_path / "training.json").write_text('{"seed": 3}')
    record = record_of(build_model(processor), "train", tmp_path, 2, 5, 1.5)
    assert record.pop("parameters") > 1_000_000
    expected = {"command": f"train --init {tmp_path.name}", "machine": "CPU", "steps": 2, "seed": 5, "seconds": 1.5}
    assert record == expected | {"initialised_from": {"seed": 3}}


def test_batches_do_not_depend_on_the_workers(processor):
    collator = PdlmCollator(processor, num_slots=9, prompt_ids="ordered")

    def batches(workers):
        return list(DataLoader(ShapesDataset(0, 6, 2, easy=True), 2, collate_fn=collator, num_workers=workers))

    for one, other in zip(batches(0), batches(2), strict=True):
        assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


def test_gradient_checkpointing_in_the_trainer(processor, tmp_path):
    trainer(build_model(processor), processor, tmp_path, max_steps=1, **{CHECKPOINTING: True}).train()


@pytest.mark.slow
def test_the_loss_falls(processor, tmp_path):
    torch.manual_seed(0)
    run = trainer(build_model(processor), processor, tmp_path, max_steps=60, warmup_steps=5)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])


def test_adapters_on_the_language_model(processor, scenes, tmp_path):
    peft = pytest.importorskip("peft")
    inputs = processor(images=[p.image for p in scenes], segmentation_maps=[p.masks for p in scenes])
    plain = {name: value for name, value in inputs.items() if name not in ("region_order", "image_index")}
    config = peft.LoraConfig(r=2, target_modules=LORA_TARGETS, modules_to_save=["region_embedding"])
    adapted = peft.get_peft_model(lively_model(processor), config)
    names = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert not any("vision_tower" in name for name in names)
    assert sum("lora_A" in name for name in names) == 7 * adapted.config.text_config.num_hidden_layers
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        expected = adapted(**plain).logits
        assert (expected - lively_model(processor)(**plain).logits).abs().max() > 0.1
    settings = {"max_new_tokens": 6, "max_denoising_steps": 3}
    tokens = adapted.generate(**inputs, **settings).region_tokens
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(lively_model(processor), tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**plain).logits, expected)
    assert torch.equal(again.generate(**inputs, **settings).region_tokens, tokens)
    merged = again.merge_and_unload()
    assert isinstance(merged, PdlmForConditionalGeneration)
    with torch.no_grad():
        torch.testing.assert_close(merged(**plain).logits, expected, atol=1e-2, rtol=1e-3)


def test_adapters_train(processor, tmp_path):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(build_model(processor), peft.LoraConfig(r=2, target_modules=LORA_TARGETS))
    before = {name: p.clone() for name, p in adapted.named_parameters()}
    trainer(adapted, processor, tmp_path, **{CHECKPOINTING: True}).train()
    changed = {name for name, p in adapted.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}
