"""From replies to scores: the reference's arithmetic, with nothing left out of a denominator.

For a mask: every question scores what the chosen answer is worth; if the judge does not recognise the region in the
caption, at most 0. A mask's Pos and Neg are the means over its positive and negative questions, its score the mean
over all. The benchmark's Pos is the mean over all masks, where one without positive question counts 0; Neg the mean
over the masks that have negative questions; Avg is (Pos + Neg) / 2. A missing caption, a failed call and a reply that
names no choice score 0 and are counted.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pdlm_hf.errors_pdlm import DataError, SettingError
from pdlm_hf.regions.files import load_json

from .data import BENCHMARKS, Question
from .parsing import Parser, parse_reference, parse_robust

PARSERS = ("robust", "reference")
RECOGNITION = ("Yes", "No")  # choices of the question that comes first


@dataclass(frozen=True)
class MaskScore:
    """The score of one mask.

    Args:
        id (`str`): the mask.
        score (`float`): mean over its questions.
        score_pos (`float`): mean over the positive ones; 0 if there is none.
        score_neg (`float`, *optional*): mean over the negative ones; None if there is none.
        recognised (`bool`, *optional*): whether the judge recognised the region; None if its reply does not say.
        chosen (`tuple`): position of the choice for recognition and every question, None where there is none.
        num_positive (`int`): positive questions.
        num_unparsed, num_failed (`int`): replies that name no choice, and calls without a reply.
        missing (`bool`): there was no caption.
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
        """For a JSON file."""
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
    """The reader of replies with this name. Raises: SettingError if there is none."""
    if name not in PARSERS or benchmark not in BENCHMARKS:
        raise SettingError(
            f"The parser must be one of {', '.join(PARSERS)}, the benchmark one of {', '.join(BENCHMARKS)}; got "
            f"{name!r}, {benchmark!r}."
        )
    return parse_robust if name == "robust" else partial(parse_reference, benchmark=benchmark)


def read_answers(path: Path, questions: Mapping[str, Sequence[Question]]) -> dict[str, list[str | None]]:
    """An answers file `{mask_id: [reply to the recognition question, reply to question 1, ...]}`, checked.

    A null is a call that failed for good; so is what a list is short of. Masks without caption are absent.

    Raises:
        DataError: another form, a mask that has no questions, or more replies than questions.
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
        mask_id (`str`): its id.
        questions: in the order of qa.json.
        replies (*optional*): to the recognition question, then to each question; None where a call failed, or instead
            of the list if there was no caption.
        parser (`str`): "robust" or "reference". They also differ in what becomes of a recognition that cannot be read:
            "robust" takes the region as not recognised, "reference" goes on as if it were.
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
    """Scores of all masks of a benchmark, in its order.

    Args:
        questions: of every mask, from [`data.load_questions`].
        answers: replies, from [`read_answers`]; masks that are absent had no caption.
        parser, benchmark (`str`): see [`score_mask`].
    """
    return [score_mask(key, asked, answers.get(key), parser, benchmark) for key, asked in questions.items()]


def totals(scores: Iterable[MaskScore]) -> dict[str, Any]:
    """What the benchmark reports about some masks, all of them usually.

    Returns:
        `avg_pos`, `avg_neg`, `avg` (of the two), `mean_mask_score`, and counts: `n_masks`, `n_recognised`,
        `n_unparsed`, `n_missing`, `n_failed`, `n_no_positive` (masks without positive question, which count 0 in
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


def _mean(values: Sequence[float], count: int | None = None) -> float:
    """Sum over count, 0.0 of nothing; added one by one from the left, as `sum` did before Python 3.12."""
    total = 0.0
    for value in values:
        total += value
    count = len(values) if count is None else count
    return total / count if count else 0.0
