"""How forward passes over the canvas are computed: by fused kernels or by transformers' modules, captured or not.

Chosen for every call of `generate` by one function of the device, the data type and the model. The choice follows
what was measured on an H100 (docs/performance.md): the kernels are faster for every number of images and regions, and
as CUDA graphs faster still wherever prompts are cached.
"""

import platform
from dataclasses import dataclass
from functools import cache

import torch
from transformers.utils import logging

from .configuration_pdlm import PdlmTextConfig
from .fused_pdlm import NAME, CanvasCache, FusedNetwork, capability_of, why_not
from .kernels_pdlm import HAS_TRITON, MAX_ROW_BYTES, fault_when_tried
from .masking_pdlm import SHARED, region_attention

logger = logging.get_logger(__name__)

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class CanvasCase:
    """What decides how forward passes over a canvas are computed.

    Args:
        device (`str`): type of the language model's device, or "several devices".
        dtype (`torch.dtype`), head_size (`int`): of the queries.
        caching (`bool`): whether some steps run on cached prompts.
        capability (`tuple[int, int]`, *optional*): compute capability of an NVIDIA GPU.
        attention (`str`, *optional*): the `attn_implementation` that was given for the language model.
        graphs (`bool`, *optional*): `cuda_graphs` of the call; None: to be chosen.
        other_layers (`str`, *optional*): why the layers cannot be called kernel by kernel.
    """

    device: str
    dtype: torch.dtype
    head_size: int
    caching: bool
    capability: tuple[int, int] | None = None
    attention: str | None = None
    graphs: bool | None = None
    other_layers: str | None = None


@dataclass(frozen=True)
class CanvasPath:
    """How forward passes over a canvas are computed, and why.

    Args:
        fused (`bool`): by fused kernels ("region_split"); else by transformers' modules with a mask.
        graphs (`bool`): passes over the canvas alone are replayed from CUDA graphs.
        reason (`str`): why, or why not.
    """

    fused: bool
    graphs: bool
    reason: str

    def __str__(self) -> str:
        way = "fused kernels" if self.fused else "attention with a mask"
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


def case_of(language_model, dtype: torch.dtype, caching: bool, graphs: bool | None) -> CanvasCase:
    """The case of a model that is loaded.

    Args:
        language_model (`PdlmTextModel`)
        dtype (`torch.dtype`): of the embeddings.
        caching (`bool`), graphs (`bool`, *optional*): see [`CanvasCase`].
    """
    devices = {parameter.device for parameter in language_model.parameters()}
    device = devices.pop() if len(devices) == 1 else None
    kind = "several devices" if device is None else device.type
    config = language_model.config
    return CanvasCase(
        kind,
        dtype,
        config.head_dim,
        caching,
        None if device is None else capability_of(device),
        config._attn_implementation if language_model.attention_given else None,
        graphs,
        why_not(language_model),
    )


def choose_path(case: CanvasCase, has_triton: bool = HAS_TRITON) -> CanvasPath:
    """Choose. An `attn_implementation` that was given is kept, and so is `cuda_graphs` where it is possible.

    Args:
        case (`CanvasCase`)
        has_triton (`bool`): whether Triton is installed, as it is with torch for NVIDIA GPUs on Linux.
    """
    if reason := _obstacle(case, has_triton):
        return CanvasPath(False, False, reason)
    if not case.caching:
        return CanvasPath(True, False, "every step computes the prompt too (prefix_refresh_interval=1)")
    if case.graphs is False:
        return CanvasPath(True, False, "cuda_graphs=False")
    return CanvasPath(True, True, "fastest on this GPU")


def _obstacle(case: CanvasCase, has_triton: bool) -> str | None:
    """Why fused kernels cannot be used."""
    if case.attention not in (None, NAME):
        return f'attn_implementation is "{case.attention}", which has no fused kernels'
    if case.device != "cuda":
        return f"the model is on {case.device}"
    if case.capability is None or case.capability < (8, 0):
        return "the kernels are written for NVIDIA GPUs of compute capability 8.0 or later"
    if not has_triton:
        return "Triton is not installed"
    if case.dtype not in DTYPES or case.head_size % 2 or case.head_size * case.dtype.itemsize > MAX_ROW_BYTES:
        return f"no kernels for {str(case.dtype).removeprefix('torch.')} and heads of {case.head_size}"
    return case.other_layers


def confirm(path: CanvasPath, network: type, dtype: torch.dtype, head_size: int, device: torch.device) -> CanvasPath:
    """The path that was chosen, if its kernels work on this machine; else that without them.

    Args:
        path (`CanvasPath`)
        network (`type`): class of the language model.
        dtype (`torch.dtype`), head_size (`int`), device (`torch.device`): of the queries.
    """
    fault = fault_of_kernels(network, dtype, head_size, device) if path.fused else None
    if fault is None:
        return path
    logger.warning_once(f"Decoding without fused kernels, which is slower: {fault}")
    return CanvasPath(False, False, fault)


@cache
def fault_of_kernels(network: type, dtype: torch.dtype, head_size: int, device: torch.device) -> str | None:
    """Why the kernels do not work on this machine; None where they do. Found out once in a process, with one layer.

    Args:
        network (`type`), dtype (`torch.dtype`), head_size (`int`), device (`torch.device`): see [`confirm`].

    Raises:
        RuntimeError: out of memory.
    """

    def difference() -> float:
        found, expected = _one_layer(network, dtype, head_size, device)
        return float((found - expected).norm() / expected.norm())

    return fault_when_tried(difference, _ROUNDING, "transformers' modules")


_ROUNDING = 0.04  # share of the norm; twice as much as bfloat16 has in the interpreter, which cuts it off


@torch.inference_mode(False)  # in which a layer's weights cannot be put together
@torch.no_grad()
def _one_layer(network: type, dtype: torch.dtype, head_size: int, device: torch.device):
    """Canvas of an image with two regions, by the kernels from prompts and canvas, then from the canvas alone on the
    cached prompt; and twice by transformers' modules under the region mask.

    It is large enough for the kernels of real images: 64 queries of a program, several parts, several turns of a loop.
    """
    size, blocks, block, roi, shared = 4 * head_size, 2, 20, 4, 300
    codes = torch.tensor([[SHARED] * shared + [0] * roi + [2] * roi + [1] * block + [3] * block], device=device)
    prompt, length = shared + 2 * roi, codes.shape[1]
    config = PdlmTextConfig(
        vocab_size=1,
        hidden_size=size,
        intermediate_size=2 * size,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,  # as in the 8B
        initializer_range=size**-0.5,  # attention and MLP weigh as much as what comes in
    )
    with torch.random.fork_rng([]), torch.device("cpu"):
        torch.default_generator.manual_seed(0)
        layer = network(config).eval().to(device, dtype)
        layer.layers[0].self_attn.q_proj.weight.mul_(4)  # attention to few keys, so that each counts
        embeds = torch.randn(1, length, size).to(device, dtype)
    place = torch.arange(length, device=device)
    allowed = region_attention(codes, "isolated")(0, 0, place[:, None], place[None, :])
    cached = CanvasCache(config, embeds, 1, prompt, blocks, block, roi)
    cached.show(codes[:, :prompt], torch.ones(1, prompt, dtype=torch.bool, device=device))
    passes, positions = FusedNetwork(layer), place[None]
    whole = passes(embeds, positions, cached)
    canvas = passes(embeds[:, prompt:], positions[:, prompt:], cached)
    hidden = layer(inputs_embeds=embeds, attention_mask=allowed[None, None]).last_hidden_state
    return torch.stack([whole, canvas]).float(), hidden[:, prompt:].float()


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
