"""The decode benchmark: the reference's loop and ours side by side, with random weights of a given shape."""

import platform
import resource
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from ..errors_pdlm import MissingPackageError, SettingError
from ..regions.files import write_json
from ..split_attention_pdlm import NAME as REGION_SPLIT
from .model import SHAPES, Bench, bound, flops

# Arithmetic and memory limits of known devices, FLOP/s in bf16 and bytes/s, with their origin. "measured" is the best
# of three runs of a product of two 8192 x 8192 matrices and of a large copy (benchmarks/results/gpu_h100_*.json).
LIMITS = {
    "H200": ((790e12, 4.3e12), "not measured by this project"),
    "H100 80GB HBM3": ((772e12, 2.99e12), "measured"),
}
FEW_STEPS = 11
MAX_REGIONS = 16  # a checkpoint has caption tokens for so many regions
TILES = 7  # tiles of the image in the prompt


def interleaved(
    bench: Bench, jobs: dict[str, Callable[[], Any]], repeats: int
) -> Iterator[tuple[dict[str, list[float]], dict[str, Any]]]:
    """Run all jobs in turn, `repeats` times after a warm-up.

    Yields:
        after each measured turn the seconds of each job so far, and its last result.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    results = {}
    for repeat in range(repeats + 1):
        for name, job in jobs.items():
            start = bench.clock()
            results[name] = job()
            elapsed = bench.clock() - start
            if repeat:
                seconds[name].append(elapsed)
        if repeat:
            yield seconds, results


def _jobs(bench: Bench, num_regions: int, batches: list[int], slots: int, steps: int, few: int):
    """The loops to compare, by name, and the batch size of each."""
    jobs: dict[str, Callable[[], Any]] = {
        "reference": lambda: bench.reference(num_regions, slots, steps),
        "exact": lambda: bench.ours(num_regions, 1, slots, steps, 1),
        "cached": lambda: bench.ours(num_regions, 1, slots, steps, 0),
        f"cached, {few} steps": lambda: bench.ours(num_regions, 1, slots, few, 0),
    }
    size = {name: 1 for name in jobs}
    for batch in (b for b in batches if b > 1):
        for name, n in (("cached", steps), (f"cached, {few} steps", few)):
            jobs[f"{name}, batch {batch}"] = partial(bench.ours, num_regions, batch, slots, n, 0)
            size[f"{name}, batch {batch}"] = batch
    if bench.device.type == "cuda":
        for name in [name for name in jobs if name.startswith("cached")]:
            n, b = few if "steps" in name else steps, size[name]
            for label, graphs in (("region_split", False), ("region_split, graphs", True)):
                jobs[f"{name}, {label}"] = partial(bench.ours, num_regions, b, slots, n, 0, None, REGION_SPLIT, graphs)
                size[f"{name}, {label}"] = b
    return jobs, size


def compare(
    bench: Bench,
    num_regions: int,
    batches: list[int],
    slots: int,
    steps: int,
    repeats: int,
    keep: Callable[[dict], None] = lambda table: None,
) -> dict:
    """Time the reference's loop and ours with one number of regions.

    Args:
        bench (`Bench`): model and prompts.
        num_regions, slots, steps (`int`): regions, token positions per caption, denoising steps.
        batches (`list[int]`): batch sizes.
        repeats (`int`): measured turns.
        keep: called with the table after every turn.

    Returns:
        the table, ready for JSON.
    """
    few = min(FEW_STEPS, steps)
    jobs, size = _jobs(bench, num_regions, batches, slots, steps, few)
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    limits, source = _limits(bench)
    table = {
        "regions": num_regions,
        "prompt_tokens": bench.prompt_ids(num_regions).shape[1],
        "slots": slots,
        "steps": steps,
        "limits": f"{limits[0] / 1e9:.0f} GFLOP/s, {limits[1] / 1e9:.1f} GB/s ({source})",
        "phases_ms": bench.phases(num_regions, slots),
    }
    for seconds, results in interleaved(bench, jobs, repeats):
        base = statistics.median(seconds["reference"])
        table["rows"] = {
            name: _row(bench, name, times, results[name], results["exact"], size[name], base, limits, (steps, few))
            for name, times in seconds.items()
        }
        table["peak_memory_gb"] = round(_peak_memory(bench) / 1e9, 2)
        keep(table)
    return table


def _row(
    bench: Bench, name: str, times, tokens, exact, size: int, base: float, limits, steps: tuple[int, int]
) -> dict:
    """The row of one loop in a table; `base`: seconds of the reference's loop, `size`: images in a batch."""
    num_regions, slots = tokens.shape[1:]
    image = statistics.median(times) / size
    count = steps[1] if "steps" in name else steps[0]
    kind = "reference" if name == "reference" else "exact" if name == "exact" else "cached"
    work = flops(bench, num_regions, slots, kind, count)
    least = bound(bench, num_regions, slots, kind, count, size, limits)
    ends = torch.tensor([bench.model.config.eot_token_id, bench.model.config.eos_token_id], device=bench.device)
    text = float((torch.isin(tokens, ends).cumsum(-1) == 0).sum())
    return {
        "ms_per_image": round(1000 * image, 2),
        "spread_ms": [round(1000 * min(times) / size, 2), round(1000 * max(times) / size, 2)],
        "ratio_to_reference": round(base / image, 2),
        "images_per_second": round(1 / image, 3),
        "regions_per_second": round(num_regions / image, 3),
        "slots_per_second": round(num_regions * slots / image, 1),
        "text_tokens_per_second": round(text / size / image, 1),
        "tokens_per_forward": round(num_regions * slots * size / count, 2),
        "tokens_per_forward_per_region": round(slots / count, 2),
        "tokens_as_exact": round(float((tokens[:1] == exact).float().mean()), 4),
        "tflop_per_image": round(work / 1e12, 4),
        "share_of_roofline": round(least / size / image, 3),
    }


