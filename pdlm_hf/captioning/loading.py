"""Load a checkpoint, and check that its files are whole and belong together."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
from transformers.utils import logging

from ..adapters_pdlm import BASE_FILE
from ..configuration_pdlm import HUB_ARGUMENTS, PdlmConfig, as_list
from ..errors_pdlm import CheckpointError, DataError, reading
from ..regions.files import load_json
from .checkpoints import checkpoint_name

logger = logging.get_logger(__name__)

# Sizes in `config.json` far above any model: beyond them building the model takes hours or all memory.
_LARGEST = (
    {"num_hidden_layers": 512, "num_attention_heads": 512, "num_key_value_heads": 512}
    | dict.fromkeys(
        ("hidden_size", "intermediate_size", "head_dim", "image_size", "patch_size", "num_channels"), 2**17
    )
    | {"max_position_embeddings": 2**24}
)
_PROCESSOR = "processor_config.json or preprocessor_config.json"
_TOKENS = (
    "mask_token_id",
    "start_header_token_id",
    "end_header_token_id",
    "eot_token_id",
    "image_token_id",
    "newline_token_id",
)


def load_checkpoint(model: str | Path, dtype: Any = "auto", **kwargs: Any) -> tuple[Any, Any]:
    """Load the model and the processor of a checkpoint, and check that they belong together.

    Args:
        model (`str` or `Path`): folder or hub id.
        dtype: as in `AutoModel.from_pretrained`.
        **kwargs: passed to `AutoModelForImageTextToText.from_pretrained`.

    Returns:
        the model and the processor.

    Raises:
        CheckpointError: the folder does not exist, a file is missing or damaged (the message names it), or the files
            are of different checkpoints.
        OSError: the hub has no such checkpoint, or cannot be reached.
    """
    path = checkpoint_name(model)
    processor = load_processor(
        path, **{name: kwargs[name] for name in (*HUB_ARGUMENTS, "trust_remote_code") if name in kwargs}
    )
    with reading_files(path, "config.json or the weights"):
        network, report = _load_weights(path, dtype=dtype, output_loading_info=True, **kwargs)
        if missing := sorted(report["missing_keys"]):
            raise CheckpointError(
                f"{path}: {len(missing)} weights that config.json asks for are missing, {missing[0]} for example."
            )
        if unexpected := sorted(report["unexpected_keys"]):
            logger.warning(
                "%s: %d weights have no place in the model, such as %s.", path, len(unexpected), unexpected[0]
            )
    with reading_files(path, "config.json, processor_config.json, tokenizer.json or chat_template.jinja"):
        check_together(network.config, processor)
    return network, processor


def load_processor(model: str | Path, **source: Any) -> Any:
    """Load the processor of a checkpoint, and check all its files but the weights: a first look that takes no time.

    Args:
        model (`str` or `Path`): folder or hub id.
        **source: as `load_checkpoint` has them, of the hub.

    Raises:
        CheckpointError, OSError: see [`load_checkpoint`].
    """
    path = checkpoint_name(model)
    is_adapter = Path(path, BASE_FILE).is_file()
    if Path(path).is_dir():
        _check_files(Path(path, source.get("subfolder") or ""), is_adapter)
    if not is_adapter:
        with reading_files(path, "config.json"):
            check_sizes(AutoConfig.from_pretrained(path, **source))
    with reading_files(path, _PROCESSOR):
        return AutoProcessor.from_pretrained(path, **source)


def _load_weights(path: str, **kwargs: Any) -> Any:
    """The model and what was found in the files, without transformers' table of it."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return AutoModelForImageTextToText.from_pretrained(path, **kwargs)
    finally:
        logging.set_verbosity(level)


@contextmanager
def reading_files(path: str, file: str) -> Iterator[None]:
    """As [`~pdlm_hf.errors_pdlm.reading`]; also for what transformers says of a file that a folder lacks."""
    try:
        with reading(path, file):
            yield
    except OSError as error:
        if error.errno is not None or not Path(path).is_dir():
            raise
        raise CheckpointError(f"{path}: {file}: {' '.join(str(error).split()):.300}") from None


