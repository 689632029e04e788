"""What a checkpoint is, whether its files belong together, and what it takes to run it here; no weights are loaded."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import get_safetensors_metadata, snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, AutoProcessor
from transformers.utils import logging

from ..adapters_pdlm import BASE_FILE, adapter_base
from ..canvas_path_pdlm import SLOW_BFLOAT16, CanvasCase, cache_bytes, choose_path, confirm, emulates_bfloat16
from ..configuration_pdlm import special_token_ids
from ..errors_pdlm import CheckpointError, PdlmError, reading
from ..fused_pdlm import capability_of
from ..generation_config_pdlm import PdlmGenerationConfig
from ..modeling_pdlm import PdlmBaseForConditionalGeneration, PdlmForConditionalGeneration, PdlmTextModel
from ..render.text import pluralize
from ..tiling_pdlm import num_tiles
from .checkpoints import checkpoint_name
from .loading import check_sizes, check_together, reading_files
from .weight_files import StoredWeight, compare_weights, expected_weights, our_name, read_header, stored_weights

GIB = 2**30
_SMALL_FILES = ["*.json", "*.jinja", "*.txt"]


@dataclass
class Inspection:
    """What was found.

    Args:
        model (`str`): folder or hub id.
        kind (`str`, *optional*): "regions" or "chat"; None: the configuration cannot be read.
        layout (`str`, *optional*): whose names the weights have, "pdlm" or "reference".
        faults (`list[str]`): what keeps it from loading or answering rightly, one line each.
        notes (`list[str]`): what is worth knowing.
        weights (`dict`): number of parameters, their bytes by type, number of files.
        memory (`dict`): bytes: weights as loaded, prefix cache of the largest image, activations (about), all of it.
        machine (`dict`): versions, CPUs, bytes of RAM, GPUs.
        settings (`dict`): device and dtype, settings of `generate`, how passes over the canvas are computed.
    """

    model: str
    kind: str | None = None
    layout: str | None = None
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    weights: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: the fields, and `ok`."""
        return {"ok": not self.faults, **asdict(self)}

    def lines(self) -> list[str]:
        """For people: a line for each part, without the faults themselves."""
        lines = [f"model     {self.model}"]
        if self.kind is not None:
            what = {"regions": "PerceptionDLM (captions of regions)", "chat": "PerceptionDLM-Base (chat)"}[self.kind]
            lines[0] += f": {what}" + (", names of the reference" if self.layout == "reference" else "")
        if weights := self.weights:
            types = ", ".join(f"{_size(size)} {dtype}" for dtype, size in weights["bytes"].items())
            files = pluralize(weights["files"], "file")
            lines.append(f"weights   {weights['parameters']:,} parameters; {types} in {files}")
        if memory := self.memory:
            lines.append(
                f"memory    about {_size(memory['one_image'])} for one image: weights {_size(memory['weights'])}, "
                f"prefix cache {_size(memory['prefix_cache'])}, activations {_size(memory['activations'])}"
            )
        own = self.machine
        gpus = "; ".join(f"{gpu['name']}, {_size(gpu['free'])} of {_size(gpu['memory'])} free" for gpu in own["gpus"])
        ram = f", {_size(own['free_ram'])} of {_size(own['ram'])} free" if own["free_ram"] else ""
        lines.append(f"machine   torch {own['torch']}, {own['cpus']} CPUs{ram}; {gpus or 'no GPU'}")
        if settings := self.settings:
            lines.append(f"runs on   {settings['device']} in {settings['dtype']}")
            chosen = ", ".join(f"{name}={value!r}" for name, value in settings["generate"].items())
            lines.append(f"generate  {chosen or 'defaults'}")
            if "canvas" in settings:
                lines.append(f"passes    {settings['canvas']}")
        lines += [f"note      {note}" for note in self.notes]
        return [
            *lines,
            "whole     yes" if not self.faults else f"whole     no: {pluralize(len(self.faults), 'fault')}",
        ]


def inspect_checkpoint(model: str | Path) -> Inspection:
    """Inspect a checkpoint of ours or of the reference.

    Args:
        model (`str` or `Path`): folder or hub id, of which only the small files and the weights' headers are fetched;
            of an adapter its base is inspected.

    Returns:
        [`Inspection`], whose `faults` are empty if the checkpoint is whole.

    Raises:
        CheckpointError: there is no such folder, or no such checkpoint on the hub, or the hub cannot be reached.
    """
    found = Inspection(str(model), machine=machine())
    name = checkpoint_name(model)
    if Path(name, BASE_FILE).is_file():
        _inspect_adapter(found, Path(name))
        name = adapter_base(name)
        found.notes.append(f"is an adapter; this is about its base, {name}.")
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        folder = Path(name) if Path(name).is_dir() else _from_hub(name)
        config = _collect(found, _read_config, folder)
        if config is not None:
            _inspect_parts(found, config, folder, None if Path(name).is_dir() else name)
    finally:
        logging.set_verbosity(level)
    return found


