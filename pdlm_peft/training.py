"""Training by a recipe, with transformers' Trainer, PEFT and the project's collator."""

import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainingArguments, set_seed
from transformers.integrations import get_available_reporting_integrations, is_deepspeed_zero3_enabled
from transformers.trainer_callback import TrainerCallback

from pdlm_hf.attributes.schema import AttributeSchema
from pdlm_hf.errors_pdlm import MissingPackageError, SettingError
from pdlm_hf.regions.files import check_same_settings, load_json, write_json
from pdlm_hf.templates_pdlm import AttributePlan
from pdlm_hf.training.collator import PdlmCollator
from pdlm_hf.training.trainer import Clock, InOrderTrainer
from pdlm_hf.versions_pdlm import CHECKPOINTING

from .adapters import (
    BASE_FILE,
    add_adapter,
    apply_overrides,
    fingerprint,
    finish_adapter,
    overrides,
    read_base,
    write_base,
)
from .card import write_run_card
from .memory import check_kind
from .plan import StreamedRows, TrainingRows, attribute_schema, held_out_rows, open_dataset, plan
from .recipe import SHARDED_SAMPLES, Recipe
from .samples import CaptionSamples
from .sources import content_of
from .training_settings import ALIASES

CAPTIONS = "captions"  # folder of a run: what `pdlm-peft commit` trains on
SCHEMA_FILE = "attributes.json"  # the attributes that were taught, for `pdlm attributes --schema`
RUN_FILE = "run.json"  # what else the order of the rows depends on
LEVELS = 5  # bins of the masking probability in the log
# settings that may differ when a run is resumed
_FREE = {
    ("output",),
    ("samples",),
    ("hardware",),
    ("generation",),
    ("training", "report_to"),
    ("training", "save_total_limit"),
    ("training", "dataloader_num_workers"),
    ("training", "disable_tqdm"),
}


class RegionTrainer(InOrderTrainer):
    """Trainer that keeps the order of its rows and logs the loss by masking probability.

    `loss_t0.2` is the mean over the samples with a masking probability in [0.2, 0.4) since the last log. It is
    roughly the cross entropy of a masked token.
    """

    base_fingerprint = ""
    schema: AttributeSchema | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # on the device: a copy to the host would wait for every step
        self._levels = {mode: torch.zeros(2, LEVELS, device=self.args.device) for mode in (True, False)}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Compute the loss, and sum the losses of the samples by masking probability."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if outputs.sample_losses is not None:
            level = (inputs["mask_probability"] * LEVELS).long().clamp_max(LEVELS - 1)
            losses = outputs.sample_losses.detach().float()
            chosen = torch.nn.functional.one_hot(level, LEVELS).float()
            self._levels[model.training] += torch.stack([losses, torch.ones_like(losses)]) @ chosen
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the losses by masking probability to the log of training and of evaluation."""
        for training, key in ((True, "loss"), (False, "eval_loss")):
            if key in logs:
                sums, counts = self.accelerator.reduce(self._levels[training].clone(), "sum").cpu()
                self._levels[training].zero_()
                for bin_, (total, count) in enumerate(zip(sums.tolist(), counts.tolist(), strict=True)):
                    if count:
                        logs[f"{key}_t{bin_ / LEVELS:.1f}"] = round(total / count, 5)
        super().log(logs, start_time)


class _AdapterFiles(TrainerCallback):
    """Completes the adapter folder of every saved step."""

    def __init__(self, recipe: Recipe, base_fingerprint: str):
        self.recipe, self.base_fingerprint = recipe, base_fingerprint

    def on_save(self, args, state, control, model=None, **kwargs):
        """Record the base beside the adapter."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            write_base(folder, self.recipe, self.base_fingerprint)
            finish_adapter(folder, self.recipe, model.config, model.generation_config)

    def on_train_begin(self, args, state, control, **kwargs):
        """Complete the step that a run resumes from, too: the run may have been killed in `on_save`."""
        self.on_save(args, state, control, **kwargs)


# settings that need a GPU or a package which a machine for a dry run may lack
_ELSEWHERE = {"deepspeed", "fsdp", "fsdp_config", "tf32", "torch_compile", "use_liger_kernel"}


