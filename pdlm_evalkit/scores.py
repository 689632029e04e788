"""Scores among all numbers that a harness writes, with their unit."""

import math
from pathlib import Path
from typing import Any

from pdlm_hf.errors_pdlm import DataError

from .benchmarks import Benchmark

_WHOLE = ("", "split=none", "split=Overall", "Task&Skill=Overall")  # what VLMEvalKit writes before scores of all rows


def score_in(metrics: dict[str, Any], wanted: str, percents: bool, split: str | None = None) -> float | None:
    """Find a score.

    Args:
        metrics (`dict`): the scores of a harness by name; in VLMEvalKit the split comes before the name.
        wanted (`str`): a name, or names joined by "+" for their mean.
        percents (`bool`): whether the scores are in percent already, instead of shares.
        split (`str`, *optional*): the split to read if there are several, and no score of all.

    Returns:
        the score in percent; None if there is none.
    """
    found = []
    for name in wanted.split("+"):
        splits = {key.rpartition("|")[0]: value for key, value in metrics.items() if key.rpartition("|")[2] == name}
        chosen = next((place for place in (*_WHOLE, f"split={split}") if place in splits), None)
        value = splits.get(chosen) if chosen is not None else next(iter(splits.values())) if len(splits) == 1 else None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            return None
        found.append(value)
    return round(sum(found) / len(found) * (1 if percents else 100), 2)


def as_percent(score: float | None, file: Path, benchmark: str) -> float | None:
    """A score between 0 and 100. Raises: DataError: it is not; the message names the file."""
    if score is not None and not 0 <= score <= 100:
        raise DataError(
            f"{file}: {benchmark} has the score {score:g}, which is no percentage. The file is damaged, or another "
            "version of the harness wrote it than those in docs/evaluation.md."
        )
    return None if score is None else round(score, 2)


def note_on_splits(metrics: dict[str, Any], benchmark: Benchmark) -> str:
    """Say so if a score is of all rows, and the paper's is of one split."""
    if benchmark.name == "MMMU" and "split=none|Overall" in metrics:
        return "data without a column `split`: all rows count, the paper's score is that of validation"
    return ""
