"""Plots of judged runs."""

from pathlib import Path
from typing import Any

from ..plot import save_figure
from .report import paper_beside

SCORES = (("avg_pos", "Pos"), ("avg_neg", "Neg"), ("avg", "Avg"))


def save_plot(path: Path, reports: list[dict[str, Any]]) -> None:
    """Plot the scores of runs and of the paper's model, and the average by number and by area of the masks.

    Args:
        path (`Path`): file of the plot.
        reports: results of [`report.report_run`].
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4), layout="constrained")
    overall, by_masks, by_area = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    bars = [(report["run"], [100 * report[name] for name, _ in SCORES]) for report in reports]
    errors = [
        [[abs(100 * (report[name] - report["intervals"][name][side])) for name, _ in SCORES] for side in (0, 1)]
        for report in reports
    ]
    for title, rows in paper_beside(reports):
        ours = rows[-1]
        name = ours["name"] if "table" in ours["name"] else f"{ours['name']} ({title.removeprefix('paper, ')})"
        bars.append((name, [ours["pos"], ours["neg"], ours["avg"]]))
    width = 0.8 / len(bars)
    for number, (name, values) in enumerate(bars):
        places = [x + number * width for x in range(len(SCORES))]
        error = errors[number] if number < len(errors) else None  # the paper gives no intervals
        drawn = overall.bar(places, values, width, label=name, yerr=error, capsize=2)
        overall.bar_label(drawn, fmt="%.1f", fontsize=7)
    overall.set_xticks([x + 0.4 - width / 2 for x in range(len(SCORES))], [label for _, label in SCORES])
    overall.set_ylabel("%")
    figure.legend(loc="outside upper left", ncols=4, fontsize=8)
    for axes, key, label in ((by_masks, "by_masks", "masks in the image"), (by_area, "by_area", "area of the mask")):
        for report in reports:
            groups = report[key]
            axes.plot([g["group"] for g in groups], [100 * g["avg"] for g in groups], marker="o", label=report["run"])
        axes.set_xlabel(label)
        axes.set_ylabel("Avg, %")
    save_figure(figure, path)
