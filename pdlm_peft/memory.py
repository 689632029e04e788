"""Estimate what a recipe needs before its weights are loaded: parameters, memory by part, steps, time.

The model is built on the "meta" device from the configuration alone, so that any machine can estimate the 8B.
Activations are computed from the sizes; the tests compare them with the tensors that autograd keeps.
"""

import os
import re
from dataclasses import dataclass, field

import torch
from transformers import AutoConfig, AutoProcessor

from pdlm_hf import PdlmBaseConfig, PdlmBaseForConditionalGeneration, PdlmConfig, PdlmForConditionalGeneration
from pdlm_hf.errors_pdlm import CheckpointError, SettingError
from pdlm_hf.tiling_pdlm import num_tiles

from .adapters import lora_config
from .plan import PROMPT_TOKENS, RowSize, measure_run
from .recipe import Recipe

SHAPES = {"8b": PdlmConfig, "8b_base": PdlmBaseConfig}  # the defaults are the sizes of the paper's model
GB = 1e9
TRAINED, GRADIENT = 4, 4  # bytes per trained parameter: float32 weight, gradient
# What `training.optim` keeps per trained parameter, in bytes; the first pattern in its name counts. Low-rank methods
# (GaLore, APOLLO) keep less than this.
OPTIMIZERS = (
    (r"lomo|adafactor", 0.1),  # none, or a row and a column of each matrix
    (r"ademamix.*8bit", 3),
    (r"ademamix", 12),
    (r"(lion|rmsprop).*8bit", 1),
    (r"lion|rmsprop|adagrad|schedule_free_sgd", 4),
    (r"8bit", 2),
    (r"4bit", 1),
    (r"sgd", 0),  # with momentum 4
    (r"grokadamw", 12),
    (r"", 8),  # the two moments of Adam
)
FOUR_BIT = 0.5 + 0.016  # bytes per parameter: NF4 with doubly quantized scales
OVERHEAD = 1.5 * GB  # CUDA context, workspaces of kernels, fragmentation
# Values that one layer keeps per token for the backward pass: this many times its hidden size, and this many times
# the hidden size of its MLP. In bfloat16 the norms keep float32 copies in addition.
KEPT_WIDTH, KEPT_MLP, KEPT_NORMS = 10, 4, 4
LOGIT_BYTES = 14  # per masked token and vocabulary entry: logits, their float32 copy, softmax, gradient


@dataclass
class Estimate:
    """The estimated needs of a run.

    Args:
        parameters, trainable (`dict[str, int]`): numbers of parameters by part of the model.
        memory (`dict[str, float]`): bytes on each device, by use.
        steps (`int`, *optional*): optimizer steps; None if they are not known without the data.
        rows (`int`): rows per optimizer step on one device.
        tokens (`int`): tokens of the longest row.
        left_out (`int`): rows that are longer than `data.max_length`.
        flops (`float`): floating point operations of one optimizer step on one device.
        advice (`list[str]`): settings that would reduce the memory.
    """

    parameters: dict[str, int]
    trainable: dict[str, int]
    memory: dict[str, float]
    steps: int | None
    rows: int
    tokens: int
    flops: float
    left_out: int = 0
    advice: list[str] = field(default_factory=list)

    @property
    def total(self) -> float:
        """Bytes on each device."""
        return sum(self.memory.values())

    def hours(self, tflops: float) -> float | None:
        """Duration of the run if each device achieves so many TFLOP/s; None if the steps are not known."""
        return None if self.steps is None else self.steps * self.flops / (tflops * 1e12) / 3600


def load_config(recipe: Recipe) -> PdlmConfig:
    """Load the configuration of a recipe's model, or of one of [`SHAPES`].

    Raises:
        CheckpointError: there is no such folder or hub id.
    """
    if recipe.model in SHAPES:
        return SHAPES[recipe.model]()
    try:
        return AutoConfig.from_pretrained(recipe.base)
    except OSError as error:
        raise CheckpointError(
            f"`model`: {recipe.model} has no configuration; give a folder, a hub id or 8b."
        ) from error


def check_kind(recipe: Recipe, config: PdlmConfig) -> None:
    """Raises: SettingError for region data with a checkpoint without region prompts."""
    if recipe.data.kind != "chat" and not config.num_region_prompts:
        raise SettingError(
            f"{recipe.model} is a base (chat) checkpoint without region prompts; set `data.kind: chat`."
        )


def meta_model(recipe: Recipe, config: PdlmConfig):
    """The recipe's model on the "meta" device, with its adapter or its frozen parts."""
    from peft import get_peft_model

    is_base = isinstance(config, PdlmBaseConfig)
    with torch.device("meta"):
        model = (PdlmBaseForConditionalGeneration if is_base else PdlmForConditionalGeneration)(config)
        if recipe.adapter is not None:
            return get_peft_model(model, lora_config(recipe.adapter, bool(config.num_region_prompts)))
    for part in recipe.freeze:
        getattr(model.model, part).requires_grad_(False)
    return model


