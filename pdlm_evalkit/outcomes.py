"""Points of every question, from the files of both harnesses and of the strict judge, for confidence intervals.

A score is recomputed from the points, in the way its harness computes it: as a mean over questions, over sources or
categories first, or over figures and questions of HallusionBench. What is drawn in the bootstrap is what is
independent: a question with all its rotations (MMBench), a pair (MMVP), a set of figures and questions
(HallusionBench). An interval of a score that cannot be recomputed exactly is not given.
"""

import glob
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pdlm_hf.errors_pdlm import DataError

from .benchmarks import Benchmark
from .bootstrap import limits, resample
from .tables import read_lines, read_table

TOLERANCE = 0.0051  # percentage points: scores are rounded to two digits
_NAMES = {"chatgpt-0125": "openai", "gpt-4-0125": "gpt4"}  # judges in VLMEvalKit's file names
_NUMBER = re.compile(r"True|False|(?<![\w.])\d+(?:\.\d+)?(?:e-?\d+)?")  # of a list, also of numpy's `np.float64(0.5)`
# of a sample of lmms-eval: where the points of a question are
_POINTS = ("score", "is_correct", "true_false")


@dataclass
class Outcomes:
    """Points of a benchmark.

    Args:
        sums (`np.ndarray` of shape `(units, ratios, 2)`): points, and what they are divided by, that each unit adds.
        strata (`list[str]`): the stratum of each unit; the score is the mean over strata and ratios.
    """

    sums: np.ndarray
    strata: list[str]

    @property
    def score(self) -> float:
        """The score in percent."""
        totals = np.stack([self.sums[np.asarray(self.strata) == name].sum(0) for name in sorted(set(self.strata))])
        return float(100 * (totals[..., 0] / totals[..., 1]).mean())

    def interval(self) -> tuple[float, float]:
        """The 95 % interval of the score in percent, see [`bootstrap.resample`]."""
        drawn = resample(self.sums.reshape(len(self.sums), -1), self.strata)
        drawn = drawn.reshape(*drawn.shape[:2], -1, 2)
        return limits(100 * (drawn[..., 0] / drawn[..., 1]).mean((1, 2)))


def interval_of(score: float, read: Callable[[], Outcomes]) -> tuple[tuple[float, float] | None, str]:
    """The interval of a score, or the reason why there is none.

    Args:
        score (`float`): the score that the harness wrote, in percent.
        read: function that reads the points, and raises DataError if there are none.
    """
    try:
        found = read()
    except DataError as error:
        return None, str(error)
    if not abs(found.score - score) < TOLERANCE:
        return None, f"the points of the questions give {found.score:.2f} instead of {score:.2f}"
    low, high = found.interval()
    return (round(low, 2), round(high, 2)), ""


# -------------------------------------------------------------------- VLMEvalKit