def arguments(recipe: Recipe, dry_run: bool = False) -> TrainingArguments:
    """The `TrainingArguments` of a recipe.

    Args:
        recipe ([`~recipe.Recipe`])
        dry_run (`bool`): leave out what only the machine of the real run can decide.

    Raises:
        SettingError: transformers refuses a value.
        ImportError: `report_to` names a package that is not installed.
    """
    given = {k.replace("activation_checkpointing", CHECKPOINTING): v for k, v in recipe.training.items()}
    settings: dict[str, Any] = {"report_to": "none", "use_cpu": not torch.cuda.is_available()} | given
    if dry_run and not torch.cuda.is_available():
        settings = {key: value for key, value in settings.items() if key not in _ELSEWHERE}
    if recipe.data.streaming:
        # dispatching would cut every tensor to the number of rows, but an image has several tiles
        settings["accelerator_config"] = {"dispatch_batches": False}
        # each of several workers would read the whole file and repeat every row
        settings["dataloader_num_workers"] = min(settings.get("dataloader_num_workers", 0), 1)
    try:
        found = TrainingArguments(
            output_dir=str(Path(recipe.output) / "checkpoints"),
            seed=recipe.seed,
            remove_unused_columns=False,
            prediction_loss_only=True,
            label_names=["labels"],
            **settings,
        )
    except (ValueError, TypeError, ImportError) as error:
        raise SettingError(f"`training`: {error}") from error
    available = get_available_reporting_integrations()
    for name in (name for name in found.report_to or () if name not in available):
        if name == "tensorboard":
            raise MissingPackageError(name, name)
        raise ImportError(f"`training.report_to`: {name} is unknown or not installed; try: pip install {name}")
    return found


# modules that are not quantized; transformers compares the start and the end of full names
SKIPPED = ["model.vision_tower", "model.multi_modal_projector", "model.region_embedding", "lm_head"]


def quantization(recipe: Recipe):
    """The bitsandbytes configuration for a language model in 4 bits; None if the recipe does not quantize.

    Raises:
        ImportError: bitsandbytes or a CUDA device is missing.
    """
    if recipe.quantize is None:
        return None
    from transformers import BitsAndBytesConfig
    from transformers.utils import is_bitsandbytes_available

    if not torch.cuda.is_available() or not is_bitsandbytes_available():
        raise ImportError(
            "`quantize: 4bit` needs a CUDA device and bitsandbytes: pip install bitsandbytes. "
            "Or set quantize=null, which needs 80 GB for the 8B."
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=SKIPPED,
    )


def load(recipe: Recipe) -> tuple[Any, Any]:
    """Load model and processor of a recipe, with its switches and its adapter or frozen parts.

    Raises:
        SettingError: region data for a checkpoint without region prompts.
        ImportError: see [`quantization`].
    """
    adapter = recipe.adapter
    processor = AutoProcessor.from_pretrained(recipe.base)
    model = AutoModelForImageTextToText.from_pretrained(
        recipe.base,
        dtype=recipe.dtype,
        quantization_config=quantization(recipe),
        attn_implementation={"text_config": recipe.attention} if recipe.attention else None,
        device_map={"": torch.cuda.current_device()} if recipe.quantize else None,
    )
    apply_overrides(model, overrides(recipe))
    check_kind(recipe, model.config)  # type: ignore[arg-type]  # a PdlmConfig
    if adapter is not None:
        return add_adapter(model, processor, adapter), processor
    for part in recipe.freeze:
        getattr(model.model, part).requires_grad_(False)
    return model, processor


@dataclass
class Parts:
    """The parts of a training that [`~committing.commit`] replaces by its own.

    Args:
        rows, collator, trainer: make [`~plan.TrainingRows`], the collator and the trainer, from the same arguments.
        callbacks: gets the trainer, the processor and the held-out rows, and returns further callbacks.
    """

    rows: Callable[..., TrainingRows] = TrainingRows
    collator: Callable[..., PdlmCollator] = PdlmCollator
    trainer: Callable[..., RegionTrainer] = RegionTrainer
    callbacks: Callable[..., list[TrainerCallback]] = lambda trainer, processor, held_out: []


PLAIN = Parts()


def collator(
    recipe: Recipe,
    processor,
    make: Callable[..., PdlmCollator] = PdlmCollator,
    attributes: AttributePlan | None = None,
) -> PdlmCollator:
    """The collator of a recipe, with the attributes that it teaches."""
    data = recipe.data
    return make(
        processor,
        data.num_slots,
        data.noise_floor,
        data.prompt_ids,
        data.at_least_one,
        attributes=attributes,
        attribute_share=data.attribute_share,
    )


