"""The order of training rows, decided before the first step: which images, which of their regions, which noise.

The order of a whole run is a list made from the seed. A resumed run skips the rows that were trained on and continues
in the same list. Several processes take turns in it, so that together they see the rows that one process would see.
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
from pdlm_hf.attributes.schema import AttributeSchema, parse_schema, read_schema_file
from pdlm_hf.errors_pdlm import DataError, SettingError
from pdlm_hf.tiling_pdlm import num_tiles
from pdlm_hf.training.collator import PdlmCollator, partition_regions

from .recipe import Data, Recipe
from .rows import num_characters

CHARACTERS_PER_TOKEN = 4  # of English captions; only used to sort rows by length
PROMPT_TOKENS = 40  # the chat template and the question
_HELD_OUT_SEED = 2**62  # far from the seeds of training rows


class Step(NamedTuple):
    """One training row: the position of its image in the data set, and of its regions in the image (None: all)."""

    image: int
    regions: list[int] | None


class RowSize(NamedTuple):
    """How large a training row is: image tiles, tokens in total, and tokens of the captions."""

    tiles: int
    tokens: int
    answer: int


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
    """Open the training rows of a recipe, or its held-out rows.

    Args:
        data ([`~recipe.Data`])
        held_out (`bool`): open the held-out rows.
        length, group, seed (`int`): for drawn images: their number, the number per batch, and the seed.

    Returns:
        the data set; None if the recipe holds nothing out.

    Raises:
        SettingError: no file is given, or it does not exist.
        DataError: the file cannot be read, or holds no rows.
    """
    limit = data.held_out_limit if held_out else data.limit
    if data.kind == "drawn":
        from .shapes import drawn_scenes

        return drawn_scenes(data.domain, seed + 2**18 * held_out, limit or length, group)
    if held_out and data.held_out is None:
        return None
    source = file_of(data, "held_out" if held_out else "train")
    from .data import ChatDataset, RegionDataset

    images = Path(data.images) if data.images else None
    return (RegionDataset if data.kind == "regions" else ChatDataset)(source, images=images, limit=limit)


def attribute_schema(data: Data, *datasets: Rows | None) -> AttributeSchema | None:
    """The attributes that a recipe teaches; None if it teaches none.

    Args:
        data ([`~recipe.Data`])
        *datasets: its rows and held-out rows, as far as they can be read in any order.

    Raises:
        SettingError: the schema of the recipe cannot be used, or the values of the rows are too many for one.
        DataError: a row has a fault, or a value that is none of the choices.
    """
    if data.kind == "chat" or not data.attribute_share:
        return None
    schema = None
    if isinstance(data.attributes, str):
        schema = read_schema_file(Path(data.attributes))
    elif data.attributes is not None:
        schema = parse_schema(data.attributes)
    if data.streaming and schema is None:
        return None  # the held-out rows may lack values
    found: dict[str, list[str]] = {}
    for dataset in datasets:
        if dataset is None or not hasattr(dataset, "attributes"):
            continue
        for name, values in dataset.attributes(schema).items():
            found[name] = list(dict.fromkeys([*found.get(name, []), *values]))
    if schema is not None or not found:
        return schema
    try:
        return parse_schema({"attributes": found})
    except SettingError as error:
        raise SettingError(f"{error} It is that of the rows; `data.attributes` sets another schema.") from None


def file_of(data: Data, name: Literal["train", "held_out"]) -> str:
    """The data file that a recipe names.

    Raises:
        SettingError: the recipe names none, or it does not exist.
    """
    source: str | None = getattr(data, name)
    if source is None:
        raise SettingError(f"`data.{name}` is missing: give the file with your {data.kind}, data.{name}=FILE.")
    if not source.startswith("hf:") and not Path(source).exists():
        raise SettingError(f"`data.{name}`: there is no file {source}.")
    return source


def sizes_of(dataset: Rows, data: Data) -> list[tuple[int, int, int, int]] | None:
    """Width, height, number of regions and of caption characters of every image.

    None for conversations, see [`chat_sizes`], and for data sets with an order of their own: their rows are neither
    sorted nor split.
    """
    if getattr(dataset, "in_order", False) or data.kind == "chat":
        return None
    if hasattr(dataset, "sizes"):
        return list(dataset.sizes())
    rows = (dataset[index] for index in range(len(dataset)))
    return [(*r["image"].size, len(r["regions"]), sum(map(num_characters, r["regions"]))) for r in rows]


def chat_sizes(
    dataset: Rows, processor: PdlmProcessor, num_slots: int | tuple[int, int] | None = None
) -> Iterator[RowSize]:
    """The size of every conversation, with its tokens counted.

    Args:
        dataset: [`~data.ChatDataset`], or rows for [`~pdlm_hf.training.PdlmCollator`].
        processor (`PdlmProcessor`)
        num_slots (`int` or pair, *optional*): token positions that the last answer takes at least.
    """
    collator, least = PdlmCollator(processor), max(num_slots) if isinstance(num_slots, tuple) else num_slots or 0
    if hasattr(dataset, "conversations"):
        rows = dataset.conversations()
    else:
        opened = (dataset[index] for index in range(len(dataset)))
        rows = (([image.size for image in row.get("images", ())], row["messages"]) for row in opened)
    for sizes, messages in rows:  # several images have one tile each
        grids = [processor.image_processor.grid(*size) if len(sizes) == 1 else (1, 1) for size in sizes]
        tiles = [num_tiles(*grid) for grid in grids]
        ids, labels = collator.conversation(messages, tiles)
        answer = sum(label != -100 for label in labels)
        yield RowSize(sum(tiles), len(ids) + max(0, least - answer), max(least, answer))


def _measured(dataset: Rows, data: Data, processor: PdlmProcessor) -> list | None:
    """What [`sizes_of`] or [`chat_sizes`] finds."""
    chat = data.kind == "chat" and not getattr(dataset, "in_order", False)
    return list(chat_sizes(dataset, processor, data.num_slots)) if chat else sizes_of(dataset, data)


def measure_row(size: tuple[int, int, int, int], processor: PdlmProcessor, num_slots: int | None = None) -> RowSize:
    """Estimate the size of a training row before its captions are tokenized.

    Args:
        size: width, height, number of regions and of caption characters.
        processor (`PdlmProcessor`)
        num_slots (`int`, *optional*): token positions per caption; None: captions have their own length.
    """
    width, height, regions, characters = size
    tiles = num_tiles(*processor.image_processor.grid(width, height))
    answer = regions * (num_slots + 2) if num_slots else characters // CHARACTERS_PER_TOKEN + 2 * regions
    prompt = PROMPT_TOKENS + tiles * processor.tokens_per_tile + regions * (processor.tokens_per_region + 1)
    return RowSize(tiles, prompt + answer, answer)


def cut(num_regions: int, num_prompts: int, index: int, epoch: int, partition: str) -> list[list[int]]:
    """Split the regions of an image into groups of at most `num_prompts`, one training row each.

    Args:
        num_regions, num_prompts (`int`)
        index, epoch (`int`): position of the image and number of the epoch, which decide the random groups.
        partition (`str`): "shuffle" or "together", see [`~recipe.Data`].
    """
    if partition == "shuffle":
        return [sorted(group) for group in partition_regions(num_regions, num_prompts, index, epoch)]
    return [list(range(num_regions))[start : start + num_prompts] for start in range(0, num_regions, num_prompts)]


def plan(
    dataset: Rows, data: Data, processor: PdlmProcessor, batch: int, steps: int, epochs: float, seed: int
) -> list[Step]:
    """Decide the rows of a run and their order: epoch after epoch, rows of similar length in the same batch.

    Args:
        dataset: map-style.
        data ([`~recipe.Data`]), processor (`PdlmProcessor`)
        batch (`int`): rows per optimizer step, over all processes.
        steps (`int`): optimizer steps, or -1 for `epochs`.
        epochs (`float`), seed (`int`)

    Returns:
        a multiple of `batch` rows.

    Raises:
        DataError: the data set is empty, or none of its images has a region.
    """
    if not len(dataset):
        raise DataError("The training data has no rows.")
    sizes = _measured(dataset, data, processor)
    order: list[Step] = []
    epoch, wanted = 0, steps * batch if steps > 0 else None
    while wanted is None or len(order) < wanted:
        rows, measured = _epoch(len(dataset), sizes, data, processor, epoch)
        if wanted is None:
            wanted = batch * num_steps(len(rows), batch, epochs)
        if not getattr(dataset, "in_order", False):
            generator = torch.Generator().manual_seed(seed * 1000003 + epoch)
            lengths = [size.tokens for size in measured]
            rows = [rows[k] for k in get_length_grouped_indices(lengths, batch, generator=generator)]
        order += rows
        epoch += 1
    return order[:wanted]


def num_steps(rows: int, batch: int, epochs: float) -> int:
    """Optimizer steps of `epochs` passes over so many rows."""
    return max(1, math.ceil(epochs * rows / batch))


class Run(NamedTuple):
    """What a run will read: its longest row, the mean tokens of a row, its optimizer steps, and rows left out."""

    longest: RowSize
    mean_tokens: int
    steps: int
    left_out: int


def measure_run(recipe: Recipe, processor: PdlmProcessor, processes: int) -> Run:
    """Measure a run on a file before the model is loaded.

    Args:
        recipe ([`~recipe.Recipe`]): with `data.kind` "regions" or "chat".
        processor (`PdlmProcessor`), processes (`int`)

    Raises:
        SettingError: the recipe names no file, or it does not exist.
        DataError: a row cannot be used.
    """
    dataset, training = open_dataset(recipe.data), recipe.training
    _, measured = _epoch(len(dataset), _measured(dataset, recipe.data, processor), recipe.data, processor, 0)
    batch = training.get("per_device_train_batch_size", 8) * training.get("gradient_accumulation_steps", 1) * processes
    steps = training.get("max_steps", -1)
    if steps < 1:
        steps = num_steps(len(measured), batch, training.get("num_train_epochs", 3.0))
    tokens = [size.tokens for size in measured]
    left_out = len(dataset) - len(measured) if recipe.data.kind == "chat" else 0
    return Run(max(measured, key=lambda size: size.tokens), sum(tokens) // len(tokens), steps, left_out)


def _epoch(
    count: int, sizes: list | None, data: Data, processor: PdlmProcessor, epoch: int, held_out: bool = False
) -> tuple[list[Step], list[RowSize]]:
    """Rows of an epoch with their sizes, before they are shuffled. Raises: DataError if there are none."""
    if sizes is None:
        return [Step(index, None) for index in range(count)], [RowSize(0, 0, 0)] * count
    if data.kind == "chat":
        return _fitting(sizes, data.max_length)
    partition, slots = ("together", None) if held_out else (data.partition, data.num_slots)
    slots = max(slots) if isinstance(slots, tuple) else slots
    rows, measured = [], []
    prompts = processor.image_processor.num_region_prompts
    for index, (width, height, regions, characters) in enumerate(sizes):
        for group in cut(regions, prompts, index, epoch, partition) if regions else ():
            rows.append(Step(index, group))
            size = (width, height, len(group), characters * len(group) // regions)
            measured.append(measure_row(size, processor, slots))
    if not rows and not held_out:
        raise DataError("No image in the training data has a region.")
    return rows, measured


def _fitting(sizes: list[RowSize], max_length: int | None) -> tuple[list[Step], list[RowSize]]:
    """The conversations of at most so many tokens. Raises: DataError if there are none."""
    kept = [index for index, size in enumerate(sizes) if max_length is None or size.tokens <= max_length]
    if not kept:
        shortest = min(size.tokens for size in sizes)
        raise DataError(f"`data.max_length` is {max_length}, but the shortest conversation has {shortest} tokens.")
    return [Step(index, None) for index in kept], [sizes[index] for index in kept]


class TrainingRows(Dataset):
    """The rows of a [`plan`], each with its regions and the seed of its noise.

    Args:
        dataset: map-style, with rows for [`~pdlm_hf.training.PdlmCollator`].
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
    """A copy of the row with the chosen regions (None: all) and the seed of its noise."""
    row = {**row, "seed": seed}
    if regions is not None:
        row["regions"] = [row["regions"][k] for k in regions]
    return row


def held_out_rows(dataset: Rows, data: Data, processor: PdlmProcessor) -> TrainingRows:
    """All held-out images with the same noise at every evaluation; regions are split only where they do not fit."""
    rows, _ = _epoch(len(dataset), _measured(dataset, data, processor), data, processor, 0, held_out=True)
    return TrainingRows(dataset, rows, _HELD_OUT_SEED // 2**40)


class StreamedRows(IterableDataset):
    """Training rows read from a file in order, again from its start when it ends, without keeping it in memory.

    Args:
        data ([`~recipe.Data`]), processor (`PdlmProcessor`), seed (`int`)

    Raises:
        SettingError: no file is given, or it does not exist.
        DataError: on iteration, the file has no rows, or a row cannot be used.
    """

    def __init__(self, data: Data, processor: PdlmProcessor, seed: int):
        self.data, self.seed = data, seed
        self.source = file_of(data, "train")
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
                raise DataError(f"{self.source} has no rows.")
            epoch += 1
