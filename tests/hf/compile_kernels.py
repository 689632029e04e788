"""Compile the kernels for an H100, with the sizes of the 8B, and print what became of them; no GPU is needed."""

import inspect
import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pdlm_hf import kernels_pdlm as kernels

# constants of a kernel, and warps of a program
KERNELS = {
    "_norm": ({"ADD": True, "BLOCK": 4096}, 8),
    "_gate": ({"BLOCK": 1024}, 4),
    "_place": ({"HEADS": 8, "HALF": 64}, 4),
    "_attend": ({"GROUP": 1, "SPLITS": 4, "SIZE": 128, "DIM": 128, "M": 64, "N": 64, "INTERPRETED": False}, 4),
    "_join": ({"SPLITS": 4, "SIZE": 128, "HEADS": 32, "DIM": 128}, 8),
}
POINTERS = {
    "*bf16": "states update weight out both cos sin keys values queries",
    "*i32": "columns starts rois",
    "*i8": "flags",
    "*fp32": "parts sums",
}
TYPES = {name: kind for kind, names in POINTERS.items() for name in names.split()} | {"eps": "fp32", "scale": "fp32"}


def compiled(name: str) -> dict:
    """Compile one."""
    function, (constants, warps) = getattr(kernels, name), KERNELS[name]
    names = list(inspect.signature(function.fn).parameters)
    types = TYPES if name == "_place" else {**TYPES, "columns": "i32"}  # a number of them elsewhere
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    source = ASTSource(
        function,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(k,): [["tt.divisibility", 16]] for k, name in enumerate(names) if signature[name].startswith("*")},
    )
    kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    return {"shared_bytes": kernel.metadata.shared, "tensor_cores": "wgmma" in kernel.asm["ptx"]}


json.dump({name: compiled(name) for name in KERNELS}, sys.stdout)
