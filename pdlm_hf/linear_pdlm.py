"""Matrix products of a layer: several with the same input as one, in FP8 where the weights are.

The weights of linear layers with the same input are put together; the layers' own become views, so that there is one
copy of them. Weights in FP8 are those of torchao with a scale for each row and inputs that are quantised by row
(`Float8DynamicActivationFloat8WeightConfig(granularity=PerRow())`). torchao itself is not imported here.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import logging

from .kernels_pdlm import Fp8Rows, add_norm_fp8, fault_when_tried, quantise_rows

logger = logging.get_logger(__name__)


def put_together(parts: list[torch.Tensor], replace: Callable[[int, torch.Tensor], None]) -> torch.Tensor:
    """One matrix of several below each other, which become views of it.

    Args:
        parts (`list[torch.Tensor]`): contiguous, with as many columns.
        replace (`Callable`): (number, view) puts a view in the place of a part; not called if they are views already.
    """
    first = parts[0]
    storage, offset = first.untyped_storage().data_ptr(), first.storage_offset()
    for part in parts:
        if part.untyped_storage().data_ptr() != storage or part.storage_offset() != offset:
            break
        offset += part.numel()
    else:
        size = (sum(len(part) for part in parts), first.shape[1])
        return first.detach().as_strided(size, first.stride(), first.storage_offset())
    with torch.inference_mode(first.is_inference()):  # other weights may be trained later
        merged = torch.cat([part.detach() for part in parts])
        for number, part in enumerate(merged.split([len(part) for part in parts])):
            replace(number, part)
    return merged


def _is_bare(module: nn.Module) -> bool:
    return (
        type(module) is nn.Linear
        and module.bias is None
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and not hasattr(module, "_hf_hook")
    )


def _is_plain(module: nn.Module) -> bool:
    return (
        _is_bare(module)
        and type(module.weight) is nn.Parameter
        and type(module.weight.data) is torch.Tensor
        and module.weight.is_contiguous()
    )


def _is_fp8(module: nn.Module) -> bool:
    """Whether the weight and the input of a layer are FP8 by row, without bounds."""
    if not _is_bare(module) or type(module.weight).__name__ != "Float8Tensor":
        return False
    weight: Any = module.weight
    inputs = getattr(weight, "act_quant_kwargs", None)
    return (
        inputs is not None
        and type(inputs.granularity).__name__ == "PerRow"
        and inputs.granularity.dim in (-1, 1)
        and inputs.hp_value_lb is None
        and inputs.hp_value_ub is None
        and inputs.float8_dtype == weight.qdata.dtype == torch.float8_e4m3fn
        and weight.scale.shape == (len(weight.qdata), 1)
        and weight.qdata.is_contiguous()
    )


def merge_weights(modules: list[nn.Module]) -> torch.Tensor | None:
    """One matrix of the weights of several linear layers, which become views of it: there is one copy of the weights.

    Args:
        modules (`list[nn.Module]`): layers with the same input.

    Returns:
        `torch.Tensor` of shape `(sum of the outputs, inputs)`; None where one of them is no plain linear layer
        (adapters, quantised weights, biases, hooks).
    """
    if not all(_is_plain(module) for module in modules):
        return None
    weights: list[Any] = [module.weight for module in modules]

    def replace(number: int, part: torch.Tensor) -> None:
        weights[number].data = part

    return put_together(weights, replace)


def merge_fp8_weights(modules: list[nn.Module]) -> Fp8Rows | None:
    """The same of weights in FP8: their data and their scales; None where one of them has other weights."""
    if not all(_is_fp8(module) for module in modules):
        return None
    weights: list[Any] = [module.weight for module in modules]

    def replace(name: str) -> Callable[[int, torch.Tensor], None]:
        return lambda number, part: setattr(weights[number], name, part)

    data = put_together([weight.qdata for weight in weights], replace("qdata"))
    return Fp8Rows(data, put_together([weight.scale for weight in weights], replace("scale")))


def scaled_product(rows: Fp8Rows, weights: Fp8Rows, dtype: torch.dtype, fast: bool) -> torch.Tensor:
    """The product of rows and weights in FP8, `(rows, outputs)`.

    Args:
        rows (`Fp8Rows` of shape `(rows, inputs)`), weights (`Fp8Rows` of shape `(outputs, inputs)`)
        dtype (`torch.dtype`): of the result.
        fast (`bool`): sums in less than float32, as torchao does by default.
    """
    return torch._scaled_mm(
        rows.data,
        weights.data.t(),
        scale_a=rows.scale,
        scale_b=weights.scale.t(),
        out_dtype=dtype,
        use_fast_accum=fast,
    )


@cache
def fault_of_fp8(device: torch.device, sizes: tuple[int, int, int] = (34, 12288, 512)) -> str | None:
    """Why products in FP8 by the kernels do not work on this GPU; None where they do. Found out once in a process.

    Args:
        device (`torch.device`)
        sizes (`tuple[int, int, int]`): rows, inputs and outputs of the product; default: the most inputs of the 8B.

    Raises:
        RuntimeError: out of memory.
    """
    count, size, outputs = sizes

    def difference() -> float:
        generator = torch.Generator(device).manual_seed(0)
        states, weight = (
            torch.randn(n, size, generator=generator, device=device, dtype=torch.bfloat16) for n in (count, outputs)
        )
        with torch.cuda.device_of(states):  # Triton launches kernels on the current one
            rows, weights = add_norm_fp8(states, None, torch.ones_like(states[0]), 1e-5), quantise_rows(weight)
            found = scaled_product(rows, weights, torch.bfloat16, True).float()
        wide, theirs = (each.data.float() * each.scale for each in (rows, weights))
        expected = wide @ theirs.t()
        return float((found - expected).norm() / expected.norm())

    fault = fault_when_tried(difference, 0.1, "products of the same numbers in float32")  # a fast sum may be 1 % off
    if fault is not None:
        logger.warning("Layers in FP8 are called one by one, which is slower: %s", fault)
    return fault


class Together:
    """Layers with the same input, as one product where they are plain or in FP8.

    Args:
        *modules (`nn.Module`)

    Attributes:
        fp8: weights in FP8, for which the input has to be quantised; None for any others.
    """

    def __init__(self, *modules: nn.Module):
        self.modules = modules
        self.fp8 = merge_fp8_weights(list(modules))
        if self.fp8 is not None and self.fp8.data.is_cuda and fault_of_fp8(self.fp8.data.device) is not None:
            self.fp8 = None
        self.weight = merge_weights(list(modules)) if self.fp8 is None else None

    def __call__(self, states: torch.Tensor | Fp8Rows) -> torch.Tensor:
        """Their outputs beside each other, `(rows, sum of the outputs)`."""
        if isinstance(states, Fp8Rows):
            return self._scaled_product(states)
        if self.weight is not None:
            return F.linear(states, self.weight)
        return torch.cat([module(states) for module in self.modules], -1)

    def _scaled_product(self, rows: Fp8Rows) -> torch.Tensor:
        if self.fp8 is None:
            raise TypeError("The input is in FP8, the weights are not.")
        first: Any = self.modules[0].weight
        return scaled_product(rows, self.fp8, first.dtype, first.mm_config.use_fast_accum)