def of_vlmeval(benchmark: Benchmark, folder: Path, dataset: str, judge: str | None) -> Outcomes:
    """The points of a data set in a run folder of VLMEvalKit.

    Args:
        benchmark (`Benchmark`): the benchmark of the data set.
        folder (`Path`): the run folder.
        dataset (`str`): the name of the data set in VLMEvalKit.
        judge (`str`, *optional*): the name of the judge, which is in the names of the files.

    Raises:
        DataError: the file is not there, or has another form.
    """
    path = _table(folder, dataset, judge, _suffix_of(benchmark))
    rows = read_table(path)
    if not rows:
        raise DataError(f"{path}: the file has no rows")
    if benchmark.name == "MMMU" and (of_split := [row for row in rows if row.get("split") == benchmark.split]):
        rows = of_split  # the only one of the 16 whose data have another split too
    try:
        points = [_vlmeval_points(benchmark, row) for row in rows]
        if benchmark.name == "HallusionBench":
            return hallusion(_hallusion_rows(rows), points)
    except (KeyError, ValueError, IndexError) as error:
        raise DataError(f"{path}: not the points of {benchmark.name} ({error!r})") from None
    if benchmark.name == "MMVP":
        return _clusters(points, [number // 2 for number in range(len(rows))])
    sources = [str(row["source"]) for row in rows] if benchmark.name == "CV-Bench-2D" else None
    return _questions(points, sources)


def _suffix_of(benchmark: Benchmark) -> str:
    """What follows model and data set in the name of the table; `*` stands for the judge."""
    special = {"HallusionBench": "_auxmatch", "MathVista": "_*", "MathVerse Vision-Only": "_*_score"}
    return special.get(benchmark.name, "_results" if benchmark.kind == "document" else "_*_result")


def _table(folder: Path, dataset: str, judge: str | None, suffix: str) -> Path:
    names = [judge, _NAMES.get(judge)] if judge else []
    for name in (*filter(None, names), None):
        end = suffix if name is None else suffix.replace("*", glob.escape(name))
        found = [
            path
            for kind in ("xlsx", "tsv")
            for path in folder.glob(f"*_{glob.escape(dataset)}{end}.{kind}")
            if not path.is_symlink()
        ]
        if len(found) == 1:
            return found[0]
    raise DataError(
        f"{folder}: {'several files' if found else 'no file'} *_{dataset}{suffix} with points of questions"
    )


def _vlmeval_points(benchmark: Benchmark, row: dict[str, Any]) -> float:
    if benchmark.kind == "document":
        match = [_points(text) for text in _NUMBER.findall(str(row["eval_match"]))]
        if benchmark.name == "ChartQA":
            return max(match)
        similarity = 1 - min(match)  # ANLS: distances to the right answers
        return similarity if similarity >= 0.5 else 0.0
    if benchmark.name == "MathVista":
        return float(_mathvista_is_right(row))
    return _points(row["hit"] if "hit" in row else row["score"])


def _points(value: Any) -> float:
    """Points from a cell: a number, or True and False, also as text. Raises: ValueError."""
    return float({"True": 1, "False": 0}.get(str(value), value))


def _mathvista_is_right(row: dict[str, Any]) -> bool:
    said = str(row["res"])
    if row["question_type"] == "multi_choice":
        options = dict(zip("ABCDEFGH", re.findall(r"'([^']*)'", str(row["choices"])), strict=False))
        letters = {word for word in re.findall(r"\w+", said) if word in options}
        texts = {letter for letter, text in options.items() if text.lower() in said.lower()}
        chosen = letters if len(letters) == 1 else texts
        return chosen == {str(row["answer_option"])}
    kind = {"integer": int, "float": float}.get(row["answer_type"])
    if kind is None:  # VLMEvalKit compares its own empty result here
        return str(row["answer"]) == "None"
    try:
        return kind(row["res"]) == kind(row["answer"])
    except ValueError:
        return False


def _hallusion_rows(rows: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Set, figure and question of each row."""
    names = [(str(row["l2-category"]), str(row["index"]).split("_")) for row in rows]
    return [(f"{kind}_{parts[3]}", parts[4], parts[5]) for kind, parts in names]


def hallusion(names: list[tuple[str, str, str]], points: list[float]) -> Outcomes:
    """The points of HallusionBench, whose score is the mean of aAcc (questions), fAcc (figures) and qAcc (questions
    asked of several figures). Figures and questions cross within a set, so that sets are drawn.

    Args:
        names: set, figure and question of each row.
        points: whether each row is right.
    """
    sets: dict[str, list[list[float]]] = defaultdict(lambda: [[0, 0], [0, 0], [0, 0]])
    groups: dict[tuple[int, str, str], list[float]] = defaultdict(list)
    for number, ((name, figure, question), point) in enumerate(zip(names, points, strict=True)):
        for ratio, part in enumerate((str(number), figure, question)):
            groups[ratio, name, part].append(point)
    for (ratio, name, _), all_points in groups.items():
        sets[name][ratio][0] += min(all_points)
        sets[name][ratio][1] += 1
    return Outcomes(np.array(list(sets.values()), dtype=float), [""] * len(sets))


# -------------------------------------------------------------------- lmms-eval and the strict judge


def of_lmms(benchmark: Benchmark, samples: Iterable[Path]) -> Outcomes:
    """The points of a task in its samples files.

    Args:
        benchmark (`Benchmark`): the benchmark of the task.
        samples: the samples files of the task, or of the tasks in its group.

    Raises:
        DataError: there is no file, or no points in it.
    """
    if benchmark.name in ("MMBench", "HallusionBench"):
        raise DataError("lmms-eval keeps no verdict of single questions")
    rows: list[Any] = []
    for path in samples:
        try:
            rows += [row[benchmark.lmms_metric] for row in read_lines(path) if benchmark.lmms_metric in row]
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{path}: cannot be read ({error})") from None
    if not rows:
        raise DataError(f"no samples file with {benchmark.lmms_metric} of single questions")
    try:
        points = [_lmms_points(row) for row in rows]
        if benchmark.name == "MMVP":
            return _clusters(points, [row["pair_index"] for row in rows])
        return _questions(points, [row["l2_category"] for row in rows] if benchmark.name == "MMStar" else None)
    except (KeyError, ValueError, TypeError) as error:
        raise DataError(f"not the points of {benchmark.name} ({error!r})") from None


def _lmms_points(row: Any) -> float:
    if not isinstance(row, dict):
        return _points(row)
    if (name := next((name for name in _POINTS if name in row), None)) is not None:
        return _points(row[name])
    if "parsed_pred" in row:  # MMMU
        if row["question_type"] != "multiple-choice":
            raise ValueError("lmms-eval keeps no verdict of open questions")
        return float(row["parsed_pred"][0] in (row["answer"], *row["answer"]))
    return float(row["pred"].lower().strip() == row["answer"].lower().strip())


def of_strict(verdicts: Path) -> Outcomes:
    """The points in the verdicts of `pdlm-eval strict`. Raises: DataError: the file is not there, or damaged."""
    try:
        return _questions([float(row["verdict"] == "CORRECT") for row in read_lines(verdicts)])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{verdicts}: no verdicts ({error!r})") from None


def _questions(points: list[float], strata: list[str] | None = None) -> Outcomes:
    if not points:
        raise DataError("no questions")
    return Outcomes(np.array([[(point, 1)] for point in points], dtype=float), strata or [""] * len(points))


def _clusters(points: list[float], of: list[int]) -> Outcomes:
    """Questions that are drawn together."""
    sums: dict[int, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for point, cluster in zip(points, of, strict=True):
        sums[cluster][0] += point
        sums[cluster][1] += 1
    return Outcomes(np.array(list(sums.values()))[:, None, :], [""] * len(sums))