def attribute_plan(recipe: Recipe, processor, *datasets: Any) -> tuple[AttributeSchema | None, AttributePlan | None]:
    """The attributes that a recipe teaches, and their token blocks; None if it teaches none.

    Args:
        recipe ([`~recipe.Recipe`]), processor (`PdlmProcessor`)
        *datasets: see [`~plan.attribute_schema`].

    Raises:
        SettingError, DataError: see [`~plan.attribute_schema`] and the processor's `attribute_plan`.
    """
    schema = attribute_schema(recipe.data, *datasets) if recipe.commit is None else None
    if schema is None:
        return None, None
    return schema, processor.attribute_plan(schema.choices, schema.lengths, schema.template)


def training_rows(
    recipe: Recipe, args: TrainingArguments, processor, make: Callable[..., TrainingRows] = TrainingRows
) -> tuple[Any, int]:
    """Open the training rows and count the optimizer steps."""
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if recipe.data.streaming:
        return StreamedRows(recipe.data, processor, recipe.seed), args.max_steps
    length = batch * max(args.max_steps, 1)
    dataset = open_dataset(recipe.data, length=length, group=batch, seed=recipe.seed)
    steps = plan(dataset, recipe.data, processor, batch, args.max_steps, args.num_train_epochs, recipe.seed)
    return make(dataset, steps, recipe.seed), len(steps) // batch


def build(recipe: Recipe, parts: Parts = PLAIN) -> RegionTrainer:
    """Make the trainer of a recipe, before its first step.

    Args:
        recipe ([`~recipe.Recipe`]), parts ([`Parts`])

    Raises:
        SettingError: the settings do not fit, or `output` holds another run.
        DataError: the data cannot be used.
        CheckpointError: there is no such base checkpoint.
        ImportError: an optional package is missing.
    """
    out = Path(recipe.output)
    base_fingerprint = fingerprint(recipe.base)
    args = arguments(recipe)
    check_folder(recipe, out, base_fingerprint, args.world_size)
    set_seed(recipe.seed)
    processor = AutoProcessor.from_pretrained(recipe.base)
    # before the model is loaded, to find bad data early
    rows, args.max_steps = training_rows(recipe, args, processor, parts.rows)
    held_out = open_dataset(recipe.data, held_out=True, length=64, seed=recipe.seed)
    schema, taught = attribute_plan(recipe, processor, getattr(rows, "dataset", None), held_out)
    samples, images = recipe.samples, []
    if samples.every and held_out is not None and recipe.data.kind != "chat":
        images = [held_out[k] for k in range(min(samples.images, len(held_out)))]
    model, processor = load(recipe)
    trainer = parts.trainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=held_out_rows(held_out, recipe.data, processor) if held_out is not None else None,
        data_collator=collator(recipe, processor, parts.collator, taught),
        processing_class=processor,
        callbacks=[Clock(), _AdapterFiles(recipe, base_fingerprint)],
    )
    trainer.base_fingerprint, trainer.schema = base_fingerprint, schema
    if images:
        if trainer.is_fsdp_enabled or is_deepspeed_zero3_enabled():
            raise SettingError(SHARDED_SAMPLES)
        trainer.add_callback(CaptionSamples(trainer, processor, images, samples.every, out / "samples"))
    for callback in parts.callbacks(trainer, processor, held_out):
        trainer.add_callback(callback)
    return trainer


def check_folder(recipe: Recipe, out: Path, base_fingerprint: str, processes: int) -> None:
    """Check that a run may start or be resumed in a folder.

    Raises:
        SettingError: the folder holds other files, or a run with other settings or weights.
    """
    if not (out / "recipe.yaml").is_file():
        # a start that failed before its first step leaves an empty folder for the steps
        others = [path for path in out.iterdir() if path.name != CAPTIONS] if out.exists() else []
        if any(path.name != "checkpoints" or any(path.iterdir()) for path in others):
            raise SettingError(f"{out} is not empty and holds no run; give another `output`.")
        return
    old, new = yaml.safe_load((out / "recipe.yaml").read_text()), recipe.model_dump(mode="json")
    old["training"] = {ALIASES.get(k, k): v for k, v in old["training"].items()}
    if (out / BASE_FILE).is_file() and read_base(out)["fingerprint"] != base_fingerprint:
        raise SettingError(f"{out} holds a run on other weights than those of {recipe.base}; give another `output`.")
    now = _beside_the_recipe(recipe, processes)
    before = load_json(out / RUN_FILE) if (out / RUN_FILE).is_file() else {}
    check_same_settings(_fixed(old) | now | before, _fixed(new) | now, out, "give another `output`")


