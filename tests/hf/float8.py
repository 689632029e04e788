"""Weights in FP8 by row, inputs too, with the attributes that torchao's have; it is not installed with the tests."""

from types import SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F

FP8 = torch.float8_e4m3fn


def quantised(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows in FP8, and their scales."""
    scale = (states.abs().amax(-1, keepdim=True) / 448).float()
    return (states.float() / scale).clamp(-448, 448).to(FP8), scale


class PerRow:
    dim = -1


class Float8Tensor(torch.Tensor):
    @staticmethod
    def __new__(cls, qdata, scale, dtype):
        return torch.Tensor._make_wrapper_subclass(cls, qdata.shape, dtype=dtype, device=qdata.device)

    def __init__(self, qdata, scale, dtype):
        self.qdata, self.scale = qdata, scale
        self.act_quant_kwargs = SimpleNamespace(
            granularity=PerRow(), hp_value_lb=None, hp_value_ub=None, float8_dtype=FP8
        )
        self.mm_config = SimpleNamespace(use_fast_accum=True)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            states, weight = args[0], args[1]
            data, scale = quantised(states.flatten(0, -2))
            out = torch._scaled_mm(
                data, weight.qdata.t(), scale_a=scale, scale_b=weight.scale.t(), out_dtype=states.dtype
            )
            return out.view(*states.shape[:-1], -1)
        return super().__torch_function__(function, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return Float8Tensor(args[0].qdata, args[0].scale, args[0].dtype)
        raise NotImplementedError(function)


def quantise(network: nn.Module) -> None:
    """Give every linear layer of a language model such a weight."""
    for module in network.modules():
        if type(module) is nn.Linear:
            weight = module.weight.detach()
            module.weight = nn.Parameter(Float8Tensor(*quantised(weight), weight.dtype), requires_grad=False)
