"""Compile the kernels, with the sizes of the 8B and for the largest heads, and print what they take; without a GPU."""

import inspect
import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pdlm_hf import kernels_pdlm as kernels

POINTERS = {
    "dtype": "states update weight out both cos sin keys values queries",
    "*i32": "columns starts rois",
    "*i8": "flags",
    "*fp32": "parts sums scales",
}
TYPES = {name: kind for kind, names in POINTERS.items() for name in names.split()} | {"eps": "fp32", "scale": "fp32"}
# kernel, constants, warps and stages of a program
KERNELS = {
    "_norm": ({"ADD": True, "IN_FP8": False, "BLOCK": 4096}, 8, 3),
    "_gate": ({"IN_FP8": False, "BLOCK": 1024}, 4, 3),
    "_place": ({"HEADS": 8, "HALF": 64}, 4, 3),
    "_join": ({"SPLITS": 4, "SIZE": 128, "HEADS": 8, "DIM": 128}, 4, 3),
}

FP8 = {
    "_norm": ({"ADD": True, "IN_FP8": True, "BLOCK": 4096}, 8, 3),
    "_gate": ({"IN_FP8": True, "BLOCK": 16384}, 16, 3),
    "_quantise": ({"BLOCK": 4096}, 8, 3),
}


def attention(dtype: str, size: int) -> tuple[dict, int, int]:
    """Constants, warps and stages of the attention for heads of this size, with the tuning that is chosen."""
    row_bytes = size * (4 if dtype == "fp32" else 2)
    _, tile, keys, warps, stages = kernels.choose_tuning(torch.device("cpu"), 32, 136, 2048, row_bytes)
    constants = {"GROUP": 1, "SIZE": size, "DIM": size, "M": tile, "N": keys, "INTERPRETED": False}
    return constants, warps, stages


def compiled(
    name: str, constants: dict, warps: int, stages: int, dtype: str = "bf16", capability: int = 90, out: str = "dtype"
) -> dict:
    """Compile one, and say what it takes."""
    function = getattr(kernels, name)
    names = list(inspect.signature(function.fn).parameters)
    types = {**TYPES, "out": out}
    if name != "_place":
        types["columns"] = "i32"  # a number of them
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    signature = {name: f"*{dtype}" if kind == "dtype" else kind for name, kind in signature.items()}
    source = ASTSource(
        function,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(k,): [["tt.divisibility", 16]] for k, name in enumerate(names) if signature[name].startswith("*")},
    )
    target, options = GPUTarget("cuda", capability, 32), {"num_warps": warps, "num_stages": stages}
    kernel = triton.compile(source, target=target, options=options)
    return {"shared_bytes": kernel.metadata.shared, "tensor_cores": "wgmma" in kernel.asm["ptx"]}


found = {name: compiled(name, *sizes) for name, sizes in KERNELS.items()}
for name, sizes in FP8.items():
    found[name if name == "_quantise" else f"{name}, FP8"] = compiled(name, *sizes, out="*fp8e4nv")
found["_attend"] = compiled("_attend", *attention("bf16", 128))
for dtype, size in (("bf16", 128), ("bf16", 256), ("fp32", 128)):
    found[f"small GPU, {dtype}, {size}"] = compiled("_attend", *attention(dtype, size), dtype, 89)
json.dump(found, sys.stdout)
