"""A plot of measured scores beside the paper's."""

import os
from pathlib import Path
from typing import Any

from pdlm_hf.errors_pdlm import MissingPackageError, SettingError

from .report import Measured


def check_target(path: Path) -> None:
    """Check that a plot can be written.

    Raises:
        MissingPackageError: matplotlib is not installed.
        SettingError: matplotlib cannot write files with this name.
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise MissingPackageError("matplotlib", "eval") from None
    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower().lstrip(".") not in kinds:
        raise SettingError(f"{path}: this kind of file cannot be written as an image; choose a name like report.png.")


def save_figure(figure: Any, path: Path) -> None:
    """Write a figure of matplotlib; the file is whole at any time, whoever else writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_stem(f"{path.stem}.{os.getpid()}")  # the suffix decides the kind of file
    try:
        figure.savefig(part, dpi=150)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def save_scores(path: Path, measured: list[Measured]) -> None:
    """Plot scores with their intervals, and the paper's score of each benchmark.

    Args:
        path (`Path`): file of the plot.
        measured (`list[Measured]`): scores from [`report.collect`]; those that are withheld are left out.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row.benchmark for row in measured))
    harnesses = list(dict.fromkeys(row.harness for row in measured))
    figure = Figure(figsize=(9, 1.5 + 0.45 * len(names)), layout="constrained")
    axes = figure.subplots()
    paper = {row.benchmark: row.paper for row in measured}
    axes.scatter([paper[name] for name in names], range(len(names)), marker="|", s=400, color="black", label="paper")
    for number, harness in enumerate(harnesses):
        scores, places, errors = [], [], []
        for row in measured:
            if row.harness == harness and row.score is not None:
                low, high = row.interval or (row.score, row.score)
                scores.append(row.score)
                places.append(names.index(row.benchmark) + 0.15 * (number + 1))
                errors.append((row.score - low, high - row.score))
        bars = list(zip(*errors, strict=True)) or None
        axes.errorbar(scores, places, xerr=bars, fmt="o", markersize=4, capsize=2, label=harness)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("%, with 95 % intervals")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper left", ncols=4, fontsize=8)
    save_figure(figure, path)
