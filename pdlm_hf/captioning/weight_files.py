"""The weights of a checkpoint by the headers of its files: names, types and shapes, without reading a weight."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..conversion_pdlm import PARAMETER_PREFIXES
from ..errors_pdlm import CheckpointError, reading

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Types of safetensors, and their bytes; of others the file says how long they are.
_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I64": 8, "I32": 4, "I8": 1, "U8": 1}
_LONGEST_HEADER = 10**8  # bytes, as the format allows


@dataclass(frozen=True)
class StoredWeight:
    """A weight as the header of its file describes it."""

    file: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        return prod(self.shape) * _DTYPES.get(self.dtype, 4)


def read_header(path: Path) -> dict[str, StoredWeight]:
    """The weights of a safetensors file, by name.

    Raises:
        CheckpointError: it is cut short, or no safetensors file.
        OSError: it cannot be opened.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise CheckpointError(f"{path}: is a Git LFS pointer instead of the weights; run `git lfs pull`.")
        length = int.from_bytes(start, "little")
        if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
            raise CheckpointError(f"{path}: is no safetensors file, or cut short: {size} bytes.")
        header = file.read(length)
    with reading(path, "header"):
        found = json.loads(header)
        if not isinstance(found, dict):
            raise CheckpointError(f"{path}: header: expected a JSON object, got {found!r:.60}.")
        found.pop("__metadata__", None)
        end = 8 + length + max((entry["data_offsets"][1] for entry in found.values()), default=0)
        weights = {
            name: StoredWeight(path.name, entry["dtype"], tuple(entry["shape"])) for name, entry in found.items()
        }
    if size != end:
        raise CheckpointError(f"{path}: has {size} bytes where its header needs {end}. Download it again.")
    with reading(path, "header"), safe_open(path, framework="pt"):  # refuses types and places that cannot be loaded
        return weights


def stored_weights(folder: Path) -> tuple[dict[str, StoredWeight], list[str]]:
    """The weights of a checkpoint folder, by name, and what is wrong with its files, one line each."""
    if (folder / SINGLE).is_file():
        named, files = {}, [SINGLE]
    elif (folder / INDEX).is_file():
        try:
            with reading(folder, INDEX):
                named = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
                if not (isinstance(named, dict) and named and all(isinstance(f, str) for f in named.values())):
                    raise CheckpointError(f"{folder / INDEX}: weight_map must name a file for every weight.")
                files = sorted(set(named.values()))
        except CheckpointError as error:
            return {}, [str(error)]
    else:
        return {}, [f"{folder}: has no weights: neither {SINGLE} nor {INDEX}."]
    weights: dict[str, StoredWeight] = {}
    faults = []
    for file in files:
        try:
            weights |= read_header(folder / file)
        except FileNotFoundError:
            lost = [name for name, where in named.items() if where == file]
            faults.append(f"{folder / file}: is missing; {INDEX} has {len(lost)} weights there, such as {lost[0]}.")
        except OSError as error:
            faults.append(f"{folder / file}: cannot be read ({error.strerror}).")
        except CheckpointError as error:
            faults.append(str(error))
    if not weights and not faults:
        faults.append(f"{folder / files[0]}: has no weights in it.")
    return weights, faults


def our_name(name: str) -> str:
    """Our name of a parameter that may have the reference's."""
    for theirs, ours in PARAMETER_PREFIXES.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def expected_weights(model_class: Any, config: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that a model of this configuration has, by name; nothing is allocated."""
    with torch.device("meta"):
        return {name: tuple(weight.shape) for name, weight in model_class(config).state_dict().items()}


def compare_weights(
    stored: dict[str, StoredWeight], expected: dict[str, tuple[int, ...]], unused: Iterable[str], shapes: bool = True
) -> tuple[list[str], list[str]]:
    """Compare what is stored with what the model needs.

    Args:
        stored (`dict`): by name, ours or the reference's.
        expected (`dict`): shapes by our name.
        unused: regular expressions of weights that the reference stores and nobody reads.
        shapes (`bool`): whether shapes count; those of quantized weights do not.

    Returns:
        faults and notes, one line each: weights that are missing or have another shape; weights without a place.
    """
    found = {our_name(name): (name, weight) for name, weight in stored.items()}
    spare = {
        ours: weight
        for ours, (name, weight) in found.items()
        if ours not in expected and not any(re.search(pattern, text) for pattern in unused for text in (ours, name))
    }
    faults = []
    for name, shape in expected.items():
        if name not in found:
            alike = [other for other, weight in spare.items() if weight.shape == shape]
            near = get_close_matches(name, alike, 1)
            hint = f" {found[near[0]][0]} has this shape and no place: is it renamed?" if near else ""
            faults.append(f"{name}: is missing, expected {list(shape)}.{hint}")
        elif shapes and found[name][1].shape != shape:
            own, weight = found[name]
            faults.append(f"{own}: has shape {list(weight.shape)} in {weight.file}, expected {list(shape)}.")
    notes = [f"{len(spare)} weights have no place in the model, such as {next(iter(spare))}."] if spare else []
    return faults, notes
