"""The part `training` of a recipe: transformers' `TrainingArguments`, their names, types and ranges."""

import dataclasses
import json
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from transformers import TrainingArguments

from pdlm_hf.errors_pdlm import SettingError

# older names of transformers -> names in recipes; see `versions_pdlm.CHECKPOINTING`
ALIASES = {f"gradient_checkpointing{end}": f"activation_checkpointing{end}" for end in ("", "_kwargs")}
TRAINING_KEYS = {field.name for field in dataclasses.fields(TrainingArguments) if field.init} | {*ALIASES.values()}
# arguments that a recipe sets by another key, or that must keep their value
OWN_KEYS = {
    "output_dir": "set `output`",
    "seed": "set `seed`",
    "data_seed": "set `seed`",
    "remove_unused_columns": "the collator needs every column",
    "resume_from_checkpoint": "a run with the same `output` resumes by itself",
    "push_to_hub": "push the finished folder with `hf upload`",
}
# arguments whose text can name a JSON file
FILE_KEYS = ("deepspeed", "fsdp_config", "accelerator_config")
_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 0,
    "learning_rate": 0,
    "weight_decay": 0,
    "warmup_steps": 0,
    "max_grad_norm": 0,
    "max_steps": -1,
    "dataloader_num_workers": 0,
    "save_total_limit": 1,
}


@cache
def _hints() -> dict[str, Any]:
    hints = get_type_hints(TrainingArguments)
    return hints | {new: hints[old] for old, new in ALIASES.items() if old in hints}


def newest(training: dict[str, Any]) -> dict[str, Any]:
    """Replace older names by new ones, and texts such as "3" by the numbers that transformers expects.

    Raises:
        SettingError: a value has another type than in transformers, or is too small; or both names are given.
    """
    if both := [old for old, new in ALIASES.items() if old in training and new in training]:
        raise SettingError(f"`{both[0]}` is the older name of `{ALIASES[both[0]]}`: give only one of them")
    training = {ALIASES.get(name, name): value for name, value in training.items()}
    # YAML 1.1 reads a false in `eval_strategy: no`
    training = {k: "no" if k.endswith("_strategy") and v is False else v for k, v in training.items()}
    return {name: _typed(name, value) if name in _hints() else value for name, value in training.items()}


def _typed(name: str, value: Any) -> Any:
    hint = _hints()[name]
    kinds = get_args(hint) or (hint,)
    names = ["null" if kind is type(None) else getattr(kind, "__name__", str(kind)) for kind in kinds]
    wrong = SettingError(f"`training.{name}`: expected {' or '.join(names)}, got {value!r}")
    if isinstance(value, bool) and bool not in kinds:
        raise wrong
    try:
        settings = ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)
        found = TypeAdapter(hint, config=settings).validate_python(value)
    except ValidationError:
        raise wrong from None
    if name in _LEAST and found is not None and found < _LEAST[name]:
        raise SettingError(f"`training.{name}` must be at least {_LEAST[name]}, got {value!r}")
    return found


def is_sharded(training: dict[str, Any]) -> bool:
    """Whether the weights are shared among devices during training: FSDP, or stage 3 of DeepSpeed's ZeRO."""
    config = training.get("deepspeed")
    if isinstance(config, str):
        try:
            config = json.loads(config if config.lstrip().startswith("{") else Path(config).read_text())
        except (OSError, ValueError):  # found when the files are checked
            config = None
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    return bool(training.get("fsdp")) or isinstance(zero, dict) and zero.get("stage") == 3


def check_json_files(training: dict[str, Any]) -> None:
    """Raises: SettingError if a setting names a file that is missing or is not a JSON object."""
    for name in FILE_KEYS:
        value = training.get(name)
        if not isinstance(value, str) or value.lstrip().startswith("{"):
            continue
        try:
            if not isinstance(json.loads(Path(value).read_text()), dict):
                raise ValueError("not a JSON object")
        except OSError:
            raise SettingError(f"`training.{name}`: there is no file {value}.") from None
        except (ValueError, RecursionError) as error:
            raise SettingError(f"`training.{name}`: {value} is not a JSON file of settings ({error}).") from None