def largest_row(config: PdlmConfig, num_slots: int = 48, max_length: int | None = None) -> RowSize:
    """Size of a row with as many tiles and regions as the model takes, for estimates without the data.

    Args:
        config ([`PdlmConfig`])
        num_slots (`int`): token positions per caption.
        max_length (`int`, *optional*): tokens of a conversation at most, which then are assumed.
    """
    tiles = num_tiles(config.max_tiles, 1)
    regions = config.num_region_prompts
    answer = max(regions, 4) * num_slots
    prompt = PROMPT_TOKENS + tiles * config.feature_grid**2 + regions * (config.num_roi_tokens + 2)
    if max_length is not None:
        return RowSize(tiles, max_length, max(1, max_length - prompt))
    tokens = prompt + answer
    return RowSize(tiles, tokens, answer)


def activations(config: PdlmConfig, row: RowSize, rows: int, width: int, checkpointing: bool) -> float:
    """Bytes that the forward pass of `rows` rows keeps for the backward pass.

    Args:
        config ([`PdlmConfig`]), row ([`~plan.RowSize`]), rows (`int`)
        width (`int`): bytes per value: 2 for bfloat16, 4 for float32.
        checkpointing (`bool`): keep the input of each layer only, and the activations of one layer.
    """
    text, vision = config.text_config, config.vision_config
    total = 0.0
    towers = (
        (text.num_hidden_layers, text.hidden_size, text.intermediate_size, row.tokens),
        (
            vision.num_hidden_layers + 1 + config.vision_feature_layer,
            vision.hidden_size,
            vision.intermediate_size,
            row.tiles * config.patch_grid**2,
        ),
    )
    for layers, hidden, mlp, tokens in towers:
        layer = ((KEPT_WIDTH + KEPT_NORMS * (width == 2)) * hidden + KEPT_MLP * mlp) * width
        kept = layers * hidden * width + layer if checkpointing else layers * layer
        total += rows * tokens * kept
    attention = rows * row.tokens**2 * width  # the region mask, once for all layers
    logits = rows * row.answer * text.vocab_size * LOGIT_BYTES
    return total + attention + logits


def estimate_recipe(recipe: Recipe, dry_run: bool = False) -> Estimate:
    """Estimate a recipe, with the steps and row lengths of its data if that is a file.

    Args:
        recipe ([`~recipe.Recipe`]): model, data and training settings.
        dry_run (`bool`): `model` may be one of [`SHAPES`]; its data is not read.

    Raises:
        SettingError: `model` is one of [`SHAPES`], and it is no dry run, or it does not fit `data.kind`.
        CheckpointError: there is no such model.
        DataError: the data cannot be used.
    """
    if recipe.model in SHAPES and not dry_run:
        raise SettingError(f"`model: {recipe.model}` is a shape for --dry-run; give a folder or hub id, model=DIR.")
    config, data, steps = load_config(recipe), recipe.data, recipe.training.get("max_steps", -1)
    check_kind(recipe, config)
    if recipe.model in SHAPES or data.kind == "drawn" or data.streaming or recipe.commit is not None:
        return estimate(recipe, config, steps=steps if steps > 0 else None)
    processes = int(os.environ.get("WORLD_SIZE", recipe.hardware.devices))
    run = measure_run(recipe, AutoProcessor.from_pretrained(recipe.base), processes)
    found = estimate(recipe, config, run.longest, run.steps, run.mean_tokens)
    found.left_out = run.left_out
    return found


def optimizer_bytes(training: dict) -> float:
    """Bytes that the optimizer of a recipe keeps for each trained parameter."""
    name = str(training.get("optim", "adamw_torch"))
    if name == "sgd" and "momentum" in str(training.get("optim_args", "")):
        return 4
    return next(size for pattern, size in OPTIMIZERS if re.search(pattern, name))


def device_memory(recipe: Recipe, dry_run: bool = False) -> float | None:
    """GB of the device that this process trains on, or in a dry run of the recipe's hardware; None without a GPU."""
    if dry_run and recipe.hardware.memory:
        return recipe.hardware.memory
    if torch.cuda.is_available() and not recipe.training.get("use_cpu"):
        return torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", 0)))[1] / GB
    return None


