"""The decode benchmark: the reference's loop, ours and an autoregressive one side by side, with random weights."""

import os
import platform
import resource
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

from ..errors_pdlm import MissingPackageError, SettingError
from ..fused_pdlm import NAME
from ..regions.files import write_json
from .model import SHAPES, Bench, bound, flops
from .rival import autoregressive

# Arithmetic and memory limits of known devices, FLOP/s in bf16 and bytes/s, with their origin. "measured" is the best
# of three runs of a product of two 8192 x 8192 matrices and of a large copy (benchmarks/results/gpu_h100_*.json).
LIMITS = {
    "H200": ((790e12, 4.3e12), "not measured by this project"),
    "H100 80GB HBM3": ((772e12, 2.99e12), "measured"),
}
# Forward passes of adaptive decoding: of a checkpoint that was not trained to commit, at most for one that was, and
# mostly for the embedded one.
FEW_STEPS = (11, 4, 1)
CAPTION_TOKENS = 20
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


@dataclass(frozen=True)
class Job:
    """A loop to measure.

    Args:
        run: returns tokens `(images, regions, tokens of a caption)`.
        kind (`str`): see [`flops`].
        steps (`int`): forward passes.
        images (`int`): in a batch.
    """

    run: Callable[[], torch.Tensor]
    kind: str
    steps: int
    images: int = 1


def _jobs(bench: Bench, num_regions: int, batches: list[int], slots: int, steps: int, length: int) -> dict[str, Job]:
    """The loops to compare, by name; `length`: tokens of a caption."""

    def ours(kind: str, n: int, images: int = 1, *further: Any) -> Job:
        interval = 1 if kind == "exact" else 0
        return Job(partial(bench.ours, num_regions, images, slots, n, interval, *further), kind, n, images)

    jobs = {
        "reference": Job(partial(bench.reference, num_regions, slots, steps), "reference", steps),
        "exact": ours("exact", steps),
    }
    if bench.device.type == "cuda":
        jobs["exact, sdpa"] = ours("exact", steps, 1, None, "sdpa")
    few = {f"cached, {n} step{'s' * (n > 1)}": n for n in sorted({min(n, steps) for n in FEW_STEPS}, reverse=True)}
    for images in sorted({1, *batches}):
        batch = f", batch {images}" if images > 1 else ""
        for name, n in {"cached": steps, **few}.items():
            jobs[name + batch] = ours("cached", n, images)
            if bench.device.type == "cuda":
                for label, attention in (("sdpa", "sdpa"), ("no graphs", NAME)):
                    jobs[f"{name}{batch}, {label}"] = ours("cached", n, images, None, attention, False)
        if (n := min(FEW_STEPS[0], steps, length + 1)) > 1 and length < slots:
            run = partial(bench.trimmed, num_regions, images, slots, n, length)
            jobs[f"cached, {n} steps, trimmed{batch}"] = Job(run, "trimmed", n, images)
        run = partial(autoregressive, bench, num_regions, images, length)
        jobs[f"autoregressive, shared prefix{batch}"] = Job(run, "autoregressive", length, images)
    return jobs


def compare(
    bench: Bench,
    num_regions: int,
    batches: list[int],
    slots: int,
    steps: int,
    repeats: int,
    keep: Callable[[dict], None] = lambda table: None,
    length: int = CAPTION_TOKENS,
) -> dict:
    """Time the reference's loop, ours and the autoregressive one with one number of regions.

    Args:
        bench (`Bench`): model and prompts.
        num_regions, slots, steps (`int`): regions, token positions per caption, denoising steps.
        batches (`list[int]`): batch sizes.
        repeats (`int`): measured turns.
        keep: called with the table after every turn.
        length (`int`): tokens of a caption, where the loop has an end: the autoregressive one, and with trimming.

    Returns:
        the table, ready for JSON.
    """
    jobs = _jobs(bench, num_regions, batches, slots, steps, length)
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    limits, source = _limits(bench)
    table = {
        "regions": num_regions,
        "prompt_tokens": bench.prompt_ids(num_regions).shape[1],
        "slots": slots,
        "steps": steps,
        "caption_tokens": length,
        "limits": f"{limits[0] / 1e9:.0f} GFLOP/s, {limits[1] / 1e9:.1f} GB/s ({source})",
        "phases_ms": bench.phases(num_regions, slots),
    }
    for seconds, results in interleaved(bench, {name: job.run for name, job in jobs.items()}, repeats):
        base = statistics.median(seconds["reference"])
        table["rows"] = {
            name: _row(bench, job, seconds[name], results[name], results["exact"], base, limits, length)
            for name, job in jobs.items()
        }
        table["peak_memory_gb"] = round(_peak_memory(bench) / 1e9, 2)
        keep(table)
    return table


