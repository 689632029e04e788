"""Scores from replies: the reference's arithmetic, in which every mask and question counts.

A question scores the points of the chosen answer; if the judge does not recognise the region in the caption, at most
0. The Pos and Neg of a mask are the means over its positive and negative questions, its score is the mean over all.
The Pos of the benchmark is the mean over all masks, where a mask without positive questions counts 0; Neg is the mean
over the masks that have negative questions; Avg is (Pos + Neg) / 2. A missing caption, a failed request and a reply
that names no choice score 0 and are counted.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pdlm_hf.errors_pdlm import DataError, SettingError
from pdlm_hf.regions.files import load_json

from ..bootstrap import limits, resample
from .data import BENCHMARKS, Question
from .parsing import Parser, parse_reference, parse_robust

PARSERS = ("robust", "reference")
RECOGNITION = ("Yes", "No")  # choices of the first question


@dataclass(frozen=True)
class MaskScore:
    """The score of one mask.

    Args:
        id (`str`): the id of the mask.
        score (`float`): mean over its questions.
        score_pos (`float`): mean over its positive questions; 0 if there is none.
        score_neg (`float`, *optional*): mean over its negative questions; None if there is none.
        recognised (`bool`, *optional*): whether the judge recognised the region; None if the reply names no choice.
        chosen (`tuple`): position of the choice for recognition and every question; None if the reply names none.
        num_positive (`int`): number of positive questions.
        num_unparsed, num_failed (`int`): number of replies that name no choice, and of requests without a reply.
        missing (`bool`): whether there was no caption.
    """

    id: str
    score: float
    score_pos: float
    score_neg: float | None
    recognised: bool | None
    chosen: tuple[int | None, ...]
    num_positive: int
    num_unparsed: int = 0
    num_failed: int = 0
    missing: bool = False

    def as_dict(self) -> dict[str, Any]:
        """The score as a dict, for a JSON file."""
        return {
            "score": self.score,
            "score_pos": self.score_pos,
            "score_neg": self.score_neg,
            "recognition": self.recognised,
            "pred_indices": list(self.chosen),
            "n_unparsed": self.num_unparsed,
            "n_failed": self.num_failed,
            "missing": self.missing,
        }


def choose_parser(name: str, benchmark: str = "paradlc") -> Parser:
    """The parser of replies with a name. Raises: SettingError: there is no such parser or benchmark."""
    if name not in PARSERS or benchmark not in BENCHMARKS:
        raise SettingError(
            f"The parser must be one of {', '.join(PARSERS)}, the benchmark one of {', '.join(BENCHMARKS)}; got "
            f"{name!r}, {benchmark!r}."
        )
    return parse_robust if name == "robust" else partial(parse_reference, benchmark=benchmark)


def read_answers(path: Path, questions: Mapping[str, Sequence[Question]]) -> dict[str, list[str | None]]:
    """Read and check an answers file `{mask_id: [reply to the recognition question, reply to question 1, ...]}`.

    A null, or a missing reply at the end of a list, is a request that failed. Masks without a caption are absent.

    Raises:
        DataError: the file has another form, a mask without questions, or more replies than questions.
    """
    answers = load_json(path)
    if not isinstance(answers, dict):
        raise DataError(f"{path}: expected an object {{mask_id: [replies]}}.")
    if unknown := [key for key in answers if key not in questions]:
        raise DataError(f"{path}: {len(unknown)} masks are not in the benchmark: {', '.join(unknown[:5])}.")
    for mask_id, replies in answers.items():
        if not isinstance(replies, list) or not all(reply is None or isinstance(reply, str) for reply in replies):
            raise DataError(f"{path}: {mask_id}: expected a list of replies, each a string or null.")
        expected = 1 + len(questions[mask_id])
        if len(replies) > expected:
            raise DataError(
                f"{path}: {mask_id} has {len(replies)} replies to {expected} questions (recognition included)."
            )
    return answers


def score_mask(
    mask_id: str, questions: Sequence[Question], replies: Sequence[str | None] | None, parser: str, benchmark: str
) -> MaskScore:
    """The score of one mask.

    Args:
        mask_id (`str`): the id of the mask.
        questions: the questions in the order of qa.json.
        replies (*optional*): replies to the recognition question and to each question, None for a failed request; or
            None if there was no caption.
        parser (`str`): "robust" or "reference". If the reply to the recognition question names no choice, the region
            counts as not recognised for "robust", and as recognised for "reference".
        benchmark (`str`): "paradlc" or "dlc".
    """
    parse = choose_parser(parser, benchmark)
    missing = replies is None
    padded = [*(replies or []), *[None] * (1 + len(questions) - len(replies or []))]
    options = [RECOGNITION, *(question.choices for question in questions)]
    chosen = [None if reply is None else parse(reply, texts) for reply, texts in zip(padded, options, strict=True)]
    recognised = None if chosen[0] is None else chosen[0] == 0
    clip = not recognised if parser == "robust" else recognised is False
    scores: dict[str, list[float]] = {"positive": [], "negative": []}
    for question, index in zip(questions, chosen[1:], strict=True):
        score = 0 if index is None else question.scores[index]
        scores[question.type].append(min(0, score) if clip else score)
    positive, negative = scores["positive"], scores["negative"]
    failed = 0 if missing else sum(reply is None for reply in padded)
    return MaskScore(
        mask_id,
        _mean([sum(positive) + sum(negative)], len(questions)),
        _mean(positive) if positive else 0.0,
        _mean(negative) if negative else None,
        recognised,
        tuple(chosen),
        len(positive),
        0 if missing else sum(index is None for index in chosen) - failed,
        failed,
        missing,
    )


def score_answers(
    questions: Mapping[str, Sequence[Question]],
    answers: Mapping[str, Sequence[str | None]],
    parser: str = "robust",
    benchmark: str = "paradlc",
) -> list[MaskScore]:
    """The scores of all masks of a benchmark, in its order.

    Args:
        questions: questions of every mask, from [`data.load_questions`].
        answers: replies from [`read_answers`]; masks that are absent had no caption.
        parser, benchmark (`str`): see [`score_mask`].
    """
    return [score_mask(key, asked, answers.get(key), parser, benchmark) for key, asked in questions.items()]


def totals(scores: Iterable[MaskScore]) -> dict[str, Any]:
    """The scores that the benchmark reports, over all masks or a group of them.

    Returns:
        `avg_pos`, `avg_neg`, `avg` (of the two), `mean_mask_score`, and the counts `n_masks`, `n_recognised`,
        `n_unparsed`, `n_missing`, `n_failed`, `n_no_positive` (masks without positive questions, which count 0 in
        avg_pos).
    """
    scores = list(scores)
    pos = _mean([score.score_pos for score in scores])
    neg = _mean([score.score_neg for score in scores if score.score_neg is not None])
    return {
        "avg_pos": pos,
        "avg_neg": neg,
        "avg": (pos + neg) / 2,
        "mean_mask_score": _mean([score.score for score in scores]),
        "n_masks": len(scores),
        "n_recognised": sum(score.recognised is True for score in scores),
        "n_unparsed": sum(score.num_unparsed for score in scores),
        "n_missing": sum(score.missing for score in scores),
        "n_failed": sum(score.num_failed for score in scores),
        "n_no_positive": sum(score.num_positive == 0 for score in scores),
    }


def intervals(scores: Sequence[MaskScore], image_of: Mapping[str, str]) -> dict[str, tuple[float, float]]:
    """95 % intervals of the scores, by a bootstrap over the images (see [`bootstrap.resample`]). The masks of an image
    are drawn together, since their captions are written together.

    Args:
        scores: the scores of all masks.
        image_of: the image of every mask, by mask id.

    Returns:
        lower and upper limit of `avg_pos`, `avg_neg`, `avg` and `mean_mask_score`, as in [`totals`].
    """
    images = sorted(set(image_of.values()))
    row = {image: k for k, image in enumerate(images)}
    sums = np.zeros((len(images), 5))  # positive, negative and all scores, masks, masks with a negative score
    for score in scores:
        negative = score.score_neg
        sums[row[image_of[score.id]]] += (score.score_pos, negative or 0, score.score, 1, negative is not None)
    drawn = resample(sums)[:, 0]
    masks, negatives = np.maximum(drawn[:, 3], 1), np.maximum(drawn[:, 4], 1)
    pos, neg, mean = drawn[:, 0] / masks, drawn[:, 1] / negatives, drawn[:, 2] / masks
    found = {"avg_pos": pos, "avg_neg": neg, "avg": (pos + neg) / 2, "mean_mask_score": mean}
    return {name: limits(values) for name, values in found.items()}


def _mean(values: Sequence[float], count: int | None = None) -> float:
    """The sum divided by the count, 0.0 without values; added from the left, as `sum` did before Python 3.12."""
    total = 0.0
    for value in values:
        total += value
    count = len(values) if count is None else count
    return total / count if count else 0.0