def estimate(
    recipe: Recipe,
    config: PdlmConfig,
    row: RowSize | None = None,
    steps: int | None = None,
    mean_tokens: int | None = None,
) -> Estimate:
    """Estimate parameters, memory and work of a recipe for rows of known size.

    Args:
        recipe ([`~recipe.Recipe`]), config ([`PdlmConfig`])
        row ([`~plan.RowSize`], *optional*): the longest row of the data; default: [`largest_row`].
        steps (`int`, *optional*): optimizer steps, if known.
        mean_tokens (`int`, *optional*): mean tokens per row, for the duration; default: those of `row`.
    """
    row = row or largest_row(config, max_length=recipe.data.max_length)
    training, hardware = recipe.training, recipe.hardware
    batch = training.get("per_device_train_batch_size", 8)
    accumulation = training.get("gradient_accumulation_steps", 1)
    parameters: dict[str, int] = {}
    trainable: dict[str, int] = {}
    frozen_bytes = trained = 0.0
    for name, parameter in meta_model(recipe, config).named_parameters():
        part = _part(name)
        parameters[part] = parameters.get(part, 0) + parameter.numel()
        if parameter.requires_grad:
            trainable[part] = trainable.get(part, 0) + parameter.numel()
            trained += parameter.numel()
        else:
            four_bit = recipe.quantize and "language_model.layers" in name and parameter.ndim == 2
            frozen_bytes += parameter.numel() * (FOUR_BIT if four_bit else _width(recipe.dtype))
    shared = hardware.devices if hardware.shard == "full" else 1
    spread = hardware.devices if hardware.shard != "none" else 1
    bf16 = training.get("bf16") or recipe.dtype == "bfloat16"
    checkpointing = bool(training.get("activation_checkpointing"))
    memory = {
        "weights": (frozen_bytes + trained * TRAINED) / shared,
        "gradients": trained * GRADIENT / spread,
        "optimizer": trained * optimizer_bytes(training) / spread,
        "activations": activations(config, row, batch, 2 if bf16 else 4, checkpointing),
        "overhead": OVERHEAD,
    }
    if shared > 1:  # the whole weights of two layers are gathered on each device
        memory["gathered"] = 2 * 4 * _largest_block(config) * (1 if recipe.adapter else 2)
    passes = 2 * (2 if recipe.adapter else 3) + 2 * checkpointing  # forward, backward, recomputed forward
    tokens = mean_tokens or row.tokens
    vision = parameters.get("vision tower", 0) * row.tiles * config.patch_grid**2
    language = (sum(parameters.values()) - parameters.get("vision tower", 0)) * tokens
    flops = passes * batch * accumulation * (language + vision)
    tips = advice(recipe, batch, checkpointing)
    return Estimate(parameters, trainable, memory, steps, batch * accumulation, row.tokens, flops, advice=tips)


def advice(recipe: Recipe, batch: int, checkpointing: bool) -> list[str]:
    """Settings that reduce the memory, those that cost least first."""
    tips = []
    if not checkpointing:
        tips.append("training.activation_checkpointing=true")
    if batch > 1:
        accumulation = recipe.training.get("gradient_accumulation_steps", 1) * batch
        tips.append(f"training.per_device_train_batch_size=1 training.gradient_accumulation_steps={accumulation}")
    if recipe.adapter is None:
        tips.append("an adapter instead of all weights (recipe lora_8b_80gb)")
    elif recipe.quantize is None:
        tips.append("quantize=4bit (recipe qlora_8b_24gb)")
    if recipe.adapter is not None and recipe.adapter.train_embeddings:
        tips.append("adapter.train_embeddings=false")
    if recipe.hardware.shard != "full":
        tips.append("several devices that share the weights (recipes lora_8b_fsdp, lora_8b_zero3)")
    return tips


def refuse(found: Estimate, memory: float) -> None:
    """Refuse a run that does not fit the device.

    Args:
        found ([`Estimate`])
        memory (`float`): GB per device.

    Raises:
        SettingError: the run needs more; the message has the parts and advice.
    """
    if found.total > memory * GB:
        parts = ", ".join(f"{name} {size / GB:.1f}" for name, size in found.memory.items())
        raise SettingError(
            f"The run needs about {found.total / GB:.1f} GB per device, which has {memory:g} GB ({parts}). "
            f"Try {'; or '.join(found.advice)}."
        )


def _part(name: str) -> str:
    for key, part in (
        ("lora_", "LoRA"),
        ("original_module", "kept originals"),
        ("vision_tower", "vision tower"),
        ("region_embedding", "region prompts"),
        ("multi_modal_projector", "projector"),
        ("embed_tokens", "embeddings and head"),
        ("lm_head", "embeddings and head"),
    ):
        if key in name:
            return part
    return "language model"


def _width(dtype: str) -> int:
    return 2 if dtype == "bfloat16" else 4


def _largest_block(config: PdlmConfig) -> int:
    text = config.text_config
    layer = 4 * text.hidden_size**2 + 3 * text.hidden_size * text.intermediate_size
    return max(layer, text.vocab_size * text.hidden_size)