def _beside_the_recipe(recipe: Recipe, processes: int) -> dict[str, Any]:
    """What must not change either: another number of processes makes other batches, and so do other rows."""
    files = {f"content of data.{name}": content_of(getattr(recipe.data, name)) for name in ("train", "held_out")}
    return {"processes": processes, **files}


def _fixed(recipe: dict[str, Any]) -> dict[str, Any]:
    """The settings that must not change when a run is resumed, by names like `training.learning_rate`."""
    parts = {name: values if isinstance(values, dict) else {"": values} for name, values in recipe.items()}
    flat = {(name, key) if key else (name,): v for name, values in parts.items() for key, v in values.items()}
    return {".".join(key): value for key, value in flat.items() if not {key, key[:1]} & _FREE}


def last_complete(folder: Path) -> str | None:
    """Folder of the last saved step that is complete; a killed run may leave an incomplete one."""
    steps = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for step in steps:
        try:
            json.loads((step / "trainer_state.json").read_text())  # written last
            return str(step)
        except (OSError, json.JSONDecodeError):
            continue
    return None


def train(recipe: Recipe, parts: Parts = PLAIN) -> dict[str, Any]:
    """Train by a recipe, or resume the run in its `output`, and write the finished folder.

    Args:
        recipe ([`~recipe.Recipe`]): model, data, adapter and training settings.
        parts ([`Parts`]): what a command puts in place of the plain parts.

    Returns:
        the content of `training.json`, with steps, seconds, hardware, scores and the log.

    Raises:
        SettingError: the settings do not fit, or `output` holds another run.
        DataError: the data cannot be used.
        CheckpointError: there is no such base checkpoint.
        ImportError: an optional package is missing.
    """
    trainer = build(recipe, parts)
    out, main = Path(recipe.output), trainer.is_world_process_zero()
    if main:
        out.mkdir(parents=True, exist_ok=True)
        (out / "recipe.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
        write_json(out / RUN_FILE, _beside_the_recipe(recipe, trainer.args.world_size))
        write_base(out, recipe, trainer.base_fingerprint)
        if trainer.schema is not None:
            write_json(out / SCHEMA_FILE, trainer.schema.to_json())
    last = last_complete(out / "checkpoints")
    if last and main and recipe.adapter is not None:
        # written after Trainer's files, so a killed run may have left half of it; Trainer reads it only if it exists
        (Path(last) / "config.json").unlink(missing_ok=True)
    trainer.accelerator.wait_for_everyone()
    has_eval = trainer.eval_dataset is not None and trainer.args.eval_strategy != "no"
    trainer.args.eval_on_start = has_eval and last is None
    trainer.train(resume_from_checkpoint=last)
    if has_eval and not any(
        "eval_loss" in e for e in trainer.state.log_history if e["step"] == trainer.args.max_steps
    ):
        trainer.evaluate()
    save(trainer, out)
    record = _record(recipe, trainer, last)
    if main:
        model = trainer.accelerator.unwrap_model(trainer.model)
        finish_adapter(out, recipe, model.config, model.generation_config)
        (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
        write_run_card(recipe, record, out)
    return record


def save(trainer: RegionTrainer, out: Path) -> None:
    """Write the finished adapter or checkpoint.

    Raises:
        OSError: no weights were written.
    """
    if trainer.is_fsdp_enabled:  # `save_model` writes nothing if the weights are sharded, as in saved steps
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(out))
    if trainer.is_world_process_zero() and not any(out.glob("*.safetensors")):
        raise OSError(f"{out}: no weights were written; the last saved step is in {out / 'checkpoints'}.")


def _record(recipe: Recipe, trainer: RegionTrainer, last: str | None) -> dict[str, Any]:
    log = trainer.state.log_history
    scores = [{k: v for k, v in entry.items() if "loss" in k} for entry in log if "eval_loss" in entry]
    cuda = torch.cuda.is_available() and not trainer.args.use_cpu
    return {
        "model": recipe.model,
        "steps": trainer.state.global_step,
        "resumed_from": int(last.rpartition("-")[2]) if last else 0,
        "seconds": next((entry["elapsed"] for entry in reversed(log) if "elapsed" in entry), 0.0),
        "hardware": {
            "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU",
            "processes": trainer.args.world_size,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        },
        "scores": {"before": scores[0], "after": scores[-1]} if len(scores) > 1 else {},
        "log": log,
    }
