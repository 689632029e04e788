"""Forward passes against right captions: measured for several rules of acceptance, to choose one of them.

Here are also the calibration error of the captions' scores, and the temperature that lowers it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from pdlm_hf import RegionCaptioner
from pdlm_hf.shapes.evaluate import calibration_error
from pdlm_hf.shapes.scenes import read


@dataclass
class Measured:
    """What a rule of acceptance costs and gives on held-out images, captioned one at a time.

    Args:
        rule (`dict`): settings of `generate`.
        images, captions (`int`): their numbers.
        forwards (`float`): forward passes an image (chat: an answer), the one over the prompt counted.
        exact (`float`): share of right captions.
        scores (`list[float]`), right (`list[bool]`): of every caption.
    """

    rule: dict[str, Any]
    images: int
    captions: int
    forwards: float
    exact: float
    scores: list[float] = field(repr=False, default_factory=list)
    right: list[bool] = field(repr=False, default_factory=list)

    def to_row(self) -> dict[str, Any]:
        """The numbers as JSON has them, with the expected calibration error of the scores."""
        row = {"rule": self.rule, "images": self.images, "captions": self.captions}
        row |= {"forwards": round(self.forwards, 2), "exact": round(self.exact, 6)}
        return row | ({"ece": round(calibration_error(self.scores, self.right), 4)} if self.scores else {})


def is_right(said: str, expected: str) -> bool:
    """Whether a caption says what is expected: a sentence about a drawn figure has the same attributes, any other text
    the same words."""
    if (figure := read(expected)) is not None:
        return read(said) == figure
    return said.split() == expected.split()


def measure_regions(captioner: RegionCaptioner, rows: Sequence[dict[str, Any]], **rule: Any) -> Measured:
    """Caption held-out images one at a time.

    Args:
        captioner (`RegionCaptioner`), rows: images with captioned regions, see [`~data.RegionDataset`].
        **rule: settings of `generate`.
    """
    forwards, scores, right = 0, [], []
    for row in rows:
        masks = [region["mask"] for region in row["regions"]]
        with torch.inference_mode():
            found, output = captioner.generate([(row["image"], masks)], row.get("question"), **rule)
        forwards += output.num_forwards or 0
        for region, caption in zip(row["regions"], found[0], strict=True):
            scores.append(caption.score)
            right.append(is_right(caption.text, region["caption"]))
    return Measured(rule, len(rows), len(right), forwards / len(rows), float(np.mean(right)), scores, right)


def sweep(measure: Callable[..., Measured], rules: Sequence[dict[str, Any]]) -> list[Measured]:
    """Measure every rule.

    Args:
        measure: takes a rule's settings; [`measure_regions`] for example.
        rules (`list[dict]`): settings of `generate`.
    """
    return [measure(**rule) for rule in rules]


def choose(measured: Sequence[Measured], tolerance: float) -> Measured:
    """The rule with the fewest forward passes whose share of right captions is at most `tolerance` below the best."""
    best = max(found.exact for found in measured)
    return min((found for found in measured if found.exact >= best - tolerance), key=lambda found: found.forwards)


# ---------------------------------------------------------------------------------------------------- scores


def fit_temperature(scores: Sequence[float], right: Sequence[bool]) -> float:
    """The temperature T for which sigmoid(logit(score) / T) has the highest likelihood.

    Args:
        scores (`Sequence[float]`), right (`Sequence[bool]`): scores in [0, 1], and whether each caption is right.
    """
    odds = _log_odds(scores)
    hits = np.asarray(right, float)
    candidates = np.geomspace(0.05, 20, 400)
    logits = odds / candidates[:, None]
    losses = (np.logaddexp(0, logits) - hits * logits).mean(1)
    return float(candidates[losses.argmin()])


def at_temperature(scores: Sequence[float], temperature: float) -> list[float]:
    """Scores at a temperature, see [`fit_temperature`]."""
    return (1 / (1 + np.exp(-_log_odds(scores) / temperature))).tolist()


def _log_odds(scores: Sequence[float]) -> np.ndarray:
    values = np.clip(np.asarray(scores, float), 1e-6, 1 - 1e-6)
    return np.log(values) - np.log1p(-values)
