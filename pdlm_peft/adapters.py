"""Adapters: LoRA where a recipe wants it, the fingerprint of the base they belong to, loading, merging."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedConfig
from transformers.utils import cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from pdlm_hf import PdlmBaseConfig, PdlmBaseForConditionalGeneration, PdlmForConditionalGeneration
from pdlm_hf.adapters_pdlm import BASE_FILE, adapter_base
from pdlm_hf.conversion_pdlm import PARAMETER_PREFIXES
from pdlm_hf.errors_pdlm import SettingError

from .recipe import EMBEDDED, Adapter, Recipe

LANGUAGE = r"language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
VISION = r"vision_tower\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
EMBEDDINGS = ["embed_tokens", "lm_head"]
_SAMPLE = 64  # values of every tensor in a fingerprint


def lora_config(adapter: Adapter, has_regions: bool = True) -> LoraConfig:
    """PEFT's configuration of a recipe's adapter.

    Args:
        adapter ([`~recipe.Adapter`])
        has_regions (`bool`): the base model has region prompts to train.
    """
    full = [name for name in adapter.train_in_full if has_regions or name != "region_embedding"]
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha or 2 * adapter.rank,
        lora_dropout=adapter.dropout,
        target_modules=rf"model\.({LANGUAGE}|{VISION})" if adapter.vision else rf"model\.{LANGUAGE}",
        modules_to_save=full + EMBEDDINGS * adapter.train_embeddings,
        # said here, or PEFT asks the hub whether the vocabulary has changed
        ensure_weight_tying=False,
    )


def add_adapter(model, processor, adapter: Adapter) -> PeftModel:
    """The model with a new adapter; everything that is trained is float32.

    Args:
        model ([`PdlmForConditionalGeneration`]), processor (`PdlmProcessor`): gets the new words.
        adapter ([`~recipe.Adapter`])

    Raises:
        SettingError: more new words than free rows in the embedding.
    """
    if adapter.new_words:
        processor.tokenizer.add_tokens(adapter.new_words)
        rows = model.get_input_embeddings().weight.shape[0]
        if len(processor.tokenizer) > rows:
            raise SettingError(
                f"`adapter.new_words`: {len(adapter.new_words)} are too many: with them the tokenizer has "
                f"{len(processor.tokenizer)} tokens, the embedding {rows} rows."
            )
    wrapped = get_peft_model(model, lora_config(adapter, bool(model.config.num_region_prompts)))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped


# ---------------------------------------------------------------- the base


def fingerprint(base: str | Path) -> str:
    """Tells base checkpoints apart: a hash over names, shapes and the first values of all weights the model uses.

    The same for a checkpoint in the reference's format and in ours, in one file or many, in bfloat16 or float32
    (values are compared in bfloat16).

    Args:
        base (`str` or `Path`): folder or hub id.

    Raises:
        SettingError: there are no safetensors.
    """
    config = AutoConfig.from_pretrained(base)
    with torch.device("meta"):
        wanted = {name: tuple(tensor.shape) for name, tensor in _empty(config).state_dict().items()}
    digest, seen = hashlib.sha256(), {}
    for path in _weight_files(str(base)):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                ours = _our_name(name)
                if ours in wanted:
                    weights = file.get_slice(name)
                    first = weights[:1].flatten()[:_SAMPLE].to(torch.bfloat16)
                    if len(weights.get_shape()) == 1:
                        first = weights[:_SAMPLE].to(torch.bfloat16)
                    seen[ours] = first.float().numpy().tobytes() + repr(weights.get_shape()).encode()
    for name in sorted(seen):
        digest.update(name.encode() + seen[name])
    return digest.hexdigest()[:32]


def _our_name(name: str) -> str:
    for theirs, ours in PARAMETER_PREFIXES.items():
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    return name


def _empty(config):
    is_base = isinstance(config, PdlmBaseConfig)
    return (PdlmBaseForConditionalGeneration if is_base else PdlmForConditionalGeneration)(config)


def _weight_files(base: str) -> list[str]:
    """Local paths of the safetensors of a checkpoint."""
    index = cached_file(base, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index:
        return get_checkpoint_shard_files(base, index)[0]
    single = cached_file(base, "model.safetensors", _raise_exceptions_for_missing_entries=False)
    if not single:
        raise SettingError(f"{base}: there is no model.safetensors; is this a checkpoint folder or hub id?")
    return [single]


def base_name(base: str, folder: Path) -> str:
    """How files in `folder` name a base checkpoint: its hub id, or the path from the folder, so that both can move."""
    if not Path(base).is_dir():
        return base
    path = Path(os.path.relpath(base, folder)).as_posix()
    return path if path.startswith(".") else f"./{path}"


def write_base(folder: Path, recipe: Recipe, mark: str) -> None:
    """Note in a run's folder which base it belongs to, its switches and its settings of `generate`."""
    noted = {"base": base_name(recipe.base, folder), "fingerprint": mark, **overrides(recipe)}
    if recipe.model in EMBEDDED:
        noted["embedded"] = EMBEDDED[recipe.model].name
    (folder / BASE_FILE).write_text(json.dumps(noted, indent=1) + "\n")