def _row(bench: Bench, job: Job, times, tokens, exact, base: float, limits, length: int) -> dict:
    """The row of one loop in a table; `base`: seconds of the reference's loop."""
    num_regions, slots = tokens.shape[1:]
    size, count = job.images, job.steps
    image = statistics.median(times) / size
    work = flops(bench, num_regions, slots, job.kind, count, length)
    least = bound(bench, num_regions, slots, job.kind, count, size, limits, length)
    ends = torch.tensor([bench.model.config.eot_token_id, bench.model.config.eos_token_id], device=bench.device)
    text = float((torch.isin(tokens, ends).cumsum(-1) == 0).sum())
    same_canvas = job.kind not in ("trimmed", "autoregressive")
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
        "tokens_as_exact": round(float((tokens[:1] == exact).float().mean()), 4) if same_canvas else None,
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
        view.add_row(name, *("" if row[cell] is None else str(row[cell]) for cell in cells))
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


def _check(device: str, shape: str, regions: list[int], files: dict[str, Path | None]) -> None:
    """Raises: SettingError: a setting of [`decode`] is not possible here."""
    if shape not in SHAPES:
        raise SettingError(f"--shape: expected one of {', '.join(SHAPES)}, got {shape!r}.")
    if device == "cuda" and not torch.cuda.is_available():
        raise SettingError("--device: there is no CUDA device.")
    if device not in ("cpu", "cuda"):
        raise SettingError(f"--device: expected cpu or cuda, got {device!r}.")
    for name, path in files.items():
        if path is None:
            continue
        if not path.parent.is_dir():
            raise SettingError(f"{name}: there is no folder {path.parent}.")
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise SettingError(f"{name}: {path} cannot be written: it is a folder, or its folder is read-only.")
    if max(regions) > MAX_REGIONS:
        raise SettingError(f"--regions: at most {MAX_REGIONS} regions, got {max(regions)}.")


def decode(
    device: str,
    shape: str,
    regions: list[int],
    batches: list[int],
    slots: int,
    steps: int,
    repeats: int,
    length: int = CAPTION_TOKENS,
    threads: int = 1,
    with_scaling: bool = False,
    json_file: Path | None = None,
    plot: Path | None = None,
) -> None:
    """Time the reference's loop, ours and an autoregressive one on random weights; a table for each number of regions.

    Args:
        device, shape (`str`): "cpu" or "cuda"; name in [`SHAPES`].
        regions, batches (`list[int]`): numbers of regions, and batch sizes.
        slots, steps, repeats (`int`): token positions of a caption, denoising steps, measured turns.
        length (`int`): tokens of a caption, where the loop has an end: the autoregressive one, and with trimming.
        threads (`int`): CPU threads.
        with_scaling (`bool`): also time against regions, passes, tiles and batch.
        json_file, plot (`Path`, *optional*): files to write; the JSON after every table.

    Raises:
        SettingError: the shape, device or folder does not exist, or there are too many regions.
        MissingPackageError: `plot` is given, and matplotlib is not installed.
    """
    _check(device, shape, regions, {"--json": json_file, "--plot": plot})
    if plot is not None:
        with_scaling = True
        _pyplot()  # fails now rather than after the run
        from matplotlib.backend_bases import FigureCanvasBase

        if plot.suffix[1:].lower() not in (formats := FigureCanvasBase.get_supported_filetypes()):
            raise SettingError(f"--plot {plot}: the ending must be one of {', '.join(sorted(formats))}.")
    torch.set_num_threads(threads)
    bench = Bench(SHAPES[shape], device, max(8 if with_scaling else 1, *regions))
    hardware = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, {threads} thread(s)"
    record: dict[str, Any] = {
        "hardware": hardware,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "shape": shape,
        "dtype": str(bench.shape.dtype).removeprefix("torch."),
        "repeats": repeats,
        "clock": "CPU time" if device == "cpu" and threads == 1 else "wall time",
        "tables": [],
    }
    with torch.inference_mode():
        for count in regions:
            record["tables"].append(compare(bench, count, batches, slots, steps, repeats, length=length))
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
