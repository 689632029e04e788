"""Scores of read attributes: accuracy, calibration and confusions of each, from the rows of a run."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from pdlm_hf.attributes.schema import AttributeSchema, text_of

from .bootstrap import limits, resample
from .labels import LabelledRegions

UNKNOWN, NO_ANSWER = "unknown", "no answer"  # columns of a confusion matrix beside the choices
_SHOWN = 12  # choices of a confusion matrix that is printed


def score_rows(labels: LabelledRegions, rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Compare what was read with the right values.

    Args:
        labels ([`~labels.LabelledRegions`])
        rows: of `pdlm batch --schema`, or from a run of this benchmark.

    Returns:
        `dict` with `benchmark`, `n_images`, `n_regions`, `n_missing` (regions without a row; they count as wrong),
        `all_right` (share of the regions whose labelled attributes are all right) and its `interval` (95 %, by a
        bootstrap over images), `ece` (calibration error of all values), and `attributes`: by name `n` (labelled
        regions), `accuracy`, `interval`, `majority` (share of the most frequent right value, which is the accuracy of
        whoever always says it), `mean_probability`, `ece` and `confusion` (right value -> read value -> regions; None
        for a free text).
    """
    found = {(row["image_id"], row["annotation_id"]): row["attributes"] for row in rows}
    names = list(labels.schema.attributes)
    answers = {name: _Answers() for name in names}
    whole = _Answers()
    for key, values in labels.truth.items():
        read = found.get(key)
        for name, right in values.items():
            answers[name].add(key[0], right, None if read is None else read[name], _is_free(labels.schema, name))
        if values:
            whole.hits.append((key[0], all(answers[name].hits[-1][1] for name in values)))
    said = [pair for own in answers.values() for pair in own.certain]
    accuracy, interval = whole.accuracy()
    return {
        "benchmark": labels.name,
        "n_images": len(labels.data.entries),
        "n_regions": len(labels.truth),
        "n_missing": sum(key not in found for key in labels.truth),
        "all_right": accuracy,
        "interval": interval,
        "ece": _ece(said),
        "attributes": {name: own.report(_is_free(labels.schema, name)) for name, own in answers.items()},
    }


def _is_free(schema: AttributeSchema, name: str) -> bool:
    return schema.attributes[name].choices is None


class _Answers:
    """What was read of one attribute."""

    def __init__(self) -> None:
        self.hits: list[tuple[Any, bool]] = []  # image, whether it is right
        self.certain: list[tuple[float, bool]] = []  # probability of a value that was said, whether it is right
        self.pairs: Counter[tuple[str, str]] = Counter()

    def add(self, image: Any, right: str, read: dict[str, Any] | None, is_free: bool) -> None:
        """Count one region; `read` is None where there is no row."""
        value = None if read is None else read["value"]
        said = NO_ANSWER if read is None else UNKNOWN if value is None else text_of(value)
        hit = value is not None and (said.casefold() == right.casefold() if is_free else said == right)
        self.hits.append((image, hit))
        self.pairs[right, said] += 1
        if read is not None and value is not None:
            self.certain.append((float(read["probability"]), hit))

    def accuracy(self) -> tuple[float | None, list[float] | None]:
        """Share of the right ones, and its 95 % interval; None if there are none."""
        if not self.hits:
            return None, None
        sums: dict[Any, list[int]] = {}
        for image, hit in self.hits:
            own = sums.setdefault(image, [0, 0])
            own[0], own[1] = own[0] + hit, own[1] + 1
        drawn = resample(np.array(list(sums.values())))[:, 0]
        low, high = limits(drawn[:, 0] / drawn[:, 1])
        return round(sum(hit for _, hit in self.hits) / len(self.hits), 4), [round(low, 4), round(high, 4)]

    def report(self, is_free: bool) -> dict[str, Any]:
        accuracy, interval = self.accuracy()
        rights = Counter(right for right, said in self.pairs.elements())
        confusion: dict[str, dict[str, int]] = {}
        for (right, said), count in sorted(self.pairs.items()):
            confusion.setdefault(right, {})[said] = count
        return {
            "n": len(self.hits),
            "accuracy": accuracy,
            "interval": interval,
            "majority": round(max(rights.values()) / len(self.hits), 4) if self.hits else None,
            "mean_probability": round(float(np.mean([p for p, _ in self.certain])), 4) if self.certain else None,
            "ece": _ece(self.certain),
            "confusion": None if is_free else confusion,
        }


def _ece(pairs: list[tuple[float, bool]]) -> float | None:
    from pdlm_hf.shapes.evaluate import calibration_error

    return round(calibration_error([p for p, _ in pairs], [hit for _, hit in pairs]), 4) if pairs else None


def tables_of(scores: dict[str, Any]) -> Group:
    """The scores as tables for the terminal."""
    table = Table(title=f"{escape(scores['benchmark'])}: {scores['n_regions']} regions of {scores['n_images']} images")
    for name in ("attribute", "labelled", "right", "95 %", "most frequent value", "mean probability", "ECE"):
        table.add_column(name, justify="left" if name == "attribute" else "right")
    whole = {"accuracy": scores["all_right"], **scores}
    for name, row in [*scores["attributes"].items(), ("all", whole)]:
        shares = [row["accuracy"], row.get("majority"), row.get("mean_probability")]
        right, majority, mean = ("" if share is None else f"{share:.1%}" for share in shares)
        interval = "" if row["interval"] is None else "{:.1%} - {:.1%}".format(*row["interval"])
        ece = "" if row["ece"] is None else f"{row['ece']:.3f}"
        table.add_row(escape(name), str(row.get("n", "")), right, interval, majority, mean, ece)
    return Group(table, *(found for name, row in scores["attributes"].items() if (found := _confusion(name, row))))


def _confusion(name: str, row: dict[str, Any]) -> Table | None:
    """The confusion matrix of an attribute; None for a free text, or if it would be too wide."""
    if row["confusion"] is None:
        return None
    said = dict.fromkeys(row["confusion"]) | dict.fromkeys(s for own in row["confusion"].values() for s in own)
    if len(said) > _SHOWN:
        return None
    table = Table(title=f"{escape(name)}: right value by row, read value by column")
    table.add_column("")
    for value in said:
        table.add_column(escape(value), justify="right")
    for right, own in row["confusion"].items():
        table.add_row(escape(right), *(str(own.get(value, "")) for value in said))
    return table