def _peak_memory(bench: Bench) -> int:
    """Peak memory in bytes."""
    if bench.device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _limits(bench: Bench) -> tuple[tuple[float, float], str]:
    """Arithmetic and memory limit of the device, known or measured by a large matrix product and a large sum."""
    if bench.device.type == "cuda":
        name = torch.cuda.get_device_name()
        for key, (limits, origin) in LIMITS.items():
            if key in name:
                return limits, f"{key}, {origin}"
    n = 4096 if bench.device.type == "cuda" else 1024
    a = torch.randn(n, n, device=bench.device, dtype=bench.shape.dtype)
    best = float("inf")
    for _ in range(6):
        start = bench.clock()
        a @ a
        best = min(best, bench.clock() - start)
    large = torch.ones(2**27 // bench.shape.dtype.itemsize, device=bench.device, dtype=bench.shape.dtype)
    read = float("inf")
    for _ in range(6):
        start = bench.clock()
        large.sum()
        read = min(read, bench.clock() - start)
    return (2 * n**3 / best, 2**27 / read), "measured: a matrix product, a sum"


def scaling(bench: Bench, slots: int, steps: int, repeats: int, batches: list[int]) -> dict:
    """Measure how the time of a decode grows with the number of regions, the regions per pass of 4 regions (Figure 1c
    of the paper), the tiles of the image and the batch size.

    Args:
        bench (`Bench`): model and prompts.
        slots, steps, repeats (`int`): token positions per caption, denoising steps, measured turns.
        batches (`list[int]`): batch sizes.

    Returns:
        milliseconds by name, and ratios.
    """

    def in_passes(regions: int, interval: int) -> None:
        """Decode 4 regions in passes of fewer regions."""
        for _ in range(4 // regions):
            bench.ours(regions, 1, slots, steps, interval)

    jobs: dict[str, Callable[[], Any]] = {}
    for n in range(1, 9):
        jobs[f"regions {n}"] = partial(bench.ours, n, 1, slots, steps, 0)
    for n in (1, 6):
        jobs[f"exact, regions {n}"] = partial(bench.ours, n, 1, slots, steps, 1)
    for n in (1, 2, 4):
        jobs[f"4 regions, {n} a pass"] = partial(in_passes, n, 0)
        jobs[f"exact, 4 regions, {n} a pass"] = partial(in_passes, n, 1)
    tile = bench.shape.image_tokens // TILES
    for tiles in range(1, TILES + 1, 2):
        jobs[f"tiles {tiles}"] = partial(bench.ours, 4, 1, slots, steps, 0, tiles * tile)
    for batch in batches:
        jobs[f"batch {batch}"] = partial(bench.ours, 4, batch, slots, steps, 0)
    *_, (seconds, _) = interleaved(bench, jobs, repeats)
    table = {name: round(1000 * statistics.median(times), 2) for name, times in seconds.items()}
    return {
        "ms": table,
        "cached, 6 regions over 1": round(table["regions 6"] / table["regions 1"], 2),
        "exact, 6 passes of 1 over 1 pass of 6": round(6 * table["exact, regions 1"] / table["exact, regions 6"], 2),
        "cached, 6 passes of 1 over 1 pass of 6": round(6 * table["regions 1"] / table["regions 6"], 2),
    }


def _show(table: dict) -> None:
    view = Table(title=f"{table['regions']} regions, prompt {table['prompt_tokens']}, {table['steps']} steps")
    for name in ("", "ms / image", "ratio", "regions / s", "tokens as exact", "share of roofline"):
        view.add_column(name, justify="left" if not name else "right")
    for name, row in table["rows"].items():
        cells = ("ms_per_image", "ratio_to_reference", "regions_per_second", "tokens_as_exact", "share_of_roofline")
        view.add_row(name, *(str(row[cell]) for cell in cells))
    Console().print(view)


def _pyplot():
    try:
        import matplotlib
    except ImportError:
        raise MissingPackageError("matplotlib", "viz") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _plot(record: dict, path: Path) -> None:
    """Plot the scaling run as four panels of seconds per decode."""
    times = record["scaling"]["ms"]
    panels = {
        "regions": {"cached": "regions {}"},
        "regions per pass, 4 regions": {"cached": "4 regions, {} a pass", "exact": "exact, 4 regions, {} a pass"},
        "tiles, 4 regions": {"cached": "tiles {}"},
        "images per batch, 4 regions": {"cached": "batch {}"},
    }
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(panels), figsize=(14, 3.2), layout="constrained")
    for axis, (label, lines) in zip(axes, panels.items(), strict=True):
        for name, pattern in lines.items():
            points = [(n, times[key] / 1000) for n in range(1, 65) if (key := pattern.format(n)) in times]
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        axis.set(xlabel=label, ylim=(0, None))
        axis.legend()
    axes[0].set_ylabel("seconds per decode")
    figure.suptitle(f"{record['shape']} shape, {record['dtype']}, {record['hardware']}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def decode(
    device: str,
    shape: str,
    regions: list[int],
    batches: list[int],
    slots: int,
    steps: int,
    repeats: int,
    threads: int = 1,
    with_scaling: bool = False,
    json_file: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Time the reference's loop and ours on random weights and print a table for each number of regions.

    Args:
        device (`str`): "cpu" or "cuda".
        shape (`str`): name in [`SHAPES`].
        regions, batches (`list[int]`): numbers of regions, and batch sizes.
        slots, steps, repeats (`int`): token positions of a caption, denoising steps, measured turns.
        threads (`int`): CPU threads.
        with_scaling (`bool`): also time against regions, passes, tiles and batch.
        json_file, plot (`Path`, *optional*): files to write; the JSON after every table.

    Raises:
        SettingError: the shape, device or folder does not exist, or there are too many regions.
        MissingPackageError: `plot` is given, and matplotlib is not installed.
    """
    if shape not in SHAPES:
        raise SettingError(f"--shape: expected one of {', '.join(SHAPES)}, got {shape!r}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise SettingError("--device: there is no CUDA device.")
    if device not in ("cpu", "cuda"):
        raise SettingError(f"--device: expected cpu or cuda, got {device!r}.")
    for name, path in (("--json", json_file), ("--plot", plot)):
        if path is not None and not path.parent.is_dir():
            raise SettingError(f"{name}: there is no folder {path.parent}.")
    if plot is not None:
        with_scaling = True
        _pyplot()  # fails now rather than after the run
    counts = regions
    if max(counts) > MAX_REGIONS:
        raise SettingError(f"--regions: at most {MAX_REGIONS} regions, got {max(counts)}.")
    torch.set_num_threads(threads)
    bench = Bench(SHAPES[shape], device, max(8 if with_scaling else 1, *counts))
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, {threads} thread(s)"
    record: dict[str, Any] = {
        "hardware": hardware,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "shape": shape,
        "dtype": str(bench.shape.dtype).removeprefix("torch."),
        "repeats": repeats,
        "tables": [],
    }
    with torch.inference_mode():
        for count in counts:
            record["tables"].append(compare(bench, count, batches, slots, steps, repeats))
            _show(record["tables"][-1])
            if json_file:  # after every table, so that a stopped run leaves its results
                write_json(json_file, record)
        if with_scaling:
            record["scaling"] = scaling(bench, slots, steps, max(1, repeats // 2), batches)
            Console().print(record["scaling"])
            if json_file:
                write_json(json_file, record)
    if plot is not None:
        _plot(record, plot)
