"""From a data set to training rows: which rows, in which order, cut how, with which seed. All of it decided before.

The order of a whole run is a list, made from the seed. A resumed run skips what was done and goes on in the same list;
several processes take turns in it, so that they see what one process with all their rows sees.
"""

import math
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, overload

import torch
from torch.utils.data import Dataset, IterableDataset
from transformers.trainer_pt_utils import get_length_grouped_indices

from pdlm_hf import PdlmProcessor
from pdlm_hf.errors_pdlm import SettingError
from pdlm_hf.tiling_pdlm import num_tiles
from pdlm_hf.training.collator import partition_regions

from .recipe import Data

CHARACTERS_PER_TOKEN = 4  # of English captions; only to sort rows by length
PROMPT_TOKENS = 40  # of the template and the question
_HELD_OUT_SEED = 2**62  # noise of held-out rows, away from that of training


class Step(NamedTuple):
    """One row of the run: which image, and which of its regions (None: all)."""

    image: int
    regions: list[int] | None


class Rows(Protocol):
    """A map-style data set."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


@overload
def open_dataset(
    data: Data, held_out: Literal[False] = False, length: int = 0, group: int = 1, seed: int = 0
) -> Rows: ...


@overload
def open_dataset(
    data: Data, held_out: Literal[True], length: int = 0, group: int = 1, seed: int = 0
) -> Rows | None: ...


def open_dataset(data: Data, held_out: bool = False, length: int = 0, group: int = 1, seed: int = 0) -> Rows | None:
    """The data set of a recipe; None if there is no held-out part.

    Args:
        data ([`~recipe.Data`]), held_out (`bool`)
        length, group, seed (`int`): of drawn images: how many, how many a batch, which.

    Raises:
        SettingError: no file given, or bad rows.
    """
    limit = data.held_out_limit if held_out else data.limit
    if data.kind == "drawn":
        from .shapes import drawn_scenes

        return drawn_scenes(data.domain, seed + 2**18 * held_out, limit or length, group)
    if held_out and data.held_out is None:
        return None
    source = _file_of(data, "held_out" if held_out else "train")
    from .data import ChatDataset, RegionDataset

    images = Path(data.images) if data.images else None
    return (RegionDataset if data.kind == "regions" else ChatDataset)(source, images=images, limit=limit)


def _file_of(data: Data, name: Literal["train", "held_out"]) -> str:
    """The file of a recipe with its rows. Raises: SettingError if it is not given, or not there."""
    source: str | None = getattr(data, name)
    if source is None:
        raise SettingError(f"`data.{name}` is missing: give the file with your {data.kind}, data.{name}=FILE.")
    if not source.startswith("hf:") and not Path(source).exists():
        raise SettingError(f"`data.{name}`: there is no file {source}.")
    return source


def sizes_of(dataset: Rows, data: Data) -> list[tuple[int, int, int, int]] | None:
    """(width, height, regions, caption characters) of every image; None where order and cut do not need them."""
    if getattr(dataset, "in_order", False) or data.kind == "chat":
        return None
    if hasattr(dataset, "sizes"):
        return list(dataset.sizes())
    rows = (dataset[index] for index in range(len(dataset)))
    return [(*r["image"].size, len(r["regions"]), sum(len(x["caption"]) for x in r["regions"])) for r in rows]


def row_tokens(size: tuple[int, int, int, int], processor: PdlmProcessor, num_slots: int | None = None) -> int:
    """About how many tokens a row has.

    Args:
        size: (width, height, regions, caption characters).
        processor (`PdlmProcessor`), num_slots (`int`, *optional*): slots of a caption.
    """
    width, height, regions, characters = size
    tiles = num_tiles(*processor.image_processor.grid(width, height))
    answer = regions * (num_slots + 2) if num_slots else characters // CHARACTERS_PER_TOKEN + 2 * regions
    return PROMPT_TOKENS + tiles * processor.tokens_per_tile + regions * (processor.tokens_per_region + 1) + answer


def cut(num_regions: int, num_prompts: int, index: int, epoch: int, partition: str) -> list[list[int]]:
    """Groups of regions that fit one pass each; see [`~recipe.Data`]."""
    if partition == "shuffle":
        return [sorted(group) for group in partition_regions(num_regions, num_prompts, index, epoch)]
    return [list(range(num_regions))[start : start + num_prompts] for start in range(0, num_regions, num_prompts)]


def plan(
    dataset: Rows, data: Data, processor: PdlmProcessor, batch: int, steps: int, epochs: float, seed: int
) -> list[Step]:
    """All rows of a run, in order: a multiple of `batch`, epoch after epoch, rows of like length together.

    Args:
        dataset: map-style.
        data ([`~recipe.Data`]), processor (`PdlmProcessor`)
        batch (`int`): rows of an optimizer step, over all processes.
        steps (`int`): optimizer steps, or -1 for `epochs`.
        epochs (`float`), seed (`int`)

    Raises:
        SettingError: an empty data set.
    """
    if not len(dataset):
        raise SettingError("The training data has no rows.")
    sizes, slots = sizes_of(dataset, data), data.num_slots
    slots = max(slots) if isinstance(slots, tuple) else slots
    order: list[Step] = []
    epoch, wanted = 0, steps * batch if steps > 0 else None
    while wanted is None or len(order) < wanted:
        rows, lengths = _epoch(len(dataset), sizes, data, processor, slots, epoch)
        if not rows:
            raise SettingError("No image in the training data has a region.")
        if wanted is None:
            wanted = batch * max(1, math.ceil(epochs * len(rows) / batch))
        if not getattr(dataset, "in_order", False):
            generator = torch.Generator().manual_seed(seed * 1000003 + epoch)
            rows = [rows[k] for k in get_length_grouped_indices(lengths, batch, generator=generator)]
        order += rows
        epoch += 1
    return order[:wanted]


def _epoch(
    count: int, sizes: list | None, data: Data, processor: PdlmProcessor, slots: int | None, epoch: int
) -> tuple[list[Step], list[int]]:
    """Rows of an epoch with their lengths, before they are shuffled."""
    if sizes is None:
        return [Step(index, None) for index in range(count)], [0] * count
    rows, lengths = [], []
    prompts = processor.image_processor.num_region_prompts
    for index, (width, height, regions, characters) in enumerate(sizes):
        for group in cut(regions, prompts, index, epoch, data.partition) if regions else ():
            rows.append(Step(index, group))
            size = (width, height, len(group), characters * len(group) // regions)
            lengths.append(row_tokens(size, processor, slots))
    return rows, lengths


class TrainingRows(Dataset):
    """Rows of a [`plan`], each with its regions and the seed of its noise.

    Args:
        dataset: map-style; rows as [`~pdlm_hf.training.PdlmCollator`] wants them.
        steps (`list[Step]`), seed (`int`)
    """

    def __init__(self, dataset: Rows, steps: list[Step], seed: int):
        self.dataset, self.steps, self.seed = dataset, steps, seed

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, position: int) -> dict[str, Any]:
        index, regions = self.steps[position]
        return with_seed(self.dataset[index], regions, self.seed * 2**40 + position)


def with_seed(row: dict[str, Any], regions: list[int] | None, seed: int) -> dict[str, Any]:
    """A copy of the row with some of its regions, and the seed of its noise."""
    row = {**row, "seed": seed}
    if regions is not None:
        row["regions"] = [row["regions"][k] for k in regions]
    return row


def held_out_rows(dataset: Rows, data: Data, processor: PdlmProcessor) -> TrainingRows:
    """All held-out images, whole where they fit, always with the same noise."""
    together = data.model_copy(update={"partition": "together"})
    rows, _ = _epoch(len(dataset), sizes_of(dataset, data), together, processor, None, 0)
    return TrainingRows(dataset, rows, _HELD_OUT_SEED // 2**40)


class StreamedRows(IterableDataset):
    """Rows read one after the other, again from the start when they end; nothing is kept in memory.

    Args:
        data ([`~recipe.Data`]), processor (`PdlmProcessor`), seed (`int`)

    Raises:
        SettingError: no file is given, or it is not there.
    """

    def __init__(self, data: Data, processor: PdlmProcessor, seed: int):
        self.data, self.seed = data, seed
        self.source = _file_of(data, "train")
        self.prompts = processor.image_processor.num_region_prompts

    def __iter__(self) -> Iterator[dict[str, Any]]:
        from .data import stream_rows

        images = Path(self.data.images) if self.data.images else None
        epoch = position = 0
        while True:
            before = position
            for index, row in enumerate(islice(stream_rows(self.source, images=images), self.data.limit)):
                for group in cut(len(row["regions"]), self.prompts, index, epoch, self.data.partition):
                    yield with_seed(row, group, self.seed * 2**40 + position)
                    position += 1
            if position == before:
                raise SettingError(f"{self.source} has no rows.")
            epoch += 1