def _inspect_adapter(found: Inspection, folder: Path) -> None:
    """The files of an adapter beside its base: that they are there, and its weights whole."""
    if not (folder / "adapter_config.json").is_file():
        found.faults.append(f"{folder}: has no adapter_config.json, so its base is loaded without it.")
    weights = folder / "adapter_model.safetensors"
    if weights.is_file():
        _collect(found, read_header, weights)
    elif not weights.with_suffix(".bin").is_file():
        found.faults.append(f"{folder}: has no weights of the adapter: no {weights.name}.")


def _collect(found: Inspection, read: Any, *args: Any) -> Any:
    """What `read` returns; None, and a fault, where it fails."""
    try:
        return read(*args)
    except (PdlmError, OSError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, OSError) and error.filename is not None:
            reason = f"{error.filename}: {error.strerror}."
        found.faults.append(reason)
        return None


def _from_hub(name: str) -> Path:
    """Folder of the small files of a checkpoint of the hub."""
    try:
        return Path(snapshot_download(name, allow_patterns=_SMALL_FILES))
    except (OSError, HFValidationError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{name}: there is no such folder here, and no such checkpoint in the hub's cache or on the hub, or "
            f"the hub cannot be reached ({reason:.200})."
        ) from None


def _read_config(folder: Path) -> Any:
    if not (folder / "config.json").is_file():
        peft = (folder / "adapter_config.json").is_file()
        hint = f" It is an adapter without {BASE_FILE}: check its base." if peft else ""
        raise CheckpointError(f"{folder}: has no config.json, so it is no checkpoint.{hint}")
    with reading_files(str(folder), "config.json"):
        config = AutoConfig.from_pretrained(folder)
        check_sizes(config)
    return config


def _inspect_parts(found: Inspection, config: Any, folder: Path, hub_id: str | None) -> None:
    """Everything that a readable configuration allows to look at."""
    found.kind = "regions" if config.num_region_prompts else "chat"
    _collect(found, _inspect_weights, found, config, folder, hub_id)
    tokens = _collect(found, _special_tokens, folder, config)
    for name, token in (tokens or {}).items():
        if getattr(config, name) != token:
            found.faults.append(f"{folder}: tokenizer.json has {name} {token}, config.json {getattr(config, name)}.")
    processor = _collect(found, _read_processor, folder, config)
    try:
        generation = PdlmGenerationConfig.from_pretrained(folder)
    except CheckpointError as error:
        found.faults.append(str(error))
        return
    except OSError:
        found.notes.append("has no generation_config.json: `generate` takes its defaults.")
        generation = PdlmGenerationConfig()
    if processor is not None:
        _plan(found, config, processor, generation)


def _special_tokens(folder: Path, config: Any) -> dict[str, Any]:
    """Ids of the special tokens by the tokenizer."""
    with reading_files(str(folder), "tokenizer.json"):
        content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        return special_token_ids(content, config.num_region_prompts)


def _read_processor(folder: Path, config: Any) -> Any:
    with reading_files(str(folder), "processor_config.json or preprocessor_config.json"):
        processor = AutoProcessor.from_pretrained(folder)
    with reading_files(str(folder), "config.json, processor_config.json, tokenizer.json or chat_template.jinja"):
        check_together(config, processor)
    return processor


def _inspect_weights(found: Inspection, config: Any, folder: Path, hub_id: str | None) -> None:
    """Names and shapes of the weights, beside those that the model has."""
    stored, faults = stored_weights(folder)
    if faults and hub_id is not None:
        stored, faults = _weights_on_hub(hub_id)
    found.faults += faults
    if not stored:
        return
    found.layout = "pdlm" if all(our_name(name) == name for name in stored) else "reference"
    sizes: dict[str, int] = {}
    for weight in stored.values():
        sizes[weight.dtype] = sizes.get(weight.dtype, 0) + weight.num_bytes
    network = PdlmForConditionalGeneration if config.num_region_prompts else PdlmBaseForConditionalGeneration
    with reading(folder, "config.json"):
        expected = expected_weights(network, config)
    parameters = sum(torch.Size(shape).numel() for shape in expected.values())
    found.weights = {"parameters": parameters, "bytes": sizes, "files": len({w.file for w in stored.values()})}
    quantized = getattr(config, "quantization_config", None) is not None
    if quantized:
        found.notes.append("the weights are quantized: their shapes were not compared.")
    unused = network._keys_to_ignore_on_load_unexpected
    wrong, notes = compare_weights(stored, expected, unused, not quantized)
    # weights of a file that is missing or damaged are not named one by one
    found.faults += [] if faults else [f"{folder}: {fault}" for fault in wrong]
    found.notes += notes


