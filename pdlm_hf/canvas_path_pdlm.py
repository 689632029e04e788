"""How forward passes over the canvas are computed: by which attention, and replayed from CUDA graphs or not.

Chosen for every call of `generate` by one function of the device, the data type and the shape. The choice follows
what was measured on an H100 (docs/performance.md): without graphs sdpa is faster than the attention in two calls,
with graphs the two calls are faster for a few images at a time and need more memory.
"""

import platform
from dataclasses import dataclass

import torch
from transformers.utils import logging

from .split_attention_pdlm import HAS_ATEN, HAS_VARLEN, NAME, attention_kind, capability_of

logger = logging.get_logger(__name__)

MAX_ROWS = 3  # images at a time for which graphs pay: a pass over four takes sdpa as long, over eight less memory too
# Prefix caches that may be on the device at once: as computed, sorted, in the graph, and room for the first pass.
CACHES = 4


@dataclass(frozen=True)
class CanvasCase:
    """What decides how forward passes over a canvas are computed.

    Args:
        device (`str`): type of the language model's device, or "several devices".
        dtype (`torch.dtype`), head_size (`int`): of the queries.
        caching (`bool`): whether some steps run on cached prompts.
        rows (`int`): images at a time.
        cache_bytes (`int`): size of the prefix cache, see [`cache_bytes`].
        free_bytes (`int`, *optional*): free memory of the device; None: not known.
        capability (`tuple[int, int]`, *optional*): compute capability of an NVIDIA GPU.
        attention (`str`, *optional*): the `attn_implementation` that was given for the language model.
        graphs (`bool`, *optional*): `cuda_graphs` of the call; None: to be chosen.
    """

    device: str
    dtype: torch.dtype
    head_size: int
    caching: bool
    rows: int = 1
    cache_bytes: int = 0
    free_bytes: int | None = None
    capability: tuple[int, int] | None = None
    attention: str | None = None
    graphs: bool | None = None


@dataclass(frozen=True)
class CanvasPath:
    """How forward passes over a canvas are computed, and why.

    Args:
        split (`bool`): by attention in two calls without a mask ("region_split"); else by the language model's own.
        graphs (`bool`): replayed from CUDA graphs.
        reason (`str`): why, or why not.
    """

    split: bool
    graphs: bool
    reason: str

    def __str__(self) -> str:
        way = "region_split" if self.split else "one attention with a mask"
        return f"{way}, {'CUDA graphs' if self.graphs else 'no CUDA graphs'}: {self.reason}"


def cache_bytes(config, rows: int, length: int, itemsize: int) -> int:
    """Bytes of the keys and values of prompts and canvas.

    Args:
        config (`PdlmTextConfig`): of the language model.
        rows (`int`): images at a time.
        length (`int`): tokens of the longest prompt with its canvas.
        itemsize (`int`): bytes of a number.
    """
    return 2 * rows * length * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize


def case_of(
    language_model, dtype: torch.dtype, rows: int, length: int, caching: bool, graphs: bool | None
) -> CanvasCase:
    """The case of a model that is loaded.

    Args:
        language_model (`PdlmTextModel`)
        dtype (`torch.dtype`): of the embeddings.
        rows, length (`int`): see [`cache_bytes`].
        caching (`bool`), graphs (`bool`, *optional*): see [`CanvasCase`].
    """
    devices = {parameter.device for parameter in language_model.parameters()}
    device = devices.pop() if len(devices) == 1 else None
    kind = "several devices" if device is None else device.type
    if device is not None and torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
    free = None
    if device is not None and kind == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + unused
    config = language_model.config
    return CanvasCase(
        kind,
        dtype,
        config.head_dim,
        caching,
        rows,
        cache_bytes(config, rows, length, dtype.itemsize),
        free,
        None if device is None else capability_of(device),
        config._attn_implementation if language_model.attention_given else None,
        graphs,
    )


def choose_path(case: CanvasCase, has_varlen: bool = HAS_VARLEN, has_aten: bool = HAS_ATEN) -> CanvasPath:
    """Choose. An `attn_implementation` that was given is kept, and so is `cuda_graphs` where it is possible.

    Args:
        case (`CanvasCase`)
        has_varlen, has_aten (`bool`): see [`~split_attention_pdlm.attention_kind`].
    """
    obstacle = _obstacle(case)
    if case.attention == NAME:
        reason = obstacle or ("cuda_graphs=False" if case.graphs is False else None)
        return CanvasPath(True, reason is None, f'attn_implementation "{NAME}"' + (f", {reason}" if reason else ""))
    if reason := obstacle or _disadvantage(case, has_varlen, has_aten):
        return CanvasPath(False, False, reason)
    chosen = "cuda_graphs=True" if case.graphs else f"fastest for up to {MAX_ROWS} images at a time"
    return CanvasPath(True, True, chosen)


def _obstacle(case: CanvasCase) -> str | None:
    """Why passes cannot be captured."""
    if case.attention not in (None, NAME):
        return f'attn_implementation is "{case.attention}", and graphs need "{NAME}"'
    if case.device != "cuda":
        return f"the model is on {case.device}"
    if not case.caching:
        return "the prompt is recomputed at every step (prefix_refresh_interval=1), or there is one step only"
    return None


def _disadvantage(case: CanvasCase, has_varlen: bool, has_aten: bool) -> str | None:
    """Why one attention with a mask is better, where nothing else was asked for."""
    if case.graphs:
        return None
    if case.graphs is False:
        return "cuda_graphs=False, and without graphs it is faster"
    if attention_kind(case.device, case.dtype, case.head_size, case.capability, has_varlen, has_aten) == "products":
        dtype = str(case.dtype).removeprefix("torch.")
        return f"no flash attention here for {dtype} and heads of {case.head_size} (torch {torch.__version__})"
    if case.rows > MAX_ROWS:
        return f"more than {MAX_ROWS} images at a time, where graphs gain nothing"
    if case.free_bytes is not None and CACHES * case.cache_bytes > case.free_bytes:
        need = CACHES * case.cache_bytes / 2**30
        return f"graphs would need {need:.1f} GiB for prefix caches, more than is free on the device"
    return None


def emulates_bfloat16(device: str, dtype: torch.dtype) -> bool:
    """Whether it is bfloat16 on an x86 CPU without instructions for it (AVX512-BF16, AMX).

    Args:
        device (`str`): type of the device.
        dtype (`torch.dtype`): of the model.
    """
    if device != "cpu" or dtype != torch.bfloat16 or platform.machine() not in ("x86_64", "AMD64"):
        return False
    return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


SLOW_BFLOAT16 = (
    "This CPU has no instructions for bfloat16 (AVX512-BF16, AMX): a model in bfloat16 is about 7 times as slow here "
    'as in float32. Load it with dtype="float32", which needs twice the memory.'
)


def warn_of_slow_bfloat16(device: torch.device, dtype: torch.dtype) -> None:
    """Log [`SLOW_BFLOAT16`] once, where it is so."""
    if emulates_bfloat16(device.type, dtype):
        logger.warning_once(SLOW_BFLOAT16)


def log_path(path: CanvasPath, graphs: bool | None) -> None:
    """Log the choice once; as a warning where `cuda_graphs=True` cannot be followed."""
    if graphs and not path.graphs:
        logger.warning_once(f"`cuda_graphs` is ignored: {path.reason}.")
    logger.info_once(f"Forward passes over the canvas by {path}.")
