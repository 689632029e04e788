"""LoRA adapters of a recipe: adding, saving, loading and merging them, and the fingerprint of their base."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, GenerationConfig, PreTrainedConfig
from transformers.utils import cached_file
from transformers.utils.hub import get_checkpoint_shard_files

from pdlm_hf import PdlmBaseConfig, PdlmBaseForConditionalGeneration, PdlmForConditionalGeneration
from pdlm_hf.adapters_pdlm import BASE_FILE, adapter_base
from pdlm_hf.conversion_pdlm import PARAMETER_PREFIXES
from pdlm_hf.errors_pdlm import CheckpointError, SettingError
from pdlm_hf.regions.files import write_json

from .recipe import EMBEDDED, Adapter, Recipe

# regular expressions for PEFT's `target_modules`
LANGUAGE_LAYERS = r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"
VISION_LAYERS = r"model\.vision_tower\.encoder\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
EMBEDDINGS = ["embed_tokens", "lm_head"]
_SAMPLE = 64  # values of each tensor that enter a fingerprint


def lora_config(adapter: Adapter, has_regions: bool = True) -> LoraConfig:
    """PEFT's configuration for the adapter of a recipe.

    Args:
        adapter ([`~recipe.Adapter`]): its kind, size and layers.
        has_regions (`bool`): whether the base model has region prompts to train.
    """
    full = [name for name in adapter.train_in_full if has_regions or name != "region_embedding"]
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha or 2 * adapter.rank,
        lora_dropout=adapter.dropout,
        target_modules=f"{LANGUAGE_LAYERS}|{VISION_LAYERS}" if adapter.vision else LANGUAGE_LAYERS,
        modules_to_save=full + EMBEDDINGS * adapter.train_embeddings,
        # set explicitly, or PEFT asks the hub whether the vocabulary has changed
        ensure_weight_tying=False,
    )


def add_adapter(model, processor, adapter: Adapter) -> PeftModel:
    """Add a new adapter to a model; all trained parameters become float32.

    Args:
        model ([`PdlmForConditionalGeneration`]): the base, which is changed.
        processor (`PdlmProcessor`): its tokenizer gets the adapter's new words.
        adapter ([`~recipe.Adapter`]): its kind, size and layers.

    Returns:
        the model, wrapped by PEFT.

    Raises:
        SettingError: there are more new words than free rows in the embedding.
    """
    if adapter.new_words:
        processor.tokenizer.add_tokens(adapter.new_words)
        _check_rows(adapter, len(processor.tokenizer), model.get_input_embeddings().weight.shape[0])
    wrapped = get_peft_model(model, lora_config(adapter, bool(model.config.num_region_prompts)))
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return wrapped


def check_new_words(base: str | Path, processor, adapter: Adapter) -> None:
    """Whether the new words of an adapter fit into the embedding of its base, without changing anything.

    Raises:
        SettingError: there are more new words than free rows in the embedding.
    """
    known = processor.tokenizer.get_vocab()
    tokens = len(processor.tokenizer) + len({word for word in adapter.new_words if word not in known})
    _check_rows(adapter, tokens, AutoConfig.from_pretrained(base).text_config.vocab_size)


def _check_rows(adapter: Adapter, tokens: int, rows: int) -> None:
    if adapter.new_words and tokens > rows:
        raise SettingError(
            f"`adapter.new_words`: {len(adapter.new_words)} are too many: with them the tokenizer has {tokens} "
            f"tokens, but the embedding has {rows} rows."
        )


# ---------------------------------------------------------------- the base


def fingerprint(base: str | Path) -> str:
    """Hash the names, shapes and first values of all weights that the model uses.

    It identifies a base checkpoint, whether in the reference's format or in ours, in one file or many, in bfloat16 or
    float32 (values are compared in bfloat16).

    Args:
        base (`str` or `Path`): folder or hub id.

    Raises:
        CheckpointError: there are no safetensors files.
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
    """Local paths of the safetensors files of a checkpoint."""
    index = cached_file(base, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    if index:
        return get_checkpoint_shard_files(base, index)[0]
    single = cached_file(base, "model.safetensors", _raise_exceptions_for_missing_entries=False)
    if not single:
        raise CheckpointError(f"{base}: there is no model.safetensors; give a checkpoint folder or hub id.")
    return [single]


def base_name(base: str, folder: Path) -> str:
    """How files in `folder` refer to a base checkpoint: by hub id, or by relative path, so that both can be moved."""
    if not Path(base).is_dir():
        return base
    path = Path(os.path.relpath(base, folder)).as_posix()
    return path if path.startswith(".") else f"./{path}"


def write_base(folder: Path, recipe: Recipe, base_fingerprint: str) -> None:
    """Record the base of a run in its folder, with the recipe's switches and settings of `generate`."""
    record = {"base": base_name(recipe.base, folder), "fingerprint": base_fingerprint, **overrides(recipe)}
    if recipe.model in EMBEDDED:
        record["embedded"] = EMBEDDED[recipe.model].name
    write_json(folder / BASE_FILE, record)


def finish_adapter(
    folder: Path, recipe: Recipe, config: PreTrainedConfig, generation_config: GenerationConfig
) -> None:
    """Complete the adapter that PEFT saved in `folder`, if it saved one.

    The model's `config.json` beside it makes transformers call our class, which finds the base.

    Args:
        folder (`Path`), recipe ([`~recipe.Recipe`])
        config ([`PdlmConfig`]), generation_config ([`PdlmGenerationConfig`]): those of the model, with the recipe's
            switches and settings of `generate`.
    """
    path = folder / "adapter_config.json"
    if not path.is_file():
        return
    settings = json.loads(path.read_text()) | {"base_model_name_or_path": base_name(recipe.base, folder)}
    write_json(path, settings)
    config.save_pretrained(folder)
    generation_config.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty card, which has the absolute path of the base


def overrides(recipe: Recipe) -> dict[str, dict[str, Any]]:
    """The configuration switches and settings of `generate` that a recipe sets."""
    return {"switches": recipe.switches.model_dump(exclude_none=True), "generation": recipe.generation}


def apply_overrides(model, values: dict[str, dict[str, Any]]) -> None:
    """Set the values of [`overrides`] in the configurations of a model."""
    for name, value in values["switches"].items():
        setattr(model.config, name, value)
    model.generation_config.update(**values["generation"])


def read_base(folder: str | Path) -> dict[str, Any]:
    """Read the record of [`write_base`].

    Raises:
        CheckpointError: pdlm-peft did not write this adapter folder.
    """
    path = Path(folder) / BASE_FILE
    if not path.is_file():
        raise CheckpointError(f"{folder}: there is no {BASE_FILE}; give an adapter folder that pdlm-peft wrote.")
    return json.loads(path.read_text())


def check_base(folder: str | Path, base: str | Path) -> None:
    """Check that an adapter belongs to a base checkpoint.

    Raises:
        CheckpointError: the adapter was trained on other weights, or the base cannot be loaded.
    """
    record = read_base(folder)
    try:
        found = fingerprint(base)
    except OSError as error:
        raise CheckpointError(
            f"The base {base} of the adapter {folder} cannot be loaded. Give its folder or hub id: --base BASE, or "
            "`base` of `load_adapter` and `merge`."
        ) from error
    if record["fingerprint"] != found:
        raise CheckpointError(
            f"The adapter {folder} was trained on other weights than those of {base} (fingerprint "
            f"{record['fingerprint']}, got {found}). Give the checkpoint that it was trained on, {record['base']}."
        )


# ---------------------------------------------------------------- loading and merging


def load_adapter(folder: str | Path, base: str | Path | None = None, **kwargs: Any) -> tuple[PeftModel, Any]:
    """Load an adapter on its base, with the switches and settings of its recipe.

    Args:
        folder (`str` or `Path`): adapter folder.
        base (`str` or `Path`, *optional*): folder or hub id of its base, if that has moved.
        **kwargs: for `AutoModelForImageTextToText.from_pretrained`, `dtype` for example.

    Returns:
        the model and its processor.

    Raises:
        CheckpointError: pdlm-peft did not write the adapter, or it was trained on another base.
    """
    record = read_base(folder)
    base = str(base or adapter_base(folder))
    check_base(folder, base)
    model = AutoModelForImageTextToText.from_pretrained(base, **kwargs)
    apply_overrides(model, record)
    return PeftModel.from_pretrained(model, folder).eval(), AutoProcessor.from_pretrained(folder)


def merge(folder: str | Path, out: str | Path, base: str | Path | None = None, dtype: str = "auto") -> Path:
    """Merge an adapter into its base and save the checkpoint: weights, processor and generation settings.

    After training in 4 bits, the base is loaded in `dtype` here: merging into 4-bit weights would round the adapter
    away.

    Args:
        folder (`str` or `Path`): adapter folder.
        out (`str` or `Path`): new folder.
        base (`str` or `Path`, *optional*): folder or hub id of its base, if that has moved.
        dtype (`str`): type of the merged weights; "auto": that of the base.

    Returns:
        `out`.

    Raises:
        CheckpointError: pdlm-peft did not write the adapter, or it was trained on another base.
        SettingError: `out` exists and is not empty.
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