def _weights_on_hub(name: str) -> tuple[dict[str, StoredWeight], list[str]]:
    """As [`stored_weights`], from the headers of the files on the hub."""
    try:
        files = get_safetensors_metadata(name).files_metadata
    except Exception as error:  # of the HTTP library, of the hub, or of a file that is no safetensors
        reason = " ".join(str(error).split())
        return {}, [f"{name}: the weights are not here, and their headers cannot be read on the hub ({reason:.200})."]
    return {
        name: StoredWeight(file, tensor.dtype, tuple(tensor.shape))
        for file, header in files.items()
        for name, tensor in header.tensors.items()
    }, []


def machine() -> dict[str, Any]:
    """Versions, CPUs, bytes of RAM (None where the system does not say), GPUs."""
    memory, gpus = Path("/proc/meminfo"), []
    lines = memory.read_text().splitlines() if memory.is_file() else []
    kilobytes = {name: int(size.split()[0]) for name, _, size in (line.partition(":") for line in lines)}
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        gpus.append({"name": torch.cuda.get_device_name(index), "memory": total, "free": free})
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpus": os.cpu_count(),
        "ram": kilobytes["MemTotal"] * 1024 if "MemTotal" in kilobytes else None,
        "free_ram": kilobytes["MemAvailable"] * 1024 if "MemAvailable" in kilobytes else None,
        "gpus": gpus,
    }


def _plan(found: Inspection, config: Any, processor: Any, generation: PdlmGenerationConfig) -> None:
    """What running it takes, and the settings that are chosen on this machine."""
    dtype, regions, gpus = _dtype(config), config.num_region_prompts, found.machine["gpus"]
    tiles, slots = num_tiles(config.max_tiles, 1), generation.max_new_tokens or (32 if regions else 64)
    if regions:
        prompt, canvas = len(processor.region_ids(regions, tiles)), regions * (slots + 2)
    else:
        prompt, canvas = tiles * config.feature_grid**2 + 64, slots
    found.memory = _memory(config, found.weights.get("parameters", 0), prompt, canvas, dtype.itemsize)
    device, need = torch.device("cuda" if gpus else "cpu"), found.memory["one_image"]
    free = gpus[0]["free"] if gpus else found.machine["free_ram"]
    if free is not None and need > free:
        found.notes.append(f"needs about {need / GIB:.1f} GiB; {free / GIB:.1f} GiB are free on {device.type}.")
    if emulates_bfloat16(device.type, dtype):
        found.notes.append(SLOW_BFLOAT16)
    own = {k: v for k, v in generation.to_diff_dict().items() if k in generation._FIELDS}
    found.settings = {"device": device.type, "dtype": str(dtype).removeprefix("torch."), "generate": own}
    if not regions:
        return
    interval, steps = generation.prefix_refresh_interval, generation.max_denoising_steps or 32
    if interval is None:
        interval = 1 if config.prefix_attention == "full" else 0
    case = CanvasCase(
        device.type,
        dtype,
        config.text_config.head_dim,
        interval != 1 and steps > 1,
        capability_of(device),
        graphs=generation.cuda_graphs,
    )
    path = choose_path(case)
    try:
        path = confirm(path, PdlmTextModel, dtype, case.head_size, device)
    except RuntimeError as error:
        found.notes.append(f"the kernels were not tried, because the GPU is full ({str(error).partition('.')[0]}).")
    found.settings["canvas"] = str(path)


def _memory(config: Any, parameters: int, prompt: int, canvas: int, itemsize: int) -> dict[str, int]:
    """Bytes that the largest image takes: states and MLP of a layer, their norms in float32, logits and copies."""
    text, length = config.text_config, prompt + canvas
    layer = length * (itemsize * (4 * text.hidden_size + 3 * text.intermediate_size) + 12 * text.hidden_size)
    memory = {
        "weights": parameters * itemsize,
        "prefix_cache": cache_bytes(text, 1, length, itemsize),
        "activations": layer + canvas * text.vocab_size * (itemsize + 12),
    }
    return memory | {"one_image": sum(memory.values())}


def _dtype(config: Any) -> torch.dtype:
    """The type that the weights are loaded in."""
    dtype = config.dtype or config.text_config.dtype or torch.float32
    return dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)


def _size(count: int) -> str:
    return f"{count / GIB:.1f} GiB" if count >= GIB / 2 else f"{count / 2**20:.1f} MiB"
