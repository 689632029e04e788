"""What a recipe needs, before anything is loaded: parameters, memory by part, steps, time.

The model is built without memory (on the "meta" device) from the configuration alone, so that the 8B is estimated on
any machine. Activations follow from the sizes; the tests compare them with what a model really keeps.
"""

from dataclasses import dataclass, field

import torch
from transformers import AutoConfig

from pdlm_hf import PdlmBaseConfig, PdlmBaseForConditionalGeneration, PdlmConfig, PdlmForConditionalGeneration
from pdlm_hf.errors_pdlm import SettingError
from pdlm_hf.tiling_pdlm import num_tiles

from .adapters import lora_config
from .recipe import Recipe

SHAPES = {"8b": PdlmConfig, "8b_base": PdlmBaseConfig}  # their defaults are the paper's model
GB = 1e9
TRAINED, ADAM, GRADIENT = 4, 8, 4  # bytes a trained parameter: float32 weight, two moments, gradient
FOUR_BIT = 0.5 + 0.016  # NF4 with doubly quantized scales
OVERHEAD = 1.5 * GB  # CUDA context, kernels' workspaces, fragments
# Values that one layer keeps for the backward pass, per token: times the width, and times that of the MLP. In bfloat16
# the norms keep float32 copies beside them.
KEPT_WIDTH, KEPT_MLP, KEPT_NORMS = 10, 4, 4
LOGIT_BYTES = 14  # per masked token and word of the vocabulary: logits, their float32 copy, softmax, gradient


@dataclass
class Estimate:
    """What a run needs.

    Args:
        parameters, trainable (`dict[str, int]`): by part of the model.
        memory (`dict[str, float]`): bytes on each device, by use.
        steps (`int`, *optional*): optimizer steps; None if the data is not there yet.
        rows (`int`): rows of an optimizer step on one device.
        tokens (`int`): of the longest row.
        flops (`float`): of one optimizer step, on one device.
    """

    parameters: dict[str, int]
    trainable: dict[str, int]
    memory: dict[str, float]
    steps: int | None
    rows: int
    tokens: int
    flops: float
    advice: list[str] = field(default_factory=list)

    @property
    def total(self) -> float:
        """Bytes on each device."""
        return sum(self.memory.values())

    def hours(self, tflops: float) -> float | None:
        """Time of the run at so many achieved TFLOP/s a device."""
        return None if self.steps is None else self.steps * self.flops / (tflops * 1e12) / 3600


@dataclass(frozen=True)
class Row:
    """Sizes of a training row.

    Args:
        tiles, tokens, answer (`int`): image tiles, tokens in all, tokens of the captions.
    """

    tiles: int
    tokens: int
    answer: int


def load_config(recipe: Recipe) -> PdlmConfig:
    """Configuration of the recipe's model, or that of a named shape. Raises: SettingError if there is none."""
    if recipe.model in SHAPES:
        return SHAPES[recipe.model]()
    try:
        return AutoConfig.from_pretrained(recipe.base)
    except OSError as error:
        raise SettingError(f"`model`: {recipe.model} has no configuration; give a folder, a hub id or 8b.") from error


def meta_model(recipe: Recipe, config: PdlmConfig):
    """The recipe's model without memory, its adapter and frozen parts in place."""
    from peft import get_peft_model

    is_base = isinstance(config, PdlmBaseConfig)
    with torch.device("meta"):
        model = (PdlmBaseForConditionalGeneration if is_base else PdlmForConditionalGeneration)(config)
        if recipe.adapter is not None:
            return get_peft_model(model, lora_config(recipe.adapter, bool(config.num_region_prompts)))
    for part in recipe.freeze:
        getattr(model.model, part).requires_grad_(False)
    return model


def largest_row(config: PdlmConfig, num_slots: int = 48) -> Row:
    """A row of an image with the most tiles and regions, for data that is not there yet."""
    tiles = num_tiles(config.max_tiles, 1)
    regions = config.num_region_prompts
    answer = max(regions, 4) * num_slots
    tokens = 40 + tiles * config.feature_grid**2 + regions * (config.num_roi_tokens + 2) + answer
    return Row(tiles, tokens, answer)


def activations(config: PdlmConfig, row: Row, rows: int, width: int, checkpointing: bool) -> float:
    """Bytes kept for the backward pass of `rows` rows.

    Args:
        config ([`PdlmConfig`]), row ([`Row`]), rows (`int`)
        width (`int`): bytes of a value: 2 for bfloat16, 4 for float32.
        checkpointing (`bool`): keep the input of each layer only, and what one layer needs.
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


def estimate(
    recipe: Recipe,
    config: PdlmConfig,
    row: Row | None = None,
    steps: int | None = None,
    mean_tokens: int | None = None,
) -> Estimate:
    """Parameters, memory and work of a recipe.

    Args:
        recipe ([`~recipe.Recipe`]), config ([`PdlmConfig`])
        row ([`Row`], *optional*): the longest of the data; default: the largest there can be.
        steps (`int`, *optional*): optimizer steps, if known.
        mean_tokens (`int`, *optional*): of a row, for the time; default: as the longest.
    """
    row = row or largest_row(config)
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
        "optimizer": trained * ADAM / spread,
        "activations": activations(config, row, batch, 2 if bf16 else 4, checkpointing),
        "overhead": OVERHEAD,
    }
    if shared > 1:  # two layers' weights are there as a whole
        memory["gathered"] = 2 * 4 * _largest_block(config) * (1 if recipe.adapter else 2)
    passes = 2 * (2 if recipe.adapter else 3) + 2 * checkpointing  # forward, backward, forward again
    tokens = mean_tokens or row.tokens
    vision = parameters.get("vision tower", 0) * row.tiles * config.patch_grid**2
    language = (sum(parameters.values()) - parameters.get("vision tower", 0)) * tokens
    flops = passes * batch * accumulation * (language + vision)
    result = Estimate(parameters, trainable, memory, steps, batch * accumulation, row.tokens, flops)
    result.advice = advice(recipe, batch, checkpointing)
    return result


def advice(recipe: Recipe, batch: int, checkpointing: bool) -> list[str]:
    """What could make it fit, the least loss first."""
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
    """Raises: SettingError with advice if the run needs more than `memory` GB."""
    if found.total > memory * GB:
        parts = ", ".join(f"{name} {size / GB:.1f}" for name, size in found.memory.items())
        raise SettingError(
            f"needs about {found.total / GB:.1f} GB a device, more than the {memory:g} GB there are ({parts}). "
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