def _check_files(folder: Path, is_adapter: bool) -> None:
    """Raises: CheckpointError: the folder lacks a file, or a file of settings is no JSON object."""
    needed = ("tokenizer.json",) if is_adapter else ("config.json", "tokenizer.json")
    if missing := [name for name in needed if not (folder / name).is_file()]:
        raise CheckpointError(f"{folder}: has no {missing[0]}, so it is no checkpoint, or not a whole one.")
    if not is_adapter and not any(folder.glob("*.safetensors")):
        raise CheckpointError(f"{folder}: has no weights (*.safetensors).")
    for path in sorted(folder.glob("*.json")):
        try:
            content = load_json(path)
        except DataError as error:
            raise CheckpointError(str(error)) from None
        if path.name in _OBJECTS and not isinstance(content, dict):
            raise CheckpointError(f"{path}: expected a JSON object, got {content!r:.60}.")


_OBJECTS = (
    *("config.json", "generation_config.json", "processor_config.json", "preprocessor_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "model.safetensors.index.json"),
    *("adapter_config.json", BASE_FILE),
)


def check_sizes(config: Any) -> None:
    """Raises: CheckpointError: it is not a PerceptionDLM, or a size or a token is not possible."""
    if not isinstance(config, PdlmConfig) and getattr(config, "model_type", None) not in ("pdmllm", "dmllm"):
        raise CheckpointError(
            f"config.json: is of a {getattr(config, 'model_type', type(config).__name__)}, not of PerceptionDLM."
        )
    for part in ("text_config", "vision_config"):
        values = getattr(config, part)
        for name, largest in _LARGEST.items():
            value = getattr(values, name, None)
            if value is not None and not (isinstance(value, int) and 1 <= value <= largest):
                raise CheckpointError(f"config.json: {part}.{name} must be in 1..{largest}, got {value!r:.60}.")
        for name in ("output_hidden_states", "output_attentions", "return_dict"):
            if not isinstance(value := getattr(values, name, False), (bool, type(None))):
                raise CheckpointError(f"config.json: {part}.{name} must be true or false, got {value!r:.60}.")
    vocabulary = config.text_config.vocab_size
    if not 1 <= vocabulary <= 2**24:
        raise CheckpointError(f"config.json: text_config.vocab_size must be in 1..{2**24}, got {vocabulary}.")
    for name, token in _tokens_of(config):
        if not 0 <= token < vocabulary:
            raise CheckpointError(f"config.json: {name} must be in 0..{vocabulary - 1}, got {token}.")
    limits = {"min_tiles": config.min_tiles, "max_tiles": config.max_tiles}
    limits |= {"roi_output_size": max(config.roi_output_size)} if config.num_region_prompts else {}
    for name, value in limits.items():
        if not 1 <= value <= 1024:
            raise CheckpointError(f"config.json: {name} must be in 1..1024, got {value}.")


def _tokens_of(config: Any) -> Iterator[tuple[str, int]]:
    for name in (*_TOKENS, "bos_token_id", "eos_token_id", "region_token_ids", "caption_token_ids"):
        for token in as_list(getattr(config, name)):
            yield name, token


def check_together(config: Any, processor: Any) -> None:
    """Build the inputs of a small image, and compare them with the model.

    Raises:
        CheckpointError: the processor or the tokenizer is of another checkpoint than the model.
    """
    visual, size = processor.image_processor, processor.image_processor.size
    pairs = {
        "tokens_per_tile": (processor.tokens_per_tile, config.feature_grid**2),
        "tokens_per_region": (processor.tokens_per_region, config.num_roi_tokens),
        "size": (size if isinstance(size, int) else size["height"], config.vision_config.image_size),
        "patch_size": (visual.patch_size, config.vision_config.patch_size),
    }
    if config.num_region_prompts:
        pairs["num_region_prompts"] = (visual.num_region_prompts, config.num_region_prompts)
    for name, (here, there) in pairs.items():
        if here != there:
            raise CheckpointError(f"{_PROCESSOR}: {name} is {here!r:.60}, config.json needs {there!r:.60}.")
    if processor.image_token_id != config.image_token_id:
        raise CheckpointError(
            f"tokenizer.json: <IMG_CONTEXT> is {processor.image_token_id}, config.json has {config.image_token_id}."
        )
    image = Image.new("RGB", (8, 8))
    mask = [Image.new("1", (8, 8), 1)]
    inputs = processor(images=image, **({"segmentation_maps": mask} if config.num_region_prompts else {"text": "?"}))
    if not bool(inputs["pixel_values"].isfinite().all()):
        raise CheckpointError(
            f"{_PROCESSOR}: image_mean, image_std or rescale_factor give pixels that are no numbers."
        )
    if int(inputs["input_ids"].max()) >= config.text_config.vocab_size:
        raise CheckpointError("tokenizer.json has more tokens than text_config.vocab_size of config.json.")