def finish_adapter(folder: Path, recipe: Recipe, config: PreTrainedConfig) -> None:
    """Make what PEFT saved an adapter folder of ours; nothing happens if `folder` holds no adapter.

    With the model's `config.json` beside it, transformers leaves it to our class to find the base.

    Args:
        folder (`Path`), recipe ([`~recipe.Recipe`])
        config ([`PdlmConfig`]): of the model, with the recipe's switches.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        return
    settings = json.loads(path.read_text()) | {"base_model_name_or_path": base_name(recipe.base, folder)}
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    config.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card, with this machine's path of the base


def overrides(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """What a recipe changes of the model besides its weights."""
    return {"switches": recipe.switches.model_dump(exclude_none=True), "generation": recipe.generation}


def apply_overrides(model, noted: dict[str, dict[str, Any]]) -> None:
    """Set what [`overrides`] says."""
    for name, value in noted["switches"].items():
        setattr(model.config, name, value)
    model.generation_config.update(**noted["generation"])


def read_base(folder: str | Path) -> dict[str, Any]:
    """What [`write_base`] wrote. Raises: SettingError if the folder is no adapter of ours."""
    path = Path(folder) / BASE_FILE
    if not path.is_file():
        raise SettingError(f"{folder}: there is no {BASE_FILE}; is this an adapter folder that pdlm-peft wrote?")
    return json.loads(path.read_text())


def check_base(folder: str | Path, base: str | Path) -> None:
    """Raises: SettingError if the adapter belongs to other weights, or `base` cannot be loaded."""
    noted = read_base(folder)
    try:
        found = fingerprint(base)
    except OSError as error:
        raise SettingError(
            f"The base {base} of the adapter {folder} cannot be loaded. Give its folder or hub id: --base BASE, or "
            "`base` of `load_adapter` and `merge`."
        ) from error
    if noted["fingerprint"] != found:
        raise SettingError(
            f"The adapter {folder} was trained on other weights than those of {base} (fingerprint "
            f"{noted['fingerprint']}, got {found}): it was {noted['base']}. Give that checkpoint."
        )


# ---------------------------------------------------------------- loading and merging


def load_adapter(folder: str | Path, base: str | Path | None = None, **kwargs: Any) -> tuple[PeftModel, Any]:
    """Base and adapter, checked to belong together, with the switches and settings of the recipe.

    Args:
        folder (`str` or `Path`): adapter folder.
        base (`str` or `Path`, *optional*): its base, if it has moved.
        **kwargs: for `AutoModelForImageTextToText.from_pretrained`, `dtype` for example.

    Returns:
        the model and its processor.

    Raises:
        SettingError: no adapter of ours, or another base.
    """
    noted = read_base(folder)
    base = str(base or adapter_base(folder))
    check_base(folder, base)
    model = AutoModelForImageTextToText.from_pretrained(base, **kwargs)
    apply_overrides(model, noted)
    return PeftModel.from_pretrained(model, folder).eval(), AutoProcessor.from_pretrained(folder)


def merge(folder: str | Path, out: str | Path, base: str | Path | None = None, dtype: str = "auto") -> Path:
    """A checkpoint folder like any other: weights with the adapter in them, processor, generation settings.

    A base that was trained on in 4 bits is loaded in `dtype` here: merging into 4-bit weights would round the adapter
    away.

    Args:
        folder (`str` or `Path`): adapter folder.
        out (`str` or `Path`): new folder.
        base (`str` or `Path`, *optional*): its base, if it has moved.
        dtype (`str`): of the merged weights; "auto": that of the base.

    Raises:
        SettingError: another base, no adapter, or `out` exists.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SettingError(f"{out} exists and is not empty; give a new folder.")
    model, processor = load_adapter(folder, base, dtype=dtype)
    merged = model.merge_and_unload(safe_merge=True).to(model.dtype)
    unfinished = out.with_name(out.name + ".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    merged.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    if out.exists():
        out.rmdir()
    unfinished.rename(out)
    return out
